"""Publishing: confirmed means stored, refused means said so."""

from __future__ import annotations

import asyncio
import time

from penstock.brokers.base import Broker
from penstock.errors import Unroutable
from penstock.testing.conformance.harness import Promises, System, ids, message, messages


class PublishPromises(Promises):
    async def test_a_message_arrives_as_it_was_published(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = message(
            "work",
            b"body",
            id="an-id",
            headers={"content-type": "text/plain"},
            key="a key",
            priority=7,
            enqueued_at=1_700_000_000.25,
            expires_at=time.time() + 3600.5,
        )
        await system.publish(broker, [sent])
        [got] = await system.take(system.consume(broker, queue))
        assert (got.queue, got.topic, got.id, got.raw) == ("work", "work", "an-id", b"body")
        assert (dict(got.headers), got.key, got.priority) == (sent.headers, sent.key, sent.priority)
        assert (got.enqueued_at, got.expires_at) == (sent.enqueued_at, sent.expires_at)
        assert (got.redelivered, got.lost) == (0, False)

    async def test_headers_of_the_engine_are_carried_like_any_other(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        headers = {"penstock-attempt": 3, "penstock-history": "[]"}
        await system.publish(broker, [message("work", headers=headers)])
        [got] = await system.take(system.consume(broker, queue))
        assert dict(got.headers) == headers

    async def test_each_message_of_a_batch_has_an_outcome_at_its_own_index(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        batch = [message("work"), message("nowhere"), message("work"), message("nobody"), message("work")]
        outcomes = list(await broker.publish(batch))
        assert [type(outcome) for outcome in outcomes] == [type(None), Unroutable, type(None), Unroutable, type(None)]
        assert [outcome.name for outcome in outcomes if isinstance(outcome, Unroutable)] == ["nowhere", "nobody"]
        taken = await system.drain(system.consume(broker, queue))
        assert sorted(ids(taken)) == sorted(ids([batch[0], batch[2], batch[4]]))

    async def test_a_name_to_which_no_queue_is_bound_is_unroutable(self, system: System, broker: Broker) -> None:
        [outcome] = await broker.publish([message("nowhere")])
        assert isinstance(outcome, Unroutable)
        assert outcome.name == "nowhere"

    async def test_a_refused_message_does_not_turn_up_when_its_queue_is_declared_later(
        self, system: System, broker: Broker
    ) -> None:
        await broker.publish([message("later")])
        queue = await system.declare(broker, "later")
        assert await system.silent(system.consume(broker, queue))

    async def test_publishing_nothing_is_no_error(self, system: System, broker: Broker) -> None:
        assert list(await broker.publish([])) == []

    async def test_messages_wait_for_their_first_consumer(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        consumer = await system.connect()
        assert sorted(ids(await system.take(system.consume(consumer, queue), 3))) == sorted(sent)

    async def test_confirmed_messages_outlive_the_connections_that_the_system_promises(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        if system.can.durable:
            await broker.close()  # the last connection: nobody has the system open now
        other = await system.connect()
        if not system.can.durable:
            await broker.close()  # the publisher goes while somebody else is connected
        assert sorted(ids(await system.take(system.consume(other, queue), 3))) == sorted(sent)

    async def test_a_message_that_need_not_persist_is_delivered_all_the_same(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, [message("work", persistent=False)])
        assert ids(await system.take(system.consume(broker, queue))) == sent

    async def test_messages_that_are_alike_are_all_kept(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", b"same", id="same") for _ in range(3)])
        assert ids(await system.drain(system.consume(broker, queue))) == ["same"] * 3

    async def test_concurrent_publishers_lose_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        brokers = [broker, await system.connect(), await system.connect()]
        batches = [messages("work", 5) for _ in range(30)]
        confirmed = await asyncio.gather(
            *(system.publish(brokers[number % 3], batch) for number, batch in enumerate(batches))
        )
        taken = await system.take(system.consume(broker, queue), 150)
        assert sorted(ids(taken)) == sorted(id for one in confirmed for id in one)

    async def test_publishing_while_consuming_loses_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        receiving = asyncio.create_task(system.take(subscription, 200))
        sent = [id for _ in range(40) for id in await system.publish(broker, messages("work", 5))]
        assert sorted(ids(await receiving)) == sorted(sent)
