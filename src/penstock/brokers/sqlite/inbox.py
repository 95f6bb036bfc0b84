"""Broadcasts on a SQLite file: rows that live for as long as it takes every live inbox to look."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

import msgspec

from penstock.brokers.base import INBOX_SIZE
from penstock.brokers.sqlite import operations, sql
from penstock.brokers.sqlite.file import SqliteFile, Transaction, soon
from penstock.errors import BrokerError
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell

log = logging.getLogger("penstock.sqlite")

LEASE = 30.0  # seconds; after that, a dead listener is no reason to write broadcasts any more
LOOK = 1.0  # seconds between looks, for a wake-up that got lost
KEPT = 60.0  # seconds; far more than a live inbox needs to look


def broadcast(tx: Transaction, namespace: str, message: Outgoing) -> None:
    """Nothing is written where nobody listens."""
    if tx.execute(sql.ANYBODY_LISTENING).fetchone() is None:
        return
    now = time.time()
    tx.execute(sql.DROP_BROADCASTS, (now - KEPT,))
    meta = operations.encode_meta(message)
    tx.execute(sql.ADD_BROADCAST, (namespace, message.topic, now, meta, message.body))
    tx.woken.add(sql.INBOXES)


def join(tx: Transaction, port: int) -> tuple[int, int]:
    """Become a listener; its id, and the last broadcast it has not heard."""
    consumer = int(tx.execute(sql.JOIN, (port, time.monotonic() + LEASE, LEASE)).lastrowid or 0)
    tx.execute(sql.CONSUME, (consumer, sql.INBOXES))
    return consumer, int(tx.execute(sql.LAST_BROADCAST).fetchone()[0])


def fetch(tx: Transaction, namespace: str, topics: Sequence[str], after: int) -> list[Delivery]:
    listed = msgspec.json.encode(topics).decode()
    rows = tx.execute(sql.BROADCASTS, (after, namespace, listed, INBOX_SIZE)).fetchall()
    return [operations.heard(seq, meta, body) for seq, meta, body in rows]


class SqliteInbox:
    """A listener row in the file, kept alive by the event loop that listens."""

    queue_ids = frozenset({sql.INBOXES})

    def __init__(self, file: SqliteFile, namespace: str) -> None:
        self._file = file
        self._namespace = namespace
        self._topics: tuple[str, ...] = ()
        self._heard = 0  # of the file's broadcasts, up to this one
        self._consumer: int | None = None
        self._bell: Bell | None = None
        self._beating: asyncio.Task[None] | None = None
        self._closed = False

    def ring(self) -> None:
        if self._bell is not None:
            self._bell.ring_from_thread()

    async def listen(self, topics: frozenset[str]) -> None:
        self._topics = tuple(topics)
        if self._consumer is None and not self._closed:
            await self._join()

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        while not self._closed:
            heard = await self._fetch()
            if heard:
                return heard
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, LOOK))
        return []

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._beating is not None:
            self._beating.cancel()
        self._file.listeners.discard(self)
        if self._bell is not None:
            self._bell.ring()
        if self._consumer is not None:
            try:
                await soon(self._file.submit(partial(operations.leave, consumer=self._consumer)))
            except BrokerError as error:
                log.warning("an inbox could not be closed, it will be forgotten: %s", error)

    async def _join(self) -> None:
        self._file.wake_up.listen()
        self._consumer, self._heard = await self._file.submit(partial(join, port=self._file.wake_up.port))
        self._file.listeners.add(self)
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(), name="penstock-inbox-heartbeat")

    async def _fetch(self) -> list[Delivery]:
        if not self._topics:
            return []
        look = partial(fetch, namespace=self._namespace, topics=self._topics, after=self._heard)
        found = await self._file.submit(look, look)  # looking needs no transaction
        if found:
            self._heard = found[-1].token
        return found

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            try:
                consumer = self._consumer or 0
                if not await self._file.submit(partial(operations.beat, consumer=consumer, lease=LEASE)):
                    await self._join()  # we stood still for too long: what was broadcast meanwhile is missed
            except BrokerError as error:
                log.warning("no heartbeat of an inbox: %s", error)
