"""A network run by PyTorch itself, a batch at a time, in float32 or in float64."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from export.network import Call, is_single
from kan_bundle.golden import side_by_side

BATCH_SIZES = (1, 2, 7, 64)
"""Every runtime is run on batches of these sizes."""

LARGEST_BATCH = BATCH_SIZES[-1]

_WIDER = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


class Float64Mode(TorchDispatchMode):
    """Keep every floating-point tensor in float64, whatever precision the network asks for.

    Networks cast on their way (`image.float() / 255`) and make tensors of a fixed precision. Here
    each such operation is asked for float64 instead, so that nothing is rounded.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        args, kwargs = tree_map_only(
            torch.dtype, lambda dtype: _WIDER.get(dtype, dtype), (args, kwargs or {})
        )
        return tree_map_only(
            Tensor,
            lambda y: y.to(_WIDER[y.dtype]) if y.dtype in _WIDER else y,
            func(*args, **kwargs),
        )


def evaluate(
    call: Call,
    inputs: tuple[NDArray[np.generic], ...],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.float64]:
    """Run a network a batch at a time, which bounds the memory it takes.

    Args:
        call: The network, in the precision of `dtype`.
        inputs: One array for each input, shape (rows, ...). They are not changed.
        batch_size: Rows a run.
        dtype: What floating-point inputs are given as. In float64 the network computes in float64
            throughout.

    Returns:
        Shape (rows, numbers).
    """
    found = []
    mode = Float64Mode() if dtype == torch.float64 else nullcontext()  # type: ignore[no-untyped-call]
    with torch.no_grad(), mode:
        for start in range(0, len(inputs[0]), batch_size):
            rows = [torch.tensor(array[start : start + batch_size]) for array in inputs]
            given = [row.to(dtype) if row.is_floating_point() else row for row in rows]
            found.append(side_by_side([y.double().numpy() for y in call(*given)]))
    return np.concatenate(found)


@contextmanager
def in_double(call: Call) -> Iterator[Call]:
    """Hold a network in float64: in place if going back restores it to the bit, else a copy."""
    default = torch.get_default_dtype()
    single = is_single(call)
    double = call if single else copy.deepcopy(call)
    torch.set_default_dtype(torch.float64)  # for what its forward makes anew
    try:
        yield double.double()
    finally:
        torch.set_default_dtype(default)
        if single:
            call.float()
