"""`penstock send`, `call` and `tasks`: what was asked for is done, and told with its exit status."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import COMMAND, Running, Shell
from tests.helpers import eventually_sync
from tests.servers import delete_queues

TASKS = ("add", "echo", "headers", "raw", "greet", "audit", "flaky", "linger")
STATES = "queued, running, succeeded, failed, expired, cancelled"


@pytest.fixture
def shell(penstock: Shell) -> Shell:
    """With the queues of the tasks, which nobody consumes."""
    shutil.copy(Path(__file__).with_name("work.py"), penstock.folder)
    stop(start(penstock))
    return penstock


@pytest.fixture
def working(shell: Shell) -> Iterator[Shell]:
    """With somebody who runs them."""
    running = start(shell)
    yield shell
    stop(running)


def start(shell: Shell) -> Running:
    running = shell.start("run", "work")
    running.until_logged("consuming add")
    return running


def stop(running: Running) -> None:
    running.send(signal.SIGTERM)
    assert running.ended() == 0, running.log


def shown(shell: Shell, taskid: str) -> Any:
    return shell("tasks", "show", taskid, "--json").json


def ended(shell: Shell, taskid: str) -> Any:
    """The record of a task, once it has ended."""
    return eventually_sync(lambda: (record := shown(shell, taskid))["completedAt"] and record, taskid)


def seconds_to_live(record: Any) -> float:
    created, expires = (datetime.fromisoformat(record[name]) for name in ("createdAt", "expiresAt"))
    return (expires - created).total_seconds()


# -- send


def test_a_sent_task_is_run_by_every_task_on_its_topic(working: Shell) -> None:
    (working.folder / "fine").touch()
    taskid = working("send", "hello", '{"name": "Neo"}').out.strip()
    record = ended(working, taskid)
    assert (record["state"], record["topic"], record["content"]) == ("succeeded", "hello", {"name": "Neo"})
    assert [(run["task"], run["result"]) for run in record["runs"]] == [("audit", "fine"), ("greet", "hello Neo")]
    said = working("send", "hello", "-", "--json", input='{"name": "Trinity"}\n').json
    assert ended(working, said["taskid"])["content"] == {"name": "Trinity"}


def test_waiting_prints_what_came_of_each_run(working: Shell) -> None:
    assert working("send", "add", '{"x": 2, "y": 3}', "--wait").out.splitlines()[1] == "add: succeeded: 5"
    record = working("send", "greet", '{"name": "Neo"}', "--wait", "--json", "--timeout", "20").json
    assert record["state"] == "succeeded"
    assert record["runs"][0]["result"] == "hello Neo"


def test_waiting_for_a_failure_is_one_line_and_status_1(working: Shell) -> None:
    result = working("send", "hello", '{"name": "Neo"}', "--wait", status=1)
    lines = result.out.splitlines()
    assert "audit: failed: ValueError: no \\x1b[31mgood at all" in lines
    assert "greet: succeeded: hello Neo" in lines
    taskid = lines[0].partition(":")[0]
    assert result.error == f"task {taskid} failed: audit: ValueError: no \\x1b[31mgood at all (1 of 2 runs failed)"
    result = working("send", "audit", "{}", "--wait", "--json", status=1)
    assert result.json["runs"][0]["error"]["type"] == "ValueError"
    assert "audit: ValueError" in result.error
    command = [*COMMAND, "-v", "send", "audit", "{}", "--wait"]
    done = subprocess.run(command, env=working.environment, capture_output=True)
    assert (done.returncode, b'work.py", line' in done.stderr, b"\x1b" in done.stderr) == (1, True, False)


def test_a_task_that_nobody_takes_expires_and_is_status_1(shell: Shell) -> None:
    result = shell("send", "hello", "{}", "--expires", "0.2", "--wait", "--json", status=1)
    assert result.json["state"] == "expired"
    assert result.error == f"nobody took task {result.json['taskid']} in time for audit, greet"
    assert shell("send", "hello", "--expires", "0", "--wait", "--json", status=1).json["state"] == "expired"
    result = shell("send", "nobody", "--expires", "0.2", "--wait", status=1)
    assert "nobody took task" in result.error


def test_waiting_has_an_end(working: Shell) -> None:
    error = working("send", "linger", "1", "--wait", "--timeout", "1", status=1).error
    assert error.startswith("task ")
    assert error.endswith("it is running")


def test_an_interrupted_wait_says_that_the_task_goes_on(working: Shell) -> None:
    command = [*COMMAND, "-v", "send", "linger", "1", "--wait"]
    said = Path("sender")
    with said.open("wb") as output:
        process = subprocess.Popen(command, env=working.environment, stdout=subprocess.PIPE, stderr=output)
    eventually_sync(lambda: working.said("lingering") and "waiting for its end" in said.read_text())
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    (taskid,) = [one["taskid"] for one in working("tasks", "list", "--json").json]
    assert out == b""
    assert said.read_text().endswith(f"interrupted: task {taskid} goes on (penstock tasks show {taskid})\n")
    assert shown(working, taskid)["state"] == "running"
    working("tasks", "cancel", taskid)


def test_it_expires_in_ten_seconds_unless_told_otherwise(shell: Shell) -> None:
    def lives(*options: str) -> float | None:
        record = shown(shell, shell("send", "echo", "1", *options).out.strip())
        return None if record["expiresAt"] is None else seconds_to_live(record)

    assert lives() == pytest.approx(10)
    assert lives("--delay", "5") == pytest.approx(15)
    assert lives("--expires", "1.5") == pytest.approx(1.5)
    assert lives("--expires", "never") is None


def test_a_unique_key_is_taken_until_its_task_has_ended(shell: Shell) -> None:
    taskid = shell("send", "echo", "1", "--unique", "k").out.strip()
    assert taskid in shell("send", "echo", "2", "--unique", "k", status=1).error
    shell("tasks", "cancel", taskid)
    shell("send", "echo", "3", "--unique", "k")


def test_retries_priority_headers_and_delay_are_passed_on(working: Shell) -> None:
    options = ["--header", "a=b", "--header", "c=d", "--priority", "9", "--delay", "0.2"]
    (run,) = working("send", "headers", "1", *options, "--wait", "--json").json["runs"]
    assert {name: run["result"][name] for name in ("a", "c", "priority")} == {"a": "b", "c": "d", "priority": 9}
    (run,) = working("send", "flaky", '"x"', "--retries", "2", "--wait", "--json", status=1).json["runs"]
    assert [one["outcome"] for one in run["attempts"]] == ["failed"] * 3
    assert working.said("tried") == ["x"] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["send"],
        ["send", "echo", "{not json"],
        ["send", "echo", "1", "--expires", "soon"],
        ["send", "echo", "1", "--expires", "-1"],
        ["send", "echo", "1", "--expires", "inf"],
        ["send", "echo", "1", "--expires", "5", "--delay", "5"],
        ["send", "echo", "1", "--priority", "256"],
        ["send", "echo", "1", "--retries", "-1"],
        ["send", "echo", "1", "--header", "a"],
        ["call"],
        ["call", "echo", "{not json"],
        ["call", "echo", "1", "--expires", "-1"],
        ["call", "echo", "1", "--unique", "k"],
        ["tasks", "lst"],
        ["tasks", "list", "--state", "lost"],
        ["tasks", "list", "--limit", "0"],
        ["tasks", "show"],
        ["tasks", "cancel"],
        ["tasks", "retry"],
    ],
)
def test_wrong_use_is_one_line_and_status_2(penstock: Shell, arguments: list[str]) -> None:
    result = penstock(*arguments, status=2)
    assert result.error
    assert result.out == ""


@pytest.mark.parametrize("command", ["send", "call"])
def test_stdin_holds_one_body(shell: Shell, command: str) -> None:
    assert shell(command, "echo", "-", input="1\n2\n", status=1).error.startswith("stdin is not JSON: ")
    assert shell(command, "echo", "-", status=1).error.startswith("stdin is not JSON: ")
    assert "over the ceiling" in shell(command, "echo", "-", input=b'"' + b"x" * (9 * 2**20), status=1).error
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, command, "echo", "-"], capture_output=True, env=shell.environment
    )
    assert (done.returncode, done.stderr) == (2, b"error: stdin is closed: there is no text to read\n")


@pytest.mark.parametrize(
    "arguments",
    [["send", "x", "1"], ["call", "x"], ["tasks", "show", "x"], ["tasks", "cancel", "x"], ["tasks", "retry", "x"]],
)
def test_where_there_is_no_file_none_is_made(penstock: Shell, arguments: list[str]) -> None:
    assert penstock(*arguments, status=1).error.startswith(f"there is no file {penstock.folder / 'q.db'}")
    store = ["--broker", "memory://", "--store", "sqlite:///tasks.db"]
    if arguments[0] != "call":
        assert penstock(*arguments, *store, status=1).error.startswith(
            f"there is no file {penstock.folder / 'tasks.db'}"
        )
    assert penstock("tasks", "--json").json == []
    assert not list(penstock.folder.glob("*.db"))


# -- call


def test_a_call_prints_what_the_task_returned(working: Shell) -> None:
    assert working("call", "add", '{"x": 2, "y": 3}').out == "5\n"
    assert working("call", "echo", '"a\\tb\\u001b"').out == "a\tb\x1b\n"
    assert working("call", "echo", '"text"', "--json").out == '"text"\n'
    assert working("call", "echo").out == "null\n"
    assert working("call", "echo", "-", input='{"a": [1, null]}').json == {"a": [1, None]}
    assert working("call", "raw").json == {"base64": "/wA="}
    options = ["--priority", "9", "--header", "a=b", "--timeout", "20", "--expires", "20"]
    assert working("call", "headers", *options).json.items() >= {"a": "b", "priority": 9}.items()


def test_a_call_to_no_broker_is_one_line_that_names_it(penstock: Shell) -> None:
    error = penstock("call", "echo", "--timeout", "0.5", "--broker", "redis://127.0.0.1:1", status=1).error
    assert error.startswith("not confirmed within 0.5 s: ")
    assert "127.0.0.1:1" in error


def test_a_call_that_fails_is_one_line_and_its_traceback_is_shown_when_asked_for(working: Shell) -> None:
    result = working("call", "audit", "{}", status=1)
    assert (result.error, result.out) == ("ValueError: no \\x1b[31mgood at all", "")
    done = subprocess.run([*COMMAND, "-v", "call", "audit", "{}"], env=working.environment, capture_output=True)
    assert b'work.py", line' in done.stderr
    assert b"penstock/cli/root.py" not in done.stderr
    assert b"\x1b" not in done.stderr
    assert done.returncode == 1


def test_a_call_that_is_not_answered_is_one_line(working: Shell) -> None:
    assert "no answer" in working("call", "linger", '"quiet"', "--timeout", "1", status=1).error
    assert "no queue is bound to 'nobody'" in working("call", "nobody", status=1).error
    assert "Expected `int`, got `str`" in working("call", "add", '{"x": "2", "y": 3}', status=1).error


def test_a_call_that_nobody_takes_expires(shell: Shell) -> None:
    assert "nobody took the call" in shell("call", "echo", "1", "--expires", "0.2", status=1).error
    assert "nobody took the call" in shell("call", "echo", "1", "--expires", "1", "--timeout", "1", status=1).error
    assert "no answer from 'echo' within 1 s" in shell("call", "echo", "1", "--timeout", "1", status=1).error


# -- tasks


def test_the_latest_tasks_are_listed_newest_first(shell: Shell) -> None:
    ids = [shell("send", name, '{"name": "Neo"}').out.strip() for name in ("echo", "hello", "echo")]
    found = shell("tasks", "--json").json
    assert [one["taskid"] for one in found] == ids[::-1]
    assert [one["topic"] for one in shell("tasks", "list", "--topic", "echo", "--json").json] == ["echo", "echo"]
    shell("tasks", "cancel", ids[0])
    assert [one["taskid"] for one in shell("tasks", "--state", "cancelled", "--json").json] == ids[:1]
    result = shell("tasks", "list", "--limit", "2")
    head, *rows = [line.split() for line in result.out.splitlines()]
    assert head == ["taskid", "topic", "state", "created", "took", "tasks"]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        (ids[2], "echo", "queued", "echo"),
        (ids[1], "hello", "queued", "greet"),
    ]
    assert "audit, greet" in result.out
    assert result.err == "these are the latest 2: --limit shows more\n"
    assert shell("tasks", "list", "--limit", "3").err == ""


def test_one_task_is_shown_whole(working: Shell) -> None:
    taskid = working("send", "hello", '{"name": "Neo\\u001b"}', "--wait", "--json", status=1).json["taskid"]
    text = working("tasks", "show", taskid).out
    for line in ("topic:     hello", "state:     failed", "run of:    audit, failed", "result:    hello Neo\\x1b"):
        assert line in text.splitlines()
    assert "error:     ValueError: no \\x1b[31mgood at all" in text
    assert 'work.py", line' in text
    assert "attempt 1: " in text
    assert "\x1b" not in text
    record = shown(working, taskid)
    assert {"taskid", "topic", "content", "state", "createdAt", "completedAt", "expiresAt", "runs"} == set(record)
    taskid = working("send", "linger", "1").out.strip()
    eventually_sync(lambda: shown(working, taskid)["runs"][0]["progress"] == [3, 10])
    assert "progress:  3 of 10" in working("tasks", "show", taskid).out


@pytest.mark.parametrize("verb", ["show", "cancel", "retry"])
def test_an_unknown_id_is_one_line_and_status_1(shell: Shell, verb: str) -> None:
    assert "there is no task 'nono'" in shell("tasks", verb, "nono", status=1).error


def test_what_is_cancelled_before_it_was_begun_never_is(shell: Shell) -> None:
    taskid, other = (shell("send", "flaky", number, "--expires", "never").out.strip() for number in "12")
    result = shell("tasks", "cancel", taskid, "nono", "--json", status=1)
    assert result.json == [{"taskid": taskid, "state": "cancelled"}]
    assert "there is no task 'nono'" in result.error
    running = start(shell)
    assert ended(shell, other)["state"] == "failed"
    stop(running)
    assert shell.said("tried") == ["2"]
    assert shell("tasks", "cancel", taskid).out == f"{taskid} is cancelled\n"
    assert shell("tasks", "cancel", other, status=1).error == f"task {other} cannot be cancelled: it has failed"


def test_what_nobody_was_there_for_is_cancelled(shell: Shell) -> None:
    taskid = shell("send", "nobody", "1", "--expires", "never").out.strip()
    assert shell("tasks", "cancel", taskid).out == f"{taskid} is cancelled\n"
    assert [one["taskid"] for one in shell("tasks", "list", "--state", "cancelled", "--json").json] == [taskid]
    assert shown(shell, taskid)["completedAt"] is not None
    error = shell("tasks", "retry", taskid, status=1).error
    assert error == f"task {taskid} has no run to try again: nobody was on 'nobody' when it was sent: send it again"


def test_what_runs_is_stopped(working: Shell) -> None:
    taskid = working("send", "linger", "1").out.strip()
    eventually_sync(lambda: working.said("lingering"))
    assert taskid in working("tasks", "cancel", taskid).out
    assert ended(working, taskid)["state"] == "cancelled"
    assert working.said("stopped") == ["1"]
    result = working("send", "linger", "2", "--timeout", "30", "--expires", "never")
    working("tasks", "cancel", result.out.strip())


def test_only_the_runs_that_did_not_succeed_are_tried_again(working: Shell) -> None:
    taskid = working("send", "hello", '{"name": "Neo"}', "--wait", "--json", status=1).json["taskid"]
    (working.folder / "fine").touch()
    assert working("tasks", "retry", taskid, "--json").json == [{"taskid": taskid, "tasks": ["audit"]}]
    record = ended(working, taskid)
    assert record["state"] == "succeeded"
    assert [(run["task"], run["result"], len(run["attempts"])) for run in record["runs"]] == [
        ("audit", "fine", 2),
        ("greet", "hello Neo", 1),
    ]
    error = working("tasks", "retry", taskid, status=1).error
    assert error == f"task {taskid} has no run to try again: it has succeeded"


def test_what_expired_or_was_cancelled_is_run_when_tried_again(shell: Shell) -> None:
    expired = shell("send", "hello", '{"name": "Neo"}', "--expires", "0.1", "--wait", "--json", status=1).json["taskid"]
    cancelled = asyncio.run(send_with_arguments("sqlite:///q.db"))
    shell("tasks", "cancel", cancelled)
    (shell.folder / "fine").touch()
    result = shell("tasks", "retry", expired, cancelled)
    assert result.out.splitlines() == [
        f"{expired} is queued again for audit, greet",
        f"{cancelled} is queued again for add",
    ]
    running = start(shell)
    assert ended(shell, expired)["state"] == "succeeded"
    assert ended(shell, cancelled)["runs"][0]["result"] == 5
    stop(running)


async def send_with_arguments(url: str) -> str:
    """A task that is sent as `add.send(2, y=3)` would."""
    from penstock import App

    app = App(url)

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    async with app.client:
        return str(await add.send(2, y=3))


# -- RabbitMQ


@pytest.fixture
def rabbit(penstock: Shell, amqp_url: str) -> Iterator[Shell]:
    shutil.copy(Path(__file__).with_name("work.py"), penstock.folder)
    penstock.environment["PENSTOCK_BROKER"] = amqp_url
    yield penstock
    penstock.stop()
    asyncio.run(delete_queues(amqp_url, [name + lane for name in TASKS for lane in ("", ".suspects", ".dead")]))


def test_rabbitmq_with_a_store_in_a_file(rabbit: Shell) -> None:
    store = ["--store", "sqlite:///tasks.db"]
    running = rabbit.start("run", "work", *store)
    running.until_logged("consuming add")
    assert rabbit("call", "add", '{"x": 2, "y": 3}').out == "5\n"
    assert rabbit("call", "audit", "{}", status=1).error == "ValueError: no \\x1b[31mgood at all"
    failed = rabbit("send", "hello", '{"name": "Neo"}', "--wait", "--json", *store, status=1).json
    assert [run["state"] for run in failed["runs"]] == ["failed", "succeeded"]
    (rabbit.folder / "fine").touch()
    rabbit.environment["PENSTOCK_STORE"] = "sqlite:///tasks.db"
    assert rabbit("tasks", "retry", failed["taskid"]).out == f"{failed['taskid']} is queued again for audit\n"
    assert ended(rabbit, failed["taskid"])["state"] == "succeeded"
    assert [one["taskid"] for one in rabbit("tasks", "--json").json] == [failed["taskid"]]
    stop(running)


def test_what_must_be_remembered_needs_a_store(rabbit: Shell) -> None:
    stop_at_once = rabbit.start("run", "work")
    stop_at_once.until_logged("consuming add")
    stop(stop_at_once)
    needs = "needs a store: give App(store=…), PENSTOCK_STORE or --store, sqlite:///tasks.db say"
    assert rabbit("send", "echo", "1", "--wait", status=1).error == f"--wait {needs}"
    assert rabbit("send", "echo", "1", "--unique", "k", status=1).error == f"unique= {needs}"
    for arguments in (["list"], ["show", "x"], ["cancel", "x"], ["retry", "x"]):
        assert rabbit("tasks", *arguments, status=1).error == f"penstock tasks {needs}"
    assert rabbit("queues", "echo", "--json").json[0]["ready"] == 0
    assert "no queue is bound to 'nobody'" in rabbit("send", "nobody", status=1).error
    rabbit("send", "echo", "1", "--expires", "never")
    assert rabbit("queues", "echo", "--json").json[0]["ready"] == 1
    assert not list(rabbit.folder.glob("*.db"))
