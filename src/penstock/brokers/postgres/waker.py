"""Telling those who wait that there is something new.

A notification in the transaction that publishes would hold a lock of the whole server until that is on the
disk, one publisher after another. So they are sent when it is, in a transaction that waits for no disk, and
what is told within a few milliseconds is told together. If this process dies in between, the next look of a
consumer that waits finds the message.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from penstock.brokers.postgres.sql import Statements
from penstock.errors import BrokerError
from penstock.postgres.pool import Pool

log = logging.getLogger("penstock.postgres")

PAUSE = 0.005  # seconds between notifications of a process
TRIES = 3


class Waker:
    """`ring(fresh, back)` wakes this process at once, by the ids of queues; the others hear of it."""

    def __init__(self, pool: Pool, statements: Statements, ring: Callable[[set[int], set[int]], None]) -> None:
        self._pool = pool
        self._statement = statements.tell
        self._ring = ring
        self._fresh: set[int] = set()
        self._back: set[int] = set()
        self._telling: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def open(self) -> None:
        """Tell again, after `close`."""
        self._closed = False

    def tell(self, fresh: Iterable[int], back: Iterable[int] = ()) -> None:
        """`back`: something may be before what was taken already."""
        new, old = set(fresh), set(back)
        if not new and not old:
            return
        self._ring(new, old)
        self._fresh |= new
        self._back |= old
        if self._telling is None and not self._closed:
            self._telling = asyncio.create_task(self._tell(), name="penstock-waker")

    async def close(self) -> None:
        """When all has been told. What is published from now on has to tell by itself."""
        self._closed = True
        if self._telling is not None:
            await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell(self) -> None:
        try:
            while self._fresh or self._back:
                fresh, self._fresh = list(self._fresh), set()
                back, self._back = list(self._back), set()
                for attempt in range(TRIES):
                    try:
                        await self._pool.run(lambda connection: connection.execute(self._statement, fresh, back))  # noqa: B023
                        break
                    except BrokerError as error:
                        log.debug("could not tell of new messages (%d): %s", attempt, error)
                        await asyncio.sleep(PAUSE)
                await asyncio.sleep(PAUSE)
        finally:
            self._telling = None
