"""`Topics`: which queues are on a topic, and so which runs a task will have.

topic/<topic>   its queues
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from penstock.clock import Clock
from penstock.stores.base import ABSENT, Delete, Entry, Put
from penstock.stores.gathered import Gathered
from penstock.stores.keys import check_keys
from penstock.waiting import Gathering

TOPICS_KNOWN = 1.0  # seconds for which the queues of a topic are remembered


class Topics:
    """The queues on each topic. For one event loop."""

    def __init__(self, records: Gathered, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._registered: dict[str, set[str]] = {}  # by queue, its topics
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._asking: Gathering[str, list[str]] = Gathering(self._ask)

    async def register(self, queue: str, topics: Iterable[str]) -> None:
        """A queue is bound to these topics, and to its own name."""
        self._registered.setdefault(queue, set()).update(topics)
        for topic in dict.fromkeys((queue, *topics)):
            await self._change(topic, lambda queues: {*queues, queue})

    async def unregister(self, queue: str, topics: Iterable[str]) -> None:
        """A queue is bound to these topics no more: tasks that are sent to them from now on have no run in it."""
        self._registered.get(queue, set()).difference_update(topics)
        for topic in dict.fromkeys(topics):
            await self._change(topic, lambda queues: queues - {queue})

    async def assure(self, queue: str) -> None:
        """Register a queue again if it was here and is not known any more: the store was emptied."""
        topics = self._registered.get(queue)
        if topics is not None and queue not in await self.queues(queue):
            await self.register(queue, sorted(topics))

    async def queues(self, topic: str) -> list[str]:
        """The queues on a topic."""
        known = self._known.get(topic)
        if known is not None and self._clock.monotonic() - known[0] < TOPICS_KNOWN:
            return known[1]
        check_keys([topic])
        return await self._asking.do(topic)

    async def _ask(self, topics: Sequence[str]) -> list[list[str]]:
        now, wanted = self._clock.monotonic(), list(dict.fromkeys(topics))
        entries = await self._records.get(*map(_key, wanted))
        for topic, entry in zip(wanted, entries, strict=True):
            self._known[topic] = (now, _queues(entry))
        return [self._known[topic][1] for topic in topics]

    async def _change(self, topic: str, change: Callable[[set[str]], set[str]]) -> None:
        """Write down other queues of a topic, whoever else is about to."""
        key = _key(topic)
        while True:
            (entry,) = await self._records.get(key)
            before = set(_queues(entry))
            after = change(before)
            if after == before:
                return
            expected = ABSENT if entry is None else entry.version
            value = msgspec.json.encode(sorted(after))
            put = Put(key, value, expect=expected) if after else Delete(key, expect=expected)
            if (await self._records.apply(put))[0] is not None:
                self._known.pop(topic, None)
                return


def _key(topic: str) -> str:
    return f"topic/{topic}"


def _queues(entry: Entry | None) -> list[str]:
    return [] if entry is None else msgspec.json.decode(entry.value, type=list[str])
