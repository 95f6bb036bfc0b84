"""`penstock publish`: what it says was published is, and nothing else."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from penstock.testing.faults import RedisNode
from tests.cli.conftest import COMMAND, Shell, at_a_terminal
from tests.helpers import eventually_sync
from tests.servers import require


@pytest.fixture
def shell(penstock: Shell) -> Shell:
    penstock.make_queues()
    return penstock


def test_one_message_arrives_as_it_stands(shell: Shell) -> None:
    id = shell("publish", "orders", '{"n": 1.50}', "--key", "k", "--header", "a=b").out.strip()
    assert re.fullmatch("[0-9a-f]{32}", id)
    assert shell("publish", "all", '"by topic"', "--id", "mine", "--json").json == {"id": "mine"}
    shell.consume(lambda: len(shell.said("took")) == 2)
    assert sorted(shell.said("took")) == ["by topic", '{"n": 1.50}']


def test_an_error_on_a_redis_that_keeps_nothing_is_one_line(penstock: Shell) -> None:
    require("redis")
    with RedisNode(penstock.folder / "redis", appendonly="no") as node:
        error = penstock("publish", "nowhere", "1", "--broker", node.url(), status=1).error
        assert error == "no queue is bound to 'nowhere': start its consumer once, or check the name"
        assert "there is no task" in penstock("tasks", "show", "x", "--store", node.url(), status=1).error
        found = {one["what"]: one for one in penstock("doctor", "--json", "--broker", node.url()).json}
        assert found["durable"]["detail"] == "what it confirms may be lost with its process, or in a power cut"


def test_what_durable_takes_on_nats_is_said(penstock: Shell, nats_url: str) -> None:
    found = {one["what"]: one for one in penstock("doctor", "--json", "--broker", nats_url).json}
    assert found["durable"]["health"] == "note"
    assert "sync_interval: always" in found["durable"]["detail"]


def test_ten_thousand_lines_arrive_once_each(shell: Shell) -> None:
    lines = "".join(f'{{"n": {n}}}\n' + "\n" * (n % 100 == 0) for n in range(10_000))
    assert shell("publish", "orders", "-", "--json", input=lines).json == {"published": 10_000}
    assert shell.queue()["ready"] == 10_000
    shell.consume(lambda: len(shell.said("took")) >= 10_000)
    assert sorted(shell.said("took")) == sorted(f'{{"n": {n}}}' for n in range(10_000))


def test_bad_line_is_named_and_everything_before_it_is_published(shell: Shell) -> None:
    lines = [str(n) for n in range(2500)]
    lines[1704] = "{oops"
    error = shell("publish", "orders", "-", input="\n".join(lines), status=1).error
    assert error.startswith("line 1705: not JSON")
    assert "1704 published" in error
    assert shell.queue()["ready"] == 1704


@pytest.mark.parametrize("bad", [b'"\xff"', b"[" * 3000 + b"]" * 3000])
def test_line_that_no_parser_takes_is_named_too(shell: Shell, bad: bytes) -> None:
    error = shell("publish", "orders", "-", input=b"1\n" + bad + b"\n3\n", status=1).error
    assert error.startswith("line 2: not JSON")
    assert "1 published" in error
    assert shell.queue()["ready"] == 1


def test_closed_stdin_is_one_line(shell: Shell) -> None:
    command = [*COMMAND, "publish", "orders", "-"]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, env=shell.environment)
    assert done.stderr == b"error: stdin is closed: there are no lines to read\n"
    assert done.returncode == 2


def test_blank_lines_count_as_lines_but_are_no_messages(shell: Shell) -> None:
    error = shell("publish", "orders", "-", input="1\n\n\r\n2\nbad", status=1).error
    assert error.startswith("line 5:")
    assert "2 published" in error
    assert shell.queue()["ready"] == 2


def test_too_long_a_line_is_refused_without_being_read_whole(shell: Shell) -> None:
    data = b"1\n" + b'"' + b"x" * (20 * 2**20) + b'"\n3\n'
    error = shell("publish", "orders", "-", input=data, status=1).error
    assert error.startswith("line 2: body of")
    assert "1 published" in error


@pytest.mark.parametrize("body", ["1", "-"])
def test_unroutable_is_an_error_and_nothing_is_stored(shell: Shell, body: str) -> None:
    error = shell("publish", "nowhere", body, input="1\n2\n", status=1).error
    assert "no queue is bound to 'nowhere'" in error
    assert shell.queue()["ready"] == 0


def test_lines_of_a_slow_source_are_not_held_up(shell: Shell) -> None:
    process = subprocess.Popen(
        [*COMMAND, "publish", "orders", "-"], env=shell.environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"1\n2\n3")
    process.stdin.flush()
    eventually_sync(lambda: shell.queue()["ready"] == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"interrupted: 2 published" in err
    assert b"Traceback" not in err


def test_delay_priority_and_expiry_are_passed_on(shell: Shell) -> None:
    shell("publish", "orders", '"low"')
    shell("publish", "orders", '"high"', "--priority", "9")
    shell("publish", "orders", '"later"', "--delay", "3600")
    shell("publish", "orders", '"gone"', "--expires", "0.01")
    shell.consume(lambda: len(shell.said("took")) == 2)
    assert shell.said("took") == ["high", "low"]
    assert shell.queue()["ready"] == 1


def test_progress_is_for_terminals(shell: Shell) -> None:
    assert shell("publish", "orders", "-", input="1\n").err == ""
    (shell.folder / "lines").write_text("1\n2\n")
    ours = os.open("lines", os.O_RDONLY)
    printed = at_a_terminal(shell, ["publish", "orders", "-"], stdin=ours)
    os.close(ours)
    assert "publishing to orders" in printed
    assert "published 2 to orders" in printed
