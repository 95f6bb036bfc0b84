"""What once broke a promise, each with the smallest thing that brought it about."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock import (
    App,
    BrokerUnavailable,
    Client,
    ConfigError,
    InvalidMessage,
    Message,
    SyncClient,
    codec,
)
from penstock.brokers.base import Queue
from penstock.brokers.sqlite import SqliteBroker, operations
from penstock.delivery import dead_letters as letters
from penstock.delivery import history
from penstock.logs import JsonFormatter
from penstock.message import Delivery, Outgoing
from tests.helpers import dead_letters, eventually, queue_info

MakeApp = Callable[..., App]


# -- one message must not bring down its consumer


class _Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class _OfItsOwnKind(BaseException):
    pass


FAILURES: dict[str, Callable[[], BaseException]] = {
    "no text": _Speechless,
    "half a surrogate": lambda: FileNotFoundError("caf\udce9"),
    "not an Exception": _OfItsOwnKind,
    "a group with an exit": lambda: BaseExceptionGroup("two", [SystemExit(1), ValueError()]),
    "StopIteration": StopIteration,
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_whatever_a_handler_raises_is_its_failure_and_others_go_on(
    make_app: MakeApp, kind: str, name: str
) -> None:
    app = make_app()
    done: list[Any] = []

    def handle(message: Message) -> None:
        if message.body == "bad":
            raise FAILURES[name]()
        done.append(message.body)

    async def handle_async(message: Message) -> None:
        handle(message)

    app.route("q", max_attempts=1)(handle if kind == "plain" else handle_async)
    async with app:
        await app.publish_many("q", ["bad", "good"])
        await eventually(lambda: done == ["good"])
        (letter,) = await eventually(lambda: dead_letters(app, "q"))
        assert letter.reason == "failed"
        assert app.consuming


@dataclass
class Picky:
    number: int

    def __post_init__(self) -> None:
        {1: "one"}[self.number]


async def test_a_type_whose_own_check_breaks_makes_the_body_invalid(make_app: MakeApp) -> None:
    app = make_app()
    done: list[int] = []

    @app.route("q")
    async def handle(body: Picky) -> None:
        done.append(body.number)

    async with app:
        await app.publish_many("q", [{"number": 2}, {"number": 1}])
        await eventually(lambda: done == [1])
        (letter,) = await eventually(lambda: dead_letters(app, "q"))
        assert letter.reason == "invalid"
        assert "KeyError" in letter.error


@pytest.mark.parametrize("text", ["9" * 4300 + ",0,0", "99999999999999999999,0,0", "0,0," + "9" * 30])
async def test_a_history_that_a_foreign_publisher_made_up_harms_nobody(make_app: MakeApp, text: str) -> None:
    app = make_app()
    done: list[Any] = []

    @app.route("q", max_attempts=None, backoff=(0, 0))
    async def handle(message: Message) -> None:
        done.append(message.body)
        if message.body == "bad" and done.count("bad") == 1:
            raise ValueError
        if message.body == "bad":
            message.reject(requeue=False)

    async with app:
        broker = await app.client._pool.get()
        await broker.publish([Outgoing(id="1", topic="q", body=b'"bad"', headers={history.HEADER: text})])
        await app.publish("q", "good")
        await eventually(lambda: "good" in done)
        assert await eventually(lambda: dead_letters(app, "q"))


# -- cancellations that are not a stop


async def test_a_handler_that_cancels_its_task_and_returns_does_not_end_its_consumer(make_app: MakeApp) -> None:
    app = make_app()
    done: list[int] = []

    @app.route("q")
    async def handle(message: Message) -> None:
        done.append(message.body)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async with app:
        for number in (1, 2, 3):
            await app.publish("q", number)
            await eventually(partial(done.__contains__, number))
        await eventually(lambda: _settled(app, "q"))
    assert done == [1, 2, 3]


async def test_a_timer_that_a_handler_left_behind_does_not_end_its_consumer(make_app: MakeApp) -> None:
    app = make_app()
    done: list[int] = []
    fired = asyncio.Event()

    @app.route("q")
    async def handle(message: Message) -> None:
        done.append(message.body)
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.call_later(0.02, task.cancel)
        loop.call_later(0.03, fired.set)

    async with app:
        await app.publish("q", 1)
        await fired.wait()
        await app.publish("q", 2)
        await eventually(lambda: done == [1, 2])


def test_an_event_loop_that_ends_without_a_stop_is_not_kept_from_it(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path}/q.db", lease=1)
    running = threading.Event()

    @app.route("q")
    async def handle(message: Message) -> None:
        running.set()
        await asyncio.Event().wait()

    async def main() -> None:
        await app.__aenter__()
        await app.publish("q", 1)
        await eventually(running.is_set)

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


async def _settled(app: App, queue: str) -> bool:
    info = await queue_info(app, queue)
    return info.ready == 0 and not info.unsettled  # None: the broker cannot say


async def test_an_app_that_can_consume_no_more_does_not_say_that_it_is_consuming(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path}/q.db", lease=1)

    @app.route("q")
    async def handle(message: Message) -> None: ...

    async with app:
        await eventually(lambda: app.consuming)
        (tmp_path / "q.db").rename(tmp_path / "elsewhere.db")
        await eventually(lambda: not app.consuming)


# -- the loop and the hand


@pytest.mark.blocks
async def test_handlers_that_never_wait_let_the_loop_turn(make_app: MakeApp) -> None:
    app = make_app()
    handled = 0

    @app.route("q")
    async def handle(message: Message) -> None:
        nonlocal handled
        time.sleep(0.02)
        handled += 1

    async with app:
        await app.publish_many("q", list(range(60)))
        seen = []
        while handled < 60:
            await asyncio.sleep(0.001)
            seen.append(handled)
    assert max(after - before for before, after in itertools.pairwise([0, *seen])) < 15


async def test_a_free_worker_gets_the_next_message_while_others_are_busy_for_long(make_app: MakeApp) -> None:
    app = make_app()
    started: list[int] = []
    over = asyncio.Event()

    @app.route("q", concurrency=8, prefetch=8)
    async def handle(message: Message) -> None:
        started.append(message.body)
        await over.wait()

    async with app:
        try:
            await app.publish_many("q", list(range(7)))
            await eventually(lambda: len(started) == 7)
            await app.publish("q", 7)
            await eventually(lambda: len(started) == 8, within=5)
        finally:
            over.set()


async def test_dead_letters_that_cannot_be_forwarded_hold_up_nothing_else(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path}/q.db", dead_letters=f"memory://{tmp_path.name}-dead", prefetch=8)
    away = True

    @app.route("q", max_attempts=1)
    async def handle(message: Message) -> None:
        if message.body == "bad":
            raise ValueError

    async with app:
        abroad: Any = await app.client._pool.get("dead letters")
        publish = abroad.publish

        async def unreliable(messages: Any) -> Any:
            if away:
                raise BrokerUnavailable("away")
            return await publish(messages)

        abroad.publish = unreliable
        await app.publish("q", "bad")
        await app.publish_many("q", list(range(40)))
        await eventually(lambda: _only_the_bad_one_left(app))
        away = False
        await eventually(lambda: _settled(app, "q"))
        (info,) = [one for one in await abroad.admin.inspect() if one.name == "q.dead"]
        assert info.ready == 1


async def _only_the_bad_one_left(app: App) -> bool:
    info = await queue_info(app, "q")
    return (info.ready, info.unsettled) == (0, 1)


# -- what cannot be published


@pytest.mark.parametrize(
    "options",
    [
        {"id": 5},
        {"id": "\ud800"},
        {"key": 5},
        {"key": "\ud800"},
        {"priority": 1.5},
        {"priority": True},
        {"headers": {"a": 2**70}},
        {"headers": {"a": float("nan")}},
        {"headers": {"a": "\ud800"}},
        {"headers": {"\ud800": "a"}},
        {"headers": [("a", 1)]},
    ],
    ids=str,
)
async def test_what_no_consumer_could_read_back_is_refused(make_app: MakeApp, options: dict[str, Any]) -> None:
    app = make_app()
    done: list[int] = []

    @app.route("q")
    async def handle(message: Message) -> None:
        done.append(message.body)

    async with app:
        with pytest.raises(ValueError, match=r"id|key|priority|header"):
            await app.publish("q", 1, **options)
        await app.publish("q", 2)
        await eventually(lambda: done == [2])


async def test_ids_of_many_are_looked_at_one_by_one(make_app: MakeApp) -> None:
    ids: Any = ["1", 2]
    with pytest.raises(ValueError, match="id is text"):
        await make_app().publish_many("q", [1, 2], ids=ids)


def test_what_is_not_a_number_is_no_setting() -> None:
    nan = float("nan")
    with pytest.raises(ConfigError, match="lease"):
        App("memory://", lease=nan)
    with pytest.raises(ConfigError, match="grace"):
        App("memory://", grace=nan)
    with pytest.raises(ConfigError, match="bulk_timeout"):
        App("memory://").route("q", bulk_timeout=nan)


@pytest.mark.parametrize("url", ["sqlite:///a%00b.db", "sqlite:///~nobody-of-that-name/q.db"])
async def test_a_path_that_no_file_can_have_is_an_error_of_configuration(url: str) -> None:
    with pytest.raises(ConfigError):
        await Client(url).publish("q", 1, timeout=5)


def test_a_gzip_body_of_several_parts_is_not_cut_short() -> None:
    raw = gzip.compress(b"one") + gzip.compress(b"two")
    with pytest.raises(InvalidMessage, match="parts"):
        codec.decode(raw, {"content-encoding": "gzip", "content-type": "application/octet-stream"}, 1000)


@pytest.mark.parametrize("header", ['{"queue":"q","reason":"failed","attempts":1,"time":1e300}', "\ud800"])
def test_a_dead_letter_that_somebody_made_up_can_be_read(header: str) -> None:
    delivery = Delivery("q.dead", "1", "q", b"1", {letters.HEADER: header}, None, 0, 0.0, None, 0, 1)
    assert letters.read(delivery, 100).queue == "q"


def test_a_log_line_with_half_a_surrogate_is_still_json() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "caf\udce9", (), None)
    assert "caf" in JsonFormatter().format(record)


# -- the SQLite file


@pytest.fixture
async def broker(tmp_path: Path) -> Any:
    broker = SqliteBroker(f"sqlite:///{tmp_path}/q.db")
    await broker.open()
    await broker.declare(Queue("q"))
    yield broker
    await broker.close()


async def test_what_is_stored_is_not_reported_as_failed_for_want_of_a_wake_up(
    broker: SqliteBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscription = broker.subscribe([Queue("q")], prefetch=10, lease=5, on_lost=print)
    await subscription.receive(1, 0)
    broker.file.wake_up.port = 1  # the consumer now looks like another process's

    def no_more(*args: Any) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("penstock.sqlite.wake.socket.socket", no_more)
    first, second = (Outgoing(id=id, topic="q", body=b"1") for id in "12")
    refusals = await asyncio.gather(broker.publish([first]), broker.publish([second]))
    assert list(refusals) == [[None], [None]]
    assert {delivery.id for delivery in await subscription.receive(10, 5)} == {"1", "2"}


async def test_what_was_claimed_in_an_earlier_life_is_not_handed_out_in_the_next(broker: SqliteBroker) -> None:
    subscription = broker.subscribe([Queue("q")], prefetch=10, lease=5, on_lost=print)
    await subscription.receive(1, 0)
    await broker.publish([Outgoing(id="1", topic="q", body=b"1")])
    gate = threading.Event()
    busy = broker.file.submit(lambda tx: gate.wait())
    receiving = asyncio.create_task(subscription.receive(5, 5))
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    gate.set()
    await busy

    def silence(tx: Any) -> None:
        tx.execute("UPDATE consumers SET deadline = 0")
        operations.take_over(tx)

    await broker.run(silence)
    other = broker.subscribe([Queue("q")], prefetch=10, lease=5, on_lost=print)
    assert [delivery.redelivered for delivery in await other.receive(5, 5)] == [1]
    subscription._given_up()  # as the next heartbeat would
    assert await subscription.receive(5, 0.1) == []


async def test_a_stop_does_not_wait_for_a_process_that_keeps_the_file_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr("penstock.sqlite.file.LAST_WAIT", 0.2)
    app = App(f"sqlite:///{tmp_path}/q.db", grace=0.1)

    @app.route("q")
    async def handle(message: Message) -> None: ...

    async with app:
        await eventually(lambda: app.consuming)
        lock = os.open(tmp_path / "q.db-lock", os.O_RDWR)
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 10
    os.close(lock)


# -- event loops, threads and forks


def test_a_client_serves_one_event_loop_after_another(tmp_path: Path) -> None:
    client = Client(f"sqlite:///{tmp_path}/q.db")

    async def life() -> None:
        broker = await client._pool.get()
        await broker.declare(Queue("q"))
        await client.close()
        await asyncio.gather(*(client.publish("q", 1) for _ in range(3)))
        await client.close()

    asyncio.run(life())
    asyncio.run(life())


def _make_queue(url: str) -> None:
    async def make() -> None:
        broker = SqliteBroker(url)
        await broker.declare(Queue("q"))
        await broker.close()

    asyncio.run(make())


def _in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Do something in a thread; what it returned or raised, once called, or "stuck"."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(10)
        return results[0] if results else "stuck"

    return join


def test_closing_a_blocking_client_ends_the_verbs_of_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trying = threading.Event()

    async def away(self: SqliteBroker) -> None:
        trying.set()
        raise BrokerUnavailable("away")

    monkeypatch.setattr(SqliteBroker, "open", away)
    client = SyncClient(f"sqlite:///{tmp_path}/q.db")
    outcome = _in_thread(lambda: client.publish("q", 1, timeout=60))
    assert trying.wait(10)
    assert _in_thread(client.close)() is None
    assert isinstance(outcome(), BrokerUnavailable)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_publishes_on_its_own_and_leaves_its_parent_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/q.db"
    _make_queue(url)
    with SyncClient(url) as client:
        client.publish("q", "parent")
        child = os.fork()
        if child == 0:
            published = _in_thread(lambda: client.publish("q", "child", timeout=5))()
            os._exit(0 if isinstance(published, str) and published != "stuck" else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        client.publish("q", "parent again")
