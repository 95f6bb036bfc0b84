"""`Bell`: waiting until there may be something to do, at most so long."""

from __future__ import annotations

import asyncio
import contextlib


class Bell:
    """An event that is heard once: `wait()` returns when it has been rung since it last returned.

    It belongs to the event loop in which it was made. `ring()` is for that loop, `ring_from_thread()`
    for any other place.
    """

    __slots__ = ("_event", "_loop")

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        self._event.set()

    def ring_from_thread(self) -> None:
        """Silently nothing, once the loop has closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float | None = None) -> bool:
        """Until rung (True) or for `seconds` (False)."""
        event = self._event
        if not event.is_set():
            if seconds is not None and seconds <= 0:
                return False
            try:
                async with asyncio.timeout(seconds):
                    await event.wait()
            except TimeoutError:
                return False
        event.clear()
        return True
