"""Receiving: as soon as there is one, never more than asked for, nothing lost by cancelling."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock.brokers.base import Broker, Queue, Release
from penstock.errors import BrokerError
from penstock.message import Delivery
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages
from penstock.testing.waiting import eventually


class ReceivePromises(Promises):
    async def test_one_call_returns_at_most_its_limit(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 10))
        subscription = system.consume(broker, queue)
        for _ in range(3):
            assert 1 <= len(await subscription.receive(3, system.harness.patience)) <= 3

    async def test_one_message_is_handed_over_without_waiting_for_more(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        receiving = asyncio.create_task(system.consume(broker, queue).receive(100, system.harness.patience))
        assert ids(await system.woken(receiving)) == sent

    async def test_an_empty_queue_answers_with_nothing_after_the_wait_and_not_before(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        await subscription.receive(1, 0)  # joining may take its own time
        began = time.monotonic()
        assert await subscription.receive(10, 0.3) == []
        assert 0.29 <= time.monotonic() - began < system.harness.patience / 2

    async def test_no_wait_returns_at_once(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        async with asyncio.timeout(system.harness.patience / 2):
            assert await system.consume(broker, queue).receive(10, 0) == []

    async def test_a_message_published_by_another_connection_ends_the_wait(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        receiving = await system.blocked(system.consume(broker, queue))
        sent = await system.publish(await system.connect(), messages("work", 1))
        assert ids(await system.woken(receiving)) == sent

    async def test_a_message_given_back_by_another_consumer_ends_the_wait(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        first = system.consume(broker, queue, ahead=False)  # what it gives back is not pushed to it again
        [held] = await system.take(first)
        receiving = await system.blocked(system.consume(await system.connect(), queue, prefetch=1))
        await first.settle([Release(held)])
        assert ids(await system.woken(receiving)) == sent

    async def test_a_held_message_is_given_to_nobody_else(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        first = system.consume(broker, queue)
        await system.take(first, 3)
        assert await system.silent(first)
        assert await system.silent(system.consume(broker, queue))
        assert await system.silent(system.consume(await system.connect(), queue))

    async def test_no_more_than_prefetch_are_held_unsettled(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 10))
        subscription = system.consume(broker, queue, prefetch=4)
        held = await system.take(subscription, 4)
        assert await system.silent(subscription)
        await subscription.settle(acks(held[:1]))
        assert len(await subscription.receive(10, system.harness.patience)) == 1
        assert await system.silent(subscription)

    async def test_what_one_consumer_may_not_hold_goes_to_another(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 5))
        held = await system.take(system.consume(broker, queue, prefetch=2), 2)
        rest = await system.take(system.consume(await system.connect(), queue, prefetch=10), 3)
        assert sorted(ids(held) + ids(rest)) == sorted(sent)

    async def test_with_nothing_ahead_only_what_was_asked_for_is_held(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        modest = system.consume(broker, queue, ahead=False)
        assert await system.silent(modest)
        sent = await system.publish(broker, messages("work", 4))
        held = await system.take(modest)
        rest = await system.take(system.consume(await system.connect(), queue), 3)
        assert sorted(ids(held) + ids(rest)) == sorted(sent)
        assert not await modest.settle(acks(held))

    async def test_settling_makes_room_for_a_call_that_waits(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        subscription = system.consume(broker, queue, prefetch=2)
        held = await system.take(subscription, 2)
        receiving = await system.blocked(subscription)
        await subscription.settle(acks(held))
        assert len(await system.woken(receiving)) == 1

    async def test_cancelling_loses_nothing_and_doubles_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 200))
        subscription = system.consume(broker, queue)
        taken: list[Delivery] = []
        for turns in range(40):  # cancelled at every stage that a call goes through
            receiving = asyncio.create_task(subscription.receive(2, system.harness.patience))
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                taken += receiving.result()
        taken += await system.take(subscription, 200 - len(taken))
        assert sorted(ids(taken)) == sorted(sent)
        assert {delivery.redelivered for delivery in taken} == {0}
        assert not await subscription.settle(acks(taken))

    async def test_cancelling_never_exceeds_prefetch(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 20))
        subscription = system.consume(broker, queue, prefetch=3)
        taken: list[Delivery] = []
        for turns in range(12):
            receiving = asyncio.create_task(subscription.receive(2, system.harness.quiet))
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                taken += receiving.result()
        taken += await system.take(subscription, 3 - len(taken))
        assert await system.silent(subscription)
        assert len(await system.take(system.consume(broker, queue), 17)) == 17

    async def test_what_was_taken_for_a_cancelled_call_is_released_on_close(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        for turns in range(10):
            sent = await system.publish(broker, messages("work", 3))
            receiving = asyncio.create_task(subscription.receive(10, system.harness.patience))
            for _ in range(turns):
                await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.wait({receiving})
            await subscription.close()
            subscription = system.consume(broker, queue)
            taken = await system.take(subscription, 3)
            assert sorted(ids(taken)) == sorted(sent)
            assert {delivery.redelivered for delivery in taken} == {0}
            await subscription.settle(acks(taken))

    async def test_cancelling_a_call_that_waits_leaves_the_subscription_usable(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        receiving = await system.blocked(subscription)
        receiving.cancel()
        await asyncio.wait({receiving})
        assert receiving.cancelled()
        sent = await system.publish(broker, messages("work", 2))
        assert sorted(ids(await system.take(subscription, 2))) == sorted(sent)

    async def test_consuming_is_true_from_the_first_call_until_close(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        receiving = asyncio.create_task(subscription.receive(1, system.harness.patience))
        await eventually(lambda: subscription.consuming)
        await subscription.close()
        assert not subscription.consuming
        assert await system.woken(receiving) == []

    async def test_a_queue_that_was_never_declared_is_an_error_and_no_silent_wait(
        self, system: System, broker: Broker
    ) -> None:
        subscription = system.consume(broker, Queue("never"))
        with pytest.raises(BrokerError):
            await subscription.receive(1, system.harness.patience)

    async def test_a_message_for_one_queue_is_not_received_from_another(self, system: System, broker: Broker) -> None:
        await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        await system.publish(broker, [message("work")])
        assert await system.silent(system.consume(broker, other))
