"""The transactions in the simulated tasks: what their steps do and undo, and what is written down of it."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from penstock.errors import TransactionCancelled, Unavailable
from penstock.stores.base import Change, Delete, Entry, Put
from penstock.tasks import journal
from penstock.tasks.journal import FINISHED, OPEN, Status, Stored, transaction_id
from penstock.tasks.transaction import transaction
from penstock.testing.simulation.tasks.audit import Run

if TYPE_CHECKING:
    from penstock.testing.simulation.process import Life
    from penstock.testing.simulation.tasks.functions import Running
    from penstock.testing.simulation.tasks.world import TaskWorld

FOLLOWS: dict[Status, set[Status]] = {
    "Processing": {"Complete", "Suspending", "Cancelling", "Aborted"},
    "RecoveryProcessing": {"RecoveryComplete", "Suspending", "Cancelling", "Aborted"},
    "Suspending": {"RecoveryProcessing", "Cancelling"},
    "Cancelling": {"Cancelled", "Aborted"},
    "Aborted": {"Cancelling"},
}
"""What may become of a status."""


class Passages:
    """Walks through transactions, and sees every change of their records."""

    def __init__(self, world: TaskWorld) -> None:
        self._world = world
        self._values = 0
        self.done: defaultdict[tuple[Run, str], set[str]] = defaultdict(set)
        """What a step has returned, each time something else."""
        self.undone: Counter[tuple[Run, str]] = Counter()
        self.latest: dict[Run, Stored] = {}
        """How the transaction in a run was written down last."""
        self.skipped: set[Run] = set()
        """These have come to their end without it at least once."""
        self.suspended: set[Run] = set()
        """Somebody has suspended it at least once."""
        self.cancelled: set[Run] = set()
        """Somebody has cancelled it at least once, or it has itself."""
        self.late: set[Run] = set()
        """It was under way when its run had ended: by one that had lost its message to another."""

    # -- in a task

    async def walk(self, running: Running, count: int) -> None:
        """A transaction of so many steps."""
        world, run = self._world, (running.id, running.task)
        if world.happens("block skipped"):
            self.skipped.add(run)
            return
        async with transaction() as t:
            world.require(t.id == self.id(run), f"the transaction of {'/'.join(run)} is {t.id}")
            before = "-"
            for number in range(count):
                name = f"step {number}"
                undo = functools.partial(self._undo, running, name)
                value = await t.step(name, self._do, running, name, before, undo=undo)
                recorded = self.latest[run].done(name)
                world.require(recorded is not None, f"{name} of {t.id} has returned, and is not recorded")
                before = value
            if world.happens("gives up"):
                raise TransactionCancelled("it is not worth it")

    async def _do(self, running: Running, name: str, before: str) -> str:
        world, run = self._world, (running.id, running.task)
        stored = self.latest[run]
        if running.id not in world.excused:  # else another one may be ahead of it
            world.require(stored.done(name) is None, f"{name} of {self.id(run)} is done again, and was recorded")
        if before != "-":
            found = [one for one in stored.steps if one.result.value(2**20) == before]
            world.require(bool(found), f"{name} of {self.id(run)} comes after {before!r}, which is not recorded")
        await self._befall(running, name)
        self._values += 1
        value = f"{running.id} {running.task} {name} {self._values}"
        self.done[run, name].add(value)
        await asyncio.sleep(world.rng.choice([0.0, 0.01]))
        return value

    async def _befall(self, running: Running, name: str) -> None:
        world = self._world
        spec = world.plan.specs[running.id]
        await asyncio.sleep(world.rng.choice([0.0, 0.01, 0.3, 1.0]))
        if spec.kind == "poison" and name == "step 1":
            running.life.process.crash()
            await asyncio.sleep(0)
        if world.happens("task error"):
            raise ValueError("the step failed")
        if world.happens("outage"):
            raise Unavailable("what the step needs is away")

    async def _undo(self, running: Running, name: str, value: str) -> None:
        world, run = self._world, (running.id, running.task)
        stored, what = self.latest[run], f"{name} of {self.id(run)}"
        done = stored.done(name)
        recorded = None if done is None else done.result.value(2**20)
        world.require(recorded == value, f"{what} is undone with {value!r}, and {recorded!r} is recorded")
        if running.id not in world.excused:
            world.require(stored.status == "Cancelling", f"{what} is undone, and it is {stored.status}")
            world.require(done is not None and not done.undone, f"{what} is undone again, and was recorded")
            self._check_order(stored, name, what)
        await self._befall(running, "")
        self.undone[run, name] += 1
        await asyncio.sleep(world.rng.choice([0.0, 0.01]))

    # -- in the store

    def saw(self, life: Life | None, change: Change, before: Entry | None) -> None:
        """A change of a record that was made."""
        if not isinstance(change, Put):
            self._world.require(not isinstance(change, Delete), f"{change.key} is deleted")
            return
        new = journal._decode(change.value)
        run = (new.taskid or change.key.removeprefix(journal.key("")), new.queue)
        require, what = self._world.require, f"the transaction of {'/'.join(run)}"
        require(change.key == journal.key(self.id(run)), f"{what} is at {change.key}")
        old = self.latest.get(run)
        require((before is None) == (old is None), f"{what} was forgotten")
        if old is None:
            require(new.status == "Processing" and not new.steps, f"{what} begins as {new.status}")
        elif new.status != old.status:
            require(new.status in FOLLOWS.get(old.status, ()), f"{what} was {old.status}, and is {new.status}")
        if old is not None:
            require(new.run >= old.run, f"{what} goes back from attempt {old.run} to {new.run}")
            self._check_steps(run, old, new, what)
            if (old.steps, old.step) != (new.steps, new.step):
                entered = self._world.audit.attempts[run][new.run - 1].life
                require(life is entered, f"{what} is gone on with by {life}, and {entered} has entered it since")
        if new.status in FINISHED - {"Cancelled"}:
            wanted = [f"step {number}" for number in range(self._world.plan.specs[run[0]].steps)]
            done = [one.name for one in new.steps if not one.undone]
            require(done == wanted, f"{what} is {new.status}, and only {done} is done")
        if new.status == "Cancelled":
            require(all(one.undone for one in new.steps), f"{what} is cancelled, and not all of it is undone")
        if new.wish == "suspend":
            self.suspended.add(run)
        if new.wish == "cancel" or new.status == "Cancelling":
            self.cancelled.add(run)
        if new.status in OPEN and run in self._world.audit.ended:
            self.late.add(run)
        self.latest[run] = new

    def _check_steps(self, run: Run, old: Stored, new: Stored, what: str) -> None:
        """What is recorded stays so, and what is new of it was done; undone is the latest first."""
        require = self._world.require
        for before, after in zip(old.steps, new.steps, strict=False):
            same = (before.name, before.result) == (after.name, after.result)
            require(same, f"{what}: {before.name} was recorded, and has changed")
            require(after.undone or not before.undone, f"{what}: {before.name} was undone, and is not any more")
            if after.undone and not before.undone:
                require(self.undone[run, after.name] > 0, f"{what}: {after.name} is recorded as undone, and was not")
                require(new.status == "Cancelling", f"{what}: {after.name} is undone while it is {new.status}")
                self._check_order(new, after.name, what)
        require(len(new.steps) >= len(old.steps), f"{what}: a step was forgotten")
        for after in new.steps[len(old.steps) :]:
            known = self.done[run, after.name]
            require(after.result.value(2**20) in known, f"{what}: {after.name} is recorded, and was not done so")
            require(old.done(after.name) is None, f"{what}: {after.name} is recorded twice")

    def _check_order(self, stored: Stored, name: str, what: str) -> None:
        names = [one.name for one in stored.steps]
        later = stored.steps[names.index(name) + 1 :]
        self._world.require(all(one.undone for one in later), f"{what} is undone before what was done after it")

    def id(self, run: Run) -> str:
        """Of the transaction in a run."""
        return transaction_id(run[0], run[1], len(self._world.audit.queues(run[0])))
