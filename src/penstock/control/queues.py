"""Queues as an operator sees them: lanes folded into the queue they belong to."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from penstock.brokers.base import Admin, QueueInfo
from penstock.delivery import dead_letters, suspects
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.suspects import suspect_queue
from penstock.errors import UnknownQueue, near


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One queue; None: the system cannot say."""

    name: str
    ready: int | None
    """Waiting, with those under a delay and those in the lane of suspects."""
    unsettled: int | None
    """In the hands of consumers."""
    consumers: int | None
    dead: int | None
    """Its dead letters."""
    oldest_s: float | None
    """Age in seconds of the oldest waiting message; None where none waits, too."""


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All queues, by name."""

    queues: list[QueueStatus]
    paused: frozenset[str]


async def overview(admin: Admin, names: Sequence[str] = ()) -> Overview:
    """Every queue that the system lists, or those named.

    A queue's dead letters are its `dead`, also where only they are left or kept on this broker.

    :raises UnknownQueue: a named queue that is not there.
    """
    wanted = [one for name in names for one in (name, suspect_queue(name), dead_queue(name))]
    infos = {info.name: info for info in await admin.inspect(wanted or None)}
    bases = set(names) or _bases(infos)
    for name in names:
        if name not in infos and dead_queue(name) not in infos:
            raise await unknown(admin, name)
    return Overview(
        queues=[_status(name, infos, time.time()) for name in sorted(bases)],
        paused=frozenset(name for name, info in infos.items() if info.paused),
    )


async def purge(admin: Admin, queue: str) -> int:
    """Remove every message that no consumer holds, its suspects included; how many that were.

    :raises UnknownQueue: no such queue.
    """
    names = await _own_and_lane(admin, queue)
    return sum([await admin.purge(name) for name in names])


async def pause(admin: Admin, queue: str, paused: bool) -> None:
    """Stop or resume handing out a queue's messages, its suspects included, to every consumer.

    :raises UnknownQueue: no such queue.
    """
    for name in await _own_and_lane(admin, queue):
        await admin.pause(name, paused)


async def unknown(admin: Admin, queue: str) -> UnknownQueue:
    """The error of naming a queue that is not there, with the near one where the system lists its queues."""
    known = _bases({info.name: info for info in await admin.inspect()})
    return UnknownQueue(f"there is no queue {queue!r}{near(queue, known)}")


async def _own_and_lane(admin: Admin, queue: str) -> list[str]:
    names = [info.name for info in await admin.inspect([queue, suspect_queue(queue)])]
    if queue not in names:
        raise await unknown(admin, queue)
    return names


def _bases(infos: dict[str, QueueInfo]) -> set[str]:
    """The queues to list. A lane is listed as the queue it belongs to, unless it is consumed as a queue of its own."""
    bases = set()
    for name in infos:
        base = name.removesuffix(dead_letters.SUFFIX)
        if base == name:
            base = name.removesuffix(suspects.SUFFIX)
        bases.add(name if not base or dead_queue(name) in infos else base)
    return bases


def _status(name: str, infos: dict[str, QueueInfo], now: float) -> QueueStatus:
    own = infos.get(name)
    waiting = [infos[one] for one in (name, suspect_queue(name)) if one in infos]
    dead = infos.get(dead_queue(name))
    oldest = min((info.oldest for info in waiting if info.oldest is not None), default=None)
    return QueueStatus(
        name=name,
        ready=_sum([info.ready for info in waiting]),
        unsettled=_sum([info.unsettled for info in waiting]),
        consumers=own.consumers if own else 0,
        # Where nobody knows how many are in hand, those that wait are nearly all.
        dead=_sum([dead.ready, dead.unsettled or 0]) if dead else 0,
        oldest_s=None if oldest is None else round(max(now - oldest, 0.0), 3),
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total
