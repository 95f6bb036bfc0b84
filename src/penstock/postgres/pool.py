"""`Pool`: a few connections to one database, for work that is done whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from penstock.errors import BrokerError, BrokerUnavailable
from penstock.postgres.address import Address
from penstock.postgres.errors import AGAIN, NOT_THERE, STANDBY, sqlstate, translate
from penstock.postgres.schema import prepare

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger("penstock.postgres")

T = TypeVar("T")

WITHIN = 30.0  # seconds for a statement; a server that is frozen or behind a cut line never answers
TRIES = 5  # of what the server ends because it crossed something else
IDLE = 60.0  # seconds that a connection is kept which nobody needs

# What a database or a role may have set otherwise, and what the functions do not expect.
_SETTINGS = """
    SET statement_timeout TO 0; SET lock_timeout TO 0; SET idle_in_transaction_session_timeout TO 0;
    SET default_transaction_isolation TO 'read committed'; SET default_transaction_read_only TO off;
    SET client_min_messages TO warning"""


async def connect(address: Address) -> Connection:
    """A connection of our own.

    :raises BrokerUnavailable: not now.
    :raises BrokerRefused: never.
    """
    try:
        connection = await asyncpg.connect(address.dsn, timeout=address.timeout, max_cacheable_statement_size=0)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError) as error:
        raise translate(error, address.shown) from None
    try:
        await connection.execute(_SETTINGS, timeout=address.timeout)
        standby = await connection.fetchval("SELECT pg_is_in_recovery()", timeout=address.timeout)
    except Exception as error:
        connection.terminate()
        raise translate(error, address.shown) from None
    if standby:
        connection.terminate()
        raise BrokerUnavailable(f"{address.shown}: {STANDBY}")
    return connection


def unheard(task: asyncio.Task[Any]) -> None:
    """How a task ended is for whoever waits for it; if nobody does, nobody wants to know."""
    if not task.cancelled():
        task.exception()


class Pool:
    """At most `address.connections`, each made when it is needed. For one event loop."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[tuple[float, Connection]] = []
        self._free: asyncio.Semaphore | None = None
        self._working: set[asyncio.Task[object]] = set()
        self._preparing = asyncio.Lock()
        self._prepared = False
        self._keeping = True

    def open(self) -> None:
        """Keep connections for later."""
        self._keeping = True

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Have something done on a connection. Cancelled, it is done all the same.

        `work` is done again if the server says that it crossed other work; so it may change nothing of ours.

        :raises BrokerUnavailable: what was done is not known.
        :raises BrokerRefused: it never will be.
        """
        task = asyncio.create_task(self._run(work))
        self._working.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """When all that is under way is done. Idempotent. Until it is opened again, who comes later still gets a
        connection, for that once."""
        self._keeping = False
        while self._working:
            await asyncio.wait(self._working, timeout=WITHIN)
        idle, self._idle = self._idle, []
        for _, connection in idle:
            with contextlib.suppress(Exception):
                await connection.close(timeout=2)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._working.discard(task)
        unheard(task)

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        if self._free is None:
            self._free = asyncio.Semaphore(self.address.connections)
        async with self._free:
            tried = 1
            while True:
                connection = await self._take()
                try:
                    async with asyncio.timeout(WITHIN):
                        outcome = await work(connection)
                except BrokerError:
                    await self._give(connection)
                    raise
                except BaseException as error:
                    if isinstance(error, asyncpg.PostgresError):
                        await self._give(connection)
                    else:
                        connection.terminate()
                    if not isinstance(error, Exception):
                        raise
                    code = sqlstate(error)
                    if code in NOT_THERE:
                        self._prepared = False
                        if tried < TRIES:  # somebody dropped it: make it anew
                            tried = TRIES
                            continue
                    if code in AGAIN and tried < TRIES:
                        tried += 1
                        continue
                    raise translate(error, self.address.shown) from None
                await self._give(connection)
                return outcome

    async def _take(self) -> Connection:
        connection: Connection | None = None
        while self._idle and connection is None:
            _, found = self._idle.pop()
            connection = None if found.is_closed() else found
        if connection is None:
            connection = await connect(self.address)
        if not self._prepared:
            try:
                await self._prepare(connection)
            except BaseException:
                connection.terminate()
                raise
        return connection

    async def _give(self, connection: Connection) -> None:
        if connection.is_closed():
            return
        if not self._keeping:
            with contextlib.suppress(Exception):
                await connection.close(timeout=2)
            return
        now = time.monotonic()
        self._idle.append((now, connection))
        if self._idle[0][0] < now - IDLE and len(self._idle) > 1:
            _, old = self._idle.pop(0)
            with contextlib.suppress(Exception):
                await old.close(timeout=2)

    async def _prepare(self, connection: Connection) -> None:
        async with self._preparing:
            if self._prepared:
                return
            try:
                async with asyncio.timeout(WITHIN):
                    await prepare(connection, self.address.schema)
            except BrokerError:
                raise
            except TimeoutError:
                raise BrokerUnavailable(f"{self.address.shown}: the schema could not be looked at in time") from None
            except Exception as error:
                raise translate(error, self.address.shown) from None
            self._prepared = True
