"""What an operator may do with the queues of a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.brokers.base import QueueInfo, to_unbind
from penstock.brokers.meta import decode_meta
from penstock.brokers.postgres.encoding import deliveries
from penstock.errors import BrokerError
from penstock.message import Delivery

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from penstock.brokers.postgres.broker import PostgresBroker


class PostgresAdmin:
    """See `Admin`."""

    def __init__(self, broker: PostgresBroker) -> None:
        self._broker = broker
        self._pool = broker.pool
        self._sql = broker.statements

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        wanted = None if names is None else list(names)

        async def look(connection: Connection) -> list[Record]:
            await connection.execute(self._sql.sweep_all)
            return await connection.fetch(self._sql.inspect, wanted)

        return [
            QueueInfo(
                name=row["name"],
                ready=row["waiting"],
                unsettled=row["held"],
                consumers=row["consumers"],
                oldest=decode_meta(row["oldest"]).enqueued_at if row["oldest"] else None,
                paused=row["paused"],
                expired=row["expired"],
                discarded=row["discarded"],
                bindings=tuple(row["topics"]),
            )
            for row in await self._pool.run(look)
        ]

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        async def look(connection: Connection) -> tuple[int, list[Record]]:
            id = await self._find(connection, queue)
            return id, await connection.fetch(self._sql.browse, id, after or 0, limit + 1)

        id, rows = await self._pool.run(look)
        page = deliveries(rows[:limit], {id: queue})
        return page, rows[limit - 1]["place"] if len(rows) > limit else None

    async def purge(self, queue: str) -> int:
        async def remove(connection: Connection) -> int:
            return int(await connection.fetchval(self._sql.purge, await self._find(connection, queue)))

        return await self._pool.run(remove)

    async def pause(self, queue: str, paused: bool) -> None:
        async def change(connection: Connection) -> None:
            await connection.execute(self._sql.pause, await self._find(connection, queue), paused)

        await self._pool.run(change)

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = to_unbind(queue, topics)

        async def remove(connection: Connection) -> None:
            await connection.execute(self._sql.unbind, await self._find(connection, queue), unbound)

        await self._pool.run(remove)
        self._broker.forget_topics(queue, unbound)

    async def _find(self, connection: Connection, name: str) -> int:
        found = await connection.fetchval(self._sql.find_queue, name)
        if found is None:
            raise BrokerError(f"there is no queue {name!r}")
        return int(found)
