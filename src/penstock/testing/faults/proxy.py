"""`Proxy`: a TCP line between a client and a server that can be cut, frozen, slowed and restored."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

T = TypeVar("T")

CHUNK = 65_536
QUEUED = 64  # chunks on their way per direction; then the sender is held back, as a full line would
CONNECT_TIMEOUT = 5.0
END_TIMEOUT = 10.0

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST, as a broken line ends


class _Conduct(NamedTuple):
    """How the line behaves at the moment."""

    swallows: bool = False
    life: tuple[float, float] | None = None
    delay: float = 0.0
    rate: float | None = None


_NORMAL = _Conduct()


class _Wire:
    """One client's connection and, unless it is swallowed from the start, ours to the server."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.writers = [client]
        self.task: asyncio.Task[Any] | None = None
        self.lossy = False
        """Bytes of it were swallowed: it can never be whole again."""

    def cut(self) -> None:
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        if self.task is not None:
            self.task.cancel()


class Proxy:
    """Listens on a loopback port of its own and passes everything on to `host:port`.

    It runs in a thread, so tests of both kinds can use it: `with Proxy(5672) as proxy` or `async with`.
    The methods may be called from any thread and return once they have taken effect.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, seed: int = 1) -> None:
        self._target = (host, port)
        self._rng = random.Random(seed)
        self._conduct = _NORMAL
        self._wires: set[_Wire] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0
        """Where it listens, on 127.0.0.1."""
        self.accepted = 0
        """Connections so far."""
        self.cuts = 0
        """Connections that were cut so far."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_TIMEOUT)
        self._loop.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    @property
    def open(self) -> int:
        """Connections at the moment."""
        return len(self._wires)

    # -- faults

    def cut(self) -> int:
        """Reset every connection now; how many there were. New ones are let through."""
        return self._do(self._cut())

    def shorten(self, shortest: float = 1.0, longest: float = 5.0) -> None:
        """From now on cut each connection after a random life of so many seconds, the open ones too."""
        self._do(self._change(self._conduct._replace(life=(shortest, longest))))

    def swallow(self) -> None:
        """From now on read everything and pass on nothing: a half-open line. Connecting still works."""
        self._do(self._change(self._conduct._replace(swallows=True)))

    def delay(self, seconds: float) -> None:
        """From now on everything arrives so much later, in both directions."""
        self._do(self._change(self._conduct._replace(delay=seconds)))

    def throttle(self, bytes_per_second: float) -> None:
        """From now on no connection carries more, in either direction."""
        self._do(self._change(self._conduct._replace(rate=bytes_per_second)))

    def restore(self) -> None:
        """Back to normal. Connections of which bytes were swallowed are cut: they cannot go on."""
        self._do(self._change(_NORMAL))

    # -- in the proxy's thread

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(END_TIMEOUT)

    async def _cut(self) -> int:
        wires = list(self._wires)
        for wire in wires:
            wire.cut()
        self.cuts += len(wires)
        return len(wires)

    async def _change(self, conduct: _Conduct) -> None:
        before, self._conduct = self._conduct, conduct
        if before.swallows and not conduct.swallows:
            for wire in [wire for wire in self._wires if wire.lossy]:
                wire.cut()
        if conduct.life is not None and before.life is None:
            for wire in self._wires:
                self._doom(wire)

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [wire.task for wire in self._wires if wire.task is not None]
        for wire in list(self._wires):
            wire.cut()
        if tasks:
            await asyncio.wait(tasks, timeout=END_TIMEOUT / 2)

    def _doom(self, wire: _Wire) -> None:
        if self._conduct.life is not None:
            self._loop.call_later(self._rng.uniform(*self._conduct.life), self._die, wire)

    def _die(self, wire: _Wire) -> None:
        if wire in self._wires and self._conduct.life is not None:
            wire.cut()
            self.cuts += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        wire = _Wire(writer)
        wire.task = asyncio.current_task()
        self._wires.add(wire)
        self._doom(wire)
        try:
            await self._carry(wire, reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # that is how lines end; the task is this connection's own, so nothing else waits for it
        finally:
            wire.task = None  # which is this one, and ends by itself
            wire.cut()
            self._wires.discard(wire)

    async def _carry(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._conduct.swallows:
            wire.lossy = True
            while await reader.read(CHUNK):
                pass
            return
        async with asyncio.timeout(CONNECT_TIMEOUT):
            back, forth = await asyncio.open_connection(*self._target)
        wire.writers.append(forth)
        ways = [asyncio.create_task(self._pump(wire, *way)) for way in ((reader, forth), (back, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until either end has closed and what was on its way has arrived."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)
        deliver = asyncio.create_task(self._deliver(wire, queue, writer))
        try:
            with contextlib.suppress(ConnectionError):  # a reset is an end like any other, and as easily swallowed
                while data := await reader.read(CHUNK):
                    await queue.put((time.monotonic(), data))
            await queue.put((time.monotonic(), b""))
            await deliver
        finally:
            deliver.cancel()

    async def _deliver(
        self, wire: _Wire, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            arrived, data = await queue.get()
            conduct = self._conduct
            if conduct.delay:
                await asyncio.sleep(max(0.0, arrived + conduct.delay - time.monotonic()))
            if self._conduct.swallows or wire.lossy:
                wire.lossy = True  # an end is swallowed too: the other side is told nothing
                continue
            if not data:
                return
            if conduct.rate is not None:
                await asyncio.sleep(len(data) / conduct.rate)
            writer.write(data)
            await writer.drain()
