"""The examples, in processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.suspects import suspect_queue
from tests.helpers import eventually_sync
from tests.servers import delete_queues

WEB = Path(__file__).parents[2] / "examples" / "web"
SITES = ("site_tornado", "site_fastapi")
TASKS = ("test", "stat", "dead", "publish")


class Program:
    """A script under way. What it prints goes to files."""

    def __init__(self, script: Path, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        name = f"{script.stem}-{len(list(folder.glob('*.err')))}"
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text()

    def first_line(self) -> str:
        """Of its stdout, once it is there."""

        def look() -> str | None:
            assert self.process.poll() is None, self.log
            line, newline, _ = self._out.read_text().partition("\n")
            return line if newline else None

        return str(eventually_sync(look, "a line on stdout"))

    def until_logged(self, text: str) -> None:
        def look() -> bool:
            assert self.process.poll() is None, self.log
            return text in self.log

        eventually_sync(look, f"{text!r} on stderr")

    def end(self) -> int:
        """SIGTERM, and its exit status. It has to end within 30 seconds."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


class Stage:
    """Starts a site and workers on one broker."""

    def __init__(self, folder: Path, broker: str, site: str) -> None:
        self.environment = {**os.environ, "PENSTOCK_BROKER": broker}
        self._folder = folder
        self._site = site
        self.running: list[Program] = []

    def start_site(self) -> str:
        """Its URL."""
        url = self._start(WEB / f"{self._site}.py", "--port", "0").first_line()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        return url

    def start_worker(self, script: Path = WEB / "worker.py") -> Program:
        """It consumes when this returns."""
        worker = self._start(script)
        worker.until_logged("consuming ")
        return worker

    def _start(self, script: Path, *arguments: str) -> Program:
        program = Program(script, arguments, self._folder, self.environment)
        self.running.append(program)
        return program

    def end(self) -> None:
        """All of them, as an operator would; what does not end is killed."""
        try:
            for program in reversed(self.running):
                program.end()
        finally:
            for program in self.running:
                program.process.kill()
                program.process.wait()


@pytest.fixture(params=SITES)
def stage(request: pytest.FixtureRequest, tmp_path: Path, amqp_vhost: str) -> Iterator[Stage]:
    """For either site, on RabbitMQ."""
    found = Stage(tmp_path, amqp_vhost, request.param)
    try:
        yield found
    finally:
        found.end()
        names = [lane for name in TASKS for lane in (name, dead_queue(name), suspect_queue(name))]
        asyncio.run(delete_queues(amqp_vhost, names))
