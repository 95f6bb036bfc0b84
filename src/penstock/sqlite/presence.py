"""`Presence`: that somebody in this process listens, written down where every other process looks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from penstock.errors import BrokerError
from penstock.sqlite.file import SqliteFile, Transaction, soon

log = logging.getLogger("penstock.sqlite")

T = TypeVar("T")

LEASE = 30.0
"""Seconds after which one that is silent counts as dead; until then others send it wake-ups in vain."""

_JOIN = "INSERT INTO consumers (port, deadline, lease) VALUES (?, ?, ?)"
_CONSUME = "INSERT INTO consuming (consumer, queue) VALUES (?, ?)"
_BEAT = "UPDATE consumers SET deadline = ? WHERE id = ?"
_FORGET = "DELETE FROM consumers WHERE id = ?"
_STOP_CONSUMING = "DELETE FROM consuming WHERE consumer = ?"
# A deadline further ahead than the lease was written before the machine last started.
_OVERDUE = """
    SELECT id FROM consuming CROSS JOIN consumers ON id = consumer
    WHERE queue = ? AND ? NOT BETWEEN deadline - lease - 1 AND deadline"""


class Presence(Generic[T]):
    """A consumer row for a reserved id (`schema.WATCHES`, say), from joining until leaving.

    It is kept alive by the event loop that joined. One that stood still for too long was given up for
    dead, and joins again by itself: `joined` is called each time, in the event loop, with what `look`
    saw in the very transaction from which on nothing is missed.

    :param look: in the thread of the file.
    """

    def __init__(
        self,
        file: SqliteFile,
        queue_id: int,
        look: Callable[[Transaction], T],
        joined: Callable[[T], None],
        lease: float = LEASE,
    ) -> None:
        self._file = file
        self._queue_id = queue_id
        self._look = look
        self._tell_joined = joined
        self._lease = lease
        self._consumer: int | None = None
        self._joining: asyncio.Future[tuple[int, T]] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._left = False

    async def join(self) -> None:
        """When it returns, wake-ups of other processes reach this one. Idempotent, cancel-safe.

        :raises BrokerUnavailable: call again later.
        """
        if self._consumer is not None or self._left:
            return
        if self._joining is None:
            self._file.wake_up.listen()
            self._joining = self._file.submit(self._enter)
            self._joining.add_done_callback(self._entered)
        await asyncio.shield(self._joining)  # cancelled, it stays under way

    async def leave(self) -> None:
        """Idempotent, and for good. Never fails: who cannot leave is forgotten after its lease."""
        if self._left:
            return
        self._left = True
        if self._beating is not None:
            self._beating.cancel()
        try:
            consumer = self._consumer
            if self._joining is not None:
                consumer = (await soon(self._joining))[0]
            if consumer is not None:
                await soon(self._file.submit(lambda tx: _forget(tx, consumer)))
        except BrokerError as error:
            log.warning("a listener could not be closed, it will be forgotten: %s", error)

    def _entered(self, joining: asyncio.Future[tuple[int, T]]) -> None:
        self._joining = None
        if joining.cancelled() or joining.exception() is not None or self._left:
            return  # whoever waits for it hears of it
        self._consumer, seen = joining.result()
        self._beating = asyncio.create_task(self._beat(), name="penstock-presence")
        self._tell_joined(seen)

    async def _beat(self) -> None:
        complaint = ""
        while True:
            await asyncio.sleep(self._lease / 3)
            try:
                again = await self._file.submit(self._stay)
            except BrokerError as error:
                if str(error) != complaint:
                    log.warning("no heartbeat of a listener: %s", error)
                complaint = str(error)
                continue
            complaint = ""
            if again is not None:
                self._consumer, seen = again
                self._tell_joined(seen)

    # -- in the thread of the file

    def _enter(self, tx: Transaction) -> tuple[int, T]:
        _forget_overdue(tx, self._queue_id)
        row = (self._file.wake_up.port, time.monotonic() + self._lease, self._lease)
        consumer = int(tx.execute(_JOIN, row).lastrowid or 0)
        tx.execute(_CONSUME, (consumer, self._queue_id))
        return consumer, self._look(tx)

    def _stay(self, tx: Transaction) -> tuple[int, T] | None:
        """None while we count as alive; else a new life."""
        if tx.execute(_BEAT, (time.monotonic() + self._lease, self._consumer)).rowcount == 0:
            return self._enter(tx)
        _forget_overdue(tx, self._queue_id)
        return None


def _forget_overdue(tx: Transaction, queue_id: int) -> None:
    """Those who listen for the same, and only for that: they hold no messages that somebody must take over."""
    for (consumer,) in tx.execute(_OVERDUE, (queue_id, time.monotonic())).fetchall():
        _forget(tx, consumer)


def _forget(tx: Transaction, consumer: int) -> None:
    tx.execute(_FORGET, (consumer,))
    tx.execute(_STOP_CONSUMING, (consumer,))
