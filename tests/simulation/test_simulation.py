"""The promises of `docs/guarantees.md` under seeded faults; the simulation is `penstock.testing.simulation`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from penstock.brokers.base import Ack
from penstock.delivery import batching, consumer, history, settlement, suspects, verdicts
from penstock.errors import BrokerUnavailable
from penstock.testing.simulation import Violation, simulate

SEEDS = 1200
CHUNK = 100
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
        simulate(seed)


def test_the_same_seed_is_the_same_run() -> None:
    one, other = simulate(7), simulate(7)
    assert (one.steps, one.finished, one.buried) == (other.steps, other.finished, other.buried)


def test_seeds_differ_and_every_kind_of_end_occurs() -> None:
    worlds = [simulate(seed) for seed in range(80)]
    assert {reason for world in worlds for reason in world.buried.values()} == {
        "failed",
        "rejected",
        "invalid",
        "crashed",
    }
    assert any(max(world.finished.values(), default=0) > 1 for world in worlds), "no seed redelivers anything"


def _acknowledges_before_running(real: Any) -> Any:
    async def run(self: Any, messages: Any, settler: Any, task: Any) -> None:
        settler.extend([Ack(message.source) for message in messages])
        await real(self, messages, settler, task)

    return run


def _acknowledges_failures(real: Any) -> Any:
    return lambda self, messages, failure, settler: real(self, messages, None, settler)


def _drops_suspects(real: Any) -> Any:
    return lambda self, delivery, past: Ack(delivery)


def _runs_suspects_in_company(real: Any) -> Any:
    @contextlib.asynccontextmanager
    async def alone(self: Any, patience: float) -> AsyncIterator[bool]:
        yield True

    return alone


def _forgets_what_has_not_started(real: Any) -> Any:
    def give_back(self: Any) -> None:
        self._buffer.clear()
        self._batching.clear()

    return give_back


def _settles_once(real: Any) -> Any:
    async def settle(self: Any, outcomes: Any, patient: bool = True) -> None:
        with contextlib.suppress(BrokerUnavailable):
            await self._subscription.settle(outcomes)

    return settle


def _wakes_nobody(real: Any) -> Any:
    return lambda self, count: self._waiters and self._waiters.popleft()


def _forgets_attempts(real: Any) -> Any:
    return lambda delivery, past, **options: real(delivery, past._replace(failures=0), **options)


def _convicts_at_once(real: Any) -> Any:
    return 1


def _loses_count_of_its_hand(real: Any) -> Any:
    return lambda self, count: None


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (consumer.Consumer, "_run", _acknowledges_before_running),
        (consumer.Consumer, "_conclude", _acknowledges_failures),
        (verdicts.Verdicts, "suspect", _drops_suspects),
        (suspects.Solitude, "alone", _runs_suspects_in_company),
        (consumer.Consumer, "_give_back_unstarted", _forgets_what_has_not_started),
        (settlement.Settler, "_settle", _settles_once),
        (batching.Buffer, "_wake", _wakes_nobody),
        (history, "again", _forgets_attempts),
        (verdicts, "MAX_CRASHES", _convicts_at_once),
        (consumer.Consumer, "_settled", _loses_count_of_its_hand),
    ],
)
def test_a_planted_fault_is_found(
    place: Any, name: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    with pytest.raises(Violation, match=r"replay with: python -m penstock\.testing\.simulation \d+"):
        _simulate_all(range(ENOUGH))


def _simulate_all(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)
