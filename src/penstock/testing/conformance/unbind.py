"""Unbinding: a queue gets no more of a topic, and nothing else changes."""

from __future__ import annotations

import asyncio

import pytest

from penstock.brokers.base import Broker, Queue
from penstock.errors import BrokerError, Unroutable, Unsupported
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages

MOST_ROUNDS = 2000
"""Of a publisher that is not told to stop."""


def cannot(system: System, broker: Broker) -> bool:
    return broker.admin is None or not system.can.topics


async def is_routed(broker: Broker, topic: str) -> bool:
    """Whether a message is taken for a topic, and not refused for another reason."""
    [outcome] = await broker.publish([message(topic)])
    assert outcome is None or isinstance(outcome, Unroutable), outcome
    return outcome is None


class UnbindPromises(Promises):
    async def test_without_topics_there_is_nothing_to_unbind(self, system: System, broker: Broker) -> None:
        if broker.admin is None or system.can.topics:
            return
        await system.declare(broker, "work")
        with pytest.raises(Unsupported):
            await broker.admin.unbind("work", ["news"])

    async def test_an_unbound_queue_gets_no_more_and_keeps_what_waits(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        queue = await system.declare(broker, "work", topics=("news", "olds", "sports"))
        waiting = await system.publish(broker, messages("news", 3))
        await system.admin(broker).unbind("work", ["news", "sports"])
        outcomes = await broker.publish([message("news"), message("sports"), message("news")])
        assert [type(outcome) for outcome in outcomes] == [Unroutable] * 3
        later = await system.publish(broker, [message("work"), message("olds")])
        assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(waiting + later)

    async def test_unbinding_shows_in_an_inspection(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        await system.declare(broker, "work", topics=("news", "olds"))
        await system.admin(broker).unbind("work", ["news"])
        [info] = await system.admin(await system.connect()).inspect(["work"])
        assert info.bindings is None or set(info.bindings) == {"work", "olds"}

    async def test_every_connection_publishes_accordingly_at_once(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        others = [broker, *[await system.connect() for _ in range(3)]]
        queue = await system.declare(broker, "work", topics=("news",))
        for other in others:
            await system.publish(other, [message("news")])
        await system.admin(broker).unbind("work", ["news"])
        assert [await is_routed(other, "news") for other in others] == [False] * 4
        await system.declare(others[1], "work", topics=("news",))
        assert [await is_routed(other, "news") for other in others] == [True] * 4
        await system.admin(others[2]).unbind("work", ["news"])
        assert [await is_routed(other, "news") for other in others] == [False] * 4
        assert len(await system.drain(system.consume(broker, queue))) == 8

    async def test_other_queues_of_a_topic_still_get_theirs(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        work = await system.declare(broker, "work", topics=("news",))
        audit = await system.declare(broker, "audit", topics=("news", "work"))
        before = await system.publish(broker, messages("news", 2))
        await system.admin(broker).unbind("work", ["news"])
        after = await system.publish(await system.connect(), messages("news", 2))
        own = await system.publish(broker, [message("work")])
        assert sorted(ids(await system.drain(system.consume(broker, work)))) == sorted(before + own)
        assert sorted(ids(await system.drain(system.consume(broker, audit)))) == sorted(before + after + own)

    async def test_the_name_of_another_queue_can_be_unbound(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        work = await system.declare(broker, "work")
        audit = await system.declare(broker, "audit", topics=("work",))
        await system.admin(broker).unbind("audit", ["work"])
        sent = await system.publish(broker, [message("work")])
        assert ids(await system.drain(system.consume(broker, work))) == sent
        assert await system.silent(system.consume(broker, audit))

    async def test_unbinding_twice_or_what_was_never_bound_is_no_error(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        await system.declare(broker, "work", topics=("news", "a.b*", "ö%"))
        other = await system.connect()
        for topics in (["never"], ["news", "news", "never"], ["news"], [], ["a.b", "ö"], ["x" * 1000]):
            await system.admin(broker).unbind("work", topics)
            await system.admin(other).unbind("work", topics)
        assert [await is_routed(broker, topic) for topic in ("news", "a.b*", "ö%", "work")] == [False, True, True, True]
        await system.admin(broker).unbind("work", ["a.b*", "ö%"])
        assert [await is_routed(broker, topic) for topic in ("a.b*", "ö%", "work")] == [False, False, True]

    async def test_unbinding_of_a_queue_that_there_is_not_is_an_error(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        queue = await system.declare(broker, "work", topics=("news",))
        subscription = system.consume(broker, queue)
        receiving = await system.blocked(subscription)
        for name in ("never", "news", "", "x" * 1000):
            for topics in (["topic"], []):
                with pytest.raises(BrokerError):
                    await system.admin(broker).unbind(name, topics)
        sent = await system.publish(broker, [message("news")])
        assert ids(await system.woken(receiving)) == sent

    async def test_a_queue_is_not_unbound_from_its_own_name(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        queue = await system.declare(broker, "work", topics=("news",))
        with pytest.raises(ValueError, match="own name"):
            await system.admin(broker).unbind("work", ["news", "work"])
        sent = await system.publish(broker, [message("work"), message("news")])
        assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(sent)

    async def test_a_queue_that_is_declared_again_is_bound_again(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        other = await system.connect()
        queue = await system.declare(broker, "work", topics=("news", "olds"))
        sent = []
        for declaring in (broker, other, broker, broker):
            await system.admin(broker).unbind("work", ["news", "olds"])
            await system.declare(declaring, "work")
            assert not await is_routed(other, "news")
            await system.declare(declaring, "work", topics=("news",))
            sent += await system.publish(broker, [message("news")])
            sent += await system.publish(other, [message("news")])
            assert not await is_routed(declaring, "olds")
        assert sorted(ids(await system.drain(system.consume(other, queue)))) == sorted(sent)

    async def test_who_consumes_is_not_disturbed_by_unbinding(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        queue = await system.declare(broker, "work", topics=("news",))
        lost: list[object] = []
        subscription = system.consume(await system.connect(), queue, on_lost=lost.extend)
        await system.publish(broker, messages("news", 2))
        held = await system.take(subscription, 2)
        receiving = await system.blocked(subscription)
        await system.admin(broker).unbind("work", ["news"])
        assert not await is_routed(broker, "news")
        sent = await system.publish(broker, [message("work")])
        taken = await system.woken(receiving)
        assert ids(taken) == sent
        assert not await subscription.settle(acks(held + taken))
        assert await system.silent(subscription)
        assert not lost

    async def test_whoever_begins_to_consume_does_not_bind_it_again(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        other = await system.connect()
        queue = await system.declare(other, "work", topics=("news",))
        await system.admin(broker).unbind("work", ["news"])
        for connection in (other, broker, other):
            subscription = system.consume(connection, queue)
            sent = await system.publish(broker, [message("work")])
            assert ids(await system.drain(subscription)) == sent
            assert not await is_routed(broker, "news")
            await subscription.close()

    async def test_publishing_during_an_unbinding_loses_nothing(self, system: System, broker: Broker) -> None:
        if cannot(system, broker):
            return
        work = await system.declare(broker, "work", topics=("news", "alone"))
        audit = await system.declare(broker, "audit", topics=("news",))
        before = await system.publish(broker, [*messages("news", 5), *messages("alone", 5)])
        routed: list[str] = []
        alone: list[str] = []
        over = False

        async def publish() -> None:
            publisher = await system.connect()
            last = False
            for _ in range(MOST_ROUNDS):
                if last:
                    return
                last = over  # once more when it is done
                await asyncio.sleep(0)  # a broker in memory gives way to nobody
                batch = [one for _ in range(5) for one in (message("news"), message("alone"))]
                for one, outcome in zip(batch, await publisher.publish(batch), strict=True):
                    if one.topic == "alone" and outcome is not None:
                        assert isinstance(outcome, Unroutable)
                        continue
                    assert outcome is None
                    (routed if one.topic == "news" else alone).append(one.id)

        publishing = [asyncio.create_task(publish()) for _ in range(4)]
        try:
            async with asyncio.timeout(system.harness.patience):
                while not alone and not any(task.done() for task in publishing):
                    await asyncio.sleep(0)
                await system.admin(broker).unbind("work", ["news", "alone"])
        finally:
            over = True
        await asyncio.gather(*publishing)
        after = await system.publish(broker, messages("news", 5))
        got = ids(await system.drain(system.consume(broker, work)))
        assert len(got) == len(set(got))
        assert {*before, *alone} <= {*got} <= {*before, *alone, *routed}
        every = [*before[:5], *routed, *after]
        assert sorted(ids(await system.drain(system.consume(broker, audit)))) == sorted(every)

    async def test_unbindings_and_declarations_at_once_end_as_one_of_them_says(
        self, system: System, broker: Broker
    ) -> None:
        if cannot(system, broker):
            return
        other = await system.connect()
        bound = Queue("work", ("news", "olds"))
        await broker.declare(bound)
        unbinding = system.admin(other).unbind("work", ["news"])
        await asyncio.gather(broker.declare(bound), unbinding, system.admin(broker).unbind("work", ["news"]))
        assert await is_routed(other, "news") == await is_routed(broker, "news")
        assert await is_routed(other, "olds")
        assert await is_routed(other, "work")
