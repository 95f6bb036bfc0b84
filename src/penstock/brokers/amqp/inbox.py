"""Broadcasts on RabbitMQ: a queue of our own, gone with its connection, bound to what we listen to."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp import topology, wire
from penstock.brokers.base import INBOX_SIZE
from penstock.message import Delivery
from penstock.waiting import Bell

if TYPE_CHECKING:
    from penstock.brokers.amqp.broker import AmqpBroker

CHECK = 1.0  # seconds between looks at whether the channel is still there


class AmqpInbox:
    """An exclusive queue on a channel of its own; both are made again when they are gone."""

    def __init__(self, broker: AmqpBroker) -> None:
        self._link = broker.consuming
        self._topics: frozenset[str] = frozenset()
        self._bound: frozenset[str] = frozenset()
        self._channel: Channel | None = None
        self._queue = ""
        self._arrived: deque[Delivery] = deque(maxlen=INBOX_SIZE)
        self._bell: Bell | None = None
        self._changing = asyncio.Lock()
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
        while not self._arrived and not self._closed:
            await self._ensure()
            left = until - loop.time()
            if left <= 0:
                break
            await self._bell.wait(min(left, CHECK))
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    async def close(self) -> None:
        self._closed = True
        if self._bell is not None:
            self._bell.ring()
        channel, self._channel = self._channel, None
        await self._link.close_channel(channel)  # its queue goes with its consumer

    async def _ensure(self) -> None:
        """:raises BrokerUnavailable, BrokerRefused: there is no connection now."""
        async with self._changing:
            if self._closed:
                return
            try:
                with self._link.guard():
                    if self._channel is None or self._channel.is_closed:
                        await self._open()
                    await self._bind()
            except BaseException:
                channel, self._channel = self._channel, None
                await self._link.close_channel(channel)
                raise

    async def _open(self) -> None:
        channel = self._channel = await self._link.channel(confirms=False)
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        await topology.ensure_exchange(channel, topology.BROADCAST)
        made = await channel.queue_declare("", exclusive=True, auto_delete=True)
        self._queue = str(made.queue)
        self._bound = frozenset()
        await channel.basic_consume(self._queue, self._arrive, no_ack=True)

    def _cancelled(self, frame: Basic.Cancel) -> None:
        """The queue was deleted: another one is made with the next look."""
        if self._channel is not None:
            self._dropping = asyncio.ensure_future(self._link.close_channel(self._channel))
        self._channel = None

    async def _bind(self) -> None:
        assert self._channel is not None
        for topic in self._topics - self._bound:
            await self._channel.queue_bind(self._queue, topology.BROADCAST, topic)
        for topic in self._bound - self._topics:
            await self._channel.queue_unbind(self._queue, topology.BROADCAST, topic)
        self._bound = self._topics

    async def _arrive(self, message: DeliveredMessage) -> None:
        self._arrived.append(wire.to_delivery(message, "", None))
        if self._bell is not None:
            self._bell.ring()
