"""Exit codes, errors on one line, settings from the right place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Shell, at_a_terminal

EVERY = [
    "run",
    "serve",
    "publish",
    "send",
    "call",
    "queues",
    "dead",
    "tasks",
    "transactions",
    "workers",
    "nodes",
    "shell",
    "config",
    "check",
    "doctor",
]
INTERRUPTED = """
import os, signal, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "penstock.cli.root":
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Finder())
"""
"""What Python runs as it starts: Ctrl-C while the command line is imported."""
PLAIN = re.compile(r"\x1b\[")


def test_version_is_told(penstock: Shell) -> None:
    from penstock import __version__

    assert penstock("--version").out == f"penstock {__version__}\n"
    for arguments in (["--version", "--json"], ["--json", "--version"]):
        assert penstock(*arguments).json == {"version": __version__}


def test_an_interrupt_while_modules_are_imported_is_no_traceback(penstock: Shell) -> None:
    (penstock.folder / "sitecustomize.py").write_text(INTERRUPTED)
    result = penstock("queues", status=130, PYTHONPATH=str(penstock.folder))
    assert (result.out, result.err) == ("", "")


def test_a_directory_that_is_not_there_is_named(penstock: Shell) -> None:
    assert "there is no directory no/where" in penstock("check", "no/where", status=2).error
    assert "nowhere" in penstock("serve", "nowhere", status=2).error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quues"],
        ["queues", "--jsn"],
        ["dead"],
        ["dead", "list"],
        ["publish"],
        ["publish", "orders", "{not json"],
        ["publish", "orders", "1", "--priority", "256"],
        ["publish", "orders", "-", "--id", "x"],
        ["publish", "orders", "1", "--delay", "inf"],
        ["publish", "orders", "1", "--expires", "nan"],
        ["call", "add", "--timeout", "1e300"],
        ["send", "add", "--timeout", "inf"],
        ["send", "add", "--expires", "1e300"],
        ["run", "jobs", "--processes", "0"],
        ["queues", "--log-level", "loud"],
        ["queues", "--broker", "memory://", "-H", "localhost"],
        ["dead", "replay", "orders", "--reason", "boredom"],
        ["dead", "discard", "orders"],
        ["queues", "purge", "orders"],
        ["queues", "--broker", "bogus://x"],
        ["queues", "--broker", "no URL"],
        ["tasks", "--store", "bogus://x"],
        ["nodes", "--url", "nonsense"],
        ["queues", "--url", "ftp://host"],
        ["serve", "nonexistent"],
        ["serve", "jobs.py"],
        ["serve", ".", "--amqp-url", "redis://x"],
        ["check", "/nonexistent"],
        ["send", "", "{}"],
        ["publish", "", "1"],
        ["call", "", "1"],
    ],
)
def test_wrong_use_is_one_line_and_status_2(penstock: Shell, arguments: list[str]) -> None:
    result = penstock(*arguments, status=2)
    assert result.error
    assert result.out == ""


@pytest.mark.parametrize("command", EVERY)
def test_every_command_explains_itself(penstock: Shell, command: str) -> None:
    assert "Usage: penstock" in penstock(command, "--help").out


def test_near_option_is_suggested(penstock: Shell) -> None:
    assert "--json" in penstock("queues", "--jsn", status=2).error


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlit:///q.db", "did you mean 'sqlite'?"),
        ("q.db", "is not a URL"),
        ("sqlite:///q.db?vhots=x", "did you mean 'vhost'?"),
    ],
)
@pytest.mark.parametrize("command", [["queues"], ["publish", "orders", "1"], ["dead", "list", "orders"], ["doctor"]])
def test_bad_broker_url_is_one_line_and_status_2(penstock: Shell, command: list[str], url: str, said: str) -> None:
    assert said in penstock(*command, "--broker", url, status=2).error
    assert said in penstock(*command, status=1, PENSTOCK_BROKER=url).error


def test_flag_beats_environment_beats_file(penstock: Shell) -> None:
    penstock.make_queues()
    (penstock.folder / "penstock.toml").write_text('broker = "sqlite:///other.db"\n')
    names = [one["name"] for one in penstock("queues", "--json").json]
    assert names == ["orders"]  # $PENSTOCK_BROKER
    del penstock.environment["PENSTOCK_BROKER"]
    assert penstock("queues", "--json").json == []
    for arguments in (
        ["--broker", "sqlite:///q.db", "queues", "--json"],
        ["queues", "--broker", "sqlite:///q.db", "list", "--json"],
        ["--json", "queues", "list", "--broker", "sqlite:///q.db"],
    ):
        assert [one["name"] for one in penstock(*arguments).json] == names


def test_unknown_key_in_the_file_suggests_the_near_one(penstock: Shell) -> None:
    (penstock.folder / "penstock.toml").write_text('borker = "memory://"\n')
    for command in (["queues"], ["run", "jobs"], ["publish", "orders", "1"]):
        assert "did you mean 'broker'?" in penstock(*command, status=1).error


def test_looking_makes_no_file(penstock: Shell) -> None:
    assert penstock("queues", "--json").json == []
    penstock("doctor", status=None)
    penstock("check", "jobs")
    assert "there is no file" in penstock("dead", "list", "orders", status=1).error
    assert not (penstock.folder / "q.db").exists()


@pytest.mark.parametrize("body", ["1", "-"])
def test_publishing_where_there_is_no_file_makes_none(penstock: Shell, body: str) -> None:
    error = penstock("publish", "orders", body, input="1\n", status=1).error
    assert error.startswith(f"there is no file {penstock.folder / 'q.db'}")
    assert not (penstock.folder / "q.db").exists()


def test_no_processes_is_an_error(penstock: Shell) -> None:
    assert "processes" in penstock("run", "jobs", status=1, PENSTOCK_PROCESSES="0").error


def test_memory_broker_does_not_crash(penstock: Shell) -> None:
    assert penstock("queues", "--json", "--broker", "memory://").json == []
    assert "no queue is bound" in penstock("publish", "x", "1", "--broker", "memory://", status=1).error
    assert "no queue 'x'" in penstock("dead", "replay", "x", "--broker", "memory://", status=1).error


def test_closed_pipe_is_no_traceback(penstock: Shell) -> None:
    process = subprocess.Popen(
        [*COMMAND, "doctor"], env=penstock.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_tracebacks_only_when_asked_for(penstock: Shell) -> None:
    (penstock.folder / "broken.py").write_text("import json\n\njson.loads('{')\n")
    assert "broken.py:3: JSONDecodeError" in penstock("check", "broken", status=1).error
    done = subprocess.run([*COMMAND, "-v", "check", "broken"], env=penstock.environment, capture_output=True)
    assert b"Traceback" in done.stderr


def test_library_does_not_import_the_command_line() -> None:
    code = "import penstock, sys; print([m for m in ('typer', 'rich', 'click', 'penstock.cli') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code]) == b"[]\n"


def test_command_line_does_not_import_rich_for_nothing(penstock: Shell) -> None:
    code = (
        "import sys; from penstock.cli.root import run; run(['queues', '--json']);"
        "print([m for m in ('rich', 'watchfiles', 'penstock.processes') if m in sys.modules])"
    )
    out = subprocess.check_output([sys.executable, "-c", code], env=penstock.environment, stderr=subprocess.DEVNULL)
    assert out.endswith(b"[]\n")


def test_no_color_is_obeyed_at_a_terminal(penstock: Shell) -> None:
    penstock.make_queues()
    plain = at_a_terminal(penstock, ["queues"], NO_COLOR="1")
    assert "orders" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", at_a_terminal(penstock, ["doctor"], NO_COLOR="1"))
    assert PLAIN.search(at_a_terminal(penstock, ["doctor"], NO_COLOR=""))


def test_completion_is_offered(penstock: Shell) -> None:
    env = {"_PENSTOCK_COMPLETE": "complete_bash", "COMP_WORDS": "penstock qu", "COMP_CWORD": "1"}
    assert "queues" in penstock(status=None, **env).out


def test_corrupt_file_is_one_line(penstock: Shell) -> None:
    Path("q.db").write_bytes(b"this is no database at all, whatever it is" * 200)
    for command in (["queues"], ["publish", "orders", "1"], ["dead", "list", "orders"], ["run", "jobs"]):
        error = penstock(*command, status=1).error
        assert "q.db" in error
