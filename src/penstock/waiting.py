"""`Bell`: waiting until there may be something to do; `Gathering`: doing together what is asked for together; `Ending`:
doing something at the end of the event loop; `Deadline`: ending what would take too long."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Bell:
    """An event that is heard once: `wait()` returns when it has been rung since it last returned. Those who wait
    at the same time all hear it.

    It belongs to the event loop in which it was made. `ring()` is for that loop, `ring_from_thread()`
    for any other place.
    """

    __slots__ = ("_loop", "_rung", "_waiters")

    def __init__(self) -> None:
        self._rung = False
        self._waiters: list[asyncio.Future[bool]] = []
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        self._rung = True
        for waiter in self._waiters:
            _settle(waiter, True)

    def ring_from_thread(self) -> None:
        """Silently nothing, once the loop has closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.ring)

    async def wait(self, seconds: float | None = None) -> bool:
        """Until rung (True) or for `seconds` (False)."""
        if not self._rung:
            if seconds is not None and seconds <= 0:
                return False
            waiter: asyncio.Future[bool] = self._loop.create_future()
            timer = None if seconds is None else self._loop.call_later(seconds, _settle, waiter, False)
            self._waiters.append(waiter)
            try:
                if not await waiter:
                    return False
            finally:
                self._waiters.remove(waiter)
                if timer is not None:
                    timer.cancel()
        self._rung = False
        return True


def _settle(waiter: asyncio.Future[bool], rung: bool) -> None:
    if not waiter.done():
        waiter.set_result(rung)


class Gathering(Generic[T, R]):
    """What many ask for in one turn of the event loop is done in one go.

    `work(items)` returns an outcome for each, in order; an exception it raises reaches all who asked.
    Several goes may be under way together. It belongs to the event loop in which it is first used.
    """

    def __init__(self, work: Callable[[Sequence[T]], Awaitable[Sequence[R]]], most: int = 500) -> None:
        self._work = work
        self._most = most
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._going: set[asyncio.Task[None]] = set()

    async def do(self, item: T) -> R:
        """Cancelling may come too late: then it is done all the same."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._go)
        self._waiting.append((item, outcome))
        return await outcome

    def _go(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), self._most):
            task = asyncio.create_task(self._carry_out(waiting[start : start + self._most]))
            self._going.add(task)
            task.add_done_callback(self._going.discard)

    async def _carry_out(self, asked: list[tuple[T, asyncio.Future[R]]]) -> None:
        asked = [one for one in asked if not one[1].done()]
        try:
            outcomes = await self._work([item for item, _ in asked]) if asked else []
        except BaseException as error:
            for _, future in asked:
                if not future.done():
                    if isinstance(error, asyncio.CancelledError):
                        future.cancel()
                    else:
                        future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), outcome in zip(asked, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)


async def together(*calls: Callable[[], Awaitable[None]]) -> None:
    """What several calls do, at the same time."""
    asyncio.get_running_loop()  # there is none where a coroutine is only being disposed of: then nothing is begun
    await asyncio.gather(*(call() for call in calls))


class Ending:
    """Has `close()` called at the end of the event loop in which it `begin`s, if that is run by `asyncio.run` or a
    `Runner`: after every task in it has been cancelled, while it still turns. For at most `within` seconds."""

    def __init__(self, close: Callable[[], Awaitable[None]], within: float = 5.0) -> None:
        self._waiting = _until_the_end(close, within)

    async def begin(self) -> None:
        await anext(self._waiting)


async def _until_the_end(close: Callable[[], Awaitable[None]], within: float) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:  # the loop ends the generators that were begun in it
        with contextlib.suppress(Exception):
            async with asyncio.timeout(within):
                await close()


MOMENT = 0.1  # seconds that work gets after the deadline too, and after each cancellation
MOST_CANCELLATIONS = 20  # of work that swallows them; then it is left behind


class Deadline:
    """A moment that several things, one after another, share as the end of their time. It may come nearer
    meanwhile, also for what is under way.

    Work is cancelled then, again and again until it has ended: so it may have several things to do one after
    another, `try` and `finally`, each of which is cut short in its turn. For one event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._at = math.inf
        self._bell = Bell()
        self._limit: asyncio.Timeout | None = None

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self._at - self._loop.time()

    def within(self, seconds: float) -> None:
        """It comes in so many seconds at the latest."""
        at = self._loop.time() + seconds
        if at < self._at:
            self._at = at
            self._bell.ring()
            if self._limit is not None and not self._limit.expired():
                self._limit.reschedule(at)

    async def allow(self, work: Coroutine[Any, Any, None], *, most: float = math.inf, spare: float = 0.0) -> bool:
        """Have some work done in at most `most` seconds, and `spare` seconds before the deadline; whether it was."""
        until = self._loop.time() + most
        earliest = self._loop.time() + MOMENT
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._bell.ring())
        try:
            while not task.done() and (left := max(min(self._at - spare, until), earliest) - self._loop.time()) > 0:
                await self._bell.wait(None if left == math.inf else left)
            if task.done():
                task.result()
                return True
            for _ in range(MOST_CANCELLATIONS):
                task.cancel()
                await asyncio.wait([task], timeout=MOMENT)
                if task.done():
                    break
        finally:
            task.cancel()
        if task.done() and not task.cancelled():
            task.exception()  # it was cut short, and nobody wants to know how it took that
        return False

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Have the block end in time, which runs in the task that it is in.

        :raises TimeoutError: it did not.
        """
        try:
            async with asyncio.timeout(None if self._at == math.inf else max(self.left, MOMENT)) as self._limit:
                yield
        finally:
            self._limit = None
