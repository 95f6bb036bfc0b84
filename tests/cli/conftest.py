"""A shell for the tests: real commands in real processes, in a directory of their own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import eventually_sync

COMMAND = [sys.executable, "-m", "penstock"]

JOBS = """
import asyncio, os, signal, time
from penstock import App, Message

app = App("sqlite:///q.db", grace=20, lease=2)


def say(*words):
    with open("said", "a") as file:
        print(*words, file=file)


@app.route("orders", topics=["all"], max_attempts=1)
async def take(message: Message):
    body = message.body
    if body == "fail":
        raise ValueError("no \\x1b[31mgood")
    if body == "linger":
        say("lingering", os.getpid())
        while not os.path.exists("go on"):
            await asyncio.sleep(0.01)
    if body == "stay":
        say("staying", os.getpid())
        await asyncio.sleep(1000)
    if body == "die":
        say("dying", os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)
    if body == "exit":
        os._exit(1)
    say("took", body if isinstance(body, str) else message.raw.decode())
"""


class Result(NamedTuple):
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that an error is."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


class Running:
    """A command under way; what it prints goes to a file."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until_logged(self, text: str, times: int = 1) -> None:
        eventually_sync(lambda: self.log.count(text) >= times, f"{text!r} {times} times in:\n{self.log}")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(30)


class Shell:
    """Runs and starts `penstock`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PENSTOCK_BROKER": "sqlite:///q.db"}
        self._running: list[Running] = []

    def __call__(self, *arguments: str, input: str | bytes = b"", status: int | None = 0, **env: str) -> Result:
        data = input.encode() if isinstance(input, str) else input
        done = subprocess.run(
            [*COMMAND, *arguments], input=data, capture_output=True, env={**self.environment, **env}, timeout=60
        )
        result = Result(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert status is None or result.status == status, result
        assert "Traceback" not in result.err, result
        return result

    def start(self, *arguments: str, **env: str) -> Running:
        log = self.folder / f"log-{len(self._running)}"
        running = Running(list(arguments), {**self.environment, **env}, log)
        self._running.append(running)
        return running

    def stop(self) -> None:
        for running in self._running:
            running.process.kill()
            running.process.wait()

    def said(self, word: str) -> list[str]:
        """What the handlers wrote after a word, in order."""
        path = self.folder / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(word + " ")]

    def consume(self, done: Callable[[], Any], *arguments: str) -> None:
        """Run the app until something is so, then drain it."""
        running = self.start("run", "jobs", *arguments)
        eventually_sync(done, f"consuming; it says:\n{running.log}")
        running.send(signal.SIGTERM)
        assert running.ended() == 0, running.log

    def queue(self, name: str = "orders") -> dict[str, Any]:
        """One entry of `queues --json`."""
        found: dict[str, Any] = next(one for one in self("queues", "--json").json if one["name"] == name)
        return found

    def make_queues(self) -> None:
        """Have the app declare its queues."""
        running = self.start("run", "jobs")
        running.until_logged("consuming orders")
        running.send(signal.SIGTERM)
        assert running.ended() == 0

    def make_dead_letters(self, count: int) -> list[str]:
        """Have so many messages fail; their ids."""
        bodies = "\n".join(['"fail"'] * count)
        self.make_queues()
        self("publish", "orders", "-", input=bodies)
        self.consume(lambda: self.queue()["dead"] == count)
        return [letter["id"] for letter in self("dead", "list", "orders", "--json", "--limit", str(count)).json]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def at_a_terminal(shell: Shell, arguments: list[str], stdin: int | None = None, typed: str = "", **env: str) -> str:
    """What a command prints to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**shell.environment, "TERM": "xterm-256color", "COLUMNS": "200", **env}
    source = theirs if stdin is None else stdin
    process = subprocess.Popen([*COMMAND, *arguments], env=environment, stdin=source, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed.encode())
    printed = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not data:
            break
        printed += data
    os.close(ours)
    process.wait(30)
    return printed.decode()


@pytest.fixture
def penstock(own_directory: Path) -> Iterator[Shell]:
    (own_directory / "jobs.py").write_text(JOBS)
    shell = Shell(own_directory)
    yield shell
    shell.stop()
