"""Transactions while the processes that they are in are killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from penstock import App, TransactionConflict, UnknownTransaction
from penstock.tasks import journal
from penstock.testing.faults import Processes, wait_until
from tests.faults.scenes import LEASE, ROOT, Scene
from tests.helpers import eventually

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(300)]

STEPS = ("pay", "pack", "ship", "bill")  # as in `transaction_worker`
KILLS = 20
WAYS = re.compile(
    "Processing( Suspending RecoveryProcessing)*( Complete| RecoveryComplete|( Suspending)? Cancelling Cancelled)"
)
AT_ONCE = 3
"""Orders that are under way when a process is killed."""


class Watch:
    """Looks at the records again and again: a result that was seen once is not to become another one."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.seen: dict[tuple[str, str], Any] = {}

    async def look(self) -> list[journal.TransactionRecord]:
        found = list(await self.app.transactions.list(limit=1000))
        for one in found:
            for step in one.steps:
                assert self.seen.setdefault((one.id, step.name), step.result) == step.result, "a result has changed"
        return found


@pytest.fixture
def told(scene: Scene, tmp_path: Path) -> dict[str, str]:
    """What workers are told."""
    return {
        "FAULTS_BROKER": scene.url,
        "FAULTS_STORE": f"sqlite:///{tmp_path / 'store.db'}",
        "FAULTS_LEDGER": str(scene.ledger.path),
        "FAULTS_LEASE": str(LEASE),
        "FAULTS_DEADLY": str(tmp_path / "deadly"),
        "PYTHONPATH": str(ROOT),
    }


async def test_what_was_done_stays_done_and_what_was_undone_too(
    scene: Scene, told: dict[str, str], tmp_path: Path
) -> None:
    """Processes are killed in the midst of transactions, some of which are cancelled meanwhile."""
    ledger = scene.ledger
    app = App(scene.url, store=told["FAULTS_STORE"])
    app.transactions.events = True
    watch = Watch(app)
    ids: list[str] = []
    async with app.client:
        with Processes(["-m", "tests.faults.transaction_worker"], 2, told, tmp_path / "workers.log") as processes:
            await asyncio.to_thread(wait_until, lambda: ledger.count("up") >= 2, "the workers are up", 30)
            for kill in range(1, KILLS + 1):
                new = [str(await app.send("order")) for _ in range(AT_ONCE)]
                ids += new
                steps = ledger.count("started") + random.randint(1, len(STEPS))
                await eventually(lambda goal=steps: ledger.count("started") >= goal, f"steps before kill {kill}", 60)  # type: ignore[misc]
                if kill % 2:
                    with contextlib.suppress(TransactionConflict, UnknownTransaction):
                        await app.transactions.cancel(random.choice(new))
                await asyncio.sleep(random.uniform(0, 0.05))
                await asyncio.to_thread(processes.kill, random.choice(processes.running))
                await watch.look()
                processes.start()
            await eventually(lambda: _all_ended(app, watch, ids), "all have come to their end", 120)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(journal, "LEFT", 0.0)
                await app.transactions.tell_left()
            records = {one.id: one for one in await watch.look()}
            await eventually(lambda: _told(ledger, records), "every event was heard", 60)
            runs = {id: (await app.waitfor(id, 20)).runs[0] for id in ids}
    done, undone = _done(ledger), _undone(ledger)
    assert set(records) == set(ids)
    assert {one.status for one in records.values()} >= {"Complete", "Cancelled"}
    for id, record in records.items():
        recorded = [step.result for step in record.steps]
        if record.status == "Cancelled":
            assert runs[id].state == "cancelled"
            assert all(step.undone for step in record.steps)
            backwards = [(step.name, step.result) for step in reversed(record.steps)]
            assert [one for one, _ in itertools.groupby(undone[id])] == backwards, "each is undone, the latest first"
        else:
            assert runs[id].result == recorded
            assert not undone[id]
            assert [step.name for step in record.steps] == list(STEPS), "no step is left out"
        for step, before, result in zip(STEPS, ["-", *recorded], recorded, strict=False):
            assert (before, result) in done[id, step], "what is recorded was done, with what is recorded before it"
            assert {one for one, _ in done[id, step]} == {before}, "nothing that is recorded is done otherwise again"
    assert sum(len(run.attempts) > 1 for run in runs.values()) >= KILLS / 5, "they were killed in the midst of it"
    again = sum(len(times) - 1 for times in done.values())
    assert again <= KILLS * 4  # at most what the killed ones had under way


@pytest.mark.parametrize("scene", ["lite"], indirect=True)
async def test_one_that_kills_its_process_is_suspended_and_can_be_resumed(
    scene: Scene, tmp_path: Path, told: dict[str, str]
) -> None:
    """Nobody is left who could say so, but whoever gives its message up."""
    (tmp_path / "deadly").touch()
    app = App(scene.url, store=told["FAULTS_STORE"])
    async with app.client:
        with Processes(["-m", "tests.faults.transaction_worker"], 1, told, tmp_path / "workers.log") as processes:
            await asyncio.to_thread(wait_until, lambda: scene.ledger.count("up") >= 1, "the worker is up", 30)
            id = str(await app.send("deadly"))

            async def suspended() -> bool:
                await asyncio.to_thread(processes.replace_dead)
                return [one.status for one in await app.transactions.list()] == ["Suspending"]

            await eventually(suspended, "it is given up", 60)
            record = await app.transactions.get(id)
            assert "its consumer was lost" in str(record.error)
            assert [step.name for step in record.steps] == ["pay"]
            (tmp_path / "deadly").unlink()
            await app.transactions.resume(id)
            await app.waitfor(id, 30)
            assert (await app.transactions.get(id)).status == "RecoveryComplete"
    assert scene.ledger.times("paid") == {id: 1}


@pytest.mark.parametrize("scene", ["lite"], indirect=True)
async def test_one_that_a_killed_process_has_left_ends_with_the_run_of_another(
    scene: Scene, tmp_path: Path, told: dict[str, str]
) -> None:
    """The other one raises before it comes to the transaction, and is not tried again."""
    (tmp_path / "deadly").touch()
    app = App(scene.url, store=told["FAULTS_STORE"])
    async with app.client:
        with Processes(["-m", "tests.faults.fickle_worker"], 1, told, tmp_path / "workers.log") as processes:
            await asyncio.to_thread(wait_until, lambda: scene.ledger.count("up") >= 1, "the worker is up", 30)
            id = str(await app.send("fickle"))

            async def has_failed() -> bool:
                await asyncio.to_thread(processes.replace_dead)
                return (await app.client._record(id)).state == "failed"

            await eventually(has_failed, "its second attempt fails", 60)
            (kept,) = [one async for one in journal.Journal((await app.client._get_ledger()).store).latest()]
    assert (kept.stored.status, kept.stored.error) == ("Suspending", "KeyError: 'settings'")
    assert [step.name for step in kept.stored.steps] == ["pay"]
    assert scene.ledger.times("paid") == {id: 1}


def _undone(ledger: Any) -> dict[str, list[tuple[str, str]]]:
    """What was undone of each, in the order of time."""
    undone: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in ledger.entries():
        if entry.event == "undone":
            taskid, step, result = entry.id.split()
            undone[taskid].append((step, result))
    return undone


def _done(ledger: Any) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Each time that a step was done: what came before it, and its result."""
    done: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for entry in ledger.entries():
        if entry.event == "finished":
            taskid, step, before, result = entry.id.split()
            done[taskid, step].append((before, result))
    return done


async def _all_ended(app: App, watch: Watch, ids: list[str]) -> bool:
    """Those that have killed three processes, as far as anybody knows, were suspended: they are resumed."""
    found = {one.id: one for one in await watch.look()}
    for id, record in found.items():
        with contextlib.suppress(TransactionConflict):
            if record.wish == "cancel" or record.status == "Cancelling":
                await app.transactions.cancel(id)
            elif record.status == "Suspending":
                await app.transactions.resume(id)
    return set(found) >= set(ids) and {one.status for one in found.values()} <= journal.FINISHED


def _told(ledger: Any, records: dict[str, journal.TransactionRecord]) -> bool:
    """Whether each transaction's events were all heard."""
    heard: dict[str, dict[int, str]] = defaultdict(dict)
    for entry in ledger.entries():
        if entry.event == "event":
            taskid, id, status = entry.id.split()
            number = int(taskid.rpartition(".")[2])
            assert heard[id].setdefault(number, status) == status, "an event's id is that of no other"
    for id, record in records.items():
        statuses = [heard[id][number] for number in sorted(heard[id])]
        if not statuses or statuses[-1] != record.status or sorted(heard[id]) != list(range(1, len(statuses) + 1)):
            return False
        assert WAYS.fullmatch(" ".join(statuses)), statuses
    return True
