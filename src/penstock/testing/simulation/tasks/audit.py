"""What the store is told, watched change by change: each rule of the ledger that one change can break."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import msgspec

from penstock.stores import records
from penstock.stores.base import Change, Delete, Entry, Put
from penstock.stores.records import RunState
from penstock.tasks import schedule
from penstock.tasks.instants import Every
from penstock.testing.simulation.tasks.plan import QUEUES, TICK

if TYPE_CHECKING:
    from penstock.testing.simulation.process import Life
    from penstock.testing.simulation.tasks.world import TaskWorld

Run = tuple[str, str]
"""Of the task of this id, in this queue."""


class Attempt(msgspec.Struct):
    """One attempt of a run, as it was written down."""

    number: int
    worker: str
    life: Life | None
    delivery: int
    """Of its message it was begun with the first, second … delivery."""
    started: bool = False
    """The function was called for it."""
    unheard: bool = False
    """Whoever began it was not told that it had."""


class Audit:
    """Sees every change of the store, and remembers what the store may forget."""

    def __init__(self, world: TaskWorld) -> None:
        self._world = world
        self.attempts: defaultdict[Run, list[Attempt]] = defaultdict(list)
        self.ended: dict[Run, str] = {}
        self.returned: defaultdict[Run, set[str]] = defaultdict(set)
        """What its function has returned, each time something else."""
        self.since: float | None = None
        """Instants beyond this count."""
        self.skipped: set[float] = set()
        """Instants that were missed by so much that nobody makes up for them."""
        self.holders: dict[str, str] = {}
        """Unique key → the task that has it."""
        self.failures: Counter[Run] = Counter()
        self.revived: set[Run] = set()
        """Runs that had ended, and that somebody has begin again."""

    def saw(self, life: Life | None, change: Change, before: Entry | None) -> None:
        """A change that was made."""
        kind, _, rest = change.key.partition("/")
        if kind == "run" and not isinstance(change, Put):
            self._world.require(not isinstance(change, Delete), f"{change.key} is deleted")
        elif kind == "run" and isinstance(change, Put):
            id, _, queue = rest.partition("/")
            old = RunState("queued") if before is None else records.decode_run(before.value)
            self._run(life, (id, queue), old, records.decode_run(change.value))
        elif kind == "transaction":
            self._world.passages.saw(life, change, before)
        elif kind == "unique":
            self._unique(change)
        elif kind == "schedule" and isinstance(change, Put):
            self._schedule(change, before)

    def _run(self, life: Life | None, run: Run, old: RunState, new: RunState) -> None:
        require, what = self._world.require, f"run {'/'.join(run)}"
        again = new.state == "queued" and old.state in ("failed", "cancelled", "expired")
        if again and life is self._world.operator.life:
            del self.ended[run]
            self.revived.add(run)
            self._world.excused.add(run[0])
        if old.ended and msgspec.structs.replace(new, lasts=old.lasts) == old:
            return  # kept for its transaction's sake
        require(run not in self.ended, f"{what} is changed to {new.state} after it has {self.ended.get(run)}")
        opened = [trial for trial in new.trials if trial.ended_at is None]
        require(len(opened) == (new.state == "running"), f"{what} is {new.state} with {len(opened)} attempts under way")
        if new.started != old.started:
            require(new.started == old.started + 1, f"{what} has attempt {new.started} after {old.started}")
            require(new.trials[-1].worker == str(life), f"{life} begins {what} as {new.trials[-1].worker}")
            self.attempts[run].append(Attempt(new.started, str(life), life, new.delivery))
        self.failures[run] = sum(trial.outcome == "failed" for trial in new.trials)
        if new.ended:
            self._end(life, run, old, new)

    def _end(self, life: Life | None, run: Run, old: RunState, new: RunState) -> None:
        require, what = self._world.require, f"run {'/'.join(run)}"
        self.ended[run] = new.state
        if new.state == "succeeded":
            mine = [trial.worker for trial in new.trials if trial.outcome == "succeeded"]
            require(mine == [str(life)], f"{life} ends {what}, and attempts of {mine} have succeeded")
            number = next(trial.number for trial in new.trials if trial.outcome == "succeeded")
            mine_by, latest = self.attempts[run][number - 1].delivery, self.attempts[run][-1].delivery
            require(mine_by >= latest, f"{what} has succeeded by delivery {mine_by}, and was begun with {latest}")
            value = None if new.result is None else new.result.value(2**20)
            require(value in self.returned[run], f"{what} has the result {value!r}, which nobody has returned")
        if new.state == "expired":
            require(not new.trials, f"{what} expires after it was begun")

    def _unique(self, change: Change) -> None:
        key = change.key.removeprefix("unique/")
        if isinstance(change, Delete):
            self.holders.pop(key, None)
        elif isinstance(change, Put):
            taskid, holder = change.value.decode(), self.holders.get(key)
            alive = holder is not None and holder != taskid and self.is_alive(holder)
            self._world.require(not alive, f"{taskid} takes the unique key {key!r} of {holder}, which has not ended")
            self.holders[key] = taskid

    def _schedule(self, change: Put, before: Entry | None) -> None:
        new = msgspec.json.decode(change.value, type=schedule.State)
        if before is None:
            self.since = new.last
            return
        old, every = msgspec.json.decode(before.value, type=schedule.State), Every(TICK, self._world.plan.every)
        self._world.require(new.last >= old.last, f"the schedule goes back from {old.last} to {new.last}")
        if new.claimed and not old.claimed:
            missed = every.instants(old.last, self._world.clock.time() - schedule.CATCH_UP, 1000)
            self.skipped.update(missed[:-1])

    def is_alive(self, taskid: str) -> bool:
        """Whether a task that was published has not ended."""
        if taskid not in self._world.stored:
            return False
        return any((taskid, queue) not in self.ended for queue in self.queues(taskid))

    def queues(self, taskid: str) -> tuple[str, ...]:
        spec = self._world.plan.specs.get(taskid)
        return QUEUES[TICK if spec is None else spec.topic]

    def unheard(self, life: Life | None, change: Change) -> None:
        """Whoever made this change was not told whether it was: what it wanted to begin, it will not."""
        kind, _, rest = change.key.partition("/")
        id = rest.partition("/")[0] if kind == "run" else rest
        if kind in ("run", "task"):
            for queue in self.queues(id):
                for attempt in self.attempts[id, queue][-1:]:
                    attempt.unheard = attempt.unheard or attempt.life is life

    def calls(self, life: Life | None, run: Run) -> None:
        """A run's function is called."""
        mine = [attempt for attempt in self.attempts[run] if attempt.life is life and not attempt.started]
        self._world.require(bool(mine), f"{life} runs {'/'.join(run)} without having begun it")
        next((attempt for attempt in mine if not attempt.unheard), mine[-1]).started = True
