"""Expiry: what nobody took in time is dropped, and counted; what somebody took is theirs."""

from __future__ import annotations

import time

from penstock.brokers.base import Broker, Move
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages
from penstock.testing.waiting import eventually


class ExpiryPromises(Promises):
    async def test_what_nobody_took_in_time_is_dropped_and_counted(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        gone, kept = message("work", expires_at=time.time() - 0.1), message("work", expires_at=time.time() + 60)
        await system.publish(broker, [gone, kept])
        if not system.can.expiry:
            # It comes with its time on it, and the engine drops and counts it.
            taken = {one.id: one.expires_at for one in await system.take(system.consume(broker, queue), 2)}
            assert taken == {gone.id: gone.expires_at, kept.id: kept.expires_at}
            return
        subscription = system.consume(broker, queue)
        assert ids(await system.take(subscription)) == [kept.id]
        assert await system.silent(subscription)
        if broker.admin is not None:
            [info] = await broker.admin.inspect()
            assert info.expired in (1, None)
            assert info.discarded in (0, None)
            assert info.ready in (0, None)

    async def test_it_expires_while_a_consumer_waits_elsewhere(self, system: System, broker: Broker) -> None:
        if not system.can.expiry:
            return
        queue = await system.declare(broker, "work")
        other = await system.declare(broker, "other")
        await system.publish(broker, [message("work", expires_at=time.time() + 0.2)])
        subscription = system.consume(broker, other)
        assert await subscription.receive(1, 0.4) == []  # nobody looks at the queue until it is too late
        assert await system.silent(system.consume(broker, queue))

    async def test_a_message_taken_in_time_can_be_settled_afterwards(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        expires_at = time.time() + 1.0
        await system.publish(broker, [message("work", expires_at=expires_at)])
        subscription = system.consume(broker, queue)
        held = await system.take(subscription)
        assert held[0].expires_at == expires_at
        await eventually(lambda: time.time() > expires_at + 0.05)
        assert await system.silent(system.consume(broker, queue))
        assert list(await subscription.settle(acks(held))) == []
        if broker.admin is not None:
            assert [info.expired in (0, None) for info in await broker.admin.inspect()] == [True]

    async def test_a_delayed_message_can_expire(self, system: System, broker: Broker) -> None:
        if not (system.can.expiry and system.can.delay):
            return
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", delay=0.4, expires_at=time.time() + 0.2)])
        assert await system.consume(broker, queue).receive(1, 0.8) == []

    async def test_a_move_may_take_the_expiry_away(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        expires_at = time.time() + 1.0
        await system.publish(broker, [message("work", expires_at=expires_at)])
        subscription = system.consume(broker, queue)
        [held] = await system.take(subscription)
        await subscription.settle([Move(held, "work", message("work", id=held.id))])
        await eventually(lambda: time.time() > expires_at + 0.05)
        [again] = await system.take(subscription)
        assert (again.id, again.expires_at) == (held.id, None)

    async def test_what_has_expired_takes_no_room(self, system: System, broker: Broker) -> None:
        if not system.can.expiry:
            return
        await system.declare(broker, "work", max_length=2)
        await system.publish(broker, messages("work", 2, expires_at=time.time() + 0.1))
        expired = time.time() + 0.15
        await eventually(lambda: time.time() > expired)
        await system.publish(broker, messages("work", 2))
