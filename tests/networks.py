"""Small networks for tests, written where they are used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Written(nn.Module):
    """A network of some modules, with a function for its forward.

    Args:
        form: The forward: takes the network and its inputs.
        modules: By name.
    """

    def __init__(self, form: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.form = form

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.form(self, *inputs)


def written(form: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> Written:
    """Write a network in evaluation mode."""
    return Written(form, **modules).eval()
