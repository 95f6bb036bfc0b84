"""A memory broker over a bad line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.brokers.base import Broker, Inbox, OnLost, OnRefused, Queue, Settlement, Subscription
from penstock.brokers.memory import MemoryBroker
from penstock.errors import BrokerError, BrokerUnavailable, PublishError
from penstock.message import Delivery, Outgoing

if TYPE_CHECKING:
    from penstock.testing.simulation.ground import Ground
    from penstock.testing.simulation.process import Process


class FaultyBroker:
    """A memory broker over a bad line."""

    def __init__(self, world: Ground, process: Process | None) -> None:
        self._world = world
        self._process = process
        self._inner: Broker = MemoryBroker(server=world.server)
        self.capabilities = self._inner.capabilities

    @property
    def admin(self) -> None:
        return None

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        await self._inner.close()

    async def declare(self, queue: Queue) -> None:
        await self._inner.declare(queue)

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        await self._line()
        outcome = await self._publish(messages)
        if self._world.happens("doubled"):
            self._world.excused.update(message.id for message in messages)
            await self._publish(messages)
        await self._line()
        return outcome

    async def _publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        outcome = await self._inner.publish(messages)
        for message, refusal in zip(messages, outcome, strict=True):
            if refusal is None:
                self._world.published(message)
        return outcome

    async def broadcast(self, message: Outgoing) -> None:
        await self._inner.broadcast(message)

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        await self._line()
        await self._inner.reply(messages)

    def inbox(self) -> FaultyInbox:
        return FaultyInbox(self._world, self._inner.inbox())

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> FaultySubscription:
        assert self._process is not None
        subscription = FaultySubscription(self._world, self._process, prefetch, on_lost)
        subscription.inner = self._inner.subscribe(queues, prefetch=prefetch, lease=lease, on_lost=subscription.lose)
        self._process.subscriptions.append(subscription)
        return subscription

    async def _line(self) -> None:
        await line(self._world)


class FaultyInbox:
    """An inbox over a bad line: a request may be lost, be sent twice, or be sent and called lost."""

    def __init__(self, world: Ground, inner: Inbox) -> None:
        self._world = world
        self._inner = inner

    @property
    def life(self) -> int:
        return self._inner.life

    async def listen(self, topics: frozenset[str]) -> None:
        await self._inner.listen(topics)

    async def receive(self, wait: float) -> list[Delivery]:
        return await self._inner.receive(wait)

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        refusals: list[BrokerError] = []
        await line(self._world)
        await self._inner.request(message, refusals.append)
        if self._world.happens("doubled"):
            self._world.excused.add(message.id)
            await self._inner.request(message, refusals.append)
        try:
            await line(self._world)
        except BrokerUnavailable as error:
            refusals.append(error)
        if refusals:
            refused(refusals[0])

    async def close(self) -> None:
        await self._inner.close()


class FaultySubscription:
    """A subscription over a bad line. `held` is what the consumer holds as the world sees it."""

    inner: Subscription

    def __init__(self, world: Ground, process: Process, prefetch: int, on_lost: OnLost) -> None:
        self.prefetch = prefetch
        self.held: dict[int, Delivery] = {}
        self._world = world
        self._process = process
        self._on_lost = on_lost

    @property
    def consuming(self) -> bool:
        return self.inner.consuming

    def lose(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.held.pop(id(delivery), None)
        self._on_lost(deliveries)

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        world = self._world
        await line(world)
        deliveries = await self.inner.receive(limit, wait)
        self.held.update((id(delivery), delivery) for delivery in deliveries)
        if not world.ordered and world.happens("reordered"):
            world.rng.shuffle(deliveries)
        return deliveries

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        world = self._world
        await line(world)
        for item in items:
            world.settling(self, item)
        lost = await self.inner.settle(items)
        for item in items:
            self.held.pop(id(item.delivery), None)
        await line(world)
        return lost

    async def close(self) -> None:
        self.held.clear()
        await self.inner.close()


async def line(world: Ground) -> None:
    """What a request goes through, before it is carried out and after: time, and perhaps a break."""
    await asyncio.sleep(world.rng.choice([0.0, 0.0, 0.001, 0.05]))
    if world.happens("broker error"):
        raise BrokerUnavailable("the line broke")
