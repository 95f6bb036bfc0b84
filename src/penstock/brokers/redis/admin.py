"""What an operator may do with the queues of one namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.brokers.base import QueueInfo, to_unbind
from penstock.brokers.meta import decode_meta
from penstock.brokers.redis import lua_admin, wire
from penstock.errors import BrokerError
from penstock.message import Delivery

if TYPE_CHECKING:
    from penstock.brokers.redis.broker import RedisBroker

PURGE_AT_ONCE = 2000  # messages that one script removes, so that others are served in between


class RedisAdmin:
    """Looks and changes by one script each."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        if names is None:
            known = await self._broker.link.call("SMEMBERS", f"{self._broker.prefix}queues")
            names = [name.decode() for name in known]
        told = await self._broker.run(lua_admin.INSPECT, *sorted(set(names))) if names else []
        assert isinstance(told, list)
        return [
            QueueInfo(
                name=name.decode(),
                ready=ready,
                unsettled=held,
                consumers=consumers,
                oldest=decode_meta(oldest).enqueued_at if oldest else None,
                paused=bool(paused),
                expired=expired,
                discarded=discarded,
                bindings=tuple(sorted(topic.decode() for topic in topics)),
            )
            for name, ready, held, consumers, oldest, paused, expired, discarded, topics in told
        ]

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        rank, place = after or ("", "")
        found = await self._broker.run(lua_admin.BROWSE, queue, limit + 1, rank, place)
        if found is None:
            raise self._unknown(queue)
        assert isinstance(found, list)
        page = []
        for _, id, fields in found[:limit]:
            page += wire.browsed(queue, fields, id)
        if len(found) <= limit:
            return page, None
        last_rank, last, _ = found[limit - 1]
        return page, (last_rank, last)

    async def purge(self, queue: str) -> int:
        count = 0
        while True:
            purged = await self._broker.run(lua_admin.PURGE, queue, PURGE_AT_ONCE)
            if purged is None:
                raise self._unknown(queue)
            assert isinstance(purged, int)
            count += purged
            if purged < PURGE_AT_ONCE:
                return count

    async def pause(self, queue: str, paused: bool) -> None:
        if await self._broker.run(lua_admin.PAUSE, queue, int(paused)) is None:
            raise self._unknown(queue)

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = to_unbind(queue, topics)
        if await self._broker.run(lua_admin.UNBIND, queue, *unbound) is None:
            raise self._unknown(queue)
        self._broker.forget_topics(queue, unbound)

    def _unknown(self, queue: str) -> BrokerError:
        return BrokerError(f"there is no queue {queue!r}")
