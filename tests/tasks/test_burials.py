"""A task's message that is given up: its run has failed, whoever has had it in hand before."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from penstock import terms
from penstock.brokers.base import Move
from penstock.brokers.memory import MemoryBroker, MemoryServer
from penstock.delivery import history
from penstock.delivery.settlement import Burial
from penstock.delivery.stopping import Abandoned, LoopRunner
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.message import Delivery, Message
from penstock.stores.ledger import RESULT_TTL, Ledger
from penstock.stores.memory import MemoryStore, MemoryStoreServer
from penstock.stores.records import Body, Sent
from penstock.tasks.definition import TaskFunction, TaskPolicy
from penstock.tasks.journal import Journal, Stored
from penstock.tasks.signature import Bound
from penstock.tasks.work import Work
from penstock.terms import Terms

ASKED = Terms(recorded=True)


def no_client() -> Any:
    raise AssertionError("nothing is sent here")


def stuck(name: str) -> None:
    raise AssertionError(f"{name} is stuck")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(MemoryStore(server=MemoryStoreServer()), worker="here")


@pytest.fixture
def work(ledger: Ledger) -> Work:
    """Of a task that fails, and is not tried again."""

    async def fails(request: Any) -> None:
        raise ValueError("it failed")

    task: TaskFunction[Any, Any] = TaskFunction(fails, "work", (), TaskPolicy(), no_client)
    runner, around = LoopRunner(fails, Abandoned(0, stuck)), Surroundings(solitude=Solitude())
    return Work(task, runner, MemoryBroker(server=MemoryServer()), ledger, None, around)


def delivery(past: history.History) -> Delivery:
    headers = {terms.HEADER: terms.write(ASKED), history.HEADER: str(past)}
    return Delivery("work", "id", "work", b"1", headers, None, 0, time.time(), None, 0, 1)


async def fail(work: Work) -> None:
    """The first delivery, which has the run fail."""
    message = Message(delivery(history.NEW), Bound(1, (1,), {}), 1, "work")
    with pytest.raises(ValueError, match="it failed"):
        await work.handle(message)


def burial(of: Delivery, reason: str) -> Burial:
    return Burial(of, reason, "its consumer was lost", Move(of, "work.dead", of.outgoing()))


async def test_what_an_earlier_delivery_has_left_is_not_taken_for_its_own(ledger: Ledger, work: Work) -> None:
    """The run fails here, its message is lost before it is buried, another process begins the run again and dies of
    it, and here the message is given up.
    """
    await ledger.send("id", Sent("work", Body(b"1", {terms.HEADER: terms.write(ASKED)}), time.time(), None, ["work"]))
    await fail(work)
    await ledger.begin("id", "work", ASKED, 3)
    assert await work.announce(burial(delivery(history.History(0, 3, 3)), "crashed"))
    run = (await ledger.look("id")).runs["work"]
    assert (run.state, None if run.error is None else run.error.message) == ("failed", "its consumer was lost")


async def test_a_transaction_in_a_run_that_was_cancelled_ends_with_its_message(ledger: Ledger, work: Work) -> None:
    """Its process was killed, its task cancelled, and all who have had its message since have died over it."""
    await ledger.send("id", Sent("work", Body(b"1", {terms.HEADER: terms.write(ASKED)}), time.time(), None, ["work"]))
    held = await ledger.begin("id", "work", ASKED, 1)
    journal = Journal(ledger.store)
    await journal.change(
        "id", lambda stored: True, None, Stored("work", "work", 1.0, 60.0, held.state.started, turns=1)
    )
    assert await ledger.cancel("id")
    assert (await ledger.begin("id", "work", ASKED, 2)).state.state == "cancelled"
    assert not await work.announce(burial(delivery(history.History(0, 3, 3)), "crashed"))
    assert (await journal.get("id")).stored.status == "Suspending"
    for entry in await ledger.store.get(["task/id", "run/id/work"]):
        assert entry is not None
        assert entry.expires_at is None or entry.expires_at > time.time() + 100 * RESULT_TTL, entry.key


async def test_what_has_failed_here_is_buried_with_its_own_error(ledger: Ledger, work: Work) -> None:
    await ledger.send("id", Sent("work", Body(b"1", {terms.HEADER: terms.write(ASKED)}), time.time(), None, ["work"]))
    await fail(work)
    failed = msgspec.structs.replace(burial(delivery(history.NEW), "failed"), error=ValueError("it failed"))
    assert await work.announce(failed)
    run = (await ledger.look("id")).runs["work"]
    assert (run.state, [trial.outcome for trial in run.trials]) == ("failed", ["failed"])
