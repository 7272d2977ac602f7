"""What a model file may ask of onnxruntime, looked at before onnxruntime sees a byte of it.

Hashes say that a file is the one its manifest describes, not who wrote both. A graph in which
onnxruntime would look elsewhere, or do more than standard operators and the one of kan_ops do, is
refused, wherever in it that stands: in the graph, in a branch, in a function.

- Operators of other domains: they are programs that the model's author relies on to be there.
- Weights in any other file than `model.onnx.data`, the one that the manifest lists and hashes, or
  beyond its end; and marks that onnxruntime takes for addresses in memory.
- Sparse tensors, whose external data onnxruntime has not always checked as that of others.
- Functions that call functions, which a few lines can make grow without bound.
- Graphs for training.

`python -m export` writes nothing of the kind. That a graph ends, or how much it computes, is not
decided here. This module knows neither onnxruntime nor folders.
"""

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass

import kan_ops
from kan_bundle.errors import GraphError
from kan_bundle.layout import MODEL_FILE, WEIGHTS_FILE
from protos.onnx_graph_pb2 import (
    AttributeProto,
    GraphProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
)
from serving.models.outline import read_outline

_STANDARD = frozenset({b"", b"ai.onnx"})  # two names of one domain
_OWN = kan_ops.DOMAIN.encode()
_PLACE = {b"location", b"offset", b"length"}
_COUNT = re.compile(rb"[0-9]{1,18}")  # fits a signed 64-bit integer
_SPARSE = (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)
_SHOWN = 64  # characters of a name


def check_graph(content: bytes, weights_bytes: int | None) -> None:
    """Refuse a model file that asks for what is not loaded here.

    Args:
        content: The file.
        weights_bytes: Size of the file of its weights; None if the manifest lists none.

    Raises:
        GraphError: It does, or is no model file.
    """
    model = read_outline(content)
    if model.training_info:
        raise _refused("the model", "a graph for inference alone", "one for training")
    _require_domains(model.opset_import, "the model")
    for function in model.functions:
        where = f"function {_shown(function.name)}"
        if function.domain != _OWN:
            raise _refused(where, f"domain {_shown(_OWN)}", f"domain {_shown(function.domain)}")
        _require_domains(function.opset_import, where)
        # A function's own operators are standard ones, so no function calls another.
        rules = _Rules(_STANDARD, weights_bytes)
        rules.check_attributes(function.attribute_proto, where)
        rules.check_nodes(function.node, where)
    _Rules(_STANDARD | {_OWN}, weights_bytes).check_graph(model.graph, "the graph")


@dataclass(frozen=True)
class _Rules:
    """What is allowed in one part of a model.

    Args:
        domains: Of its operators.
        weights_bytes: Size of the file of its weights; None if there is none.
    """

    domains: Set[bytes]
    weights_bytes: int | None

    def check_graph(self, graph: GraphProto, where: str) -> None:
        if graph.sparse_initializer:
            raise _refused(where, "dense weights", "sparse ones")
        for tensor in graph.initializer:
            if _is_external(tensor):
                self.check_place(tensor, f"tensor {_shown(tensor.name)} of {where}")
        self.check_nodes(graph.node, where)

    def check_nodes(self, nodes: Iterable[NodeProto], where: str) -> None:
        for node in nodes:
            at = f"node {_shown(node.name)} ({_shown(node.op_type)}) of {where}"
            if node.domain not in self.domains:
                raise _refused(
                    at,
                    f"an operator of {', '.join(map(_shown, sorted(self.domains)))}",
                    f"one of {_shown(node.domain)}",
                )
            self.check_attributes(node.attribute, at)

    def check_attributes(self, attributes: Iterable[AttributeProto], where: str) -> None:
        for attribute in attributes:
            at = f"attribute {_shown(attribute.name)} of {where}"
            sparse = attribute.HasField("sparse_tensor") or attribute.sparse_tensors
            if sparse or attribute.type in _SPARSE:
                raise _refused(at, "a dense tensor", "a sparse one")
            if any(_is_external(tensor) for tensor in (attribute.t, *attribute.tensors)):
                raise _refused(at, f"a tensor inside {MODEL_FILE}", "one in another file")
            for graph in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                self.check_graph(graph, at)

    def check_place(self, tensor: TensorProto, where: str) -> None:
        """Check where the weights lie that are not in the model file."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        external = tensor.data_location == TensorProto.EXTERNAL
        if not external or len(tensor.external_data) != len(_PLACE) or entries.keys() != _PLACE:
            keys = ", ".join(_shown(entry.key) for entry in tensor.external_data[: len(_PLACE) + 1])
            raise _refused(where, "location, offset and length, once each", keys or "none")
        if entries[b"location"] != WEIGHTS_FILE.encode():
            found = f"a place in {_shown(entries[b'location'])}"
            raise _refused(where, f"weights in {WEIGHTS_FILE}", found)
        if self.weights_bytes is None:
            raise _refused(where, f"a manifest that lists {WEIGHTS_FILE}", "one that does not")
        offset, length = entries[b"offset"], entries[b"length"]
        if not (_COUNT.fullmatch(offset) and _COUNT.fullmatch(length)):
            found = f"{_shown(offset)} and {_shown(length)}"
            raise _refused(where, "an offset and a length in bytes", found)
        if int(offset) + int(length) > self.weights_bytes:
            raise _refused(
                where,
                f"weights within the {self.weights_bytes} bytes of {WEIGHTS_FILE}",
                f"{int(length)} bytes from {int(offset)} on",
            )


def _require_domains(imports: Iterable[OperatorSetIdProto], where: str) -> None:
    for imported in imports:
        if imported.domain not in _STANDARD | {_OWN}:
            expected = f"operators of ONNX and of {_shown(_OWN)}"
            raise _refused(where, expected, f"an import of {_shown(imported.domain)}")


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.external_data) or tensor.data_location != TensorProto.DEFAULT


def _shown(name: bytes) -> str:
    """Show a name of the file's, which may be anything, in a line of the log."""
    text = name.decode(errors="backslashreplace")
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _refused(where: str, expected: str, found: str) -> GraphError:
    # Branches in branches in branches make long places.
    place = where if len(where) <= 4 * _SHOWN else f"{where[: 4 * _SHOWN]}..."
    return GraphError(
        f"{MODEL_FILE}: {place}: expected {expected}, found {found}; do not serve it: "
        "python -m export writes no such thing"
    )
