import re

import pytest
from torch import nn

from kan_model import ActivationError, resolve_activation


def in_place() -> nn.Module:
    return nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mish", "not known; expected one of silu, gelu, relu, tanh, identity"),
        ("Swish", "not known (Swish is silu); expected one of silu, gelu"),
        ("no_such_module:Thing", "cannot be made: ModuleNotFoundError"),
        ("torch.nn:Linear", "cannot be made: TypeError"),
        ("math:tau", "cannot be made: TypeError"),
        ("sys:exit", "cannot be made: SystemExit"),
        ("builtins:list", "makes a list, expected a torch.nn.Module"),
        ("tests.test_activations:in_place", "works in place"),
        ("torch.nn:GLU", "fails on a tensor of shape (2, 3)"),
        ("torch.nn:Module", "fails on a tensor of shape (2, 3): NotImplementedError"),
    ],
)
def test_unusable_activations_are_refused(name: str, message: str) -> None:
    with pytest.raises(ActivationError, match=re.escape(message)):
        resolve_activation(name)


def test_a_name_may_have_capitals() -> None:
    assert resolve_activation("SiLU") is nn.SiLU
    assert resolve_activation("GELU") is nn.GELU
