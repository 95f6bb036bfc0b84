"""Tasks: sent, run once, recorded, retried, cancelled; on every system."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import pydantic
import pytest

from penstock import (
    App,
    Client,
    ConfigError,
    DeclarationError,
    DuplicateQueue,
    DuplicateTask,
    ExpirationError,
    Handle,
    InvalidArguments,
    Message,
    NotUnique,
    RemoteError,
    StoreRequired,
    Task,
    TaskCancelled,
    TimeoutError,
    Unavailable,
    Unroutable,
    context,
)
from tests.helpers import capabilities, dead_letters, eventually

MakeApp = Callable[..., App]
WITHIN = 20.0  # seconds; only ever waited for in full by a failing test


# -- declaring


async def test_a_task_is_still_the_function_it_was() -> None:
    app = App("memory://")

    @app.task
    async def add(x: int, y: int) -> int:
        """Adds."""
        return x + y

    @app.task("other.name")
    def double(x: int) -> int:
        return 2 * x

    assert await add(2, 3) == 5
    assert double(4) == 8
    assert (add.name, add.__doc__, double.name) == ("add", "Adds.", "other.name")


def test_a_second_task_of_a_name_is_refused() -> None:
    app = App("memory://")

    @app.task("work")
    async def one(request: Any) -> None: ...

    with pytest.raises(DuplicateTask, match="'work'"):

        @app.task("work")
        async def two(request: Any) -> None: ...

    with pytest.raises(DuplicateQueue, match="'work'"):

        @app.route("work")
        async def three(message: Message) -> None: ...

    @app.route("queue")
    async def four(message: Message) -> None: ...

    with pytest.raises(DuplicateQueue, match="'queue'"):

        @app.task("queue")
        async def five(request: Any) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"retries": -1},
        {"retries": 1.5},
        {"timeout": 0},
        {"timeout": "3"},
        {"isolation": "fiber"},
        {"priorities": 11},
        {"concurrency": 0},
        {"cluster_limit": 0},
        {"rate_limit": "fast"},
        {"rate_limit": 0},
        {"backoff": (3, 1)},
        {"expires": -1},
        {"result_ttl": -1},
    ],
)
def test_a_setting_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    app = App("memory://")
    with pytest.raises(ConfigError) as caught:
        app.task("work", **options)(lambda request: None)
    assert next(iter(options)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_functions_that_cannot_be_called_from_json_are_refused() -> None:
    app = App("memory://")

    class Strange: ...

    with pytest.raises(DeclarationError, match="Strange"):

        @app.task
        async def takes_strange(request: Strange) -> None: ...

    with pytest.raises(DeclarationError, match="generator"):

        @app.task
        async def generates(request: Any) -> Any:
            yield request

    with pytest.raises(DeclarationError, match="only one"):

        @app.task
        async def doubly(task: Any, other: Task) -> None: ...

    assert app.tasks == {}


def test_what_needs_a_store_says_so_where_it_is_declared() -> None:
    app = App("amqp://guest:guest@127.0.0.1/")

    async def work() -> None: ...

    for declare in (
        lambda: app.task("work", cluster_limit=1)(work),
        lambda: app.task("work", rate_limit=1)(work),
        lambda: app.every(60)(work),
        lambda: app.cron("* * * * *")(work),
    ):
        with pytest.raises(StoreRequired, match="store"):
            declare()
    assert app.tasks == {}


# -- sending and results


async def test_what_a_task_returns_comes_back(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def add(x: int, y: int = 10) -> int:
        return x + y

    @app.task
    def shout(text: str) -> dict[str, str]:
        return {"text": text.upper()}

    async with app:
        handle = await add.send(2, 3)
        assert isinstance(handle, Handle)
        assert isinstance(handle, str)
        assert await handle.result(WITHIN) == 5
        assert await (await add.send(2)).result(WITHIN) == 12
        assert await (await add.send(y=1, x=2)).result(WITHIN) == 3
        assert await (await shout.send("psst")).result(WITHIN) == {"text": "PSST"}
        assert await (await app.send("add", {"x": 7, "y": 1})).result(WITHIN) == 8
        assert await (await app.send("shout", "hey")).result(WITHIN) == {"text": "HEY"}


@dataclass
class Point:
    x: int
    y: int


class Person(pydantic.BaseModel):
    name: str
    age: int


class Tag(msgspec.Struct):
    word: str


async def test_arguments_arrive_as_what_they_are_annotated(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def look(at: Point, who: Person, when: datetime, tags: list[Tag], *rest: Any, **more: Any) -> str:
        assert isinstance(at, Point)
        assert isinstance(who, Person)
        assert isinstance(when, datetime)
        assert all(isinstance(tag, Tag) for tag in tags)
        return f"{at.x + at.y} {who.name} {when.year} {tags[0].word} {rest} {more}"

    async with app:
        handle = await look.send(Point(1, 2), Person(name="Neo", age=3), datetime(1999, 3, 31), [Tag("a")], 7, b="c")
        assert await handle.result(WITHIN) == "3 Neo 1999 a (7,) {'b': 'c'}"


async def test_arguments_that_do_not_fit_are_refused_at_the_sender(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    async with app.client:
        for args in [(), (1,), (1, 2, 3), ("a", 1)]:
            with pytest.raises(InvalidArguments, match="add"):
                await add.send(*args)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="add"):
                await add.call(*args)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="colour"):
            add.using(colour="red")


async def test_arguments_that_do_not_fit_become_a_dead_letter_and_a_failed_record(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(retries=3)
    async def add(x: int, y: int) -> int:
        return x + y

    async with app, Client(app.url, store=app.store) as elsewhere:
        handle = await elsewhere.send("add", {"x": "one", "y": 2})
        with pytest.raises(RemoteError, match="x: ") as caught:
            await handle.result(WITHIN)
        assert caught.value.type == "InvalidArguments"
        (letter,) = await eventually(lambda: dead_letters(app, "add"))
        assert (letter.id, letter.reason, letter.attempts) == (str(handle), "invalid", 1)


async def test_every_task_on_a_topic_runs_once(make_app: MakeApp) -> None:
    app = make_app()
    ran: list[tuple[str, str]] = []

    @app.task(topics=["hello", "world"])
    async def greet(task: Any) -> str:
        ran.append(("greet", task.taskid))
        return f"{task.topic} {task.content['name']}"

    @app.task(topics="hello")
    def log(record: Task) -> None:
        ran.append(("log", record.taskid))

    async with app:
        hello = await app.send("hello", {"name": "Neo"})
        world = await app.send("world", {"name": "Trinity"})
        record = await app.waitfor(hello, WITHIN)
        assert (record.taskid, record.topic, record.content, record.state) == (
            hello, "hello", {"name": "Neo"}, "succeeded",
        )  # fmt: skip
        assert [(run.task, run.state, run.result) for run in record.runs] == [
            ("greet", "succeeded", "hello Neo"),
            ("log", "succeeded", None),
        ]
        assert datetime.fromisoformat(record.createdAt).tzinfo is not None
        assert record.completedAt is not None
        assert record.createdAt <= record.completedAt
        assert [run.result for run in (await app.waitfor(world, WITHIN)).runs] == ["world Trinity"]
        assert sorted(ran) == sorted([("greet", hello), ("log", hello), ("greet", world)])


async def test_a_topic_that_nobody_is_on_accepts_a_task_which_expires(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        taskid = await app.send("nobody", {"n": 1}, expires=0.2)
        with pytest.raises(ExpirationError):
            await app.waitfor(taskid, WITHIN)
        assert (await taskid.record()).state == "expired"


async def test_without_a_store_a_topic_that_nobody_is_on_is_an_error(amqp_url: str) -> None:
    app = App(amqp_url)
    async with app.client:
        with pytest.raises(Unroutable):
            await app.send("nobody", {})


async def test_without_a_store_tasks_run_and_what_needs_one_says_so(amqp_url: str) -> None:
    app = App(amqp_url)
    done: list[int] = []

    @app.task
    async def work(n: int) -> None:
        done.append(n)

    async with app:
        handle = await work.send(1)
        await eventually(lambda: done)
        for asked in (handle.result(1), handle.cancel(), handle.record(), app.waitfor(handle)):
            with pytest.raises(StoreRequired):
                await asked
        with pytest.raises(StoreRequired, match="unique"):
            await work.using(unique="k").send(2)
        assert done == [1]


async def test_a_task_that_nobody_takes_in_time_expires(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> None: ...

    async with app.client:
        handle = await work.using(expires=0.2).send(1)
        with pytest.raises(ExpirationError):
            await handle.result(WITHIN)
    ran = []
    app.on_startup(lambda: ran.append(1))
    async with app:
        assert (await handle.record()).state == "expired"
        later = await work.send(2)
        await later.result(WITHIN)
        assert [attempt.number for attempt in (await handle.record()).runs[0].attempts] == []


async def test_expiry_counts_only_until_it_is_taken(make_app: MakeApp) -> None:
    app = make_app()
    release = asyncio.Event()

    @app.task(retries=1, backoff=(0.01, 0.01))
    async def work(n: int) -> int:
        await release.wait()
        if context.message.attempt == 1:
            raise ValueError("once more")
        return n

    async with app:
        handle = await work.using(expires=0.3).send(1)
        await eventually(lambda: _state(handle, "running"))
        await asyncio.sleep(1.5)  # long past its expiry, and the time in which that would be noticed
        assert (await handle.record()).state == "running"
        release.set()
        assert await handle.result(WITHIN) == 1


async def _state(handle: Handle, state: str) -> bool:
    return (await handle.record()).state == state


# -- failing


async def test_an_error_arrives_as_data_and_the_task_as_a_dead_letter(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def fail(n: int) -> None:
        raise ValueError(f"no {n}")

    async with app:
        handle = await fail.send(1)
        with pytest.raises(RemoteError) as caught:
            await handle.result(WITHIN)
        error = caught.value
        assert (error.type, error.message) == ("ValueError", "no 1")
        assert "in fail" in (error.traceback or "")
        record = await app.waitfor(handle, WITHIN)
        assert (record.state, record.runs[0].attempts[0].error) == ("failed", "ValueError: no 1")
        (letter,) = await eventually(lambda: dead_letters(app, "fail"))
        assert (letter.id, letter.reason) == (str(handle), "failed")


async def test_retries_back_off_and_are_recorded_one_by_one(make_app: MakeApp) -> None:
    app = make_app()
    tried: list[str] = []

    @app.task(retries=2, backoff=(0.01, 0.05))
    def flaky(key: str) -> str:
        tried.append(key)
        if tried.count(key) < 3:
            raise OSError(f"try {tried.count(key)}")
        return key

    async with app:
        handle = await flaky.send("a")
        assert await handle.result(WITHIN) == "a"
        attempts = (await handle.record()).runs[0].attempts
        assert [(one.number, one.outcome, one.error) for one in attempts] == [
            (1, "failed", "OSError: try 1"),
            (2, "failed", "OSError: try 2"),
            (3, "succeeded", None),
        ]
        assert all(one.endedAt is not None and one.startedAt <= one.endedAt for one in attempts)
        fewer = await flaky.using(retries=1).send("b")
        with pytest.raises(RemoteError, match="try 2"):
            await fewer.result(WITHIN)
        assert tried == ["a", "a", "a", "b", "b"]


async def test_a_result_that_cannot_be_told_is_a_failure(make_app: MakeApp) -> None:
    app = make_app(max_body=10_000)

    @app.task
    async def strange() -> object:
        return object()

    @app.task
    async def huge() -> str:
        return "x" * 20_000

    async with app:
        for task, kind in ((strange, "Unencodable"), (huge, "BodyTooLarge")):
            with pytest.raises(RemoteError) as caught:
                await (await task.send()).result(WITHIN)
            assert caught.value.type == kind
            with pytest.raises(RemoteError) as caught:
                await task.call()
            assert caught.value.type == kind


async def test_large_bodies_travel_packed_and_arrive_whole(make_app: MakeApp) -> None:
    app = make_app()
    sizes: list[int] = []

    @app.task
    async def echo(text: str) -> str:
        sizes.append(len(context.message.raw))
        return text

    async with app:
        text = "penstock " * 20_000
        assert await (await echo.send(text)).result(WITHIN) == text
        assert await echo.call(text) == text
        assert max(sizes) < len(text) / 10


# -- unique keys, cancelling, progress


async def test_a_unique_key_admits_one_task_at_a_time(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> int:
        return n

    async with app.client:
        first = await work.using(unique="k").send(1)
        with pytest.raises(NotUnique) as caught:
            await work.using(unique="k").send(2)
        assert caught.value.taskid == first
        await work.using(unique="other").send(3)
    async with app:
        assert await first.result(WITHIN) == 1
        again = await work.using(unique="k").send(4)
        assert await again.result(WITHIN) == 4


async def test_a_unique_key_is_free_again_however_its_task_ended(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> int:
        if n < 0:
            raise ValueError("negative")
        return n

    async with app.client:
        expired = await work.using(unique="k", expires=0.1).send(1)
        with pytest.raises(ExpirationError):
            await expired.result(WITHIN)
        cancelled = await work.using(unique="k").send(2)
        assert await cancelled.cancel()
        failing = await work.using(unique="k").send(-1)
    async with app:
        with pytest.raises(RemoteError):
            await failing.result(WITHIN)
        assert await (await work.using(unique="k").send(3)).result(WITHIN) == 3


async def test_racing_senders_of_a_unique_key_have_one_winner(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> int:
        return n

    async with app.client:
        sent = await asyncio.gather(*(work.using(unique="k").send(n) for n in range(20)), return_exceptions=True)
    assert sum(isinstance(one, Handle) for one in sent) == 1
    assert sum(isinstance(one, NotUnique) for one in sent) == 19


async def test_a_queued_task_that_is_cancelled_never_runs(make_app: MakeApp) -> None:
    app = make_app()
    ran: list[int] = []

    @app.task
    async def work(n: int) -> None:
        ran.append(n)

    async with app.client:
        handle = await work.send(1)
        assert await handle.cancel()
        assert not await handle.cancel()
    async with app:
        with pytest.raises(TaskCancelled):
            await handle.result(WITHIN)
        await (await work.send(2)).result(WITHIN)
        assert ran == [2]


async def test_a_task_that_nobody_was_there_for_can_be_cancelled(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        handle = await app.send("nobody", 1, unique="k")
        waiting = asyncio.create_task(handle.result(WITHIN))
        waiting_too = asyncio.create_task(app.waitfor(handle, WITHIN))
        assert (await handle.record()).state == "queued"
        assert await handle.cancel()
        assert not await handle.cancel()
        with pytest.raises(TaskCancelled):
            await waiting
        assert (await waiting_too).state == "cancelled"
        record = await handle.record()
        assert record.completedAt is not None
        assert record.createdAt <= record.completedAt
        assert record.runs == []
        again = await app.send("nobody", 2, unique="k", expires=0.1)
        with pytest.raises(ExpirationError):
            await app.waitfor(again, WITHIN)
        assert not await again.cancel()


@pytest.mark.parametrize("plain", [False, True], ids=["coroutine", "thread"])
async def test_a_running_task_that_is_cancelled_is_stopped(make_app: MakeApp, plain: bool) -> None:
    app = make_app()
    ended: list[str] = []

    if plain:

        @app.task("work")
        def spin() -> None:
            try:
                while True:
                    pass
            finally:
                ended.append("thread")
    else:

        @app.task("work")
        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("coroutine")

    @app.task
    async def other() -> int:
        return 1

    async with app:
        handle = await app.send("work")
        await eventually(lambda: _state(handle, "running"))
        assert await handle.cancel()
        with pytest.raises(TaskCancelled):
            await handle.result(WITHIN)
        assert ended
        record = await handle.record()
        assert (record.state, record.runs[0].attempts[-1].outcome) == ("cancelled", "cancelled")
        assert await (await other.send()).result(WITHIN) == 1


async def test_progress_can_be_seen_while_it_runs(make_app: MakeApp) -> None:
    app = make_app()
    go_on = asyncio.Event()

    @app.task
    async def work() -> str:
        for done in range(1, 101):
            context.progress(done, 200)
        await go_on.wait()
        context.progress(200, 200)
        return "done"

    async with app:
        handle = await work.send()

        async def told() -> bool:
            runs = (await handle.record()).runs
            return bool(runs) and runs[0].progress == (100, 200)

        await eventually(told)
        go_on.set()
        assert await handle.result(WITHIN) == "done"
        assert (await handle.record()).runs[0].progress == (200, 200)


async def test_progress_of_a_call_is_of_no_consequence(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work() -> str:
        context.progress(1, 2)
        return "done"

    async with app:
        assert await work.call() == "done"


async def test_waiting_ends_at_its_timeout(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work() -> None: ...

    async with app.client:
        handle = await work.send()
        with pytest.raises(TimeoutError, match="queued"):
            await handle.result(0.1)
        with pytest.raises(TimeoutError, match="queued"):
            await app.waitfor(handle, 0.1)


async def test_delay_and_priority_are_kept(make_app: MakeApp) -> None:
    app = make_app()
    order: list[str] = []

    @app.task
    async def work(name: str) -> None:
        order.append(name)

    async with app.client:
        await work.using(delay=0.5).send("delayed")
        for priority, name in ((0, "low"), (255, "high"), (100, "middle")):
            await work.using(priority=priority).send(name)
        with pytest.raises(ValueError, match="delay"):
            await work.using(delay=-1).send("never")
        with pytest.raises(ValueError, match="priority"):
            await work.using(priority=256).send("never")
        with pytest.raises(ValueError, match="retries"):
            await work.using(retries=-1).send("never")
        with pytest.raises(ValueError, match="result_ttl"):
            await work.using(result_ttl=-1).send("never")
        with pytest.raises(ValueError, match="backoff"):
            await work.using(backoff=(2, 1)).send("never")
    async with app:
        await eventually(lambda: len(order) == 4)
        if (await capabilities(app)).priorities:
            assert order == ["high", "middle", "low", "delayed"]
        else:
            assert order == ["low", "high", "middle", "delayed"]


# -- limits


async def test_a_cluster_limit_holds_over_all_processes(make_app: MakeApp) -> None:
    running, most, done = 0, 0, 0

    def make() -> App:
        app = make_app()

        @app.task(cluster_limit=2, concurrency=4)
        async def work(n: int) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            running -= 1
            done += 1

        return app

    one, other = make(), make()
    async with one, other:
        for n in range(12):
            await one.tasks["work"].send(n)
        await eventually(lambda: done == 12)
    assert most == 2


async def test_a_rate_limit_spreads_what_is_begun_over_all_processes(make_app: MakeApp) -> None:
    begun: list[float] = []
    now = asyncio.get_running_loop().time

    def make() -> App:
        app = make_app()

        @app.task(rate_limit="20/s", concurrency=4)
        async def work(n: int) -> None:
            begun.append(now())

        return app

    one, other = make(), make()
    async with one, other:
        start = now()  # each may begin later than it might, and the first one too
        await asyncio.gather(*(one.tasks["work"].send(n) for n in range(20)))
        await eventually(lambda: len(begun) == 20)
    assert all(at - start >= n * 0.05 - 0.005 for n, at in enumerate(sorted(begun)))


# -- schedules; what they enqueue when is in test_schedule.py


async def test_a_schedule_enqueues_tasks_that_are_recorded(make_app: MakeApp) -> None:
    app = make_app()
    seen: list[str] = []

    @app.every(0.1, retries=1)
    async def collect(task: Task) -> str:
        seen.append(task.taskid)
        return task.topic

    @app.cron("*/5 * * * *", timezone="Asia/Tokyo")
    def report() -> None: ...

    assert {one.name for one in app.schedules} == {"collect", "report"}
    async with app:
        await eventually(lambda: len(seen) >= 3)
        record = await app.waitfor(seen[0], WITHIN)
        assert (record.state, record.runs[0].result) == ("succeeded", "collect")
    assert len(set(seen)) == len(seen)
    assert sorted(seen) == seen  # ids of tasks are in the order of time


def test_a_schedule_that_cannot_be_is_refused_where_it_stands() -> None:
    app = App("memory://")

    async def work() -> None: ...

    async def needs(argument: int) -> None: ...

    for declare, error in (
        (lambda: app.every(0), ConfigError),
        (lambda: app.cron("61 * * * *"), ConfigError),
        (lambda: app.cron("* * * * *", timezone="Asia/Tokio"), ConfigError),
        (lambda: app.every(60)(needs), DeclarationError),
    ):
        with pytest.raises(error) as caught:
            declare()
        assert "\n" not in str(caught.value)
    assert app.tasks == {}
    app.every(60)(work)
    with pytest.raises(DeclarationError, match="already"):
        app.cron("* * * * *")(app.tasks["work"])


async def test_names_that_no_store_could_keep_are_refused(make_app: MakeApp) -> None:
    app = make_app()
    async with app.client:
        with pytest.raises(ValueError, match="null"):
            await app.send("a\0b", {})
        with pytest.raises(ValueError, match="null"):
            await app.send("ab", {}, unique="\0")


# -- what operators and outages do


async def test_a_dead_letter_that_is_replayed_runs_again(make_app: MakeApp) -> None:
    from penstock.control import dead_letters as control

    app = make_app()
    broken = True

    @app.task
    async def work(n: int) -> int:
        if broken:
            raise ValueError("broken")
        return n

    async with app:
        handle = await work.send(7)
        with pytest.raises(RemoteError):
            await handle.result(WITHIN)
        await eventually(lambda: dead_letters(app, "work"))
        broken = False
        await control.replay(await app.client._pool.get(), "work", control.Selection(), control.Outcome())
        await eventually(lambda: _state(handle, "succeeded"))
        assert await handle.result(WITHIN) == 7
        outcomes = [attempt.outcome for attempt in (await handle.record()).runs[0].attempts]
        assert outcomes == ["failed", "succeeded"]


async def test_of_two_copies_in_one_process_the_second_waits_and_finds_it_done(make_app: MakeApp) -> None:
    app = make_app()
    at_once = most = runs = 0

    @app.task(concurrency=6)
    async def work(n: int) -> int:
        nonlocal at_once, most, runs
        at_once, runs = at_once + 1, runs + 1
        most = max(most, at_once)
        await asyncio.sleep(0.2)
        at_once -= 1
        return runs

    async with app:
        broker = await app.client._pool.get()
        publish = broker.publish

        async def twice(messages: Any) -> Any:
            await publish(messages)
            return await publish(messages)

        broker.publish = twice  # type: ignore[method-assign]
        handles = [await work.send(n) for n in range(3)]
        broker.publish = publish  # type: ignore[method-assign]
        for handle in handles:
            await handle.result(WITHIN)
        await eventually(lambda: _nothing_left(app, "work"))
        assert (runs, most) == (3, 3)
        assert [len((await handle.record()).runs[0].attempts) for handle in handles] == [1, 1, 1]


async def _nothing_left(app: App, queue: str) -> bool:
    admin = (await app.client._pool.get()).admin
    assert admin is not None
    (info,) = [one for one in await admin.inspect() if one.name == queue]
    return info.ready == 0 and not info.unsettled


async def test_an_outage_of_what_a_task_writes_to_counts_no_attempt(make_app: MakeApp) -> None:
    app = make_app()
    tries = 0

    @app.task(backoff=(0.01, 0.05))  # no retries
    async def work() -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise Unavailable("the database is away")
        return "done"

    async with app:
        assert await (await work.send()).result(WITHIN) == "done"
        assert await dead_letters(app, "work") == []


async def test_a_body_that_no_run_ever_had_is_no_attempt(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> None: ...

    async with app, Client(app.url, store=app.store) as elsewhere:
        handle = await elsewhere.send("work", "text")
        with pytest.raises(RemoteError):
            await handle.result(WITHIN)
        assert (await handle.record()).runs[0].attempts == []


async def test_the_client_of_a_running_app_stays_connected(make_app: MakeApp) -> None:
    app = make_app()

    @app.task
    async def work(n: int) -> int:
        return n

    async with app:
        async with app.client:
            assert await work.call(1) == 1
        assert await work.call(2) == 2
        assert await (await work.send(3)).result(WITHIN) == 3


async def test_what_waits_for_its_limit_until_it_has_expired_never_runs(make_app: MakeApp) -> None:
    app = make_app()
    ran: list[int] = []

    @app.task(cluster_limit=1, concurrency=2)
    async def work(n: int) -> None:
        ran.append(n)
        await asyncio.sleep(1.0 if n == 0 else 0)

    async with app:
        first = await work.send(0)
        await eventually(lambda: ran)
        late = await work.using(expires=0.3).send(1)
        await first.result(WITHIN)
        with pytest.raises(ExpirationError):
            await late.result(WITHIN)
        assert ran == [0]


async def test_what_will_never_run_takes_no_turn(make_app: MakeApp) -> None:
    app = make_app()
    began: list[float] = []

    @app.task(rate_limit="1/2s", concurrency=1)
    async def work(n: int) -> None:
        began.append(asyncio.get_running_loop().time())

    async with app.client:
        handles = [await work.send(n) for n in range(6)]
        for handle in handles[1:5]:
            assert await handle.cancel()
    async with app:
        await handles[5].result(WITHIN)
        assert len(began) == 2
        assert began[1] - began[0] < 4


async def test_what_waits_for_its_turn_keeps_its_expiry(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.tasks import limits

    monkeypatch.setattr(limits, "LONGEST_HOLD", 0.1)
    app = make_app()
    ran: list[int] = []

    @app.task(rate_limit="1/2s", backoff=(0.1, 0.2))
    async def work(n: int) -> None:
        ran.append(n)

    async with app:
        await (await work.send(0)).result(WITHIN)
        late = await work.using(expires=0.7).send(1)  # given back meanwhile, and more than once
        with pytest.raises(ExpirationError):
            await late.result(WITHIN)
        await asyncio.sleep(1.5)
        assert ran == [0]


async def test_a_timeout_of_the_functions_own_is_its_error(make_app: MakeApp) -> None:
    app = make_app()

    @app.task(timeout=30)
    async def work() -> None:
        raise TimeoutError("no answer\nfrom elsewhere")

    async with app:
        handle = await work.send()
        with pytest.raises(RemoteError) as caught:
            await handle.result(WITHIN)
        assert (caught.value.type, caught.value.message) == ("TimeoutError", "no answer\nfrom elsewhere")
        (run,) = (await handle.record()).runs
        assert run.attempts[0].error == "TimeoutError: no answer from elsewhere"
        with pytest.raises(RemoteError, match="no answer"):
            await work.call()
