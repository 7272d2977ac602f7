"""What a request may ask for beside its tensors.

Names and meanings are Triton's where it has them. Whatever is not known is refused and never passed
over: it would have meant something to whoever sent it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from protos.inference_pb2 import InferParameter, ModelInferRequest
from serving.errors import InvalidRequest, NotOffered

Place = Literal["request", "input", "output"]

DETAILS = "kanserve_details"
"""Asks how an answer came about."""

TIMEOUT = "timeout"
"""For how many microseconds an answer is wanted. The call's deadline says the same to gRPC."""

PRIORITY = "priority"
"""0 is the usual one; there is no other."""

FINAL_RESPONSE = "triton_enable_empty_final_response"
"""Asks for an empty answer behind the last one, if it would not be known for the last one. There is
one answer to a request here, so it changes nothing; Triton's C++ client always sends it."""

_BOOL = ("bool_param",)
_INTEGER = ("int64_param", "uint64_param")
_OFFERED: dict[Place, dict[str, tuple[str, ...]]] = {
    "request": {DETAILS: _BOOL, TIMEOUT: _INTEGER, PRIORITY: _INTEGER, FINAL_RESPONSE: _BOOL},
    # Bytes behind a header of HTTP; KServe's client says it here, too. They are counted anyway.
    "input": {"binary_data_size": _INTEGER},
    "output": {},
}
_KINDS = {_BOOL: "true or false", _INTEGER: "a whole number"}
_INSTEAD = {
    "sequence_": "requests know nothing of each other",
    "shared_memory_": "tensors travel in the messages",
    "classification": "ask for the output itself, and sort it",
    "binary_data": "the answer comes in the form of the question, raw or typed",
    "headers": "send them as metadata of the call",
}
_MOST_SHOWN = 64
_US = 1e-6


@dataclass(frozen=True)
class RequestParameters:
    """What a request asks for.

    Args:
        details: Whether to tell how the answer came about.
        timeout_s: For how long the answer is wanted, in seconds; None for as long as the call
            lasts.
    """

    details: bool = False
    timeout_s: float | None = None


_NONE = RequestParameters()


def read_request_parameters(request: ModelInferRequest) -> RequestParameters:
    """Read the parameters of a request.

    Raises:
        InvalidRequest: One has a value that it cannot have.
        NotOffered: One asks for something that this server does not do.
    """
    parameters = request.parameters
    if not parameters:
        return _NONE
    refuse_parameters("request", parameters)
    if PRIORITY in parameters and _whole(parameters[PRIORITY]):
        raise NotOffered(
            f"request parameter {PRIORITY!r} is offered as 0 alone: no request goes before others"
        )
    timeout_us = _whole(parameters[TIMEOUT]) if TIMEOUT in parameters else 0
    if timeout_us < 0:
        raise InvalidRequest(f"parameter {TIMEOUT!r}: expected microseconds, found {timeout_us}")
    return RequestParameters(
        details=DETAILS in parameters and parameters[DETAILS].bool_param,
        timeout_s=timeout_us * _US if timeout_us else None,  # 0 is none, as in Triton
    )


def refuse_parameters(place: Place, parameters: Mapping[str, InferParameter]) -> None:
    """Refuse parameters that are not offered in a place, or are of another type.

    Raises:
        InvalidRequest: One is of another type.
        NotOffered: One is not offered.
    """
    if not parameters:
        return
    for name in sorted(parameters):
        kinds = _OFFERED[place].get(name)
        if kinds is None:
            shown = name[:_MOST_SHOWN]
            raise NotOffered(f"{place} parameter {shown!r} is not offered{_instead(place, name)}")
        if parameters[name].WhichOneof("parameter_choice") not in kinds:
            raise InvalidRequest(f"parameter {name!r}: expected {_KINDS[kinds]}")


def _instead(place: Place, name: str) -> str:
    for start, hint in _INSTEAD.items():
        if name.startswith(start):
            return f": {hint}"
    return f"; there are {', '.join(_OFFERED[place])}" if _OFFERED[place] else ""


def _whole(parameter: InferParameter) -> int:
    return parameter.int64_param or parameter.uint64_param
