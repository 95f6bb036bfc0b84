"""How calls and listeners end: with their client, its connection or its event loop; and what begins meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import App, BrokerUnavailable, Client, ExpirationError, PublishTimeout, SyncClient
from penstock.brokers import registry
from penstock.brokers.amqp import link, requests
from penstock.brokers.base import Queue
from penstock.brokers.memory import MemoryBroker
from penstock.brokers.memory.broker import MemoryInbox
from penstock.client import calls
from penstock.client.calls import Calls
from penstock.client.listening import Listening
from penstock.message import Outgoing
from penstock.testing.faults import Proxy
from tests.helpers import eventually

MakeApp = Callable[..., App]
Verb = Callable[[Client], Coroutine[Any, Any, Any]]

VERBS: dict[str, Verb] = {
    "call": lambda client: client.call("echo", 1, timeout=20),
    "publish": lambda client: client.publish("echo", 1, timeout=20),
    "publish_many": lambda client: client.publish_many("echo", [1, 2], timeout=20),
    "broadcast": lambda client: client.broadcast("news", 1, timeout=20),
    "send": lambda client: client.send("echo", 1, timeout=20),
    "connect": lambda client: client.connect(),
}


@contextlib.asynccontextmanager
async def running(app: App) -> AsyncIterator[list[Any]]:
    """The app, with a task that gives back what it gets; all that this got."""
    got: list[Any] = []

    @app.task("echo", concurrency=10)
    async def echo(request: Any) -> Any:
        got.append(request)
        return request

    async with app:
        yield got


@contextlib.contextmanager
def running_elsewhere(app: App) -> Iterator[None]:
    """The same, in an event loop of its own in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    life = running(app)
    try:
        asyncio.run_coroutine_threadsafe(life.__aenter__(), loop).result(20)
        yield
        asyncio.run_coroutine_threadsafe(life.__aexit__(None, None, None), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.asynccontextmanager
async def by_proxy(url: str, options: str = "") -> AsyncIterator[tuple[Client, Proxy]]:
    """A client of RabbitMQ over a line that can be harmed."""
    async with Proxy(5672) as proxy:
        client = Client(f"{url.replace(':5672', f':{proxy.port}')}?timeout=3{options}", store="memory://endings")
        try:
            yield client, proxy
        finally:
            await client.close()


def other_client(app: App) -> Client:
    return Client(app.url, store=app.store)


# -- what begins while a client closes


@pytest.mark.timeout(60)
@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_that_begins_while_a_client_closes_connects_anew(make_app: MakeApp, verb: str) -> None:
    app = make_app()
    async with running(app):
        client = other_client(app)
        await client.subscribe("news", lambda _: None)
        for turns in range(1, 12):
            await client.call("echo", 0)
            closing = asyncio.create_task(client.close())
            for _ in range(turns):
                await asyncio.sleep(0)
            await VERBS[verb](client)
            assert closing.done()
        await client.close()
        assert client._listening._pumping is None


@pytest.mark.timeout(60)
async def test_verbs_that_go_on_coming_do_not_keep_a_client_from_closing(make_app: MakeApp) -> None:
    app = make_app()
    async with running(app):
        client = other_client(app)
        await client.subscribe("news", lambda _: None)
        stop = False

        async def hammer(verb: Verb) -> None:
            while not stop:
                with contextlib.suppress(BrokerUnavailable):
                    await verb(client)
                await asyncio.sleep(0)

        hammering = [asyncio.create_task(hammer(VERBS[verb])) for verb in ("call", "broadcast", "publish") * 2]
        for _ in range(5):
            await asyncio.sleep(0.05)
            async with asyncio.timeout(10):
                await asyncio.gather(client.close(), client.close())
        stop = True
        async with asyncio.timeout(20):
            await asyncio.gather(*hammering)
        await client.close()


async def test_a_subscription_that_begins_while_a_client_closes_comes_to_life(make_app: MakeApp) -> None:
    app = make_app()
    async with running(app):
        client = other_client(app)
        heard: list[Any] = []
        await client.subscribe("news", heard.append)
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await client.subscribe("more", heard.append)
        assert closing.done()
        for topic in ("news", "more"):
            await app.client.broadcast(topic, topic)
        await eventually(lambda: sorted(heard) == ["more", "news"])
        await client.close()


@pytest.mark.timeout(20)
async def test_calls_on_an_inbox_that_was_closed_under_them_fail_and_the_next_have_another() -> None:
    broker = MemoryBroker()
    await broker.declare(Queue("work"))

    async def get_broker() -> MemoryBroker:
        return broker

    asking = Calls(get_broker, 1000)
    for number in range(3):
        call = asyncio.create_task(asking.call(outgoing(f"m{number}"), None, None))
        await eventually(lambda: asking._inbox is not None)
        await asyncio.sleep(0)
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await call
        await eventually(lambda: asking._inbox is None)
    await asking.close()
    with pytest.raises(BrokerUnavailable):
        await asking.call(outgoing("late"), None, None)


@pytest.mark.timeout(20)
async def test_a_listener_whose_inbox_was_closed_under_it_has_another() -> None:
    broker = MemoryBroker()

    async def get_broker() -> MemoryBroker:
        return broker

    listening = Listening(get_broker, 1000)
    heard: list[Any] = []
    listener = await listening.add("work", heard.append)
    first = listening._inbox
    await broker.close()
    await eventually(lambda: listening._inbox not in (None, first))
    await listener
    await broker.broadcast(outgoing("m"))
    await eventually(lambda: heard == [1])
    async with listening.ended():
        assert broker._inboxes == set()


def outgoing(id: str) -> Outgoing:
    return Outgoing(id=id, topic="work", body=b"1", headers={"content-type": "application/json"}, enqueued_at=0.0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("verb", VERBS)
def test_a_client_that_closes_while_a_verb_begins_leaves_nothing_open(broker_url: str, verb: str) -> None:
    async def declare() -> None:
        broker = registry.connect(broker_url)
        await broker.open()
        await broker.declare(Queue("echo"))
        await broker.close()

    async def close_while_it_begins(seconds: float) -> None:
        client = Client(broker_url)
        beginning = asyncio.create_task(VERBS[verb](client))
        await asyncio.sleep(seconds)
        await client.close()
        beginning.cancel()
        await asyncio.gather(beginning, return_exceptions=True)
        await client.close()  # what went on after the first has connected again

    asyncio.run(declare())
    for milliseconds in (0, 1, 2, 5, 10, 15, 20, 30, 50, 80):
        asyncio.run(close_while_it_begins(milliseconds / 1000))
        gc.collect()  # a connection that is still open is a warning here, and that an error


# -- calls end with their client


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("how", ["swallowed", "nobody there"])
async def test_closing_a_client_ends_calls_that_have_not_been_sent(
    amqp_url: str, how: str, timeout: float | None
) -> None:
    app = App(amqp_url, store="memory://endings")
    async with running(app) as got, by_proxy(amqp_url) as (client, proxy):
        if how == "swallowed":
            proxy.swallow()
        else:
            proxy.shorten(0, 0)
        calling = [asyncio.create_task(client.call("echo", 1, timeout=timeout)) for _ in range(2)]
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            await client.close()
            outcomes = await asyncio.gather(*calling, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BrokerUnavailable] * 2
        proxy.restore()
        await eventually(lambda: proxy.open == 0)
        accepted = proxy.accepted
        await asyncio.sleep(0.5)
        assert (got, proxy.accepted) == ([], accepted)
        assert await client.call("echo", 2) == 2


async def test_a_connection_that_comes_about_after_close_is_closed(amqp_url: str) -> None:
    async with by_proxy(amqp_url) as (client, proxy):
        proxy.delay(0.1)
        broker: Any = await client._pool.get()
        connecting = asyncio.create_task(broker.consuming.channel())
        await asyncio.sleep(0.15)
        await client.close()
        with pytest.raises(BrokerUnavailable):
            await connecting
        await eventually(lambda: proxy.open == 0)


async def test_an_end_that_the_driver_has_no_reason_for_is_a_lost_connection() -> None:
    line = link.Link("amqp://127.0.0.1/", "amqp://127.0.0.1/")
    with pytest.raises(BrokerUnavailable), line.guard():
        raise Exception
    with pytest.raises(KeyError), line.guard():
        raise KeyError("a fault of ours")


@pytest.mark.timeout(60)
async def test_a_client_closes_while_its_line_takes_nothing(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CLOSE_TIMEOUT", 0.5)
    app = App(amqp_url, store="memory://endings")
    async with running(app), by_proxy(amqp_url, "&heartbeat=600") as (client, proxy):
        await client.call("echo", 1)
        proxy.throttle(1)
        body = os.urandom(1_000_000)
        calling = [asyncio.create_task(client.call("echo", body, timeout=None)) for _ in range(30)]
        await asyncio.sleep(1)
        closing = asyncio.create_task(client.close())
        async with asyncio.timeout(0.4):  # before anything else is given up
            outcomes = await asyncio.gather(*calling, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {BrokerUnavailable}
        async with asyncio.timeout(10):
            await closing
        proxy.restore()


# -- with their connection


async def test_a_call_that_was_taken_ends_with_the_first_connection_too(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LOOK", 0.05)
    app = App(amqp_url, store="memory://endings", grace=1)
    taken = asyncio.Event()

    @app.task
    async def slow(request: Any) -> None:
        taken.set()
        await asyncio.sleep(3)

    async with app, by_proxy(amqp_url) as (client, proxy):
        calling = asyncio.create_task(client.call("slow", timeout=20))
        await taken.wait()
        await asyncio.sleep(0.3)  # it is known to be in a queue
        proxy.cut()
        with pytest.raises(BrokerUnavailable):
            async with asyncio.timeout(2):
                await calling


async def test_calls_fail_when_their_pump_breaks_and_the_next_have_another(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "RECEIVE_WAIT", 0.05)
    app = make_app()

    @app.task
    async def slow(request: Any) -> None:
        await asyncio.sleep(1)

    async def broken(wait: float) -> Any:
        raise ValueError("a fault of ours")

    async with running(app):
        client = other_client(app)
        await client.call("echo", 0)
        assert client._calls is not None
        [asking] = client._calls.values()
        calling = asyncio.create_task(client.call("slow", timeout=20))
        await asyncio.sleep(0)
        monkeypatch.setattr(asking._inbox, "receive", broken)
        with pytest.raises(BrokerUnavailable):
            await calling
        assert await client.call("echo", 2, timeout=20) == 2
        await client.close()


# -- with their event loop


def test_a_client_may_be_used_in_one_event_loop_after_another(make_app: MakeApp) -> None:
    app = make_app()
    with running_elsewhere(app):
        client = other_client(app)
        for number in range(3):
            assert asyncio.run(client.call("echo", number, timeout=10)) == number
        asyncio.run(client.close())


def test_a_client_may_be_used_in_an_event_loop_while_the_one_before_stands_still(tmp_path: Path) -> None:
    app = App(f"memory://{tmp_path.name}")
    with running_elsewhere(app):
        client = Client(app.url)
        loops = [asyncio.new_event_loop() for _ in range(3)]
        for number, loop in enumerate(loops):
            assert loop.run_until_complete(client.call("echo", number, timeout=10)) == number
        loops[-1].run_until_complete(client.close())
        for loop in loops:
            loop.run_until_complete(end_all())
            loop.close()


async def end_all() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def test_closing_a_blocking_client_in_its_own_callback_is_an_error(broker_url: str) -> None:
    client = SyncClient(broker_url, store="memory://endings")
    told: list[BaseException | None] = []
    done = threading.Event()

    def callback(data: Any) -> None:
        try:
            client.close()
            told.append(None)
        except RuntimeError as error:
            told.append(error)
        done.set()

    client.subscribe("news", callback)
    client.broadcast("news", 1)
    assert done.wait(10)
    assert [type(one) for one in told] == [RuntimeError]
    client.broadcast("news", 2)  # it is still connected
    client.close()
    client.close()


# -- and inboxes with their close


async def test_a_closed_inbox_is_forgotten_by_its_broker(broker_url: str) -> None:
    broker: Any = registry.connect(broker_url)
    await broker.open()
    for topics in (frozenset[str](), frozenset({"news"})):
        inbox, other = broker.inbox(), broker.inbox()
        await inbox.listen(topics)
        assert set(broker._inboxes) == {inbox, other}
        await inbox.close()
        assert set(broker._inboxes) == {other}
        await other.close()
        await other.close()
        assert not broker._inboxes
    broker.inbox()
    await broker.close()
    assert not broker._inboxes


@pytest.mark.parametrize("scheme", ["amqp", "redis", "nats", "postgresql"])
async def test_a_call_whose_broker_cannot_be_reached_says_so(scheme: str) -> None:
    async with Client(f"{scheme}://127.0.0.1:1", store="memory://away") as client:
        with pytest.raises(PublishTimeout, match=r"^not confirmed within 0\.3 s: .*127\.0\.0\.1:1") as caught:
            await client.call("echo", 1, timeout=0.3)
        assert not caught.value.reached
        with pytest.raises(ExpirationError, match=r"^nobody took the call .*127\.0\.0\.1:1"):
            await client.call("echo", 1, expires=0.3, timeout=5)


async def test_a_call_that_the_broker_may_have_does_not_say_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Client("redis://127.0.0.1:1/0") as client:
        with pytest.raises(PublishTimeout) as never:
            await client.call("echo", timeout=0.3)
    assert not never.value.reached

    async def lost(*_: object) -> None:
        raise BrokerUnavailable("the connection was lost")

    monkeypatch.setattr(MemoryInbox, "request", lost)
    async with Client("memory://may-have-it") as client:
        with pytest.raises(PublishTimeout, match="the connection was lost") as perhaps:
            await client.call("echo", timeout=0.3)
    assert perhaps.value.reached
