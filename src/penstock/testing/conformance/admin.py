"""The operator's side: looking takes nothing, purging takes only what nobody holds."""

from __future__ import annotations

import asyncio
import time

import pytest

from penstock.brokers.base import Broker, Queue, QueueInfo
from penstock.errors import BrokerError, Unsupported
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages


async def look(system: System, broker: Broker, name: str) -> QueueInfo:
    [info] = await system.admin(broker).inspect([name])
    return info


class AdminPromises(Promises):
    async def test_what_the_system_cannot_do_is_unsupported(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            assert not (system.can.browse or system.can.pause or system.can.lists)
            return
        await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 1))
        if not system.can.browse:
            with pytest.raises(Unsupported):
                await broker.admin.browse("work", 1)
        if not system.can.pause:
            with pytest.raises(Unsupported):
                await broker.admin.pause("work", True)
        assert ids(await system.drain(system.consume(broker, Queue("work")))) == sent

    async def test_every_queue_is_listed_by_name(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        assert list(await broker.admin.inspect()) == []
        for name in ("b", "a", "C", "ö"):
            await system.declare(broker, name)
        assert [info.name for info in await broker.admin.inspect()] == ["C", "a", "b", "ö"]
        named = ["ö", "never", "a", "a"]
        assert [info.name for info in await broker.admin.inspect(named)] == ["a", "ö"]
        assert list(await broker.admin.inspect([])) == []

    async def test_queues_of_another_connection_can_be_seen_by_name(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        for name in ("a", "b"):
            await system.declare(await system.connect(), name)
        listed = [info.name for info in await broker.admin.inspect()]
        assert listed == (["a", "b"] if system.can.lists else [])
        assert [info.name for info in await broker.admin.inspect(["b"])] == ["b"]

    async def test_an_inspection_counts_what_waits_and_what_is_held(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        queue = await system.declare(broker, "work")
        empty = await look(system, broker, "work")
        assert empty.ready in (0, None)
        assert empty.unsettled in (0, None)
        assert empty.consumers in (0, None)
        assert empty.oldest is None
        oldest = time.time() - 100
        delay = 60.0 if system.can.delay else 0.0
        await system.publish(broker, [message("work", enqueued_at=oldest), *messages("work", 2)])
        await system.publish(broker, [message("work", delay=delay)])
        seen = await look(system, broker, "work")
        waiting = 4 if system.can.sees_delayed else 3
        assert seen.ready in (waiting, 4, None)
        assert seen.oldest is None or seen.oldest == oldest
        subscription = system.consume(broker, queue, prefetch=2)
        held = await system.take(subscription, 2)
        seen = await look(system, await system.connect(), "work")
        assert seen.ready in (waiting - 2, 2, None)
        assert seen.unsettled in (2, None)
        assert seen.consumers in (1, None)
        await subscription.settle(acks(held))
        await subscription.close()  # with what it took ahead
        seen = await look(system, broker, "work")
        assert seen.ready in (waiting - 2, 2, None)
        assert (seen.unsettled in (0, None), seen.consumers in (0, None)) == (True, True)
        assert (seen.expired in (0, None), seen.discarded in (0, None)) == (True, True)

    async def test_an_inspection_names_the_bindings(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        topics = ("news", "olds") if system.can.topics else ()
        await system.declare(broker, "work", topics=topics)
        bindings = (await look(system, broker, "work")).bindings
        assert bindings is None or set(bindings) == {"work", *topics}

    async def test_browsing_shows_messages_and_takes_none(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.browse:
            return
        queue = await system.declare(broker, "work")
        await system.declare(broker, "other")
        sent = messages("work", 3, headers={"h": 1}, key="k")
        await system.publish(broker, [*sent, message("other")])
        page, after = await broker.admin.browse("work", 10)
        assert after is None
        assert [(one.id, one.raw, dict(one.headers), one.key, one.queue) for one in page] == [
            (one.id, one.body, {"h": 1}, "k", "work") for one in sent
        ]
        assert ids((await broker.admin.browse("work", 10))[0]) == ids(sent)
        taken = await system.take(system.consume(broker, queue), 3)
        assert {one.redelivered for one in taken} == {0}

    @pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
    async def test_pages_follow_one_another_to_the_end(self, system: System, broker: Broker, limit: int) -> None:
        if broker.admin is None or not system.can.browse:
            return
        await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 6))
        seen: list[str] = []
        pages = 0
        after = None
        while True:
            page, after = await broker.admin.browse("work", limit, after)
            assert 1 <= len(page) <= limit
            seen += ids(page)
            pages += 1
            if after is None:
                break
        assert seen == sent
        assert pages == -(-6 // limit)

    async def test_an_empty_queue_is_one_empty_page(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.browse:
            return
        await system.declare(broker, "work")
        page, after = await broker.admin.browse("work", 10)
        assert (list(page), after) == ([], None)

    async def test_browsing_bodies_of_every_kind(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.browse:
            return
        await system.declare(broker, "work")
        bodies = [b"", b"\x00\xff", b"", b"x" * 100_000, b""]
        await system.publish(broker, [message("work", body) for body in bodies])
        page, _ = await broker.admin.browse("work", 10)
        assert [one.raw for one in page] == bodies

    async def test_a_purge_removes_and_counts_what_nobody_holds(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        delay = 60.0 if system.can.delay else 0.0
        await system.publish(broker, [*messages("work", 5), message("other")])
        subscription = system.consume(broker, queue, prefetch=2)
        held = await system.take(subscription, 2)
        await system.publish(broker, [message("work", delay=delay)])
        seen_by_purge = 4 if system.can.sees_delayed else 3
        purged = await broker.admin.purge("work")
        assert seen_by_purge <= purged <= 4
        seen = await look(system, broker, "work")
        assert (seen.ready in (0, None), seen.unsettled in (2, None)) == (True, True)
        assert seen.discarded in (purged, None)
        assert list(await subscription.settle(acks(held))) == []
        assert await system.silent(subscription)
        assert await broker.admin.purge("work") == 0
        assert len(await system.drain(system.consume(broker, other))) == 1

    async def test_a_paused_queue_hands_out_nothing_to_anybody(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.pause:
            return
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        elsewhere = await system.connect()
        await broker.admin.pause("work", True)
        assert (await look(system, elsewhere, "work")).paused
        sent = await system.publish(broker, [message("work"), message("other")])  # publishing goes on
        subscription = system.consume(elsewhere, queue, other)
        assert ids(await system.take(subscription)) == sent[1:]
        assert await system.silent(subscription)
        assert await system.silent(system.consume(broker, queue))

    async def test_resuming_ends_the_wait_of_a_consumer(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.pause:
            return
        queue = await system.declare(broker, "work")
        await broker.admin.pause("work", True)
        sent = await system.publish(broker, messages("work", 1))
        receiving = await system.blocked(system.consume(await system.connect(), queue))
        await broker.admin.pause("work", False)
        assert ids(await system.woken(receiving)) == sent
        assert not (await look(system, broker, "work")).paused

    async def test_what_was_held_when_the_queue_paused_can_be_settled(self, system: System, broker: Broker) -> None:
        if broker.admin is None or not system.can.pause:
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 2)
        await asyncio.gather(broker.admin.pause("work", True), broker.admin.pause("work", True))
        assert list(await subscription.settle(acks(held))) == []

    async def test_an_unknown_queue_is_an_error(self, system: System, broker: Broker) -> None:
        if broker.admin is None:
            return
        with pytest.raises(BrokerError):
            await broker.admin.purge("never")
        with pytest.raises(BrokerError if system.can.browse else Unsupported):
            await broker.admin.browse("never", 1)
        with pytest.raises(BrokerError if system.can.pause else Unsupported):
            await broker.admin.pause("never", True)
