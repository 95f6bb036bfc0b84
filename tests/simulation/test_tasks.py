"""The promises of `docs/tasks.md`, `docs/schedules.md` and `docs/transactions.md` under seeded faults; the simulation
is `penstock.testing.simulation.tasks`."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from penstock.errors import BrokerUnavailable
from penstock.stores import following
from penstock.stores.base import Put
from penstock.stores.ledger import Ledger
from penstock.stores.records import RunState
from penstock.tasks import journal as journals
from penstock.tasks import limits, schedule, work
from penstock.tasks import transaction as transactions
from penstock.tasks.journal import Kept
from penstock.tasks.passage import Passage
from penstock.testing.simulation import Violation
from penstock.testing.simulation.tasks import simulate_tasks

SEEDS = 500
CHUNK = 50
ENOUGH = 150  # seeds within which a planted fault must be found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of simulated disasters are not worth a log line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_seed_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + CHUNK):
        simulate_tasks(seed)


def test_the_same_seed_is_the_same_run() -> None:
    one, other = simulate_tasks(7), simulate_tasks(7)
    assert (one.steps, one.loop.now, one.audit.ended) == (other.steps, other.loop.now, other.audit.ended)


def test_seeds_differ_and_every_kind_of_end_occurs() -> None:
    worlds = [simulate_tasks(seed) for seed in range(30)]
    assert {state for world in worlds for state in world.audit.ended.values()} == {
        "succeeded",
        "failed",
        "cancelled",
        "expired",
    }
    assert any(world.refusals for world in worlds), "no task is refused for its unique key"
    assert any(len(attempts) > 3 for world in worlds for attempts in world.audit.attempts.values())
    assert any(max(world.functions.calls.values()) > 1 for world in worlds), "no run is tried again"
    assert {stored.status for world in worlds for stored in world.passages.latest.values()} >= {
        "Complete",
        "RecoveryComplete",
        "Suspending",
        "Cancelled",
    }
    assert any(world.audit.revived for world in worlds), "nothing is resumed"


def _records_nothing(real: Any) -> Any:
    async def send(self: Any, taskid: str, sent: Any) -> bool:
        return True

    return send


def _begins_what_has_ended(real: Any) -> Any:
    async def run(self: Any, key: str) -> Any:
        state, version = await real(self, key)
        if state.ended:
            state.state = "queued"
        return state, version

    return run


def _ends_what_another_has(real: Any) -> Any:
    async def end(self: Any, held: Any, *given: Any) -> Any:
        (entry,) = await self.store.get([f"run/{held.taskid}/{held.queue}"])
        held.version = 0 if entry is None else entry.version
        return await real(self, held, *given)

    return end


def _hears_whoever_comes(real: Any) -> Any:
    async def finish(self: Any, held: Any, *given: Any, **named: Any) -> Any:
        held.delivery = 1_000_000
        return await real(self, held, *given, **named)

    return finish


def _takes_any_unique_key(real: Any) -> Any:
    async def reserve(self: Any, key: str, taskid: str, *given: Any) -> None:
        await self._records.apply(Put(key, taskid.encode()))

    return reserve


def _keeps_unique_keys(real: Any) -> Any:
    async def free(self: Any, *given: Any) -> None: ...

    return free


def _gives_up_what_is_not_recorded(real: Any) -> Any:
    async def until_done(self: Any, do: Callable[[], Any]) -> Any:
        with contextlib.suppress(BrokerUnavailable):
            return await do()
        return RunState("queued")

    return until_done


def _hears_of_no_cancel(real: Any) -> Any:
    async def wants_cancel(self: Any, held: Any) -> bool:
        return False

    return wants_cancel


def _tells_nobody_of_burials(real: Any) -> Any:
    async def announce(self: Any, burial: Any) -> bool:
        return True

    return announce


def _always_tries_again(real: Any) -> Any:
    def try_again(self: Any, message: Any, asked: Any, more: int = 0) -> bool:
        message.retry(0.2)
        return True

    return try_again


def _never_tries_again(real: Any) -> Any:
    return lambda self, message, asked, more=0: False


def _lets_anybody_in(real: Any) -> Any:
    @contextlib.asynccontextmanager
    async def slot(self: Any, count: int) -> AsyncIterator[None]:
        yield

    return slot


def _keeps_no_distance(real: Any) -> Any:
    async def turn(self: Any, rate: Any) -> None: ...

    return turn


def _rings_nobody(real: Any) -> Any:
    async def pump(self: Any, watch: Any) -> None: ...

    return pump


def _enqueues_the_latest_only(real: Any) -> Any:
    def due(self: Any, last: float, now: float) -> tuple[list[float], int]:
        instants, skipped = real(self, last, now)
        return instants[-1:], skipped

    return due


def _forgets_what_others_claimed(real: Any) -> Any:
    def read(self: Any, entry: Any) -> Any:
        state = real(self, entry)
        if state is None or not state.claimed or state.by == self._who:
            return state
        return schedule.State(state.definition, state.claimed[-1])

    return read


def _makes_up_ids(real: Any) -> Any:
    count = itertools.count()
    return lambda name, instant: f"{next(count)}.{real(name, instant)}"


def _believes_that_the_dead_began_nothing(real: Any) -> Any:
    return lambda held: held.state.lasts


def _keeps_nothing_for_long(real: Any) -> Any:
    return lambda asked: asked


def _does_again_what_is_recorded(real: Any) -> Any:
    async def step(self: Any, name: str, function: Any, /, *args: Any, **named: Any) -> Any:
        if self._stands.stored.done(name) is not None:
            await function(*args)
        return await real(self, name, function, *args, **named)

    return step


def _lets_the_dead_write(real: Any) -> Any:
    return lambda self, stored: None


def _suspends_nothing(real: Any) -> Any:
    return lambda self, stored, error: False


def _has_one_record_a_task(real: Any) -> Any:
    return lambda taskid, queue, runs: taskid


def _takes_undoing_for_granted(real: Any) -> Any:
    async def undo_step(self: Any, done: Any, undo: Any) -> None:
        await self._change(lambda stored: self._passage.record_undone(stored, done.name))

    return undo_step


def _undoes_the_first_first(real: Any) -> Any:
    async def undo(self: Any) -> None:
        for done in self._stands.stored.steps:
            if not done.undone and done.name in self._undos:
                await self._undo_step(done, self._undos[done.name])
        await self._change(lambda stored: self._passage.end(stored, "Cancelled", None))

    return undo


def _takes_what_it_wrote_for_written(real: Any) -> Any:
    async def written(journal: Any, id: str, alter: Any, known: Any, first: Any) -> Any:
        try:
            return await journal.change(id, alter, known, first)
        except BrokerUnavailable:
            stored = journals._copy(first if known is None else known.stored)
            alter(stored)
            return Kept(id, stored, 1 if known is None else known.version + 1)

    return written


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (Ledger, "send", _records_nothing),
        (Ledger, "_run", _begins_what_has_ended),
        (Ledger, "_end", _ends_what_another_has),
        (Ledger, "finish", _hears_whoever_comes),
        (Ledger, "reserve", _takes_any_unique_key),
        (Ledger, "free", _keeps_unique_keys),
        (Ledger, "wants_cancel", _hears_of_no_cancel),
        (work.Work, "_until_done", _gives_up_what_is_not_recorded),
        (work.Work, "announce", _tells_nobody_of_burials),
        (work.Work, "_try_again", _always_tries_again),
        (limits.Limits, "_slot", _lets_anybody_in),
        (limits.Limits, "_turn", _keeps_no_distance),
        (following.Followers, "_pump", _rings_nobody),
        (schedule._Runner, "_due", _enqueues_the_latest_only),
        (schedule._Runner, "_read", _forgets_what_others_claimed),
        (schedule, "instant_id", _makes_up_ids),
        (work, "_may_have_begun_one", _believes_that_the_dead_began_nothing),
        (work, "_for_long", _keeps_nothing_for_long),
        (transactions.Transaction, "step", _does_again_what_is_recorded),
        (Passage, "_check_ours", _lets_the_dead_write),
        (Passage, "give_up", _suspends_nothing),
        (transactions, "transaction_id", _has_one_record_a_task),
        (transactions, "_written", _takes_what_it_wrote_for_written),
        (transactions.Transaction, "_undo", _undoes_the_first_first),
        (transactions.Transaction, "_undo_step", _takes_undoing_for_granted),
    ],
)
def test_a_planted_fault_is_found(
    place: Any, name: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    with pytest.raises(Violation, match=r"replay with: python -m penstock\.testing\.simulation --tasks \d+"):
        _simulate_all(range(ENOUGH))


def _simulate_all(seeds: range) -> None:
    for seed in seeds:
        simulate_tasks(seed)
