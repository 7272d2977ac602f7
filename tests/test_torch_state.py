"""Exports whatever torch was set to before, and afterwards it is still set to that."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import export_checkpoint, export_module
from export.torch_state import standard_torch_state
from kan_model import KAN, KANLinear
from tests.bundles import CLOSE, run_onnx
from tests.states import saved


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("state", STATES)
def test_the_state_is_standard_inside_and_restored_outside(state: str) -> None:
    with STATES[state]():
        x = torch.ones(2, 2)
        before = (x.dtype, x.device, x.is_inference(), torch.is_grad_enabled())
        with standard_torch_state():
            inside = nn.Linear(2, 2)(torch.ones(2, 2))
            assert (inside.dtype, inside.device.type) == (torch.float32, "cpu")
            assert inside.requires_grad
        x = torch.ones(2, 2)
        assert (x.dtype, x.device, x.is_inference(), torch.is_grad_enabled()) == before


class Mixed(nn.Module):
    """Makes tensors of the default type in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kan = nn.Linear(3, 4), KANLinear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(self.first(x) + torch.ones(4))
        return y


def make_mixed() -> Mixed:
    """Build it as a module does that sets the default type when it is imported."""
    torch.set_default_dtype(torch.float64)
    return Mixed()


@pytest.mark.filterwarnings("ignore:the weights are not all float32")
def test_a_default_of_float64_is_no_obstacle(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    with default_dtype(torch.float64):
        kan = KAN([3, 2]).float()
        export_module(kan, name="kan", output=tmp_path)
        assert torch.get_default_dtype() == torch.float64
        expected = kan(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(run_onnx(tmp_path / "kan" / "1", x)[0], expected, **CLOSE)
        checkpoint = saved(tmp_path, kan.state_dict())
        export_checkpoint(checkpoint, output=tmp_path, name="file", activation="silu")
    state = Mixed().state_dict()
    with default_dtype(torch.float32):
        export_checkpoint(
            saved(tmp_path, state), output=tmp_path, name="mixed", model=make_mixed, input_shape=3
        )
        assert torch.get_default_dtype() == torch.float64  # as the factory has set it
