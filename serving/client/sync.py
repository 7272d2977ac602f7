"""`KanClient`: arrays in, arrays out, from one server or several. Here are only the calls."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import grpc
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client.batches import Answer, Batch, Wanted
from serving.client.channel import connection_to
from serving.client.credentials import Tls
from serving.client.errors import (
    ClientError,
    Closed,
    Forked,
    InvalidRequest,
    Refused,
    ServerFault,
    TimedOut,
)
from serving.client.models import Model, ModelVersion, read_index, read_model
from serving.client.tensors import Inputs

TIMEOUT_S = 30.0
"""How long an answer is waited for unless the caller says otherwise."""

IN_FLIGHT = 4
"""Messages of a batch under way at a time: the next are there when the server has run one."""

LOOK_S = 1.0
"""For how long is looked for the reason why nobody has ever answered."""

Progress = Callable[[int], object]


class KanClient:
    """A client of one server or several. Threads may share it.

    Calls wait for a server that is not up yet, go to those that are ready, and are asked again of
    another where one has ended. What goes wrong is a `ClientError` (see errors.py). It connects at
    the first call, so a client may be made before a fork and used after it, but not used on both
    sides: gRPC does not survive that.

    Args:
        addresses: `host:port`, several of them in a list, or `dns:///name:port` for every address
            of a name.
        tls: How to recognise the servers; None speaks without TLS.
        token: A bearer token, sent over TLS or to this machine alone.
        token_file: A file with one, read at every call.
        timeout_s: How long the answer to a message is waited for, in seconds. A batch that is cut
            into several has as much for each.
        in_flight: Messages of a batch that are under way at a time.
        rows_per_message: Most rows in one; by default as many as a server runs at a time.

    Raises:
        WrongSetting: An address, a certificate or a token cannot be used.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        tls: Tls | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = TIMEOUT_S,
        in_flight: int = IN_FLIGHT,
        rows_per_message: int | None = None,
    ) -> None:
        self._connection = connection_to(addresses, tls=tls, token=token, token_file=token_file)
        self._timeout_s = timeout_s
        self._in_flight = in_flight
        self._rows = rows_per_message
        self._models: dict[tuple[str, str], Model] = {}
        self._met = False
        self._closed = False
        self._opened: dict[int, tuple[grpc.Channel, GRPCInferenceServiceStub]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every call and let the connections go."""
        self._closed = True
        channel, _ = self._opened.get(os.getpid(), (None, None))
        if channel is not None:
            channel.close()

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | str = "",
        output: str | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[Any]:
        """Ask a model for its one output, or for the one that is named.

        Args:
            model: Its name.
            inputs: An array, rows first, or names to arrays where there are several inputs. Floats
                are rounded to the model's precision; whole numbers are taken for floats, and for
                other whole numbers, where none is changed by it; nothing else is converted.
            version: Of the model; by default the newest.
            output: Which one, where there are several.
            timeout_s: Instead of the client's own.

        Returns:
            As many rows.
        """
        wanted = Wanted(str(version), output, single=True)
        (array,) = self._infer(model, inputs, wanted, timeout_s, None).outputs.values()
        return array

    def infer_all(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | str = "",
        output: str | None = None,
        details: bool = False,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Ask a model for every output, and for more about the answer; see `infer`.

        Args:
            model: Its name.
            inputs: An array, or names to arrays.
            version: Of the model; by default the newest.
            output: The only one that is wanted; by default all of them.
            details: Whether to ask how the answer came about.
            timeout_s: Instead of the client's own.
            progress: Told how many rows have been answered, each time that some are.
        """
        wanted = Wanted(str(version), output, details=details)
        return self._infer(model, inputs, wanted, timeout_s, progress)

    def metadata(self, model: str, version: int | str = "") -> Model:
        """Ask what a model takes and gives."""
        return self._metadata(model, str(version), self._timeout_s)

    def models(self) -> tuple[ModelVersion, ...]:
        """Ask for every version of every model that is known."""
        method, request = self._stub.RepositoryIndex, pb.RepositoryIndexRequest()
        return read_index(self._call(method, request, self._timeout_s))

    def is_ready(self, model: str = "", version: int | str = "") -> bool:
        """Ask whether a server takes requests now, or a model does; wait for none to come up.

        Raises:
            ModelNotFound: There is no such model, or no such version of it.
        """
        method: Any = self._stub.ServerReady
        request: Any = pb.ServerReadyRequest()
        if model:
            method = self._stub.ModelReady
            request = pb.ModelReadyRequest(name=model, version=str(version))
        metadata, timeout = self._connection.metadata(), limit(self._timeout_s)
        try:
            with self._closing():
                found = method(request, timeout=timeout, metadata=metadata, wait_for_ready=False)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise self._connection.translated(error, model) from error
        return bool(found.ready)

    @property
    def _stub(self) -> GRPCInferenceServiceStub:
        """The calls; at the first of them a channel is opened, in the process that makes it.

        Raises:
            Closed: The client was closed.
            Forked: It was used before this process was forked.
        """
        found = self._opened.get(os.getpid()) or self._open()
        return found[1]

    def _open(self) -> tuple[grpc.Channel, GRPCInferenceServiceStub]:
        where, process = self._connection.where, os.getpid()
        if any(each != process for each in list(self._opened)):
            raise Forked(
                f"{where}: the client was used before this process was forked, which gRPC does not "
                "survive; make a client in this process, or use this one only after the fork, or "
                "start the process with multiprocessing's 'spawn'"
            )
        channel = self._connection.open()
        opened = channel, GRPCInferenceServiceStub(channel)
        kept = self._opened.setdefault(process, opened)
        if self._closed or kept is not opened:  # another thread was first
            channel.close()
        if self._closed:
            raise Closed(where)
        return kept

    def _infer(
        self,
        model: str,
        inputs: Inputs,
        wanted: Wanted,
        timeout_s: float | None,
        progress: Progress | None,
    ) -> Answer:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        batch = self._batch(model, inputs, wanted, timeout_s)
        try:
            if len(batch.parts) == 1:  # quicker than several at a time
                request = batch.request(batch.parts[0])
                response = self._call(self._stub.ModelInfer, request, timeout_s, model)
                batch.add(batch.parts[0], response)
                if progress is not None:
                    progress(batch.parts[0].stop)
            else:
                self._ask(batch, batch.parts, model, timeout_s, progress)
                self._ask(batch, batch.strays(), model, timeout_s, None)
        except (InvalidRequest, ServerFault):
            self._models.pop((model, wanted.version), None)  # it may take something else by now
            raise
        return batch.answer()

    def _batch(self, model: str, inputs: Inputs, wanted: Wanted, timeout_s: float) -> Batch:
        """Cut a batch as the model takes it, which is asked once, and again if it does not fit."""
        known = self._models.get((model, wanted.version))
        if known is not None:
            with suppress(InvalidRequest):
                return Batch(known, inputs, wanted, self._rows)
        known = self._metadata(model, wanted.version, timeout_s)
        return Batch(known, inputs, wanted, self._rows)

    def _metadata(self, model: str, version: str, timeout_s: float) -> Model:
        which = {"name": model, "version": version}
        request = pb.ModelMetadataRequest(**which)
        found = self._call(self._stub.ModelMetadata, request, timeout_s, model)
        max_rows = None
        with suppress(Refused):  # not every server of the protocol has this call
            asked = pb.ModelConfigRequest(**which)
            config = self._call(self._stub.ModelConfig, asked, timeout_s, model).config
            max_rows = config.max_batch_size or None
        known = self._models[model, version] = read_model(found, max_rows)
        return known

    def _ask(
        self,
        batch: Batch,
        parts: Sequence[slice],
        model: str,
        timeout_s: float,
        progress: Progress | None,
    ) -> None:
        """Have some parts of a batch answered, several at a time."""
        waiting, under_way = deque(parts), deque[tuple[slice, float, Any]]()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < max(1, self._in_flight):
                    part, end = waiting.popleft(), time.monotonic() + timeout_s
                    under_way.append((part, end, self._send(batch, part, timeout_s)))
                part, end, call = under_way[0]
                try:
                    with self._closing():
                        response = call.result()
                    batch.add(part, response)
                except grpc.RpcError as error:
                    told = self._told(error, model)
                    left_s = end - time.monotonic()
                    pause_s = batch.pause_s(told, left_s)
                    if pause_s is None:
                        raise told from error
                    time.sleep(pause_s)
                    under_way[0] = (part, end, self._send(batch, part, left_s - pause_s))
                    continue
                self._met = True
                under_way.popleft()
                if progress is not None:
                    progress(part.stop - part.start)
        finally:
            for _, _, call in under_way:
                call.cancel()

    def _send(self, batch: Batch, part: slice, timeout_s: float) -> Any:
        metadata = self._connection.metadata()
        request = batch.request(part)
        with self._closing():
            return self._stub.ModelInfer.future(
                request, timeout=limit(timeout_s), metadata=metadata
            )

    def _call(self, method: Any, request: Any, timeout_s: float, model: str = "") -> Any:
        metadata = self._connection.metadata()
        try:
            with self._closing():
                found = method(request, timeout=limit(timeout_s), metadata=metadata)
        except grpc.RpcError as error:
            raise self._told(error, model) from error
        self._met = True
        return found

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Tell that the client was closed, if it was; gRPC has other errors for it."""
        try:
            yield
        except (ValueError, grpc.RpcError) as error:
            if self._closed:
                raise Closed(self._connection.where) from error
            raise

    def _told(self, error: grpc.RpcError, model: str) -> ClientError:
        """Say what a call has ended with; who waits for a server in vain is told why."""
        told = self._connection.translated(error, model)
        if self._met or not isinstance(told, TimedOut):
            return told
        try:
            request, metadata = pb.ServerLiveRequest(), self._connection.metadata()
            with self._closing():
                self._stub.ServerLive(
                    request, timeout=LOOK_S, metadata=metadata, wait_for_ready=False
                )
        except grpc.RpcError as reason:
            return self._connection.never_reached(told, reason, LOOK_S)
        return told


def limit(timeout_s: float) -> float | None:
    """Give gRPC a time, or none for an infinite one."""
    return None if math.isinf(timeout_s) else timeout_s
