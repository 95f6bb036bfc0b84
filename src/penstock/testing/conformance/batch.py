"""Batches: thousands at once, shared among consumers without overlap, fair among queues."""

from __future__ import annotations

import asyncio

from penstock.brokers.base import Broker, Subscription
from penstock.message import Delivery
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages

MANY = 5000


class BatchPromises(Promises):
    async def test_thousands_in_one_publish_all_arrive(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, batch := messages("work", MANY))
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, MANY)
        assert sorted(ids(taken)) == sorted(sent)
        assert {one.id: one.raw for one in taken} == {one.id: one.body for one in batch}
        assert list(await subscription.settle(acks(taken))) == []
        assert await system.silent(subscription)

    async def test_thousands_of_outcomes_stay_with_their_messages(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        batch = [message("nowhere" if number % 7 == 0 else "work") for number in range(1000)]
        outcomes = await broker.publish(batch)
        assert [outcome is None for outcome in outcomes] == [one.topic == "work" for one in batch]
        taken = await system.take(system.consume(broker, queue), sum(one.topic == "work" for one in batch))
        assert sorted(ids(taken)) == sorted(one.id for one in batch if one.topic == "work")

    async def test_several_consumers_share_a_queue_without_overlap(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1000))
        seen: list[str] = []

        async def consume(subscription: Subscription) -> int:
            own = 0
            while len(seen) < 1000:
                taken = await subscription.receive(20, 0.05)
                seen.extend(ids(taken))
                own += len(taken)
                assert list(await subscription.settle(acks(taken))) == []
                await asyncio.sleep(0)  # a system that answers at once must not answer one of us only
            return own

        brokers = [broker, await system.connect(), await system.connect()]
        async with asyncio.timeout(4 * system.harness.patience):
            shares = await asyncio.gather(
                *(consume(system.consume(brokers[number % 3], queue, prefetch=20)) for number in range(5))
            )
        assert sorted(seen) == sorted(sent)
        assert sum(share > 0 for share in shares) > 1

    async def test_prefetch_is_never_exceeded_under_load(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 300))
        subscription = system.consume(broker, queue, prefetch=7)
        held: list[Delivery] = []
        seen: list[str] = []
        most = 0

        async def settle() -> None:
            while len(seen) < 300:
                part, held[:] = held[:3], held[3:]
                seen.extend(ids(part))
                await subscription.settle(acks(part))
                await asyncio.sleep(0)

        settling = asyncio.create_task(settle())
        while len(seen) + len(held) < 300:
            held += await subscription.receive(100, 0.05)
            most = max(most, len(held))
        await settling
        assert sorted(seen) == sorted(sent)
        assert most <= 7

    async def test_no_queue_of_a_subscription_starves(self, system: System, broker: Broker) -> None:
        busy = await system.declare(broker, "busy")
        quiet = [await system.declare(broker, name) for name in ("quiet", "calm")]
        await system.publish(broker, [*messages("busy", 1000), message("quiet"), message("calm")])
        subscription = system.consume(broker, busy, *quiet, prefetch=5)
        seen: set[str] = set()
        rounds = 0
        while not {"quiet", "calm"} <= seen:
            taken = await subscription.receive(5, system.harness.patience)
            seen.update(one.queue for one in taken)
            await subscription.settle(acks(taken))
            rounds += 1
        assert rounds <= 20  # long before the busy one is empty

    async def test_a_full_queue_beside_an_empty_one_is_not_slowed_down(self, system: System, broker: Broker) -> None:
        busy = await system.declare(broker, "busy")
        empty = await system.declare(broker, "empty")
        await system.publish(broker, messages("busy", 50))
        subscription = system.consume(broker, empty, busy)
        async with asyncio.timeout(system.harness.patience / 2):
            assert len(await system.take(subscription, 50)) == 50

    async def test_settlements_by_the_thousand_are_one_call(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3000))
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, 3000)
        first = await subscription.settle(acks(taken[:2000]))
        second = await subscription.settle(acks(taken))
        assert list(first) == []
        assert sorted(ids(second)) == sorted(ids(taken[:2000]))
        assert await system.silent(subscription)
