"""Settling: a batch of verdicts, each carried out once, and only on what is ours."""

from __future__ import annotations

import asyncio
import time

from penstock.brokers.base import Ack, Broker, Move, Release, Settlement
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages


class SettlePromises(Promises):
    async def test_what_is_acknowledged_never_comes_again(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 5))
        subscription = system.consume(broker, queue)
        assert list(await subscription.settle(acks(await system.take(subscription, 5)))) == []
        await subscription.close()
        assert await system.silent(system.consume(await system.connect(), queue))

    async def test_only_what_is_named_is_acknowledged(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 5))
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, 5)
        await subscription.settle(acks([taken[1], taken[3]]))
        await subscription.close()
        left = await system.take(system.consume(broker, queue), 3)
        assert sorted(ids(left)) == sorted(ids([taken[0], taken[2], taken[4]]))

    async def test_settlements_may_be_under_way_together(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        aside = await system.declare(broker, "aside")
        sent = await system.publish(broker, messages("work", 6))
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, 6)
        moves = [Move(one, aside.name, message(aside.name, id=one.id)) for one in taken[:3]]
        outcomes = await asyncio.gather(subscription.settle(moves), subscription.settle(acks(taken[3:])))
        assert [list(lost) for lost in outcomes] == [[], []]
        await subscription.close()
        assert await system.silent(system.consume(broker, queue))
        assert sorted(ids(await system.drain(system.consume(broker, aside)))) == sorted(ids(taken[:3]))
        assert sorted(sent) == sorted(ids(taken))

    async def test_what_was_settled_stays_so_without_any_connection(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 4))
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, 4)
        await subscription.settle(acks(taken[:3]))
        keeper = None if system.can.durable else await system.connect()
        await broker.close()
        other = keeper or await system.connect()
        left = await system.drain(system.consume(other, queue))
        assert ids(left) == [id for id in sent if id == taken[3].id]

    async def test_a_released_message_comes_again_unchanged_and_uncounted(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        headers = {"n": 1, "s": "x"}
        await system.publish(broker, [message("work", b"\x00body", headers=headers, key="k", priority=3)])
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        assert list(await subscription.settle([Release(first)])) == []
        [second] = await system.take(subscription)
        assert (second.id, second.raw, dict(second.headers)) == (first.id, b"\x00body", headers)
        assert (second.key, second.priority, second.topic) == ("k", 3, "work")
        assert second.enqueued_at == first.enqueued_at
        assert second.redelivered == 0
        assert list(await subscription.settle([Ack(second)])) == []

    async def test_what_a_release_gives_back_need_not_be_held(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", b"body"), message("work", b"more")])
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 2)
        if system.can.releases_in_place:
            for delivery in held:
                delivery.raw = b""
        await subscription.settle([Release(held[0])])
        await subscription.close()
        again = await system.take(system.consume(await system.connect(), queue), 2)
        assert sorted(delivery.raw for delivery in again) == [b"body", b"more"]

    async def test_a_released_message_may_be_taken_by_anybody(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue, ahead=False)  # what it gives back is not pushed to it again
        await subscription.settle([Release(one) for one in await system.take(subscription)])
        assert ids(await system.take(system.consume(await system.connect(), queue))) == sent

    async def test_a_release_with_a_delay_waits_in_the_system(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        if not system.can.delay:
            return  # the engine never asks for one: `DelayPromises` has what holds instead
        began = time.monotonic()
        await subscription.settle([Release(held, delay=0.5)])
        await subscription.close()  # it does not wait in the consumer
        [again] = await system.take(system.consume(broker, queue))
        assert time.monotonic() - began >= 0.49
        assert ([again.id], again.redelivered) == (sent, 0)

    async def test_one_batch_carries_out_each_kind_of_verdict(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        await system.publish(broker, messages("work", 6))
        subscription = system.consume(broker, queue)
        one, two, three, four, five, six = await system.take(subscription, 6)
        items: list[Settlement] = [
            Ack(one),
            Move(two, "other", message("work", b"moved", id=two.id)),
            Release(three),
            Ack(four),
            Move(five, "other", message("work", b"moved", id=five.id)),
        ]
        assert list(await subscription.settle(items)) == []
        assert ids(await system.take(subscription, 1)) == [three.id]
        assert await system.silent(subscription)
        moved = await system.take(system.consume(broker, other), 2)
        assert sorted(ids(moved)) == sorted([two.id, five.id])
        assert list(await subscription.settle([Ack(six)])) == []

    async def test_settling_nothing_is_no_error(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        assert list(await subscription.settle([])) == []
        await system.silent(subscription)
        assert list(await subscription.settle([])) == []

    async def test_settling_again_says_that_it_is_no_longer_ours(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        first, second = await system.take(subscription, 2)
        await subscription.settle([Ack(first)])
        refused = await subscription.settle([Ack(first), Ack(second)])
        assert len(refused) == 1
        assert refused[0] is first

    async def test_settling_again_does_nothing_to_a_later_delivery_of_the_message(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        await subscription.settle([Release(first)])
        [second] = await system.take(subscription)
        refused = await subscription.settle([Ack(first)])
        assert [one is first for one in refused] == [True]
        await subscription.close()
        [third] = await system.take(system.consume(broker, queue))
        assert ([third.id], second.id) == (sent, third.id)

    async def test_moving_again_does_not_double(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        move = Move(held, "other", message("work", id=held.id))
        assert list(await subscription.settle([move])) == []
        assert [one is held for one in await subscription.settle([move])] == [True]
        assert ids(await system.drain(system.consume(broker, other))) == [held.id]

    async def test_what_another_subscription_holds_is_not_ours_to_settle(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        holder = system.consume(broker, queue)
        stranger = system.consume(broker, queue)
        assert len(held := await system.take(holder)) == 1
        assert await system.silent(stranger)
        assert [one is held[0] for one in await stranger.settle(acks(held))] == [True]
        assert list(await holder.settle(acks(held))) == []

    async def test_settling_after_close_does_nothing_and_says_so(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 2)
        await subscription.close()
        assert len(await subscription.settle(acks(held))) == 2
        assert sorted(ids(await system.take(system.consume(broker, queue), 2))) == sorted(sent)

    async def test_the_order_of_verdicts_is_free(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 20))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 20)
        for one in reversed(held):
            assert list(await subscription.settle([Ack(one)])) == []
        assert await system.silent(subscription)
