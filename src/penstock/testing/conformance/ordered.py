"""Ordered queues: the messages of one key one after another, other keys beside them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict

import pytest

from penstock.brokers.base import Ack, Broker, Move, Queue, Release, Subscription
from penstock.errors import QueueMismatch, Unsupported
from penstock.testing.conformance.harness import Promises, System, acks, ids, message
from penstock.testing.waiting import eventually


async def work(system: System, broker: Broker) -> Queue | None:
    """An ordered queue; None where the system has none, which it must have said."""
    if system.can.ordered:
        return await system.declare(broker, "work", ordered=True)
    with pytest.raises(Unsupported):
        await broker.declare(Queue("work", ordered=True))
    return None


class OrderedPromises(Promises):
    async def test_one_message_of_a_key_is_in_hand_at_a_time(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        sent = await system.publish(broker, [message("work", key="k") for _ in range(3)])
        subscription = system.consume(broker, queue)
        other = system.consume(await system.connect(), queue)
        for id in sent:
            taken = await subscription.receive(10, system.harness.patience)
            assert ids(taken) == [id]
            assert await system.silent(other)
            await subscription.settle(acks(taken))

    async def test_other_keys_and_messages_without_one_do_not_wait(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        keys = ["a", "a", "b", "b", None, None, "c", ""]
        sent = await system.publish(broker, [message("work", key=key) for key in keys])
        taken = await system.take(system.consume(broker, queue), 6)
        assert sorted(ids(taken)) == sorted(sent[number] for number in (0, 2, 4, 5, 6, 7))

    async def test_the_order_holds_among_several_consumers(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        await system.publish(
            broker, [message("work", str(number).encode(), key=f"k{number % 7}") for number in range(140)]
        )
        seen: dict[str | None, list[int]] = defaultdict(list)
        in_hand: set[str | None] = set()
        left = 140

        async def consume(subscription: Subscription) -> None:
            nonlocal left
            while left:
                for one in await subscription.receive(5, 0.05):
                    assert one.key not in in_hand
                    in_hand.add(one.key)
                    await asyncio.sleep(0)
                    seen[one.key].append(int(one.raw))
                    in_hand.discard(one.key)
                    left -= 1
                    await subscription.settle([Ack(one)])

        brokers = [broker, await system.connect()]
        async with asyncio.timeout(4 * system.harness.patience):
            await asyncio.gather(*(consume(system.consume(brokers[n % 2], queue, prefetch=5)) for n in range(4)))
        assert seen == {f"k{key}": list(range(key, 140, 7)) for key in range(7)}

    async def test_settling_sets_the_next_one_free_for_a_consumer_that_waits(
        self, system: System, broker: Broker
    ) -> None:
        if (queue := await work(system, broker)) is None:
            return
        _, second = await system.publish(broker, [message("work", key="k") for _ in range(2)])
        subscription = system.consume(broker, queue)
        held = await system.take(subscription)
        receiving = await system.blocked(system.consume(await system.connect(), queue))
        await subscription.settle(acks(held))
        assert ids(await system.woken(receiving)) == [second]

    async def test_a_released_message_keeps_its_place(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        sent = await system.publish(broker, [message("work", key="k") for _ in range(3)])
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        await subscription.settle([Release(first)])
        assert ids(await system.take(subscription)) == sent[:1]
        assert await system.silent(subscription)

    async def test_a_delayed_message_is_waited_for_by_those_of_its_key(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None or not system.can.delay:
            return
        sent = await system.publish(broker, [message("work", key=key) for key in ("k", "k", "other")])
        subscription = system.consume(broker, queue)
        held = {one.key: one for one in await system.take(subscription, 2)}
        await subscription.settle([Release(held["k"], delay=0.4), Ack(held["other"])])
        [again] = await system.take(subscription)
        assert again.id == sent[0]
        await subscription.settle([Ack(again)])
        assert ids(await system.take(subscription)) == [sent[1]]

    async def test_a_message_moved_within_its_queue_keeps_its_place(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        sent = await system.publish(broker, [message("work", key="k") for _ in range(3)])
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        delay = 0.3 if system.can.delay else 0.0
        again = message("work", id=first.id, key="k", headers={"penstock-attempt": 1}, delay=delay)
        await subscription.settle([Move(first, "work", again)])
        taken = [await system.take(subscription)]
        for _ in range(2):
            await subscription.settle(acks(taken[-1]))
            taken.append(await system.take(subscription))
        assert [ids(one) for one in taken] == [[id] for id in sent]

    async def test_a_message_moved_away_lets_the_next_one_go(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        await system.declare(broker, "work.dead")
        _, second = await system.publish(broker, [message("work", key="k") for _ in range(2)])
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        await subscription.settle([Move(first, "work.dead", message("work", id=first.id, key="k"))])
        assert ids(await system.take(subscription)) == [second]

    async def test_a_message_that_comes_back_waits_for_the_one_in_hand(self, system: System, broker: Broker) -> None:
        """A replayed dead letter is older than what is being worked on."""
        if (queue := await work(system, broker)) is None:
            return
        dead = await system.declare(broker, "work.dead")
        first, second, third = await system.publish(broker, [message("work", key="k") for _ in range(3)])
        subscription, grave = system.consume(broker, queue), system.consume(broker, dead)
        [failed] = await system.take(subscription)
        await subscription.settle([Move(failed, "work.dead", message("work", id=first, key="k"))])
        [working] = await system.take(subscription)
        assert working.id == second
        [buried] = await system.take(grave)
        await grave.settle([Move(buried, "work", message("work", id=first, key="k"))])
        assert await system.silent(subscription)
        await subscription.settle([Ack(working)])
        rest = []
        for _ in range(2):
            [one] = await subscription.receive(10, system.harness.patience)
            rest.append(one.id)
            assert await system.silent(subscription)
            await subscription.settle([Ack(one)])
        assert sorted(rest) == sorted([first, third])

    async def test_what_expires_behind_the_one_in_hand_sets_nothing_free(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None or not system.can.expiry:
            return
        dead = await system.declare(broker, "work.dead")
        expires_at = time.time() + 1.0
        last = message("work", key="k", expires_at=expires_at)
        first, _, _ = await system.publish(broker, [message("work", key="k"), message("work", key="k"), last])
        subscription, grave = system.consume(broker, queue), system.consume(broker, dead)
        [failed] = await system.take(subscription)
        await subscription.settle([Move(failed, "work.dead", message("work", id=first, key="k"))])
        [working] = await system.take(subscription)
        [buried] = await system.take(grave)
        await grave.settle([Move(buried, "work", message("work", id=first, key="k"))])
        await eventually(lambda: time.time() > expires_at + 0.05)
        assert await system.silent(subscription)
        await subscription.settle([Ack(working)])
        assert ids(await system.take(subscription)) == [first]

    async def test_a_lane_shares_the_key_order_of_its_queue(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        lane = await system.declare(broker, "work.lane", ordered=True, lane_of="work")
        _, second, other = await system.publish(broker, [message("work", key=key) for key in ("k", "k", "l")])
        subscription, beside = system.consume(broker, queue), system.consume(await system.connect(), lane)
        held = {one.key: one for one in await system.take(subscription, 2)}
        await subscription.settle([Move(held["k"], "work.lane", message("work", id=held["k"].id, key="k"))])
        [suspect] = await system.take(beside)
        assert suspect.id == held["k"].id
        assert await system.silent(subscription)  # the next of its key waits although the queue is another
        receiving = await system.blocked(subscription)
        await beside.settle([Ack(suspect)])
        assert ids(await system.woken(receiving)) == [second]
        assert held["l"].id == other

    async def test_a_lane_waits_for_its_queue(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None:
            return
        lane = await system.declare(broker, "work.lane", ordered=True, lane_of="work")
        await system.publish(broker, [message("work", key="k")])
        late = await system.publish(broker, [message("work.lane", key="k")])
        subscription, beside = system.consume(broker, queue), system.consume(await system.connect(), lane)
        held = await system.take(subscription)
        receiving = await system.blocked(beside)
        await subscription.settle(acks(held))
        assert ids(await system.woken(receiving)) == late

    async def test_an_expired_message_holds_up_no_other_of_its_key(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None or not (system.can.expiry and system.can.delay):
            return
        expiring = message("work", key="k", delay=60.0, expires_at=time.time() + 0.3)
        _, second = await system.publish(broker, [expiring, message("work", key="k")])
        receiving = await system.blocked(system.consume(broker, queue))
        assert ids(await system.woken(receiving)) == [second]

    async def test_a_queue_is_ordered_or_not_from_its_beginning(self, system: System, broker: Broker) -> None:
        if (await work(system, broker)) is None:
            return
        with pytest.raises(QueueMismatch):
            await broker.declare(Queue("work"))
        await broker.declare(Queue("plain"))
        with pytest.raises(QueueMismatch):
            await broker.declare(Queue("plain", ordered=True))

    async def test_an_unordered_queue_takes_no_account_of_keys(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", key="k") for _ in range(3)])
        assert len(await system.take(system.consume(broker, queue), 3)) == 3

    async def test_a_purge_leaves_the_message_in_hand_and_the_order(self, system: System, broker: Broker) -> None:
        if (queue := await work(system, broker)) is None or broker.admin is None:
            return
        await system.publish(broker, [message("work", key="k") for _ in range(4)])
        subscription = system.consume(broker, queue)
        held = await system.take(subscription)
        assert await broker.admin.purge("work") == 3
        later = await system.publish(broker, [message("work", key="k") for _ in range(2)])
        assert await system.silent(subscription)
        for id in later:
            await subscription.settle(acks(held))
            held = await subscription.receive(10, system.harness.patience)
            assert ids(held) == [id]
