"""What is exported: a network as its author wrote it, and what is known about it.

Its efficient-KAN layers are recognised by what they hold, and taken for what they seem only if ours
gives the same numbers at their knots; all else is exported as it is written. Nothing here changes
the network.
"""

import copy
import inspect
import keyword
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from export.advice import refused_inputs, write_flags
from export.errors import InputError, NetworkError, cause
from export.inputs import DEFAULT_INPUT, Inputs, check_name, notes_on_numbers, odd_samples, shown
from export.layers import find_layers, leave_needed_hooks
from export.narrowing import OffsetLayer
from export.outputs import name_outputs, shape_of_row
from export.parts import watched
from export.probes import draw_whole_numbers
from export.quiet import captured
from export.value_ranges import find_value_ranges, first_rows
from kan_bundle.manifest import DATATYPES, TensorSpec
from kan_model import KAN, KANLinear
from kan_model.adoption import adopt

Arrays = Sequence[NDArray[Any]]


class Call(nn.Module):
    """A module behind the one signature that converters need: tensors in, a tuple of tensors out.

    Args:
        module: Anything that maps tensors to a tensor, or to a sequence or mapping of tensors.
        names: Names of the inputs; passed by name if `forward` has parameters of all these names,
            else by position.

    Attributes:
        uses_gradients: Whether `forward` computes gradients, which are then enabled for it.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        parameters = inspect.signature(module.forward).parameters
        self._names = list(names) if set(names) <= set(parameters) else None
        self.uses_gradients = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the module."""
        return tuple(self.named(*inputs).values())

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the module."""
        outputs: tuple[Tensor, ...] = self(*inputs)
        return outputs

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the module and name what it returns.

        Raises:
            NetworkError: It returns something else than tensors.
        """
        if not self.uses_gradients:
            return self._run(inputs)
        with torch.enable_grad():
            outputs = self._run([given.detach() for given in inputs])
        return {name: output.detach() for name, output in outputs.items()}

    def _run(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if self._names is None:
            found = self.module(*inputs)
        else:
            found = self.module(**dict(zip(self._names, inputs, strict=True)))
        return name_outputs(found)


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


@captured()
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
    _require_traceable_names(single)
    found = find_layers(single)
    if inputs is None:
        inputs = _inputs_of_kan(single)
    _require_width(single, inputs)
    names = [spec.name for spec in inputs.specs]
    _require_names(single, names)
    call = Call(single, names).eval()
    exact = call if single is module else Call(module, names).eval()
    inputs = _accept(call, inputs)
    exact.uses_gradients = call.uses_gradients
    if call.uses_gradients:
        found.leave_all()
    examples = [example(inputs, rows) for rows in (2, 3)]
    outputs = _describe_outputs(call, inputs, examples)
    leave_needed_hooks(single, found, call.run, examples[1])
    leading = _find_leading(call, found.originals, inputs, examples[1])
    notes = (*found.notes, *odd_samples(inputs), *notes_on_numbers(inputs))
    return Network(call, exact, found.ours, found.originals, inputs, outputs, leading, notes)


def copy_module(module: nn.Module, *, require_values: bool = True) -> nn.Module:
    """Copy a network, with the activations that it may have stored but not their history.

    Args:
        module: Is not changed.
        require_values: Whether tensors without values, as on the meta device, are refused.

    Raises:
        NetworkError: It has no values, is no plain module, or holds what cannot be copied.
    """
    if require_values:
        _require_values(module)
    memo = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in _stored_tensors(vars(part))
        if not value.is_leaf
    }
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # what the network holds may refuse in any way
        raise NetworkError(
            f"the network cannot be copied: {cause(error)}; take what is not its own out of it"
        ) from error


def _stored_tensors(value: Any) -> Iterator[Tensor]:
    """Walk to the tensors in an attribute and in the containers in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple | set):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _stored_tensors(part)


def is_single(module: nn.Module) -> bool:
    """Tell whether every floating-point parameter and buffer is float32."""
    tensors = (*module.parameters(), *module.buffers())
    return all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())


def example(inputs: Inputs, rows: int, *, zeros: bool = False) -> tuple[Tensor, ...]:
    """Make inputs that a network can take: samples if there are, else small numbers.

    Args:
        inputs: What the network takes.
        rows: How many of them.
        zeros: Whether whole numbers and booleans are zeros, because what is accepted is not known.
    """
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
            if zeros
            else draw_whole_numbers(spec, rows, rng)
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


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise NetworkError(
                f"{name}: {count} of {parameter.numel()} values are not finite; training has "
                "diverged: take an earlier checkpoint"
            )


def _require_traceable_names(module: nn.Module) -> None:
    """Refuse names that torch's tracing writes into Python code where they are no names."""
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        parts = name.split(".")
        for i, part in enumerate(parts):
            if keyword.iskeyword(part):
                place = ".".join(parts[: i + 1])
                raise NetworkError(
                    f"{place}: torch cannot trace what has a keyword of Python for its name: "
                    f"rename it, as {part}_, in the network and in the names of its checkpoint"
                )


def _inputs_of_kan(module: nn.Module) -> Inputs:
    """Take a KAN's input from its first layer."""
    width = _first_width(module)
    if type(module).__name__ not in ("KAN", "KANLinear") or width is None:
        raise InputError(f"what the network takes is not in the file: {write_flags(module)}")
    return Inputs((TensorSpec(DEFAULT_INPUT, "FP32", (-1, width)),))


def _require_width(module: nn.Module, inputs: Inputs) -> None:
    """Compare the stated input of a KAN with its first layer.

    What comes before that layer in a class of the user's is not known.
    """
    width = _first_width(module)
    if type(module) not in (KAN, KANLinear) or len(inputs.specs) != 1 or width is None:
        return
    (spec,) = inputs.specs
    if spec.shape[-1] != width:
        said = "--samples" if inputs.samples is not None else "--input-shape"
        raise InputError(
            f"{said}: expected {width} numbers in a row, as the KAN takes, found "
            f"{shown(spec.shape)}"
        )


def _first_width(module: nn.Module) -> int | None:
    """Find the width of the first layer that holds what a KANLinear holds."""
    layers = filter(None, map(adopt, module.modules()))
    return next((layer.in_features for layer in layers), None)


@torch.no_grad()
def _accept(call: Call, inputs: Inputs) -> Inputs:
    """Run the network for the first time, and find out which whole numbers it accepts.

    Raises:
        InputError: It does not take what is stated.
    """
    given = example(inputs, 2, zeros=True)
    try:
        rows = first_rows(call.run, inputs, given)
    except NetworkError:
        raise
    except Exception as error:  # the network's own code may fail in any way
        call.uses_gradients = True
        try:
            rows = first_rows(call.run, inputs, given)
        except Exception:
            raise _refused(call, inputs, error) from error
    call.uses_gradients = call.uses_gradients or _computes_gradients(call, rows)
    return find_value_ranges(call.run, inputs, rows)


def _computes_gradients(call: Call, rows: tuple[Tensor, ...]) -> bool:
    """Find out whether a network goes back through a graph of its own, while none is made here."""
    reached: list[Tensor] = []

    def unpack(saved: Tensor) -> Tensor:
        reached.append(saved)
        return saved

    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            call(*(row.clone() for row in rows))
    except Exception:  # as torch.func's gradients do, with such hooks
        return True
    return bool(reached)


def _refused(call: Call, inputs: Inputs, error: Exception) -> InputError:
    return refused_inputs(
        call.module, call.run, inputs, lambda rows: example(inputs, rows, zeros=True), error
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
        raise _refused(call, inputs, error) from error
    for first, second in zip(runs[0].values(), again, strict=True):
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise NetworkError(
                "the network gives different answers to the same input: something in it is random "
                "in evaluation mode; make it depend on its input alone"
            )
    rows = [len(batch[0]) for batch in examples]
    with suppress(Exception):  # where one row fails, the proof reports it
        runs.append(call.named(*example(inputs, 1)))
        rows.append(1)
    specs = []
    taken = {spec.name for spec in inputs.specs}
    for name, value in runs[0].items():
        shape = shape_of_row(name, [run[name] for run in runs], rows)
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


@torch.no_grad()
def _find_leading(
    call: Call, layers: Mapping[str, nn.Module], inputs: Inputs, rows: tuple[Tensor, ...]
) -> str | None:
    """Find the layer whose input is the network's, at most in another shape.

    Samples alone would not tell: what lies before the layer may change other numbers alone, as a
    ReLU does.
    """
    if len(rows) != 1 or inputs.specs[0].datatype != "FP32":
        return None
    numbers = np.random.default_rng(0).normal(scale=3, size=tuple(rows[0].shape))
    found = _layer_reached(call, layers, rows[0])
    try:
        elsewhere = _layer_reached(call, layers, torch.from_numpy(numbers.astype(np.float32)))
    except Exception:  # some networks refuse numbers that they were not made for
        return None
    return found if found == elsewhere else None


def _layer_reached(call: Call, layers: Mapping[str, nn.Module], rows: Tensor) -> str | None:
    with watched(layers) as reached:
        call(rows.clone())
    whole = rows.reshape(len(rows), -1)
    for name, given in reached:
        if given.shape == whole.shape and torch.equal(given.to(whole.dtype), whole):
            return name
    return None
