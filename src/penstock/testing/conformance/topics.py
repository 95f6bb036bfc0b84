"""Topics: one copy for every queue that is bound to a name."""

from __future__ import annotations

import pytest

from penstock.brokers.base import Broker, Queue
from penstock.errors import Unroutable, Unsupported
from penstock.testing.conformance.harness import Promises, System, acks, ids, message


class TopicPromises(Promises):
    async def test_a_system_without_topics_refuses_them_and_one_with_them_binds(
        self, system: System, broker: Broker
    ) -> None:
        bound = Queue("work", ("news",))
        if not system.can.topics:
            with pytest.raises(Unsupported):
                await broker.declare(bound)
            return
        await broker.declare(bound)
        sent = await system.publish(broker, [message("news")])
        [got] = await system.take(system.consume(broker, bound))
        assert ([got.id], got.queue, got.topic) == (sent, "work", "news")

    async def test_a_queue_is_bound_to_its_own_name(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work", topics=("news",) if system.can.topics else ())
        sent = await system.publish(broker, [message("work")])
        assert ids(await system.take(system.consume(broker, queue))) == sent

    async def test_every_bound_queue_gets_a_copy_of_its_own(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        queues = [await system.declare(broker, name, topics=("news",)) for name in ("one", "two", "three")]
        bystander = await system.declare(broker, "four", topics=("olds",))
        sent = await system.publish(broker, [message("news", b"x"), message("news", b"y")])
        for queue in queues:  # acknowledging one queue's copies leaves the others
            taken = await system.drain(system.consume(broker, queue))
            assert sorted(ids(taken)) == sorted(sent)
            assert sorted(one.raw for one in taken) == [b"x", b"y"]
        assert await system.silent(system.consume(broker, bystander))

    async def test_a_queue_bound_twice_to_a_name_gets_one_copy(self, system: System, broker: Broker) -> None:
        topics = ("work", "news", "news") if system.can.topics else ()
        queue = await system.declare(broker, "work", topics=topics)
        await system.declare(broker, "work", topics=topics)
        subscription = system.consume(broker, queue)
        for topic in {"work", *topics}:
            sent = await system.publish(broker, [message(topic)])
            assert ids(await system.drain(subscription)) == sent

    async def test_one_queue_may_listen_to_several_names(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        queue = await system.declare(broker, "work", topics=("a", "b"))
        sent = await system.publish(broker, [message("a"), message("b"), message("work")])
        taken = await system.drain(system.consume(broker, queue))
        assert sorted(ids(taken)) == sorted(sent)
        assert sorted(one.topic for one in taken) == ["a", "b", "work"]

    async def test_the_name_of_another_queue_can_be_a_topic(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        work = await system.declare(broker, "work")
        audit = await system.declare(broker, "audit", topics=("work",))
        sent = await system.publish(broker, [message("work")])
        assert ids(await system.drain(system.consume(broker, work))) == sent
        assert ids(await system.drain(system.consume(broker, audit))) == sent

    async def test_declaring_again_adds_bindings_and_removes_none(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        await system.declare(broker, "work", topics=("a",))
        await system.declare(broker, "work", topics=("b",))
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, [message("a"), message("b"), message("work")])
        assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(sent)

    async def test_a_new_binding_applies_from_its_declaration_on(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        queue = await system.declare(broker, "work")
        [outcome] = await broker.publish([message("news")])
        assert isinstance(outcome, Unroutable)
        other = await system.connect()
        await system.declare(other, "work", topics=("news",))
        sent = await system.publish(broker, [message("news")])
        assert ids(await system.drain(system.consume(broker, queue))) == sent

    async def test_a_name_that_begins_like_a_topic_is_another_name(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work", topics=("news.*", "a%") if system.can.topics else ())
        outcomes = await broker.publish([message(name) for name in ("wor", "work.dead", "WORK", "news.x", "ab", "*")])
        assert [type(outcome) for outcome in outcomes] == [Unroutable] * 6
        assert await system.silent(system.consume(broker, queue))

    async def test_a_release_gives_back_one_copy_only(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        one = await system.declare(broker, "one", topics=("news",))
        two = await system.declare(broker, "two", topics=("news",))
        sent = await system.publish(broker, [message("news")])
        first = system.consume(broker, one)
        await system.take(first)
        await first.close()
        second = system.consume(broker, two)
        held = await system.take(second)
        await second.settle(acks(held))
        assert ids(await system.drain(system.consume(broker, one))) == sent
        assert await system.silent(second)
