"""What waits between receiving and running."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from penstock.message import Message

T = TypeVar("T")


class Buffer(Generic[T]):
    """A queue for one event loop that wakes one waiter an item, not all, and none for what another takes at once."""

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()

    def put(self, items: Iterable[T]) -> None:
        self.items.extend(items)
        if self._waiters:
            self._wake(1)
            if len(self.items) > 1:  # handlers that never wait leave nothing for anybody else to be woken for
                asyncio.get_running_loop().call_soon(self._wake_for_the_rest)

    async def get(self) -> T:
        while not self.items:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)  # the turn that was ours
                elif waiter in self._waiters:
                    self._waiters.remove(waiter)
                raise
        return self.items.popleft()

    def clear(self) -> list[T]:
        """Take out all that nobody has started."""
        items = list(self.items)
        self.items.clear()
        return items

    def _wake_for_the_rest(self) -> None:
        self._wake(len(self.items))

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


class Batching:
    """Gathers messages into batches of `size`, or fewer once the first has waited for `timeout` seconds
    (None: it waits until full)."""

    def __init__(self, size: int, timeout: float | None, emit: Callable[[list[list[Message]]], None]) -> None:
        self._size = size
        self._timeout = timeout
        self._emit = emit
        self._gathered: list[Message] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, messages: list[Message]) -> None:
        self._gathered += messages
        size = self._size
        full = len(self._gathered) // size * size
        if full:
            gathered, self._gathered = self._gathered[:full], self._gathered[full:]
            self._stop_timer()
            self._emit([gathered[at : at + size] for at in range(0, full, size)])
        if self._gathered and self._timer is None and self._timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout, self._flush)

    def clear(self) -> list[Message]:
        """Take out what is gathered."""
        self._stop_timer()
        messages, self._gathered = self._gathered, []
        return messages

    def _flush(self) -> None:
        self._timer = None
        messages, self._gathered = self._gathered, []
        if messages:
            self._emit([messages])

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
