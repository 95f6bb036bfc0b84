"""What reaches only those who live, on RabbitMQ: broadcasts and replies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.handover import hand_over
from penstock.brokers.amqp.requests import Requests
from penstock.brokers.base import INBOX_SIZE, OnRefused
from penstock.errors import BrokerUnavailable
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.amqp.broker import AmqpBroker

CHECK = 1.0
"""Seconds between looks at whether the channel is still there, if we should not have been told."""


class AmqpInbox:
    """Broadcasts come through an exclusive queue on a channel of its own, bound to what we listen to; both are
    made again when they are gone. Requests go, and their replies come, on another channel, over the connection
    for publishing: one on which requests are published is not read any more by a server short of memory.
    """

    def __init__(self, broker: AmqpBroker, forget: Callable[[AmqpInbox], None]) -> None:
        self.life = 0
        self._broker = broker
        self._forget = forget
        self._link = broker.consuming
        self._topics: frozenset[str] = frozenset()
        self._bound: frozenset[str] = frozenset()
        self._channel: Channel | None = None
        self._queue = ""
        self._requests: dict[bool, Requests] = {}
        """By whether its requests are confirmed."""
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._changing = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._closed = False
        self._dropping: asyncio.Future[None] | None = None

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
            if self._topics and (self._channel is None or self._channel.is_closed):
                await self._ensure()
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, CHECK))
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        confirmed = message.topic in self._broker.limited
        requests = self._requests.get(confirmed)
        if requests is None or requests.closed:
            requests = await self._ask_by(confirmed)
        await requests.ask(message, refused)

    async def close(self) -> None:
        self.life += not self._closed
        self._closed = True
        self._ring()
        await asyncio.gather(*(requests.close() for requests in list(self._requests.values())))
        channel, self._channel = self._channel, None
        await self._link.close_channel(channel)  # its queue goes with its consumer
        self._forget(self)

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    # -- replies

    async def _ask_by(self, confirmed: bool) -> Requests:
        """:raises BrokerUnavailable, BrokerRefused: there is no connection now."""
        link = self._broker.publishing
        async with self._opening:
            requests = self._requests.get(confirmed)
            if requests is None or requests.closed:
                self._check_open()
                requests = Requests(self._broker, await link.channel(confirms=confirmed), self._arrive, self._gone)
                try:
                    with link.guard():
                        await requests.open()
                    self._check_open()
                except BaseException:
                    await requests.close()
                    raise
                self._requests[confirmed] = requests
            return requests

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable("the inbox is closed")

    def _gone(self, requests: Requests) -> None:
        for confirmed, known in list(self._requests.items()):
            if known is requests:
                del self._requests[confirmed]
        self.life += 1
        self._ring()

    # -- broadcasts

    async def _ensure(self) -> None:
        """:raises BrokerUnavailable, BrokerRefused: there is no connection now."""
        async with self._changing:
            if self._closed or not (self._topics or self._bound):
                return
            try:
                with self._link.guard():
                    if self._channel is None or self._channel.is_closed:
                        await self._open()
                    await self._bind()
                self._check_open()
            except BaseException:
                channel, self._channel = self._channel, None
                await self._link.close_channel(channel)
                raise

    async def _open(self) -> None:
        channel = self._channel = await self._link.channel(confirms=False)
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(lambda _: self._ring())
        await topology.ensure_exchange(channel, topology.BROADCAST)
        made = await channel.queue_declare("", exclusive=True, auto_delete=True)
        self._queue = str(made.queue)
        self._bound = frozenset()
        ok = await channel.basic_consume(self._queue, self._consume, no_ack=True)
        hand_over(channel, str(ok.consumer_tag), self._arrive)

    def _cancelled(self, frame: Basic.Cancel) -> None:
        """The queue was deleted: another one is made."""
        if self._channel is not None:
            self._dropping = asyncio.ensure_future(self._link.close_channel(self._channel))
        self._channel = None
        self._ring()

    async def _bind(self) -> None:
        assert self._channel is not None
        for topic in self._topics - self._bound:
            await self._channel.queue_bind(self._queue, topology.BROADCAST, topic)
        for topic in self._bound - self._topics:
            await self._channel.queue_unbind(self._queue, topology.BROADCAST, topic)
        self._bound = self._topics

    async def _consume(self, message: DeliveredMessage) -> None:
        self._arrive(message)

    def _arrive(self, message: DeliveredMessage) -> None:
        self._arrived.append(wire.to_delivery(message, "", None))
        self._ring()
