"""`Together`: what is asked for while others are under way goes in one statement with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from penstock.postgres.pool import unheard

T = TypeVar("T")
R = TypeVar("R")


class Together(Generic[T, R]):
    """`do(items)`: what `work(items)` returns, an outcome for each item. At most `lanes` calls of it are under way; who
    comes meanwhile waits, and goes with all who do. A call's items stay together, and in their order.

    An exception of `work` reaches all who went together. For one event loop.

    :param weight: of an item; as many go together as weigh `most`, or those of one call.
    """

    def __init__(
        self, work: Callable[[list[T]], Awaitable[Sequence[R]]], weight: Callable[[T], int], lanes: int, most: int
    ) -> None:
        self._work = work
        self._weight = weight
        self._lanes = lanes
        self._most = most
        self._waiting: list[tuple[list[T], asyncio.Future[list[R]]]] = []
        self._busy = 0
        self._going: set[asyncio.Task[None]] = set()

    async def do(self, items: list[T]) -> list[R]:
        """Cancelling may come too late: then it is done all the same."""
        outcome: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, outcome))
        if self._busy < self._lanes:
            self._busy += 1
            task = asyncio.create_task(self._go())
            self._going.add(task)
            task.add_done_callback(self._going.discard)
            task.add_done_callback(unheard)
        return await outcome

    async def _go(self) -> None:
        try:
            await self._go_on()
        finally:
            self._busy -= 1  # at once: whoever comes before this task counts as done would wait for ever

    async def _go_on(self) -> None:
        while self._waiting:
            calls = self._next()
            try:
                outcomes = await self._work([item for items, _ in calls for item in items])
            except BaseException as error:
                for _, outcome in calls:
                    if not outcome.done():
                        if isinstance(error, Exception):
                            outcome.set_exception(error)
                        else:
                            outcome.cancel()
                if not isinstance(error, Exception):
                    raise
                continue  # those who came meanwhile
            at = 0
            for items, outcome in calls:
                if not outcome.done():
                    outcome.set_result(list(outcomes[at : at + len(items)]))
                at += len(items)

    def _next(self) -> list[tuple[list[T], asyncio.Future[list[R]]]]:
        """Those who go now; whoever gave up before they went is left out."""
        calls: list[tuple[list[T], asyncio.Future[list[R]]]] = []
        weight = taken = 0
        for items, outcome in self._waiting:
            weight += sum(map(self._weight, items))
            if calls and weight > self._most:
                break
            taken += 1
            if not outcome.done():
                calls.append((items, outcome))
        del self._waiting[:taken]
        return calls
