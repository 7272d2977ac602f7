"""A TCP proxy in front of one server, which delays what passes, and cuts connections."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_BYTES = 65536


@dataclass
class Proxy:
    """A proxy that runs in a thread of its own.

    Attributes:
        port: Where it listens.
        delay_s: How long bytes are on the way, in each direction.
    """

    target: int
    port: int = 0
    delay_s: float = 0.0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection that there is, as a network does that loses its state."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        try:
            await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))
        finally:
            for one in (writer, there[1]):
                one.close()
                self._writers.discard(one)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on, each when it has been on the way for long enough."""
        loop, late = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def write() -> None:
            data = b"-"
            with suppress(OSError):
                while data:
                    due, data = await late.get()
                    if due > loop.time():
                        await asyncio.sleep(due - loop.time())
                    writer.write(data)
                    await writer.drain()
            writer.close()

        writing = asyncio.create_task(write())
        data = b"-"
        while data:
            data = b""
            with suppress(OSError):
                data = await reader.read(_BYTES)
            late.put_nowait((loop.time() + self.delay_s, data))
        await writing

    def serve(self, listening: threading.Event) -> None:
        """Run until the loop is stopped."""
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        await self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close when the loop comes round

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@contextmanager
def proxied(target: int) -> Iterator[Proxy]:
    """A proxy in front of a port of this machine."""
    proxy, listening = Proxy(target), threading.Event()
    thread = threading.Thread(target=proxy.serve, args=(listening,))
    thread.start()
    listening.wait()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
