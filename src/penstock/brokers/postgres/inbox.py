"""Broadcasts and replies: rows for each inbox that is to hear them, taken away by its own process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from penstock.brokers.base import INBOX_SIZE, OnRefused
from penstock.brokers.meta import to_delivery
from penstock.clock import backoff_delay
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery, Outgoing
from penstock.postgres.errors import NotBegun
from penstock.waiting import Bell

if TYPE_CHECKING:
    from asyncpg import Connection, Record

    from penstock.brokers.postgres.broker import PostgresBroker

log = logging.getLogger("penstock.postgres")

LEASE = 30.0  # seconds; an inbox that has been silent for so long hears nothing more
BACKOFF = (0.1, 3.0)  # seconds between tries to look into it, first and longest
_FIRST = 1 << 61
_PREFIX = "inbox-"


def address_of(inbox: int) -> str:
    return f"{_PREFIX}{inbox:x}"


def inbox_of(address: str) -> int | None:
    """Whose address it is; None: nobody's."""
    try:
        inbox = int(address.removeprefix(_PREFIX), 16) if address.startswith(_PREFIX) else 0
    except ValueError:
        return None
    return inbox if _FIRST <= inbox < 2 * _FIRST else None


class PostgresInbox:
    """See `Inbox`. It has a row from the first `listen` or `request` on, and a channel of its own."""

    lease = LEASE

    def __init__(self, broker: PostgresBroker) -> None:
        self._id = _FIRST + random.SystemRandom().getrandbits(60)
        self.address = address_of(self._id)
        """Where replies go."""
        self.living = _Row(self)
        self._lives = 0
        self._broker = broker
        self._topics: frozenset[str] = frozenset()
        self._there = False
        self._asked = False
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._again = False
        self._joining = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        self._closed = False
        self._ended = asyncio.Event()

    @property
    def row(self) -> int | None:
        return self._id if self._there else None

    @property
    def life(self) -> int:
        return self._lives

    async def listen(self, topics: frozenset[str]) -> None:
        if not self._closed:
            await self._enter(topics)

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")
        if not self._there:
            await self._enter(self._topics)
        self._asked = True
        asking = msgspec.structs.replace(message, reply_to=self.address)
        refusal: BrokerError | None
        try:
            refusal = await self._broker.outbox.do(asking)
        except NotBegun:
            raise
        except BrokerUnavailable as error:  # it may have been sent
            refusal = error
        if refusal is not None and not self._closed:
            refused(refusal)

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        until = asyncio.get_running_loop().time() + wait
        life = self._lives
        while not (self._arrived or self._closed or self._lives != life):
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or not await self._bell.wait(left):
                break
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._closed = True
        self._ended.set()
        self._lives += 1
        self._broker.heart.inboxes.discard(self.living)
        self._ring()
        if self._fetching is not None:
            await asyncio.gather(self._fetching, return_exceptions=True)
        await self._broker.listener.forget(self._channel)
        try:
            if self._there:
                await self._broker.pool.run(
                    lambda connection: connection.execute(self._broker.statements.close_inbox, self._id)
                )
        except BrokerError as error:
            log.warning("a listener could not be closed, it will be forgotten: %s", error)
        self._broker.forget_inbox(self)

    def look(self) -> None:
        """Something may have come."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(), name="penstock-inbox")
        else:
            self._again = True

    def given_up(self, life: int) -> None:
        """We were silent for too long, or the server crashed: what was said meanwhile was said to nobody."""
        if self._closed or not self._there:
            return
        self._there = False
        if self._asked:
            self._lives += 1
            self._ring()
        self.look()

    @property
    def _channel(self) -> str:
        return f"penstock:{self.address}"

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    async def _enter(self, topics: frozenset[str]) -> None:
        """Have a row with these topics, and hear of what comes."""
        async with self._joining:
            await self._broker.listener.listen(self._channel, lambda _: self.look())

            async def listen(connection: Connection) -> None:
                await connection.execute(self._broker.statements.listen, self._id, list(topics), LEASE)

            await self._broker.pool.run(listen)
            self._topics = topics
            if self._closed:
                return
            if not self._there:
                self._there = True
                self._broker.heart.inboxes.add(self.living)
                self._broker.heart.start()

    async def _fetch(self) -> None:
        """Take what has come, until there is no more."""
        failures = 0
        try:
            while True:
                self._again = False
                try:
                    await self._fetch_once()
                    failures = 0
                except BrokerUnavailable as error:
                    failures += 1
                    self._again = True
                    log.debug("an inbox could not be looked into (%d): %s", failures, error)
                    await self._pause(backoff_delay(failures, BACKOFF, random.Random()))  # noqa: S311 - jitter
                if not self._again or self._closed:
                    return
        except BrokerError as error:
            log.warning("an inbox could not be looked into: %s", error)
        finally:
            self._fetching = None

    async def _fetch_once(self) -> None:
        if not self._there and not self._closed:
            await self._enter(self._topics)

        async def fetch(connection: Connection) -> list[Record]:
            return await connection.fetch(self._broker.statements.fetch_mail, [self._id])

        rows = await self._broker.pool.run(fetch)
        rows.sort(key=lambda row: row["seq"])
        self._arrived += [to_delivery("", row["meta"], row["body"], 0, row["seq"]) for row in rows]
        if rows:
            self._ring()

    async def _pause(self, seconds: float) -> None:
        """Cut short by `close`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()


class _Row:
    """An inbox, as the heart knows it."""

    lease = LEASE

    def __init__(self, inbox: PostgresInbox) -> None:
        self._inbox = inbox

    @property
    def life(self) -> int | None:
        return self._inbox.row

    def given_up(self, life: int) -> None:
        self._inbox.given_up(life)
