"""`Heart`: one heartbeat for all consumers and inboxes of a connection, and the look for those that have none."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from penstock.brokers.postgres.sql import Statements
from penstock.errors import BrokerError
from penstock.postgres.errors import NoConnection
from penstock.postgres.pool import Pool

if TYPE_CHECKING:
    from asyncpg import Connection, Record

log = logging.getLogger("penstock.postgres")

AFTER = 0.05  # seconds past a deadline, so that a look comes too early for nobody
LEAST = 0.1  # seconds between beats


class Living(Protocol):
    """A consumer or an inbox."""

    @property
    def life(self) -> int | None:
        """Its id in the database, None: not there."""
        ...

    @property
    def lease(self) -> float: ...

    def given_up(self, life: int) -> None:
        """It was silent for too long: that life is over."""
        ...


class Heart:
    """Beats from the event loop that consumes, for a loop that hangs must not count as alive. It has a connection of
    its own: all others may be waiting for what somebody has locked."""

    def __init__(self, pool: Pool, statements: Statements) -> None:
        self.consumers: set[Living] = set()
        self.inboxes: set[Living] = set()
        self._pool = Pool(pool.address._replace(connections=1))
        self._others = pool
        self._statement = statements.beat
        self._beating: asyncio.Task[None] | None = None
        self._sooner = asyncio.Event()
        self._overdue: float | None = None  # the time of the loop at which somebody else will be

    def open(self) -> None:
        """Keep the connection, again after `close`."""
        self._pool.open()

    def start(self) -> None:
        """Idempotent; to be called whenever somebody has come to life. Looks for the dead soon."""
        self._overdue = 0.0
        self._sooner.set()
        if self._beating is None or self._beating.done():
            self._beating = asyncio.create_task(self._beat(), name="penstock-heartbeat")

    async def close(self) -> None:
        beating, self._beating = self._beating, None
        try:
            if beating is not None:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
        finally:
            await self._pool.close()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        complaint = ""
        while self.consumers or self.inboxes:
            self._sooner.clear()
            due = last + min(one.lease for one in (*self.consumers, *self.inboxes)) / 3
            at = due if self._overdue is None else min(due, self._overdue + AFTER)
            try:
                async with asyncio.timeout(max(at - loop.time(), LEAST)):
                    await self._sooner.wait()
                    continue
            except TimeoutError:
                pass
            last = loop.time()
            try:
                upcoming = await self._one_beat()
                self._overdue = None if upcoming is None else loop.time() + max(upcoming, 0.0)
                complaint = ""
            except BrokerError as error:
                self._overdue = None
                if str(error) != complaint:
                    log.warning("no heartbeat: %s", error)
                complaint = str(error)

    async def _one_beat(self) -> float | None:
        """Seconds until somebody else will be overdue; None: nobody."""
        consumers = {one.life: one for one in self.consumers if one.life is not None}
        inboxes = {one.life: one for one in self.inboxes if one.life is not None}

        async def beat(connection: Connection) -> Record | None:
            return await connection.fetchrow(self._statement, list(consumers), list(inboxes))

        try:
            row = await self._pool.run(beat)
        except NoConnection:
            row = await self._others.run(beat)
        assert row is not None
        for lives, alive in ((consumers, set(row["alive"])), (inboxes, set(row["living"]))):
            for life, one in lives.items():
                if life not in alive:
                    one.given_up(life)
        upcoming = row["upcoming"]
        return None if upcoming is None else float(upcoming)
