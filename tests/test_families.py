from pathlib import Path

import pytest
import torch

from kan_model import CheckpointError, load_checkpoint
from tests.states import saved

FAMILIES: dict[str, dict[str, tuple[int, ...]]] = {
    "FastKAN": {"layers.0.rbf.grid": (8,), "layers.0.spline_linear.weight": (3, 16)},
    "FasterKAN": {
        "layers.0.rbf.grid": (8,),
        "layers.0.rbf.inv_denominator": (),
        "layers.0.spline_linear.weight": (3, 16),
    },
    "BSRBF-KAN": {
        "layers.0.base_weight": (3, 2),
        "layers.0.spline_weight": (3, 16),
        "layers.0.grid": (2, 12),
        "layers.0.rbf.grid": (8,),
    },
    "ChebyKAN": {"chebykan1.cheby_coeffs": (2, 3, 5), "chebykan1.arange": (5,)},
    "pykan": {
        "act_fun.0.grid": (2, 12),
        "act_fun.0.coef": (2, 3, 8),
        "act_fun.0.mask": (2, 3),
        "symbolic_fun.0.mask": (3, 2),
        "node_bias_0": (3,),
    },
    "torch-conv-kan": {
        "layers.0.base_weight": (3, 2),
        "layers.0.spline_weight": (3, 2, 8),
        "layers.0.layer_norm.weight": (3,),
        "layers.0.prelu.weight": (1,),
    },
    "KANX": {
        "layers.0.base_weight": (2, 3),
        "layers.0.spline_weight": (2, 3, 8),
        "layers.0.grid": (2, 6),
    },
    "Wav-KAN": {
        "layers.0.scale": (3, 2),
        "layers.0.translation": (3, 2),
        "layers.0.wavelet_weights": (3, 2),
    },
    "FourierKAN": {"fouriercoeffs": (2, 3, 2, 5), "bias": (1, 3)},
    "SineKAN": {"layers.0.amplitudes": (3, 2, 5), "layers.0.phase": (1, 1, 2, 5)},
    "LKAN": {"layers.0.coeff": (3, 2, 8), "layers.0.scale_base": (3, 2)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_refused_by_name(tmp_path: Path, family: str) -> None:
    state = {key: torch.rand(shape) for key, shape in FAMILIES[family].items()}
    with pytest.raises(CheckpointError, match=f"looks like {family}"):
        load_checkpoint(saved(tmp_path, state))
