"""Broadcasts and replies on a SQLite file: rows that live for as long as it takes every live inbox to look."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from penstock.brokers.base import INBOX_SIZE, OnRefused
from penstock.brokers.sqlite import operations, sql
from penstock.errors import BrokerUnavailable, PublishError, StorageFull
from penstock.message import Delivery, Outgoing
from penstock.sqlite.file import DiskFull, SqliteFile, Transaction
from penstock.sqlite.presence import Presence
from penstock.waiting import Bell

LOOK = 1.0  # seconds between looks, for a wake-up that got lost
KEPT = 60.0  # seconds; far more than a live inbox needs to look


def broadcast(tx: Transaction, namespace: str, message: Outgoing) -> None:
    """Nothing is written where nobody listens."""
    if _is_awaited(tx, sql.INBOXES):
        _write(tx, namespace, [message])
        tx.woken.add(sql.INBOXES)


def reply(tx: Transaction, namespace: str, messages: Sequence[Outgoing]) -> bool:
    """A reply is a broadcast to the address of an inbox, which wakes nobody else."""
    awaited = [message for message in messages if _is_awaited(tx, _wake_id(message.topic))]
    _write(tx, namespace, awaited)
    tx.woken.update(_wake_id(message.topic) for message in awaited)
    return True


def any_awaited(tx: Transaction, messages: Sequence[Outgoing]) -> bool:
    return any(_is_awaited(tx, _wake_id(message.topic)) for message in messages)


def _is_awaited(tx: Transaction, wake_id: int) -> bool:
    return tx.execute(sql.ANYBODY_LISTENING, (wake_id,)).fetchone() is not None


def _write(tx: Transaction, namespace: str, messages: Sequence[Outgoing]) -> None:
    now = time.time()
    kept = (now - KEPT, now + KEPT)  # a clock may have been set back
    oldest = tx.execute(sql.OLDEST_BROADCAST, kept).fetchone()
    if oldest is not None and oldest[0]:
        tx.execute(sql.DROP_BROADCASTS, kept)
    for message in messages:
        meta = operations.encode_meta(message)
        tx.execute(sql.ADD_BROADCAST, (namespace, message.topic, now, meta, message.body))


def _address(wake_id: int) -> str:
    return f"inbox-{wake_id:x}"


def _wake_id(address: str) -> int:
    """What an inbox's address wakes; of anything else one that nobody awaits."""
    try:
        wake_id = int(address.removeprefix("inbox-"), 16)
    except ValueError:
        return sql.NOBODY
    return wake_id if sql.FIRST_ADDRESS <= wake_id < 2 * sql.FIRST_ADDRESS else sql.NOBODY


class Seen(NamedTuple):
    """What a look at the broadcasts has shown."""

    deliveries: list[Delivery]
    last: int
    """Everything up to this one has been looked at."""


def last_broadcast(tx: Transaction) -> int:
    return int(tx.execute(sql.LAST_BROADCAST).fetchone()[0])


def look(tx: Transaction, namespace: str, topics: str, after: int) -> Seen:
    last = last_broadcast(tx)  # first: one that is written between the two is seen then, or the next time
    rows = tx.execute(sql.BROADCASTS, (after, namespace, topics, INBOX_SIZE)).fetchall()
    if rows and (len(rows) == INBOX_SIZE or rows[-1][0] > last):
        last = rows[-1][0]
    return Seen([operations.heard(*row) for row in rows], last)


def request(tx: Transaction, namespace: str, message: Outgoing, heard: Sequence[int]) -> list[PublishError | None]:
    """Publish it, and drop the replies that have been heard."""
    if heard:
        tx.execute(sql.DROP_HEARD, (msgspec.json.encode(heard).decode(),))
    return operations.publish(tx, namespace, [message])


class SqliteInbox:
    """A listener with a presence in the file for broadcasts, and another one for replies."""

    def __init__(self, file: SqliteFile, namespace: str, forget: Callable[[SqliteInbox], None]) -> None:
        wake_id = sql.FIRST_ADDRESS + random.SystemRandom().getrandbits(60)
        self.address = _address(wake_id)
        """Where replies go."""
        self.queue_ids = frozenset({wake_id})
        self.life = 0
        self._file = file
        self._namespace = namespace
        self._forget = forget
        self._topics: frozenset[str] = frozenset()
        self._replies = Presence(file, wake_id, last_broadcast, self._joined_for_replies)
        self._broadcasts: Presence[int] | None = None
        self._awaits_replies = False
        self._seen: int | None = None
        """Of the file's broadcasts all up to this one; None: it has listened to none yet."""
        self._looking = asyncio.Lock()
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._heard: list[int] = []  # replies, to be dropped from the file
        self._bell: Bell | None = None
        self._closed = False

    def ring(self) -> None:
        if self._bell is not None:
            self._bell.ring_from_thread()

    async def listen(self, topics: frozenset[str]) -> None:
        if self._closed:
            return
        if topics and self._broadcasts is None:
            self._broadcasts = Presence(self._file, sql.INBOXES, last_broadcast, self._joined)
        if topics and self._broadcasts is not None:
            await self._join(self._broadcasts)
            self.queue_ids |= {sql.INBOXES}
        await self._look()  # what was broadcast to other topics before is not heard
        self._topics = topics
        if not topics and self._broadcasts is not None:
            self.queue_ids -= {sql.INBOXES}
            left, self._broadcasts = self._broadcasts, None
            await left.leave()

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")
        if not self._awaits_replies:
            await self._join(self._replies)
            self._awaits_replies = True
        asking = msgspec.structs.replace(message, reply_to=self.address)
        heard, self._heard = self._heard, []
        try:
            work = partial(request, namespace=self._namespace, message=asking, heard=heard)
            refusal = (await self._file.submit(work))[0]
        except DiskFull as error:
            refusal = StorageFull(str(error))
        if refusal is not None and not self._closed:
            refused(refusal)

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        life = self.life
        while not self._closed:
            await self._look()
            if self._arrived or self.life != life:
                break
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, LOOK))
        arrived = list(self._arrived)
        self._arrived.clear()
        self._heard += [one.token for one in arrived if one.topic == self.address]
        return arrived

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.life += 1
        self._file.listeners.discard(self)
        if self._bell is not None:
            self._bell.ring()
        presences = [self._replies] if self._broadcasts is None else [self._replies, self._broadcasts]
        await asyncio.gather(*(presence.leave() for presence in presences))
        self._forget(self)

    async def _join(self, presence: Presence[int]) -> None:
        await presence.join()
        if not self._closed:
            self._file.listeners.add(self)

    def _joined(self, last: int) -> None:
        if self._seen is None:
            self._seen = last

    def _joined_for_replies(self, last: int) -> None:
        self._joined(last)
        if self._awaits_replies:  # we stood still for too long: meanwhile replies were sent to nobody
            self.life += 1
            self.ring()

    async def _look(self) -> None:
        async with self._looking:
            if self._seen is None:
                return
            topics = msgspec.json.encode([*self._topics, self.address]).decode()
            looking = partial(look, namespace=self._namespace, topics=topics, after=self._seen)
            seen = await self._file.submit(looking, looking)  # it needs no transaction
            self._arrived += seen.deliveries
            self._seen = seen.last
