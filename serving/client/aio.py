"""`AsyncKanClient`: what sync.py has, for an event loop. Here are only the calls."""

import asyncio
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from serving.client.batches import Answer, Batch, Wanted
from serving.client.channel import close_aio, connection_to
from serving.client.credentials import Tls
from serving.client.errors import (
    ClientError,
    Closed,
    InvalidRequest,
    Refused,
    ServerFault,
    TimedOut,
    WrongSetting,
)
from serving.client.models import Model, ModelVersion, read_index, read_model
from serving.client.sync import IN_FLIGHT, LOOK_S, TIMEOUT_S, Progress, limit
from serving.client.tensors import Inputs


class _Opened(NamedTuple):
    """A channel in one event loop of one process."""

    process: int
    channel: grpc.aio.Channel
    stub: GRPCInferenceServiceStub


class AsyncKanClient:
    """`KanClient` for event loops. It may be made before a loop runs, and used in several.

    It connects at the first call in each loop. `close` is awaited in a loop that it is used in,
    before that ends; what it has in loops that have ended is let go of.

    Args:
        addresses: See `KanClient`, as for everything else.
        tls: The same.
        token: The same.
        token_file: The same.
        timeout_s: The same.
        in_flight: The same.
        rows_per_message: The same.

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
        self._opened: dict[asyncio.AbstractEventLoop, _Opened] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and let the connections go."""
        self._closed = True
        here, opened = asyncio.get_running_loop(), self._opened
        self._opened = {}
        for loop, (process, channel, _) in opened.items():
            if process != os.getpid():
                continue
            if loop is here:
                await close_aio(channel)
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(close_aio(channel), loop)

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | str = "",
        output: str | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[Any]:
        """Ask a model for its one output, or for the one that is named; see `KanClient.infer`."""
        wanted = Wanted(str(version), output, single=True)
        answer = await self._infer(model, inputs, wanted, timeout_s, None)
        (array,) = answer.outputs.values()
        return array

    async def infer_all(
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
        """Ask a model for every output, and for more about the answer; see `KanClient`."""
        wanted = Wanted(str(version), output, details=details)
        return await self._infer(model, inputs, wanted, timeout_s, progress)

    async def metadata(self, model: str, version: int | str = "") -> Model:
        """Ask what a model takes and gives."""
        return await self._metadata(model, str(version), self._timeout_s)

    async def models(self) -> tuple[ModelVersion, ...]:
        """Ask for every version of every model that is known."""
        method, request = self._stub.RepositoryIndex, pb.RepositoryIndexRequest()
        return read_index(await self._call(method, request, self._timeout_s))

    async def is_ready(self, model: str = "", version: int | str = "") -> bool:
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
                found = await method(
                    request, timeout=timeout, metadata=metadata, wait_for_ready=False
                )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise self._connection.translated(error, model) from error
        return bool(found.ready)

    @property
    def _stub(self) -> GRPCInferenceServiceStub:
        """The calls, for the event loop that runs now; at the first a channel is opened for it.

        Raises:
            Closed: The client was closed.
            Forked: It, or another, was open when this process was forked.
            WrongSetting: No event loop of asyncio runs.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise WrongSetting(
                f"{self._connection.where}: expected a running event loop of asyncio, found none; "
                "await the call within asyncio.run, or use KanClient, which needs none"
            ) from error
        opened = self._opened.get(loop)
        if opened is None or opened.process != os.getpid():
            opened = self._open(loop)
        return opened.stub

    def _open(self, loop: asyncio.AbstractEventLoop) -> "_Opened":
        if self._closed:
            raise Closed(self._connection.where)
        for ended in [each for each in list(self._opened) if each.is_closed()]:
            del self._opened[ended]
        channel = self._connection.open_aio()
        opened = _Opened(os.getpid(), channel, GRPCInferenceServiceStub(channel))
        self._opened[loop] = opened
        return opened

    async def _infer(
        self,
        model: str,
        inputs: Inputs,
        wanted: Wanted,
        timeout_s: float | None,
        progress: Progress | None,
    ) -> Answer:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        batch = await self._batch(model, inputs, wanted, timeout_s)
        try:
            await self._ask(batch, batch.parts, model, timeout_s, progress)
            await self._ask(batch, batch.strays(), model, timeout_s, None)
        except (InvalidRequest, ServerFault):
            self._models.pop((model, wanted.version), None)  # it may take something else by now
            raise
        return batch.answer()

    async def _batch(self, model: str, inputs: Inputs, wanted: Wanted, timeout_s: float) -> Batch:
        """Cut a batch as the model takes it, which is asked once, and again if it does not fit."""
        known = self._models.get((model, wanted.version))
        if known is not None:
            with suppress(InvalidRequest):
                return Batch(known, inputs, wanted, self._rows)
        known = await self._metadata(model, wanted.version, timeout_s)
        return Batch(known, inputs, wanted, self._rows)

    async def _metadata(self, model: str, version: str, timeout_s: float) -> Model:
        which = {"name": model, "version": version}
        request = pb.ModelMetadataRequest(**which)
        found = await self._call(self._stub.ModelMetadata, request, timeout_s, model)
        max_rows = None
        with suppress(Refused):  # not every server of the protocol has this call
            asked = pb.ModelConfigRequest(**which)
            config = (await self._call(self._stub.ModelConfig, asked, timeout_s, model)).config
            max_rows = config.max_batch_size or None
        known = self._models[model, version] = read_model(found, max_rows)
        return known

    async def _ask(
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
                        response = await call
                    batch.add(part, response)
                except grpc.RpcError as error:
                    told = await self._told(error, model)
                    left_s = end - time.monotonic()
                    pause_s = batch.pause_s(told, left_s)
                    if pause_s is None:
                        raise told from error
                    await asyncio.sleep(pause_s)
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
            return self._stub.ModelInfer(request, timeout=limit(timeout_s), metadata=metadata)

    async def _call(self, method: Any, request: Any, timeout_s: float, model: str = "") -> Any:
        metadata = self._connection.metadata()
        try:
            with self._closing():
                found = await method(request, timeout=limit(timeout_s), metadata=metadata)
        except grpc.RpcError as error:
            raise await self._told(error, model) from error
        self._met = True
        return found

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Tell that the client was closed, if it was; gRPC has other errors for it."""
        try:
            yield
        except (grpc.aio.UsageError, grpc.RpcError, asyncio.CancelledError) as error:
            if self._closed and not _is_cancelled():
                raise Closed(self._connection.where) from error
            raise

    async def _told(self, error: grpc.RpcError, model: str) -> ClientError:
        """Say what a call has ended with; who waits for a server in vain is told why."""
        told = self._connection.translated(error, model)
        if self._met or not isinstance(told, TimedOut):
            return told
        method, request = self._stub.ServerLive, pb.ServerLiveRequest()
        metadata = self._connection.metadata()
        try:
            with self._closing():
                await method(request, timeout=LOOK_S, metadata=metadata, wait_for_ready=False)
        except grpc.RpcError as reason:
            connection = self._connection
            return await asyncio.to_thread(connection.never_reached, told, reason, LOOK_S)
        return told


def _is_cancelled() -> bool:
    """Whether somebody cancels the task that runs; a call that gRPC ends looks the same."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
