"""Workers of an app: run again, told to end, stopped for certain, elected."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from penstock import App, ConfigError, DeclarationError, PenstockError, Runtime, StoreRequired
from penstock.workers.resident import Resident, WorkerStatus
from tests.helpers import eventually


def resident(app: App, name: str) -> Resident:
    assert app._life is not None
    assert app._life._supervisor is not None
    return app._life._supervisor.find(name)


def status(app: App, name: str) -> WorkerStatus:
    return resident(app, name).status


# -- run again and again


async def test_a_worker_that_ends_is_run_again_after_its_interval() -> None:
    app = App("memory://")
    begun: list[float] = []

    @app.worker("multi", watch_interval=0.1)
    async def collect() -> None:
        begun.append(asyncio.get_running_loop().time())

    async with app:
        await eventually(lambda: len(begun) == 4)
        found = status(app, "collect")
    assert all(later - earlier >= 0.099 for earlier, later in itertools.pairwise(begun))
    assert found.failures == 0
    assert found.last_error is None
    assert found.runs >= 4


async def test_one_that_raises_is_run_again_after_its_backoff(caplog: pytest.LogCaptureFixture) -> None:
    app = App("memory://")

    @app.worker("multi", watch_interval=3600, backoff=(0.01, 0.02), category="example")
    async def produce() -> None:
        logging.getLogger("elsewhere").warning("about to divide")
        print(1 / 0)

    async with app:
        await eventually(lambda: status(app, "produce").failures >= 3)
        found = status(app, "produce")
        assert found.last_error == "ZeroDivisionError: division by zero"
        assert found.category == "example"
        assert "about to divide" in found.log[0]
        assert any("has failed, again in" in line for line in found.log)
        assert found.log[-1] == "ZeroDivisionError: division by zero"
    assert "worker produce has failed" in caplog.text


async def test_the_log_of_one_is_not_that_of_another() -> None:
    app = App("memory://")
    for name in ("red", "blue"):

        @app.worker("multi", name=name)
        async def speak(name: str = name) -> None:
            await asyncio.create_task(asyncio.to_thread(logging.getLogger("any").warning, "I am %s", name))

    handlers = list(logging.getLogger().handlers)
    async with app:
        await eventually(lambda: status(app, "red").log and status(app, "blue").log)
        assert [line.partition(": ")[2] for line in status(app, "red").log] == ["I am red"]
        assert [line.partition(": ")[2] for line in status(app, "blue").log] == ["I am blue"]
    assert logging.getLogger().handlers == handlers


async def test_a_plain_function_runs_in_a_thread() -> None:
    app = App("memory://", grace=5)
    where: list[threading.Thread] = []
    turns: list[bool] = []

    @app.worker("multi", watch_interval=0.01)
    def watch() -> None:
        where.append(threading.current_thread())
        while Runtime.running():
            time.sleep(0.001)
        turns.append(Runtime.running())

    async with app:
        await eventually(lambda: where)
        assert status(app, "watch").state == "running"
    assert where[0] is not threading.main_thread()
    assert turns == [False]
    await eventually(lambda: not where[0].is_alive(), "its thread has ended")


async def test_an_exit_in_a_worker_is_a_failure_of_that_worker_alone() -> None:
    app = App("memory://")
    ran: list[int] = []

    @app.worker("multi", backoff=(0.01, 0.01))
    async def leaves() -> None:
        raise SystemExit(3)

    @app.worker("multi", watch_interval=0.01)
    async def stays() -> None:
        ran.append(1)

    async with app:
        await eventually(lambda: status(app, "leaves").failures >= 2)
        so_far = len(ran)
        await eventually(lambda: len(ran) > so_far)
        assert status(app, "leaves").last_error == "RuntimeError: the function raised SystemExit: 3"


# -- told to end


async def test_at_the_stop_a_worker_has_its_grace() -> None:
    app = App("memory://", grace=10)
    went: list[str] = []

    @app.worker("multi")
    async def consume() -> None:
        while Runtime.running():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        went.append("by itself")

    async with app:
        await eventually(lambda: status(app, "consume").state == "running")
    assert went == ["by itself"]


async def test_who_swallows_cancellation_is_cancelled_until_it_has_gone() -> None:
    app = App("memory://", grace=0.05)
    swallowed = 0

    @app.worker("multi")
    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 8:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1

    async with app:
        await eventually(lambda: status(app, "stubborn").state == "running")
    assert swallowed == 8


async def test_a_pause_ends_it_until_it_is_resumed() -> None:
    app = App("memory://", grace=5)
    runs: list[str] = []

    @app.worker("multi", watch_interval=0.01)
    async def consume() -> None:
        runs.append("begun")
        while Runtime.running():
            await asyncio.sleep(0.005)
        runs.append("ended")

    async with app:
        await eventually(lambda: runs == ["begun"])
        resident(app, "consume").pause()
        resident(app, "consume").pause()
        await eventually(lambda: status(app, "consume").state == "paused")
        assert runs == ["begun", "ended"]
        resident(app, "consume").restart()
        await asyncio.sleep(0.05)
        assert runs == ["begun", "ended"]
        resident(app, "consume").resume()
        await eventually(lambda: runs == ["begun", "ended", "begun"])
        resident(app, "consume").restart()
        await eventually(lambda: runs == ["begun", "ended", "begun", "ended", "begun"])
        with pytest.raises(ConfigError, match="no worker is named 'other': there are consume"):
            resident(app, "other")


async def test_a_restart_does_not_wait_for_the_interval() -> None:
    app = App("memory://")
    runs: list[int] = []

    @app.worker("multi", watch_interval=3600)
    async def collect() -> None:
        runs.append(1)

    async with app:
        await eventually(lambda: status(app, "collect").state == "resting")
        resident(app, "collect").restart()
        await eventually(lambda: len(runs) == 2)


async def test_what_it_raises_when_told_to_end_is_no_failure() -> None:
    app = App("memory://", grace=5)

    @app.worker("multi", watch_interval=0.01)
    async def consume() -> None:
        while Runtime.running():
            await asyncio.sleep(0.005)
        raise ConnectionError("closed")

    async with app:
        await eventually(lambda: status(app, "consume").state == "running")
        resident(app, "consume").restart()
        await eventually(lambda: status(app, "consume").runs == 2)
        assert status(app, "consume").failures == 0


def test_outside_a_worker_everything_goes_on() -> None:
    assert Runtime.running()
    assert Runtime.epoch() is None


@pytest.mark.blocks
async def test_one_that_blocks_the_event_loop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    app = App("memory://")

    @app.worker("multi")
    async def greedy() -> None:
        time.sleep(3.2)

    async with app:
        await eventually(lambda: "blocked" in caplog.text)
    (said,) = [record.getMessage() for record in caplog.records if "blocked" in record.getMessage()]
    assert "penstock-worker greedy, in greedy (" in said


# -- one in the cluster


class Ledger:
    """Who ran when; one at a time."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.epochs: list[int] = []

    def declare(self, app: App, who: str) -> None:
        @app.worker("single", watch_interval=0.01, name="produce")
        async def produce() -> None:
            assert not self.running
            self.running.add(who)
            epoch = Runtime.epoch()
            assert epoch is not None
            self.epochs.append(epoch)
            try:
                while Runtime.running():
                    await asyncio.sleep(0.005)
            finally:
                self.running.discard(who)


async def test_a_single_worker_runs_in_one_process_and_is_taken_over(tmp_path: Path) -> None:
    url, ledger = f"sqlite:///{tmp_path / 'shared.db'}", Ledger()
    apps = [App(url, grace=5), App(url, grace=5), App(url, grace=5)]
    for number, app in enumerate(apps):
        ledger.declare(app, str(number))
    async with apps[0]:
        await eventually(lambda: ledger.running == {"0"})
        async with apps[1], apps[2]:
            await asyncio.sleep(0.2)
            assert ledger.running == {"0"}
            assert status(apps[1], "produce").state == "waiting"
            assert apps[0]._life is not None
            assert apps[0]._life._supervisor is not None
            await apps[0]._life._supervisor.stop()
            await eventually(lambda: ledger.running and ledger.running != {"0"}, within=3)  # it was given up
    assert not ledger.running
    assert ledger.epochs == sorted(set(ledger.epochs))
    assert len(ledger.epochs) >= 2


async def test_one_that_has_failed_stays_with_its_process(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    apps = [App(url), App(url)]
    where: list[int] = []
    for number, app in enumerate(apps):

        @app.worker("single", name="fragile", backoff=(0.01, 0.01))
        async def fragile(number: int = number) -> None:
            where.append(number)
            raise ValueError("no")

    async with apps[0]:
        await eventually(lambda: where)
        async with apps[1]:
            await eventually(lambda: len(where) >= 5)
            assert set(where) == {0}


# -- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "both"}, ConfigError, "mode is 'single' or 'multi', not 'both'"),
        ({"mode": "multy"}, ConfigError, "did you mean 'multi'"),
        ({"watch_interval": -1}, ConfigError, "watch_interval must be seconds"),
        ({"watch_interval": "10"}, ConfigError, "watch_interval must be seconds"),
        ({"backoff": (5, 1)}, ConfigError, "backoff must be"),
        ({"name": ""}, DeclarationError, "a worker's name"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[PenstockError], message: str) -> None:
    app = App("memory://")

    async def work() -> None: ...

    with pytest.raises(error, match=message):
        app.worker(**options)(work)
    assert not app.workers


def test_functions_that_cannot_be() -> None:
    app = App("memory://")

    async def needy(message: str) -> None: ...

    async def generator() -> Any:
        yield 1

    async def work() -> None: ...

    with pytest.raises(DeclarationError, match=r"'needy' is called without arguments: .*message"):
        app.worker("multi")(needy)
    with pytest.raises(DeclarationError, match="is a generator"):
        app.worker("multi")(generator)
    with pytest.raises(DeclarationError, match=r"write @app.worker\('multi'\) above .*work"):
        app.worker(work)  # type: ignore[arg-type]
    app.worker("multi")(work)
    with pytest.raises(DeclarationError, match="two workers are named 'work'"):
        app.worker("multi")(work)


def test_a_single_worker_needs_a_store() -> None:
    app = App("amqp://127.0.0.1/")

    async def work() -> None: ...

    with pytest.raises(StoreRequired, match="a single worker"):
        app.worker()(work)
    app.worker("multi")(work)


# -- what it costs


async def test_a_thousand_cost_little() -> None:
    app = App("memory://", grace=5)

    def declare(number: int) -> None:
        @app.worker("multi", name=f"worker {number}")
        async def rest() -> None:
            await asyncio.sleep(3600)

    for number in range(1000):
        declare(number)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        app.grace = 0.0
        async with app:
            await eventually(lambda: all(one.state == "running" for one in app._life._supervisor.statuses))  # type: ignore[union-attr]
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 1000 < 100_000
