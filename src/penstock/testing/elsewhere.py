"""`Elsewhere`: an event loop in a thread of its own that can be made to stand still."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Elsewhere:
    """A second process, as far as one process can be two: what runs here has its own event loop.

    `freeze()` stands for a consumer that hangs or has died: its loop turns no more. `thaw()` lets it go
    on, knowing nothing of the time that has passed.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turning = threading.Event()
        self._turning.set()
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name="elsewhere", daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, run in the other loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def freeze(self) -> None:
        self._turning.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def thaw(self) -> None:
        self._turning.set()

    async def end(self) -> None:
        """Stop for good; what still runs there is cancelled. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._turning.set()
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        # Standing still outside of the loop, so that no callback is seen to block.
        while not self._ended:
            self._loop.run_forever()
            self._turning.wait()
        for task in (left := asyncio.all_tasks(self._loop)):
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()
