"""Leases: the living keep what they hold, the dead are taken over, the late are refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from penstock.brokers.base import Ack, Broker, Move, Queue, Subscription
from penstock.errors import BrokerUnavailable
from penstock.message import Delivery
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages
from penstock.testing.elsewhere import Elsewhere
from penstock.testing.waiting import eventually


class Sleeper:
    """A consumer elsewhere that holds some messages and can be frozen."""

    def __init__(self, system: System, place: Elsewhere, subscription: Subscription, lost: list[Delivery]) -> None:
        self.place = place
        self.subscription = subscription
        self.lost = lost
        self._system = system
        self.held: list[Delivery] = []

    @classmethod
    async def holding(cls, system: System, queue: Queue, count: int) -> Sleeper:
        place, broker = await system.elsewhere()
        lost: list[Delivery] = []

        def on_lost(deliveries: Sequence[Delivery]) -> None:
            asyncio.get_running_loop()  # it is called in the event loop
            assert all(delivery.lost for delivery in deliveries)
            lost.extend(deliveries)

        subscription = system.consume(broker, queue, lease=system.harness.lease, on_lost=on_lost)
        sleeper = cls(system, place, subscription, lost)
        sleeper.held = await place.run(system.take(subscription, count))
        return sleeper

    async def settle(self, verdicts: Sequence[Ack | Move]) -> list[Delivery]:
        async def settle() -> list[Delivery]:
            return list(await self.subscription.settle(verdicts))

        return await self.place.run(settle())

    async def has_lost(self, count: int) -> bool:
        """Whether `on_lost` told of so many, in the loop of the consumer."""

        async def look() -> bool:
            return len(self.lost) >= count

        return await self.place.run(look())

    async def is_refused(self, verdicts: Sequence[Ack | Move]) -> bool:
        """Whether all of it is known to be no longer this consumer's."""
        try:
            return len(await self.settle(verdicts)) == len(verdicts)
        except BrokerUnavailable:
            return False


class LeasePromises(Promises):
    async def test_what_a_dead_consumer_held_is_handed_to_another_counted(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 5))
        held = await system.crash_consumer(queue, 3)
        subscription = system.consume(broker, queue, lease=system.harness.lease)
        taken = await system.take(subscription, 5)
        assert sorted(ids(taken)) == sorted(sent)
        assert {one.id: one.redelivered for one in taken} == {id: int(id in held) for id in sent}
        assert not await subscription.settle(acks(taken))

    async def test_a_consumer_that_waits_already_takes_over_within_the_lease(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 2))
        await system.crash_consumer(queue, 2)
        subscription = system.consume(broker, queue, lease=system.harness.lease)
        receiving = asyncio.create_task(subscription.receive(10, system.harness.patience))
        assert sorted(ids(await system.woken(receiving))) == sorted(sent)

    async def test_each_loss_is_counted(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        keeper = await system.declare(broker, "keeper")
        watching = system.consume(broker, keeper, lease=system.harness.lease)  # somebody has to be alive to notice
        noticing = asyncio.create_task(watching.receive(1, 10 * system.harness.patience))
        for _ in range(2):
            assert await system.crash_consumer(queue, 1) == sent
        subscription = system.consume(broker, queue, lease=system.harness.lease)
        [got] = await system.take(subscription)
        assert ([got.id], got.redelivered) == (sent, 2)
        await watching.close()
        await noticing

    async def test_a_move_begins_the_count_anew(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        await system.publish(broker, messages("work", 1))
        await system.crash_consumer(queue, 1)
        subscription = system.consume(broker, queue, lease=system.harness.lease)
        [suspect] = await system.take(subscription)
        assert suspect.redelivered == 1
        await subscription.settle([Move(suspect, "other", message("work", id=suspect.id))])
        [moved] = await system.take(system.consume(broker, other))
        assert (moved.id, moved.redelivered) == (suspect.id, 0)

    async def test_a_consumer_keeps_its_messages_while_its_loop_turns(self, system: System, broker: Broker) -> None:
        lease = system.harness.lease
        if system.can.max_lease is not None:
            assert system.can.max_lease >= 3 * lease, "the suite's lease has to be well below the ceiling"
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 2))
        lost: list[Delivery] = []
        subscription = system.consume(broker, queue, lease=lease, on_lost=lost.extend)
        held = await system.take(subscription, 2)
        other = system.consume(await system.connect(), queue, lease=lease)
        assert await other.receive(10, 3 * lease) == []  # nobody receives, settles or does anything for the first
        assert list(await subscription.settle(acks(held))) == []
        assert not lost

    async def test_a_consumer_in_a_blocked_receive_is_alive(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        lease = system.harness.lease
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue, lease=lease)
        held = await system.take(subscription)
        assert await subscription.receive(1, 3 * lease) == []
        assert list(await subscription.settle(acks(held))) == []

    async def test_a_late_settlement_is_refused_and_does_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.declare(broker, "other")
        await system.publish(broker, messages("work", 3))
        sleeper = await Sleeper.holding(system, queue, 3)
        sleeper.place.freeze()
        successor = system.consume(broker, queue)
        taken = await system.take(successor, 3)
        sleeper.place.thaw()
        one, two, three = sleeper.held
        verdicts: list[Ack | Move] = [Ack(one), Move(two, "other", message("work", id=two.id)), Ack(three)]
        if not system.can.fenced:
            # The system cannot tell a late one, so what comes before the loss is known has any outcome. It takes
            # nothing from the successor; a move may leave a double; once the loss is known, all are refused.
            await eventually(lambda: sleeper.is_refused(verdicts), system.harness.patience)
            assert await system.silent(successor)
            assert list(await successor.settle(acks(taken))) == []
            assert {*ids(await system.consume(broker, Queue("other")).receive(10, system.harness.quiet))} <= {two.id}
            return
        refused = await sleeper.settle(verdicts)
        assert sorted(map(id, refused)) == sorted(map(id, sleeper.held))
        assert await system.silent(system.consume(broker, Queue("other")))
        assert list(await successor.settle(acks(taken))) == []  # still theirs

    async def test_the_engine_is_told_of_what_was_lost(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        sleeper = await Sleeper.holding(system, queue, 3)
        sleeper.place.freeze()
        await system.take(system.consume(broker, queue), 3)
        sleeper.place.thaw()
        await eventually(lambda: sleeper.has_lost(3), system.harness.patience)
        assert sorted(map(id, sleeper.lost)) == sorted(map(id, sleeper.held))
        assert all(one.lost for one in sleeper.held)

    async def test_what_was_settled_before_is_not_reported_as_lost(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        sleeper = await Sleeper.holding(system, queue, 3)
        assert await sleeper.settle(acks(sleeper.held[:1])) == []
        sleeper.place.freeze()
        await system.take(system.consume(broker, queue), 2)
        sleeper.place.thaw()
        await eventually(lambda: sleeper.has_lost(2), system.harness.patience)
        assert sorted(map(id, sleeper.lost)) == sorted(map(id, sleeper.held[1:]))

    async def test_a_late_settlement_reports_each_loss_once(self, system: System, broker: Broker) -> None:
        if not system.can.fenced:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        sleeper = await Sleeper.holding(system, queue, 3)
        sleeper.place.freeze()
        await system.take(system.consume(broker, queue), 3)
        sleeper.place.thaw()
        assert len(await sleeper.settle(acks(sleeper.held[:1]))) == 1
        assert all(one.lost for one in sleeper.held)
        await eventually(lambda: sleeper.has_lost(3), system.harness.patience)
        assert sorted(map(id, sleeper.lost)) == sorted(map(id, sleeper.held))

    async def test_after_a_loss_consumption_goes_on_by_itself(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        sleeper = await Sleeper.holding(system, queue, 1)
        sleeper.place.freeze()
        successor = system.consume(broker, queue)
        await successor.settle(acks(await system.take(successor)))
        await successor.close()
        sleeper.place.thaw()
        sent = await system.publish(broker, messages("work", 2))
        taken = await sleeper.place.run(system.take(sleeper.subscription, 2))
        assert sorted(ids(taken)) == sorted(sent)
        assert sleeper.subscription.consuming
        assert await sleeper.settle(acks(taken)) == []

    async def test_a_lost_delivery_does_not_settle_its_own_successor(self, system: System, broker: Broker) -> None:
        """Taken from a consumer and given back to the same one: the first delivery is void."""
        if not system.can.fenced:
            return
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        sleeper = await Sleeper.holding(system, queue, 1)
        sleeper.place.freeze()
        successor = system.consume(broker, queue)
        await system.take(successor)
        await successor.close()
        sleeper.place.thaw()
        [again] = await sleeper.place.run(system.take(sleeper.subscription, 1))
        assert ([again.id], again.redelivered) == (sent, 1)
        [first] = sleeper.held
        assert [one is first for one in await sleeper.settle([Ack(first)])] == [True]
        assert await sleeper.settle([Ack(again)]) == []

    async def test_close_releases_what_is_held_uncounted_and_at_once(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        lost: list[Delivery] = []
        subscription = system.consume(broker, queue, on_lost=lost.extend)  # its lease is far longer than the wait below
        await system.take(subscription, 3)
        receiving = await system.blocked(system.consume(await system.connect(), queue))
        await subscription.close()
        taken = await system.woken(receiving)
        assert set(ids(taken)) <= set(sent)
        assert {one.redelivered for one in taken} == {0}
        assert not lost

    async def test_a_message_that_is_settled_is_not_taken_over(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 2))
        sleeper = await Sleeper.holding(system, queue, 2)
        assert await sleeper.settle(acks(sleeper.held[:1])) == []
        sleeper.place.freeze()
        subscription = system.consume(broker, queue, lease=system.harness.lease)
        assert ids(await system.take(subscription)) == ids(sleeper.held[1:])
        assert await system.silent(subscription)

    async def test_a_short_stall_costs_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        sleeper = await Sleeper.holding(system, queue, 1)
        sleeper.place.freeze()
        began = time.monotonic()
        other = system.consume(broker, queue, lease=system.harness.lease)
        assert await other.receive(1, system.harness.lease / 4) == []
        sleeper.place.thaw()
        if time.monotonic() - began < system.harness.lease / 2:  # else this machine stalled too
            assert await sleeper.settle(acks(sleeper.held)) == []
