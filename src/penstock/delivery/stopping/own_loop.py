"""Coroutines in event loops of their own, in a thread: cancelled from outside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any


class OwnLoop:
    """One call of a coroutine function, in a loop of its own."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._call = call
        self._under_way: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def __call__(self) -> Any:
        """Carry it out, in this thread."""
        return asyncio.run(self._carry_out())

    def cancel(self) -> None:
        """Cancel it, from another thread; that wakes its loop too. Nothing happens before its beginning or after
        its end."""
        if self._under_way is None:
            return
        loop, task = self._under_way
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(task.cancel)

    async def _carry_out(self) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._under_way = asyncio.get_running_loop(), task
        return await self._call()
