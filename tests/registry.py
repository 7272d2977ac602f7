"""The operators that torch.onnx knows, read once in a process, in place of once an export.

torch parses the source of 500 of them for every export, which takes a third of a small one's time,
and finds the same each time. Where torch has none of the names below, nothing changes.
"""

import copy
import functools
from contextlib import suppress


def read_operators_once() -> None:
    """Make every further export in this process take the operators that the first one has read."""
    with suppress(ImportError, AttributeError):
        from torch.onnx._internal.exporter import _registration

        read = functools.cache(_registration.ONNXRegistry.from_torchlib)

        def from_torchlib(opset_version: int = 18) -> _registration.ONNXRegistry:
            registry = copy.copy(read(opset_version))
            registry.functions = {key: list(found) for key, found in registry.functions.items()}
            return registry

        _registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
