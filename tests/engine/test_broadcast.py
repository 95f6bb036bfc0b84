"""Broadcasts: everybody who listens now hears them, once, and nobody else ever."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from penstock import App, Client, DeclarationError, Message, SyncClient, Unencodable, context
from tests.helpers import eventually, eventually_sync

MakeApp = Callable[..., App]


@dataclasses.dataclass
class Alarm:
    level: int


async def test_every_listener_hears_and_nothing_is_stored(make_app: MakeApp, broker_url: str) -> None:
    heard: list[Any] = []
    app, other = make_app(), make_app()

    @app.subscribe("test")
    async def in_app(data: Any) -> None:
        heard.append(("app", data))

    async with Client(broker_url) as one, Client(broker_url) as two:
        await one.broadcast("test", "before anybody listens")
        async with app:
            await two.subscribe("test", lambda data: heard.append(("two", data)))
            await two.subscribe("elsewhere", lambda data: heard.append(("elsewhere", data)))
            await one.broadcast("test", {"n": 1})
            await eventually(lambda: len(heard) == 2)
            await app.broadcast("test", b"\x00\xff")
            await eventually(lambda: len(heard) == 4)
        await one.broadcast("test", "the app has gone")
        await eventually(lambda: len(heard) == 5)
    assert sorted(heard, key=str) == sorted(
        [("app", {"n": 1}), ("two", {"n": 1}), ("app", b"\x00\xff"), ("two", b"\x00\xff"), ("two", "the app has gone")],
        key=str,
    )
    await other.client.close()


def test_a_subscription_may_come_before_the_event_loop(broker_url: str) -> None:
    client = Client(broker_url)
    heard: list[Any] = []
    listener = client.subscribe("test", heard.append)

    async def main() -> None:
        async with client:
            await client.connect()
            await listener
            await client.broadcast("test", 1)
            await eventually(lambda: heard)

    asyncio.run(main())
    assert heard == [1]


async def test_typed_listeners_get_validated_data_and_bad_data_disturbs_nobody(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    heard: list[Any] = []

    @app.subscribe("alarms")
    def in_thread(alarm: Alarm) -> None:
        heard.append((alarm, threading.current_thread() is threading.main_thread(), context.app is app))

    async with app:
        with caplog.at_level(logging.WARNING):
            await app.broadcast("alarms", {"level": "none"})
            await app.broadcast("alarms", {"level": 3})
            await eventually(lambda: heard)
    assert heard == [(Alarm(3), False, True)]
    assert "a broadcast to 'alarms' is invalid" in caplog.text


async def test_a_listener_that_fails_or_is_slow_hears_the_next_and_in_order(make_app: MakeApp, broker_url: str) -> None:
    slow: list[int] = []
    quick: list[int] = []

    async def fails_and_dawdles(n: int) -> None:
        await asyncio.sleep(0.01)
        slow.append(n)
        raise ValueError("no good")

    async with Client(broker_url) as client:
        await client.subscribe("test", fails_and_dawdles)
        await client.subscribe("test", quick.append)
        for n in range(20):
            await client.broadcast("test", n)
        await eventually(lambda: len(quick) == 20 and len(slow) == 20)
    assert quick == slow == list(range(20))


async def test_closed_and_unsubscribed_listeners_hear_nothing_more(broker_url: str) -> None:
    first: list[int] = []
    second: list[int] = []
    witness: list[int] = []
    async with Client(broker_url) as client:
        listener = await client.subscribe("test", first.append)
        await client.subscribe("test", second.append)
        await client.subscribe("test", witness.append)
        await client.broadcast("test", 1)
        await eventually(lambda: first and second and witness)
        await listener.close()
        await listener.close()
        await client.unsubscribe("test", second.append)
        await client.unsubscribe("never subscribed")
        await client.broadcast("test", 2)
        await eventually(lambda: len(witness) == 2)
    assert (first, second, witness) == ([1], [1], [1, 2])


async def test_bad_broadcasts_and_listeners_are_refused(make_app: MakeApp) -> None:
    app = make_app()
    with pytest.raises(ValueError, match="not empty"):
        await app.broadcast("", 1)
    with pytest.raises(Unencodable):
        await app.broadcast("test", object())
    with pytest.raises(TypeError, match="can be called"):
        app.client.subscribe("test", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not empty"):
        app.client.subscribe("", print)
    with pytest.raises(DeclarationError):
        app.subscribe("")
    with pytest.raises(DeclarationError, match="must take one argument"):
        app.subscribe("test")(lambda: None)
    await app.client.close()


@pytest.mark.blocks
def test_the_blocking_twin_hears_in_its_own_thread(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/queue.db"
    heard: list[Any] = []
    with SyncClient(url) as listening, SyncClient(url) as speaking:
        listening.subscribe("test", heard.append)
        speaking.broadcast("test", [1, 2])
        eventually_sync(lambda: heard, "the broadcast is heard")
        listening.unsubscribe("test")
    assert heard == [[1, 2]]


async def test_a_route_may_broadcast_what_it_did(make_app: MakeApp, broker_url: str) -> None:
    app = make_app()
    heard: list[Any] = []

    @app.route("work")
    async def work(message: Message) -> None:
        await context.app.broadcast("done", message.body)

    async with Client(broker_url) as client, app:
        await client.subscribe("done", heard.append)
        await client.publish("work", 7)
        await eventually(lambda: heard)
    assert heard == [7]
