"""`Lookout`: whether somebody wants a run to end, for those that take a while."""

from __future__ import annotations

import asyncio
import logging

from penstock.errors import BrokerError, one_line
from penstock.stores.ledger import Held, Ledger

log = logging.getLogger("penstock.tasks")

YOUNG = 0.05
"""Seconds for which a run is not worth looking; most have ended by then, and cost no timer of their own."""
LOOK = 30.0  # seconds between looks, beside hearing of it
AGAIN = 5.0  # seconds until a store that is away is asked again


class Run:
    """A run that is under way in a task of the event loop."""

    __slots__ = ("cancelled", "held", "task", "watching")

    def __init__(self, held: Held, task: asyncio.Task[object]) -> None:
        self.held = held
        self.task = task
        self.cancelled = False
        """Its task was cancelled because somebody wants that."""
        self.watching: asyncio.Task[None] | None = None


class Lookout:
    """Cancels runs that somebody wants cancelled, or that are not ours any more."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._newer: set[Run] = set()
        self._older: set[Run] = set()
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, held: Held) -> Run:
        """The running task begins a run; `leave` is to be called at its end."""
        task = asyncio.current_task()
        assert task is not None
        run = Run(held, task)
        self._newer.add(run)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(YOUNG, self._age)
        return run

    def leave(self, run: Run) -> None:
        self._newer.discard(run)
        self._older.discard(run)
        if run.watching is not None:
            run.watching.cancel()

    def _age(self) -> None:
        for run in self._older:
            run.watching = asyncio.create_task(self._watch(run), name=f"penstock-lookout {run.held.taskid}")
        self._older, self._newer = self._newer, set()
        again = asyncio.get_running_loop().call_later
        self._timer = again(YOUNG, self._age) if self._older else None

    async def _watch(self, run: Run) -> None:
        held = run.held
        while True:
            try:
                async with self._ledger.followers.follow([f"run/{held.taskid}/{held.queue}"]) as bell:
                    while not await self._ledger.wants_cancel(held):
                        await bell.wait(LOOK)
                run.cancelled = True
                run.task.cancel()
                return
            except BrokerError as error:
                log.debug("cannot see whether %s is to be cancelled: %s", held.taskid, one_line(error))
            await asyncio.sleep(AGAIN)
