"""What the suite needs of an adapter (`Harness`), and the hands its tests have (`System`)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from penstock.brokers.base import Ack, Admin, Broker, Capabilities, OnLost, Queue, Subscription
from penstock.errors import PublishError
from penstock.message import Delivery, Outgoing
from penstock.testing.elsewhere import Elsewhere

CrashConsumer = Callable[[str, int, float], Awaitable[Sequence[str]]]

SLACK = 10  # messages over its length that a queue without `exact_length` may take one by one

_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Harness:
    """One message system for one test, empty at its beginning."""

    connect: Callable[[], Broker]
    """Another broker object for that system, not yet opened: each stands for another process."""
    crash_consumer: CrashConsumer | None = None
    """Given a queue's name, a count and a lease: have a consumer with that lease take that many messages of
    the queue and die with them in its hands; their ids. `penstock.testing.victim.killed(url)` does it with
    a process and SIGKILL; None: an event loop that turns no more, in a thread."""
    lease: float = 0.6
    """The shortest lease in seconds that the system can keep on a busy machine."""
    patience: float = 15.0
    """Seconds to wait for what must happen."""
    quiet: float = 0.1
    """Seconds to wait for what must not happen; at least the time a message takes to arrive."""
    prompt: float = 0.6
    """Seconds within which a consumer that waits hears of a message, when nothing else goes on."""
    largest_body: int = 8 * 2**20
    """Bytes; the engine's default ceiling, or the system's own."""


def message(topic: str, body: bytes = b"", **fields: Any) -> Outgoing:
    """A message with an id of its own, published now."""
    fields.setdefault("id", f"m{next(_numbers)}")
    fields.setdefault("enqueued_at", time.time())
    return Outgoing(topic=topic, body=body, **fields)


def messages(topic: str, count: int, **fields: Any) -> list[Outgoing]:
    return [message(topic, str(number).encode(), **fields) for number in range(count)]


def ids(found: Sequence[Delivery] | Sequence[Outgoing]) -> list[str]:
    return [one.id for one in found]


def acks(deliveries: Sequence[Delivery]) -> list[Ack]:
    return [Ack(delivery) for delivery in deliveries]


def unheard(lost: Sequence[Delivery]) -> None:
    """An `on_lost` for those to whom nothing will happen."""


class System:
    """The system under test. What a test opens through it is closed when the test ends."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self._brokers: list[Broker] = []
        self._elsewhere: list[tuple[Elsewhere, list[Broker]]] = []

    @property
    def can(self) -> Capabilities:
        return self._brokers[0].capabilities

    async def connect(self) -> Broker:
        """Another connection, opened."""
        broker = self.harness.connect()
        self._brokers.append(broker)
        await broker.open()
        return broker

    def admin(self, broker: Broker) -> Admin:
        assert broker.admin is not None
        return broker.admin

    async def declare(self, broker: Broker, name: str, **properties: Any) -> Queue:
        queue = Queue(name, **properties)
        await broker.declare(queue)
        return queue

    def consume(
        self,
        broker: Broker,
        *queues: Queue,
        prefetch: int = 10_000,
        lease: float = 30.0,
        on_lost: OnLost = unheard,
        ahead: bool = True,
    ) -> Subscription:
        return broker.subscribe(queues, prefetch=prefetch, lease=lease, on_lost=on_lost, ahead=ahead)

    async def publish(self, broker: Broker, outgoing: Sequence[Outgoing]) -> list[str]:
        """Publish, all of it confirmed; the ids."""
        outcomes = await broker.publish(outgoing)
        assert list(outcomes) == [None] * len(outgoing)
        return ids(outgoing)

    async def fill(self, broker: Broker, queue: Queue) -> tuple[list[str], PublishError]:
        """Publish to a queue of limited length, one by one, until it refuses; what it took, and its refusal."""
        assert queue.max_length is not None
        taken: list[str] = []
        while len(taken) <= queue.max_length + SLACK:
            one = message(queue.name)
            [refusal] = await broker.publish([one])
            if refusal is not None:
                return taken, refusal
            taken.append(one.id)
        raise AssertionError(f"queue {queue.name!r} of at most {queue.max_length} took {len(taken)}")

    async def take(self, subscription: Subscription, count: int = 1) -> list[Delivery]:
        """Exactly `count` deliveries, not settled."""
        taken: list[Delivery] = []
        until = time.monotonic() + self.harness.patience
        while len(taken) < count:
            left = until - time.monotonic()
            assert left > 0, f"{len(taken)} of {count} messages arrived within {self.harness.patience:g} s"
            taken += await subscription.receive(count - len(taken), left)
        return taken

    async def drain(self, subscription: Subscription) -> list[Delivery]:
        """All that is there, at least one, acknowledged."""
        taken: list[Delivery] = []
        wait = self.harness.patience
        while found := await subscription.receive(1000, wait):
            assert not await subscription.settle(acks(found))
            taken += found
            wait = self.harness.quiet
        return taken

    async def silent(self, subscription: Subscription) -> bool:
        """Whether nothing arrives for a short while."""
        return not await subscription.receive(10, self.harness.quiet)

    async def blocked(self, subscription: Subscription, limit: int = 10) -> asyncio.Task[list[Delivery]]:
        """A `receive` that waits, having found nothing."""
        receiving = asyncio.create_task(subscription.receive(limit, self.harness.patience))
        done, _ = await asyncio.wait({receiving}, timeout=self.harness.quiet)
        assert not done, f"there was something to receive: {receiving.result()}"
        return receiving

    async def woken(self, receiving: asyncio.Task[list[Delivery]]) -> list[Delivery]:
        """What a blocked `receive` returns, long before its own wait is over."""
        async with asyncio.timeout(self.harness.patience / 2):
            return await receiving

    async def elsewhere(self) -> tuple[Elsewhere, Broker]:
        """A connection that belongs to another event loop, which can be frozen."""
        place = Elsewhere()
        brokers: list[Broker] = []
        self._elsewhere.append((place, brokers))

        async def connect() -> Broker:
            broker = self.harness.connect()
            brokers.append(broker)
            await broker.open()
            return broker

        return place, await place.run(connect())

    async def crash_consumer(self, queue: Queue, count: int) -> list[str]:
        """A consumer takes `count` messages and dies; their ids."""
        if self.harness.crash_consumer is not None:
            return list(await self.harness.crash_consumer(queue.name, count, self.harness.lease))
        place, broker = await self.elsewhere()
        taken = await place.run(self.take(self.consume(broker, queue, lease=self.harness.lease), count))
        place.freeze()
        return ids(taken)

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for place, brokers in self._elsewhere:
            place.thaw()
            for broker in brokers:
                await place.run(broker.close())
            await place.end()


class Promises:
    """The fixtures that the tests of every verb share."""

    pytestmark = pytest.mark.asyncio

    @pytest_asyncio.fixture
    async def system(self, harness: Harness) -> AsyncIterator[System]:
        system = System(harness)
        yield system
        await system.close()

    @pytest_asyncio.fixture
    async def broker(self, system: System) -> Broker:
        return await system.connect()
