"""Moving: the one primitive behind retry, delay, dead letter and replay."""

from __future__ import annotations

import pytest

from penstock.brokers.base import Ack, Broker, Move
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery, Outgoing
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages


def rewritten(delivery: Delivery, **changes: object) -> Outgoing:
    """The same message with other fields."""
    fields: dict[str, object] = {
        "id": delivery.id,
        "headers": dict(delivery.headers),
        "key": delivery.key,
        "priority": delivery.priority,
        "enqueued_at": delivery.enqueued_at,
    }
    return message(delivery.topic, delivery.raw, **{**fields, **changes})


class MovePromises(Promises):
    async def test_a_moved_message_leaves_its_queue_and_arrives_in_the_other(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        assert list(await subscription.settle([Move(held, "work.dead", rewritten(held))])) == []
        assert await system.silent(subscription)
        assert ids(await system.drain(system.consume(broker, dead))) == sent

    async def test_it_arrives_as_the_move_says(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        await system.publish(broker, [message("work", b"before", headers={"old": 1}, key="k")])
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        changed = Outgoing(
            id=held.id, topic=held.topic, body=b"after", headers={"new": 2.5}, key="l", priority=9, enqueued_at=12.5
        )
        await subscription.settle([Move(held, "work.dead", changed)])
        [moved] = await system.take(system.consume(broker, dead))
        assert (moved.queue, moved.topic, moved.id, moved.raw) == ("work.dead", "work", held.id, b"after")
        assert (dict(moved.headers), moved.key, moved.priority) == ({"new": 2.5}, "l", 9)
        assert (moved.enqueued_at, moved.expires_at, moved.redelivered) == (12.5, None, 0)

    async def test_it_goes_to_exactly_one_queue_whatever_is_bound_to_its_topic(
        self, system: System, broker: Broker
    ) -> None:
        work = await system.declare(broker, "work")
        spare = await system.declare(broker, "spare")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, work)
        [held] = await system.take(subscription)
        # Its topic is `work`, to which the queue it leaves is bound.
        await subscription.settle([Move(held, "spare", rewritten(held))])
        assert len(await system.drain(system.consume(broker, spare))) == 1
        assert await system.silent(subscription)

    async def test_moved_within_its_queue_it_comes_again_changed(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        await subscription.settle([Move(first, "work", rewritten(first, headers={"penstock-attempt": 1}))])
        [second] = await system.take(subscription)
        assert (second.id, dict(second.headers)) == (first.id, {"penstock-attempt": 1})
        assert list(await subscription.settle([Ack(second)])) == []
        assert await system.silent(subscription)

    async def test_the_old_delivery_of_a_moved_message_settles_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [first] = await system.take(subscription)
        await subscription.settle([Move(first, "work", rewritten(first))])
        [second] = await system.take(subscription)
        assert [one is first for one in await subscription.settle([Ack(first)])] == [True]
        assert list(await subscription.settle([Ack(second)])) == []

    async def test_a_move_ends_the_wait_of_those_who_consume_the_other_queue(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        receiving = await system.blocked(system.consume(await system.connect(), dead))
        await subscription.settle([Move(held, "work.dead", rewritten(held))])
        assert ids(await system.woken(receiving)) == sent

    async def test_a_full_queue_takes_a_moved_message_all_the_same(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        full = await system.declare(broker, "full", max_length=1)
        there, _ = await system.fill(broker, full)
        sent = await system.publish(broker, [message("work")])
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        move = Move(held, "full", rewritten(held))
        if system.can.exact_length:
            assert list(await subscription.settle([move])) == []
            assert sorted(ids(await system.drain(system.consume(broker, full)))) == sorted(there + sent)
            return
        # There the system itself refuses, whoever asks: the message stays ours until there is room.
        with pytest.raises(BrokerUnavailable):
            await subscription.settle([move])
        reader = system.consume(broker, full)
        assert sorted(ids(await system.drain(reader))) == sorted(there)
        assert list(await subscription.settle([move])) == []
        assert ids(await system.drain(reader)) == sent

    async def test_a_move_to_an_undeclared_queue_loses_nothing_of_its_batch(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 3)
        with pytest.raises(BrokerError):
            await subscription.settle([Move(one, "never", rewritten(one)) for one in held])
        await subscription.close()
        assert sorted(ids(await system.take(system.consume(broker, queue), 3))) == sorted(sent)

    async def test_moves_by_the_hundred_arrive_whole(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        sent = await system.publish(broker, messages("work", 500))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 500)
        await subscription.settle([Move(one, "work.dead", rewritten(one)) for one in held])
        moved = await system.take(system.consume(broker, dead), 500)
        assert sorted(ids(moved)) == sorted(sent)
        assert {one.id: one.raw for one in moved} == {one.id: one.raw for one in held}

    async def test_there_and_back_again(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        await system.publish(broker, [message("work", b"\xff\x00", headers={"a": True}, key="k", priority=4)])
        here, there = system.consume(broker, queue), system.consume(broker, dead)
        [first] = await system.take(here)
        await here.settle([Move(first, "work.dead", rewritten(first))])
        [second] = await system.take(there)
        await there.settle([Move(second, "work", rewritten(second))])
        [third] = await system.take(here)
        assert (third.id, third.raw, dict(third.headers)) == (first.id, b"\xff\x00", {"a": True})
        assert (third.key, third.priority) == ("k", 4)
        assert not await here.settle(acks([third]))

    async def test_a_move_is_as_durable_as_publishing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        sent = await system.publish(broker, messages("work", 1))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        await subscription.settle([Move(held, "work.dead", rewritten(held))])
        keeper = None if system.can.durable else await system.connect()
        await broker.close()
        other = keeper or await system.connect()
        assert ids(await system.drain(system.consume(other, dead))) == sent
        assert await system.silent(system.consume(other, queue))

    async def test_a_message_being_moved_is_always_somewhere(self, system: System, broker: Broker) -> None:
        """Whatever a second observer sees at any moment: with `atomic_move` never none and never two."""
        queue = await system.declare(broker, "work")
        dead = await system.declare(broker, "work.dead")
        sent = await system.publish(broker, messages("work", 50))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 50)
        for one in held[:25]:
            await subscription.settle([Move(one, "work.dead", rewritten(one))])
        await broker.close()  # what was not moved is released
        other = await system.connect()
        moved = await system.drain(system.consume(other, dead))
        stayed = await system.drain(system.consume(other, queue))
        if system.can.atomic_move:
            assert sorted(ids(moved) + ids(stayed)) == sorted(sent)
        else:
            assert {*ids(moved), *ids(stayed)} == set(sent)
