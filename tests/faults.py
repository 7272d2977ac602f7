"""Single faults in files as written, and whether the proof refuses each: `python -m tests.faults`.

For every network and precision the files are written once, as in an export. Then one thing after
another is made wrong in `model.onnx`: a weight, a knot, a scale, a node, a type, what becomes of
NaN, the order of the outputs. The file is compared as an export compares it. A fault counts if it
changes an answer to any sample by more than twice what float32 noise explains; each of those must
be refused.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export import ExportError, export_module
from export.proof import check
from export.proof.check import Checked
from export.proof.reference import Reference
from export.proof.tolerance import KAN_FACTOR, NETWORK_FACTOR
from export.proof.verdict import require_parity
from export.report import Report
from export.runtimes import load_onnx
from kan_bundle.manifest import Precision
from kan_model import KAN, KANLinear
from tests import zoo

_PLACES = 3  # of every tensor that are made wrong one by one
_SAMPLES = 400

Change = Callable[[ModelProto], None]


@dataclass(frozen=True)
class Fault:
    """One thing that is made wrong."""

    kind: str
    what: str
    apply: Change


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        subject: The network and precision.
        fault: What was made wrong.
        effect: Largest change of an answer to a sample, in units of what float32 noise explains
            there, which is half of `KAN_FACTOR` or `NETWORK_FACTOR` times the noise that is
            estimated; infinite for NaN, and where there is no answer to compare.
        refused: The message; None if the file would be published.
    """

    subject: str
    fault: Fault
    effect: float
    refused: str | None

    @property
    def missed(self) -> bool:
        """Whether a fault that counts would be published."""
        return self.refused is None and self.effect > 2


class TwoOutputs(nn.Module):
    """Two outputs of one shape, which could be mixed up."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = KANLinear(5, 6), KANLinear(6, 3), KANLinear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"left": self.left(y), "right": self.right(y)}


class Grid(nn.Module):
    """An output of more than two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([6, 12])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kan(x).unflatten(1, (3, 4))
        return y


def adapted() -> nn.Module:
    """A KAN whose knots have moved."""
    kan = KAN([6, 8, 3])
    kan.layers[0].update_grid(torch.randn(300, 6))
    return kan


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "kan": (lambda: KAN([8, 10, 4]), (8,)),
    "adapted": (adapted, (6,)),
    "order 2": (lambda: KAN([5, 6, 2], spline_order=2, grid_size=8), (5,)),
    "conv": (zoo.conv_net, (3, 8, 8)),
    "two outputs": (TwoOutputs, (5,)),
    "grid": (Grid, (6,)),
    "sequential": (lambda: nn.Sequential(KANLinear(4, 8), nn.Tanh(), KANLinear(8, 2)), (4,)),
}


def list_faults(model: ModelProto) -> Iterator[Fault]:
    """List what can be made wrong in a file."""
    yield from _in_tensors(model)
    yield from _in_nodes(model)
    yield from _in_types(model)
    yield from _in_nan(model)
    yield from _in_outputs(model)


def _graphs(model: ModelProto) -> list[Any]:
    return [model.graph, *model.functions]


def _in_tensors(model: ModelProto) -> Iterator[Fault]:
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name.startswith("nan_guard") or values.size == 0:
            continue
        kind = (
            "knots" if "knots" in tensor.name else "scale" if "scale" in tensor.name else "weight"
        )
        if values.dtype.kind not in "fi" or (values.dtype.kind == "i" and values.dtype != np.int8):
            continue
        changes: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {}
        if values.dtype == np.int8:
            changes["+ 1"] = lambda v: np.clip(v.astype(int) + 1, -127, 127).astype(np.int8)
            changes["sign"] = lambda v: -v
            changes["+ 16"] = lambda v: np.clip(v.astype(int) + 16, -127, 127).astype(np.int8)
        else:
            changes["* 1.01"] = lambda v: v * v.dtype.type(1.01)
            changes["* 1.0005"] = lambda v: v * v.dtype.type(1.0005)
            changes["* 2"] = lambda v: v * v.dtype.type(2)
            changes["= 0"] = np.zeros_like
            changes["sign"] = lambda v: -v
        flat = values.reshape(-1)
        places = rng.choice(flat.size, min(_PLACES, flat.size), replace=False)
        for name, change in changes.items():
            for place in places.tolist():
                yield Fault(
                    kind, f"{tensor.name}[{place}] {name}", _set(tensor.name, change, [place])
                )
        if values.dtype != np.int8:
            yield Fault(
                kind,
                f"{tensor.name} * 128/127",
                _set(tensor.name, lambda v: (v * (128 / 127)).astype(v.dtype), None),
            )
            yield Fault(
                kind,
                f"{tensor.name} in fewer bits",
                _set(tensor.name, lambda v: v.astype(np.float16).astype(v.dtype), None),
            )
        if flat.size > 1:
            yield Fault(
                kind, f"{tensor.name} rolled", _set(tensor.name, lambda v: np.roll(v, 1), None)
            )


def _set(
    name: str, change: Callable[[NDArray[Any]], NDArray[Any]], places: Sequence[int] | None
) -> Change:
    def apply(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                values = numpy_helper.to_array(tensor).copy()
                if places is None:
                    values = change(values)
                else:
                    flat = values.reshape(-1)
                    flat[places] = change(flat[places])
                tensor.CopyFrom(numpy_helper.from_array(values, name))

    return apply


_OTHER = {"Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "Exp": "Sin", "Tanh": "Sigmoid"}
_OTHER |= {"Relu": "Identity", "Abs": "Identity", "MaxPool": "AveragePool", "Neg": "Identity"}


def _in_nodes(model: ModelProto) -> Iterator[Fault]:
    for g, graph in enumerate(_graphs(model)):
        for n, node in enumerate(graph.node):
            if node.name.startswith("nan_guard"):
                continue
            if node.op_type in _OTHER:
                yield Fault(
                    "node",
                    f"{node.name or node.op_type} ({g}) becomes {_OTHER[node.op_type]}",
                    _edit(g, n, lambda node: _rename(node, _OTHER[node.op_type])),
                )
            if node.op_type in ("Sub", "Div", "Concat", "Where") and len(node.input) > 1:
                yield Fault(
                    "node", f"{node.name or node.op_type} ({g}) inputs swapped", _edit(g, n, _swap)
                )
            for a, attribute in enumerate(node.attribute):
                if attribute.type == onnx.AttributeProto.FLOAT:
                    yield Fault(
                        "attribute",
                        f"{node.name or node.op_type} ({g}).{attribute.name} * 1.001",
                        _edit(g, n, lambda node, a=a: _scale(node, a)),  # type: ignore[misc]
                    )


def _edit(graph: int, node: int, change: Callable[[NodeProto], None]) -> Change:
    return lambda model: change(_graphs(model)[graph].node[node])


def _rename(node: NodeProto, operator: str) -> None:
    node.op_type = operator
    if operator in ("Identity", "Sin"):
        del node.attribute[:]


def _swap(node: NodeProto) -> None:
    first, second = len(node.input) - 2, len(node.input) - 1
    node.input[first], node.input[second] = node.input[second], node.input[first]


def _scale(node: NodeProto, attribute: int) -> None:
    node.attribute[attribute].f *= 1.001


def _in_types(model: ModelProto) -> Iterator[Fault]:
    for output in model.graph.output:
        name = output.name
        yield Fault("type", f"{name} as float64", partial(_as_double, name=name))
        yield Fault("type", f"{name} through float16", partial(_through_half, name=name))
        yield Fault("type", f"{name} flattened", partial(_flatten, name=name))


def _after(model: ModelProto, name: str, *nodes: NodeProto) -> None:
    """Put nodes, which read `name/bare` and give `name`, behind what gives `name`."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, found in enumerate(names):
                if found == name:
                    names[i] = f"{name}/bare"
    model.graph.node.extend(nodes)


def _as_double(model: ModelProto, name: str) -> None:
    _after(model, name, helper.make_node("Cast", [f"{name}/bare"], [name], to=TensorProto.DOUBLE))
    for output in model.graph.output:
        if output.name == name:
            output.type.tensor_type.elem_type = TensorProto.DOUBLE


def _through_half(model: ModelProto, name: str) -> None:
    _after(
        model,
        name,
        helper.make_node("Cast", [f"{name}/bare"], [f"{name}/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT),
    )


def _flatten(model: ModelProto, name: str) -> None:
    """Give (rows, numbers) for (rows, ...), or (rows, numbers, 1) for (rows, numbers)."""
    for output in model.graph.output:
        if output.name == name:
            dims = output.type.tensor_type.shape.dim
            if len(dims) == 2:
                axes = numpy_helper.from_array(np.array([2]), f"{name}/axes")
                model.graph.initializer.append(axes)
                node = helper.make_node("Unsqueeze", [f"{name}/bare", f"{name}/axes"], [name])
            else:
                node = helper.make_node("Flatten", [f"{name}/bare"], [name], axis=1)
            _after(model, name, node)
            output.type.tensor_type.ClearField("shape")


def _in_nan(model: ModelProto) -> Iterator[Fault]:
    names = [v.name for v in model.graph.output]
    names += [node.output[0] for node in model.graph.node if node.op_type == "KANLinear1"]
    for name in dict.fromkeys(names):
        yield Fault("nan", f"{name} without NaN", partial(_without_nan, name=name))
    for value in model.graph.input:
        change = partial(_without_nan, name=value.name, into=True)
        yield Fault("nan", f"{value.name} without NaN", change)


def _without_nan(model: ModelProto, name: str, *, into: bool = False) -> None:
    zero = numpy_helper.from_array(np.array(0, np.float32), f"{name}/zero")
    model.graph.initializer.append(zero)
    bare, clean = (name, f"{name}/clean") if into else (f"{name}/bare", name)
    nodes = [
        helper.make_node("IsNaN", [bare], [f"{name}/isnan"]),
        helper.make_node("Where", [f"{name}/isnan", f"{name}/zero", bare], [clean]),
    ]
    if into:
        for node in model.graph.node:
            for i, found in enumerate(node.input):
                if found == name:
                    node.input[i] = clean
        kept = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *kept])
        return
    place = next(i for i, node in enumerate(model.graph.node) if name in node.output)
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*kept[: place + 1], *nodes, *kept[place + 1 :]])
    for i, node in enumerate(model.graph.node):
        names = node.output if i == place else node.input
        if i == place or i > place + len(nodes):
            for j, found in enumerate(names):
                if found == name:
                    names[j] = bare if i == place else name


def _in_outputs(model: ModelProto) -> Iterator[Fault]:
    outputs = [output.name for output in model.graph.output]
    yield Fault("output", f"{outputs[0]} renamed", lambda model: _rename_output(model, 0))
    if len(outputs) > 1:
        yield Fault("output", "in another order", _reorder)
        yield Fault("output", "names exchanged", _exchange)


def _rename_output(model: ModelProto, place: int) -> None:
    name = model.graph.output[place].name
    _after(model, name)
    model.graph.output[place].name = f"{name}/bare"


def _reorder(model: ModelProto) -> None:
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))


def _exchange(model: ModelProto) -> None:
    first, second = (output.name for output in model.graph.output[:2])
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in (first, second):
                    names[i] = second if name == first else first


def try_faults(subject: str, precision: Precision, most: int | None = None) -> Iterator[Outcome]:
    """Write the files of a network, and make one thing after another wrong in them."""
    make, shape = SUBJECTS[subject]
    torch.manual_seed(0)
    network = make().eval()
    rows = np.random.default_rng(1).uniform(-1, 1, (_SAMPLES, *shape)).astype(np.float32)
    outcomes: list[Outcome] = []
    name = f"{subject}, {precision}"

    def compare(
        network: Any, reference: Reference, runtimes: Any, model: Path, *rest: Any
    ) -> Checked:
        right = check.check_files(network, reference, runtimes, model, *rest)
        content = model.read_bytes()
        samples = np.isin(reference.probes.groups, ("samples", "nan"))
        factor = (NETWORK_FACTOR if network.kan is None else KAN_FACTOR) / 2
        noise = np.maximum(factor * reference.noise[samples], np.finfo(np.float32).tiny)
        expected = reference.outputs[samples]
        given = [array[samples] for array in reference.probes.inputs]
        faults = list(list_faults(onnx.load_from_string(content)))
        if most is not None:
            faults = faults[:: max(1, len(faults) // most)]
        for fault in faults:
            changed = onnx.load_from_string(content)
            fault.apply(changed)
            model.write_bytes(changed.SerializeToString())
            if model.read_bytes() == content:
                continue
            try:
                effect = 0.0
                for fused in (False, True) if "onnxruntime cpu, fused" in runtimes else (False,):
                    answers = load_onnx(model, fused=fused)(given)
                    found = np.concatenate([y.reshape(len(y), -1) for y in answers], axis=1)
                    with np.errstate(invalid="ignore"):
                        off = np.abs(found - expected) / noise
                    off[np.isnan(off)] = np.inf
                    off[np.isnan(found) & np.isnan(expected)] = 0.0
                    effect = max(effect, float(off.max()))
            except Exception:  # it does not load or run, so it gives no answer
                effect = np.inf
            refused = None
            try:
                again = check.check_files(
                    network, reference, runtimes, model, _refuse_guard, *rest[1:]
                )
                require_parity(again.measured, again.network)
            except ExportError as error:
                refused = str(error)
            if (
                fault.kind == "output" or "float64" in fault.what or "flattened" in fault.what
            ):  # what is wrong is no number
                effect = np.inf
            outcomes.append(Outcome(name, fault, effect, refused))
        model.write_bytes(content)
        return right

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("export.pipeline.check_files", compare),
    ):
        export_module(
            *(network,),
            name="m",
            output=folder,
            samples=rows,
            precision=precision,
            torchscript="off",
            report=Report(quiet=True),
        )
    yield from outcomes


def _refuse_guard(model: Path) -> None:
    """A guard would rewrite the faulty file; an export writes it before anything goes wrong."""


def main() -> int:
    """Print a table of all kinds of faults, and every fault that was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--subject", choices=list(SUBJECTS), help="one network alone")
    parser.add_argument("--most", type=int, help="of one network and precision")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    for subject in [arguments.subject] if arguments.subject else SUBJECTS:
        precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
        for precision in precisions:
            found = list(try_faults(subject, precision, arguments.most))
            outcomes += found
            counted = [o for o in found if o.effect > 2]
            print(
                f"{subject}, {precision}: {len(found)} faults, {len(counted)} of them count, "
                f"{sum(o.refused is not None for o in counted)} refused",
                flush=True,
            )
            for outcome in found:
                if outcome.missed:
                    print(
                        f"    missed: {outcome.fault.what}, effect {outcome.effect:.3g}", flush=True
                    )
    counted = [o for o in outcomes if o.effect > 2]
    missed = sum(o.missed for o in outcomes)
    print(f"{len(outcomes)} faults, {len(counted)} count, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
