"""Every layout, by domain."""

from tests.layouts import (
    audio,
    forecasting,
    generative,
    graphs,
    language,
    patches,
    practices,
    science,
    segmentation,
    tabular,
    vision,
)

LAYOUTS = (
    *segmentation.LAYOUTS,
    *vision.LAYOUTS,
    *patches.LAYOUTS,
    *generative.LAYOUTS,
    *language.LAYOUTS,
    *forecasting.LAYOUTS,
    *audio.LAYOUTS,
    *science.LAYOUTS,
    *graphs.LAYOUTS,
    *tabular.LAYOUTS,
    *practices.LAYOUTS,
)
