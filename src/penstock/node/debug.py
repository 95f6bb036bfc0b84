"""The debug channel: what scripts show to whoever looks, on any node of the cluster, and `debug`, to look."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from penstock.app import App
from penstock.client.listening import Listener
from penstock.control.console import Shown
from penstock.errors import BrokerError, BrokerUnavailable, PenstockError, one_line, printable
from penstock.node.mu import plain
from penstock.node.printed import Screen, Silent

log = logging.getLogger("penstock.debug")

CHANNEL = "penstock.debug"
"""The topic that is broadcast to."""
MOST_WAITING = 1000  # values that the broker has not taken yet; the oldest are dropped first
LONGEST = 64 * 2**10  # characters of one
CONNECT_WITHIN = 10.0  # seconds for whoever looks

Subscribe = Callable[[str, Callable[[Any], Any]], Listener]


class DebugChannel:
    """`qprint(value)`: nothing is stored, and nobody waits for it. For one event loop."""

    def __init__(self, app: App, node: str) -> None:
        self._app = app
        self._node = node
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._loop = asyncio.get_running_loop()
        self._saying: asyncio.Task[None] | None = None

    def qprint(self, *values: Any) -> None:
        """Show values to whoever is connected to the debug channel, and to the log at debug level."""
        text = " ".join(value if isinstance(value, str) else str(plain(value)) for value in values)[:LONGEST]
        log.debug("%s", text)
        self._waiting.append(text)
        with contextlib.suppress(RuntimeError):  # from a thread, at the very end
            self._loop.call_soon_threadsafe(self._begin)

    async def close(self) -> None:
        """Idempotent."""
        saying, self._saying = self._saying, None
        if saying is not None:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    def _begin(self) -> None:
        if self._saying is None or self._saying.done():
            self._saying = asyncio.create_task(self._say(), name="penstock-debug-channel")

    async def _say(self) -> None:
        while self._waiting:
            text = self._waiting.popleft()
            try:
                await self._app.broadcast(CHANNEL, {"node": self._node, "text": text})
            except PenstockError as error:
                log.warning("the debug channel: %s", one_line(error))


class DebugSwitch:
    """`debug` among the names: on, off, or over."""

    def __init__(self, screen: Screen, subscribe: Subscribe) -> None:
        self._screen = screen
        self._subscribe = subscribe
        self._listener: Listener | None = None
        self._turning: asyncio.Task[None] | None = None
        self._wanted = False

    def __repr__(self) -> str:
        return "debug() connects to the debug channel, where qprint writes; debug() again, or debug(False), disconnects"

    def __call__(self, on: bool | None = None) -> Turned:
        """Connect to the debug channel, or disconnect: without an argument, whatever it is not.

        It can be awaited; an input is not over before it has happened either way.
        """
        self._wanted = not self._wanted if on is None else bool(on)
        self._turning = asyncio.get_running_loop().create_task(self._turn(self._wanted, self._turning))
        return Turned(self._turning)

    async def settled(self) -> None:
        """Wait until it is as it was last asked for.

        :raises BrokerError, TimeoutError: the channel cannot be had.
        """
        turning, self._turning = self._turning, None
        if turning is not None:
            await turning

    async def close(self) -> None:
        """Idempotent."""
        turning, self._turning = self._turning, None
        if turning is not None:
            turning.cancel()
            await asyncio.gather(turning, return_exceptions=True)
        await self._disconnect()

    async def _turn(self, on: bool, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        if on:
            await self._connect()
        else:
            await self._disconnect()
        self._screen.write(f"debug channel {'connected' if on else 'disconnected'}\n")

    async def _connect(self) -> None:
        if self._listener is not None:
            return
        listener = self._listener = self._subscribe(CHANNEL, self._hear)
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                await listener
        except BaseException as error:
            self._wanted = False
            await self._disconnect()
            if isinstance(error, TimeoutError):
                raise BrokerUnavailable(f"no debug channel within {CONNECT_WITHIN:g} s") from None
            raise

    async def _disconnect(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(BrokerError):
                await listener.close()

    def _hear(self, data: Any) -> None:
        node, text = (data.get("node"), data.get("text")) if isinstance(data, dict) else (None, data)
        self._screen.offer(Shown(str(node or ""), printable(str(text))))


class Turned(Silent):
    """What `debug()` returns: it may be awaited, and need not be."""

    def __init__(self, turning: asyncio.Task[None]) -> None:
        self._turning = turning

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.shield(self._turning).__await__()
