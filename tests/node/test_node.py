"""A node hosts what its directory says, changes with it, and is not disturbed by what is wrong in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock import App, BrokerRefused, ExpirationError, QueueFull, StoreRequired
from penstock.control.cluster import WorkerOnNode
from penstock.life import Life
from penstock.node.documents import InvalidDefinitions
from penstock.node.node import Node, NodeOptions
from penstock.stores.records import TaskRecord
from tests.helpers import eventually, queue_info

HELLO = """\
- name: example
  topics:
    - hello
    - world
  script: |-
    if task.topic=="hello":
        qprint("Hello, {}".format(task.content.name))
    elif task.topic=="world":
        qprint("Bye, {}".format(task.content.name))
"""


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yml"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(path)


def job(script: str, name: str = "job", topics: str = "[topic]") -> str:
    body = "\n".join(f"    {line}" for line in script.splitlines())
    return f"- name: {name}\n  topics: {topics}\n  script: |-\n{body}\n"


def worker(script: str, name: str = "worker", mode: str = "multi", interval: str = "0.05") -> str:
    body = "\n".join(f"    {line}" for line in script.splitlines())
    return f"- name: {name}\n  mode: {mode}\n  watch_interval: {interval}\n  script: |-\n{body}\n"


@asynccontextmanager
async def hosting(folder: Path, options: NodeOptions | None = None, grace: float = 1.0) -> AsyncIterator[Node]:
    app = App(f"sqlite:///{folder}/penstock.db", grace=grace)
    async with Node(folder, app, options) as node:
        yield node


async def result_of(node: Node, topic: str = "topic", content: dict[str, Any] | None = None) -> Any:
    """What the one run of a task returned; what it raised is raised."""
    (run,) = (await ended(node, topic, content)).runs
    if run.error is not None:
        raise RuntimeError(f"{run.error.type}: {run.error.message}")
    return run.result


async def ended(node: Node, topic: str = "topic", content: dict[str, Any] | None = None) -> TaskRecord:
    return await node.app.waitfor(await node.send(topic, content or {}), 10)


async def standing(node: Node, name: str = "worker") -> WorkerOnNode:
    """A worker, as its own node tells."""
    found = await eventually(lambda: _find(node, name), f"worker {name} on the node")
    assert isinstance(found, WorkerOnNode)
    return found


async def _find(node: Node, name: str) -> WorkerOnNode | None:
    for view in await node.cluster.workers():
        if view.name == name:
            return view.nodes[0]
    return None


async def seen(node: Node) -> list[str]:
    """Subscribe to the debug channel: the texts that come in."""
    heard: list[str] = []
    await node.app.client.subscribe("penstock.debug", lambda said: heard.append(said["text"]))
    return heard


# -- jobs, and what their scripts see


async def test_the_documents_job_says_hello_and_bye(tmp_path: Path) -> None:
    write(tmp_path, jobs=HELLO)
    async with hosting(tmp_path) as node:
        heard = await seen(node)
        await ended(node, "hello", {"name": "amuro"})
        await ended(node, "world", {"name": "amuro"})
        await eventually(lambda: heard == ["Hello, amuro", "Bye, amuro"], "both greetings")


async def test_a_job_issues_others_and_waits_for_them(tmp_path: Path) -> None:
    script = """\
    first = await task("next", dict(n=1))
    second = await send("next", {"n": 2}, expire=30)
    records = [await waitfor(one) for one in (first, second)]
    assert all(record.taskid and record.completedAt for record in records), records
    return [record.runs[0].result for record in records] + ["completedAt:" in records[0].yaml_format]
    """
    write(tmp_path, a=job(script), b=job("return task.content.n * 10", "next", "[next]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == [10, 20, True]


async def test_every_job_on_a_topic_runs_once(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 'a'", "a") + job("return 'b'", "b"))
    async with hosting(tmp_path) as node:
        record = await ended(node)
        assert [(run.task, run.result) for run in record.runs] == [("a", "a"), ("b", "b")]


NAMES = """\
import inspect
assert asyncio.get_running_loop() and json.dumps({}) == "{}" and aiohttp.ClientSession
assert MU({"a": [{"b": 1}]}).a[0].b == 1
assert Runtime.running()
assert logger.name == "penstock.script.job", logger.name
assert all(inspect.iscoroutinefunction(one) for one in (get_service_config, send, waitfor, callout))
assert all(callable(one) for one in (qprint, task, publish, broadcast, call))
assert context.settings.uuid and context.double(4) == 8 and "double" in dir(context)
return await context.later(task.content.n)
"""
FUNCTIONS = """\
- name: double
  code: |-
    def double(n):
        return 2 * n
- name: later
  category: sums
  code: |-
    async def later(n):
        await asyncio.sleep(0)
        return context.double(n) + 1
"""


async def test_a_script_sees_every_name_without_an_import(tmp_path: Path) -> None:
    write(tmp_path, a=job(NAMES), f=FUNCTIONS)
    async with hosting(tmp_path) as node:
        assert await result_of(node, content={"n": 3}) == 7


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("context.dubble(1)", "did you mean 'double'"),
        ("context.double = 1", "defined in YAML"),
        ("await get_service_config('hand')", "did you mean 'handson'"),
        ("await get_service_config('zzz')", "there are handson"),
        ("await get_service_config('handson')", "NOT_THERE is not set"),
        ("await task('other', [1])", "TypeError: the content of a task is a dict, not list"),
        ("await task('other', {}, expire=-1)", "expires"),
        ("await callout(path='//elsewhere/', method='GET')", "begins with one '/'"),
        ("await callout(path='/tasks')", "serves no HTTP"),
        ("return {1, 2}.pop", "Unencodable"),
        ("import no_such_module", "No module named"),
    ],
)
async def test_what_a_script_does_wrong_is_told(tmp_path: Path, script: str, says: str) -> None:
    write(tmp_path, a=job(script), f=FUNCTIONS, configs__handson="region: ${NOT_THERE}\n")
    async with hosting(tmp_path) as node:
        with pytest.raises(RuntimeError, match=says):
            await result_of(node)


async def test_a_configuration_is_a_dict_or_an_mu_with_the_environment_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_REGION", "eu")
    script = """\
    plain = await get_service_config("handson")
    assert type(plain) is dict, type(plain)
    return [plain["aws"]["region"], (await get_service_config("handson", mu_conversion=True)).aws.region]
    """
    write(tmp_path, a=job(script), configs__handson="aws:\n  region: ${TEST_REGION}\n")
    async with hosting(tmp_path) as node:
        assert await result_of(node) == ["eu", "eu"]


async def test_no_more_run_at_once_than_are_read_at_once(tmp_path: Path) -> None:
    script = """\
    running = context.settings.setdefault("running", [])
    running.append(1)
    await asyncio.sleep(0.02)
    most = len(running)
    running.pop()
    return most
    """
    write(tmp_path, a=job(script, "a", "[a]") + job(script, "b", "[b]"))
    async with hosting(tmp_path, NodeOptions(job_queue_bulk_read_size=3)) as node:
        sent = [await node.send(topic, {}, 30) for topic in "ab" * 10]
        records = [await node.app.waitfor(one, 10) for one in sent]
        assert max(record.runs[0].result for record in records) == 3


async def test_jobs_that_wait_for_others_hold_no_turn_of_theirs(tmp_path: Path) -> None:
    waits = """\
    sent = [await task("other", {}, expire=None) for _ in range(2)]
    return [one.runs[0].result for one in await asyncio.gather(*map(waitfor, sent))]
    """
    write(tmp_path, a=job(waits), b=job("return task.topic", "other", "[other]"))
    async with hosting(tmp_path, NodeOptions(job_queue_bulk_read_size=1)) as node:
        assert await result_of(node) == ["other", "other"]
        assert await result_of(node) == ["other", "other"]


async def test_a_full_queue_refuses_a_task(tmp_path: Path) -> None:
    write(tmp_path, a=job("await asyncio.sleep(60)"))
    options = NodeOptions(job_queue_size=3, job_queue_bulk_read_size=1)
    async with hosting(tmp_path, options, grace=0.1) as node:
        sent = [await node.send("topic", {}) for _ in range(3)]
        with pytest.raises(QueueFull, match="limit of 3"):
            await node.send("topic", {})
        assert len(set(sent)) == 3


# -- workers


async def test_a_worker_that_ends_is_run_again_and_one_that_raises_backs_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends, raises = worker("async def f():\n    logger.info('ran')", "ends"), worker("def f():\n    1 / 0", "raises")
    write(tmp_path, w=ends + raises)
    caplog.set_level(logging.INFO)
    async with hosting(tmp_path) as node:
        await eventually(lambda: caplog.text.count("penstock.script.ends") >= 3, "three runs")
        failing = await eventually(lambda: _failed(node, "raises"), "a failure")
        assert failing.last_error == "ZeroDivisionError: division by zero"
        await eventually(lambda: _is(node, "raises", "failing"), "it waits for its backoff")
        assert "w.yml" in caplog.text  # the traceback names the file


async def _failed(node: Node, name: str) -> WorkerOnNode | None:
    found = await _find(node, name)
    return found if found is not None and found.failures else None


async def test_what_fails_before_its_function_is_there_is_the_workers_own_failure(tmp_path: Path) -> None:
    write(tmp_path, w=worker("import no_such_module\nasync def f(): pass", "broken") + worker("def g(): pass", "fine"))
    async with hosting(tmp_path) as node:
        broken = await eventually(lambda: _failed(node, "broken"), "a failure")
        assert "No module named 'no_such_module'" in broken.last_error
        assert not (await standing(node, "fine")).failures


LOOP = "async def f():\n    while Runtime.running():\n        await asyncio.sleep(0.01)\n    logger.info('{0} ends')"


async def test_one_worker_is_replaced_while_the_others_run_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, a=worker(LOOP.format("old"), "a", "single"), b=worker(LOOP.format("b"), "b"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: _running(node, "a"), "a runs")
        write(tmp_path, a=worker("logger = logger\n" + LOOP.format("new"), "a", "single"))
        await eventually(lambda: "old ends" in caplog.text, "the old one ended by itself")
        await eventually(lambda: _running(node, "a"), "the new one runs")
        other = await standing(node, "b")
        assert (other.runs, other.state) == (1, "running")
        assert "b ends" not in caplog.text


async def _running(node: Node, name: str) -> bool:
    found = await _find(node, name)
    return found is not None and found.state == "running"


async def test_a_worker_that_will_not_end_holds_up_no_other_change(tmp_path: Path) -> None:
    stubborn = """\
    async def f():
        while not context.settings.get("enough"):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass
    """
    write(tmp_path, a=worker(stubborn, "stubborn"))
    async with hosting(tmp_path, grace=0.1) as node:
        await eventually(lambda: _running(node, "stubborn"), "it runs")
        (tmp_path / "a.yml").unlink()
        write(tmp_path, b=worker(LOOP.format("b"), "b"), c=job("return 1"))
        await eventually(lambda: _running(node, "b"), "the other one runs")
        assert await result_of(node) == 1
        node.app.settings.enough = True


async def test_an_operator_pauses_resumes_and_restarts_a_worker(tmp_path: Path) -> None:
    write(tmp_path, a=worker(LOOP.format("a"), "a"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: _running(node, "a"), "it runs")
        await node.cluster.pause("a")
        await eventually(lambda: _is(node, "a", "paused"), "it is paused")
        assert (await node.cluster.worker("a")).paused
    async with hosting(tmp_path) as node:  # who comes later knows
        await eventually(lambda: _is(node, "a", "paused"), "it is paused still")
        await node.cluster.resume("a")
        await eventually(lambda: _running(node, "a"), "it runs again")
        before = (await standing(node, "a")).runs
        await node.cluster.restart("a")
        await eventually(lambda: _ran(node, "a", before + 1), "it was run anew")


async def _is(node: Node, name: str, state: str) -> bool:
    found = await _find(node, name)
    return found is not None and found.state == state


async def _ran(node: Node, name: str, times: int) -> bool:
    found = await _find(node, name)
    return found is not None and found.runs >= times


# -- definitions that change, and that are wrong


async def test_all_that_is_wrong_is_told_before_anything_starts(tmp_path: Path) -> None:
    write(tmp_path, a=worker("async def f(:", "a"), b=job("return 1") + "- name: x\n  colour: red\n", fine=HELLO)
    app = App(f"sqlite:///{tmp_path}/penstock.db")
    with pytest.raises(InvalidDefinitions) as raised:
        await Node(tmp_path, app).__aenter__()
    assert [str(one.place) for one in raised.value.problems] == ["a.yml:5", "b.yml:5"]
    assert not (tmp_path / "penstock.db").exists()


async def test_a_broken_file_changes_nothing_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        write(tmp_path, b=job("return 2", "second", "[second]"), a=job("return ("))
        await eventually(lambda: "a.yml:4: not Python" in caplog.text, "it is named")
        assert await result_of(node) == 1
        write(tmp_path, a=job("return 3"))
        await eventually(lambda: _result_is(node, 3), "the mended file is read")
        assert await result_of(node, "second") == 2


async def _result_is(node: Node, value: Any) -> bool:
    return bool(await result_of(node) == value)


async def test_a_job_that_is_gone_gets_no_more_tasks(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 'a'", "a"), b=job("return 'b'", "b"))
    async with hosting(tmp_path) as node:
        assert len((await ended(node)).runs) == 2
        (tmp_path / "a.yml").unlink()
        await eventually(lambda: _has_runs(node, 1), "only the other one runs")
        (tmp_path / "b.yml").unlink()
        await eventually(lambda: _bindings(node, "b", ("b",)), "nothing is bound to the topic")
        taskid = await node.send("topic", {}, 0.3)
        with pytest.raises(ExpirationError):
            await node.app.waitfor(taskid, 10)
        write(tmp_path, a=job("return 'again'", "a"))
        await eventually(lambda: _has_runs(node, 1), "it is back")
        assert await result_of(node) == "again"


async def _has_runs(node: Node, count: int) -> bool:
    try:
        return len((await node.app.waitfor(await node.send("topic", {}, 0.3), 10)).runs) == count
    except ExpirationError:
        return False


async def _bindings(node: Node, queue: str, bound: tuple[str, ...]) -> bool:
    return (await queue_info(node.app, queue)).bindings == bound


async def test_a_jobs_topics_change_with_its_definition(tmp_path: Path) -> None:
    write(tmp_path, a=job("return task.topic", topics="[one, two]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node, "one") == "one"
        write(tmp_path, a=job("return task.topic", topics="[two, three]"))
        await eventually(lambda: _bindings(node, "job", ("job", "three", "two")), "the new topics are bound")
        assert await result_of(node, "three") == "three"
        assert await result_of(node, "two") == "two"
        with pytest.raises(ExpirationError):
            await node.app.waitfor(await node.send("one", {}, 0.3), 10)


async def test_what_left_the_directory_while_no_node_ran_is_gone(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 1"), b=job("return 2", "b", "[other]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
    (tmp_path / "a.yml").unlink()
    async with hosting(tmp_path) as node:
        assert await result_of(node, "other") == 2
        assert await _bindings(node, "job", ("job",))
        with pytest.raises(ExpirationError):
            await node.app.waitfor(await node.send("topic", {}, 0.3), 10)


async def test_functions_and_configurations_change_without_a_restart(tmp_path: Path) -> None:
    script = "return [context.double(2), (await get_service_config('c'))['n']]"
    write(tmp_path, a=job(script), f=FUNCTIONS, configs__c="n: 1")
    async with hosting(tmp_path) as node:
        assert await result_of(node) == [4, 1]
        write(tmp_path, f=FUNCTIONS.replace("2 * n", "20 * n"), configs__c="n: 7")
        await eventually(lambda: _result_is(node, [40, 7]), "both have changed")


async def test_missing_modules_are_named_before_a_script_needs_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = "import no_such_module.part\nfrom json import dumps\nfrom . import x\nreturn 1"
    write(tmp_path, a=job("return 1") + job(script, "b", "[b]"))
    async with hosting(tmp_path):
        (told,) = [one for one in caplog.messages if "not installed" in one]
        assert told.startswith("a.yml:5: b imports no_such_module.part, and no_such_module is not installed")


async def test_missing_modules_are_named_whenever_a_definition_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:

        def named(module: str) -> bool:
            return any(f"{module} is not installed" in one for one in caplog.messages)

        await node.book.put("jobs", "b", job("import nosuch_a\nreturn 1", "b", "[b]"), "operator")
        await eventually(lambda: named("nosuch_a"), "a new one's are named")
        write(tmp_path, a=job("import nosuch_b\nreturn 1"))
        await eventually(lambda: named("nosuch_b"), "a changed one's are named")
        write(tmp_path, w=worker("async def run():\n    import nosuch_c"))
        await eventually(lambda: named("nosuch_c"), "a worker's are named")


async def test_content_that_is_no_dict_is_the_tasks_failure_and_none_is_an_empty_one(tmp_path: Path) -> None:
    write(tmp_path, a=job("return task.content.get('name', 'nobody')"))
    async with hosting(tmp_path) as node:
        (run,) = (await node.app.waitfor(await node.app.send("topic", None), 10)).runs
        assert run.result == "nobody"
        (run,) = (await node.app.waitfor(await node.app.send("topic", [1]), 10)).runs
        assert run.error is not None
        assert run.error.message == "the content of a task is a dict, not list"
        for topic in ("topic.dead", "job.suspects"):
            with pytest.raises(ValueError, match="is no topic"):
                await node.send(topic, {})


async def test_what_the_built_in_names_raise_can_be_caught_by_name(tmp_path: Path) -> None:
    script = """
caught = []
try:
    await waitfor(await task("nobody", {}, expire=0.1))
except ExpirationError:
    caught.append("expired")
try:
    await publish("nowhere", 1)
except Unroutable:
    caught.append("unroutable")
try:
    await get_service_config("none")
except ConfigError:
    caught.append("config")
return caught
"""
    write(tmp_path, a=job(script))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == ["expired", "unroutable", "config"]


@pytest.mark.blocks
async def test_a_job_that_blocks_the_loop_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, a=job("import time\ntime.sleep(2.6)", "stubborn"))
    async with hosting(tmp_path) as node:
        await ended(node)
        assert any("stubborn (" in one for one in caplog.messages), caplog.messages


async def test_a_node_that_its_broker_will_not_have_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: node.ready, "it is ready")
        take, refusing = Life.take, True

        async def refused(self: Life, task: Any) -> None:
            if refusing:
                raise BrokerRefused("not with these rights")
            await take(self, task)

        monkeypatch.setattr(Life, "take", refused)
        write(tmp_path, b=job("return 2", "b", "[b]"))
        await eventually(lambda: not node.ready, "it says that it cannot consume")
        refusing = False
        await eventually(lambda: node.ready, "it can")
        assert await result_of(node, "b") == 2


async def test_a_workers_last_lines_are_as_many_as_there_is_room_for(tmp_path: Path) -> None:
    write(tmp_path, a=worker("async def run():\n    for n in range(60): logger.warning('line %d', n)", interval="1000"))
    async with hosting(tmp_path) as node:

        async def lines() -> list[str]:
            return (await standing(node)).log

        await eventually(lambda: _has_lines(lines), "its log is told")
        assert len(await lines()) == 50
        assert (await lines())[-1].endswith("line 59")


async def _has_lines(lines: Callable[[], Awaitable[list[str]]]) -> bool:
    return any("line 59" in line for line in await lines())


async def test_a_node_needs_a_store() -> None:
    with pytest.raises(StoreRequired):
        Node(Path(), App("nats://127.0.0.1"))


async def test_a_node_that_ends_is_no_more_among_the_nodes(tmp_path: Path) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path, NodeOptions(name="one")) as first, hosting(tmp_path, NodeOptions(name="two")):
        nodes = await eventually(lambda: _nodes(first, 2), "both are there")
        assert [one.name for one in nodes] == ["one", "two"]
        await eventually(lambda: _masters(first, 1), "one master")
    async with hosting(tmp_path, NodeOptions(name="three")) as node:
        (only,) = await eventually(lambda: _nodes(node, 1), "one is there")
        assert only.name == "three"
        assert node.ready


async def _nodes(node: Node, count: int) -> Any:
    found = await node.cluster.nodes()
    return found if len(found) == count else None


async def _masters(node: Node, count: int) -> bool:
    return sum(one.master for one in await node.cluster.nodes()) == count


async def test_a_job_under_way_ends_before_its_node_does(tmp_path: Path) -> None:
    write(tmp_path, a=job("context.settings.begun.set()\nawait asyncio.sleep(0.3)\nreturn 'whole'"))
    begun = asyncio.Event()
    async with hosting(tmp_path, grace=10) as node:
        node.app.settings.begun = begun
        taskid = await node.send("topic", {})
        await begun.wait()
    async with App(f"sqlite:///{tmp_path}/penstock.db").client as client:
        assert (await client.waitfor(taskid, 1)).runs[0].result == "whole"
