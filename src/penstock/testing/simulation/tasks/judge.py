"""What must be so at the end of a world of tasks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from penstock.delivery.dead_letters import dead_queue
from penstock.errors import UnknownTask
from penstock.stores import records
from penstock.stores.ledger import RESULT_TTL, Ledger
from penstock.stores.records import RunState
from penstock.tasks import journal, schedule
from penstock.tasks.instants import Every, instant_id
from penstock.tasks.journal import COMPLETE, FINISHED, OPEN
from penstock.tasks.work import UNDOING
from penstock.testing.simulation.tasks.audit import Run
from penstock.testing.simulation.tasks.plan import ALPHA, BETA, TICK

if TYPE_CHECKING:
    from penstock.testing.simulation.tasks.world import TaskWorld

DELAY = 1.5
"""Seconds from the moment at which a run may begin until it does, at most."""
SOON = 3.0  # seconds within which an instant is enqueued when nothing is wrong


class Judge:
    """Says whether the promises about tasks and schedules were kept, once the faults are over."""

    def __init__(self, world: TaskWorld, ledger: Ledger) -> None:
        self._world = world
        self._ledger = ledger

    def runs(self) -> list[Run]:
        """Those that must have ended: of all that came into the broker."""
        audit = self._world.audit
        return [(id, queue) for id in self._world.stored for queue in audit.queues(id)]

    def unended(self) -> list[str]:
        ended = self._world.audit.ended
        return ["/".join(run) for run in self.runs() if run not in ended]

    def schedule_rests(self) -> bool:
        """Whether all that is due is enqueued."""
        (entry,) = self._world.store.get([schedule.key(TICK)])
        if entry is None:
            return False
        state = msgspec.json.decode(entry.value, type=schedule.State)
        return not state.claimed and state.last > self._world.clock.time() - self._world.plan.every - SOON

    async def check(self) -> None:
        buried = {(one.id, one.queue) for one in self._world.contents()}
        for run in self.runs():
            self._check_run(run, (run[0], dead_queue(run[1])) in buried)
        self._check_unsent()
        self._check_instants()
        self._check_limits()
        self._check_waiting()
        await self._check_records()
        self._check_leaks()
        await self._check_transactions()

    def _check_run(self, run: Run, buried: bool) -> None:
        world, require, what = self._world, self._world.require, f"run {'/'.join(run)}"
        state, calls = world.audit.ended[run], world.functions.calls[run]
        spec = world.plan.specs.get(run[0])
        if state == "failed":  # given back by a process that stopped before it had buried it, a message may expire
            excused = (spec is not None and spec.expires is not None) or run in world.passages.suspended
            require(buried or excused, f"{what} has failed, and is not buried")
        elif state != "cancelled" and run not in world.audit.revived:
            require(not buried, f"{what} is in the dead letters and has {state}")
        if state == "expired":
            require(calls == 0, f"{what} has expired and was run {calls} times")
        if state == "succeeded" and run[0] not in world.excused:
            require(len(world.audit.returned[run]) == 1, f"{what} was run to its end more than once for no reason")
        self._check_attempts(run)

    def _check_attempts(self, run: Run) -> None:
        world, require, what = self._world, self._world.require, f"run {'/'.join(run)}"
        attempts = world.audit.attempts[run]
        if world.audit.ended[run] == "cancelled" and not attempts:
            require(world.functions.calls[run] == 0, f"{what} was cancelled in its queue, and run")
        buried = world.audit.ended[run] == "failed"  # who buries it may have to begin it first, more than once
        for attempt in attempts[:-1] if buried else attempts:
            gone = attempt.life is not None and not attempt.life.alive
            require(
                attempt.started or attempt.unheard or gone or (buried and run[0] in world.excused),
                f"{what}: attempt {attempt.number} by {attempt.worker} was written down and never made",
            )
        spec, policy = world.plan.specs.get(run[0]), world.plan.policies[run[1]]
        retries = policy.retries if spec is None or spec.retries is None else spec.retries
        if run[0] not in world.excused:
            failures = world.audit.failures[run]
            retries += UNDOING if run in world.passages.cancelled else 0
            require(failures <= retries + 1, f"{what} has failed {failures} times, with {retries} retries")

    def _check_unsent(self) -> None:
        world = self._world
        for id in world.sent:
            world.require(world.stored[id] > 0, f"{id} was sent, and no message came into the broker")
        for id, holder in world.refusals.items():
            world.require(not world.stored[id], f"{id} was refused because of {holder}, and sent all the same")

    def _check_instants(self) -> None:
        world = self._world
        if world.audit.since is None:
            world.require(False, "the schedule never began")
            return
        every = Every(TICK, world.plan.every)
        known = {instant_id(TICK, one): one for one in every.instants(world.audit.since, world.closed_at, 1000)}
        enqueued = {id: id[id.index(TICK) :] for id in world.stored if id not in world.plan.specs}
        strangers = [id for id, instant in enqueued.items() if instant not in known]
        world.require(not strangers, f"enqueued without being due: {strangers}")
        ids = Counter(enqueued.values())
        for instant, due in known.items():
            count = ids[instant]
            excused = due > world.closed_at - SOON or due in world.audit.skipped
            world.require(count > 0 or excused, f"instant {instant} was never enqueued")
            world.require(count <= 1, f"instant {instant} was enqueued under {count} ids")

    def _check_limits(self) -> None:
        world = self._world
        for name in (ALPHA, BETA):
            rate, begun = world.plan.policies[name].rate_limit, world.functions.begun_at[name]
            if rate is None:
                continue
            for first, last in itertools.combinations(range(len(begun)), 2):
                seconds = begun[last] - begun[first]
                fits = (last - first) * rate.apart <= seconds + DELAY
                world.require(fits, f"{last - first + 1} of {name} begun in {seconds:.3f} s")

    def _check_waiting(self) -> None:
        world = self._world
        for sender in world.senders:
            left = [what for what, task in sender.waiting.items() if not task.done()]
            world.require(not left, f"{sender.name} still waits for {left}")

    async def _check_records(self) -> None:
        """What people are shown is what has happened."""
        world = self._world
        for id in world.stored:
            try:
                record = await self._ledger.record(id)
            except UnknownTask:
                world.require(False, f"nothing is known of {id}, which came into the broker")
            queues = world.audit.queues(id)
            states = {run.task: run.state for run in record.runs}
            world.require(
                states == {queue: world.audit.ended[id, queue] for queue in queues},
                f"the record of {id} says {states}",
            )
            if id in world.told and id not in {id for id, _ in world.audit.revived}:
                world.require(
                    world.told[id] == record.state, f"who waited for {id} heard {world.told[id]}, it is {record.state}"
                )

    async def _check_transactions(self) -> None:
        """Each has come to an end with its run, and to a complete one if that has succeeded."""
        world = self._world
        passages, ended, operator = world.passages, world.audit.ended, world.operator.transactions
        for run in self.runs():
            what, spec = f"the transaction of {'/'.join(run)}", world.plan.specs.get(run[0])
            stored = passages.latest.get(run)
            if stored is None:
                needless = spec is None or spec.steps == 0 or ended[run] != "succeeded" or run in passages.skipped
                world.require(needless, f"{what} is in no record, and its run has succeeded")
                continue
            status, has = stored.status, f"{what} is {stored.status}, and its run has {ended[run]}"
            world.require(status not in OPEN or run in passages.late, has)
            if ended[run] == "succeeded" and run not in passages.skipped:
                world.require(status in COMPLETE, has)
            elif ended[run] == "expired":
                world.require(run in world.audit.revived, has)
            record = await operator.get(passages.id(run))
            world.require(record.status not in OPEN, f"{what} is shown as {record.status}, and its run has ended")
            if record.status in FINISHED or ended[run] == "succeeded" or run in passages.late:
                continue
            for key in (journal.key(passages.id(run)), f"run/{'/'.join(run)}", f"task/{run[0]}"):
                (entry,) = world.store.get([key])
                until = 0.0 if entry is None else entry.expires_at
                kept = until is None or until > world.clock.time() + 100 * RESULT_TTL
                world.require(kept, f"{what} is {record.status}, and {key} is not kept for it")

    def _check_leaks(self) -> None:
        """Nothing is left in the store that nobody will ever remove, or that is in anybody's way."""
        world = self._world
        places = [entry.key for entry in world.store.scan("place/", None, 100, False)]
        world.require(not places, f"places are still taken: {places}")
        for entry in world.store.scan("unique/", None, 100, False):
            holder = entry.value.decode()
            if world.stored[holder]:
                kept = entry.expires_at is None
                world.require(not kept, f"{entry.key} belongs to {holder} for ever, which has ended")
        for entry in world.store.scan("run/", None, 1000, False):
            state: RunState = records.decode_run(entry.value)
            if state.ended:
                world.require(entry.expires_at is not None, f"{entry.key} has {state.state}, and is kept for ever")
        for entry in world.store.scan("task/", None, 1000, False):
            if world.stored[entry.key.removeprefix("task/")]:
                world.require(entry.expires_at is not None, f"{entry.key} has ended, and is kept for ever")
