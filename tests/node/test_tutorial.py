"""The tutorial of the document on jobs, as it stands there, with real nodes."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock import Client, ExpirationError, SyncClient
from penstock.testing.faults.serving import NodeProcess
from tests.helpers import eventually, eventually_sync
from tests.servers import delete_queues, rabbitmq_vhost

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(90)]

COMMAND_WITHIN = 60.0  # seconds
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}[+-]\d\d:\d\d")

EXAMPLE = """\
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
ISSUING = """\
taskid = await task("hello", dict(name="task"), expire=30)
other = await send("world", dict(name="send"))
r = await callout(path="/tasks", method="POST", body={"topic": "hello", "content": {"name": "callout"}, "expire": 10})
third = json.loads(r.body)["taskid"]
records = [await waitfor(one) for one in (taskid, other, third)]
r = {"status": r.status, "taskids": [taskid, other, third], "yaml": [one.yaml_format for one in records]}
"""
SLOW = """
- name: slow
  topics: [wait]
  script: |
    import os
    with open("began", "a") as file:
        print(task.taskid, file=file)
    while not os.path.exists("go on"):
        await asyncio.sleep(0.01)
    return "done"
"""
LEDGER = """
- name: {name}
  topics: [both]
  script: |
    import os
    with open(os.environ["LEDGER"], "a") as file:
        print("{name}", task.taskid, file=file)
"""
_vhosts = itertools.count(1)


class System:
    """A message system and store, to which nodes and clients come."""

    def __init__(self, folder: Path, stack: ExitStack, kind: str, url: str) -> None:
        self.kind = kind
        self.url = url
        self.store = f"sqlite:///{folder / 'store.db'}" if kind == "rabbitmq" else url
        self._folder = folder
        self._stack = stack

    def node(self, text: str = "", name: str = "node", *options: str, environment: dict[str, str] | None = None) -> Any:
        """A node whose directory has one file; it is ready."""
        if text:
            file = self._folder / name / "work.yml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        flag = "--amqp-url" if self.kind == "rabbitmq" and name != "b" else "--broker"  # the document's, and ours
        place = [flag, self.url, "--store", self.store]
        node = NodeProcess(self._folder / name, *place, *options, environment=environment)
        self._stack.enter_context(node)
        node.wait_until_ready()
        return node

    def client(self) -> Client:
        return Client(self.url, store=self.store)

    def sync(self) -> SyncClient:
        return self._stack.enter_context(SyncClient(self.url, store=self.store))

    def penstock(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command."""
        command = [sys.executable, "-m", "penstock", *arguments, "--broker", self.url, "--store", self.store]
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_WITHIN, check=False)


@pytest.fixture(params=["sqlite", "redis", "rabbitmq"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[System]:
    with ExitStack() as stack:
        if request.param == "rabbitmq":
            url = stack.enter_context(rabbitmq_vhost(f"-tutorial-{next(_vhosts)}"))
            names = ("example", "chain", "slow", "one", "two")
            stack.callback(lambda: asyncio.run(delete_queues(url, names)))  # it may be everybody's vhost
        elif request.param == "redis":
            url = str(request.getfixturevalue("redis_url"))
        else:
            url = f"sqlite:///{tmp_path / 'queue.db'}"
        yield System(tmp_path, stack, request.param, url)


def issue(node: NodeProcess, topic: str, content: dict[str, Any], expire: float = 10) -> str:
    """A task by `POST /tasks`; its id."""
    answer = node.ask("POST", "/tasks", {"topic": topic, "content": content, "expire": expire})
    assert answer.status == 202, answer
    return str(answer.body["taskid"])


def ended(node: NodeProcess, taskid: str) -> Any:
    """The record of a task, once it has ended."""

    def look() -> Any:
        record = node.get(f"/tasks/{taskid}")
        return record if record["completedAt"] else None

    return eventually_sync(look, f"task {taskid} has ended\n{node.log[-2000:]}")


async def test_the_debug_channel_shows_what_the_example_prints(system: System) -> None:
    node: NodeProcess = await asyncio.to_thread(system.node)
    shown: list[str] = []
    async with system.client() as client:
        await client.subscribe("penstock.debug", lambda said: shown.append(said["text"]))
        put = node.ask("POST", "/definitions", EXAMPLE)
        assert put.status == 200, put
        assert [(one["kind"], one["name"]) for one in put.body] == [("jobs", "example")]
        await eventually(lambda: node.get("/nodes")[0]["jobs"] == 1, "the job is there")
        refused = node.ask("POST", "/tasks", {"topic": "hello", "content": {"name": "nobody"}}, token=None)
        assert refused.status == 401
        first, second = (issue(node, topic, {"name": "amuro"}) for topic in ("hello", "world"))
        await eventually(lambda: len(shown) == 2, "both were shown")
        assert set(shown) == {"Hello, amuro", "Bye, amuro"}
        for taskid, topic in ((first, "hello"), (second, "world")):
            record = ended(node, taskid)
            assert (record["taskid"], record["topic"], record["state"]) == (taskid, topic, "succeeded")
            assert [run["task"] for run in record["runs"]] == ["example"]

        sent = await asyncio.to_thread(system.penstock, "send", "hello", '{"name": "char"}', "--wait")
        assert sent.returncode == 0, sent.stderr
        assert "succeeded" in sent.stdout
        await eventually(lambda: "Hello, char" in shown, "the third was shown")
    assert len(shown) == 3


def assert_three_were_issued(node: NodeProcess, answer: Any) -> None:
    assert answer["status"] == 202
    for taskid, text, topic in zip(answer["taskids"], answer["yaml"], ("hello", "world", "hello"), strict=True):
        told = yaml.safe_load(text)
        assert told["taskid"] == taskid
        assert TIME.fullmatch(told["completedAt"])
        record = ended(node, taskid)
        assert (record["topic"], record["state"]) == (topic, "succeeded")
        assert record["completedAt"] == told["completedAt"]


def test_scripts_issue_tasks_in_each_of_the_documents_ways_and_wait_for_them(system: System) -> None:
    job = ISSUING + "return r"
    once = f'import os\nasync def once():\n{_indented(ISSUING, 2)}\n  with open("new", "w") as file:\n'
    once += '    json.dump(r, file)\n  os.rename("new", "answer")\n'
    written = [
        {"name": "chain", "topics": ["start"], "script": job},
        {"name": "once", "mode": "multi", "watch_interval": 3600, "script": once},
    ]
    node = system.node(EXAMPLE + yaml.safe_dump(written))
    (run,) = ended(node, issue(node, "start", {}))["runs"]
    assert run["state"] == "succeeded", run
    assert_three_were_issued(node, run["result"])
    file = node.folder / "answer"  # its working directory is its own
    eventually_sync(file.exists, f"the worker has its answer\n{node.log}")
    assert_three_were_issued(node, json.loads(file.read_text()))


def _indented(text: str, by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def test_a_task_that_no_node_takes_expires_and_is_never_run(system: System) -> None:
    node = system.node(EXAMPLE)
    assert node.stop() == 0, node.log
    client = system.sync()
    taskid = client.send("hello", {"name": "amuro"}, expires=1)
    with pytest.raises(ExpirationError):
        client.waitfor(taskid, timeout=30)
    node.start()
    node.wait_until_ready()
    assert ended(node, issue(node, "hello", {"name": "char"}))["state"] == "succeeded"
    late = ended(node, taskid)
    assert late["state"] == "expired"
    assert [run["attempts"] for run in late["runs"] if run["attempts"]] == []


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
def test_a_script_that_waits_for_an_expired_task_gets_the_error(system: System) -> None:
    waits = 'await waitfor(await task("nobody.listens", {}, expire=0.2))'
    node = system.node(yaml.safe_dump([{"name": "chain", "topics": ["start"], "script": waits}]))
    (run,) = ended(node, issue(node, "start", {}))["runs"]
    assert run["state"] == "failed"
    assert run["error"]["type"] == "ExpirationError"


@pytest.mark.parametrize("system", ["sqlite"], indirect=True)
def test_content_that_is_no_dict_is_refused(system: System) -> None:
    tries = "await task('hello', task.content.sent)"
    node = system.node(EXAMPLE + yaml.safe_dump([{"name": "chain", "topics": ["start"], "script": tries}]))
    wrong: list[Any] = [["amuro"], "amuro", 1, True, []]
    for content in [*wrong, None]:
        answer = node.ask("POST", "/tasks", {"topic": "hello", "content": content})
        assert answer.status == 422, content
        assert "content" in answer.body["detail"]
    for content in wrong:
        (run,) = ended(node, issue(node, "start", {"sent": content}))["runs"]
        assert run["error"]["type"] == "TypeError", content
    assert node.get("/tasks?topic=hello") == []


def test_beyond_the_queue_size_a_task_is_refused_and_none_that_was_taken_is_lost(system: System) -> None:
    node = system.node(SLOW, "node", "--job-queue-size", "5", "--job-queue-bulk-read-size", "1")
    task = {"topic": "wait", "content": {}, "expire": 60}
    exact = system.kind != "rabbitmq"  # which refuses some later
    sent = [issue(node, "wait", {}, 60)]
    eventually_sync((node.folder / "began").exists, "it runs")
    while (answer := node.ask("POST", "/tasks", task)).status == 202:
        sent.append(answer.body["taskid"])
        assert len(sent) <= (6 if exact else 50), "it is full"
    assert answer.status == 429, answer
    assert "'slow' holds its limit of 5" in answer.body["detail"]
    assert len(sent) >= 5
    (node.folder / "go on").touch()
    assert {ended(node, taskid)["state"] for taskid in sent} == {"succeeded"}
    began = (node.folder / "began").read_text().split()
    assert Counter(began) == Counter(sent)
    assert ended(node, issue(node, "wait", {}))["state"] == "succeeded"


def test_all_jobs_on_a_topic_run_once_each_in_a_cluster_of_two(system: System, tmp_path: Path) -> None:
    environment = {"LEDGER": str(tmp_path / "ledger")}
    text = LEDGER.format(name="one") + LEDGER.format(name="two")
    node = system.node(text, "a", environment=environment)
    other = system.node("", "b", environment=environment)
    eventually_sync(lambda: [view["jobs"] for view in node.get("/nodes")] == [2, 2], "both have the jobs")
    sent = [issue(one, "both", {}) for one in [node, other] * 10]
    records = [ended(node, taskid) for taskid in sent]
    assert [record["state"] for record in records] == ["succeeded"] * 20
    for record in records:
        assert sorted(run["task"] for run in record["runs"]) == ["one", "two"]
        assert [len(run["attempts"]) for run in record["runs"]] == [1, 1]
    done = Counter(tuple(line.split()) for line in (tmp_path / "ledger").read_text().splitlines())
    assert done == Counter((name, taskid) for name in ("one", "two") for taskid in sent)


def test_sigterm_lets_the_running_job_finish(system: System) -> None:
    node = system.node(SLOW)
    taskid = issue(node, "wait", {})
    eventually_sync((node.folder / "began").exists, "it runs")
    node.terminate()
    with pytest.raises(TimeoutError):
        node.ended(within=1)
    (node.folder / "go on").touch()
    assert node.ended() == 0, node.log
    record = system.sync().waitfor(taskid, timeout=10)
    assert record.state == "succeeded"
    assert [(run.result, len(run.attempts)) for run in record.runs] == [("done", 1)]
