"""Publishing: what is refused, what is confirmed, from async and from blocking code."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import gzip
import threading
import time
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from penstock import (
    App,
    BodyTooLarge,
    Client,
    Message,
    PublishError,
    PublishTimeout,
    SyncClient,
    Unencodable,
    Unroutable,
)
from tests.helpers import dead_letters, eventually, queue_info

MakeApp = Callable[..., App]


class Model(pydantic.BaseModel):
    n: int


@dataclasses.dataclass
class Data:
    n: int


@pytest.mark.parametrize(
    ("body", "received"),
    [
        (b"\x00\xff bytes", b"\x00\xff bytes"),
        (b"", b""),
        (b"123", b"123"),
        ("text, even æøå \x00", "text, even æøå \x00"),
        ("", ""),
        ("123", "123"),
        (None, None),
        (0, 0),
        ([1, "two", None, {"three": 3.5}], [1, "two", None, {"three": 3.5}]),
        (Model(n=1), {"n": 1}),
        (Data(n=2), {"n": 2}),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
)
async def test_bodies_arrive_as_they_were_sent(make_app: MakeApp, body: Any, received: Any) -> None:
    app, got = make_app(), []

    @app.route("q")
    async def handle(message: Message) -> None:
        got.append(message)

    async with app:
        before = time.time()
        id = await app.publish("q", body, key="k", headers={"h": "v", "n": 1, "none": None}, priority=3, expires=60)
        await eventually(lambda: got)
    (message,) = got
    assert message.body == received
    assert type(message.body) is type(received)
    assert (message.id, message.topic, message.queue, message.key, message.priority) == (id, "q", "q", "k", 3)
    assert {name: message.headers[name] for name in ("h", "n", "none")} == {"h": "v", "n": 1, "none": None}
    assert before <= message.enqueued_at <= time.time()
    assert message.expires_at == pytest.approx(message.enqueued_at + 60)
    assert (message.attempt, message.name) == (1, "q")


async def test_an_unroutable_name_is_refused(make_app: MakeApp) -> None:
    app = make_app()
    with pytest.raises(Unroutable, match="no queue is bound to 'nowhere'"):
        await app.publish("nowhere", 1)
    with pytest.raises(Unroutable) as caught:
        await app.publish_many("nowhere", [1, 2])
    assert sorted(caught.value.failed) == [0, 1]
    await app.client.close()


async def test_an_app_can_publish_to_its_own_queues_before_it_consumes(make_app: MakeApp) -> None:
    app = make_app()
    app.route("q", topics=["t"])(_nothing)
    async with app.client:
        await app.publish("q", 1)
        await app.publish("t", 1)
        assert (await queue_info(app, "q")).ready == 2


async def _nothing(message: Message) -> None: ...


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"priority": 256}, ValueError),
        ({"priority": -1}, ValueError),
        ({"delay": -1}, ValueError),
        ({"delay": float("nan")}, ValueError),
        ({"expires": -1}, ValueError),
        ({"headers": {"penstock-history": "9,9,9"}}, ValueError),
        ({"headers": {"h": object()}}, ValueError),
        ({"headers": {1: "x"}}, ValueError),
        ({"broker": "none"}, ValueError),
    ],
)
async def test_impossible_options_are_refused_and_nothing_is_stored(make_app: MakeApp, given: Any, error: Any) -> None:
    app = make_app()
    app.route("q")(_nothing)
    async with app.client:
        with pytest.raises(error):
            await app.publish("q", 1, **given)
        await app.publish("q", 1)
        assert (await queue_info(app, "q")).ready == 1


async def test_a_body_that_cannot_be_sent_is_refused(make_app: MakeApp) -> None:
    app = make_app(max_body=100)
    app.route("q")(_nothing)
    async with app.client:
        with pytest.raises(TypeError):
            await app.publish("q", object())
        with pytest.raises(BodyTooLarge, match="over the ceiling of 100 bytes"):
            await app.publish("q", "x" * 101)
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(PublishError):
            await app.publish("q", deep)
        assert (await queue_info(app, "q")).ready == 0


@pytest.mark.parametrize("blocking", [False, True])
async def test_of_many_all_are_stored_but_those_that_failed_names(make_app: MakeApp, blocking: bool) -> None:
    app, got = make_app(max_body=100), []

    @app.route("q")
    async def handle(message: Message) -> None:
        got.append(message.body)

    async def publish(*bodies: Any) -> PublishError:
        asked = ("q", list(bodies))
        with pytest.raises(PublishError) as caught:
            await (asyncio.to_thread(app.sync.publish_many, *asked) if blocking else app.publish_many(*asked))
        return caught.value

    async with app:
        error = await publish("x" * 101, 1, object(), 2)
        assert {index: type(one) for index, one in error.failed.items()} == {0: BodyTooLarge, 2: Unencodable}
        assert str(error).startswith("2 of 4 messages were refused: body of 101 bytes")
        await eventually(lambda: sorted(got) == [1, 2])
        error = await publish(object(), "x" * 101)
        assert isinstance(error, Unencodable)
        assert sorted(error.failed) == [0, 1]
        await app.publish("q", 3)
        await eventually(lambda: sorted(got) == [1, 2, 3])
    await asyncio.to_thread(app.sync.close)


async def test_what_was_not_confirmed_in_time_counts_as_failed() -> None:
    async with Client("amqp://127.0.0.1:1/", store="memory://") as client:
        with pytest.raises(PublishTimeout) as caught:
            await client.publish_many("q", [1, object(), 3], timeout=0.2)
    assert {index: type(one) for index, one in caught.value.failed.items()} == {
        0: PublishTimeout,
        1: Unencodable,
        2: PublishTimeout,
    }


async def test_publish_many_takes_a_list_and_returns_ids_in_order(make_app: MakeApp) -> None:
    app, got = make_app(), []

    @app.route("q")
    async def handle(message: Message) -> None:
        got.append((message.id, message.body))

    for wrong in ((1, 2), "text", iter([1]), {"a": 1}):
        with pytest.raises(TypeError, match="takes a list"):
            await app.publish_many("q", wrong)  # type: ignore[arg-type]
    assert await app.publish_many("q", []) == []
    async with app:
        ids = await app.publish_many("q", list("abc"))
        await eventually(lambda: len(got) == 3)
    assert got == list(zip(ids, "abc", strict=True))
    assert len(set(ids)) == 3


async def test_many_publishers_at_once_are_all_confirmed(make_app: MakeApp) -> None:
    app = make_app()
    app.route("q")(_nothing)
    async with app.client:
        ids = await asyncio.gather(*(app.publish("q", n) for n in range(500)))
        assert len(set(ids)) == 500
        assert (await queue_info(app, "q")).ready == 500


@pytest.mark.blocks
def test_the_blocking_twin_has_the_same_verbs(make_app: MakeApp) -> None:
    app = make_app()
    app.route("q")(_nothing)
    ids: list[str] = []

    def publish() -> None:
        ids.extend(app.sync.publish("q", n) for n in range(20))
        ids.extend(app.sync.publish_many("q", [1, 2, 3]))

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(Unroutable):
        app.sync.publish("nowhere", 1)
    app.sync.close()
    app.sync.close()
    assert len(set(ids)) == 4 * 23
    verbs = {name for name in vars(Client) if not name.startswith("_")}
    assert verbs <= {name for name in vars(SyncClient) if not name.startswith("_")}


async def test_the_blocking_twin_refuses_to_stop_an_event_loop(make_app: MakeApp) -> None:
    with pytest.raises(RuntimeError, match="await the async one instead"):
        make_app().sync.publish("q", 1)


async def test_an_unconfirmed_publish_times_out(tmp_path: Any) -> None:
    app = App(f"sqlite:///{tmp_path}/queue.db")
    app.route("q")(_nothing)
    async with app.client:
        with pytest.raises(PublishTimeout, match="not confirmed within 0 s"):
            await app.publish("q", 1, timeout=0)
        with pytest.raises(TimeoutError):
            await app.publish("q", 1, timeout=0)


@pytest.mark.parametrize(
    ("body", "headers", "error"),
    [
        (b"{broken", {"content-type": "application/json"}, "not JSON"),
        (b"{broken", {"content-type": "application/problem+json; charset=utf-8"}, "not JSON"),
        (b"[" * 100_000, {"content-type": "application/json"}, "not JSON"),
        (b"\xff\xfe", {"content-type": "text/plain"}, "not text"),
        (b"x", {"content-type": "text/plain; charset=klingon"}, "not text"),
        (b"x", {"content-type": "text/plain; charset=punycode"}, "is no charset of a message here"),
        (b"x", {"content-type": "text/plain; charset=zlib"}, "not text"),
        (b"not gzip", {"content-encoding": "gzip"}, "broken gzip"),
        (gzip.compress(b"x" * 1000)[:-12], {"content-encoding": "gzip"}, "broken gzip"),
        (gzip.compress(b"0" * 50_000_000), {"content-encoding": "gzip"}, "ceiling of 1048576 bytes"),
        (b"x", {"content-encoding": "br"}, "'br' is not known"),
    ],
)
async def test_an_undecodable_body_is_a_dead_letter_and_its_batch_mates_are_untouched(
    make_app: MakeApp, body: bytes, headers: dict[str, str], error: str
) -> None:
    app = make_app(max_body=2**20)
    got: list[Any] = []

    @app.route("q", bulk_size=3, bulk_timeout=0.1)
    async def handle(messages: list[Message]) -> None:
        got.extend(message.body for message in messages)

    async with app:
        await app.publish("q", "before")
        await app.publish("q", body, headers=headers)
        await app.publish("q", "after")
        await eventually(lambda: len(got) == 2)
        await eventually(lambda: one_dead(app))
        (letter,) = await dead_letters(app, "q")
    assert got == ["before", "after"]
    assert (letter.reason, letter.attempts) == ("invalid", 1)
    assert error in letter.error


async def one_dead(app: App) -> bool:
    return len(await dead_letters(app, "q")) == 1


@pytest.mark.parametrize(
    ("body", "headers", "received"),
    [
        (b'{"a": 1}', {"content-type": ""}, b'{"a": 1}'),
        (gzip.compress(b'{"a": 1}'), {"content-encoding": "gzip", "content-type": "application/json"}, {"a": 1}),
        ("é".encode("latin-1"), {"content-type": "text/plain; charset=latin-1"}, "é"),
        (b"\x89PNG", {"content-type": "image/png"}, b"\x89PNG"),
    ],
)
async def test_foreign_bodies_are_decoded_as_they_declare(
    make_app: MakeApp, body: bytes, headers: dict[str, str], received: Any
) -> None:
    app = make_app()
    got: list[Any] = []

    @app.route("q")
    async def handle(message: Message) -> None:
        got.append((message.body, message.raw))

    async with app:
        await app.publish("q", body, headers=headers)
        await eventually(lambda: got)
    assert got == [(received, body)]
