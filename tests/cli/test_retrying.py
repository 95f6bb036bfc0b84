"""What operators do with tasks: the latest are found among many, what is tried again reaches nobody else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from penstock import App, BrokerUnavailable, Message, PublishError, Task, UnknownTask, Unroutable
from penstock.brokers.base import Broker
from penstock.brokers.memory import MemoryBroker
from penstock.control import tasks
from penstock.control.tasks import PAGE, Conflict
from penstock.message import Outgoing
from penstock.stores.ledger import Ledger
from penstock.stores.memory import MemoryStore
from penstock.stores.records import Body, Sent, TaskRecord, new_taskid


@pytest.fixture
async def ledger(tmp_path: Any) -> Ledger:
    store = MemoryStore(f"memory://{tmp_path.name}")
    await store.open()
    return Ledger(store)


async def record_of(app: App, taskid: str) -> TaskRecord:
    return await tasks.find(await ledger_of(app), taskid)


async def ledger_of(app: App) -> Ledger:
    return await app.client._ledger(5)


async def broker_of(app: App) -> Broker:
    return await app.client._pool.get()


async def retry(app: App, taskid: str, broker: Broker | None = None) -> list[str]:
    return await tasks.retry(await ledger_of(app), broker or await broker_of(app), taskid)


# -- looking


async def test_the_latest_come_first_however_many_are_wanted(ledger: Ledger) -> None:
    start = round(time.time()) - 10_000
    expected = [new_taskid(start + number) for number in range(PAGE * 3)]
    for number, taskid in enumerate(expected):
        await ledger.send(taskid, Sent("t", Body(b"1", {}), start + number, None, [], None))
    expected.reverse()
    for limit in (1, 5, PAGE, PAGE + 1, PAGE * 10):
        assert [one.taskid for one in await tasks.latest(ledger, limit)] == expected[:limit]


async def test_a_few_of_many_are_found(ledger: Ledger) -> None:
    rare = []
    for number in range(PAGE * 2 + 50):
        moment = time.time() - 1000 + number
        taskid = new_taskid(moment)
        topic = "rare" if number % (PAGE + 20) == 0 else "usual"
        await ledger.send(taskid, Sent(topic, Body(b"1", {}), moment, None, ["q"], None))
        if topic == "rare":
            rare.append(taskid)
    await ledger.cancel(rare[0])
    assert [one.taskid for one in await tasks.latest(ledger, 10, topic="rare")] == rare[::-1]
    assert [one.taskid for one in await tasks.latest(ledger, 10, state="cancelled")] == rare[:1]
    assert await tasks.latest(ledger, 10, state="failed") == []


async def test_records_can_be_said_in_json() -> None:
    app = App("memory://", store="memory://json")

    @app.task
    async def raw(value: Any) -> bytes:
        return b"\xff"

    @app.task
    async def text(value: Any) -> bytes:
        return b"text"

    async with app:
        for name, said in (("raw", {"base64": "/w=="}), ("text", "text")):
            record = await app.waitfor(await app.send(name, None), 5)
            found = msgspec.json.decode(msgspec.json.encode(tasks.readable(record)))
            assert found["runs"][0]["result"] == said


# -- cancelling


async def test_what_nobody_was_there_for_is_cancelled_and_what_cannot_be_is_told(ledger: Ledger) -> None:
    await ledger.send("alone", Sent("nobody", Body(b"1", {}), time.time(), None, [], None))
    for _ in range(2):
        assert (await tasks.cancel(ledger, "alone")).state == "cancelled"
    await ledger.send("late", Sent("nobody", Body(b"1", {}), time.time(), time.time() - 1, [], None))
    with pytest.raises(Conflict, match="it has expired"):
        await tasks.cancel(ledger, "late")
    with pytest.raises(UnknownTask):
        await tasks.cancel(ledger, "unknown")


# -- trying again


class Scene:
    """An app of tasks that fail until told otherwise, and what they did."""

    def __init__(self, name: str) -> None:
        self.app = App(f"memory://{name}")
        self.good = False
        self.calls: list[str] = []

    def add(self, name: str, *topics: str, fails: bool = True) -> None:
        @self.app.task(name, topics=topics)
        async def run(task: Task) -> str:
            self.calls.append(name)
            if fails and not self.good:
                raise ValueError("not yet")
            return name

    async def send(self, topic: str) -> str:
        taskid = await self.app.send(topic, {"n": 1})
        await self.app.waitfor(taskid, 5)
        self.calls.clear()
        self.good = True
        return str(taskid)


@pytest.fixture
def scene(tmp_path: Any) -> Scene:
    return Scene(tmp_path.name)


async def test_a_queue_that_is_bound_to_anothers_name_gets_one_copy(scene: Scene) -> None:
    scene.add("a", "t")
    scene.add("b", "t", "a")
    scene.add("c", "t", "a", fails=False)
    async with scene.app:
        taskid = await scene.send("t")
        assert await retry(scene.app, taskid) == ["a", "b"]
        assert (await scene.app.waitfor(taskid, 5)).state == "succeeded"
        assert sorted(scene.calls) == ["a", "b"]
        assert [len(run.attempts) for run in (await record_of(scene.app, taskid)).runs] == [2, 2, 1]


async def test_what_would_reach_others_is_refused_and_changes_nothing(scene: Scene) -> None:
    scene.add("a", "t")
    scene.add("b", "a")

    @scene.app.route("audit", topics=["a"])
    async def audit(message: Message) -> None: ...

    async with scene.app:
        taskid = await scene.send("t")
        before = await record_of(scene.app, taskid)
        with pytest.raises(Conflict, match="publishing to 'a' would also reach 'audit', 'b'"):
            await retry(scene.app, taskid)
        assert await record_of(scene.app, taskid) == before
        assert scene.calls == []


async def test_what_cannot_be_published_has_failed_again_and_can_be_tried_again(scene: Scene) -> None:
    scene.add("a", "t")
    scene.add("b", "t")
    async with scene.app:
        taskid = await scene.send("t")
        elsewhere = MemoryBroker("memory://where-no-queues-are")
        await elsewhere.open()
        with pytest.raises(Unroutable):
            await retry(scene.app, taskid, elsewhere)
        await elsewhere.close()
        record = await record_of(scene.app, taskid)
        assert record.state == "failed"
        assert [run.error and run.error.type for run in record.runs] == ["Unroutable", "Unroutable"]
        assert await retry(scene.app, taskid) == ["a", "b"]
        assert (await scene.app.waitfor(taskid, 5)).state == "succeeded"


class Broken:
    """A broker that goes away with what is published to it."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        raise BrokerUnavailable("gone")


async def test_what_may_not_have_been_published_is_told_and_can_be_mended(scene: Scene) -> None:
    scene.add("a", "t")
    async with scene.app:
        taskid = await scene.send("t")
        broken: Any = Broken(await broker_of(scene.app))
        with pytest.raises(BrokerUnavailable, match="if it stays queued, cancel and retry it: gone"):
            await retry(scene.app, taskid, broken)
        assert (await tasks.cancel(await ledger_of(scene.app), taskid)).state == "cancelled"
        assert await retry(scene.app, taskid) == ["a"]
        assert (await scene.app.waitfor(taskid, 5)).state == "succeeded"


async def test_content_is_what_it_was(scene: Scene) -> None:
    heard: list[Any] = []

    @scene.app.task("keep", topics=["t"])
    async def keep(task: Task) -> None:
        heard.append(task.content)
        if len(heard) == 1:
            raise ValueError

    large = {"text": "x" * 100_000}
    async with scene.app:
        taskid = await scene.app.send("t", large)
        await scene.app.waitfor(taskid, 5)
        await retry(scene.app, taskid)
        assert (await scene.app.waitfor(taskid, 5)).state == "succeeded"
    assert heard == [large, large]


async def test_what_has_nothing_to_try_again_is_told(scene: Scene) -> None:
    scene.add("a", fails=False)
    async with scene.app:
        taskid = await scene.send("a")
        with pytest.raises(Conflict, match="it has succeeded"):
            await retry(scene.app, taskid)
        nobody = await scene.app.send("nobody")
        with pytest.raises(Conflict, match="nobody was on 'nobody' when it was sent"):
            await retry(scene.app, nobody)
        with pytest.raises(UnknownTask):
            await retry(scene.app, "unknown")
