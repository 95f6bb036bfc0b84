"""A transaction: what was done is not done again, and is undone when somebody wants that."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import (
    App,
    BodyTooLarge,
    BrokerUnavailable,
    RemoteError,
    StoreRequired,
    Task,
    TaskCancelled,
    TransactionAborted,
    TransactionCancelled,
    TransactionConflict,
    TransactionError,
    TransactionSuspended,
    Unavailable,
    Unencodable,
    transaction,
)
from penstock.control import tasks
from penstock.stores.base import Put
from penstock.stores.ledger import RESULT_TTL, Held, Ledger
from penstock.stores.records import RunState, moment
from penstock.tasks import journal as journals
from penstock.tasks import transaction as transactions
from penstock.tasks.journal import Journal, transaction_id
from penstock.terms import Terms
from tests.helpers import dead_letters, eventually
from tests.tasks.shop import SOON, Shop, ended, order, stands

MakeApp = Callable[..., App]


@pytest.fixture(params=["memory", "sqlite", "postgres", "redis"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh system that is broker and store, of each kind."""
    from tests.conftest import fresh_url

    return fresh_url(request, tmp_path)


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(f"sqlite:///{tmp_path / 'one.db'}", lease=1.0, grace=5.0)


@pytest.fixture
def shop() -> Shop:
    return Shop()


# -- doing


async def test_steps_are_done_in_order_and_recorded(make_app: MakeApp, shop: Shop) -> None:
    app = make_app()
    order(app, shop)
    async with app:
        handle = await app.send("order", {"amount": 7})
        assert await handle.result(20) == [{"of": "pay"}, {"of": "pack"}, {"of": "ship"}]
        record = await app.transactions.get(handle)
    assert shop.did == ["pay", "pack", "ship"]
    assert (record.id, record.name, record.task, record.status, record.step) == (
        handle, "order", "order", "Complete", "ship",
    )  # fmt: skip
    assert [(one.name, one.result, one.undone) for one in record.steps] == [
        ("pay", {"of": "pay"}, False), ("pack", {"of": "pack"}, False), ("ship", {"of": "ship"}, False),
    ]  # fmt: skip
    assert record.createdAt <= record.steps[0].at <= record.updatedAt <= moment(time.time())
    assert (record.error, record.wish) == (None, None)


async def test_what_was_done_is_not_done_again_by_a_retry(make_app: MakeApp, shop: Shop) -> None:
    app = make_app()
    order(app, shop, retries=3, backoff=SOON)
    shop.failing.add("pack")
    statuses: list[str] = []

    @app.task("watch")
    async def watch(id: str) -> str:
        return (await app.transactions.get(id)).status

    async with app:
        handle = await app.send("order")
        await eventually(lambda: shop.did.count("pack") == 2)
        statuses.append((await app.transactions.get(handle)).status)
        shop.failing.clear()
        await handle.result(20)
        record = await app.transactions.get(handle)
    assert shop.did.count("pay") == shop.did.count("ship") == 1
    assert record.status == "RecoveryComplete"
    assert set(statuses) <= {"Suspending", "RecoveryProcessing"}


async def test_a_step_returns_the_same_the_first_time_as_any_other(app: App) -> None:
    returned: list[Any] = []

    def sums(n: int, *, more: int) -> tuple[int, int]:
        return n, more

    @app.task(retries=1, backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            returned.append(await t.step("plain", sums, 1, more=2))
            returned.append(await t.step("bytes", lambda: b"\x00\xff"))
            returned.append(await t.step("text", lambda: "text"))
            returned.append(await t.step("nothing", lambda: None))
            returned.append(await t.step("large", lambda: "x" * 100_000))
            if len(returned) == 5:
                raise ValueError("once")

    async with app:
        handle = await app.send("work")
        await handle.result(20)
        record = await app.transactions.get(handle)
    assert returned[:5] == returned[5:] == [[1, 2], b"\x00\xff", "text", None, "x" * 100_000]
    assert record.name == "work"
    assert record.steps[1].result == {"base64": "AP8="}


async def test_what_waits_in_threads_holds_up_no_other_step(app: App) -> None:
    """More plain steps at once than a pool of the event loop has threads."""
    import threading

    together = threading.Barrier(40, timeout=20)

    @app.task(concurrency=40)
    async def meet(request: Any) -> None:
        async with transaction() as t:
            await t.step("meet", together.wait)

    async with app:
        handles = [await app.send("meet") for _ in range(40)]
        for handle in handles:
            await handle.result(30)


async def test_steps_may_be_under_way_together(app: App, shop: Shop) -> None:
    @app.task
    async def work(request: Any) -> list[Any]:
        async with transaction() as t:
            return await asyncio.gather(*(t.step(f"s{n}", shop.do, f"s{n}") for n in range(10)))

    async with app:
        handle = await app.send("work")
        assert await handle.result(20) == [{"of": f"s{n}"} for n in range(10)]
        record = await app.transactions.get(handle)
    assert sorted(one.name for one in record.steps) == sorted(f"s{n}" for n in range(10))


async def test_a_step_that_another_one_outruns_is_recorded_before_the_block_ends(app: App, shop: Shop) -> None:
    shop.hold("slow")

    @app.task
    async def work(request: Any) -> None:
        async with transaction() as t:
            slow = asyncio.create_task(t.step("slow", shop.do, "slow"))
            await shop.reached.wait()
            asyncio.get_running_loop().call_later(0.05, shop.let_go)
            try:
                raise ValueError("meanwhile")
            finally:
                del slow

    async with app:
        handle = await app.send("work")
        await ended(app, handle)
        record = await app.transactions.get(handle)
    assert [one.name for one in record.steps] == ["slow"]
    assert record.status == "Suspending"


async def test_a_coroutine_in_a_thread_of_its_own_has_one_too(app: App, shop: Shop) -> None:
    order(app, shop, isolation="thread")
    async with app:
        handle = await app.send("order")
        assert len(await handle.result(20)) == 3
        assert (await app.transactions.get(handle)).status == "Complete"


async def test_an_outage_of_what_a_step_needs_suspends_nothing(app: App) -> None:
    tries: list[int] = []

    def need() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise Unavailable("away")

    @app.task(backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("need", need)

    async with app:
        handle = await app.send("work")
        await handle.result(20)
        assert (await app.transactions.get(handle)).status == "Complete"
    assert len(tries) == 2


# -- where there is none


async def test_outside_of_a_tasks_run_it_is_refused(app: App, shop: Shop) -> None:
    with pytest.raises(TransactionError, match="none is running here"):
        async with transaction("order"):
            pass
    task = order(app, shop)
    with pytest.raises(TransactionError):
        await task(1)
    with pytest.raises(TransactionError, match="not begun"):
        _ = transaction().id
    for name in ("", 1, "\0", "\ud800"):
        with pytest.raises(ValueError, match="name"):
            transaction(name)  # type: ignore[arg-type]


async def test_a_call_has_none_and_an_app_without_a_store_says_so(shop: Shop, nats_url: str) -> None:
    app = App("memory://")
    task = order(app, shop)
    async with app:
        with pytest.raises(RemoteError, match="in no record") as told:
            await task.call(1)
        assert told.value.type == "TransactionError"
    bare = App(nats_url, lease=1.0)
    task = order(bare, shop)
    async with bare:
        with pytest.raises(RemoteError, match="needs a store") as told:
            await task.call(1)
        assert told.value.type == "StoreRequired"
    with pytest.raises(StoreRequired):
        await bare.transactions.list()
    assert shop.did == []


@pytest.mark.blocks
async def test_a_process_of_its_own_has_none(app: App, shop: Shop) -> None:
    order(app, shop, isolation="process")
    async with app:
        with pytest.raises(RemoteError, match="isolation='process'"):
            await (await app.send("order")).result(30)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nested", "begun it already"),
        ("second", "begun it already"),
        ("twice", "two steps named 'a'"),
        ("outside", "outside of its transaction's block"),
        ("name", "a step's name"),
    ],
)
async def test_what_would_make_it_ambiguous_is_refused(app: App, how: str, said: str) -> None:
    @app.task
    async def work(request: Any) -> None:
        async with transaction("one") as t:
            await t.step("a", lambda: 1)
            if how == "nested":
                async with transaction("two"):
                    pass
            if how == "twice":
                await t.step("a", lambda: 1)
            if how == "name":
                await t.step("", lambda: 1)
        if how == "second":
            async with transaction("one"):
                pass
        if how == "outside":
            await t.step("b", lambda: 1)

    async with app:
        with pytest.raises(RemoteError, match=said):
            await (await app.send("work")).result(20)


async def test_each_run_of_a_task_has_a_transaction_of_its_own(app: App, shop: Shop) -> None:
    """Two jobs on a topic, with the same transaction's name: neither hears of the other one's."""
    ids: dict[str, str] = {}
    shop.failing.add("b/1")

    def job(name: str) -> None:
        @app.task(name, topics=["both"], result_ttl=1000)
        async def run(request: Any) -> None:
            async with transaction("order") as t:
                ids[name] = t.id
                await t.step("pay", shop.do, name)

    for name in ("a", "b/1"):
        job(name)
    async with app:
        handle = await app.send("both")
        first, second = (await ended(app, handle)).runs
        assert (first.state, second.state) == ("succeeded", "failed")
        assert ids == {"a": f"{handle}.a", "b/1": f"{handle}.b~2F1"}
        stood = {one.id: (one.name, one.task, one.status) for one in await app.transactions.list()}
        assert stood == {ids["a"]: ("order", "a", "Complete"), ids["b/1"]: ("order", "b/1", "Suspending")}
        with pytest.raises(TransactionConflict, match=r"has several transactions: .*\.a, .*\.b~2F1"):
            await app.transactions.get(handle)
        await eventually(lambda: dead_letters(app, "b/1"))
        left = (await times_left(app, handle))[f"transaction/{ids['a']}"]
        assert left is not None
        assert left < 1100  # and not for as long as the other one goes on
        shop.failing.clear()
        await app.transactions.resume(ids["b/1"])
        await stands(app, ids["b/1"], "RecoveryComplete")
    assert shop.did.count("a") == 1


def test_ids_differ_may_stand_in_a_url_and_are_not_of_any_length() -> None:
    names = ["a", "a/1", "a~2F1", "a%2F1", "ä", "x" * 32, "x" * 33, "x" * 34, "~"]
    ids = [transaction_id("id", name, 2) for name in names]
    assert len(set(ids)) == len(names)
    assert all(re.fullmatch(r"id\.[A-Za-z0-9_.~-]{1,32}", id) for id in ids)
    assert {transaction_id("id", name, 1) for name in names} == {"id"}


async def test_the_only_one_of_a_task_with_several_runs_is_found_by_the_task(app: App, shop: Shop) -> None:
    order(app, shop, topics=["both"])
    shop.failing.add("ship")

    @app.task("other", topics=["both"], retries=0)
    async def other(request: Any) -> None:
        raise ValueError("as well")

    async with app:
        handle = await app.send("both", result_ttl=1000)
        await ended(app, handle)
        assert (await app.transactions.get(handle)).id == f"{handle}.order"
        assert await is_kept(app, handle)
        cancelled = await app.transactions.cancel(handle, force=True)
        assert cancelled.status == "ForceCancelled"
        left = await times_left(app, handle)
        for key in (f"task/{handle}", f"run/{handle}/order", f"transaction/{handle}.order"):
            assert left[key] is not None, key
            assert left[key] < 1100, key  # type: ignore[operator]


async def test_a_run_that_is_refused_anothers_keeps_nothing_for_it(app: App, shop: Shop) -> None:
    """That of a job of which the sender did not know: as far as it says, its task has one run."""
    shop.hold("pack")
    order(app, shop, result_ttl=1000)

    @app.task("stranger", result_ttl=1000)
    async def stranger(request: Any) -> None:
        async with transaction():
            pass

    async with app:
        handle = await app.send("order")
        await shop.reached.wait()
        await app.transactions.suspend(handle)
        broker, ledger = await app.client._get_broker(), await app.client._get_ledger()
        message = tasks._again(handle, await ledger._sent(handle), "stranger")
        assert await broker.publish([message]) == [None]
        await eventually(lambda: dead_letters(app, "stranger"))  # and it is not suspended with the other one
        run = await ledger.look_at(Held(str(handle), "stranger", 0, RunState("queued")))
        assert run.error is not None
        assert "'order', of 'order'" in run.error.message
        seconds = (await times_left(app, handle))[f"run/{handle}/stranger"]
        assert seconds is not None
        assert seconds < 2 * RESULT_TTL
        shop.let_go()
        await stands(app, handle, "Suspending")


@pytest.mark.parametrize("result", [object(), "x" * 2000])
async def test_a_result_that_cannot_be_recorded_is_an_error(tmp_path: Path, result: Any) -> None:
    app = App(f"sqlite:///{tmp_path / 'small.db'}", max_body=1000)

    @app.task
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("a", lambda: result)

    async with app:
        handle = await app.send("work")
        with pytest.raises(RemoteError) as told:
            await handle.result(20)
        assert told.value.type in (Unencodable.__name__, BodyTooLarge.__name__)
        record = await app.transactions.get(handle)
    assert (record.status, record.steps) == ("Suspending", [])


# -- what becomes of it when a run ends otherwise


async def test_a_failed_one_is_suspended_and_its_dead_letter_replayed_goes_on(app: App, shop: Shop) -> None:
    from penstock.control import dead_letters as letters

    order(app, shop)
    shop.failing.add("ship")
    async with app:
        handle = await app.send("order")
        await ended(app, handle)
        record = await app.transactions.get(handle)
        assert (record.status, record.step, record.error) == ("Suspending", "ship", "ConnectionError: no ship")
        await eventually(lambda: dead_letters(app, "order"))
        shop.failing.clear()
        await letters.replay(await app.client._get_broker(), "order", letters.Selection(), letters.Outcome())
        await stands(app, handle, "RecoveryComplete")
    assert shop.did == ["pay", "pack", "ship", "ship"]


async def test_one_that_is_stopped_at_its_limit_is_suspended(app: App, shop: Shop) -> None:
    order(app, shop, timeout=0.3)
    shop.hold("pack")
    async with app:
        handle = await app.send("order")
        await ended(app, handle)
        record = await app.transactions.get(handle)
        assert (record.status, [one.name for one in record.steps]) == ("Suspending", ["pay"])
        assert record.error is not None
        assert "ran for over" in record.error


async def test_one_whose_task_is_cancelled_is_suspended_and_can_be_resumed(app: App, shop: Shop) -> None:
    order(app, shop)
    shop.hold("pack")
    async with app:
        handle = await app.send("order")
        await shop.reached.wait()
        assert await handle.cancel()
        with pytest.raises(TaskCancelled):
            await handle.result(20)
        record = await app.transactions.get(handle)
        assert (record.status, record.error) == ("Suspending", "its task was cancelled")
        shop.let_go()
        await app.transactions.resume(handle)
        await stands(app, handle, "RecoveryComplete")
    assert shop.did == ["pay", "pack", "pack", "ship"]


async def test_a_task_is_remembered_for_as_long_as_its_transaction_goes_on(app: App, shop: Shop) -> None:
    order(app, shop, result_ttl=1000)
    shop.failing.add("ship")

    async def left(key: str) -> float | None:
        ledger: Ledger = await app.client._get_ledger()
        (entry,) = await ledger.store.get([key])
        assert entry is not None
        return None if entry.expires_at is None else entry.expires_at - time.time()

    async with app:
        handle = await app.send("order")
        await ended(app, handle)
        keys = [f"task/{handle}", f"run/{handle}/order", f"transaction/{handle}"]
        for key in keys:
            seconds = await left(key)
            assert seconds is None or seconds > 100 * RESULT_TTL, key
        await app.transactions.resume(handle, force=True)
        for key in keys:
            seconds = await left(key)
            assert seconds is not None, key
            assert seconds < 1100, key


async def test_a_body_that_aborts_undoes_nothing_and_is_not_tried_again(app: App, shop: Shop) -> None:
    @app.task(retries=5, backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("a", shop.do, "a", undo=shop.undo)
            raise TransactionAborted("the card\nis stolen\udce9")

    async with app:
        handle = await app.send("work")
        with pytest.raises(RemoteError, match="is stolen") as told:
            await handle.result(20)
        assert told.value.type == "TransactionAborted"
        record = await app.transactions.get(handle)
        assert (record.status, record.error) == ("Aborted", "the card is stolen\\udce9")
    assert shop.did == ["a"]


async def test_a_body_may_cancel_or_suspend_itself(app: App, shop: Shop) -> None:
    clerk: list[str] = []

    @app.task(retries=5, backoff=SOON)
    async def work(how: str) -> None:
        async with transaction() as t:
            await t.step("a", shop.do, "a", undo=shop.undo)
            if how == "cancel":
                raise TransactionCancelled("out of stock")
            if not clerk:
                raise TransactionSuspended("wait for the clerk")

    async with app:
        suspended = await app.send("work", "suspend")
        with pytest.raises(RemoteError, match="wait for the clerk"):
            await suspended.result(20)
        record = await app.transactions.get(suspended)
        assert (record.status, record.error, record.wish) == ("Suspending", "wait for the clerk", "suspend")
        clerk.append("here")
        await app.transactions.resume(suspended)
        await stands(app, suspended, "RecoveryComplete")
        assert shop.did == ["a"]
        shop.did.clear()
        cancelled = await app.send("work", "cancel")
        with pytest.raises(TaskCancelled):
            await cancelled.result(20)
        record = await app.transactions.get(cancelled)
        assert (record.status, record.error, record.steps[0].undone) == ("Cancelled", "out of stock", True)
        assert shop.did == ["a", "una"]
        assert await dead_letters(app, "work") == []


async def test_a_complete_one_is_replayed_where_what_follows_it_has_failed(app: App, shop: Shop) -> None:
    @app.task(retries=1, backoff=SOON)
    async def work(task: Task) -> Any:
        async with transaction() as t:
            done = await t.step("a", shop.do, "a")
        if t.id not in shop.did:
            shop.did.append(t.id)
            raise ValueError("after it")
        return done

    async with app:
        handle = await app.send("work")
        assert await handle.result(20) == {"of": "a"}
        assert (await app.transactions.get(handle)).status == "Complete"
    assert shop.did == ["a", handle]


async def test_the_code_of_a_complete_one_does_nothing_new(app: App, shop: Shop) -> None:
    versions = iter([["a"], ["a", "b"]])

    @app.task(retries=1, backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            for name in next(versions):
                await t.step(name, shop.do, name)
        raise ValueError("after it")

    async with app:
        handle = await app.send("work")
        with pytest.raises(RemoteError, match="is Complete: step 'b' is none of it"):
            await handle.result(20)
        assert (await app.transactions.get(handle)).status == "Complete"
    assert shop.did == ["a"]


async def test_what_is_raised_after_the_block_fails_the_run_as_any_other(app: App, shop: Shop) -> None:
    @app.task
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("a", shop.do, "a")
        raise TransactionCancelled("too late")

    async with app:
        handle = await app.send("work")
        with pytest.raises(RemoteError, match="too late"):
            await handle.result(20)
        assert (await app.transactions.get(handle)).status == "Complete"
        await eventually(lambda: dead_letters(app, "work"))
    assert shop.did == ["a"]


# -- several runs of one


async def test_a_run_that_was_taken_for_dead_stops_and_overwrites_nothing(app: App, shop: Shop) -> None:
    """Another one has entered meanwhile: what it has written stays, and the next step is not begun."""
    outcome: list[str] = []

    @app.task
    async def work(request: Any) -> None:
        try:
            async with transaction() as t:
                await t.step("a", shop.do, "a")
                await t.step("b", shop.do, "b")
        except TransactionError as error:
            outcome.append(str(error))
            raise

    shop.hold("a")
    async with app:
        handle = await app.send("work")
        await shop.reached.wait()
        ledger = await app.client._get_ledger()
        journal = Journal(ledger.store)

        def take_over(stored: journals.Stored) -> bool:
            stored.run += 1
            return True

        taken = await journal.change(handle, take_over)
        shop.let_go()
        await ended(app, handle)
        kept = await journal.get(handle)
    assert outcome == ["this run was taken for dead: another one goes on with its transaction"]
    assert shop.did == ["a"]
    assert kept.version == taken.version


async def test_a_run_that_enters_after_a_later_one_is_refused(app: App, shop: Shop) -> None:
    order(app, shop)
    async with app:
        store = (await app.client._get_ledger()).store
        taskid = "0" * 32
        stored = journals.Stored("order", "order", 1.0, 60.0, 7, turns=1)
        await store.apply([Put(journals.key(taskid), journals._encode(stored))])
        handle = await app.client._send_task("order", None, Terms(), None, {}, 20, None, taskid=taskid)
        with pytest.raises(RemoteError, match="taken for dead"):
            await handle.result(20)
    assert shop.did == []


async def test_a_lost_run_is_gone_on_with_and_keeps_its_status(tmp_path: Path, shop: Shop) -> None:
    """A process that has died: its message comes again."""
    url = f"sqlite:///{tmp_path / 'two.db'}"
    first = App(url, lease=1.0, grace=0.1)
    order(first, shop)
    shop.hold("pack")
    async with first:
        handle = await first.send("order")
        await shop.reached.wait()
    record = await first.transactions.get(handle)
    assert (record.status, [one.name for one in record.steps]) == ("Processing", ["pay"])
    shop.let_go()
    second = App(url, lease=1.0)
    order(second, shop)
    async with second:
        assert await second.waitfor(handle, 20)
        assert (await second.transactions.get(handle)).status == "Complete"
    assert shop.did == ["pay", "pack", "pack", "ship"]
    await first.client.close()
    await second.client.close()


async def test_what_cannot_be_written_for_a_while_is_written_after_it(
    app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is away, and whether a change was made is not known: no step is done twice for that."""
    order(app, shop)
    async with app:
        store: Any = (await app.client._get_ledger()).store
        apply, count = store.apply, 0

        async def away(changes: Any) -> Any:
            nonlocal count
            ours = any(change.key.startswith("transaction/") for change in changes)
            count += ours
            if ours and count % 3 == 1:
                raise BrokerUnavailable("away")
            done = await apply(changes)
            if ours and count % 3 == 2:
                raise BrokerUnavailable("away, and it was done")
            return done

        monkeypatch.setattr(store, "apply", away)
        handle = await app.send("order")
        assert len(await handle.result(20)) == 3
        assert count > 10
        assert (await app.transactions.get(handle)).status == "Complete"
    assert shop.did == ["pay", "pack", "ship"]


async def test_one_that_is_shared_between_runs_is_refused(app: App, shop: Shop) -> None:
    """Its second run would be given the results of the first."""
    shared = transaction("order")

    @app.task
    async def work(request: Any) -> Any:
        async with shared as t:
            return await t.step("pay", shop.do, request)

    async with app:
        assert await (await app.send("work", "A")).result(20) == {"of": "A"}
        with pytest.raises(RemoteError, match="one for each run"):
            await (await app.send("work", "B")).result(20)
    assert shop.did == ["A"]


async def test_a_run_whose_transaction_cannot_be_read_is_buried_and_has_ended(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'one.db'}"
    app, sender = App(url, lease=1.0), App(url)

    @app.task
    async def work(n: int) -> None: ...

    async with sender.client, app:
        ledger = await sender.client._get_ledger()
        taskid = "0" * 32
        await ledger.store.apply([Put(journals.key(taskid), b"\x93\x01\x02\x03")])
        await sender.client._send_task("work", {"n": "none"}, Terms(), None, {}, 20, None, taskid=taskid)
        assert (await ended(app, taskid)).state == "failed"


async def test_steps_that_are_under_way_together_do_not_contend_for_the_record(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    async def work(request: Any) -> None:
        async with transaction() as t:
            await asyncio.gather(*(t.step(f"s{n}", asyncio.sleep, 0, n) for n in range(50)))

    async with app:
        store: Any = (await app.client._get_ledger()).store
        apply = store.apply
        writes: list[str] = []

        async def count(changes: Any) -> Any:
            writes.extend(change.key for change in changes if change.key.startswith("transaction/"))
            return await apply(changes)

        monkeypatch.setattr(store, "apply", count)
        await (await app.send("work")).result(30)
    assert 102 <= len(writes) <= 105


async def test_steps_that_end_together_are_bounded_too(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path / 'small.db'}", max_body=1000)
    together = asyncio.Barrier(4)

    async def large() -> bytes:
        await together.wait()
        return os.urandom(600)

    @app.task
    async def work(request: Any) -> None:
        async with transaction() as t:
            await asyncio.gather(*(t.step(f"s{n}", large) for n in range(4)))

    async with app:
        handle = await app.send("work")
        with pytest.raises(RemoteError) as told:
            await handle.result(20)
        assert told.value.type == "BodyTooLarge"
        assert len((await app.transactions.get(handle)).steps) == 1


async def test_it_has_so_many_steps_and_no_more(app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an earlier run has done count, also before this one comes to them; and done again they are no more."""
    monkeypatch.setattr(transactions, "MOST_STEPS", 3)
    wanted = [["a", "b"], ["c", "a"], ["b", "c", "a", "d"], ["a", "b", "c"]]
    refused: list[str] = []

    @app.task(retries=len(wanted), backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction("order") as t:
            for name in wanted.pop(0):
                try:
                    await t.step(name, shop.do, name)
                except TransactionError as error:
                    refused.append(str(error))
                    raise
            if wanted:
                raise ValueError("once more")

    async with app:
        handle = await app.send("work")
        await handle.result(20)
        record = await app.transactions.get(handle)
    assert refused == [f"step 'd': transaction {handle} has 3 steps, the most it may have"]
    assert (record.status, shop.did) == ("RecoveryComplete", ["a", "b", "c"])


async def test_steps_that_are_under_way_together_count(app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "MOST_STEPS", 3)

    @app.task
    async def work(request: Any) -> list[bool]:
        async with transaction() as t:
            steps = [t.step(name, shop.do, name) for name in "abcd"]
            done = await asyncio.gather(*steps, return_exceptions=True)
        return [isinstance(one, TransactionError) for one in done]

    async with app:
        assert sum(await (await app.send("work")).result(20)) == 1
    assert len(shop.did) == 3


@pytest.mark.parametrize(("length", "fits"), [(200, True), (201, False)])
async def test_names_are_not_of_any_length(app: App, length: int, fits: bool) -> None:
    @app.task
    async def work(request: Any) -> None:
        async with transaction("order") as t:
            await t.step("n" * length, lambda: 1)

    assert (transaction("n" * 200)._name or "")[:2] == "nn"
    with pytest.raises(ValueError, match="a transaction's name has 1 to 200 characters, not 201"):
        transaction("n" * 201)
    async with app:
        handle = await app.send("work")
        with contextlib.nullcontext() if fits else pytest.raises(RemoteError, match="a step's name has 1 to 200"):
            await handle.result(20)


async def test_an_outage_waits_for_the_other_steps_that_are_under_way(app: App, shop: Shop) -> None:
    """Or the next attempt would do them a second time, at the same time."""
    tries: list[int] = []
    shop.hold("slow")

    async def need() -> None:
        tries.append(1)
        if len(tries) == 1:
            await shop.reached.wait()
            asyncio.get_running_loop().call_later(0.3, shop.let_go)
            raise Unavailable("away")

    @app.task(backoff=SOON)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await asyncio.gather(t.step("need", need), t.step("slow", shop.do, "slow"))

    async with app:
        handle = await app.send("work")
        await handle.result(20)
    assert (shop.did, len(tries)) == (["slow"], 2)


async def test_one_that_its_run_has_left_behind_is_suspended(app: App, shop: Shop) -> None:
    """A limit of the body's own around the block, and its error caught outside of it."""
    shop.hold("pack")

    @app.task
    async def work(request: Any) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2), transaction() as t:
                await t.step("pack", shop.do, "pack")
        return "late"

    async with app:
        handle = await app.send("work")
        assert await handle.result(20) == "late"
        record = await app.transactions.get(handle)
        assert (record.status, record.error) == ("Suspending", "its run ended outside of it")


async def test_none_begins_in_a_run_that_has_ended(app: App, shop: Shop) -> None:
    refused: list[str] = []
    go = asyncio.Event()

    async def later() -> None:
        await go.wait()
        try:
            async with transaction() as t:
                await t.step("late", shop.do, "late")
        except TransactionError as error:
            refused.append(str(error))

    left: list[asyncio.Task[None]] = []

    @app.task
    async def work(request: Any) -> None:
        left.append(asyncio.create_task(later()))

    async with app:
        await (await app.send("work")).result(20)
        go.set()
        await left[0]
    assert refused == ["a transaction is in a task's run, and this run has ended"]
    assert shop.did == []


# -- what is kept


async def times_left(app: App, id: str) -> dict[str, float | None]:
    """Seconds for which what is stored of a task is kept; None: for ever."""
    store = (await app.client._get_ledger()).store
    found: dict[str, float | None] = {}
    for prefix in (f"task/{id}", f"run/{id}/", f"transaction/{id}"):
        for entry in await store.scan(prefix, limit=10):
            found[entry.key] = None if entry.expires_at is None else entry.expires_at - time.time()
    return found


async def is_kept(app: App, id: str) -> bool:
    left = await times_left(app, id)
    assert len(left) >= 3
    return all(seconds is None or seconds > 100 * RESULT_TTL for seconds in left.values())


async def test_a_task_with_a_unique_key_is_kept_though_somebody_waits_for_it(app: App, shop: Shop) -> None:
    order(app, shop, result_ttl=1000)
    shop.failing.add("pack")
    async with app:
        for n in range(5):
            handle = await app.client.send("order", unique=f"u{n}")
            await ended(app, handle)
            assert await is_kept(app, handle)


async def test_a_task_is_kept_though_another_run_of_it_ends_last(app: App, shop: Shop) -> None:
    order(app, shop, topics=["both"], result_ttl=1000)
    shop.failing.add("pack")
    go = asyncio.Event()

    @app.task("other", topics=["both"], result_ttl=1000)
    async def other(request: Any) -> None:
        await go.wait()

    async with app:
        handle = await app.send("both")
        await stands(app, handle, "Suspending")
        ledger = await app.client._get_ledger()

        async def failed() -> bool:
            return (await ledger.look(handle)).runs["order"].ended

        await eventually(failed)
        go.set()
        await ended(app, handle)
        assert await is_kept(app, handle)


async def test_a_task_is_kept_whose_resumed_run_fails_before_the_block(app: App, shop: Shop) -> None:
    broken: list[str] = []
    shop.failing.add("pack")

    @app.task(result_ttl=1000)
    async def work(request: Any) -> None:
        if broken:
            raise KeyError(broken[0])
        async with transaction() as t:
            await t.step("pack", shop.do, "pack")

    async with app:
        handle = await app.send("work")
        await ended(app, handle)
        broken.append("settings")
        await app.transactions.resume(handle)
        await ended(app, handle)
        assert await is_kept(app, handle)
        broken.clear()
        shop.failing.clear()
        await app.transactions.resume(handle)
        await stands(app, handle, "RecoveryComplete")


async def test_a_task_is_kept_that_is_cancelled_while_it_waits_for_its_next_attempt(app: App, shop: Shop) -> None:
    order(app, shop, retries=3, backoff=(1.0, 1.0), result_ttl=1000)
    shop.failing.add("pack")
    async with app:
        handle = await app.send("order")
        await stands(app, handle, "Suspending")
        ledger = await app.client._get_ledger()

        async def waits() -> bool:
            return (await ledger.look(handle)).state == "queued"

        await eventually(waits)
        assert await handle.cancel()
        await eventually(lambda: is_kept(app, handle))  # its message has come by
        assert (await app.transactions.get(handle)).status == "Suspending"


async def test_one_whose_task_is_cancelled_after_its_process_has_died_is_suspended(tmp_path: Path, shop: Shop) -> None:
    url = f"sqlite:///{tmp_path / 'two.db'}"
    first = App(url, lease=1.0, grace=0.1)
    order(first, shop, result_ttl=1000)
    shop.hold("pack")
    async with first:
        handle = await first.send("order")
        await shop.reached.wait()
    assert await handle.cancel()
    second = App(url, lease=1.0)
    order(second, shop, result_ttl=1000)
    async with second:
        await ended(second, handle)
        await stands(second, handle, "Suspending")
        await eventually(lambda: is_kept(second, handle))
        shop.let_go()
        await second.transactions.resume(handle)
        await stands(second, handle, "RecoveryComplete")
    await first.client.close()
    await second.client.close()


@pytest.mark.parametrize("second", ["raises", "returns", "is cancelled"])
async def test_one_that_a_killed_attempt_has_left_comes_to_its_end_with_the_run(
    tmp_path: Path, shop: Shop, second: str
) -> None:
    """The next attempt, the last one, does not come to the block."""
    url = f"sqlite:///{tmp_path / 'two.db'}"
    first = App(url, lease=1.0, grace=0.1)
    order(first, shop, result_ttl=1000)
    shop.hold("pack")
    async with first:
        handle = await first.send("order")
        await shop.reached.wait()
    assert (await first.transactions.get(handle)).status == "Processing"
    before, there = App(url, lease=1.0), asyncio.Event()

    @before.task("order", result_ttl=1000)
    async def broken(request: Any) -> str:
        if second == "is cancelled":
            there.set()
            await asyncio.Event().wait()
        if second == "raises":
            raise KeyError("settings")
        return "nothing to do"

    async with before:
        if second == "is cancelled":
            await there.wait()
            assert await before.client._cancel(handle)
        (run,) = (await ended(before, handle)).runs
        (kept,) = [one async for one in Journal((await before.client._get_ledger()).store).latest()]
        lasts = await is_kept(before, handle)
    state, error = {
        "raises": ("failed", "KeyError: 'settings'"),
        "returns": ("succeeded", "its run ended outside of it"),
        "is cancelled": ("cancelled", "its task was cancelled"),
    }[second]
    assert (run.state, kept.stored.status, kept.stored.error) == (state, "Suspending", error)
    assert [one.name for one in kept.stored.steps] == ["pay"]
    assert lasts == (state != "succeeded")
    if lasts:
        last = App(url, lease=1.0)
        order(last, shop, result_ttl=1000)
        shop.let_go()
        async with last:
            await last.transactions.resume(handle)
            await stands(last, handle, "RecoveryComplete")
        assert shop.did == ["pay", "pack", "pack", "ship"]
        await last.client.close()
    await first.client.close()
    await before.client.close()


async def test_one_that_nobody_could_end_is_found_suspended(app: App) -> None:
    """Its run was ended elsewhere while its process had it still, and died."""

    @app.task
    async def work(request: Any) -> None: ...

    async with app:
        store = (await app.client._get_ledger()).store
        handle = await app.send("work")
        await ended(app, handle)
        stored = journals._encode(journals.Stored("work", "work", 1.0, 60.0, 1, turns=1))
        await store.apply([Put(journals.key(handle), stored)])
        assert await app.transactions.list("Processing") == []
        assert [one.id for one in await app.transactions.list("Suspending")] == [handle]
        await store.apply([Put(journals.key(handle), stored)])
        assert (await app.transactions.get(handle)).status == "Suspending"
        with pytest.raises(TransactionConflict, match="it is Suspending"):
            await app.transactions.suspend(handle)


async def test_one_whose_run_is_stopped_as_it_begins_is_suspended(
    app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(app, shop, timeout=0.3, result_ttl=1000)
    async with app:
        store: Any = (await app.client._get_ledger()).store
        apply, slow = store.apply, [True]

        async def applied(changes: Any) -> Any:
            done = await apply(changes)
            if slow and any(change.key.startswith("transaction/") for change in changes):
                slow.clear()
                await asyncio.Event().wait()  # the answer is long in coming
            return done

        monkeypatch.setattr(store, "apply", applied)
        handle = await app.send("order")
        await ended(app, handle)
        assert (await app.transactions.get(handle)).status == "Suspending"
        assert await is_kept(app, handle)
    assert shop.did == []


async def test_a_complete_one_is_not_forgotten_while_its_run_goes_on(
    app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "SPARE", 0.1)
    go = asyncio.Event()

    @app.task(retries=1, backoff=SOON, result_ttl=1000)
    async def work(request: Any) -> None:
        async with transaction() as t:
            await t.step("pay", shop.do, "pay")
        await go.wait()
        raise ConnectionError("after it")

    async with app:
        handle = await app.send("work", result_ttl=0.1)
        await stands(app, handle, "Complete")
        left = (await times_left(app, handle))[f"transaction/{handle}"]
        assert left is not None
        assert left > RESULT_TTL
        go.set()
        await eventually(lambda: has_gone(app, f"transaction/{handle}"))
    assert shop.did == ["pay"]


async def has_gone(app: App, key: str) -> bool:
    return (await (await app.client._get_ledger()).store.get([key])) == [None]


async def test_a_finished_one_whose_events_nobody_issues_any_more_is_forgotten_some_day(
    app: App, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*given: Any) -> None:
        raise BrokerUnavailable("away")

    order(app, shop)
    app.transactions.events = True
    monkeypatch.setattr(app.transactions, "_send", away)
    async with app:
        handle = await app.send("order")
        await handle.result(20)
        left = (await times_left(app, handle))[f"transaction/{handle}"]
        assert left is not None
        assert RESULT_TTL < left < 100 * RESULT_TTL


async def test_a_task_is_kept_whose_run_another_one_has_ended_meanwhile(app: App, shop: Shop) -> None:
    """Who has given its message up elsewhere knew nothing of the transaction yet."""
    order(app, shop, result_ttl=1000)
    shop.hold("pack")
    async with app:
        handle = await app.send("order")
        await shop.reached.wait()
        ledger = await app.client._get_ledger()
        asked = (await ledger._sent(handle)).terms
        elsewhere = await ledger.at_hand(str(handle), "order", asked, 1)
        assert (await ledger.finish(elsewhere, "failed", asked)).state == "failed"
        await stands(app, handle, "Suspending")
        await eventually(lambda: is_kept(app, handle))
        shop.let_go()
        await app.transactions.resume(handle)
        await stands(app, handle, "RecoveryComplete")


async def test_a_run_that_another_one_has_taken_over_suspends_nothing(app: App, shop: Shop) -> None:
    order(app, shop)
    shop.hold("pay")
    async with app:
        handle = await app.send("order")
        await shop.reached.wait()
        ledger = await app.client._get_ledger()
        taken = await ledger.begin(str(handle), "order", (await ledger._sent(handle)).terms, 2)
        admin = (await app.client._get_broker()).admin
        assert admin is not None

        async def settled() -> bool:
            (queue,) = [one for one in await admin.inspect() if one.name == "order"]
            return queue.ready == queue.unsettled == 0

        await eventually(settled)
        assert (await app.transactions.get(handle)).status == "Processing"
        await ledger.finish(taken, "failed", (await ledger._sent(handle)).terms)


def test_the_task_gets_its_id_from_the_transaction(app: App) -> None:
    @app.task
    async def work(task: Task) -> bool:
        async with transaction() as t:
            return t.id == task.taskid and t.status == "Processing"

    async def run() -> Any:
        async with app:
            return await (await app.send("work")).result(20)

    assert asyncio.run(run())
