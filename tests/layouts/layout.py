"""What a layout is: a factory, how the exporter is called for it, and what the result must be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Arrays = Mapping[str, NDArray[Any]]
Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Layout:
    """One network of the catalogue.

    Attributes:
        build: Makes the network, with the same weights each time.
        shape: `input_shape` of the export; None where `samples` say it.
        samples: Draws rows of data, by input name; None exports without samples.
        save: Makes what `torch.save` writes, from the network; None exports the module itself.
        options: Further arguments of the export.
        layers: KANLinear layers that the export must recognise.
        refusal: Words that the refusal must hold; None if the network must be exported.
        remedy: The layout that does what the refusal says, and is exported.
        warning: Words of a warning that the export must give; None if any will do.
    """

    build: Factory
    layers: int
    shape: Any = None
    samples: Callable[[np.random.Generator], Arrays] | None = None
    save: Callable[[nn.Module], Any] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    refusal: str | None = None
    remedy: "Layout | None" = None
    warning: str | None = None

    @property
    def name(self) -> str:
        """Name of the network, which is its factory's."""
        return self.build.__name__

    def rows(self, seed: int = 0) -> Arrays | None:
        """Draw the samples."""
        return None if self.samples is None else self.samples(np.random.default_rng(seed))


def seeded(make: Factory, seed: int = 0) -> nn.Module:
    """Build a network with the weights of a seed and running statistics as training leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        for part in network.modules():
            mean, var = getattr(part, "running_mean", None), getattr(part, "running_var", None)
            if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
                mean.normal_(0, 0.3)
                var.uniform_(0.5, 1.5)
    return network.eval()


def floats(*shape: int, rows: int = 24, scale: float = 1.0) -> Callable[..., Arrays]:
    """Draw one input of standard normal numbers, called `x`."""
    return lambda rng: {"x": _normal(rng, rows, *shape, scale=scale)}


def normal(rng: np.random.Generator, *shape: int) -> NDArray[Any]:
    """Draw float32 numbers of a standard normal distribution."""
    return _normal(rng, *shape, scale=1.0)


def _normal(rng: np.random.Generator, *shape: int, scale: float) -> NDArray[Any]:
    return (scale * rng.standard_normal(shape)).astype(np.float32)
