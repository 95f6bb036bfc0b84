"""Priorities: the higher goes first, as finely as the system tells them apart."""

from __future__ import annotations

from penstock.brokers.base import Broker, Move, Queue, Release
from penstock.testing.conformance.harness import Promises, System, ids, message


def levels(count: int) -> list[int]:
    """At most ten priorities that a system with so many levels tells apart, ascending."""
    shown = min(count, 10)
    return [round(level * 255 / (shown - 1)) for level in range(shown)] if shown > 1 else [0]


async def prioritised(system: System, broker: Broker) -> Queue:
    return await system.declare(broker, "work", priorities=min(system.can.priorities, 10))


class PriorityPromises(Promises):
    async def test_the_higher_priority_is_received_first(self, system: System, broker: Broker) -> None:
        queue = await prioritised(system, broker)
        mixed = [0, 255] if not system.can.priorities else levels(system.can.priorities)[::2]
        mixed += [] if not system.can.priorities else levels(system.can.priorities)[1::2]
        await system.publish(broker, [message("work", priority=priority) for priority in mixed])
        subscription = system.consume(broker, queue)
        got = [one.priority for one in await system.take(subscription, len(mixed))]
        # Without priorities they still travel with the message.
        assert got == sorted(mixed, reverse=True) if system.can.priorities else sorted(got) == sorted(mixed)

    async def test_as_many_levels_are_told_apart_as_the_system_says(self, system: System, broker: Broker) -> None:
        if system.can.priorities < 256:
            return  # which of its levels a priority falls on is the adapter's own affair
        queue = await prioritised(system, broker)
        await system.publish(broker, [message("work", priority=priority) for priority in range(256)])
        subscription = system.consume(broker, queue)
        assert [one.priority for one in await system.take(subscription, 256)] == list(range(255, -1, -1))

    async def test_a_late_urgent_message_overtakes_those_that_wait(self, system: System, broker: Broker) -> None:
        if not system.can.priorities:
            return
        queue = await prioritised(system, broker)
        await system.publish(broker, [message("work") for _ in range(20)])
        subscription = system.consume(broker, queue, prefetch=1)
        [first] = await system.take(subscription)
        urgent = await system.publish(broker, [message("work", priority=255)])
        await subscription.settle([Release(first)])
        assert ids(await system.take(subscription)) == urgent

    async def test_a_released_message_keeps_its_priority(self, system: System, broker: Broker) -> None:
        if not system.can.priorities:
            return
        queue = await prioritised(system, broker)
        await system.publish(broker, [message("work", priority=priority) for priority in (0, 255, 0)])
        subscription = system.consume(broker, queue, prefetch=1)
        [first] = await system.take(subscription)
        await subscription.settle([Release(first)])
        assert ids(await system.take(subscription)) == [first.id]

    async def test_a_move_gives_the_priority_it_says(self, system: System, broker: Broker) -> None:
        if not system.can.priorities:
            return
        queue = await prioritised(system, broker)
        await system.publish(broker, [message("work", priority=priority) for priority in (100, 255)])
        subscription = system.consume(broker, queue, prefetch=1)
        [first] = await system.take(subscription)
        assert first.priority == 255
        await subscription.settle([Move(first, "work", message("work", id=first.id, priority=0))])
        [second] = await system.take(subscription)
        assert (second.id == first.id, second.priority) == (False, 100)
