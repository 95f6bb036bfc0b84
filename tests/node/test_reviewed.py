"""What is wrong with one definition, one file or one entry of the store ends neither the node nor the others."""

from __future__ import annotations

import asyncio
import codecs
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock import App, BrokerUnavailable
from penstock.control.cluster import Cluster, Wanted
from penstock.node import book as book_module
from penstock.node.book import Book
from penstock.node.bound import Bound
from penstock.node.definitions import read_text
from penstock.node.documents import InvalidDefinitions, Place, Problem
from penstock.node.folder import Folder
from penstock.node.node import Node
from penstock.node.page import compiled
from penstock.stores import registry as stores
from penstock.stores.base import Entry, Put
from penstock.stores.topics import Topics
from tests.helpers import eventually, queue_info
from tests.node.test_node import ended, hosting, job, result_of, standing, worker, write

SECONDS = 10.0  # in which whatever is right must have been done

# -- files


@pytest.mark.parametrize("inside", ["a.yml", "configs/a.yml"])
@pytest.mark.parametrize(
    "text",
    [
        b"- name: !!bool foo\n",
        b"- name: !unknown x\n",
        b"- name: !!int ''\n",
        b"- name: !!float ''\n",
        b"- name: !!timestamp foo\n",
        b"- name: 2001-99-99\n",
        b"- name: !!omap x\n",
        b"- ? [a]\n  : b\n",
        b"- name: {? {a: b} : c}\n",
        b"- <<: [1, 2]\n  name: x\n",
        codecs.BOM_UTF16_LE + "- name: a\n".encode("utf-16-le"),
    ],
)
def test_yaml_that_has_no_values_is_told_in_a_line(inside: str, text: bytes) -> None:
    with pytest.raises(InvalidDefinitions) as caught:
        read_text(inside, text)
    assert all(len(str(one).splitlines()) == 1 for one in caught.value.problems)


@pytest.mark.parametrize("name", ['"a\\0"', '"a\\nb"', "a.suspects", "a.dead"])
def test_a_job_is_not_named_as_no_queue_of_its_own_could_be(name: str) -> None:
    with pytest.raises(InvalidDefinitions, match="name"):
        read_text("a.yml", f"- name: {name}\n  topics: [a]\n  script: pass\n".encode())


def test_a_topic_is_text_that_every_system_can_carry() -> None:
    with pytest.raises(InvalidDefinitions, match="topics"):
        read_text("a.yml", b'- name: a\n  topics: ["\\0"]\n  script: pass\n')


async def test_a_file_whose_name_is_not_utf_8_is_told_and_nothing_else_is_disturbed(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / os.fsdecode(b"\xff.yml")).write_text("a: 1\n")
        await eventually(lambda: node.complaints, "a complaint")
        assert await result_of(node) == 1


async def test_a_pipe_among_the_files_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yml")
    try:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(InvalidDefinitions, match=r"a\.yml"):
                await asyncio.to_thread(Folder(tmp_path).read)
    finally:  # or the thread would wait for ever
        with (tmp_path / "a.yml").open("r+b", buffering=0) as pipe:
            pipe.write(b"\n")


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, jobs__a=job("return 1"))
    folder = Folder(tmp_path)
    assert folder.read().jobs
    scandir = os.scandir

    def refused(path: str) -> Any:
        if os.path.basename(path) == "jobs":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(InvalidDefinitions, match="jobs"):
        folder.read()


async def test_files_are_looked_at_though_a_database_beside_them_is_never_quiet(tmp_path: Path) -> None:
    async def write_on() -> None:
        while True:
            (tmp_path / "penstock.db").write_text("")
            await asyncio.sleep(0.01)

    writing = asyncio.create_task(write_on())
    changes = Folder(tmp_path).changes()
    try:
        async with asyncio.timeout(SECONDS):
            await anext(changes)
    finally:
        writing.cancel()
        await changes.aclose()  # type: ignore[attr-defined]


async def test_files_are_watched_on_after_others_were_always_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        apply, failed = node.book._apply, 0

        async def apply_none(changes: Sequence[Any]) -> Sequence[int | None]:
            nonlocal failed
            failed += 1
            return await apply(changes) if failed > book_module.TRIES else [None for _ in changes]

        monkeypatch.setattr(node.book, "_apply", apply_none)
        write(tmp_path, a=job("return 2"))
        await eventually(lambda: _returns(node, 2), "the new script")


async def _returns(node: Node, value: Any) -> bool:
    return bool(await result_of(node) == value)


# -- the start


async def test_a_job_that_cannot_be_taken_does_not_keep_the_node_from_starting(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 1") + job("return 2", "b", "[other]"))
    app = App(f"sqlite:///{tmp_path}/penstock.db", grace=1)

    @app.task("b")
    async def b() -> None: ...

    async with asyncio.timeout(SECONDS):
        async with Node(tmp_path, app) as node:
            assert await result_of(node) == 1


async def test_a_paused_worker_does_not_run_at_the_start_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=worker("async def f():\n    await asyncio.sleep(0)"))
    async with hosting(tmp_path) as node:
        await standing(node)
        await node.cluster.pause("worker")
        await node.cluster.restart("worker")
    original = Cluster.wanted

    async def slowly(self: Cluster) -> dict[str, Wanted]:
        found = await original(self)
        await asyncio.sleep(0.3)
        return found

    monkeypatch.setattr(Cluster, "wanted", slowly)
    async with hosting(tmp_path) as node:
        view = await standing(node)
        assert (view.state, view.runs) == ("paused", 0)


async def test_a_topic_that_a_job_lost_while_no_node_ran_reaches_it_no_more(tmp_path: Path) -> None:
    write(tmp_path, a=job("return task.topic", topics="[old, kept]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node, "old") == "old"
    write(tmp_path, a=job("return task.topic", topics="[new, kept]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node, "new") == "new"
        assert await result_of(node, "kept") == "kept"
        assert not await node.ledger.topics.queues("old")


@pytest.mark.parametrize("now", [None, job("return 2", topics="[new]")])
async def test_what_a_node_that_died_at_once_had_still_to_unbind_the_next_one_unbinds(
    tmp_path: Path, now: str | None
) -> None:
    """An operator's change is in the store, and nobody came to carry it out."""
    write(tmp_path, a=job("return 1", topics="[topic, more]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
    store = stores.connect(f"sqlite:///{tmp_path}/penstock.db")
    await store.open()
    book = Book(store)
    await (book.delete("jobs", "job", "operator") if now is None else book.put("jobs", "job", now, "operator"))
    await store.close()
    async with hosting(tmp_path) as node:
        left = ("job",) if now is None else ("job", "new")

        async def unbound() -> bool:
            return (await queue_info(node.app, "job")).bindings == left

        await eventually(unbound, "nothing else is bound")
        assert not await node.ledger.topics.queues("topic")
        assert bool(await node.ledger.topics.queues("new")) == (now is not None)
        assert [entry.key for entry in await node.store.scan("bound/")] == ["bound/job"] * (now is not None)


async def test_a_definition_that_only_other_nodes_understand_keeps_its_topics_and_wishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=job("return 1"), w=worker("async def run():\n    pass"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
        await standing(node)
        await node.cluster.pause("worker")

        def strange(entry: Entry) -> Any:
            if entry.key in ("definition/jobs/job", "definition/workers/worker"):
                return InvalidDefinitions([Problem(Place(entry.key, 1), "it is of another version")])
            return compiled(entry)

        monkeypatch.setattr(book_module, "compiled", strange)
        node.book._read.clear()
        await node.book.put("jobs", "other", job("return 2", "other", "[other]"), "operator")
        roster = node._roster
        assert roster is not None
        await eventually(lambda: roster.jobs == ["other"] and not roster.workers, "what is not understood does not run")
        assert (await queue_info(node.app, "job")).bindings == ("job", "topic")
        assert (await node.cluster.wanted())["worker"].paused
        monkeypatch.undo()
        node.book._read.clear()
        await node.book.put("jobs", "other", job("return 3", "other", "[other]"), "operator")
        await eventually(lambda: "job" in roster.jobs, "it is understood again")
        assert await result_of(node) == 1


async def test_a_job_that_another_node_defines_while_this_one_looks_is_not_unbound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
        read, defined, unbound = Book.read, False, list[str]()

        async def slowly(self: Book) -> Any:
            nonlocal defined
            found = await read(self)
            if self is node.book and not defined:
                defined = True
                await Book(node.store).put("jobs", "late", job("return 2", "late", "[late topic]"), "operator")
                await Bound(node.store).add("late", ["late topic"])
            return found

        async def unregister(self: Topics, name: str, topics: Sequence[str]) -> None:
            unbound.append(name)

        monkeypatch.setattr(Book, "read", slowly)
        monkeypatch.setattr(Topics, "unregister", unregister)
        await node.book.put("jobs", "other", job("return 3", "other", "[other]"), "operator")
        await eventually(lambda: node._roster is not None and "late" in node._roster.jobs, "it is there")
        assert await result_of(node, "other") == 3
        assert unbound == []


# -- what scripts import


async def test_a_module_that_leaves_the_process_when_it_is_imported_is_its_scripts_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "leaves_at_once.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(str(modules))
    write(tmp_path, a=job("return 1") + job("import leaves_at_once", "other", "[other]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
        assert (await ended(node, "other")).runs[0].error is not None


# -- the store


async def test_an_entry_that_nobody_can_read_does_not_end_the_node(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        await node.store.apply(
            [
                Put("definition/jobs/strange", b"\xc1"),
                Put("definition/strange/a", msgspec.msgpack.encode({"text": "a: 1"})),
                Put("wanted/strange", b"\xc1"),
                Put(book_module.BELL, b"", tell=True),
            ]
        )
        write(tmp_path, a=job("return 2"))
        await eventually(lambda: _returns(node, 2), "the new script")
        assert node._life is not None
        assert not node._life.failed.done()


async def test_what_a_worker_logs_need_not_be_text_that_can_be_encoded(tmp_path: Path) -> None:
    write(tmp_path, a=worker("async def f():\n    logger.warning('name: %s', chr(0xdcff))"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: _logged(node), "its log")
        assert node._life is not None
        assert not node._life.failed.done()


async def _logged(node: Node) -> bool:
    assert node._life is None or not node._life.failed.done()
    return any("name:" in line for line in (await standing(node)).log)


# -- changes and the stop


async def test_an_order_that_comes_while_its_worker_is_removed_disturbs_nobody(tmp_path: Path) -> None:
    write(tmp_path, a=worker("async def f():\n    await asyncio.sleep(0)"), b=job("return 1"))
    async with hosting(tmp_path) as node:
        await standing(node)
        assert node._supervisor is not None
        assert node._roster is not None
        resident = node._supervisor.find("worker")
        close, going, go_on = resident.close, asyncio.Event(), asyncio.Event()

        async def slowly() -> None:
            going.set()
            await go_on.wait()
            await close()

        resident.close = slowly  # type: ignore[method-assign]
        (tmp_path / "a.yml").unlink()
        await going.wait()
        node._roster.obey({"worker": Wanted(paused=True, restarts=1)})
        go_on.set()
        await node._roster.settled()
        assert not node._roster.workers


async def test_what_runs_of_a_job_that_was_just_removed_ends_before_the_stop_does(tmp_path: Path) -> None:
    script = f"await asyncio.sleep(0.5)\nopen({str(tmp_path / 'done')!r}, 'w').close()"
    write(tmp_path, a=job(script))
    async with hosting(tmp_path, grace=5.0) as node:
        taskid = await node.send("topic", {})
        await eventually(lambda: _running(node, taskid), "the run")
        await node.book.delete("jobs", "job", "somebody")
        life = node._life
        assert life is not None
        await eventually(lambda: any(one._stopping for one in life._consumers), "its end has begun")
    assert (tmp_path / "done").exists()
    assert not [one for one in asyncio.all_tasks() if one.get_name().startswith("job ")]


async def _running(node: Node, taskid: str) -> bool:
    return (await node.ledger.record(taskid)).state == "running"


async def test_a_job_that_could_not_be_dropped_is_dropped_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        life = node._life
        assert life is not None
        (consumer,) = life._consumers
        stop, failed = consumer.stop, 0

        async def fails_once(grace: float) -> None:
            nonlocal failed
            failed += 1
            if failed == 1:
                raise BrokerUnavailable("gone for a while")
            await stop(grace)

        monkeypatch.setattr(consumer, "stop", fails_once)
        write(tmp_path, a=job("return 2", topics="[other]"))
        await eventually(lambda: life._consumers and consumer not in life._consumers, "another try")
        assert failed == 2
        assert await result_of(node, "other") == 2


async def test_tries_to_take_a_job_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(tmp_path) as node:
        life = node._life
        assert life is not None
        broker = await node.broker()
        declare, failed = broker.declare, 0

        async def fails(queue: Any) -> None:
            nonlocal failed
            failed += 1
            if failed <= 2:
                raise BrokerUnavailable("gone for a while")
            await declare(queue)

        monkeypatch.setattr(broker, "declare", fails)
        write(tmp_path, a=job("return 1"))
        await eventually(lambda: node._roster is not None and node._roster.jobs, "the job")
        assert len(life._runners) == len(life._consumers) == 1
