"""Delays: they wait in the system, and end there."""

from __future__ import annotations

import time

import pytest

from penstock.brokers.base import Broker, Move, Release
from penstock.errors import PublishError, Unsupported
from penstock.testing.conformance.harness import Promises, System, ids, message, messages

DELAY = 0.5  # seconds; a message seen before this is over came too early


class DelayPromises(Promises):
    async def test_a_delayed_message_comes_when_its_delay_is_over(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        delayed = message("work", delay=DELAY)
        if not system.can.delay:
            # Refused, as an error of the message or as a whole: never delivered at once without a word.
            try:
                outcomes = await broker.publish([delayed])
            except Unsupported:
                pass
            else:
                assert isinstance(outcomes[0], PublishError)
            assert await system.silent(system.consume(broker, queue))
            return
        began = time.monotonic()
        await system.publish(broker, [delayed])
        [got] = await system.take(system.consume(broker, queue))
        assert time.monotonic() - began >= DELAY - 0.01
        assert (got.id, got.redelivered) == (delayed.id, 0)

    async def test_a_system_without_delays_refuses_to_release_with_one(self, system: System, broker: Broker) -> None:
        if system.can.delay:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        with pytest.raises(Unsupported):
            await subscription.settle([Release(held, delay=DELAY)])
        assert not await subscription.settle([Release(held)])  # nothing had been done to it

    async def test_a_consumer_that_waits_already_gets_it_in_time(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        receiving = await system.blocked(system.consume(broker, queue))
        sent = await system.publish(await system.connect(), [message("work", delay=DELAY)])
        assert ids(await system.woken(receiving)) == sent

    async def test_a_delayed_message_holds_up_no_other(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        _, *rest = await system.publish(broker, [message("work", delay=60.0), *messages("work", 3)])
        subscription = system.consume(broker, queue)
        assert sorted(ids(await system.take(subscription, 3))) == sorted(rest)
        later = await system.publish(broker, messages("work", 1))
        assert ids(await system.take(subscription)) == later

    async def test_the_shorter_delay_ends_first(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, [message("work", delay=delay) for delay in (60.0, 0.4, 30.0)])
        subscription = system.consume(broker, queue)
        assert ids(await system.take(subscription)) == sent[1:2]
        assert await system.silent(subscription)

    async def test_a_short_delay_after_a_long_one_is_not_overslept(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", delay=120.0)])
        receiving = await system.blocked(system.consume(broker, queue))
        sent = await system.publish(broker, [message("work", delay=DELAY)])
        assert ids(await system.woken(receiving)) == sent

    async def test_a_delay_goes_on_while_nobody_is_connected(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        keeper = None if system.can.durable else await system.connect()
        began = time.monotonic()
        sent = await system.publish(broker, [message("work", delay=DELAY)])
        await broker.close()
        [got] = await system.take(system.consume(keeper or await system.connect(), queue))
        assert time.monotonic() - began >= DELAY - 0.01
        assert [got.id] == sent

    async def test_a_move_may_delay(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue, prefetch=1)
        [held] = await system.take(subscription)
        began = time.monotonic()
        await subscription.settle([Move(held, "work", message("work", id=held.id, delay=DELAY))])
        [again] = await system.take(subscription)  # what is delayed takes up no prefetch
        assert time.monotonic() - began >= DELAY - 0.01
        assert again.id == held.id

    async def test_released_with_different_delays_each_comes_in_its_time(self, system: System, broker: Broker) -> None:
        if not system.can.delay:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 3))
        subscription = system.consume(broker, queue)
        one, two, three = await system.take(subscription, 3)
        await subscription.settle([Release(one, 60.0), Release(two), Release(three, 0.4)])
        assert [(await system.take(subscription))[0].id for _ in range(2)] == [two.id, three.id]
        assert await system.silent(subscription)
