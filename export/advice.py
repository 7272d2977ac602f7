"""What to write instead, where a network does not take the inputs that were stated.

A remedy is tried before it is given: the network runs on inputs of the other kind.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations

import torch
from torch import Tensor, nn

from export.errors import InputError, cause
from export.inputs import Inputs, shown
from kan_bundle.manifest import TensorSpec

Run = Callable[[tuple[Tensor, ...]], object]
"""Runs a network, which may raise anything."""

_ONE_ROW = (
    "as the nodes of a graph, make one row of them: export a module around the network that takes "
    "(batch, nodes, features), and gives it x.flatten(0, 1) and "
    "(edge_index[:, None] + nodes * torch.arange(batch)[:, None]).reshape(2, -1)"
)
_MAX_ROWS = 1024  # of the samples, that are tried together
_MAX_TRIED = 4  # inputs of which every selection is tried


def write_flags(module: nn.Module) -> str:
    """Write the flags that state what a network takes, by the names of its `forward`."""
    names = forward_inputs(module)
    flags = " ".join(f"--input-shape {name}=SIZES" for name in names)
    if len(names) <= 1:
        flags = "--input-shape 3,224,224"
    takes = f"forward takes {', '.join(names)}: " if names else ""
    kinds = "NAME:INT64=SIZES for whole numbers, NAME= for one number a row"
    return (
        f"{takes}give the sizes of one row, without the batch, with {flags} ({kinds}), or rows of "
        "data with --samples" + (" NAME=FILE for each" if len(names) > 1 else " x.npy")
    )


def forward_inputs(module: nn.Module) -> list[str]:
    """List the inputs that `forward` must be given."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def refused_inputs(
    module: nn.Module,
    run: Run,
    inputs: Inputs,
    make: Callable[[int], tuple[Tensor, ...]],
    error: Exception,
) -> InputError:
    """Report that the network raised something for the inputs that were stated.

    Args:
        module: The network.
        run: Runs it.
        inputs: As stated.
        make: Makes any number of rows of inputs.
        error: What the network raised.
    """
    takes = ", ".join(f"{s.name} {s.datatype} {shown(s.shape)}" for s in inputs.specs)
    return InputError(
        f"the network does not take {takes}: {cause(error)}; "
        f"{_find_remedy(module, run, inputs, make)}"
    )


def explain_coupled_rows(module: nn.Module) -> str:
    """Say what to write instead, where the rows of a batch influence each other."""
    return find_coupled_rows(module) or (
        "look for a softmax, mean or norm over dimension 0, and take another dimension; where rows "
        f"belong together, {_ONE_ROW}"
    )


def find_coupled_rows(module: nn.Module) -> str:
    """Name modules that let rows influence each other, and what to write instead, if there are."""
    found = []
    for path, part in module.named_modules():
        name = path or "the network"
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            found.append(
                f"{name} ({type(part).__name__}) uses the statistics of the batch: build and train "
                "it with track_running_stats=True, or take nn.LayerNorm"
            )
        elif getattr(part, "batch_first", True) is False:
            found.append(
                f"{name} ({type(part).__name__}) has batch_first=False: build it with "
                "batch_first=True, or transpose(0, 1) what it is given and what it returns"
            )
    return "; ".join(found)


def _find_remedy(
    module: nn.Module, run: Run, inputs: Inputs, make: Callable[[int], tuple[Tensor, ...]]
) -> str:
    needed = forward_inputs(module)
    if len(inputs.specs) < len(needed):
        return write_flags(module)
    sizes = {size for spec in inputs.specs for size in spec.shape}
    rows = make(next(n for n in (3, 5, 7, 11, 13) if n not in sizes or n == 13))
    turnable = [i for i, spec in enumerate(inputs.specs) if len(spec.shape) > 2]
    for chosen in _selections(turnable):
        if _accepts(run, [r.transpose(0, 1) if i in chosen else r for i, r in enumerate(rows)]):
            names = [spec.name for spec in inputs.specs]
            by_name = set(names) <= set(needed) or len(needed) < len(names)
            turned = [names[i] if by_name else needed[i] for i in chosen]
            return _write_transposed(turned, needed)
    if inputs.samples is not None:
        count = len(inputs.samples[0])
        if count <= _MAX_ROWS and _accepts(run, make(count)):
            return f"it takes all {count} rows of the samples, and not some: {_ONE_ROW}"
        return "give rows that it takes with --samples"
    floating = [i for i, spec in enumerate(inputs.specs) if spec.datatype == "FP32"]
    for chosen in _selections(floating):
        for fill in (0, 1):
            tried = [
                torch.full_like(r, fill, dtype=torch.int64) if i in chosen else r
                for i, r in enumerate(rows)
            ]
            if _accepts(run, tried):
                specs = [
                    replace(spec, datatype="INT64") if i in chosen else spec
                    for i, spec in enumerate(inputs.specs)
                ]
                return "write " + " ".join(f"--input-shape {_flag(spec)}" for spec in specs)
    if any(spec.datatype != "FP32" for spec in inputs.specs):
        return (
            "which whole numbers it takes could not be found out: give rows of data for each of "
            f"{', '.join(needed or [spec.name for spec in inputs.specs])} with --samples NAME=FILE"
        )
    return write_flags(module)


def _write_transposed(names: Sequence[str], needed: Sequence[str]) -> str:
    """Write the module around a network of which the batch comes second."""
    takes = ", ".join(needed)
    passes = ", ".join(f"{n}.transpose(0, 1).contiguous()" if n in names else n for n in needed)
    return (
        f"in {', '.join(names)} the network has the batch second, and it must come first in every "
        f"input and output: export a module around it, with def forward(self, {takes}): found = "
        f"self.network({passes}), and return what has the batch second with .transpose(0, 1) too"
    )


def _flag(spec: TensorSpec) -> str:
    kind = "" if spec.datatype == "FP32" else f":{spec.datatype}"
    return f"{spec.name}{kind}={','.join(map(str, spec.shape[1:]))}"


def _selections(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every selection of a few items; of many all, and each alone."""
    if len(items) > _MAX_TRIED:
        return chain([tuple(items)], ((item,) for item in items))
    return chain.from_iterable(combinations(items, n) for n in range(1, len(items) + 1))


def _accepts(run: Run, rows: Sequence[Tensor]) -> bool:
    try:
        run(tuple(row.clone() for row in rows))
    except Exception:  # the network's own code may fail in any way
        return False
    return True
