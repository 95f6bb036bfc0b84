"""What goes into a task and comes out of it: numbers, names, keywords, ids as text, values as annotated."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pydantic
import pytest

from penstock import (
    App,
    Client,
    ConfigError,
    DeclarationError,
    Handle,
    InvalidArguments,
    PublishTimeout,
    RemoteError,
    Reply,
    Task,
    TimeoutError,
    UnknownTask,
    context,
)
from penstock.client.handles import SyncHandle
from penstock.message import Message

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheChecker

MakeApp = Callable[..., App]
WITHIN = 20.0  # seconds; only ever waited for in full by a failing test

NO_SECONDS: list[Any] = [math.inf, math.nan, -1, 1e300, pytest.param(10**400, id="huge"), "5", True]
"""What cannot be waited for."""


@pytest.fixture
async def app() -> AsyncIterator[App]:
    """An app that runs, with one task."""
    app = App("memory://")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    async with app:
        yield app


# -- seconds


@pytest.mark.parametrize("seconds", NO_SECONDS)
async def test_seconds_that_cannot_be_are_refused_wherever_they_are_given(app: App, seconds: Any) -> None:
    add = app.tasks["add"]
    asked: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: app.publish("add", 1, delay=seconds),
        lambda: app.publish("add", 1, expires=seconds),
        lambda: app.publish("add", 1, timeout=seconds),
        lambda: app.publish_many("add", [1, 2], delay=seconds),
        lambda: app.publish_many("add", [1, 2], timeout=seconds),
        lambda: app.broadcast("news", 1, timeout=seconds),
        lambda: app.send("any", 1, delay=seconds),
        lambda: app.send("any", 1, expires=seconds),
        lambda: app.send("any", 1, timeout=seconds),
        lambda: app.send("any", 1, result_ttl=seconds),
        lambda: app.send("any", 1, backoff=(0, seconds)),
        lambda: app.call("add", {"x": 1, "y": 2}, timeout=seconds),
        lambda: app.call("add", {"x": 1, "y": 2}, expires=seconds),
        lambda: app.waitfor("any", timeout=seconds),
        lambda: add.using(delay=seconds).send(1, 2),
        lambda: add.using(expires=seconds).call(1, 2),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match="seconds") as caught:
            await ask()
        assert "\n" not in str(caught.value)
    async with app.parallel() as calls:
        calls.call("add", {"x": 1, "y": 2}, timeout=seconds)
    assert isinstance(calls.results[0], ValueError)
    handle = await add.send(1, 2)
    with pytest.raises(ValueError, match="timeout must be 0 or more seconds, not "):
        await handle.result(timeout=seconds)
    assert await handle.result(WITHIN) == 3  # and nobody else's work has come to harm


@pytest.mark.parametrize("seconds", NO_SECONDS)
def test_seconds_that_cannot_be_are_refused_where_they_are_declared(seconds: Any) -> None:
    app = App("memory://")
    for name in ("timeout", "expires", "result_ttl"):
        with pytest.raises(ConfigError, match=f"{name} must be a number of seconds"):
            app.task("work", **{name: seconds})
    for name in ("lease", "grace"):
        with pytest.raises(ConfigError, match=f"{name} must be a number of seconds"):
            App("memory://", **{name: seconds})
    with pytest.raises(ConfigError, match="bulk_timeout must be a number of seconds"):
        app.route("queue", bulk_timeout=seconds)
    for declare in (app.task, app.route):
        for backoff in ((0, seconds), (seconds, 1), seconds):
            with pytest.raises(ConfigError, match="backoff must be"):
                declare("work", backoff=backoff)


async def test_a_century_is_no_trouble(make_app: MakeApp) -> None:
    app = make_app()
    century = 3.1e9

    @app.task(timeout=century, expires=century, result_ttl=century, backoff=(century, century))
    async def add(x: int, y: int) -> int:
        return x + y

    async with app:
        handle = await add.using(timeout=century).send(1, 2)
        assert await handle.result(century) == 3
        assert await add.using(expires=century, timeout=1e9).call(1, 2) == 3
        await add.using(delay=century, expires=century).send(1, 2)


async def test_a_wait_that_is_over_says_how_long_it_was(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        handle = await app.send("nobody", 1)
        with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            await handle.result(0.2)
        with pytest.raises(TimeoutError, match="within 0 s"):
            await app.waitfor(handle, 0)


@pytest.mark.parametrize("backoff", [3, (1,), (3, 1), "ab", [1, math.inf]])
def test_using_refuses_a_backoff_that_is_none(backoff: Any) -> None:
    app = App("memory://")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    with pytest.raises(ValueError, match="backoff must be"):
        add.using(backoff=backoff)


# -- the parameter `task`


async def test_the_task_may_stand_anywhere_among_the_parameters() -> None:
    app = App("memory://")

    @app.task
    async def first(task: Any, x: int, *more: int) -> list[Any]:
        return [task.taskid, x, *more]

    @app.task
    async def between(x: int, record: Task, y: int = 5) -> list[Any]:
        return [record.taskid, x, y]

    @app.task
    async def optional(x: int = 1, task: Any = None, y: int = 2) -> list[Any]:
        return [task.taskid, x, y]

    @app.task
    async def only_by_name(x: int, *, task: Any) -> list[Any]:
        return [task.taskid, x]

    for function, args, kwargs, result in (
        (first, (7, 8), {}, [7, 8]),
        (between, (7,), {"y": 8}, [7, 8]),
        (between, (7,), {}, [7, 5]),
        (optional, (), {"y": 8}, [1, 8]),
        (optional, (7,), {}, [7, 2]),
        (only_by_name, (7,), {}, [7]),
    ):
        bound = function.signature.bind({"args": args, "kwargs": kwargs}, arguments=True)
        positional, keywords = function.signature.with_task(bound, Task("id", "topic", None))
        assert await function.function(*positional, **keywords) == ["id", *result]
        # The same in a process of its own, where the task arrives as a dict.
        plain = [one.model_dump() if isinstance(one, Task) else one for one in positional]
        named = {name: one.model_dump() if isinstance(one, Task) else one for name, one in keywords.items()}
        assert await function.call_plain(*plain, **named) == ["id", *result]


async def test_the_task_comes_before_the_arguments_where_the_function_wants_it_so(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def first(task: Task, x: int, y: int = 2) -> str:
        return f"{task.topic} {x} {y}"

    @app.task
    def second(x: int, task: Any, *more: int) -> str:
        return f"{task.topic} {x} {more}"

    async with app:
        asked: Any = first  # for the type checker the task is an argument like others
        assert await asked.call(5) == "first 5 2"
        assert await (await asked.send(5, y=3)).result(WITHIN) == "first 5 3"
        assert await second.call(1, 2, 3) == "second 1 (2, 3)"


def test_a_process_is_given_the_task_by_name_too() -> None:
    app = App("memory://")

    @app.task(isolation="process")
    def parse(x: int, task: Any) -> list[Any]:
        return [task.taskid, x]

    assert parse.call_plain(7, task={"taskid": "id", "topic": "parse", "content": None}) == ["id", 7]


# -- ids are text


async def test_a_handle_can_be_sent_stored_and_copied_as_text(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def follow(taskid: Any) -> Any:
        context.headers["of"] = taskid["parent"] if isinstance(taskid, dict) else taskid
        return taskid

    @app.task
    async def starts() -> Handle:
        return await follow.send("x")

    async with app:
        handle = await follow.send("x")
        assert await app.call("follow", handle) == str(handle)
        assert await follow.call(handle) == str(handle)
        assert await follow.call({"parent": handle, handle: 1}) == {"parent": str(handle), str(handle): 1}
        assert await app.call("follow", 1, headers={"parent": handle}) == 1
        assert await app.waitfor(await starts.call(), WITHIN)
        assert await (await app.send("follow", handle, key=handle)).result(WITHIN) == str(handle)
        assert await app.publish("follow", handle, id=handle) == str(handle)
        for copied in (copy.copy(handle), copy.deepcopy([handle])[0], pickle.loads(pickle.dumps(handle))):
            assert (type(copied), copied) == (str, str(handle))


def test_a_blocking_handle_can_be_copied_too() -> None:
    handle = SyncHandle("id", lambda verb: None)
    assert (type(pickle.loads(pickle.dumps(handle))), copy.copy(handle)) == (str, "id")


# -- keywords by name


async def test_a_dict_is_spread_only_where_nothing_of_it_is_lost() -> None:
    app = App("memory://")

    @app.task
    async def f(request: Any, verbose: bool = False) -> list[Any]:
        return [request, verbose]

    @app.task
    async def g(request: Any = None, limit: int = 10) -> list[Any]:
        return [request, limit]

    @app.task
    async def one(x: Any) -> Any:
        return x

    @app.task
    async def two(x: int, y: int) -> None: ...

    async with app:
        assert await app.call("f", {}) == [{}, False]
        assert await app.call("f", {"verbose": True}) == [{"verbose": True}, False]
        assert await app.call("f", {"name": "Neo"}) == [{"name": "Neo"}, False]
        assert await app.call("f", {"request": 1, "verbose": True}) == [1, True]
        assert await app.call("g", {}) == [{}, 10]
        assert await app.call("g", {"limit": 3}) == [None, 3]
        assert await app.call("one", {"x": 1}) == {"x": 1}
        with pytest.raises(InvalidArguments, match="missing"):
            await app.call("two", {})


# -- refused at the sender


async def test_arguments_by_name_are_refused_by_the_app_that_has_the_task(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    async with app:
        for data in ({"x": "two", "y": 3}, {"x": 1}, "text", None, b"\x00"):
            with pytest.raises(InvalidArguments, match="add"):
                await app.send("add", data)
            with pytest.raises(InvalidArguments, match="add"):
                await app.client.call("add", data)
            async with app.parallel() as calls:
                calls.call("add", data)
            assert isinstance(calls.results[0], InvalidArguments)
            for verb in (app.sync.send, app.sync.call):
                with pytest.raises(InvalidArguments, match="add"):
                    await asyncio.to_thread(verb, "add", data)
        assert await app.call("add", b'{"x": 1, "y": 2}', headers={"content-type": "application/json"}) == 3
        async with Client(app.url, store=app.store) as elsewhere:  # it knows nothing of the task
            with pytest.raises(RemoteError, match="x: "):
                await elsewhere.call("add", {"x": "two", "y": 3})
    await asyncio.to_thread(app.sync.close)


# -- results as annotated


@dataclass
class Point:
    x: int
    y: int


class Tag(msgspec.Struct):
    name: str


class Person(pydantic.BaseModel):
    name: str
    born: datetime


class Strange: ...


BORN = datetime(1971, 9, 13, tzinfo=UTC)


async def test_a_result_is_what_the_function_is_annotated_to_return(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def point() -> Point:
        return Point(1, 2)

    @app.task
    async def tags() -> list[Tag]:
        return [Tag("a")]

    @app.task
    def person() -> Person | None:
        return Person(name="Neo", born=BORN)

    @app.task
    async def pair() -> tuple[datetime, Point]:
        return BORN, Point(3, 4)

    @app.task
    async def data() -> bytes:
        return b"\xff\x00"

    @app.task
    async def nothing() -> None: ...

    expected: dict[Any, Any] = {
        point: Point(1, 2),
        tags: [Tag("a")],
        person: Person(name="Neo", born=BORN),
        pair: (BORN, Point(3, 4)),
        data: b"\xff\x00",
        nothing: None,
    }
    async with app:
        for task, value in expected.items():
            for found in (await task.call(), await (await task.send()).result(WITHIN)):
                assert (type(found), found) == (type(value), value)
        assert await app.call("point") == {"x": 1, "y": 2}  # by name there is no annotation
        handle = await point.send()
        await handle.result(WITHIN)
        assert (await handle.record()).runs[0].result == {"x": 1, "y": 2}


async def test_a_result_that_is_not_as_annotated_is_given_as_it_came() -> None:
    app = App("memory://")

    @app.task
    async def lies() -> int:
        return "text"  # type: ignore[return-value]

    @app.task
    async def strange() -> Strange:
        return {"a": 1}  # type: ignore[return-value]

    @app.task
    async def unresolved() -> OnlyForTheChecker:
        return "1.5"  # type: ignore[return-value]

    @app.task
    async def replies() -> Reply:
        return Reply([1, 2], headers={"fresh": True})

    async with app:
        assert await lies.call() == "text"
        assert await strange.call() == {"a": 1}
        assert await unresolved.call() == "1.5"
        assert await replies.call() == [1, 2]


# -- one memory for one app


async def test_all_parts_of_an_app_in_memory_meet() -> None:
    app = App("memory://", brokers={"other": "memory://", "another": "memory://"}, dead_letters="memory://")
    heard: list[Any] = []

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    @app.route("queue", broker="other")
    async def take(message: Message) -> None:
        heard.append(message.body)

    before = await add.send(1, 2)
    async with app:
        assert await before.result(WITHIN) == 3
        assert await asyncio.to_thread(app.sync.call, "add", {"x": 2, "y": 3}) == 5
        handle = await asyncio.to_thread(app.sync.send, "add", {"x": 2, "y": 3})
        assert await asyncio.to_thread(handle.result, WITHIN) == 5
        await asyncio.to_thread(app.sync.publish, "queue", "sync", broker="other")
        await app.publish("queue", "async", broker="other")
        while len(heard) < 2:
            await asyncio.sleep(0.005)
    assert await app.waitfor(handle, WITHIN)  # by a new client
    await app.client.close()
    await asyncio.to_thread(app.sync.close)
    assert (app.url, app.store) == ("memory://", "memory://")
    assert sorted(heard) == ["async", "sync"]


async def test_no_two_apps_in_memory_meet_unless_they_are_named() -> None:
    apps = [App("memory://"), App("memory://")]
    handle = await apps[0].send("nobody", 1)
    with pytest.raises(UnknownTask):
        await apps[1].waitfor(handle, 0)
    for app in apps:
        await app.client.close()


# -- context


def test_a_task_that_tells_its_progress_can_be_called_directly() -> None:
    app = App("memory://")

    @app.task
    def convert(pages: int) -> int:
        for page in range(pages):
            context.progress(page + 1, pages)
        return pages

    assert convert(3) == 3


def test_outside_the_context_says_what_is_missing() -> None:
    for name, line in (
        ("message", "context.message: no message is being handled here"),
        ("headers", "context.headers: no task is running here"),
        ("app", "context.app: no app is running here"),
        ("settings", "context.settings: no app is running here"),
    ):
        with pytest.raises(LookupError) as caught:
            getattr(context, name)
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("done", "error"),
    [(math.nan, "ValueError"), (-math.inf, "ValueError"), ("half", "ValueError"), (None, "TypeError")],
)
async def test_progress_that_is_no_number_fails_its_run_and_nothing_else(
    make_app: MakeApp, done: Any, error: str
) -> None:
    app = make_app()

    @app.task
    async def work() -> None:
        context.progress(1, 4)
        context.progress(done, 4)

    async with app:
        handle = await work.send()
        with pytest.raises(RemoteError) as caught:
            await handle.result(WITHIN)
        assert caught.value.type == error
        assert (await handle.record()).runs[0].progress == (1, 4)


# -- names


@pytest.mark.parametrize("name", ["a\0b", "a\udce9b", "", 5, None])
def test_names_that_no_message_system_could_carry_are_refused_at_the_declaration(name: Any) -> None:
    app = App("memory://")
    declared: list[Callable[[], Any]] = [
        lambda: app.task("work", topics=[name]),
        lambda: app.route(name),
        lambda: app.route([name]),
        lambda: app.route("queue", topics=[name]),
        lambda: app.subscribe(name),
    ]
    if name is not None:  # that is: the function's
        declared.append(lambda: app.task(name)(lambda request: None))
    for declare in declared:
        with pytest.raises(DeclarationError) as caught:
            declare()
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    with pytest.raises(DeclarationError):
        app.task("work", topics=5)  # type: ignore[call-overload]
    assert (app.tasks, app.routes) == ({}, [])


def test_a_schedule_of_a_task_takes_no_options_of_its_own() -> None:
    app = App("memory://")

    @app.task
    async def collect() -> None: ...

    with pytest.raises(DeclarationError, match=r"collect is a task already.*expires"):
        app.every(5, expires=3)(collect)
    assert app.schedules == []
    app.every(5)(collect)


# -- errors


def test_a_remote_error_says_itself_in_one_line() -> None:
    error = RemoteError("ValidationError", "2 errors\n  x: no\n  y: no")
    assert str(error) == "ValidationError: 2 errors x: no y: no"
    assert error.message == "2 errors\n  x: no\n  y: no"


async def test_what_could_not_be_sent_leaves_no_record_and_no_unique_key(unused_tcp_port: int) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{unused_tcp_port}/"
    app = App("memory://", brokers={"away": url})
    async with app.client:
        await app.send("known", 1)  # so that the store is at hand
        for _ in range(2):
            with pytest.raises(PublishTimeout, match=r"within 0\.3 s") as caught:
                await app.send("work", 1, unique="key", timeout=0.3, broker="away")
            assert not caught.value.reached
        ledger = await app.client._ledger(WITHIN)
        assert [task.sent.topic for task in await ledger.page(10)] == ["known"]
