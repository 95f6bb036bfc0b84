"""Starting, stopping, pausing, and what surrounds a handler."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from penstock import App, BrokerRefused, BrokerUnavailable, Client, Message, Unavailable, context, life
from penstock.brokers import registry
from penstock.brokers.base import Ack, Move, Queue
from penstock.brokers.memory import MemoryBroker
from penstock.delivery.consumer import queues_of
from penstock.delivery.watchdog import Watchdog
from penstock.message import Outgoing
from tests.helpers import dead_letters, eventually, queue_info

MakeApp = Callable[..., App]


async def test_hooks_run_around_consuming_in_order(make_app: MakeApp) -> None:
    app = make_app()
    order: list[str] = []

    @app.on_startup
    async def connect() -> None:
        order.append("start 1")
        assert context.app is app

    @app.on_startup
    def prepare() -> None:
        order.append("start 2")

    @app.on_shutdown
    def report() -> None:
        order.append("stop 2")

    @app.on_shutdown
    async def disconnect() -> None:
        order.append("stop 1")
        raise ValueError("logged, and the others still run")

    @app.route("q")
    async def handle(message: Message) -> None:
        order.append("message")

    async with app:
        await app.publish("q", 1)
        await eventually(lambda: "message" in order)
    assert order == ["start 1", "start 2", "message", "stop 1", "stop 2"]


async def test_a_failing_start_hook_ends_the_start_and_consumes_nothing(make_app: MakeApp) -> None:
    app = make_app()
    handled: list[Any] = []
    app.route("q")(handled.append)

    @app.on_startup
    def fail() -> None:
        raise RuntimeError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        async with app:
            pass
    assert not app.consuming


async def test_leaving_the_block_finishes_what_runs_and_releases_the_rest(make_app: MakeApp) -> None:
    app = make_app()
    started: list[Any] = []
    finished: list[Any] = []

    @app.route("q", concurrency=2)
    async def handle(message: Message) -> None:
        started.append(message.body)
        await asyncio.sleep(0.2)
        finished.append(message.body)

    await app.publish_many("q", list(range(10)))
    async with app:
        await eventually(lambda: len(started) == 2)
    assert finished == started == [0, 1]
    info = await queue_info(app, "q")
    assert info.ready == 8
    assert info.unsettled in (0, None)
    await app.client.close()


async def test_what_does_not_end_within_the_grace_is_cancelled_and_comes_again_uncounted(make_app: MakeApp) -> None:
    app = make_app(grace=0.2)
    attempts: list[int] = []
    hang = True

    @app.route("q")
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        while hang:
            await asyncio.sleep(0.01)

    await app.publish("q", 1)
    async with app:
        await eventually(lambda: attempts)
    hang = False
    async with app:
        await eventually(lambda: len(attempts) == 2)
    assert attempts == [1, 1]


async def test_consuming_is_true_only_while_it_is(make_app: MakeApp) -> None:
    app = make_app()
    app.route("q")(_nothing)
    assert not app.consuming
    async with app:
        await eventually(lambda: app.consuming)
        with pytest.raises(RuntimeError, match="running already"):
            await app.__aenter__()
    assert not app.consuming


async def _nothing(message: Message) -> None: ...


async def test_an_app_can_run_again(make_app: MakeApp) -> None:
    app = make_app()
    got: list[Any] = []

    @app.route("q")
    async def handle(message: Message) -> None:
        got.append(message.body)

    for n in range(3):
        async with app:
            await app.publish("q", n)
            await eventually(functools.partial(lambda count: len(got) == count, n + 1))
    assert got == [0, 1, 2]


async def test_nothing_is_left_running_after_the_block(make_app: MakeApp) -> None:
    app = make_app()
    app.route("q", concurrency=5)(_nothing)
    before = asyncio.all_tasks()
    async with app:
        await app.publish_many("q", list(range(50)))
    await eventually(lambda: asyncio.all_tasks() == before)  # a driver may take a moment to close its line


async def test_settings_and_context_reach_handlers(make_app: MakeApp) -> None:
    app = make_app(settings={"counter": 0})
    seen: list[Any] = []

    @app.route("q", concurrency=3)
    async def handle(message: Message) -> None:
        await asyncio.sleep(0)
        context.settings.counter += 1
        seen.append(context.message is message and context.app is app)

    async with app:
        await app.publish_many("q", [1, 2, 3])
        await eventually(lambda: len(seen) == 3)
    assert seen == [True] * 3
    assert app.settings.counter == 3
    assert len(app.settings.uuid) == 32
    with pytest.raises(AttributeError, match="no setting 'nothing'"):
        _ = app.settings.nothing


async def test_an_outage_of_one_route_does_not_pause_another(make_app: MakeApp) -> None:
    app = make_app()
    seen: list[Any] = []

    @app.route("away", backoff=(5, 5))
    async def away(message: Message) -> None:
        raise Unavailable("for long")

    @app.route("fine")
    async def fine(message: Message) -> None:
        seen.append(message.body)

    async with app:
        await app.publish("away", 1)
        await app.publish("fine", 1)
        await eventually(lambda: seen)
        await eventually(lambda: released(app))
    assert await dead_letters(app, "away") == []
    await app.client.close()


async def released(app: App) -> bool:
    info = await queue_info(app, "away")
    if info.unsettled is None:  # then it may have been handed to the same consumer again, to wait there
        return True
    return (info.ready, info.unsettled) == (1, 0)


async def test_a_client_bounds_its_connections_and_comes_back(make_app: MakeApp, broker_url: str) -> None:
    app = make_app()
    app.route("q")(_nothing)
    async with app.client:
        await app.publish("q", 1)
    async with Client(broker_url) as client:
        await client.publish("q", 2)
    async with app.client:
        await app.publish("q", 3)
        assert (await queue_info(app, "q")).ready == 3


async def test_losing_the_file_while_consuming_ends_the_run_loudly(tmp_path: Any) -> None:
    app = App(f"sqlite:///{tmp_path}/queue.db", grace=1)
    app.route("q")(_nothing)
    async with app:
        await eventually(lambda: app.consuming)
        assert app._life is not None
        (tmp_path / "queue.db").rename(tmp_path / "elsewhere.db")
        error = await asyncio.wait_for(app._life.failed, 10)
        assert isinstance(error, BrokerRefused)
        assert "removed or replaced while in use" in str(error)
        (tmp_path / "elsewhere.db").rename(tmp_path / "queue.db")


@pytest.mark.blocks
async def test_the_watchdog_names_what_blocks_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    def hog() -> None:
        until = time.monotonic() + 1.6
        while time.monotonic() < until:
            time.sleep(0.1)

    with caplog.at_level(logging.WARNING), Watchdog(blocked_after=0.6):
        hog()
        await eventually(lambda: "turns again" in caplog.text)
    assert caplog.text.count("event loop has been blocked") == 1
    assert "hog (" in caplog.text


async def test_the_watchdog_is_silent_about_a_loop_that_turns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Watchdog(blocked_after=1.0):
        until = asyncio.get_running_loop().time() + 2.0
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
    assert caplog.text == ""


@pytest.mark.parametrize("which", range(1, 7))
async def test_a_broker_that_goes_away_while_queues_are_declared_does_not_end_the_start(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "FIRST_RETRY", 0.01)
    app, done, declared = App("memory://"), asyncio.Event(), 0
    real = MemoryBroker.declare

    async def declare(self: MemoryBroker, queue: Queue) -> None:
        nonlocal declared
        declared += 1
        if declared == which:
            raise BrokerUnavailable("unexpected end of the line")
        await real(self, queue)

    monkeypatch.setattr(MemoryBroker, "declare", declare)

    @app.route("q")
    async def handle(message: Message) -> None:
        done.set()

    async with app:
        await app.publish("q", 1)
        await done.wait()
    assert declared > which, "it was declared again"


async def test_what_topics_may_reach_is_declared_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two routes on a topic: what is published while they are declared misses one of them as rarely as can be."""
    app, declared = App("memory://"), list[str]()
    real = MemoryBroker.declare

    async def declare(self: MemoryBroker, queue: Queue) -> None:
        declared.append(queue.name)
        await real(self, queue)

    monkeypatch.setattr(MemoryBroker, "declare", declare)
    for queue in ("one", "two"):

        @app.route(queue, topics=["news"])
        async def handle(message: Message) -> None: ...

    await app.publish("news", 1)
    assert declared[2:4] == ["one", "two"]
    assert len(declared) == 6


async def test_a_try_to_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "FIRST_RETRY", 0.001)
    app, tries, subscribed = App("memory://"), 0, list[Any]()
    real, subscribe = MemoryBroker.declare, MemoryBroker.subscribe

    async def declare(self: MemoryBroker, queue: Queue) -> None:
        nonlocal tries
        tries += 1
        if 3 < tries < 10:  # the first three are those of the connection
            raise BrokerUnavailable("unexpected end of the line")
        await real(self, queue)

    def noted(self: MemoryBroker, *args: Any, **options: Any) -> Any:
        subscribed.append(subscribe(self, *args, **options))
        return subscribed[-1]

    monkeypatch.setattr(MemoryBroker, "declare", declare)
    monkeypatch.setattr(MemoryBroker, "subscribe", noted)

    @app.route("q")
    async def handle(message: Message) -> None: ...

    async with app:
        assert tries >= 10
        assert [one._closed for one in subscribed[-2:]] == [False, False]
        assert all(one._closed for one in subscribed[:-2])
        assert len(subscribed) > 10


@pytest.mark.parametrize("broker_url", ["memory", "sqlite", "postgres", "redis"], indirect=True)
async def test_a_lane_keeps_the_order_of_its_queue_as_a_route_declares_them(broker_url: str) -> None:
    broker = registry.connect(broker_url)
    assert broker.capabilities.ordered
    route = App("memory://")
    route.route("work", ordered=True)(lambda message: None)
    await broker.open()
    try:
        declared = {queue.name: queue for queue in queues_of(route.routes[0])}
        for queue in declared.values():
            await broker.declare(queue)
        first, second = (
            Outgoing(id=id, topic="work", body=b"1", headers={}, key="k", enqueued_at=time.time()) for id in ("1", "2")
        )
        assert list(await broker.publish([first, second])) == [None, None]
        lost: list[Any] = []
        own = broker.subscribe([declared["work"]], prefetch=10, lease=30, on_lost=lost.extend)
        lane = broker.subscribe([declared["work.suspects"]], prefetch=1, lease=30, on_lost=lost.extend)
        [held] = await own.receive(10, 5.0)
        await own.settle([Move(held, "work.suspects", first)])
        [suspect] = await lane.receive(1, 5.0)
        assert suspect.id == "1"
        assert await own.receive(10, 0.3) == [], "the next of its key waits, although the queue is another"
        await lane.settle([Ack(suspect)])
        assert [one.id for one in await own.receive(10, 5.0)] == ["2"]
    finally:
        await broker.close()
