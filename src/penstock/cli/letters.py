"""Where `penstock dead` finds the dead letters of a queue: on the broker itself, or by way of a node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec

from penstock.brokers.base import Broker
from penstock.cli import remote
from penstock.cli.command import Call, UsageError
from penstock.cli.output import Advance, progress
from penstock.cli.remote import Remote
from penstock.control import dead_letters
from penstock.control.brokers import connected
from penstock.control.dead_letters import Letters, Outcome, Selection
from penstock.delivery.dead_letters import DeadLetter

TICK = 0.1  # seconds between looks at how far it has come
MOST_LISTED = 1000
"""Letters that a node shows at once."""
PART = 1000  # letters that a node is asked to settle at once: its answer must not take long

Work = Callable[[Broker, Outcome], Awaitable[None]]


class Letterbox(Protocol):
    """The dead letters of one queue. Errors are those of `control.dead_letters`, or a `NodeError`."""

    def look(self, limit: int, *, newest: bool) -> Letters: ...
    def find(self, id: str) -> DeadLetter: ...
    def replay(self, selection: Selection, outcome: Outcome, to: str | None) -> None: ...
    def discard(self, selection: Selection, outcome: Outcome) -> None: ...


def letterbox(call: Call, queue: str) -> Letterbox:
    """Where a command is told to look.

    :raises ConfigError: a URL that cannot be.
    """
    node = remote.asked(call)
    return OnBroker(call, queue) if node is None else OnNode(node, queue)


class OnBroker:
    """On the broker itself."""

    def __init__(self, call: Call, queue: str) -> None:
        self._call = call
        self._queue = queue

    def look(self, limit: int, *, newest: bool) -> Letters:
        async def look() -> Letters:
            async with connected(self._call.url) as broker:
                return await dead_letters.look(broker, self._queue, limit, newest=newest)

        return self._call.run(look())

    def find(self, id: str) -> DeadLetter:
        async def find() -> DeadLetter:
            async with connected(self._call.url) as broker:
                return await dead_letters.find(broker, self._queue, id)

        return self._call.run(find())

    def replay(self, selection: Selection, outcome: Outcome, to: str | None) -> None:
        async def work(broker: Broker, outcome: Outcome) -> None:
            async with AsyncExitStack() as stack:
                other = None if to is None else await stack.enter_async_context(connected(to))
                await dead_letters.replay(broker, self._queue, selection, outcome, other)

        self._call.run(self._with_progress(selection, work, outcome))

    def discard(self, selection: Selection, outcome: Outcome) -> None:
        async def work(broker: Broker, outcome: Outcome) -> None:
            await dead_letters.discard(broker, self._queue, selection, outcome)

        self._call.run(self._with_progress(selection, work, outcome))

    async def _with_progress(self, selection: Selection, work: Work, outcome: Outcome) -> None:
        async with connected(self._call.url) as broker:
            total = len(selection.ids) or selection.limit
            if total is None:
                total = await dead_letters.count(broker, self._queue)
            with progress(self._queue, total) as advance:
                showing = asyncio.create_task(_show_progress(outcome, advance))
                try:
                    await work(broker, outcome)
                finally:
                    showing.cancel()


class OnNode:
    """By way of a node, in parts."""

    def __init__(self, node: Remote, queue: str) -> None:
        self._node = node
        self._queue = queue
        self._path = f"/queues/{remote.part(queue)}/dead"

    def look(self, limit: int, *, newest: bool) -> Letters:
        asked = min(limit, MOST_LISTED)
        return self._node.get(self._path, Letters, limit=asked, newest="true" if newest else None)

    def find(self, id: str) -> DeadLetter:
        return self._node.get(self._path, Letters, id=id).letters[0]

    def replay(self, selection: Selection, outcome: Outcome, to: str | None) -> None:
        if to is not None:
            raise UsageError("--to is for whoever asks the broker itself, and not a node")
        self._settle("replay", selection, outcome)

    def discard(self, selection: Selection, outcome: Outcome) -> None:
        self._settle("discard", selection, outcome)

    def _settle(self, verb: str, selection: Selection, outcome: Outcome) -> None:
        """Those that are dead now, and none that comes back meanwhile."""
        asked: dict[str, object] = {"reason": selection.reason}
        if selection.ids:
            self._part(verb, asked | {"ids": sorted(selection.ids)}, outcome)
            return
        left = selection.limit or self._node.get(self._path, Letters, limit=1).total
        with progress(self._queue, left) as advance:
            while left is None or left > 0:
                wanted = PART if left is None else min(left, PART)
                wanted += outcome.stayed  # these are come upon again
                told = self._part(verb, asked | {"limit": wanted}, outcome)
                asked["before"] = told.before
                advance(outcome.done, outcome.done)
                left = None if left is None else left - told.done
                if told.done == 0 or told.done + told.stayed < wanted:
                    return

    def _part(self, verb: str, wanted: dict[str, object], outcome: Outcome) -> _Settled:
        told = self._node.post(f"{self._path}/{verb}", _Settled, wanted)
        outcome.done += told.done
        outcome.stayed = told.stayed
        outcome.why = outcome.why or told.why
        outcome.missing = frozenset(told.missing)
        return told


class _Settled(msgspec.Struct):
    """What a node says became of them."""

    done: int
    stayed: int = 0
    why: str | None = None
    missing: list[str] = []
    before: float | None = None


async def _show_progress(outcome: Outcome, advance: Advance) -> None:
    while True:
        advance(outcome.done, outcome.done)
        await asyncio.sleep(TICK)
