"""Calls: a request through a queue, its answer straight back; on every system."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from penstock import (
    App,
    BrokerUnavailable,
    Client,
    ExpirationError,
    RemoteError,
    Reply,
    SyncClient,
    TimeoutError,
    Unroutable,
    codec,
    context,
)
from penstock.message import Outgoing
from tests.helpers import dead_letters, eventually

MakeApp = Callable[..., App]


async def test_what_a_task_returns_is_the_answer(make_app: MakeApp) -> None:
    app = make_app()

    @app.task("crew.example.test")
    async def whatever(request: Any) -> Any:
        return {"got": request}

    @app.task
    def plain(request: bytes) -> bytes:
        return request[::-1]

    @app.task
    async def nothing() -> None: ...

    async with app:
        assert await app.call("crew.example.test") == {"got": None}
        for data in (1, "text", [1, None], {"a": "ü"}):
            assert await app.call("crew.example.test", data) == {"got": data}
        assert await app.call("plain", b"\x00\xff") == b"\xff\x00"
        assert await app.call("nothing") is None
        assert await whatever.call("x") == {"got": "x"}


async def test_headers_travel_both_ways_and_are_fresh_each_time(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def shown(request: Any) -> Any:
        seen = dict(context.headers)
        context.headers["served"] = request
        return [seen, context.message.headers.get("asked")]

    @app.task
    def more(request: Any) -> Reply:
        context.headers["first"] = 1
        return Reply(request, headers={"second": "zwei"})

    async with app:
        for n in range(3):
            reply = await app.call("shown", n, headers={"asked": f"q{n}"}, with_headers=True)
            assert (reply.value, dict(reply.headers)) == ([{}, f"q{n}"], {"served": n})
        value, headers = await app.call("more", "v", with_headers=True)
        assert (value, dict(headers)) == ("v", {"first": 1, "second": "zwei"})
        assert await app.call("more", "v") == "v"


async def test_errors_are_data_and_no_dead_letters(make_app: MakeApp) -> None:
    app = make_app()

    class Custom(Exception): ...

    @app.task(retries=3)
    def fail(request: Any) -> None:
        raise Custom(f"no {request}")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    async with app:
        with pytest.raises(RemoteError) as caught:
            await app.call("fail", "way")
        assert (caught.value.type, caught.value.message) == ("Custom", "no way")
        assert "raise Custom" in (caught.value.traceback or "")
        async with Client(app.url) as elsewhere:
            with pytest.raises(RemoteError, match="y") as caught:
                await elsewhere.call("add", {"x": 1})
        assert caught.value.type == "InvalidArguments"
        assert await app.call("add", {"x": 1, "y": 2}) == 3
        assert await dead_letters(app, "fail") == []
        assert await dead_letters(app, "add") == []


async def test_a_name_that_nobody_answers_to_is_an_error_at_once(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        started = time.monotonic()
        with pytest.raises(Unroutable, match="nobody"):
            await app.call("nobody", timeout=20)
        assert time.monotonic() - started < 10


async def test_a_call_that_nobody_takes_expires(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(request: Any) -> Any:
        return request

    async with app.client:
        for expires, timeout in ((0.2, 30), (0.2, 0.2)):
            with pytest.raises(ExpirationError):
                await app.call("work", 1, expires=expires, timeout=timeout)
        with pytest.raises(TimeoutError):
            await app.call("work", 1, timeout=0.2)
    async with app:
        assert await app.call("work", 2, expires=10) == 2


async def test_a_call_that_is_taken_does_not_expire(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def slow(request: Any) -> Any:
        await asyncio.sleep(1.5)
        return request

    async with app:
        assert await app.call("slow", 1, expires=0.3, timeout=20) == 1


async def test_nobody_works_for_a_caller_who_waits_no_more(make_app: MakeApp) -> None:
    app = make_app()
    ran: list[Any] = []

    @app.task
    async def work(request: Any) -> None:
        ran.append(request)

    async with app.client:
        with pytest.raises(TimeoutError):
            await app.call("work", "stale", timeout=0.2)
    async with app:
        await app.call("work", "fresh")
        assert ran == ["fresh"]


@pytest.mark.parametrize("limit", ["task", "call"])
@pytest.mark.parametrize("kind", ["coroutine", "thread", "process"])
async def test_a_hung_task_is_stopped_at_the_smaller_limit(make_app: MakeApp, kind: str, limit: str) -> None:
    app = make_app()
    timeout = 0.5 if limit == "task" else None

    if kind == "coroutine":

        @app.task("hang", timeout=timeout)
        async def sleep(request: Any) -> Any:
            if request == "hang":
                await asyncio.Event().wait()
            return request
    else:

        @app.task("hang", timeout=timeout, isolation="process" if kind == "process" else "thread")
        def spin(request: Any) -> Any:
            while request == "hang":
                pass
            return request

    async with app:
        assert await app.call("hang", 1) == 1
        with pytest.raises(TimeoutError):
            await app.call("hang", "hang", timeout=20 if limit == "task" else 0.5)
        assert await app.call("hang", 2) == 2


async def test_parallel_calls_give_results_in_order_and_errors_as_values(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(concurrency=4)
    async def echo(request: Any) -> Any:
        await asyncio.sleep(0.1 if request == "slow" else 0)
        if request == "bad":
            raise ValueError("bad")
        return request

    async with app:
        async with app.parallel() as calls:
            calls.call("echo", "slow")
            calls.call("echo", "bad")
            calls.call("nobody")
            calls.call("echo", "quick", timeout=10)
            with pytest.raises(RuntimeError):
                calls.results  # noqa: B018
        first, second, third, fourth = calls.results
        assert (first, fourth) == ("slow", "quick")
        assert isinstance(second, RemoteError)
        assert isinstance(third, Unroutable)


async def test_many_calls_of_two_clients_each_get_their_own_answer(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(concurrency=10)
    async def echo(request: Any) -> Any:
        await asyncio.sleep(0)
        return request

    async with app, Client(app.url) as other, Client(app.url) as third:
        if app.url.startswith("memory"):
            clients: list[Any] = [app, app]
        else:
            clients = [other, third]
        answers = await asyncio.gather(*(clients[n % 2].call("echo", n) for n in range(200)))
        assert answers == list(range(200))


async def test_expiring_calls_of_two_clients_each_raise_at_their_own(make_app: MakeApp) -> None:
    """A hundred from two callers, with long and short lives mixed in one queue that nobody consumes."""
    app = make_app()

    @app.task
    async def work(request: Any) -> None: ...

    async with app.client:
        await app.client.connect()
        await app.publish("work", "in the way")  # which never expires, at the head of the queue
        other = make_app()
        other.task("work")(work.function)
        async with other.client:
            lives = [0.3 + 0.02 * (n * 37 % 50) for n in range(100)]
            started = time.monotonic()

            async def late_by(n: int) -> float:
                caller = (app, other)[n % 2]
                with pytest.raises(ExpirationError):
                    await caller.call("work", n, expires=lives[n], timeout=20)
                return time.monotonic() - started - lives[n]

            late = await asyncio.gather(*(late_by(n) for n in range(100)))
            assert min(late) >= 0
            assert max(late) <= 3.0  # a second after each expiry, on a busy machine


async def test_closing_a_client_ends_its_calls(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(request: Any) -> None: ...

    await app.client.connect()
    calling = asyncio.create_task(app.call("work", 1, timeout=30))
    await asyncio.sleep(0.3)
    await app.client.close()
    with pytest.raises(BrokerUnavailable):
        async with asyncio.timeout(5):
            await calling


async def test_a_cancelled_call_leaves_nothing_behind(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(request: Any) -> None: ...

    async with app.client:
        await app.client.connect()
        calling = asyncio.create_task(app.call("work", 1, expires=30))
        await asyncio.sleep(0.2)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert app.client._calls is not None
        assert all(not calls._pending for calls in app.client._calls.values())


async def test_the_blocking_client_has_the_same_verbs(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(concurrency=2)
    async def echo(request: Any) -> Any:
        if request == "bad":
            raise ValueError("bad")
        return request

    def use(client: SyncClient) -> list[Any]:
        found: list[Any] = [client.call("echo", 1)]
        with client.parallel() as calls:
            calls.call("echo", 2)
            calls.call("echo", "bad")
        found += calls.results
        handle = client.send("echo", 3)
        found += [handle.result(20), client.waitfor(handle, 20).state, handle.cancel()]
        return found

    async with app:
        found = await asyncio.to_thread(use, app.sync)
        await asyncio.to_thread(app.sync.close)
    assert found[:2] == [1, 2]
    assert isinstance(found[2], RemoteError)
    assert found[3:] == [3, "succeeded", False]


async def test_a_negative_or_empty_limit_is_refused(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        refused: list[dict[str, Any]] = [
            {"timeout": 0},
            {"timeout": -1},
            {"expires": -1},
            {"priority": 300},
            {"headers": {"a": []}},
        ]
        for options in refused:
            with pytest.raises(ValueError, match=next(iter(options))[:6]):
                await app.call("work", **options)


async def test_calls_survive_a_worker_that_stops_and_another_that_starts(make_app: MakeApp) -> None:
    app, other = make_app(), make_app()
    for one in (app, other):

        @one.task("echo", concurrency=4)
        async def echo(request: Any) -> Any:
            await asyncio.sleep(0.01)
            return request

    async with other.client:
        async with app:
            under_way = [asyncio.create_task(other.call("echo", n, timeout=20)) for n in range(50)]
            await eventually(lambda: any(call.done() for call in under_way))
        async with app:
            assert await asyncio.gather(*under_way) == list(range(50))


async def test_headers_of_an_answer_that_no_system_could_carry_are_an_error_to_the_caller(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work() -> str:
        context.headers["h"] = "y" * 200_000
        return "done"

    async with app:
        with pytest.raises(RemoteError, match="the headers of an answer hold 16000 characters"):
            await work.call()


async def test_a_header_that_nobody_of_ours_wrote_disturbs_nobody(make_app: MakeApp) -> None:
    app = make_app()
    heard: list[Any] = []

    @app.task
    async def work(x: Any) -> Any:
        heard.append(x)
        return x

    async with app:
        broker = await app.client._pool.get()
        for number, text in enumerate(['{"x":' + "[" * 1200, '{"recorded":true,"unique":"\\u0000"}', "not JSON"]):
            body, headers = codec.encode(number)
            message = Outgoing(id=f"m{number}", topic="work", body=body, headers={**headers, "penstock-task": text})
            assert await broker.publish([message]) == [None]
        assert await work.call("ours") == "ours"
        await eventually(lambda: len(heard) == 4)
        assert app.consuming
