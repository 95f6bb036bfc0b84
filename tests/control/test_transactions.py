"""What operators want of transactions is done, and what does not go with how they stand is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock import (
    App,
    Handle,
    RemoteError,
    TaskCancelled,
    TransactionCancelled,
    TransactionConflict,
    Unavailable,
    UnknownTransaction,
    transaction,
)
from penstock.control import tasks, transactions
from penstock.stores.base import Delete, Put
from penstock.tasks import journal as journals
from penstock.tasks.journal import STATUSES, Journal, Stored, TransactionRecord
from penstock.tasks.work import Work
from tests.helpers import dead_letters, eventually
from tests.tasks.shop import SOON, Shop, ended, order, stands


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(f"sqlite:///{tmp_path / 'one.db'}", lease=1.0, grace=5.0)


@pytest.fixture
async def running(app: App, shop: Shop) -> AsyncIterator[App]:
    """With the task `order`."""
    order(app, shop, retries=5, backoff=SOON)
    async with app:
        yield app


async def under_way(app: App, shop: Shop, step: str = "pack") -> str:
    """An order that is in the midst of a step."""
    shop.hold(step)
    id = await app.send("order")
    await shop.reached.wait()
    return str(id)


async def suspended(app: App, shop: Shop) -> str:
    """An order that was suspended after it was packed."""
    id = await under_way(app, shop)
    await app.transactions.suspend(id)
    shop.let_go()
    await stands(app, id, "Suspending")
    return id


async def failed(app: App, shop: Shop, *, at: str = "ship") -> str:
    """An order that failed, and is not tried again by itself."""
    shop.failing.add(at)
    id = await app.client.send("order", retries=0)
    await ended(app, id)
    shop.failing.clear()
    return str(id)


# -- suspending and resuming


async def test_a_suspended_one_stops_before_the_next_step_and_is_not_tried_again(running: App, shop: Shop) -> None:
    id = await under_way(running, shop)
    asked = await running.transactions.suspend(id)
    assert (asked.status, asked.wish) == ("Processing", "suspend")
    shop.let_go()
    record = await ended(running, id)
    (run,) = record.runs
    assert (run.state, run.error.type, len(run.attempts)) == ("failed", "TransactionSuspended", 1)
    stood = await running.transactions.get(id)
    assert (stood.status, [one.name for one in stood.steps]) == ("Suspending", ["pay", "pack"])
    assert shop.did == ["pay", "pack"]
    assert await dead_letters(running, "order") == []


async def test_a_suspended_one_that_is_stopped_at_its_limit_is_not_tried_again(app: App, shop: Shop) -> None:
    order(app, shop, timeout=0.5, retries=3, backoff=SOON)
    async with app:
        id = await under_way(app, shop)
        await app.transactions.suspend(id)
        (run,) = (await ended(app, id)).runs
        assert (run.state, len(run.attempts)) == ("failed", 1)
        stood = await app.transactions.get(id)
        assert (stood.status, stood.wish) == ("Suspending", "suspend")
        assert await dead_letters(app, "order") == []
        shop.let_go()
        await app.transactions.resume(id)
        await stands(app, id, "RecoveryComplete")


async def test_a_cancelled_one_that_is_stopped_at_its_limit_is_undone_all_the_same(app: App, shop: Shop) -> None:
    order(app, shop, timeout=0.5)  # no retries
    async with app:
        id = await under_way(app, shop)
        assert (await app.transactions.cancel(id)).wish == "cancel"
        await stands(app, id, "Cancelled")
        assert (await ended(app, id)).state == "cancelled"
    assert shop.did == ["pay", "pack", "unpay"]


async def test_one_that_nobody_can_undo_in_time_is_given_up(app: App, shop: Shop) -> None:
    tries: list[int] = []

    async def undo(result: Any) -> None:
        tries.append(1)
        await asyncio.Event().wait()

    @app.task("order", timeout=0.2, backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("pay", shop.do, "pay", undo=undo)
            await t.step("pack", shop.do, "pack")

    async with app:
        id = await under_way(app, shop)
        await app.transactions.cancel(id)
        record = await ended(app, id)
        assert (record.state, len(record.runs[0].attempts)) == ("failed", 4)
        stood = await app.transactions.get(id)
        assert stood.status == "Cancelling"
        with pytest.raises(TransactionConflict, match="Cancelling"):
            await app.transactions.resume(id)


async def test_what_cannot_be_suspended_since_it_is_to_be_cancelled_says_so(running: App, shop: Shop) -> None:
    id = await under_way(running, shop)
    await running.transactions.cancel(id)
    with pytest.raises(TransactionConflict, match="about to be cancelled"):
        await running.transactions.suspend(id)
    shop.let_go()
    await ended(running, id)


async def test_one_whose_cancelling_was_cut_short_says_why_it_cannot_be_resumed(running: App, shop: Shop) -> None:
    id = await failed(running, shop)
    ledger = await running.client._get_ledger()

    def wish(stored: Stored) -> bool:
        stored.wish = "cancel"
        return True

    await Journal(ledger.store).change(id, wish)
    with pytest.raises(TransactionConflict, match="about to be cancelled"):
        await running.transactions.resume(id)
    await running.transactions.cancel(id)
    await stands(running, id, "Cancelled")


async def test_a_suspended_one_whose_message_comes_again_leaves_no_dead_letter(
    running: App, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process died after it had written the end of its run."""
    finish = Work._finish
    died: list[int] = []

    async def die(self: Work, *given: Any, **named: Any) -> Any:
        run = await finish(self, *given, **named)
        if not died:
            died.append(1)
            raise Unavailable("gone")
        return run

    monkeypatch.setattr(Work, "_finish", die)
    id = await under_way(running, shop)
    await running.transactions.suspend(id)
    shop.let_go()
    await ended(running, id)
    admin = (await running.client._get_broker()).admin
    assert admin is not None

    async def empty() -> bool:
        (queue,) = [one for one in await admin.inspect() if one.name == "order"]
        return queue.ready == queue.unsettled == 0

    await eventually(lambda: died)
    await eventually(empty)
    assert await dead_letters(running, "order") == []


async def test_a_resumed_one_goes_on_where_it_was(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    resumed = await running.transactions.resume(id)  # at once: its run may be on its way out
    assert resumed.wish is None
    record = await stands(running, id, "RecoveryComplete")
    assert (record.error, record.wish) == (None, None)
    assert shop.did == ["pay", "pack", "ship"]
    assert (await ended(running, id)).state == "succeeded"


async def test_to_retry_the_task_is_to_resume(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    await ended(running, id)
    ledger = await running.client._get_ledger()
    await tasks.retry(ledger, await running.client._get_broker(), id)
    await stands(running, id, "RecoveryComplete")


async def test_a_suspended_one_whose_process_dies_then_stays_suspended(running: App, shop: Shop) -> None:
    """Its message comes again: nobody has wanted it to go on."""
    running.grace = 0.1
    id = await under_way(running, shop)
    await running.transactions.suspend(id)
    ledger = await running.client._get_ledger()
    finish, died = ledger.finish, asyncio.Event()

    async def die(*given: Any, **named: Any) -> Any:
        died.set()
        await asyncio.Event().wait()

    ledger.finish = die  # type: ignore[method-assign]
    shop.let_go()
    await died.wait()
    await running.__aexit__(None, None, None)  # it is released unfinished
    ledger.finish = finish  # type: ignore[method-assign]
    async with running:
        record = await ended(running, id)
        assert record.runs[0].error.type == "TransactionSuspended"
        assert len(record.runs[0].attempts) == 2
        assert (await running.transactions.get(id)).status == "Suspending"
    assert shop.did == ["pay", "pack"]


async def test_what_nobody_runs_is_suspended_as_soon_as_it_is_begun_again(app: App, shop: Shop) -> None:
    """Its process has died: the wish waits."""
    app.grace = 0.1
    order(app, shop)
    async with app:
        id = await under_way(app, shop)
    asked = await app.transactions.suspend(id)
    assert (asked.status, asked.wish) == ("Processing", "suspend")
    shop.let_go()
    async with app:
        await stands(app, id, "Suspending")
        await app.transactions.resume(id)
        await stands(app, id, "RecoveryComplete")
    assert shop.did == ["pay", "pack", "pack", "ship"]


async def test_the_last_step_done_there_is_nothing_to_suspend(running: App, shop: Shop) -> None:
    id = await under_way(running, shop, "ship")
    await running.transactions.suspend(id)
    shop.let_go()
    assert (await stands(running, id, "Complete")).wish is None


async def test_one_that_waits_for_its_next_attempt_goes_on_by_itself(app: App, shop: Shop) -> None:
    order(app, shop, retries=5, backoff=(30, 30))
    shop.failing.add("ship")
    async with app:
        id = await app.send("order")
        await stands(app, id, "Suspending")
        with pytest.raises(TransactionConflict, match="begins again by itself"):
            await eventually(lambda: app.transactions.resume(id))


async def test_a_stranded_one_can_be_resumed(running: App, shop: Shop) -> None:
    """Its run has ended in a way that nobody could write down: its status is that of one that runs."""
    id = await failed(running, shop)
    journal = Journal((await running.client._get_ledger()).store)

    def strand(stored: Stored) -> bool:
        stored.status = "Processing"
        return True

    await journal.change(id, strand)
    await running.transactions.resume(id)
    await stands(running, id, "RecoveryComplete")


# -- cancelling


async def test_a_cancelled_one_is_undone_backwards(running: App, shop: Shop) -> None:
    id = await under_way(running, shop)
    asked = await running.transactions.cancel(id)
    assert (asked.status, asked.wish) == ("Processing", "cancel")
    shop.let_go()
    record = await stands(running, id, "Cancelled")
    assert shop.did == ["pay", "pack", "unpack", "unpay"]
    assert [(one.name, one.undone) for one in record.steps] == [("pay", True), ("pack", True)]
    assert record.wish is None
    assert (await ended(running, id)).state == "cancelled"
    assert await dead_letters(running, "order") == []


async def test_cancelled_in_its_last_step_it_is_undone_all_the_same(running: App, shop: Shop) -> None:
    id = await under_way(running, shop, "ship")
    await running.transactions.cancel(id)
    shop.let_go()
    await stands(running, id, "Cancelled")
    assert shop.did[3:] == ["unship", "unpack", "unpay"]


@pytest.mark.parametrize("how", ["suspended", "failed"])
async def test_one_that_rests_is_cancelled_by_its_run_which_does_nothing_new(
    running: App, shop: Shop, how: str
) -> None:
    id = await (suspended if how == "suspended" else failed)(running, shop)
    shop.did.clear()
    await running.transactions.cancel(id)
    await stands(running, id, "Cancelled")
    assert shop.did == ["unpack", "unpay"]
    assert (await ended(running, id)).state == "cancelled"


async def test_a_step_that_fails_while_somebody_wants_it_cancelled_is_no_failure(app: App, shop: Shop) -> None:
    """Nor one that fails while somebody wants it suspended: in both cases it is not tried again by itself."""

    async def pack() -> None:
        await shop.do("pack")
        raise OSError("no box")

    @app.task("order", retries=5, backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("pay", shop.do, "pay", undo=shop.undo)
            await t.step("pack", pack)

    async with app:
        id = await under_way(app, shop)
        await app.transactions.suspend(id)
        shop.let_go()
        (run,) = (await ended(app, id)).runs
        assert (run.error.type, len(run.attempts)) == ("TransactionSuspended", 1)
        record = await app.transactions.get(id)
        assert (record.status, record.error) == ("Suspending", "OSError: no box")
        shop.reached.clear()
        id = await under_way(app, shop)
        await app.transactions.cancel(id)
        shop.let_go()
        record = await stands(app, id, "Cancelled")
        assert record.error == "OSError: no box"
    assert shop.did == ["pay", "pack", "pay", "pack", "unpay"]


async def test_an_undo_that_fails_aborts_and_cancelling_again_goes_on_with_what_is_left(
    running: App, shop: Shop
) -> None:
    id = await suspended(running, shop)
    shop.failing.add("unpay")
    await running.transactions.cancel(id)
    record = await stands(running, id, "Aborted")
    assert record.error == "step 'pay' could not be undone: ConnectionError: no unpay"
    assert [(one.name, one.undone) for one in record.steps] == [("pay", False), ("pack", True)]
    assert (await ended(running, id)).runs[0].error.type == "TransactionAborted"
    shop.failing.clear()
    shop.did.clear()
    await running.transactions.cancel(id)
    await stands(running, id, "Cancelled")
    assert shop.did == ["unpay"]


async def test_a_step_that_the_code_has_no_more_is_not_cancelled_silently(app: App, shop: Shop) -> None:
    names = ["a", "b"]

    @app.task("order")
    async def work(request: Any) -> None:
        async with transaction() as t:
            for name in names:
                await t.step(name, shop.do, name, undo=shop.undo)
            raise ValueError("no more")

    async with app:
        id = await failed(app, shop)
        names.remove("b")
        await app.transactions.cancel(id)
        record = await stands(app, id, "Aborted")
        assert "how to undo step 'b' is not known" in str(record.error)
    assert shop.did == ["a", "b"]


async def test_an_interrupted_cancellation_is_gone_on_with(app: App, shop: Shop) -> None:
    """The process dies in the midst of undoing: what was undone is not undone twice."""
    app.grace = 0.1
    undoing, go = asyncio.Event(), asyncio.Event()

    async def slow(result: Any) -> None:
        undoing.set()
        await go.wait()
        shop.undo(result)

    @app.task("order")
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("a", shop.do, "a", undo=slow)
            await t.step("b", shop.do, "b", undo=shop.undo)
            await t.step("c", shop.do, "c")
            raise TransactionCancelled("no")

    async with app:
        id = await app.send("order")
        await undoing.wait()
    record = await app.transactions.get(id)
    assert (record.status, [one.undone for one in record.steps]) == ("Cancelling", [False, True, False])
    go.set()
    async with app:
        await stands(app, id, "Cancelled")
    assert shop.did == ["a", "b", "c", "unb", "una"]


# -- by force


async def test_by_force_it_is_complete_and_nothing_is_run(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    assert (await running.transactions.resume(id, force=True)).status == "ForceRecoveryComplete"
    await ended(running, id)
    await tasks.retry(await running.client._get_ledger(), await running.client._get_broker(), id)
    with pytest.raises(RemoteError, match="declared complete"):
        await _result(running, id)
    assert shop.did == ["pay", "pack"]


async def _result(app: App, id: str) -> Any:
    return await Handle(id, app.client).result(20)


async def test_by_force_an_aborted_one_is_complete(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    shop.failing.add("unpack")
    await running.transactions.cancel(id)
    await stands(running, id, "Aborted")
    record = await running.transactions.resume(id, force=True)
    assert (record.status, record.wish) == ("ForceRecoveryComplete", None)


async def test_by_force_it_is_cancelled_and_nothing_is_undone(running: App, shop: Shop) -> None:
    id = await under_way(running, shop)
    assert (await running.transactions.cancel(id, force=True)).status == "ForceCancelled"
    shop.let_go()
    with pytest.raises(TaskCancelled):
        await _result(running, id)
    record = await running.transactions.get(id)
    assert (record.status, [one.name for one in record.steps]) == ("ForceCancelled", ["pay", "pack"])
    assert shop.did == ["pay", "pack"]


async def test_by_force_one_that_waits_for_its_next_attempt_does_nothing_more(app: App, shop: Shop) -> None:
    order(app, shop, retries=5, backoff=(0.3, 0.3))
    shop.failing.add("ship")
    async with app:
        id = await app.send("order")
        await stands(app, id, "Suspending")
        await app.transactions.cancel(id, force=True)
        shop.failing.clear()
        with pytest.raises(TaskCancelled):
            await _result(app, id)
    assert shop.did == ["pay", "pack", "ship"]


# -- what cannot be


ALLOWED = {
    "suspend": {"Processing", "RecoveryProcessing"},
    "resume": {"Suspending"},
    "cancel": {"Processing", "RecoveryProcessing", "Suspending", "Cancelling", "Aborted"},
    "resume by force": {"Suspending", "Aborted"},
    "cancel by force": {"Processing", "RecoveryProcessing", "Suspending", "Cancelling", "Aborted"},
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("verb", list(ALLOWED))
async def test_a_verb_that_the_status_does_not_allow_names_the_status(app: App, verb: str, status: str) -> None:
    async with app.client:
        store = (await app.client._get_ledger()).store
        stored = Stored("order", "order", 1.0, 60.0, 1, status=status, turns=1)  # type: ignore[arg-type]
        await store.apply([Put(journals.key("x"), journals._encode(stored))])
        ask = getattr(app.transactions, verb.partition(" ")[0])
        given = {"force": True} if "force" in verb else {}
        if status in ALLOWED[verb]:
            with contextlib.suppress(TransactionConflict):  # of its task nothing is known
                await ask("x", **given)
            return
        with pytest.raises(TransactionConflict, match=rf"\b{status}$") as told:
            await ask("x", **given)
        assert told.value.status == status
        record = await app.transactions.get("x")
        assert (record.status, record.wish) == (status, None)


async def test_a_cancellation_that_cannot_be_is_not_wished_for_later(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    await ended(running, id)
    store = (await running.client._get_ledger()).store
    await store.apply([Delete(f"task/{id}")])
    with pytest.raises(TransactionConflict, match="nothing is known of its task"):
        await running.transactions.cancel(id)
    assert (await running.transactions.get(id)).wish == "suspend"


async def test_a_run_that_has_swallowed_the_error_cannot_begin_again(app: App, shop: Shop) -> None:
    @app.task("order")
    async def work(request: Any) -> None:
        try:
            async with transaction() as t:
                await t.step("ship", shop.do, "ship")
        except ConnectionError:
            pass

    async with app:
        id = await failed(app, shop)
        for verb in (app.transactions.resume, app.transactions.cancel):
            with pytest.raises(TransactionConflict, match="succeeded all the same"):
                await verb(id)
        assert (await app.transactions.resume(id, force=True)).status == "ForceRecoveryComplete"


async def test_to_suspend_what_is_about_to_be_cancelled_is_refused(running: App, shop: Shop) -> None:
    id = await under_way(running, shop)
    await running.transactions.cancel(id)
    with pytest.raises(TransactionConflict, match="about to be cancelled"):
        await running.transactions.suspend(id)
    shop.let_go()
    await stands(running, id, "Cancelled")


async def test_of_two_who_want_different_things_at_once_one_comes_first(running: App, shop: Shop) -> None:
    id = await suspended(running, shop)
    asked = [running.transactions.resume(id), running.transactions.cancel(id), running.transactions.cancel(id, True)]
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(one, TransactionRecord | TransactionConflict) for one in told), told
    done = await ended(running, id)
    record = await running.transactions.get(id)
    assert done.state in ("succeeded", "failed", "cancelled")
    assert record.status in journals.FINISHED


# -- looking


async def test_the_latest_are_listed_and_chosen(running: App, shop: Shop) -> None:
    ids = [str(await running.send("order")) for _ in range(3)]
    for id in ids:
        await ended(running, id)
    bad = await failed(running, shop)
    found = await running.transactions.list()
    assert [one.id for one in found] == [bad, *reversed(ids)]
    assert [one.id for one in await running.transactions.list("Suspending")] == [bad]
    assert [one.id for one in await running.transactions.list(limit=2)] == [bad, ids[2]]
    assert await running.transactions.list(name="other") == []
    assert len(await running.transactions.list(name="order")) == 4


async def test_many_pages_are_looked_through(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "PAGE", 2)
    async with app.client:
        store = (await app.client._get_ledger()).store
        for n in range(7):
            stored = Stored("rare" if n == 0 else "order", "order", 1.0, 60.0, 1)
            await store.apply([Put(journals.key(f"{n}"), journals._encode(stored))])
        await store.apply([Put(journals.key("5x"), b"of another version")])
        assert [one.id for one in await app.transactions.list(name="rare")] == ["0"]
        assert len(await app.transactions.list()) == 7


async def test_one_that_there_is_not_is_told(app: App) -> None:
    async with app.client:
        for ask in (app.transactions.get, app.transactions.suspend, app.transactions.resume, app.transactions.cancel):
            with pytest.raises(UnknownTransaction, match="'nothing'"):
                await ask("nothing")
        with pytest.raises(UnknownTransaction):
            await app.transactions.cancel("nothing", force=True)
