"""What reaches only those who live, on core NATS: broadcasts and replies."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from penstock.brokers.base import INBOX_SIZE, OnRefused
from penstock.brokers.nats import wire
from penstock.brokers.nats.line import Line
from penstock.errors import BrokerError, BrokerUnavailable, PublishError
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell, Gathering

if TYPE_CHECKING:
    from penstock.brokers.nats.broker import NatsBroker

CHECK = 1.0
"""Seconds between looks at whether the connection is still there, if we should not have been told."""

_numbers = itertools.count(1)


class NatsInbox:
    """An address of its own on the line of its broker. With the line ends its life: what is sent to the address
    afterwards is heard by nobody."""

    def __init__(self, broker: NatsBroker, closed: Callable[[NatsInbox], None]) -> None:
        self.life = 0
        self._forget = closed
        self._broker = broker
        self._link = broker.link
        self._topics: frozenset[str] = frozenset()
        self._heard: dict[str, int] = {}
        self._is_news = False
        """Others of the cluster may not have heard yet of what is listened to."""
        self._line: Line | None = None
        self._address: str | None = None
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._changing = asyncio.Lock()
        self._asking: set[asyncio.Task[None]] = set()
        self._requests: Gathering[Outgoing, PublishError | None] = Gathering(broker.publisher.publish)
        self._closed = False

    async def listen(self, topics: frozenset[str]) -> None:
        self._topics = topics
        await self._ensure()

    async def receive(self, wait: float) -> list[Delivery]:
        if self._bell is None:
            self._bell = Bell()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        life = self.life
        while not self._arrived and not self._closed and life == self.life:
            if self._topics and (self._line is None or self._line.closed):
                await self._ensure()
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, CHECK))
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        self._check()
        line = await self._link.line()
        if line is not self._line or self._address is None:
            await self._ensure(with_address=True)
        self._check()
        request = msgspec.structs.replace(message, reply_to=self._address)
        task = asyncio.create_task(self._ask(request, refused))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, request: Outgoing, refused: OnRefused) -> None:
        error: BrokerError | None
        try:
            error = await self._requests.do(request)
        except BrokerError as found:
            error = found
        if error is not None and not self._closed:
            refused(error)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._forget(self)
        self.life += 1
        self._ring()
        if self._line is not None and not self._line.closed:
            for sid in self._heard.values():
                self._line.leave(sid)
                self._line.forget(sid)
        self._heard.clear()
        if self._asking:
            await asyncio.wait(self._asking, timeout=self._link.timeout)

    def _check(self) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    # -- listening

    async def _ensure(self, with_address: bool = False) -> None:
        """:raises BrokerUnavailable, BrokerRefused: there is no connection now, or a subject is not for this user."""
        async with self._changing:
            if self._closed or not (self._topics or self._heard or with_address):
                return
            line = await self._link.line()
            if line is not self._line:
                self._line, self._address = line, None
                self._heard.clear()
                line.on_end(lambda: self._gone(line))
            wanted = {self._broker.names.broadcast(topic) for topic in self._topics}
            if with_address and self._address is None:
                self._address = f"{line.inbox}.in.{next(_numbers)}"
            if self._address is not None:
                wanted.add(self._address)
            fresh = wanted - self._heard.keys()
            self._is_news = self._is_news or bool(fresh - {self._address})
            for subject in fresh:
                self._heard[subject] = line.listen(subject, self._arrive)
            for subject in self._heard.keys() - wanted:
                sid = self._heard.pop(subject)
                line.leave(sid)
                line.forget(sid)
            await line.flush(self._link.timeout)
            if line.has_peers and self._is_news:
                # The others are told of it in passing. Whoever answers a question that was asked later is on a server
                # that has heard of it.
                await self._broker.headcount.take(line)
            self._is_news = False

    def _gone(self, line: Line) -> None:
        if line is self._line and not self._closed:
            self._line, self._address = None, None
            self._heard.clear()
            self.life += 1
            self._ring()

    def _arrive(self, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        if wire.status_of(block) is None:
            self._arrived.append(wire.to_delivery(subject, data, block, ""))
            self._ring()
