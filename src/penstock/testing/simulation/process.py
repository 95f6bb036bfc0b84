"""A simulated process: an engine that can die between any two awaits."""

from __future__ import annotations

import asyncio
import collections.abc
from collections.abc import Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from penstock.delivery.consumer import Consumer
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.errors import Unavailable
from penstock.message import Message
from penstock.testing.simulation.line import FaultyBroker, FaultySubscription
from penstock.testing.simulation.plan import LANE, LEASE, QUEUE

if TYPE_CHECKING:
    from penstock.testing.simulation.world import World

current_process: ContextVar[Process | None] = ContextVar("simulated_process", default=None)


class Stepped(collections.abc.Coroutine[Any, Any, Any]):
    """A coroutine of a simulated process: watched at each step, and never resumed once the process is dead."""

    def __init__(self, inner: Any, process: Process) -> None:
        self._inner = inner
        self._process = process
        self._life = process.lives

    @property
    def _alive(self) -> bool:
        return self._process.alive and self._process.lives == self._life

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        if not self._alive:
            self._process.world.bury_coroutine(self._inner)
            raise error[0]
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        self._process.world.bury_coroutine(self._inner)

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError("only tasks drive it")

    def _step(self, step: Any, *arguments: Any) -> Any:
        if not self._alive:
            self._process.world.bury_coroutine(self._inner)
            raise StopIteration
        try:
            return step(*arguments)
        finally:
            self._process.world.stepped(self._process)


class Process:
    """A simulated process that consumes; a supervisor starts it again when it has died."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.alive = True
        self.lives = 0
        self.subscriptions: list[FaultySubscription] = []
        self.running: list[list[Message]] = []
        self.consumer: Consumer | None = None
        self.draining = False

    def boot(self) -> None:
        self.alive = True
        self.draining = False
        self.consumer = None
        self.lives += 1
        self.subscriptions = []
        self.running = []
        token = current_process.set(self)
        try:
            self._main = asyncio.get_running_loop().create_task(self._start())
        finally:
            current_process.reset(token)

    async def _start(self) -> None:
        world = self.world
        around = Surroundings(solitude=Solitude(), lease=LEASE, clock=world.clock, rng=world.rng)
        life = self.lives

        def fatal(error: BaseException) -> None:
            if self.alive and self.lives == life:
                raise error

        self.consumer = Consumer(world.route(self.handle), FaultyBroker(world, self), around, fatal)
        await self.consumer.start()

    def drain(self) -> None:
        """SIGTERM: finish and release. Another life begins afterwards."""
        if self.consumer is None or self.draining:
            return
        self.draining = True
        asyncio.get_running_loop().create_task(self._drain(self.lives))

    async def _drain(self, life: int) -> None:
        await self.shut_down()
        if self.alive and self.lives == life:  # it was not killed meanwhile
            self.world.require(not self.holds_anything(), "a drained process still holds messages")
            self.alive = False
            self._restart()

    async def shut_down(self) -> None:
        """Stop as on SIGTERM, within this life."""
        if not self.alive or self.consumer is None:
            return
        token = current_process.set(self)
        try:
            stopping = asyncio.get_running_loop().create_task(self.consumer.stop(5))
        finally:
            current_process.reset(token)
        life = self.lives
        while not stopping.done() and self.alive and self.lives == life:
            await asyncio.wait([stopping], timeout=0.1)

    def holds_anything(self) -> bool:
        mine = [subscription.inner for subscription in self.subscriptions]
        return any(record.owner in mine for record in self.world.server.records.values())

    def crash(self) -> None:
        """SIGKILL: nothing of this life runs any more. Another life begins later."""
        self._lose_held()
        self.alive = False
        asyncio.get_running_loop().call_later(self.world.rng.uniform(0.0, 3.0), self._restart)

    def _restart(self) -> None:
        token = current_process.set(None)
        try:
            self.boot()
        finally:
            current_process.reset(token)

    def lose_lease(self) -> None:
        """What a long pause does: the broker gives everything to others while we believe it is ours."""
        self._lose_held()
        for subscription in self.subscriptions:
            self.world.server.forget(subscription.inner, counted=True)  # type: ignore[arg-type]  # a MemorySubscription

    def _lose_held(self) -> None:
        for subscription in self.subscriptions:
            for delivery in subscription.held.values():
                self.world.excused.add(delivery.id)
                if delivery.queue == LANE:
                    self.world.lone_losses[delivery.id] += 1
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
