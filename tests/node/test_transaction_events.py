"""Each change of a transaction's status is a task on `Transaction.<Status>`: none is missing, none is another one's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from penstock import App, TransactionConflict
from penstock.errors import QueueFull
from penstock.node import node as nodes
from penstock.node.node import Node, NodeOptions
from penstock.stores.base import Put
from penstock.stores.ledger import Ledger
from penstock.tasks import journal as journals
from penstock.tasks.journal import STATUSES
from tests.helpers import eventually

JOBS = f"""\
- name: order
  topics: [order.placed]
  script: |-
    async with transaction("order") as t:
        await t.step("pay", context.act, "pay", undo=context.unact)
        await t.step("ship", context.act, "ship", undo=context.unact)
- name: abort
  topics: [order.aborted]
  script: |-
    from penstock import TransactionAborted
    async with transaction() as t:
        raise TransactionAborted("no")
- name: listen
  topics: [{", ".join(f"Transaction.{status}" for status in STATUSES)}]
  script: |-
    context.settings.heard.append((task.taskid, task.topic, dict(task.content)))
- name: act
  code: |-
    async def act(what):
        settings = context.settings
        settings.did.append(what)
        if what in settings.failing:
            raise OSError("no " + what)
        if what in settings.waiting:
            settings.reached.set()
            await settings.waiting[what].wait()
        return what
- name: unact
  code: |-
    async def unact(what):
        context.settings.did.append("un" + what)
"""


class Hosted:
    """A node whose job hears of events."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.app = node.app
        self.heard: list[tuple[str, str, dict[str, Any]]] = self.app.settings.heard

    def of(self, id: str) -> list[str]:
        """The statuses that were heard of a transaction, in the order of its events."""
        mine = sorted((taskid, topic) for taskid, topic, content in self.heard if content["id"] == id)
        return [topic.removeprefix("Transaction.") for _, topic in mine]

    async def until(self, id: str, *statuses: str) -> None:
        await eventually(lambda: self.of(id) == list(statuses), f"{statuses} of {self.heard}")

    async def ended(self, id: str) -> Any:
        return await self.app.waitfor(id, 20)

    async def failed(self, at: str = "ship") -> str:
        """An order that has failed."""
        self.app.settings.failing.add(at)
        id = await self.node.send("order.placed", {})
        await self.ended(id)
        self.app.settings.failing.clear()
        return id

    async def under_way(self, at: str = "pay") -> str:
        """An order in the midst of a step."""
        self.app.settings.waiting[at] = asyncio.Event()
        id = await self.node.send("order.placed", {})
        await self.app.settings.reached.wait()
        self.app.settings.reached.clear()
        return id

    def let_go(self) -> None:
        for event in self.app.settings.waiting.values():
            event.set()
        self.app.settings.waiting.clear()


@asynccontextmanager
async def hosting(folder: Path, events: bool = True) -> AsyncIterator[Hosted]:
    (folder / "jobs.yml").write_text(JOBS)
    settings = {"heard": [], "did": [], "failing": set(), "waiting": {}, "reached": asyncio.Event()}
    app = App(f"sqlite:///{folder / 'penstock.db'}", grace=1.0, settings=settings)
    async with Node(folder, app, NodeOptions(job_transaction_event=events)) as node:
        yield Hosted(node)


async def test_a_jobs_transaction_tells_how_it_goes(tmp_path: Path) -> None:
    async with hosting(tmp_path) as hosted:
        id = await hosted.node.send("order.placed", {})
        await hosted.until(id, "Processing", "Complete")
        contents = [content for _, _, content in sorted(hosted.heard, key=lambda heard: heard[0])]
        assert [set(content) for content in contents] == [{"id", "name", "status", "step", "time"}] * 2
        begun, complete = contents
        assert (begun["name"], begun["status"], begun["step"]) == ("order", "Processing", None)
        assert (complete["status"], complete["step"]) == ("Complete", "ship")
        assert datetime.fromisoformat(begun["time"]) < datetime.fromisoformat(complete["time"])
        assert datetime.fromisoformat(begun["time"]).tzinfo is not None


async def test_each_of_the_ten_statuses_is_told(tmp_path: Path) -> None:
    async with hosting(tmp_path) as hosted:
        verbs = hosted.app.transactions
        recovered = await hosted.failed()
        await verbs.resume(recovered)
        await hosted.until(recovered, "Processing", "Suspending", "RecoveryProcessing", "RecoveryComplete")
        forced = await hosted.failed()
        await verbs.resume(forced, force=True)
        await hosted.until(forced, "Processing", "Suspending", "ForceRecoveryComplete")
        cancelled = await hosted.failed()
        await verbs.cancel(cancelled)
        await hosted.until(cancelled, "Processing", "Suspending", "Cancelling", "Cancelled")
        gone = await hosted.failed()
        await verbs.cancel(gone, force=True)
        await hosted.until(gone, "Processing", "Suspending", "ForceCancelled")
        aborted = await hosted.node.send("order.aborted", {})
        await hosted.until(aborted, "Processing", "Aborted")
        complete = await hosted.node.send("order.placed", {})
        await hosted.until(complete, "Processing", "Complete")
        assert {topic for _, topic, _ in hosted.heard} == {f"Transaction.{status}" for status in STATUSES}
        assert len({taskid for taskid, _, _ in hosted.heard}) == len(hosted.heard)


async def test_switched_off_nothing_is_told(tmp_path: Path) -> None:
    async with hosting(tmp_path, events=False) as hosted:
        id = await hosted.node.send("order.placed", {})
        await hosted.ended(id)
        assert (await hosted.app.transactions.get(id)).status == "Complete"
        topics = {task.sent.topic for task in await hosted.node.ledger.page(100)}
        assert topics == {"order.placed"}


async def test_an_event_that_nobody_is_there_for_expires(tmp_path: Path) -> None:
    async with hosting(tmp_path) as hosted:
        (tmp_path / "jobs.yml").write_text(JOBS.replace("Transaction.Complete, ", ""))
        topics = hosted.node.ledger.topics.queues
        await eventually(lambda: _nobody(topics), "the job has left the topic")
        id = await hosted.node.send("order.placed", {})
        await hosted.until(id, "Processing")
        await hosted.ended(id)
        records = {task.sent.topic: task.as_record(2**20) for task in await hosted.node.ledger.page(100)}
        assert records["Transaction.Complete"].expiresAt is not None
        assert records["Transaction.Processing"].expiresAt is None  # it waits for as long as it takes


async def _nobody(queues: Any) -> bool:
    return not await queues("Transaction.Complete")


# -- none is lost


class Refusing:
    """Has the first events not be sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, app: App, times: int) -> None:
        self.times = times
        self.ids: list[str] = []
        self._send = app.transactions._send
        monkeypatch.setattr(app.transactions, "_send", self.send)

    async def send(self, topic: str, content: Mapping[str, Any], taskid: str) -> None:
        if len(self.ids) < self.times:
            self.ids.append(taskid)
            raise QueueFull("listen", 1)
        await self._send(topic, content, taskid)


async def test_what_could_not_be_sent_is_sent_with_the_next_change_and_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosting(tmp_path) as hosted:
        refused = Refusing(monkeypatch, hosted.app, 1)
        sent: list[str] = []
        monkeypatch.setattr(Ledger, "send", _noting(sent, Ledger.send))
        id = await hosted.under_way()
        assert len(refused.ids) == 1
        hosted.let_go()
        await hosted.until(id, "Processing", "Complete")
        assert [taskid for taskid in sent if id in taskid and taskid != id] == [refused.ids[0], sent[-1]]
        assert await left(hosted) == []


def _noting(sent: list[str], send: Any) -> Any:
    async def noting(self: Ledger, taskid: str, what: Any) -> bool:
        sent.append(str(taskid))
        done: bool = await send(self, taskid, what)
        return done

    return noting


async def left(hosted: Hosted) -> list[str]:
    """The notices of what was not told."""
    return [entry.key for entry in await hosted.node.store.scan("transaction-event/")]


async def test_what_a_dead_process_did_not_send_another_one_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "EVENTS_AGAIN", 0.05)
    monkeypatch.setattr(journals, "LEFT", 0.1)
    async with hosting(tmp_path) as hosted:
        refused = Refusing(monkeypatch, hosted.app, 10**6)
        id = await hosted.node.send("order.placed", {})
        await hosted.ended(id)
        assert len(refused.ids) > 2
        refused.times = 0
        await hosted.until(id, "Processing", "Complete")  # by the look that a node has now and then
        await eventually(lambda: _none_left(hosted), "the notice is gone")


async def _none_left(hosted: Hosted) -> bool:
    return await left(hosted) == []


async def test_what_was_sent_and_not_struck_out_is_the_same_task_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies between the two."""
    async with hosting(tmp_path) as hosted:
        strike = journals._strike
        monkeypatch.setattr(journals, "_strike", lambda stored, told: False)
        id = await hosted.node.send("order.placed", {})
        await hosted.ended(id)
        await hosted.until(id, "Processing", "Complete")
        assert len(await left(hosted)) == 1
        monkeypatch.setattr(journals, "_strike", strike)
        monkeypatch.setattr(journals, "LEFT", 0.0)
        await hosted.app.transactions.tell_left()
        assert await left(hosted) == []
        await hosted.node.send("order.placed", {})
        await eventually(lambda: len(hosted.heard) == 4)  # and not more: those sent twice have run once
        assert hosted.of(id) == ["Processing", "Complete"]


async def test_a_finished_one_is_remembered_for_long_for_what_is_not_told_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "LEFT", 0.0)
    async with hosting(tmp_path) as hosted:
        refused = Refusing(monkeypatch, hosted.app, 10**6)
        id = await hosted.node.send("order.placed", {})
        await hosted.ended(id)

        (entry,) = await hosted.node.store.get([journals.key(id)])
        assert entry is not None
        assert entry.expires_at is not None
        assert entry.expires_at - time.time() > journals.LONG
        refused.times = 0
        await hosted.app.transactions.tell_left()
        await hosted.until(id, "Processing", "Complete")


async def test_a_notice_of_nothing_is_removed_and_a_young_one_is_left_alone(tmp_path: Path) -> None:
    async with hosting(tmp_path) as hosted:
        notices = {"old": journals._encode(0.0), "odd": b"\xc1", "young": journals._encode(4e9)}
        await hosted.node.store.apply([Put(f"transaction-event/{id}", value) for id, value in notices.items()])
        await hosted.app.transactions.tell_left()
        assert await left(hosted) == ["transaction-event/young"]


async def test_two_nodes_that_find_it_do_not_both_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "LEFT", 0.0)
    async with hosting(tmp_path) as hosted:
        refused = Refusing(monkeypatch, hosted.app, 10**6)
        id = await hosted.node.send("order.placed", {})
        await hosted.ended(id)
        refused.times = 0
        sent: list[str] = []
        monkeypatch.setattr(Ledger, "send", _noting(sent, Ledger.send))
        await asyncio.gather(*(hosted.app.transactions.tell_left() for _ in range(5)))
        await hosted.until(id, "Processing", "Complete")
        assert len(sent) == 2


async def test_verbs_wait_for_no_broker_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's change is made, though nobody can be told yet."""
    async with hosting(tmp_path) as hosted:
        id = await hosted.failed()
        await hosted.until(id, "Processing", "Suspending")
        Refusing(monkeypatch, hosted.app, 1)
        assert (await hosted.app.transactions.cancel(id, force=True)).status == "ForceCancelled"
        with pytest.raises(TransactionConflict):
            await hosted.app.transactions.cancel(id)
        monkeypatch.setattr(journals, "LEFT", 0.0)
        await hosted.app.transactions.tell_left()
        await hosted.until(id, "Processing", "Suspending", "ForceCancelled")
