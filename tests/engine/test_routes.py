"""Shapes, batches, verdicts and policies: what a route does with its messages."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from penstock import Actions, App, Events, Message, Options, Timeit, Unavailable, Unsupported, context
from tests.helpers import capabilities, dead_letters, eventually, queue_info

MakeApp = Callable[..., App]


@dataclasses.dataclass
class Order:
    n: int


class OrderStruct(msgspec.Struct):
    n: int


class OrderDict(TypedDict):
    n: int


class OrderModel(pydantic.BaseModel):
    n: int


async def test_a_handler_without_annotation_gets_a_list_always(make_app: MakeApp) -> None:
    app, got = make_app(), []

    @app.route("q")
    async def handle(messages):  # type: ignore[no-untyped-def]
        got.append(messages)

    async with app:
        await app.publish("q", {"n": 1})
        await eventually(lambda: got)
    assert isinstance(got[0], list)
    assert [message.body for message in got[0]] == [{"n": 1}]


async def test_a_batch_holds_at_most_bulk_size_and_is_flushed_by_time(make_app: MakeApp) -> None:
    app, sizes = make_app(), []

    @app.route("q", bulk_size=10, bulk_timeout=0.2)
    async def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    await app.publish_many("q", list(range(25)))
    async with app:
        await eventually(lambda: sum(sizes) == 25)
    assert sizes == [10, 10, 5]


async def test_without_a_bulk_timeout_a_batch_waits_until_full(make_app: MakeApp) -> None:
    app, sizes = make_app(), []

    @app.route("q", bulk_size=10, bulk_timeout=None)
    async def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    async with app:
        await app.publish_many("q", list(range(9)))
        await eventually(lambda: queue_is(app, "q", unsettled=9))
        assert sizes == []
        await app.publish("q", 9)
        await eventually(lambda: sizes)
    assert sizes == [10]


async def queue_is(app: App, name: str, **values: int) -> bool:
    """Whether the counts of a queue are these, as far as the system can say."""
    info = await queue_info(app, name)
    return all(getattr(info, key) in (value, None) for key, value in values.items())


@pytest.mark.parametrize("kind", [Order, OrderStruct, OrderDict, OrderModel])
async def test_typed_handlers_get_validated_bodies(make_app: MakeApp, kind: Any) -> None:
    app, one_by_one, in_lists = make_app(), [], []

    @app.route("single", topics=["orders"])
    async def single(order: kind) -> None:
        one_by_one.append(order)

    @app.route("many", topics=["orders"], bulk_size=2, bulk_timeout=0.1)
    async def many(orders: list[kind]) -> None:
        in_lists.append(orders)

    async with app:
        await app.publish_many("orders", [{"n": 1}, {"n": "no number"}, {"n": 2}])
        await eventually(lambda: len(one_by_one) == 2 and sum(map(len, in_lists)) == 2)
        await eventually(lambda: has_dead(app, "single", 1))
        (letter,) = await dead_letters(app, "single")
    expected = [{"n": 1}, {"n": 2}] if kind is OrderDict else [kind(n=1), kind(n=2)]
    assert one_by_one == expected
    assert [order for orders in in_lists for order in orders] == expected
    assert (letter.reason, letter.attempts, letter.body) == ("invalid", 1, {"n": "no number"})


async def has_dead(app: App, queue: str, count: int) -> bool:
    return len(await dead_letters(app, queue)) == count


async def test_a_plain_function_runs_in_a_thread(make_app: MakeApp) -> None:
    app, threads = make_app(), []

    @app.route("q", concurrency=3)
    def handle(message: Message) -> None:
        threads.append((threading.get_ident(), context.message.id == message.id))

    async with app:
        await app.publish_many("q", [1, 2, 3])
        await eventually(lambda: len(threads) == 3)
    assert all(ident != threading.get_ident() and own_context for ident, own_context in threads)


async def test_methods_partials_and_callable_objects_are_handlers(make_app: MakeApp) -> None:
    app, got = make_app(), []

    class Handler:
        async def method(self, message: Message) -> None:
            got.append("method")

        async def __call__(self, message: Message) -> None:
            got.append("object")

    async def with_more(prefix: str, message: Message) -> None:
        got.append(prefix)

    app.route("a")(Handler().method)
    app.route("b")(Handler())
    app.route("c")(functools.partial(with_more, "partial"))
    async with app:
        for name in "abc":
            await app.publish(name, None)
        await eventually(lambda: len(got) == 3)
    assert sorted(got) == ["method", "object", "partial"]


async def test_concurrency_bounds_handler_calls(make_app: MakeApp) -> None:
    app = make_app()
    running = most = done = 0

    @app.route("q", concurrency=4)
    async def handle(message: Message) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        done += 1

    async with app:
        await app.publish_many("q", list(range(40)))
        await eventually(lambda: done == 40)
    assert most == 4


async def test_never_more_than_prefetch_are_unsettled(make_app: MakeApp) -> None:
    app, release = make_app(), asyncio.Event()
    done = 0

    @app.route(["q", "r"], prefetch=7, concurrency=2)
    async def handle(message: Message) -> None:
        nonlocal done
        await release.wait()
        done += 1

    await app.publish_many("q", list(range(50)))
    await app.publish_many("r", list(range(50)))
    async with app:
        await eventually(lambda: held_at_least(app, 6))  # where it is divided among the queues, 3 each
        for _ in range(20):
            assert await held(app) <= 7
        release.set()
        await eventually(lambda: done == 100)


async def held(app: App) -> int:
    """How many of the hundred are in hand."""
    infos = [await queue_info(app, name) for name in ("q", "r")]
    if any(info.unsettled is None for info in infos):
        return 100 - sum(info.ready or 0 for info in infos)
    return sum(info.unsettled or 0 for info in infos)


async def held_at_least(app: App, count: int) -> bool:
    return await held(app) >= count


@pytest.mark.parametrize(
    ("prefetch", "concurrency", "bulk_size", "expected"), [(4, 1, 10, 4), (8, 4, 10, 2), (2, 4, 10, 1)]
)
async def test_effective_bulk_is_bounded_by_prefetch_and_concurrency(
    make_app: MakeApp, prefetch: int, concurrency: int, bulk_size: int, expected: int
) -> None:
    app, sizes = make_app(), []

    @app.route("q", bulk_size=bulk_size, prefetch=prefetch, concurrency=concurrency, bulk_timeout=0.1)
    async def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))
        await asyncio.sleep(0.01)

    await app.publish_many("q", list(range(40)))
    async with app:
        await eventually(lambda: sum(sizes) == 40)
    assert max(sizes) == expected


async def test_the_verdict_of_a_message_beats_the_policy_even_when_the_handler_raises(make_app: MakeApp) -> None:
    app = make_app()
    seen: list[Any] = []

    @app.route("q", bulk_size=4, options={Events.ON_EXCEPTION: Actions.REJECT})
    async def handle(messages: list[Message]) -> None:
        seen.extend(message.body for message in messages)
        for message in messages:
            if message.body == "accept":
                message.accept()
            if message.body == "retry" and message.attempt == 1:
                message.retry(delay=0)
            if message.body == "changed its mind":
                message.reject(requeue=False)
                message.accept()
        if len(messages) == 4:
            raise ValueError("a batch with verdicts in it")

    async with app:
        await app.publish_many("q", ["accept", "retry", "changed its mind", "no verdict"])
        await eventually(lambda: has_dead(app, "q", 1))
        await eventually(lambda: seen.count("retry") == 2)
        letters = await dead_letters(app, "q")
        await eventually(lambda: queue_is(app, "q", ready=0, unsettled=0))
    assert [(letter.body, letter.reason) for letter in letters] == [("no verdict", "failed")]
    assert letters[0].error == "ValueError: a batch with verdicts in it"
    assert "raise ValueError" in letters[0].traceback
    assert sorted(seen) == ["accept", "changed its mind", "no verdict", "retry", "retry"]


async def test_reject_goes_to_the_dead_letters_and_nowhere_else(make_app: MakeApp) -> None:
    app, seen = make_app(), []

    @app.route("q")
    async def handle(message: Message) -> None:
        seen.append(message.body)
        message.reject(requeue=False)

    async with app:
        id = await app.publish("q", {"n": 1}, headers={"colour": "red"})
        await eventually(lambda: has_dead(app, "q", 1))
        (letter,) = await dead_letters(app, "q")
    assert (letter.id, letter.queue, letter.reason, letter.origin) == (id, "q", "rejected", "q")
    assert letter.error is None
    assert seen == [{"n": 1}]


async def test_each_failure_counts_one_attempt_until_max_attempts(make_app: MakeApp) -> None:
    app, attempts = make_app(), []

    @app.route("q", max_attempts=4, backoff=(0, 0.01))
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        match len(attempts):
            case 1:
                raise ValueError("fails")
            case 2:
                message.reject()
            case 3:
                message.retry(delay=0.01)
            case _:
                raise KeyError("the last one")

    async with app:
        await app.publish("q", "x")
        await eventually(lambda: has_dead(app, "q", 1))
        (letter,) = await dead_letters(app, "q")
    assert attempts == [1, 2, 3, 4]
    assert (letter.reason, letter.attempts) == ("failed", 4)
    assert letter.error == "KeyError: 'the last one'"


async def test_max_attempts_none_never_gives_up(make_app: MakeApp) -> None:
    app, attempts = make_app(), []

    @app.route("q", max_attempts=None, backoff=(0, 0))
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        if len(attempts) < 15:
            raise ValueError

    async with app:
        await app.publish("q", "x")
        await eventually(lambda: len(attempts) == 15)
        assert await dead_letters(app, "q") == []
    assert attempts == list(range(1, 16))


async def test_a_retry_waits_for_its_delay_in_the_broker(make_app: MakeApp) -> None:
    app, times = make_app(), []

    @app.route("q")
    async def handle(message: Message) -> None:
        times.append(time.monotonic())
        if message.attempt == 1:
            message.retry(delay=0.3)

    async with app:
        await app.publish("q", "x")
        await eventually(lambda: len(times) == 1)
        if (await capabilities(app)).sees_delayed:
            await eventually(lambda: queue_is(app, "q", ready=1, unsettled=0))
        await eventually(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.29


async def test_what_has_failed_is_retried_by_itself(make_app: MakeApp) -> None:
    """One bad message costs its batch-mates one attempt, not all of theirs."""
    app, batches = make_app(), []

    @app.route("q", bulk_size=10, bulk_timeout=0.1, backoff=(0, 0.01), max_attempts=3)
    async def handle(messages: list[Message]) -> None:
        batches.append([message.body for message in messages])
        if "bad" in batches[-1]:
            raise ValueError

    async with app:
        await app.publish_many("q", ["a", "b", "bad", "c"])
        await eventually(lambda: has_dead(app, "q", 1))
        await eventually(lambda: queue_is(app, "q", ready=0, unsettled=0))
        letters = await dead_letters(app, "q")
    assert batches[0] == ["a", "b", "bad", "c"]
    assert all(len(batch) == 1 for batch in batches[1:])
    assert [letter.body for letter in letters] == ["bad"]


async def test_an_outage_pauses_the_route_and_counts_no_attempt(make_app: MakeApp) -> None:
    app = make_app()
    calls: list[int] = []
    stored: list[Any] = []
    away = True

    @app.route("q", bulk_size=5, bulk_timeout=0.05, max_attempts=2, backoff=(0.05, 0.1))
    async def handle(messages: list[Message]) -> None:
        calls.append(len(messages))
        if away:
            raise Unavailable("the database is away")
        stored.extend((message.body, message.attempt) for message in messages)

    async with app:
        await app.publish_many("q", list(range(12)))
        await eventually(lambda: len(calls) >= 6)
        assert await dead_letters(app, "q") == []
        away = False
        await eventually(lambda: len(stored) == 12)
        await eventually(lambda: queue_is(app, "q", ready=0, unsettled=0))
    assert sorted(stored) == [(n, 1) for n in range(12)]


async def test_on_success_can_requeue_and_reject(make_app: MakeApp) -> None:
    app, attempts = make_app(), []

    @app.route("again", on_success=Actions.REQUEUE, max_attempts=3, backoff=(0, 0))
    async def again(message: Message) -> None:
        attempts.append(message.attempt)

    @app.route("never", on_success=Actions.REJECT)
    async def never(message: Message) -> None:
        pass

    async with app:
        await app.publish("again", 1)
        await app.publish("never", 1)
        await eventually(lambda: has_dead(app, "again", 1))
        await eventually(lambda: has_dead(app, "never", 1))
        (letter,) = await dead_letters(app, "again")
    assert attempts == [1, 2, 3]
    assert letter.error == "given back 3 times"


async def test_on_exception_ack_forgives(make_app: MakeApp) -> None:
    app, seen = make_app(), []

    @app.route("q", on_exception=Actions.ACK)
    async def handle(message: Message) -> None:
        seen.append(message.body)
        raise ValueError

    async with app:
        await app.publish("q", 1)
        await eventually(lambda: seen)
        await eventually(lambda: queue_is(app, "q", ready=0, unsettled=0))
        assert await dead_letters(app, "q") == []


async def test_a_handler_that_cancels_itself_or_exits_has_failed(make_app: MakeApp) -> None:
    app, seen = make_app(), []

    @app.route("q", max_attempts=1)
    async def handle(message: Message) -> None:
        seen.append(message.body)
        if message.body == "cancels":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)
        if message.body == "raises cancelled":
            raise asyncio.CancelledError
        if message.body == "exits":
            raise SystemExit(3)

    async with app:
        await app.publish_many("q", ["cancels", "raises cancelled", "exits", "fine"])
        await eventually(lambda: has_dead(app, "q", 3))
        await eventually(lambda: "fine" in seen)


async def test_a_topic_feeds_several_queues_and_a_queue_several_topics(make_app: MakeApp) -> None:
    app, store, alerts = make_app(), [], []

    @app.route("store", topics=["readings"])
    async def keep(message: Message) -> None:
        store.append((message.topic, message.queue, message.body))

    @app.route("alerts", topics=["readings", "alarms"])
    async def alert(message: Message) -> None:
        alerts.append((message.topic, message.queue, message.body))

    async with app:
        await app.publish("readings", 1)
        await app.publish("alarms", 2)
        await app.publish("store", 3)
        await eventually(lambda: len(store) == 2 and len(alerts) == 2)
    assert sorted(store) == [("readings", "store", 1), ("store", "store", 3)]
    assert sorted(alerts) == [("alarms", "alerts", 2), ("readings", "alerts", 1)]


async def test_a_retry_returns_to_its_own_queue_only(make_app: MakeApp) -> None:
    """`b` listens to the name `a`: what queue `a` gives back must not reach it again."""
    app, a, b = make_app(), [], []

    @app.route("a", backoff=(0, 0))
    async def first(message: Message) -> None:
        a.append(message.attempt)
        if message.attempt < 3:
            raise ValueError

    @app.route("b", topics=["a"])
    async def second(message: Message) -> None:
        b.append(message.attempt)

    async with app:
        await app.publish("a", 1)
        await eventually(lambda: len(a) == 3 and b)
        await eventually(lambda: queue_is(app, "b", ready=0, unsettled=0))
    assert (a, b) == ([1, 2, 3], [1])


async def test_messages_of_a_key_go_in_order_also_through_failures(make_app: MakeApp) -> None:
    app, seen = make_app(), []

    @app.route("q", ordered=True, concurrency=8, backoff=(0, 0.02))
    async def handle(message: Message) -> None:
        await asyncio.sleep(0.001 * (hash(message.id) % 5))
        if message.attempt == 1 and message.body % 3 == 0:
            raise ValueError
        seen.append((message.key, message.body))

    refused = None
    try:
        assert (await capabilities(app)).ordered
    except Unsupported as error:  # a system that keeps no order says so before anything is consumed
        refused = str(error)
    if refused is not None:
        assert "order" in refused
        await app.client.close()
        return
    async with app:
        for n in range(20):
            for key in "abc":
                await app.publish("q", n, key=key)
        await eventually(lambda: len(seen) == 60)
    for key in "abc":
        assert [n for k, n in seen if k == key] == list(range(20))


async def test_several_brokers_in_one_app(make_app: MakeApp, tmp_path: Any) -> None:
    app, got = make_app(brokers={"other": f"sqlite:///{tmp_path}/other.db"}), []

    @app.route("q")
    async def main_queue(message: Message) -> None:
        got.append(("main", message.body))

    @app.route("q", broker="other")
    async def other_queue(message: Message) -> None:
        got.append(("other", message.body))

    async with app:
        await app.publish("q", 1)
        await app.publish("q", 2, broker="other")
        await eventually(lambda: len(got) == 2)
    assert sorted(got) == [("main", 1), ("other", 2)]


async def test_dead_letters_can_go_to_another_broker(make_app: MakeApp, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/graveyard.db"
    app, other = make_app(dead_letters=url), App(url)

    @app.route("q", max_attempts=1)
    async def handle(message: Message) -> None:
        raise ValueError("no")

    async with app:
        await app.publish("q", {"n": 1})
        await eventually(lambda: has_dead(other, "q", 1))
        await eventually(lambda: queue_is(app, "q", ready=0, unsettled=0))
        assert await dead_letters(app, "q") == []
    (letter,) = await dead_letters(other, "q")
    assert (letter.queue, letter.reason, letter.body) == ("q", "failed", {"n": 1})
    await other.client.close()


async def test_a_vhost_is_a_namespace(make_app: MakeApp, broker_url: str, other_vhost: str) -> None:
    there = f"{broker_url}{'&' if '?' in broker_url else '?'}vhost={other_vhost}"
    app, got = make_app(brokers={"fluentd": there}), []

    @app.route(["counts"], vhost=other_vhost)
    async def handle(message: Message) -> None:
        got.append(message.body)

    @app.route(["counts"])
    async def elsewhere(message: Message) -> None:
        got.append(("default", message.body))

    async with app:
        await app.publish("counts", 1, broker="fluentd")
        await app.publish("counts", 2)
        await eventually(lambda: len(got) == 2)
    assert set(map(str, got)) == {"1", "('default', 2)"}


async def test_timeit_on_a_handler_does_not_change_its_shape(make_app: MakeApp) -> None:
    app, got, told = make_app(), [], []

    async def callback(**about: Any) -> None:
        told.append(about)

    @app.route("q")
    @Timeit(name="access", callback=callback)
    async def handle(message: Message) -> None:
        got.append(message.body)

    async with app:
        await app.publish("q", 1)
        await eventually(lambda: told)
    assert got == [1]
    assert set(told[0]["transactions"]) == {"access"}


async def test_options_say_the_same_as_keywords(make_app: MakeApp) -> None:
    app = make_app()

    async def handle(messages):  # type: ignore[no-untyped-def]
        pass

    app.route("a", options={Options.BULK_SIZE: 7, Events.ON_EXCEPTION: Actions.REJECT})(handle)
    app.route("b", bulk_size=7, on_exception=Actions.REJECT)(handle)
    assert app.routes[0].policy == app.routes[1].policy


async def test_priority_delay_and_expiry_of_published_messages(make_app: MakeApp) -> None:
    app, got = make_app(), []

    @app.route("q", priorities=10)
    async def handle(message: Message) -> None:
        got.append(message.body)

    for body, priority in [("low", 0), ("high", 255), ("middle", 100)]:
        await app.publish("q", body, priority=priority)
    await app.publish("q", "late", delay=0.3)
    await app.publish("q", "expired", expires=0)
    async with app:
        await eventually(lambda: len(got) == 4)
        info = await queue_info(app, "q")
        told_apart = (await capabilities(app)).priorities
    assert got == (["high", "middle", "low", "late"] if told_apart else ["low", "high", "middle", "late"])
    assert info.expired in (1, None)
