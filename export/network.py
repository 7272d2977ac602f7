"""What is exported: a network as its author wrote it, and what is known about it.

Its efficient-KAN layers are recognised by what they hold, and taken for what they seem only if ours
gives the same numbers at their knots; all else is exported as it is written. Nothing here changes
the network.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from export.errors import InputError, NetworkError, cause
from export.inputs import DEFAULT_INPUT, Inputs, check_name, odd_samples, shown
from export.narrowing import OffsetLayer
from export.parts import watched
from export.probes import make_kan_probes
from kan_bundle.manifest import DATATYPES, TensorSpec
from kan_model import KAN, KANLinear, KanModelError
from kan_model.adoption import adopt
from kan_model.stacks import Layer, Stack
from kan_model.state_dict import check_values

Arrays = Sequence[NDArray[Any]]

_ROWS_PER_GROUP = 4  # of the comparison of one layer
_SAME = 1e-4  # share of the largest output by which two float32 layers may differ there


class Call(nn.Module):
    """A module behind the one signature that converters need: tensors in, a tuple of tensors out.

    Args:
        module: Anything that maps tensors to a tensor, or to a sequence or mapping of tensors.
        names: Names of the inputs; passed by name if `forward` has parameters of all these names,
            else by position.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        parameters = inspect.signature(module.forward).parameters
        self._names = list(names) if set(names) <= set(parameters) else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the module."""
        return tuple(self.named(*inputs).values())

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the module and name what it returns.

        Raises:
            NetworkError: It returns something else than tensors.
        """
        if self._names is None:
            found = self.module(*inputs)
        else:
            found = self.module(**dict(zip(self._names, inputs, strict=True)))
        return _named_outputs(found)


@dataclass(frozen=True)
class Network:
    """A network to export.

    Attributes:
        call: The network in float32, in evaluation mode, on the CPU.
        exact: The network in the precision it was trained in; the same object for float32.
        layers: Its efficient-KAN layers as ours, over the same tensors, by name.
        replaced: The modules these stand for, by name.
        inputs: What it takes.
        outputs: What it gives.
        leading: Name of the layer that the inputs reach as they are, if there is one.
        notes: What its user should know.
    """

    call: Call
    exact: Call
    layers: Mapping[str, KANLinear]
    replaced: Mapping[str, nn.Module]
    inputs: Inputs
    outputs: tuple[TensorSpec, ...]
    leading: str | None
    notes: tuple[str, ...] = ()

    @property
    def kan(self) -> KAN | None:
        """The network in its own precision, if it is a KAN of ours and takes rows of features.

        Its layers may be behind an `OffsetLayer`, which has all that a KANLinear has.
        """
        module = self.exact.module
        if type(module) is not KAN or not set(map(type, module.layers)) <= {KANLinear, OffsetLayer}:
            return None
        whole = len(self.layers) == len(module.layers) and self.leading is not None
        return module if whole else None

    def name_output(self, column: int) -> str:
        """Name one of the numbers of a row, counted through all outputs: `output[3]`."""
        for spec in self.outputs:
            size = math.prod(spec.shape[1:])
            if column < size:
                return f"{spec.name}[{column}]"
            column -= size
        raise AssertionError(f"{column} is beyond the outputs")


def describe_network(module: nn.Module, inputs: Inputs | None) -> Network:
    """Find out what is to be known about a network.

    Args:
        module: In evaluation mode, on the CPU, in any precision.
        inputs: What it takes; may be None for a KAN.

    Raises:
        InputError: The inputs do not fit it.
        NetworkError: It does not work in evaluation mode, on batches of any size, or gives other
            answers each time; or its KAN layers hold values that mean nothing.
    """
    single = module if is_single(module) else copy_module(module).float()
    _require_finite(single)
    layers, replaced, notes = _adopt_layers(single)
    if inputs is None:
        inputs = _inputs_of_kan(single, layers)
    _require_width(single, layers, inputs)
    notes += odd_samples(inputs)
    names = [spec.name for spec in inputs.specs]
    _require_names(single, names)
    call = Call(single, names).eval()
    exact = call if single is module else Call(module, names).eval()
    examples = [example(inputs, rows) for rows in (2, 3)]
    outputs = _describe_outputs(call, inputs, examples)
    leading = _find_leading(call, replaced, inputs, examples[1])
    return Network(call, exact, layers, replaced, inputs, outputs, leading, tuple(notes))


def copy_module(module: nn.Module) -> nn.Module:
    """Copy a network, with the activations that it may have stored but not their history.

    Raises:
        NetworkError: It has no values, is no plain module, or holds what cannot be copied.
    """
    _require_values(module)
    stored = (value for part in module.modules() for value in vars(part).values())
    memo = {
        id(value): value.detach().clone()
        for value in stored
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # what the network holds may refuse in any way
        raise NetworkError(
            f"the network cannot be copied: {cause(error)}; take what is not its own out of it"
        ) from error


def is_single(module: nn.Module) -> bool:
    """Tell whether every floating-point parameter and buffer is float32."""
    tensors = (*module.parameters(), *module.buffers())
    return all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())


def example(inputs: Inputs, rows: int) -> tuple[Tensor, ...]:
    """Make inputs that a network can take: samples if there are, else small numbers."""
    if inputs.samples is not None:
        return tuple(
            torch.from_numpy(np.take(array, range(rows), axis=0, mode="wrap"))
            for array in inputs.samples
        )
    rng = np.random.default_rng(0)
    return tuple(
        torch.from_numpy(
            rng.uniform(-1, 1, (rows, *spec.shape[1:])).astype(np.float32)
            if spec.datatype == "FP32"
            else np.zeros((rows, *spec.shape[1:]), DATATYPES[spec.datatype])
        )
        for spec in inputs.specs
    )


def _require_values(module: nn.Module) -> None:
    """Refuse networks without values, and those that are no plain modules.

    Raises:
        NetworkError: With the reason.
    """
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        raise NetworkError(
            f"expected a plain torch.nn.Module, found a {type(module).__name__}: give the network "
            "that was scripted or compiled"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise NetworkError(f"{name}: has no value yet; load the weights into the network first")


def _require_names(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse input names of which only some are what `forward` calls its inputs.

    Raises:
        InputError: Which names there are.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    strays = [name for name in names if name not in parameters]
    if strays and len(strays) < len(names):
        raise InputError(
            f"input {', '.join(strays)}: expected names that forward has ("
            f"{', '.join(parameters)}), or names of your own for every input, in its order"
        )


def _adopt_layers(
    module: nn.Module,
) -> tuple[dict[str, KANLinear], dict[str, nn.Module], list[str]]:
    layers, replaced, notes = {}, {}, []
    for name, child in module.named_modules():
        layer = adopt(child)
        if layer is None:
            continue
        shown_name = name or type(child).__name__
        _require_rising(shown_name, layer)
        if layer is not child and not _computes_the_same(child, layer):
            notes.append(
                f"{shown_name} holds what a KANLinear holds, but computes something else: it is "
                "exported as it is written"
            )
            continue
        layers[shown_name], replaced[shown_name] = layer, child
    return layers, replaced, notes


@torch.no_grad()
def _computes_the_same(original: nn.Module, ours: KANLinear) -> bool:
    """Compare two layers at the knots, inside, in the margins and outside."""
    knots = ours.grid.float().numpy()
    probes = make_kan_probes(knots, ours.spline_order, rows_per_group=_ROWS_PER_GROUP)
    finite = np.isfinite(probes.inputs[0]).all(axis=1)
    x = torch.from_numpy(probes.inputs[0]).to(ours.grid.dtype)
    try:
        theirs = original(x[finite])
    except Exception:  # it wants something else, so it is something else
        return False
    mine = ours(x[finite])
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
        return False
    size = mine.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    if not bool(((theirs - mine).abs() <= _SAME * size).all()):
        return False
    try:
        swallows = not bool(torch.equal(original(x[~finite]).isnan(), ours(x[~finite]).isnan()))
    except Exception:  # some refuse NaN, which the exported form answers with NaN
        swallows = False
    return not swallows


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise NetworkError(
                f"{name}: {count} of {parameter.numel()} values are not finite; training has "
                "diverged: take an earlier checkpoint"
            )


def _require_rising(name: str, layer: KANLinear) -> None:
    tensors = {key: tensor.detach() for key, tensor in layer.state_dict().items()}
    try:
        check_values(Stack("", {0: Layer(f"{name}.", tensors)}))
    except KanModelError as error:
        raise NetworkError(str(error)) from error


def _inputs_of_kan(module: nn.Module, layers: Mapping[str, KANLinear]) -> Inputs:
    """Take a KAN's input from its first layer."""
    if type(module).__name__ not in ("KAN", "KANLinear") or not layers:
        raise InputError(
            "what the network takes is not in the file: give the sizes of one row with "
            "--input-shape 3,224,224, or rows of data with --samples x.npy"
        )
    width = next(iter(layers.values())).in_features
    return Inputs((TensorSpec(DEFAULT_INPUT, "FP32", (-1, width)),))


def _require_width(module: nn.Module, layers: Mapping[str, KANLinear], inputs: Inputs) -> None:
    """Compare what is said of a KAN's input with its first layer.

    Of a class of the user's nobody knows what comes before that layer.
    """
    if type(module) not in (KAN, KANLinear) or len(inputs.specs) != 1:
        return
    (spec,) = inputs.specs
    width = next(iter(layers.values())).in_features
    if spec.shape[-1] != width:
        said = "--samples" if inputs.samples is not None else "--input-shape"
        raise InputError(
            f"{said}: expected {width} numbers in a row, as the KAN takes, found "
            f"{shown(spec.shape)}"
        )


@torch.no_grad()
def _describe_outputs(
    call: Call, inputs: Inputs, examples: Sequence[tuple[Tensor, ...]]
) -> tuple[TensorSpec, ...]:
    """Run batches of different sizes, twice."""
    try:
        runs = [call.named(*(row.clone() for row in rows)) for rows in examples]
        again = call(*(row.clone() for row in examples[0]))
    except NetworkError:
        raise
    except Exception as error:  # the network's own code may fail in any way
        takes = ", ".join(f"{s.name} {s.datatype} {shown(s.shape)}" for s in inputs.specs)
        remedy = "give the sizes of one row, without the batch, with --input-shape"
        if inputs.samples is not None:
            remedy = "give rows that it takes with --samples"
        raise InputError(f"the network does not take {takes}: {cause(error)}; {remedy}") from error
    for first, second in zip(runs[0].values(), again, strict=True):
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise NetworkError(
                "the network gives different answers to the same input: something in it is random "
                "in evaluation mode; make it depend on its input alone"
            )
    specs = []
    taken = {spec.name for spec in inputs.specs}
    rows = [len(batch[0]) for batch in examples]
    for name, value in runs[0].items():
        shape = _shape_of_row(name, [run[name] for run in runs], rows)
        if value.dtype != torch.float32:
            raise NetworkError(
                f"output {name}: expected float32, found {value.dtype}; return it as float32, or "
                "what it was computed from"
            )
        while name in taken:
            name += "_output"
        taken.add(name)
        specs.append(TensorSpec(check_name(name), "FP32", (-1, *shape)))
    return tuple(specs)


def _shape_of_row(name: str, outputs: Sequence[Tensor], rows: Sequence[int]) -> tuple[int, ...]:
    """Compare the shapes of an output for batches of different sizes."""
    shapes = [tuple(output.shape) for output in outputs]
    if any(shape[:1] != (n,) for shape, n in zip(shapes, rows, strict=True)) or (
        len({shape[1:] for shape in shapes}) > 1
    ):
        raise NetworkError(
            f"output {name}: expected one row for each row of the input, found shapes "
            f"{', '.join(map(str, shapes))} for {', '.join(map(str, rows))} rows"
        )
    return shapes[0][1:]


def _named_outputs(found: Any) -> dict[str, Tensor]:
    if isinstance(found, Tensor):
        return {"output": found}
    if isinstance(found, Mapping):
        named = {str(key): value for key, value in found.items() if value is not None}
    elif isinstance(found, list | tuple):
        fields = getattr(found, "_fields", [f"output_{i}" for i in range(len(found))])
        named = dict(zip(fields, found, strict=True))
        if len(named) == 1 and not hasattr(found, "_fields"):
            named = {"output": found[0]}
    else:
        named = {"output": found}
    strays = {
        name: type(value).__name__ for name, value in named.items() if not isinstance(value, Tensor)
    }
    if strays or not named:
        raise NetworkError(
            f"expected the network to return tensors, found {strays or 'nothing'}; wrap it in a "
            "module that returns the tensors alone"
        )
    return named


@torch.no_grad()
def _find_leading(
    call: Call, layers: Mapping[str, nn.Module], inputs: Inputs, rows: tuple[Tensor, ...]
) -> str | None:
    """Find the layer whose input is the network's, at most in another shape."""
    if len(rows) != 1 or inputs.specs[0].datatype != "FP32":
        return None
    with watched(layers) as reached:
        call(*(row.clone() for row in rows))
    for name, given in reached:
        whole = rows[0].reshape(len(rows[0]), -1)
        if given.shape == whole.shape and torch.equal(given.to(whole.dtype), whole):
            return name
    return None
