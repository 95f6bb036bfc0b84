"""The debug channel: what scripts show to whoever looks, on any node of the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Any

from penstock.app import App
from penstock.errors import PenstockError, one_line
from penstock.node.mu import plain

log = logging.getLogger("penstock.debug")

CHANNEL = "penstock.debug"
"""The topic that is broadcast to."""
MOST_WAITING = 1000  # values that the broker has not taken yet; the oldest are dropped first
LONGEST = 64 * 2**10  # characters of one


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
