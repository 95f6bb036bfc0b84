"""The contract on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.errors import BrokerError
from penstock.postgres.address import parse_address, quoted
from penstock.postgres.listener import Listener
from penstock.postgres.pool import Pool
from penstock.postgres.together import Together
from penstock.stores.base import Change, Delete, Entry, Put, StoreCapabilities
from penstock.stores.keys import check_keys, end_of
from penstock.stores.postgres.watch import PostgresWatch
from penstock.waiting import together

if TYPE_CHECKING:
    from asyncpg import Connection, Record

SWEEP_EVERY = 10.0  # seconds between looks for what has expired, while entries are changed
AT_ONCE = 500  # keys or changes of several calls that go together; a large value counts for many
LONGEST_KEY = 2600  # bytes that fit in an index
_WEIGHED = 16 * 1024  # bytes of a value that count for one
_KINDS = {Put: 0, Delete: 1}
_TOUCH = 2


class PostgresStore:
    """`postgresql://user:password@host:5432/database`, with the options of the broker; in the same schema.

    Times to live are measured by the server's clock.
    """

    capabilities = StoreCapabilities(durable=True, shared=True)

    def __init__(self, url: str) -> None:
        self.address = parse_address(url)
        own = quoted(self.address.schema)
        self._entries = f"{own}.entries"
        self._now = f"{own}.unix_now()"
        self._change = f"SELECT {own}.change($1, $2, $3, $4, $5, $6)"
        self._sweep = f"SELECT {own}.sweep_entries()"
        self._get = f"""
            SELECT key, value, version, expires FROM {self._entries}
            WHERE key = ANY ($1) AND expires > {self._now}"""
        self._scan = f"""
            SELECT s.ord, e.key, e.value, e.version, e.expires
            FROM unnest($1::text[], $2::text[], $3::int[]) WITH ORDINALITY s (low, high, most, ord)
            CROSS JOIN LATERAL (
                SELECT * FROM {self._entries} WHERE key >= s.low AND key < s.high AND expires > {self._now}
                ORDER BY key LIMIT s.most) e
            ORDER BY s.ord, e.key"""
        self._pool = Pool(self.address)
        self._listener = Listener(self.address, self._back)
        # One of each at a time: more go together, and what was called later is done later.
        self._looks = Together(self._look_up, lambda key: 1, lanes=1, most=AT_ONCE)
        self._scans = Together(self._scan_all, lambda asked: asked[2], lanes=1, most=50 * AT_ONCE)
        self._changes = Together(self._carry_out, _weight, lanes=1, most=AT_ONCE)
        self._watches: set[PostgresWatch] = set()
        self._swept = time.monotonic()
        self._sweeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._pool.open()
        if self._listener.closed:
            self._listener = Listener(self.address, self._back)
        await self._pool.run(lambda connection: connection.execute("SELECT 1"))

    async def close(self) -> None:
        await asyncio.gather(*(watch.close() for watch in tuple(self._watches)))
        try:
            if self._sweeping is not None:
                self._sweeping.cancel()
                await asyncio.gather(self._sweeping, return_exceptions=True)
        finally:
            await together(self._listener.close, self._pool.close)

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        check_keys(keys)
        if not keys:
            return []
        return await self._looks.do(list(keys))

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        check_keys([change.key for change in changes])
        if not changes:
            return []
        for change in changes:  # it would be refused with all that went together with it
            if len(change.key) > LONGEST_KEY // 4 and len(change.key.encode()) > LONGEST_KEY:
                raise BrokerError(f"a key of PostgreSQL's store has {LONGEST_KEY} bytes at most: {change.key[:40]!r}…")
        outcomes = await self._changes.do(list(changes))
        if self._sweeping is None and time.monotonic() - self._swept > SWEEP_EVERY:
            self._sweeping = asyncio.create_task(self._sweep_expired(), name="penstock-sweeper")
        return outcomes

    async def scan(
        self, prefix: str, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> list[Entry]:
        check_keys([prefix] if after is None else [prefix, after])
        high = end_of(prefix)
        if high is not None and after is None and not newest_first:
            return (await self._scans.do([(prefix, high, limit)]))[0]
        conditions, values = ["key >= $1"], [prefix]
        if high is not None:
            values.append(high)
            conditions.append(f"key < ${len(values)}")
        if after is not None:
            values.append(after)
            conditions.append(f"key {'<' if newest_first else '>'} ${len(values)}")
        statement = f"""
            SELECT key, value, version, expires FROM {self._entries}
            WHERE {" AND ".join(conditions)} AND expires > {self._now}
            ORDER BY key {"DESC" if newest_first else "ASC"} LIMIT ${len(values) + 1}"""

        async def look(connection: Connection) -> list[Record]:
            return await connection.fetch(statement, *values, limit)

        return [_entry(row) for row in await self._pool.run(look)]

    def watch(self) -> PostgresWatch:
        watch = PostgresWatch(self._listener, self.address.schema, self._hear, self._watches)
        self._watches.add(watch)
        return watch

    def _hear(self, payload: str) -> None:
        for watch in self._watches:
            watch.hear(payload)

    def _back(self) -> None:
        for watch in self._watches:
            watch.hear("")

    async def _look_up(self, keys: list[str]) -> list[Entry | None]:
        wanted = list(dict.fromkeys(keys))

        async def look(connection: Connection) -> list[Record]:
            return await connection.fetch(self._get, wanted)

        found = {row["key"]: _entry(row) for row in await self._pool.run(look)}
        return [found.get(key) for key in keys]

    async def _scan_all(self, ranges: list[tuple[str, str, int]]) -> list[list[Entry]]:
        lows, highs, limits = (list(column) for column in zip(*ranges, strict=True))

        async def look(connection: Connection) -> list[Record]:
            return await connection.fetch(self._scan, lows, highs, limits)

        found: list[list[Entry]] = [[] for _ in ranges]
        for row in await self._pool.run(look):
            found[row["ord"] - 1].append(_entry(row))
        return found

    async def _carry_out(self, changes: list[Change]) -> list[int | None]:
        given = (
            [_KINDS.get(type(change), _TOUCH) for change in changes],
            [change.key for change in changes],
            [change.value if isinstance(change, Put) else None for change in changes],
            [None if isinstance(change, Delete) else change.ttl for change in changes],
            [change.expect if isinstance(change, Put | Delete) else None for change in changes],
            [change.tell if isinstance(change, Put | Delete) else False for change in changes],
        )

        async def change(connection: Connection) -> list[int | None]:
            outcomes: list[int | None] = await connection.fetchval(self._change, *given)
            return outcomes

        return await self._pool.run(change)

    async def _sweep_expired(self) -> None:
        try:
            with contextlib.suppress(BrokerError):
                while await self._pool.run(lambda connection: connection.fetchval(self._sweep)) == 1000:
                    pass
        finally:
            self._swept = time.monotonic()
            self._sweeping = None


def _weight(change: Change) -> int:
    return 1 + len(change.value) // _WEIGHED if isinstance(change, Put) else 1


def _entry(row: Record) -> Entry:
    expires = row["expires"]
    return Entry(row["key"], row["value"], row["version"], None if expires == float("inf") else expires)
