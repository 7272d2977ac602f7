"""`kan-client health`: what servers say of themselves by grpc.health.v1, to people and to probes.

A container's health check runs it every few seconds beside the server, so it imports gRPC and
little else: no numpy, nothing that draws. Each address is asked by itself, once, and nothing is
asked again: the next look is the prober's.
"""

import sys
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

from kan_bundle.escaping import escape
from serving.client.channel import SERVICE, Connection, connection_to
from serving.client.errors import ClientError, Refused, Unavailable
from serving.client.flags import reached_by
from serving.client.targets import each_of


def health(arguments: Namespace) -> int:
    """Print the status of each server.

    Returns:
        0 if every one is SERVING, else 1.

    Raises:
        WrongSetting: A flag has no usable value; nobody was asked.
    """
    way = reached_by(arguments)
    places = [
        connection_to(**way | {"addresses": address}, only_ready=False)
        for address in each_of(arguments.address)
    ]
    request = pb.HealthCheckRequest(service=arguments.service)
    with ExitStack() as channels:
        # All at the same time, so that they take no longer than one.
        answers = [
            pb_grpc.HealthStub(channels.enter_context(place.open())).Check.future(
                request, timeout=arguments.timeout_s, metadata=place.metadata()
            )
            for place in places
        ]
        found = [
            _print_status(answer, place, arguments)
            for answer, place in zip(answers, places, strict=True)
        ]
    return 0 if all(found) else 1


def _print_status(answer: Any, place: Connection, arguments: Namespace) -> bool:
    """Wait for an answer, print it, and tell whether it is SERVING."""
    try:
        status = answer.result().status
    except grpc.RpcError as error:
        print(f"error: {escape(str(_described(error, place, arguments)))}", file=sys.stderr)
        return False
    names = {value: name for name, value in pb.HealthCheckResponse.ServingStatus.items()}
    print(f"{place.where} {names.get(status, status)}")  # of a newer protocol, a number
    return bool(status == pb.HealthCheckResponse.SERVING)


def _described(error: Any, place: Connection, arguments: Namespace) -> ClientError:
    """Say why there is no status."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return Refused(
            f"{place.where}: expected a service whose health the server knows, found "
            f"{arguments.service!r}; leave --service out to ask whether the server takes requests, "
            f"or ask our server for {SERVICE}, which is the same, or live, whether its process "
            "answers; `kan-client models` tells whether a model is served"
        )
    found = place.translated(error)
    if type(found) is Unavailable:
        fault = place.tls_fault(arguments.timeout_s)
        return found if fault is None else Unavailable(fault, found.code)
    return found
