"""Limits: full queues say so; bodies, headers and names come out as they went in."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest

from penstock.brokers.base import Broker, Release
from penstock.errors import PublishError, QueueFull
from penstock.testing.conformance.harness import Promises, System, acks, ids, message, messages

MIB = 2**20

BODIES = {
    "empty": b"",
    "one NUL": b"\x00",
    "NULs": b"\x00" * 1000,
    "ends in NUL": b"text\x00",
    "every byte": bytes(range(256)),
    "invalid UTF-8": b"\xff\xfe\xc3\x28 \xed\xa0\x80",
    "text": "Grüße, мир, 世界, 🚰".encode(),
    "quotes": b"'\"\\`;--[],{}",
    "lines": b"\r\n\n\r",
    "JSON": b'{"a": [1, null]}',
}

HEADERS: dict[str, Any] = {
    "text": "x",
    "empty": "",
    "digits": "123",
    "quotes": "'\"\\",
    "lines": "a\r\nb\x00c",
    "unicode ключ 鍵": "värde 値 🚰",
    "zero": 0,
    "negative": -7,
    "large": 2**53 + 1,
    "float": 0.1,
    "whole float": 1.0,
    "tiny": 1e-300,
    "yes": True,
    "no": False,
    "none": None,
}


class LimitPromises(Promises):
    async def test_a_full_queue_says_so_and_keeps_what_it_has(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work", max_length=3)
        if not system.can.exact_length:
            confirmed, refusal = await system.fill(broker, queue)
            assert isinstance(refusal, QueueFull)
            assert (refusal.queue, refusal.limit) == ("work", 3)
            assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(confirmed)
            await system.publish(broker, messages("work", 1))
            return
        outcomes = list(await broker.publish(batch := messages("work", 5)))
        assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [QueueFull] * 2
        refused = outcomes[3]
        assert isinstance(refused, QueueFull)
        assert (refused.queue, refused.limit) == ("work", 3)
        [again] = await broker.publish([message("work")])
        assert isinstance(again, QueueFull)
        assert sorted(ids(await system.drain(system.consume(broker, queue)))) == sorted(ids(batch[:3]))
        await system.publish(broker, messages("work", 3))

    async def test_held_messages_count_and_acknowledged_ones_do_not(self, system: System, broker: Broker) -> None:
        if not system.can.exact_length:
            return
        queue = await system.declare(broker, "work", max_length=2)
        await system.publish(broker, messages("work", 2))
        subscription = system.consume(broker, queue)
        held = await system.take(subscription, 2)
        assert [type(one) for one in await broker.publish(messages("work", 1))] == [QueueFull]
        await subscription.settle(acks(held[:1]))
        assert [type(one) for one in await broker.publish(messages("work", 2))] == [type(None), QueueFull]

    async def test_a_message_that_one_queue_refuses_reaches_none(self, system: System, broker: Broker) -> None:
        if not (system.can.topics and system.can.exact_length):
            return
        await system.declare(broker, "full", topics=("news",), max_length=1)
        roomy = await system.declare(broker, "roomy", topics=("news",))
        await system.publish(broker, [message("full")])
        assert [type(one) for one in await broker.publish([message("news")])] == [QueueFull]
        assert await system.silent(system.consume(broker, roomy))

    async def test_without_exact_lengths_what_one_queue_refuses_is_an_error_all_the_same(
        self, system: System, broker: Broker
    ) -> None:
        if system.can.exact_length or not system.can.topics:
            return
        full = await system.declare(broker, "full", topics=("news",), max_length=1)
        roomy = await system.declare(broker, "roomy", topics=("news",))
        await system.fill(broker, full)
        outcomes = await broker.publish(batch := [message("news")])
        assert isinstance(outcomes[0], PublishError)
        assert ids(await system.consume(broker, roomy).receive(10, system.harness.quiet)) in ([], ids(batch))

    @pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
    async def test_a_body_comes_out_as_it_went_in(self, system: System, broker: Broker, body: bytes) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", body)])
        [got] = await system.take(system.consume(broker, queue))
        assert got.raw == body
        assert type(got.raw) is bytes

    async def test_bodies_of_one_batch_do_not_run_into_each_other(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        rng = random.Random(7)
        bodies = [*BODIES.values(), *(rng.randbytes(rng.choice((0, 1, 300, 5000, 70_000))) for _ in range(60))]
        batch = [message("work", body) for body in bodies]
        await system.publish(broker, batch)
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, len(batch))
        assert {one.id: one.raw for one in taken} == {one.id: one.body for one in batch}
        await subscription.settle([Release(one) for one in taken])
        assert {one.id: one.raw for one in await system.take(subscription, len(batch))} == {
            one.id: one.body for one in batch
        }

    async def test_bodies_as_large_as_the_ceiling_go_through(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        largest = random.Random(8).randbytes(system.harness.largest_body)
        batch = [message("work", largest[:size]) for size in (len(largest), len(largest) // 8, len(largest))]
        await system.publish(broker, batch)
        taken = await system.take(system.consume(broker, queue), 3)
        digests = {one.id: hashlib.sha256(one.raw).digest() for one in taken}
        assert digests == {one.id: hashlib.sha256(one.body).digest() for one in batch}

    async def test_a_batch_of_the_largest_bodies_may_come_in_parts_but_comes(
        self, system: System, broker: Broker
    ) -> None:
        queue = await system.declare(broker, "work")
        body = bytes(system.harness.largest_body)
        sent = [id for _ in range(10) for id in await system.publish(broker, [message("work", body)])]
        subscription = system.consume(broker, queue)
        taken = await system.take(subscription, 10)
        assert sorted(ids(taken)) == sorted(sent)
        assert {len(one.raw) for one in taken} == {len(body)}

    @pytest.mark.parametrize("name", HEADERS.keys())
    async def test_a_header_keeps_its_value_and_its_type(self, system: System, broker: Broker, name: str) -> None:
        queue = await system.declare(broker, "work")
        await system.publish(broker, [message("work", headers={name: HEADERS[name]})])
        [got] = await system.take(system.consume(broker, queue))
        assert dict(got.headers) == {name: HEADERS[name]}
        assert type(got.headers[name]) is type(HEADERS[name])

    async def test_many_and_long_headers_are_carried_whole(self, system: System, broker: Broker) -> None:
        queue = await system.declare(broker, "work")
        headers = {**HEADERS, **{f"h{number}": "x" * 100 for number in range(50)}, "long": "ü" * 5000}
        await system.publish(broker, [message("work", headers=headers)])
        [got] = await system.take(system.consume(broker, queue))
        assert dict(got.headers) == headers

    @pytest.mark.parametrize(
        "name", ["ключ/鍵 🚰", "a.b-c_d:e", "with space", "quote'\"", "x" * 200, "UPPER", "%s{}*#"]
    )
    async def test_names_ids_and_keys_may_be_any_text(self, system: System, broker: Broker, name: str) -> None:
        queue = await system.declare(broker, name, ordered=system.can.ordered)
        await system.publish(broker, [message(name, id=name, key=name)])
        subscription = system.consume(broker, queue)
        [got] = await system.take(subscription)
        assert (got.queue, got.topic, got.id, got.key) == (name, name, name, name)
        assert not await subscription.settle(acks([got]))

    async def test_names_that_differ_in_case_or_accents_are_different(self, system: System, broker: Broker) -> None:
        names = ["name", "Name", "námé", "name ", "name/"]
        for name in names:
            await system.declare(broker, name)
        await system.publish(broker, [message(name, id=name) for name in names])
        for name in names:
            assert ids(await system.drain(system.consume(broker, await system.declare(broker, name)))) == [name]
