"""A network to ONNX.

The batch is the only dynamic dimension; it is named `batch`. The weights are inside the file, or,
where they do not fit, in the one file beside it. Nodes and tensors are named after the modules of
the network (graph_names.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import optimizer, version_converter
from torch import Tensor

import kan_ops
from export.arguments import OPSETS
from export.conversion.basis import CardinalBasis
from export.conversion.functions import WithBodies
from export.conversion.gradients import trace_gradients
from export.conversion.graph_names import name_after_modules
from export.conversion.lowering import fusible, own_tensors
from export.errors import ConversionError, InputError, after_tracing, conversion
from export.network import Call
from export.parts import restored_attributes
from export.quiet import captured
from kan_bundle.layout import WEIGHTS_FILE

OLDEST_OPSET, DEFAULT_OPSET = OPSETS
_BY_TORCH = (18, 25)  # opsets that the exporter writes itself; converters make others of them
LARGEST_INLINE = 2**30
"""Bytes of weights inside the file. protobuf ends at twice that, and reads it all into memory."""


def check_opset(opset: int) -> int:
    """Let an opset pass that torch can write and onnx can check.

    Raises:
        InputError: It is another.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"--opset: expected {OLDEST_OPSET} to {newest}, the newest that onnx "
            f"{onnx.__version__} knows, found {opset}"
        )
    return opset


@captured()
def write_onnx(
    network: Call,
    example: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    path: Path,
    graph_name: str,
    metadata: Mapping[str, str],
    opset: int = DEFAULT_OPSET,
    *,
    inline: bool = False,
) -> frozenset[str]:
    """Write a network as ONNX.

    Args:
        network: In evaluation mode, float32.
        example: Inputs of at least two rows.
        input_names: Of the graph, in the order of `example`.
        output_names: Of the graph.
        path: Where to write.
        graph_name: Name of the graph.
        metadata: Written to the model's `metadata_props`.
        opset: Version of the standard operators, as `check_opset` takes it.
        inline: Write all layers as standard operators, instead of one node with a body of those.

    Returns:
        The names of the layers that are nodes of the fused operator.

    Raises:
        ConversionError: The network cannot be converted, or the graph is not what was asked for.
    """
    both = WithBodies(network, [] if inline or network.uses_gradients else fusible(network))
    model = _trace(network, both, example, input_names, output_names, opset, inline=inline)
    with after_tracing("ONNX"):
        both.name_overloads(model)
        kept = own_tensors(network)

        def should_fold(node: onnx_ir.Node) -> bool | None:  # None leaves it to the optimizer
            return False if any(v is not None and v.name in kept for v in node.inputs) else None

        optimizer.optimize_ir(model, should_fold=should_fold)
        name_after_modules(model, len(output_names))
        if model.opset_imports.get("") != opset:
            version_converter.convert_version(model, opset, fallback=True)
        fused = both.part(model)
    _forget_the_exporting_machine(model)
    model.producer_name = "kanserve"
    model.producer_version = metadata.get("kanserve.version", "")
    model.graph.name = graph_name
    model.metadata_props.update(metadata)
    found = dict(model.opset_imports)
    if not set(found) <= {"", kan_ops.DOMAIN}:
        raise ConversionError(
            f"{path.name}: expected ONNX's own operators alone, found some of "
            f"{', '.join(sorted(filter(None, found)))}; write that part of the network another way"
        )
    if found[""] != opset:
        raise ConversionError(
            f"{path.name}: asked for opset {opset}, the network can only be written with "
            f"{found['']}; choose another --opset, {DEFAULT_OPSET} suits most runtimes"
        )
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    with after_tracing("ONNX"):
        onnx_ir.save(model, path, external_data=WEIGHTS_FILE if weights > LARGEST_INLINE else None)
        onnx.checker.check_model(str(path), full_check=True)
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewriter holds on to the graph it saw last
    return fused


def _trace(
    network: Call,
    both: WithBodies,
    example: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
    *,
    inline: bool,
) -> onnx_ir.Model:
    """Trace a network and the bodies of its layers, as the exporter writes them."""
    batch = {0: torch.export.Dim("batch")}
    further_inputs, further_outputs = both.names()
    shapes = [*(batch for _ in input_names), *both.dynamic_shapes()]
    with (
        restored_attributes(network),
        _explained_branches(network, inline=inline),
        conversion("ONNX"),
    ):
        program = torch.onnx.export(
            trace_gradients(network, example) if network.uses_gradients else both,
            (*example, *both.examples()),
            dynamo=True,
            opset_version=min(max(opset, _BY_TORCH[0]), _BY_TORCH[1]),
            input_names=[*input_names, *further_inputs],
            output_names=[*output_names, *further_outputs],
            dynamic_shapes=tuple(shapes) if network.uses_gradients else (tuple(shapes),),
            optimize=False,
            verbose=False,
        )
    if program is None:  # the signature allows it for files written directly
        raise ConversionError("torch.onnx.export returned no program")
    for value in program.model.graph.inputs[: len(input_names)]:
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], int):
            raise ConversionError(
                "the network cannot be written as ONNX for any number of rows: traced with "
                f"{value.shape[0]}, it is fixed to that; take sizes from x.shape[0], not from "
                "len(x), and compute on all rows at once in place of torch.func.vmap"
            )
    return program.model


def _forget_the_exporting_machine(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes, which hold stack traces with the paths of this machine."""
    functions = model.functions.values()
    nodes = [*model.graph.all_nodes(), *(node for f in functions for node in f.all_nodes())]
    values = [value for node in nodes for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    values += [value for function in functions for value in function.inputs]
    parts: list[Any] = [model, model.graph, *functions, *nodes, *values]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None


@contextmanager
def _explained_branches(network: Call, *, inline: bool) -> Iterator[None]:
    """Say what to do about a KANLinear in a branch of `torch.cond`.

    torch looks into a branch, and there not at an operator of ONNX's that is called by its name: a
    whole layer that is one node, or the closed form of a basis.
    """
    try:
        yield
    except ConversionError as error:
        if "function `symbolic`" not in str(error.__cause__):
            raise
        closed = any(isinstance(module, CardinalBasis) for module in network.modules())
        remedy = (
            "choose between their outputs with torch.where instead"
            if inline or closed
            else "write it as standard operators, with --inline (inline=True)"
        )
        raise ConversionError(
            f"a KANLinear in a branch of torch.cond cannot be written as it is: {remedy}"
        ) from error.__cause__
