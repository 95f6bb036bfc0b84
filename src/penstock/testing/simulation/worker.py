"""A simulated process that consumes a queue with a handler on which nothing can be relied."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.delivery.consumer import Consumer
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.errors import Unavailable
from penstock.message import Message
from penstock.testing.simulation.line import FaultyBroker
from penstock.testing.simulation.plan import LANE, LEASE, QUEUE
from penstock.testing.simulation.process import Process

if TYPE_CHECKING:
    from penstock.testing.simulation.world import World


class Worker(Process):
    """A simulated process that consumes a queue with a handler on which nothing can be relied."""

    world: World

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number)
        self.running: list[list[Message]] = []
        self.consumer: Consumer | None = None

    @property
    def ready(self) -> bool:
        return self.consumer is not None

    def boot(self) -> None:
        self.consumer = None
        self.running = []
        super().boot()

    async def start(self) -> None:
        world = self.world
        around = Surroundings(solitude=Solitude(), lease=LEASE, clock=world.clock, rng=world.rng)
        self.consumer = Consumer(world.route(self.handle), FaultyBroker(world, self), around, self.fatal())
        await self.consumer.start()

    async def stop(self) -> None:
        assert self.consumer is not None
        await self.consumer.stop(5)

    def lose_held(self) -> None:
        super().lose_held()
        self.world.excused.update(message.id for messages in self.running for message in messages)

    # -- the user's handler

    async def handle(self, messages: list[Message]) -> None:
        world, rng = self.world, self.world.rng
        self._check_start(messages)
        self.running.append(messages)
        try:
            await asyncio.sleep(rng.choice([0.0, 0.01, 0.3, 2.5]))
            if any(message.id in world.plan.poison for message in messages):
                self.crash()
                await asyncio.sleep(0)
            if any(message.id in world.plan.stubborn for message in messages) or world.happens("handler error"):
                self._count_failures(messages)
                raise ValueError("the handler failed")
            if world.happens("outage"):
                raise Unavailable("the store is away")
            if world.happens("cancelled"):
                self._count_failures(messages)
                raise asyncio.CancelledError
            for message in messages:
                if world.happens("reject"):
                    world.rejected.add(message.id)
                    message.reject(requeue=False)
                else:
                    world.finished[message.id] += 1
        finally:
            if messages in self.running:
                self.running.remove(messages)

    def _count_failures(self, messages: list[Message]) -> None:
        world = self.world
        for message in messages:
            world.failed[message.id] += 1

    def _check_start(self, messages: list[Message]) -> None:
        require = self.world.require
        lone = [message for message in messages if message.source.queue == LANE]
        others = [message for batch in self.running for message in batch]
        if lone:
            require(not others and len(messages) == 1, f"suspect {lone[0].id} does not run alone")
        require(
            not any(message.source.queue == LANE for message in others),
            f"message {messages[0].id} starts beside a suspect",
        )
        for message in messages:
            require(message.queue == QUEUE, f"message {message.id} seems to come from {message.queue}")
            require(message.id not in self.world.plan.invalid, f"invalid message {message.id} reached the handler")
            require(message.attempt == 1 or message.id in self.world.excused or self.world.failed[message.id] > 0,
                    f"message {message.id} has attempt {message.attempt} and no past")  # fmt: skip
            if self.world.plan.policy.ordered and message.key is not None:
                self._check_order(message)

    def _check_order(self, message: Message) -> None:
        for earlier, key in self.world.confirmed.items():
            if earlier == message.id:
                return
            if key == message.key and earlier not in self.world.plan.invalid:
                done = self.world.finished[earlier] > 0 or earlier in self.world.buried
                self.world.require(done, f"{message.id} starts before {earlier} of its key is done")
