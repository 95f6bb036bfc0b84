"""Wake-ups: whatever makes a message ready is heard at once by a consumer that waits for it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest

from penstock.brokers.base import Broker, Move, Queue, Release
from penstock.testing.conformance.harness import Promises, System, acks, message, messages

ATTEMPTS = 5  # of which one has to be prompt: a busy machine may delay the others

Trigger = Callable[[], Awaitable[object]]


async def by_publishing(system: System, broker: Broker, waiting: Queue) -> Trigger:
    return lambda: system.publish(broker, messages(waiting.name, 1))


async def by_releasing(system: System, broker: Broker, waiting: Queue) -> Trigger:
    await system.publish(broker, messages(waiting.name, 1))
    holder = system.consume(broker, waiting, ahead=False)  # else what it gives back may be pushed to it again
    [held] = await system.take(holder)
    return lambda: holder.settle([Release(held)])


async def by_closing(system: System, broker: Broker, waiting: Queue) -> Trigger:
    await system.publish(broker, messages(waiting.name, 1))
    holder = system.consume(broker, waiting)
    await system.take(holder)
    return holder.close


async def by_moving(system: System, broker: Broker, waiting: Queue) -> Trigger:
    source = await system.declare(broker, "source")
    await system.publish(broker, messages("source", 1))
    holder = system.consume(broker, source)
    [held] = await system.take(holder)
    return lambda: holder.settle([Move(held, waiting.name, message("source", id=held.id))])


async def by_resuming(system: System, broker: Broker, waiting: Queue) -> Trigger:
    if not system.can.pause:
        return await by_publishing(system, broker, waiting)
    admin = system.admin(broker)
    await admin.pause(waiting.name, True)
    await system.publish(broker, messages(waiting.name, 1))
    return lambda: admin.pause(waiting.name, False)


class WakingPromises(Promises):
    @pytest.mark.parametrize("local", [True, False], ids=["same connection", "another connection"])
    @pytest.mark.parametrize("cause", [by_publishing, by_releasing, by_closing, by_moving, by_resuming])
    async def test_a_waiting_consumer_hears_at_once(
        self,
        system: System,
        broker: Broker,
        cause: Callable[[System, Broker, Queue], Awaitable[Trigger]],
        local: bool,
    ) -> None:
        here = broker if local else await system.connect()
        for attempt in range(ATTEMPTS):
            waiting = await system.declare(broker, f"waiting-{attempt}")
            trigger = await cause(system, broker, waiting)
            receiving = await system.blocked(system.consume(here, waiting))
            began = time.monotonic()
            await trigger()
            assert len(await system.woken(receiving)) == 1
            if time.monotonic() - began < system.harness.prompt:
                return
        pytest.fail(f"none of {ATTEMPTS} messages was heard of within {system.harness.prompt:g} s")

    async def test_room_made_by_settling_is_used_at_once(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 2 * ATTEMPTS))
        subscription = system.consume(broker, queue, prefetch=1)
        held = await system.take(subscription)
        for _ in range(ATTEMPTS):
            receiving = await system.blocked(subscription)
            began = time.monotonic()
            await subscription.settle(acks(held))
            held = await system.woken(receiving)
            if time.monotonic() - began < system.harness.prompt:
                return
        pytest.fail("settling did not make room at once")

    async def test_the_next_of_a_key_is_handed_to_a_lane_at_once(self, system: System, broker: Broker) -> None:
        if not system.can.ordered:
            return
        queue = await system.declare(broker, "work", ordered=True)
        lane = await system.declare(broker, "work.lane", ordered=True, lane_of="work")
        for attempt in range(ATTEMPTS):
            await system.publish(broker, [message(name, key=f"k{attempt}") for name in ("work", "work.lane")])
            subscription, beside = system.consume(broker, queue), system.consume(broker, lane)
            held = await system.take(subscription)
            receiving = await system.blocked(beside)
            began = time.monotonic()
            await subscription.settle(acks(held))
            [got] = await system.woken(receiving)
            if time.monotonic() - began < system.harness.prompt:
                return
            await beside.settle(acks([got]))
        pytest.fail("the lane did not hear at once")
