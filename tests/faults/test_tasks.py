"""Tasks and calls while workers, callers and the server itself are killed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from penstock import App, BrokerUnavailable, Client, PenstockError, RemoteError, SyncClient, TimeoutError
from penstock.testing.faults import Processes, wait_until
from tests.faults.scenes import LEASE, ROOT, RabbitScene, Scene
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(300)]

TASKS = 400
KILLS = 10
INSTANTS = 1000
EVERY = 0.02  # seconds


class Workers:
    """Workers of a scene, and a client that shares their store."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.store = f"sqlite:///{folder / 'store.db'}"
        self._log = folder / "workers.log"

    def start(self, count: int, **environment: str) -> Processes:
        told = {
            "FAULTS_BROKER": self.scene.url,
            "FAULTS_STORE": self.store,
            "FAULTS_LEDGER": str(self.scene.ledger.path),
            "FAULTS_LEASE": str(LEASE),
            "PYTHONPATH": str(ROOT),
        }
        return Processes(["-m", "tests.faults.task_worker"], count, {**told, **environment}, self._log)

    def wait_until_up(self, count: int = 1) -> None:
        wait_until(lambda: self.scene.ledger.count("up") >= count, "the workers are up", 30)

    @property
    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def workers(scene: Scene, tmp_path: Path) -> Workers:
    return Workers(scene, tmp_path)


@pytest.fixture
def rabbit_workers(rabbit: RabbitScene, tmp_path: Path) -> Workers:
    return Workers(rabbit, tmp_path)


def test_killed_workers_lose_no_task(workers: Workers) -> None:
    ledger = workers.scene.ledger
    with workers.start(4) as processes, SyncClient(workers.scene.url, store=workers.store) as client:
        workers.wait_until_up(4)
        wait_until(lambda: _sent(client), "the task's queue is there", 20)
        handles = [client.send("work", n) for n in range(TASKS)]
        for round in range(1, KILLS + 1):
            wait_until(lambda goal=round * TASKS // (KILLS + 2): ledger.count("finished") >= goal, "some ran", 60)  # type: ignore[misc]
            processes.kill(random.choice(processes.running))
            processes.start()
        results = [handle.result(60) for handle in handles]
        records = [handle.record() for handle in handles]
    assert results == list(range(TASKS))
    assert {record.state for record in records} == {"succeeded"}
    finished = ledger.times("finished")
    assert all(finished[str(handle)] >= 1 for handle in handles)
    again = {entry.id for entry in ledger.entries() if entry.event == "started" and entry.attempt > 1}
    begun = ledger.times("started")
    assert {taskid for taskid, times in begun.items() if times > 1} <= again
    lost = [attempt for record in records for attempt in record.runs[0].attempts if attempt.outcome == "lost"]
    assert len(lost) <= KILLS * 4  # at most what the killed ones had in hand


def _sent(client: SyncClient) -> bool:
    try:
        client.send("work", "first")
    except PenstockError:
        return False
    return True


def test_stuck_runs_are_stopped_and_the_next_task_is_served(workers: Workers) -> None:
    with workers.start(1) as processes, SyncClient(workers.scene.url, store=workers.store) as client:
        workers.wait_until_up()
        (process,) = processes.running
        for name in ("spin", "sits_in_c", "swallows"):
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    client.send(name, "hang").result(30)
        assert client.call("echo", 1, timeout=20) == 1
        with pytest.raises(TimeoutError):
            client.call("sits_in_c_alone", "hang", timeout=20)
        assert client.call("sits_in_c_alone", 2, timeout=20) == 2
        # Four are stuck. With one more the process drains and becomes another one.
        with pytest.raises(TimeoutError):
            client.send("sits_in_c", "hang").result(30)
        wait_until(lambda: workers.scene.ledger.count("up") == 2, "the process has started again", 60)
        assert client.call("echo", 3, timeout=30) == 3
        assert process.poll() is None
        assert {entry.pid for entry in workers.scene.ledger.entries() if entry.event == "up"} == {process.pid}
    assert "starting again" in workers.log


def test_each_of_a_thousand_instants_is_enqueued_and_run_once(workers: Workers) -> None:
    ledger = workers.scene.ledger
    with workers.start(3, FAULTS_TICK=str(EVERY)) as processes:
        workers.wait_until_up(3)
        wait_until(lambda: ledger.count("ticked") >= INSTANTS, "so many instants have passed", 120, pause=0.5)
        for process in tuple(processes.running):
            processes.send(process, 15)
    ticked = Counter(entry.id for entry in ledger.entries() if entry.event == "ticked")
    assert set(ticked.values()) == {1}
    assert len({entry.pid for entry in ledger.entries() if entry.event == "ticked"}) > 1
    moments = sorted(taskid.rpartition("@")[2] for taskid in ticked)
    assert len(moments) >= INSTANTS
    numbers = sorted(round(_seconds(moment) / EVERY) for moment in moments)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # none left out


def _seconds(moment: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(moment).timestamp()


# -- calls


async def test_calls_settle_in_time_whatever_becomes_of_workers(workers: Workers) -> None:
    """Killed workers: each call is answered by another, or ends at its deadline."""
    late: list[float] = []
    timeout = 8.0

    async def call(client: Client, n: int) -> bool:
        start = time.monotonic()
        try:
            return bool(await client.call("echo", n, timeout=timeout) == n)
        except TimeoutError:
            return False
        finally:
            late.append(time.monotonic() - start - timeout)

    with workers.start(3) as processes:
        await asyncio.to_thread(workers.wait_until_up, 3)
        async with Client(workers.scene.url) as client:
            answered = 0
            for _ in range(5):
                calls = [asyncio.create_task(call(client, n)) for n in range(40)]
                await asyncio.sleep(0.1)
                await asyncio.to_thread(processes.kill, processes.running[0])
                processes.start()
                answered += sum(await asyncio.gather(*calls))
            assert answered > 0
            assert max(late) <= 1.0
            assert client._calls is not None
            assert all(not one._pending for one in client._calls.values())
        await _nothing_left()


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_calls_settle_in_time_whatever_becomes_of_the_server(rabbit_workers: Workers, how: str) -> None:
    workers, timeout = rabbit_workers, 6.0
    scene = workers.scene
    assert isinstance(scene, RabbitScene)
    late: list[float] = []
    outcomes: Counter[str] = Counter()

    async def call(client: Client, n: int) -> None:
        start = time.monotonic()
        try:
            assert await client.call("echo", n, timeout=timeout) == n
            outcomes["answered"] += 1
        except (TimeoutError, BrokerUnavailable, RemoteError) as error:
            outcomes[type(error).__name__] += 1
        finally:
            late.append(time.monotonic() - start - timeout)

    with workers.start(2):
        await asyncio.to_thread(workers.wait_until_up, 2)
        async with Client(scene.url) as client:
            assert await client.call("echo", 1, timeout=20) == 1
            calls = [asyncio.create_task(call(client, n)) for n in range(100)]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(getattr(scene.node, how))
            during = [asyncio.create_task(call(client, n)) for n in range(20)]
            await asyncio.gather(*calls, *during)
            await asyncio.to_thread(scene.node.start)
            assert outcomes.total() == 120
            assert max(late) <= 1.0

            async def served() -> bool:
                try:
                    return bool(await client.call("echo", 2, timeout=5) == 2)
                except PenstockError:
                    return False

            await eventually(served, within=40)
            assert client._calls is not None
            assert all(not one._pending for one in client._calls.values())
        await _nothing_left()


async def test_a_caller_that_goes_leaves_the_workers_alone(workers: Workers) -> None:
    with workers.start(1) as processes:
        await asyncio.to_thread(workers.wait_until_up, 1)
        async with Client(workers.scene.url) as leaving:
            await leaving.call("echo", 0, timeout=20)
            calls = [asyncio.create_task(leaving.call("echo", n, timeout=5)) for n in range(50)]
            await asyncio.sleep(0.05)
        gone = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(one, BrokerUnavailable) for one in gone)
        async with Client(workers.scene.url) as client:
            assert await client.call("echo", 1, timeout=20) == 1
        assert processes.running[0].poll() is None
    await _nothing_left()


async def _nothing_left() -> None:
    """No task of a closed client goes on."""

    def left() -> list[str]:
        return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("penstock")]

    await eventually(lambda: not left(), f"nothing goes on: {left()}")


async def test_an_app_that_is_used_in_a_process_says_that_it_is_worn_out() -> None:
    """Embedded, the process is not ours to start again."""
    app = App("memory://")

    @app.task(timeout=0.05)
    async def swallows(n: int) -> None:
        until = time.monotonic() + 4
        while time.monotonic() < until:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue

    async with app:
        life = app._life
        assert life is not None
        life._abandoned._most = 0
        with pytest.raises(TimeoutError):
            await swallows.call(1)
        async with asyncio.timeout(10):
            await life.worn_out.wait()
        await eventually(lambda: life._abandoned.count == 0)
