"""What torch keeps for a whole process and an export depends on, as an export needs it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def standard_torch_state() -> Iterator[None]:
    """Use torch as it is after its import: float32 on the CPU, no autocast, no inference mode.

    Afterwards the state is as it was. Also usable as a decorator.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as modes:
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            if torch.is_autocast_enabled("cpu"):
                modes.enter_context(torch.autocast("cpu", enabled=False))
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            yield
    finally:
        torch.set_default_dtype(dtype)
