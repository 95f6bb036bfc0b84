"""`Pool`: a few connections to one database, for work that is done whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, one_line
from penstock.postgres.address import Address
from penstock.postgres.errors import AGAIN, NOT_THERE, STANDBY, NoConnection, NotBegun, sqlstate, translate
from penstock.postgres.schema import prepare
from penstock.waiting import Bell

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger("penstock.postgres")

T = TypeVar("T")

WITHIN = 30.0  # seconds for a statement; a server that is frozen or behind a cut line never answers
ENDED = 5 / 6  # of that time, after which the server itself ends it: what was given up must not be done later
TRIES = 5  # of what the server ends because it crossed something else
CLOSE_TIMEOUT = 2.0  # seconds
IDLE = 60.0  # seconds that a connection is kept which nobody needs

# What a database or a role may have set otherwise, and what the functions do not expect.
_SETTINGS = """
    SET statement_timeout TO {milliseconds}; SET lock_timeout TO 0; SET idle_in_transaction_session_timeout TO 0;
    SET default_transaction_isolation TO 'read committed'; SET default_transaction_read_only TO off;
    SET client_min_messages TO warning"""


async def connect(address: Address) -> Connection:
    """A connection of our own.

    :raises BrokerUnavailable: not now.
    :raises BrokerRefused: never.
    """
    try:
        connection = await asyncpg.connect(address.dsn, timeout=address.timeout, max_cacheable_statement_size=0)
    except (asyncpg.ClientConfigurationError, UnicodeError) as error:
        raise BrokerRefused(f"{address.shown}: {one_line(error)}") from None
    except FileNotFoundError as error:  # of a socket, or for TLS
        raise _missing(address) or translate(error, address.shown) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError) as error:
        raise translate(error, address.shown) from None
    try:
        await connection.execute(_SETTINGS.format(milliseconds=int(WITHIN * ENDED * 1000)), timeout=address.timeout)
        standby = await connection.fetchval("SELECT pg_is_in_recovery()", timeout=address.timeout)
    except BaseException as error:
        connection.terminate()
        if not isinstance(error, Exception):
            raise
        raise translate(error, address.shown) from None
    if standby:
        connection.terminate()
        raise BrokerUnavailable(f"{address.shown}: {STANDBY}")
    return connection


def _missing(address: Address) -> BrokerRefused | None:
    names = [name for name in address.files if not os.path.exists(name)]
    return BrokerRefused(f"{address.shown}: there is no file {', '.join(names)}") if names else None


async def end(connection: Connection) -> None:
    """Close a connection; cancelled, or without an answer, it is cut."""
    with contextlib.suppress(Exception):
        await connection.close(timeout=CLOSE_TIMEOUT)


def unheard(task: asyncio.Task[Any]) -> None:
    """How a task ended is for whoever waits for it; if nobody does, nobody wants to know."""
    if not task.cancelled():
        task.exception()


class Pool:
    """At most `address.connections`, each made when it is needed. For one event loop."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[tuple[float, Connection]] = []
        self._turns: deque[asyncio.Future[None]] = deque()  # of those who wait for others to be done
        self._begun = 0
        self._taken = 0  # connections that somebody works on, or makes
        self._given: Bell | None = None
        self._working: set[asyncio.Task[object]] = set()
        self._preparing = asyncio.Lock()
        self._prepared = False
        self._keeping = True

    def open(self) -> None:
        """Keep connections for later."""
        self._keeping = True

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Have something done on a connection. Cancelled, it is done all the same once it has begun.

        `work` is done again if the server says that it crossed other work; so it may change nothing of ours.

        :raises NotBegun: nothing was done.
        :raises BrokerUnavailable: what was done is not known.
        :raises BrokerRefused: it never will be.
        """
        await self._turn()
        task = asyncio.create_task(self._run(work))
        self._working.add(task)
        task.add_done_callback(self._done)
        ours = asyncio.current_task()
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not (ours and ours.cancelling()):
                raise BrokerUnavailable(f"{self.address.shown}: closed before it was done") from None
            raise

    async def close(self) -> None:
        """When all that is under way is done, unless this is cancelled. Idempotent. Until it is opened again, who
        comes later still gets a connection, for that once."""
        self._keeping = False
        try:
            await self.idle()
        except asyncio.CancelledError:
            for task in self._working:
                task.cancel()
            raise
        finally:
            idle, self._idle = self._idle, []
            await asyncio.gather(*(end(connection) for _, connection in idle))

    async def idle(self) -> None:
        """When nothing is under way. What has not begun yet is refused."""
        for turn in self._turns:
            if not turn.done():
                turn.set_exception(NotBegun(f"{self.address.shown}: closed before its turn came"))
        self._turns.clear()
        while self._working:
            await asyncio.wait(self._working, timeout=WITHIN)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._working.discard(task)
        self._next()
        unheard(task)

    async def _turn(self) -> None:
        """Wait until fewer work than there may be connections."""
        if self._begun < self.address.connections:
            self._begun += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # it came at the very moment
                self._next()
            raise

    def _next(self) -> None:
        """Whoever has waited longest goes on in our place."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._begun -= 1

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        tried = 1
        while True:
            try:
                connection = await self._take()
            except NotBegun:
                raise
            except BrokerUnavailable as error:
                raise NotBegun(str(error)) from None
            try:
                return await self._do(work, connection)
            except BrokerError:
                raise
            except Exception as error:
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

    async def _do(self, work: Callable[[Connection], Awaitable[T]], connection: Connection) -> T:
        try:
            async with asyncio.timeout(WITHIN):
                outcome = await work(connection)
        except (BrokerError, asyncpg.PostgresError):
            await self._give(connection)
            raise
        except BaseException:
            connection.terminate()
            raise
        else:
            await self._give(connection)
            return outcome
        finally:
            self._return()

    async def _take(self) -> Connection:
        """One of ours, or a new one; at the server's limit that which comes back first.

        :raises NoConnection: at the limit, and none of ours is in use.
        """
        self._given = self._given or Bell()
        while True:
            while self._idle:
                _, connection = self._idle.pop()
                if not connection.is_closed():
                    break
            else:
                connection = None
            self._taken += 1
            try:
                if connection is None:
                    connection = await connect(self.address)
                if not self._prepared:
                    await self._prepare(connection)
                return connection
            except BaseException as error:
                if connection is not None:
                    connection.terminate()
                self._return()
                if not isinstance(error, NoConnection) or not (self._taken or self._idle):
                    raise
            if not self._idle:
                await self._given.wait()

    def _return(self) -> None:
        """A connection is in nobody's hands any more."""
        self._taken -= 1
        if self._given is not None:
            self._given.ring()

    async def _give(self, connection: Connection) -> None:
        if connection.is_closed():
            return
        if not self._keeping:
            await end(connection)
            return
        now = time.monotonic()
        self._idle.append((now, connection))
        if self._idle[0][0] < now - IDLE and len(self._idle) > 1:
            _, old = self._idle.pop(0)
            await end(old)

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
