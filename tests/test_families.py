"""Networks of other families: refused by name as state dicts, exported as written from --model."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import export_checkpoint
from kan_model import KAN, CheckpointError, load_checkpoint
from tests.bundles import CLOSE, run_onnx
from tests.states import saved
from tests.zoo import KANLinear, MaskedKANLinear

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


# Stand-ins with the names of each family's tensors, and mathematics of its kind.


class Gaussians(nn.Module):
    """FastKAN's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(4)
        self.rbf = nn.Module()
        self.rbf.grid = nn.Parameter(torch.linspace(-2, 2, 8), requires_grad=False)
        self.spline_linear = nn.Linear(32, 3, bias=False)
        self.base_linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-(((self.layernorm(x)[..., None] - self.rbf.grid) / 0.5) ** 2))
        y: Tensor = self.spline_linear(basis.flatten(1)) + self.base_linear(nn.functional.silu(x))
        return y


class Chebyshev(nn.Module):
    """ChebyKAN's layer."""

    arange: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cheby_coeffs = nn.Parameter(torch.randn(4, 3, 5) / 4)
        self.register_buffer("arange", torch.arange(0, 5))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.tanh(x)[..., None].clamp(-0.999, 0.999).acos() * self.arange
        return torch.einsum("bid,iod->bo", angle.cos(), self.cheby_coeffs)


class Fourier(nn.Module):
    """FourierKAN's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fouriercoeffs = nn.Parameter(torch.randn(2, 3, 4, 5) / 8)
        self.bias = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, None, :, None] * torch.arange(1, 6)
        y = (angle.cos() * self.fouriercoeffs[0]).sum((2, 3))
        return y + (angle.sin() * self.fouriercoeffs[1]).sum((2, 3)) + self.bias


class Wavelets(nn.Module):
    """Wav-KAN's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 4))
        self.translation = nn.Parameter(torch.zeros(3, 4))
        self.wavelet_weights = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        t = (x[:, None] - self.translation) / self.scale
        return ((t**2 - 1) * torch.exp(-(t**2) / 2) * self.wavelet_weights).sum(2)


class Transposed(nn.Module):
    """KANX's layer: efficient-KAN's names, (in, out), and knots that are not extended."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.base_weight = nn.Parameter(torch.randn(4, 3))
        self.spline_weight = nn.Parameter(torch.randn(4, 3, 8) / 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 6).expand(4, -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        centres = torch.linspace(-1, 1, 8)
        basis = torch.exp(-((x[..., None] - centres) ** 2))
        return nn.functional.silu(x) @ self.base_weight + torch.einsum(
            "bin,ion->bo", basis, self.spline_weight
        )


class Symbolic(MaskedKANLinear):
    """A layer of efficient-kan-plus, one of its edges a function that is code."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.symbolic_mask[0, 1] = 1  # type: ignore[operator]
        self.symbolic_funs = {(0, 1): torch.sin}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.pad(torch.sin(x[:, 1:2]), (0, 2))


class Unbuffered(KANLinear):
    """A fork whose knots are an attribute, so that no state dict has them."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        grid = self.grid
        del self.grid
        self.grid = grid


STAND_INS: dict[str, tuple[type[nn.Module], str]] = {
    "FastKAN": (Gaussians, "looks like FastKAN"),
    "ChebyKAN": (Chebyshev, "looks like ChebyKAN"),
    "FourierKAN": (Fourier, "looks like FourierKAN"),
    "Wav-KAN": (Wavelets, "looks like Wav-KAN"),
    "KANX": (Transposed, "looks like KANX"),
    "efficient-kan-plus": (Symbolic, "1 of 12 edges are symbolic functions"),
    "knots in no buffer": (Unbuffered, "keeps its knots in no buffer"),
}


@pytest.mark.parametrize("family", STAND_INS)
@pytest.mark.filterwarnings("ignore:the network has no KANLinear layer")
def test_the_refusals_remedy_exports_the_network_as_it_is_written(
    tmp_path: Path, family: str
) -> None:
    factory, message = STAND_INS[family]
    torch.manual_seed(0)
    network = factory().eval()
    path = saved(tmp_path, network.state_dict())
    with pytest.raises(CheckpointError, match=message) as error:
        export_checkpoint(path, output=tmp_path)
    assert "give the network with --model package.module:factory" in str(error.value)
    assert "own project" not in str(error.value)
    export_checkpoint(path, output=tmp_path, model=factory, input_shape="4")
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "model" / "1", x.numpy())[0], expected, **CLOSE)


def hdf5(path: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))


def keras(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


@pytest.mark.parametrize("write", [hdf5, keras])
@pytest.mark.filterwarnings("ignore:.*base activation was trained")
def test_weights_of_keras_can_be_copied_into_a_network_of_torch(
    tmp_path: Path, write: object
) -> None:
    path = tmp_path / "model.keras"
    write(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"copy its weights into one \(kan_model\.KAN"):
        export_checkpoint(path, output=tmp_path)
    arrays = [np.random.default_rng(i).normal(size=(3, 4)).astype("f4") for i in range(2)]
    network = KAN([4, 3])
    with torch.no_grad():
        network.layers[0].base_weight.copy_(torch.from_numpy(arrays[0]))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    export_checkpoint(tmp_path / "model.pt", output=tmp_path)
