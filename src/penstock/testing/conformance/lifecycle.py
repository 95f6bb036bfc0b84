"""The life of a connection and of its queues: open, declare, close, each as often as one likes."""

from __future__ import annotations

import asyncio

from penstock.brokers.base import Broker, Queue
from penstock.errors import QueueMismatch
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages


class LifecyclePromises(Promises):
    async def test_open_and_close_may_be_repeated(self, system: System, broker: Broker) -> None:
        await broker.open()
        await system.declare(broker, "work")
        await broker.open()
        assert list(await broker.publish([message("work")])) == [None]
        await broker.close()
        await broker.close()

    async def test_a_broker_that_was_never_opened_can_be_closed(self, system: System) -> None:
        await system.harness.connect().close()

    async def test_closing_at_the_same_time_is_closing_once(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        await system.publish(broker, messages("work", 2))
        await system.take(subscription, 2)
        await asyncio.gather(subscription.close(), subscription.close(), broker.close())

    async def test_a_subscription_may_be_closed_again_and_before_it_was_used(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        assert not subscription.consuming
        await subscription.close()
        await subscription.close()
        assert not subscription.consuming

    async def test_a_closed_subscription_receives_nothing_and_consumes_nothing(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        await subscription.close()
        sent = await system.publish(broker, messages("work", 1))
        async with asyncio.timeout(system.harness.patience):
            assert await subscription.receive(1, 0.05) == []
        assert not subscription.consuming
        assert ids(await system.take(system.consume(broker, queue))) == sent

    async def test_close_wakes_a_blocked_receive(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        subscription = system.consume(broker, queue)
        receiving = await system.blocked(subscription)
        await subscription.close()
        assert await system.woken(receiving) == []

    async def test_closing_the_broker_closes_its_subscriptions(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 3))
        held = system.consume(broker, queue, prefetch=3)
        await system.take(held, 3)
        receiving = await system.blocked(system.consume(broker, queue))
        keeper = await system.connect()
        await broker.close()
        assert not held.consuming
        assert await system.woken(receiving) == []
        assert sorted(ids(await system.take(system.consume(keeper, queue), 3))) == sorted(sent)

    async def test_closing_the_broker_ends_the_lives_of_its_inboxes(self, system: System, broker: Broker) -> None:
        other = await system.connect()
        fresh, inbox = other.inbox(), other.inbox()
        lives = fresh.life, inbox.life
        await inbox.listen(frozenset({"news"}))
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(system.harness.quiet)
        await asyncio.gather(inbox.close(), other.close())
        assert await system.woken(receiving) == []
        assert fresh.life > lives[0]
        assert inbox.life > lives[1]

    async def test_closing_in_the_middle_of_a_receive_loses_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 20))
        for turns in range(10):
            connection = await system.connect()
            subscription = system.consume(connection, queue)
            receiving = asyncio.create_task(subscription.receive(5, system.harness.patience))
            for _ in range(turns):
                await asyncio.sleep(0)
            await connection.close()
            late = await system.woken(receiving)
            async with asyncio.timeout(system.harness.patience):  # whoever got some is told that they went back
                assert len(await subscription.settle(acks(late))) == len(late)
        taken = await system.take(system.consume(broker, queue), 20)
        assert sorted(ids(taken)) == sorted(sent)
        assert {one.redelivered for one in taken} == {0}

    async def test_two_connections_of_one_process_are_two(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        other = await system.connect()
        subscription = system.consume(other, queue)
        receiving = await system.blocked(subscription)
        await broker.close()
        assert subscription.consuming
        sent = await system.publish(other, messages("work", 1))
        assert ids(await system.woken(receiving)) == sent

    async def test_queues_are_known_to_every_connection(self, system: System, broker: Broker) -> None:
        await system.declare(broker, "work")
        await system.publish(await system.connect(), messages("work", 1))

    async def test_declaring_again_changes_nothing(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        sent = await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        for connection in (broker, await system.connect()):
            await connection.declare(queue)
        assert list(await subscription.settle(acks([held]))) == []
        assert sorted([held.id, *ids(await system.take(subscription))]) == sorted(sent)

    async def test_declaring_at_the_same_time_makes_one_queue(self, system: System, broker: Broker) -> None:
        brokers = [broker, await system.connect(), await system.connect()]
        await asyncio.gather(*(brokers[number % 3].declare(Queue("work")) for number in range(9)))
        sent = await system.publish(broker, messages("work", 1))
        assert ids(await system.drain(system.consume(broker, Queue("work")))) == sent

    async def test_declaring_otherwise_never_alters_a_queue(self, system: System, broker: Broker) -> None:
        await system.declare(broker, "work", max_length=2)
        for other in (Queue("work", max_length=5), Queue("work"), Queue("work", priorities=5)):
            try:
                await broker.declare(other)
            except QueueMismatch as error:
                assert "work" in str(error)
        if system.can.exact_length:
            outcomes = await broker.publish(messages("work", 3))
            assert [outcome is None for outcome in outcomes] == [True, True, False]
        else:
            await system.fill(broker, Queue("work", max_length=2))

    async def test_a_queue_outlives_its_connection_where_the_system_is_durable(
        self, system: System, broker: Broker
    ) -> None:
        await system.declare(broker, "work")
        keeper = None if system.can.durable else await system.connect()
        await broker.close()
        await system.publish(keeper or await system.connect(), messages("work", 1))

    async def test_capabilities_are_the_same_on_every_connection(self, system: System, broker: Broker) -> None:
        other = await system.connect()
        assert other.capabilities == broker.capabilities
        assert 0 <= broker.capabilities.priorities <= 256
        if broker.capabilities.max_lease is not None:
            assert broker.capabilities.max_lease > 0

    async def test_opening_at_the_same_time_is_opening_once(self, system: System) -> None:
        broker = system.harness.connect()
        await asyncio.gather(*(broker.open() for _ in range(5)))
        await broker.declare(Queue("work"))
        await broker.close()

    async def test_many_short_lives_leave_the_system_usable(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        for number in range(8):
            connection = await system.connect()
            sent = await system.publish(connection, messages("work", number + 1))
            taken = await system.drain(system.consume(connection, queue))
            assert sorted(ids(taken)) == sorted(sent)
            await connection.close()
