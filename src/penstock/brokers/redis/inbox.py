"""What reaches only those who live, on Redis: broadcasts and replies, each on a channel."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from penstock.brokers.base import INBOX_SIZE, OnRefused
from penstock.brokers.redis import wire
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery, Outgoing
from penstock.redis.errors import NotNow
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.redis.broker import RedisBroker

log = logging.getLogger("penstock.redis")


class RedisInbox:
    """Listens to a channel for each topic, and to one of its own for replies."""

    def __init__(self, broker: RedisBroker, closed: Callable[[RedisInbox], None]) -> None:
        self._forget = closed
        self.address = secrets.token_hex(12)
        """Where replies go."""
        self.life = 0
        self._broker = broker
        self._listening = broker.listening
        self._own = f"{broker.channels}inbox:{self.address}"
        self._topics: frozenset[str] = frozenset()
        self._awaits_replies = False
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._changing = asyncio.Lock()
        self._closed = False

    async def listen(self, topics: frozenset[str]) -> None:
        async with self._changing:
            if self._closed:
                return
            self._listening.unsubscribe(map(self._channel, self._topics - topics), self)
            self._topics = topics
            await self._listening.subscribe(map(self._channel, topics), self)

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        life = self.life
        while not (self._arrived or self._closed or self.life != life):
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(left)
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")
        if not (self._awaits_replies and self._listening.up):
            await self._listening.subscribe([self._own], self)
            self._awaits_replies = True
        await self._broker.link.line()
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")
        asking = msgspec.structs.replace(message, reply_to=self.address)
        refusal: BrokerError | None
        try:
            refusal = (await self._broker.publish([asking]))[0]
        except NotNow:
            raise
        except BrokerUnavailable as error:  # it may have been sent
            refusal = error
        if refusal is not None and not self._closed:
            refused(refusal)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._forget(self)
        self.life += 1
        self._ring()
        self._listening.unsubscribe([*map(self._channel, self._topics), self._own], self)

    # -- called by `Listening`

    def heard(self, channel: bytes, data: bytes) -> None:
        try:
            delivery = wire.decode_spoken(data)
        except ValueError:
            log.warning("something that is no message was said on %s", channel.decode(errors="replace"))
            return
        self._arrived.append(delivery)
        self._ring()

    def missed(self, back: bool) -> None:
        self.life += self._awaits_replies and not back
        self._ring()

    def _channel(self, topic: str) -> str:
        return f"{self._broker.channels}topic:{topic}"

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()
