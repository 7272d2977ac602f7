"""Requests to run a model, from their bytes to arrays, and answers back to bytes.

A client sends the same names, types and shapes with every request; only tensors and the id differ.
So what a header says is parsed and checked once for each version of a model, and remembered: for
the next request with that header, its plan says where the arrays lie in the message's bytes, and
what goes around the outputs in the answer. All else goes the long way, through protobuf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kan_bundle.manifest import Manifest
from protos import inference_pb2 as pb
from serving.messages import parse_inflated
from serving.parameters import RequestParameters, read_request_parameters
from serving.tensors import WIRE_TYPES, choose_outputs, decode_inputs, encode_outputs
from serving.value_rules import ValueRules
from serving.wire_format import split_request, tensor_prefix

Arrays = Sequence[NDArray[Any]]

_MOST_HEADERS = 512  # remembered for a version; a client has few
_MOST_NAMES = 4096


class InferRequest:
    """A request, of which at first only the names are known.

    Args:
        content: A ModelInferRequest, inflated.

    Attributes:
        model_name: Asked for.
        model_version: The same; empty for the newest.
        id: As the client gave it.
        content: As above.
        parts: Of the message; None if it is not as simple as most.

    Raises:
        InvalidRequest: It is no such message.
    """

    __slots__ = ("_message", "content", "id", "model_name", "model_version", "parts")

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.parts = split_request(content)
        self._message: pb.ModelInferRequest | None = None
        names = None if self.parts is None else _names.get(self.parts.header)
        if self.parts is not None and names is not None:
            self.id = self.parts.id
        else:
            message = self.message()
            names = message.model_name, message.model_version
            self.id = message.id
            if self.parts is not None:
                if len(_names) >= _MOST_NAMES:
                    _names.clear()
                _names[self.parts.header] = names
        self.model_name, self.model_version = names

    def message(self) -> pb.ModelInferRequest:
        """Return the message, parsed."""
        if self._message is None:
            self._message = parse_inflated(pb.ModelInferRequest, self.content)
        return self._message


_names: dict[bytes, tuple[str, str]] = {}
"""Name and version of a model, by the header of a request."""


def known_names(content: bytes) -> tuple[str, str] | None:
    """Return the name and the version of the model in a request, if its header is known."""
    parts = split_request(content)
    return None if parts is None else _names.get(parts.header)


@dataclass(frozen=True)
class _Tensor:
    """Where an array lies.

    Args:
        place: Among the tensors of the message.
        shape: Of the array.
        dtype: On the wire.
    """

    place: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Plan:
    """What the header of a request says, checked for one version of a model.

    Args:
        message: A request with that header, which is valid.
        manifest: Of the version.
        parameters: Of the request.
        arrays: Of its inputs.

    Attributes:
        parameters: As above.
        rows: Of the request.
    """

    def __init__(
        self,
        message: pb.ModelInferRequest,
        manifest: Manifest,
        parameters: RequestParameters,
        arrays: Arrays,
    ) -> None:
        self.parameters = parameters
        self.rows = len(arrays[0])
        self._manifest = manifest
        self._chosen = choose_outputs(message, manifest.outputs)
        self._is_typed = not message.raw_input_contents and any(
            tensor.HasField("contents") for tensor in message.inputs
        )
        names = [tensor.name for tensor in message.inputs]
        self._tensors = [
            _Tensor(names.index(spec.name), array.shape, WIRE_TYPES[spec.datatype])
            for spec, array in zip(manifest.inputs, arrays, strict=True)
        ]
        self._sizes = [len(content) for content in message.raw_input_contents]
        self._has_bool = any(spec.datatype == "BOOL" for spec in manifest.inputs)
        self._before = self._response("").SerializeToString()
        self._shapes: list[tuple[int, ...]] | None = None  # of the outputs, once they are known
        self._after = b""
        self._prefixes: list[bytes] = []

    def fits(self, tensors: Sequence[tuple[int, int]]) -> bool:
        """Whether tensors are as the header says, and need no look at their values.

        Args:
            tensors: Where they begin, and their sizes.
        """
        sizes = [size for _, size in tensors]
        return sizes == self._sizes and not self._has_bool

    def arrays(self, content: bytes, tensors: Sequence[tuple[int, int]]) -> Arrays:
        """Return the arrays of another request with the same header and fitting tensors.

        Args:
            content: The request.
            tensors: Where its tensors begin, and their sizes.
        """
        found = []
        for wanted in self._tensors:
            begin, _ = tensors[wanted.place]
            array: NDArray[Any] = np.ndarray(wanted.shape, wanted.dtype, content, begin)
            found.append(array if array.flags.aligned else array.copy())
        return found

    def response(self, request_id: str, outputs: Arrays) -> pb.ModelInferResponse:
        """Make the answer.

        Args:
            request_id: Of the request.
            outputs: One array per output of the model, in its order.
        """
        response = self._response(request_id)
        encode_outputs(
            response, self._manifest.outputs, self._chosen, outputs, is_typed=self._is_typed
        )
        return response

    def answer(self, request_id: str, outputs: Arrays) -> bytes:
        """Write the answer: the bytes of `response`, put together.

        Args:
            request_id: Of the request.
            outputs: One array per output of the model, in its order.
        """
        if self._is_typed:
            return self.response(request_id, outputs).SerializeToString()
        chosen = [outputs[i] for i in self._chosen]
        if [array.shape for array in chosen] != self._shapes:
            self._learn(chosen, outputs)
        parts = [self._before]
        if request_id:
            parts.append(pb.ModelInferResponse(id=request_id).SerializeToString())
        parts.append(self._after)
        for prefix, array, dtype in zip(self._prefixes, chosen, self._dtypes, strict=True):
            parts += (prefix, array.astype(dtype, copy=False).tobytes())
        return b"".join(parts)

    def _learn(self, chosen: Arrays, outputs: Arrays) -> None:
        response = pb.ModelInferResponse()
        encode_outputs(response, self._manifest.outputs, self._chosen, outputs, is_typed=False)
        sizes = [len(content) for content in response.raw_output_contents]
        del response.raw_output_contents[:]
        self._after = response.SerializeToString()
        self._prefixes = [tensor_prefix(size) for size in sizes]
        self._dtypes = [WIRE_TYPES[self._manifest.outputs[i].datatype] for i in self._chosen]
        self._shapes = [array.shape for array in chosen]

    def _response(self, request_id: str) -> pb.ModelInferResponse:
        manifest = self._manifest
        return pb.ModelInferResponse(
            model_name=manifest.name, model_version=str(manifest.version), id=request_id
        )


class RequestReader:
    """Reads the requests of one version of a model. Safe to call from several threads.

    Args:
        manifest: Of the version.
        value_rules: Which values its inputs accept; None if all.
    """

    def __init__(self, manifest: Manifest, value_rules: ValueRules | None) -> None:
        self._manifest = manifest
        self._value_rules = value_rules
        self._plans: dict[bytes, Plan] = {}

    def read(self, request: InferRequest) -> tuple[Plan, Arrays]:
        """Check a request, and find its arrays.

        Returns:
            Its plan, and one array per input, in the manifest's order. They may share the memory of
            the message.

        Raises:
            InvalidRequest: The model does not take it.
            NotOffered: It asks for something that this server does not do.
        """
        parts = request.parts
        plan = self.find(request)
        if plan is not None and parts is not None:
            arrays = plan.arrays(request.content, parts.tensors)
            self._check_values(arrays)
            return plan, arrays
        message = request.message()
        parameters = read_request_parameters(message)
        arrays = decode_inputs(message, self._manifest.inputs)
        self._check_values(arrays)
        plan = Plan(message, self._manifest, parameters, arrays)
        if parts is not None and message.raw_input_contents:
            if len(self._plans) >= _MOST_HEADERS:
                self._plans.clear()
            self._plans[parts.header] = plan
        return plan, arrays

    def _check_values(self, arrays: Arrays) -> None:
        if self._value_rules is not None:
            self._value_rules.check(arrays)

    def find(self, request: InferRequest) -> Plan | None:
        """Find the plan of a request whose header is known; None if it is not as that says."""
        parts = request.parts
        plan = None if parts is None else self._plans.get(parts.header)
        return plan if plan is not None and parts is not None and plan.fits(parts.tensors) else None
