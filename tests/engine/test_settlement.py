"""Settling goes on beside what cannot be put anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.brokers.base import Ack, Move, Release, Settlement
from penstock.delivery.settlement import Settler
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery, Outgoing
from tests.helpers import eventually


class Clogged:
    """A subscription that can remove, and put nothing anywhere until it is `free`."""

    consuming = True

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.acknowledged: list[str] = []
        self.put: list[str] = []
        self.tries = 0

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        if not all(isinstance(item, Ack) for item in items):
            self.tries += 1
            if self.tries == 1:
                raise BrokerUnavailable("no memory")
            await self.free.wait()
        for item in items:
            (self.acknowledged if isinstance(item, Ack) else self.put).append(item.delivery.id)
        return []


def delivery(id: str) -> Delivery:
    return Delivery("work", id, "work", b"x", {}, None, 0, 0.0, None, 0, token=None)


async def test_acknowledgements_do_not_wait_for_what_must_be_put_somewhere() -> None:
    subscription = Clogged()
    left: list[int] = []
    settler = Settler(subscription, left.append)
    running = asyncio.create_task(settler.run())
    retry = Move(delivery("failed"), "work", Outgoing(id="failed", topic="work", body=b"x"))
    settler.extend([Ack(delivery("a")), retry, Release(delivery("back"))])
    await eventually(lambda: subscription.tries == 2)
    settler.add(Ack(delivery("b")))
    await eventually(lambda: subscription.acknowledged == ["a", "b"])
    drained = asyncio.create_task(settler.drained())
    await asyncio.sleep(0.01)
    assert not drained.done()
    assert sum(left) == 2
    subscription.free.set()
    await drained
    assert subscription.put == ["failed", "back"]
    assert sum(left) == 4
    running.cancel()


async def test_what_ends_an_errand_ends_the_settler() -> None:
    class Broken(Clogged):
        async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
            raise ZeroDivisionError

    settler = Settler(Broken(), lambda count: None)
    running = asyncio.create_task(settler.run())
    settler.add(Release(delivery("x")))
    await asyncio.wait({running}, timeout=5)
    assert isinstance(running.exception(), ZeroDivisionError)


async def test_one_that_has_nowhere_to_go_holds_up_no_other() -> None:
    class Picky(Clogged):
        async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
            if any(item.delivery.id == "homeless" for item in items) and not self.free.is_set():
                self.tries += 1
                raise BrokerError("there is no such queue")
            self.put += [item.delivery.id for item in items]
            return []

    subscription = Picky()
    left: list[int] = []
    settler = Settler(subscription, left.append)
    running = asyncio.create_task(settler.run())
    homeless = Move(delivery("homeless"), "gone", Outgoing(id="homeless", topic="gone", body=b"x"))
    settler.extend([Release(delivery("a")), homeless, Release(delivery("b"))])
    await eventually(lambda: subscription.put == ["a", "b"])
    settler.add(Release(delivery("later")))
    await eventually(lambda: subscription.put == ["a", "b", "later"])
    await eventually(lambda: subscription.tries > 2)
    assert sum(left) == 3
    subscription.free.set()
    await settler.drained()
    assert subscription.put == ["a", "b", "later", "homeless"]
    assert sum(left) == 4
    running.cancel()
