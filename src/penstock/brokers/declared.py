"""`Declared`: the queues that were declared on a connection, to be made again where they have gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from penstock.brokers.base import Queue


class Declared:
    """Each queue as it was declared first, with the topics of all its declarations."""

    def __init__(self) -> None:
        self._queues: dict[str, Queue] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._queues

    def __iter__(self) -> Iterator[str]:
        return iter(self._queues)

    def add(self, queue: Queue) -> None:
        known = self._queues.get(queue.name)
        if known is not None:
            queue = msgspec.structs.replace(known, topics=tuple(dict.fromkeys((*known.topics, *queue.topics))))
        self._queues[queue.name] = queue

    def forget_topics(self, name: str, topics: Sequence[str]) -> None:
        """They are not to be bound again unless they are declared again."""
        queue = self._queues.get(name)
        if queue is not None:
            kept = tuple(topic for topic in queue.topics if topic not in topics)
            self._queues[name] = msgspec.structs.replace(queue, topics=kept)

    def in_order(self) -> list[Queue]:
        """Each lane after the queue that it runs beside."""
        return sorted(self._queues.values(), key=lambda queue: queue.lane_of is not None)
