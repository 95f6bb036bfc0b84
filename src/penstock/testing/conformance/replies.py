"""Requests and replies: an answer reaches the inbox that asked, and nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
import pytest_asyncio

from penstock.brokers.base import Ack, Broker, Inbox, Move, Queue, Release, Subscription
from penstock.errors import BrokerError, BrokerUnavailable, PublishError, QueueFull, Unroutable, Unsupported
from penstock.message import Delivery, Outgoing
from penstock.testing.conformance.harness import Promises, System, acks, ids, message
from penstock.testing.conformance.limits import BODIES, HEADERS
from penstock.testing.conformance.priority import prioritised
from penstock.testing.waiting import eventually

DELAY = 0.5  # seconds


def unexpected(error: BrokerError) -> None:
    raise AssertionError(f"a request was refused: {error}") from error


def answer(request: Delivery, body: bytes = b"", **fields: Any) -> Outgoing:
    """A reply that carries the id of its request."""
    assert request.reply_to is not None
    return message(request.reply_to, body, id=request.id, **fields)


async def ask(inbox: Inbox, *outgoing: Outgoing) -> list[str]:
    for one in outgoing:
        await inbox.request(one, unexpected)
    return ids(outgoing)


async def hear(system: System, inbox: Inbox, count: int = 1) -> list[Delivery]:
    """Exactly so many."""
    heard: list[Delivery] = []
    async with asyncio.timeout(system.harness.patience):
        while len(heard) < count:
            heard += await inbox.receive(system.harness.patience)
    assert len(heard) == count
    return heard


async def serve(system: System, broker: Broker, consumer: Subscription, count: int = 1) -> list[Delivery]:
    """Take so many requests and answer each with its own body."""
    requests = await system.take(consumer, count)
    await broker.reply([answer(one, one.raw) for one in requests])
    assert not await consumer.settle(acks(requests))
    return requests


class ReplyPromises(Promises):
    @pytest_asyncio.fixture
    async def work(self, system: System, broker: Broker) -> Queue:
        return await system.declare(broker, "work")

    # -- there and back

    async def test_a_reply_reaches_the_inbox_that_asked(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = (await system.connect()).inbox()
        other = (await system.connect()).inbox()
        await other.listen(frozenset({"work"}))
        sent = await ask(inbox, message("work", b"question"))
        [request] = await system.take(system.consume(broker, work))
        assert ([request.id], request.topic, request.raw) == (sent, "work", b"question")
        await broker.reply([answer(request, b"answer")])
        [reply] = await hear(system, inbox)
        assert ([reply.id], reply.topic, reply.raw) == (sent, request.reply_to, b"answer")
        for one in (inbox, other):
            assert await one.receive(system.harness.quiet) == []
        assert inbox.life == other.life

    async def test_a_reply_has_the_id_that_the_replier_gave_it(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox = broker.inbox()
        await ask(inbox, message("work"))
        [request] = await system.take(system.consume(broker, work))
        await broker.reply([message(str(request.reply_to), id="of its own")])
        assert ids(await hear(system, inbox)) == ["of its own"]

    async def test_request_and_reply_come_as_they_were_sent(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        consumer = system.consume(broker, work)
        for body in BODIES.values():
            sent = message("work", body, headers=HEADERS, key="a key", priority=7, enqueued_at=1234567890.123456)
            await ask(inbox, sent)
            [request] = await system.take(consumer)
            await broker.reply([answer(request, body, headers=HEADERS, enqueued_at=sent.enqueued_at)])
            [reply] = await hear(system, inbox)
            for got in (request, reply):
                assert (got.id, got.raw, got.enqueued_at) == (sent.id, body, sent.enqueued_at)
                assert {name: (type(value), value) for name, value in got.headers.items()} == {
                    name: (type(value), value) for name, value in HEADERS.items()
                }
            assert (request.key, request.priority) == ("a key", 7)
            assert not await consumer.settle(acks([request]))

    async def test_a_large_reply_arrives_whole(self, system: System, broker: Broker, work: Queue) -> None:
        body = (bytes(range(256)) * 4096)[: system.harness.largest_body]  # 1 MiB, where that fits
        inbox = broker.inbox()
        await ask(inbox, message("work", body))
        await serve(system, broker, system.consume(broker, work))
        [reply] = await hear(system, inbox)
        assert reply.raw == body

    async def test_replies_reach_their_own_of_many_inboxes(self, system: System, broker: Broker, work: Queue) -> None:
        other = await system.connect()
        inboxes = [broker.inbox(), broker.inbox(), other.inbox(), other.inbox()]
        asked: list[list[str]] = [[] for _ in inboxes]
        for number in range(50):
            asked[number % 4] += await ask(inboxes[number % 4], message("work", str(number).encode()))
        await serve(system, broker, system.consume(broker, work), 50)
        for inbox, sent in zip(inboxes, asked, strict=True):
            assert sorted(ids(await hear(system, inbox, len(sent)))) == sorted(sent)
        for inbox in inboxes:
            assert await inbox.receive(system.harness.quiet) == []

    async def test_many_ask_at_once(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        sent = [message("work", str(number).encode()) for number in range(200)]
        asking = asyncio.gather(*(inbox.request(one, unexpected) for one in sent))
        await serve(system, await system.connect(), system.consume(broker, work), len(sent))
        await asking
        replies = await hear(system, inbox, len(sent))
        assert {one.id: one.raw for one in replies} == {one.id: one.body for one in sent}

    async def test_many_replies_in_one_call(self, system: System, broker: Broker, work: Queue) -> None:
        inbox, other = broker.inbox(), (await system.connect()).inbox()
        await ask(inbox, message("work"))
        await ask(other, message("work"))
        one, two = await system.take(system.consume(broker, work), 2)
        await broker.reply([message(str(to.reply_to), id=f"r{n}") for n in range(300) for to in (one, two)])
        await broker.reply([])
        for listener in (inbox, other):
            assert ids(await hear(system, listener, 300)) == [f"r{n}" for n in range(300)]

    async def test_every_queue_bound_to_the_topic_gets_the_request(self, system: System, broker: Broker) -> None:
        if not system.can.topics:
            return
        queues = [await system.declare(broker, name, topics=("sums",)) for name in ("one", "two")]
        inbox = broker.inbox()
        sent = await ask(inbox, message("sums"))
        for queue in queues:
            await serve(system, broker, system.consume(broker, queue))
        assert ids(await hear(system, inbox, 2)) == sent * 2

    async def test_one_id_may_be_asked_twice(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        refused: list[BrokerError] = []
        for topic in ("work", "nowhere", "work", "nowhere"):
            await inbox.request(message(topic, id="same"), refused.append)
        await serve(system, broker, system.consume(broker, work), 2)
        assert ids(await hear(system, inbox, 2)) == ["same", "same"]
        await eventually(lambda: len(refused) == 2)
        assert [type(error) for error in refused] == [Unroutable, Unroutable]

    # -- the address stays with the message

    async def test_publish_carries_the_address_as_it_is(self, system: System, broker: Broker, work: Queue) -> None:
        await system.publish(broker, [message("work", reply_to="somewhere, ключ"), message("work")])
        consumer = system.consume(broker, work)
        addresses = [one.reply_to for one in await system.take(consumer, 2)]
        assert addresses == ["somewhere, ключ", None]

    async def test_a_reply_after_moves_and_releases_still_arrives(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox, later = broker.inbox(), await system.declare(broker, "later")
        sent = await ask(inbox, message("work", b"x"))
        consumer = system.consume(broker, work)
        [request] = await system.take(consumer)
        address = request.reply_to
        assert not await consumer.settle([Release(request)])
        [request] = await system.take(consumer)
        delay = DELAY if system.can.delay else 0.0
        assert not await consumer.settle([Release(request, delay=delay)])
        [request] = await system.take(consumer)
        retry = request.outgoing()
        retry.delay = delay
        assert not await consumer.settle([Move(request, "later", retry)])
        [request] = await system.take(moved := system.consume(broker, later))
        assert request.reply_to == address
        assert not await moved.settle([Move(request, "work", request.outgoing())])
        await serve(system, broker, consumer)
        assert ids(await hear(system, inbox)) == sent

    async def test_a_reply_after_the_death_of_a_consumer_still_arrives(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox = broker.inbox()
        sent = await ask(inbox, message("work"))
        assert await system.crash_consumer(work, 1) == sent
        [request] = await serve(system, broker, system.consume(broker, work, lease=system.harness.lease))
        assert request.redelivered == 1
        assert ids(await hear(system, inbox)) == sent

    # -- refused

    async def test_a_request_that_no_queue_takes_is_refused_once(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox = broker.inbox()
        refused: dict[str, list[BrokerError]] = {}
        requests = [message("nowhere") for _ in range(20)]
        for one in requests:
            await inbox.request(one, refused.setdefault(one.id, []).append)
            await ask(inbox, message("work"))
        await eventually(lambda: all(refused.values()))
        await serve(system, broker, system.consume(broker, work), 20)
        await hear(system, inbox, 20)
        for [error] in refused.values():
            assert isinstance(error, Unroutable)
            assert error.name == "nowhere"
        assert await inbox.receive(system.harness.quiet) == []

    async def test_refusals_come_in_the_event_loop_and_disturb_nobody(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox = broker.inbox()
        told: list[asyncio.AbstractEventLoop] = []
        for _ in range(3):
            await inbox.request(message("nowhere"), lambda _: told.append(asyncio.get_running_loop()))
        await eventually(lambda: told == [asyncio.get_running_loop()] * 3)
        sent = await ask(inbox, message("work"))
        await serve(system, broker, system.consume(broker, work))
        assert ids(await hear(system, inbox)) == sent

    async def test_a_full_queue_refuses_a_request(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work", max_length=2)
        taken, _ = await system.fill(broker, queue)
        inbox = broker.inbox()
        refused: list[BrokerError] = []
        await inbox.request(message("work"), refused.append)
        await eventually(lambda: refused)
        assert [type(error) for error in refused] == [QueueFull]
        consumer = system.consume(broker, queue)
        assert sorted(ids(await system.drain(consumer))) == sorted(taken)
        sent = await ask(inbox, message("work"))
        await serve(system, broker, consumer)
        assert ids(await hear(system, inbox)) == sent

    # -- what the message says of itself

    async def test_the_urgent_request_is_received_first(self, system: System, broker: Broker) -> None:
        if not system.can.priorities:
            return
        queue = await prioritised(system, broker)
        inbox = broker.inbox()
        low, high = await ask(inbox, message("work"), message("work", priority=255))
        consumer = system.consume(broker, queue, prefetch=1, ahead=False)
        await self._is_there(system, broker, 2)
        assert ids(await serve(system, broker, consumer)) == [high]
        assert ids(await serve(system, broker, consumer)) == [low]

    async def test_a_request_that_nobody_took_in_time_is_dropped(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        inbox = broker.inbox()
        late, kept = message("work", expires_at=time.time() - 0.1), message("work", expires_at=time.time() + 60)
        await ask(inbox, late, kept)
        consumer = system.consume(broker, work)
        if system.can.expiry:
            assert ids(await system.take(consumer)) == [kept.id]
            assert await system.silent(consumer)
        else:
            taken = {one.id: one.expires_at for one in await system.take(consumer, 2)}
            assert taken == {late.id: late.expires_at, kept.id: kept.expires_at}

    async def test_a_delayed_request_waits(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        refused: list[BrokerError] = []
        began = time.monotonic()
        try:
            await inbox.request(delayed := message("work", delay=DELAY), refused.append)
        except Unsupported:
            assert not system.can.delay
            return
        if system.can.delay:
            await serve(system, broker, system.consume(broker, work))
            assert time.monotonic() - began >= DELAY - 0.01
            assert ids(await hear(system, inbox)) == [delayed.id]
            assert refused == []
        else:
            await eventually(lambda: refused)
            assert isinstance(refused[0], PublishError)

    async def test_a_request_need_not_be_persistent(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        sent = await ask(inbox, message("work", persistent=False))
        await serve(system, broker, system.consume(broker, work))
        assert ids(await hear(system, inbox)) == sent

    # -- inboxes come and go

    async def test_a_reply_to_whoever_has_gone_is_no_error_and_disturbs_nobody(
        self, system: System, broker: Broker, work: Queue
    ) -> None:
        gone, kept = (await system.connect()).inbox(), broker.inbox()
        await ask(gone, message("work"))
        sent = await ask(kept, message("work"))
        first, second = await system.take(consumer := system.consume(broker, work), 2)
        await gone.close()
        replies = [answer(first), message("nobody", b"x"), message("", b"x"), message("long" * 100), answer(second)]
        await broker.reply(replies)
        assert ids(await hear(system, kept)) == sent
        for one in replies:
            await broker.reply([one])
        assert ids(await hear(system, kept)) == sent
        assert not await consumer.settle([Ack(first), Ack(second)])
        assert await system.silent(consumer)

    async def test_replies_and_broadcasts_come_to_one_inbox(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        await inbox.listen(frozenset({"news"}))
        sent = await ask(inbox, message("work"))
        await broker.broadcast(news := message("news"))
        await serve(system, broker, consumer := system.consume(broker, work))
        assert sorted(ids(await hear(system, inbox, 2))) == sorted([*sent, news.id])
        await inbox.listen(frozenset({"other"}))
        sent = await ask(inbox, message("work"))
        await inbox.listen(frozenset())
        await broker.broadcast(message("other"))
        await serve(system, broker, consumer)
        assert ids(await hear(system, inbox)) == sent
        assert await inbox.receive(system.harness.quiet) == []

    async def test_an_inbox_that_waits_for_a_reply_is_woken(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = (await system.connect()).inbox()
        await inbox.listen(frozenset())
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(system.harness.quiet)
        assert not receiving.done()
        sent = await ask(inbox, message("work"))
        began = time.monotonic()
        await serve(system, broker, system.consume(broker, work))
        assert ids(await receiving) == sent
        assert time.monotonic() - began < system.harness.prompt

    async def test_a_cancelled_receive_loses_no_reply(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        consumer = system.consume(broker, work)
        for delay in (0.0, 0.0001, 0.001, 0.003, 0.01):
            sent = await ask(inbox, message("work"))
            [request] = await system.take(consumer)
            receiving = asyncio.create_task(inbox.receive(system.harness.patience))
            await asyncio.sleep(0)
            await broker.reply([answer(request)])
            await asyncio.sleep(delay)
            receiving.cancel()
            [outcome] = await asyncio.gather(receiving, return_exceptions=True)
            heard = outcome if not isinstance(outcome, BaseException) else await hear(system, inbox)
            assert ids(heard) == sent

    async def test_closing_wakes_who_waits_and_ends_a_life(self, system: System, broker: Broker, work: Queue) -> None:
        inbox = broker.inbox()
        refused: list[BrokerError] = []
        await inbox.request(message("work"), refused.append)
        life = inbox.life
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(system.harness.quiet)
        await inbox.close()
        async with asyncio.timeout(system.harness.patience / 2):
            assert await receiving == []
        assert inbox.life > life
        await inbox.close()
        with pytest.raises(BrokerUnavailable):
            await inbox.request(message("work"), refused.append)
        assert refused == []
        requests = await system.take(system.consume(broker, work))
        await broker.reply([answer(one) for one in requests])

    async def test_a_life_goes_on_while_nothing_happens_to_it(self, system: System, broker: Broker) -> None:
        await system.declare(broker, "work")
        inbox = broker.inbox()
        life = inbox.life
        await inbox.listen(frozenset({"news"}))
        await ask(inbox, message("work"))
        await inbox.listen(frozenset())
        assert await inbox.receive(system.harness.quiet) == []
        await (await system.connect()).close()
        assert inbox.life == life

    async def test_closing_the_broker_closes_its_inboxes(self, system: System, broker: Broker, work: Queue) -> None:
        other = await system.connect()
        inbox = other.inbox()
        await ask(inbox, message("work"))
        life = inbox.life
        receiving = asyncio.create_task(inbox.receive(system.harness.patience))
        await asyncio.sleep(0)
        await other.close()
        async with asyncio.timeout(system.harness.patience / 2):
            assert await receiving == []
        assert inbox.life > life

    async def _is_there(self, system: System, broker: Broker, count: int) -> None:
        """So many wait in the queue `work`; where nobody can say, after a moment."""

        async def waiting() -> Sequence[int | None]:
            assert broker.admin is not None
            return [info.ready for info in await broker.admin.inspect(["work"]) if info.ready in (count, None)]

        if broker.admin is None:
            await asyncio.sleep(system.harness.quiet)
        else:
            await eventually(waiting)
