"""A memory broker over a bad line."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock.brokers.base import Broker, Inbox, OnLost, Queue, Settlement, Subscription
from penstock.brokers.memory import MemoryBroker
from penstock.errors import BrokerUnavailable, PublishError
from penstock.message import Delivery, Outgoing

if TYPE_CHECKING:
    from penstock.testing.simulation.process import Process
    from penstock.testing.simulation.world import World


class FaultyBroker:
    """A memory broker over a bad line."""

    def __init__(self, world: World, process: Process | None) -> None:
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
        outcome = await self._inner.publish(messages)
        if self._world.happens("doubled"):
            self._world.excused.update(message.id for message in messages)
            await self._inner.publish(messages)
        await self._line()
        return outcome

    async def broadcast(self, message: Outgoing) -> None:
        await self._inner.broadcast(message)

    def inbox(self) -> Inbox:
        return self._inner.inbox()

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


class FaultySubscription:
    """A subscription over a bad line. `held` is what the consumer holds as the world sees it."""

    inner: Subscription

    def __init__(self, world: World, process: Process, prefetch: int, on_lost: OnLost) -> None:
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
        if not world.plan.policy.ordered and world.happens("reordered"):
            world.rng.shuffle(deliveries)
        return deliveries

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        world = self._world
        await line(world)
        for item in items:
            world.settling(item)
        lost = await self.inner.settle(items)
        for item in items:
            self.held.pop(id(item.delivery), None)
        await line(world)
        return lost

    async def close(self) -> None:
        self.held.clear()
        await self.inner.close()


async def line(world: World) -> None:
    """What a request goes through, before it is carried out and after: time, and perhaps a break."""
    await asyncio.sleep(world.rng.choice([0.0, 0.0, 0.001, 0.05]))
    if world.happens("broker error"):
        raise BrokerUnavailable("the line broke")
