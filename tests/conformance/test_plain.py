"""The suite on a system that can do next to nothing: what it asserts where a capability is absent."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest

from penstock.brokers.base import Admin, Capabilities, Inbox, Move, OnLost, OnRefused, Queue, Release, Settlement
from penstock.brokers.memory import MemoryBroker, MemorySubscription
from penstock.errors import PublishError, Unsupported
from penstock.message import Delivery, Outgoing
from penstock.testing.conformance import Conformance, Harness

EXPIRES = "plain-expires-at"  # travels as a header, so that the system underneath does not act on it

_names = itertools.count()


def disguised(message: Outgoing) -> Outgoing:
    headers = {**message.headers, EXPIRES: message.expires_at}
    return msgspec.structs.replace(message, headers=headers, expires_at=None)


class PlainSubscription:
    def __init__(self, inner: MemorySubscription) -> None:
        self._inner = inner

    @property
    def consuming(self) -> bool:
        return self._inner.consuming

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        taken = await self._inner.receive(limit, wait)
        for delivery in taken:
            headers = dict(delivery.headers)
            delivery.expires_at = headers.pop(EXPIRES)
            delivery.headers = headers
        return taken

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        if any(isinstance(item, Release) and item.delay > 0 for item in items):
            raise Unsupported("this system has no delays")
        return await self._inner.settle(
            [
                Move(item.delivery, item.to, disguised(item.message)) if isinstance(item, Move) else item
                for item in items
            ]
        )

    async def close(self) -> None:
        await self._inner.close()


class PlainInbox:
    def __init__(self, inner: Inbox) -> None:
        self._inner = inner
        self.listen, self.receive, self.close = inner.listen, inner.receive, inner.close

    @property
    def life(self) -> int:
        return self._inner.life

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        if message.delay > 0:
            refused(PublishError("this system has no delays"))
        else:
            await self._inner.request(disguised(message), refused)


class PlainBroker:
    """The memory broker without its gifts."""

    capabilities = Capabilities(
        durable=False,
        atomic_move=False,
        atomic_publish=False,
        fenced=False,
        max_lease=60.0,
        priorities=0,
        delay=False,
        expiry=False,
        ordered=False,
        topics=False,
        browse=False,
        pause=False,
        lists=False,
        sees_delayed=False,
        exact_length=True,
    )

    def __init__(self, url: str) -> None:
        self._inner = MemoryBroker(url)

    @property
    def admin(self) -> Admin | None:
        return None

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        await self._inner.close()

    async def declare(self, queue: Queue) -> None:
        if queue.ordered or queue.topics:
            raise Unsupported("this system has neither order nor topics")
        await self._inner.declare(queue)

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        if any(message.delay > 0 for message in messages):
            return [PublishError("this system has no delays")] * len(messages)
        return await self._inner.publish([disguised(message) for message in messages])

    async def broadcast(self, message: Outgoing) -> None:
        await self._inner.broadcast(message)

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        await self._inner.reply(messages)

    def inbox(self) -> Inbox:
        return PlainInbox(self._inner.inbox())

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> PlainSubscription:
        inner = self._inner.subscribe(queues, prefetch=prefetch, lease=lease, on_lost=on_lost, ahead=ahead)
        return PlainSubscription(inner)


class TestPlain(Conformance):
    @pytest.fixture
    def harness(self) -> Harness:
        url = f"memory://plain-{next(_names)}"
        return Harness(connect=lambda: PlainBroker(url))
