"""`NodeProcess`: a `penstock serve` in a process of its own, to be killed, halted and asked over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penstock.testing.faults.halting import halt
from penstock.testing.faults.ports import free_ports
from penstock.testing.faults.program import Program, launched
from penstock.testing.faults.waiting import wait_until

TOKEN = "of-the-tests-and-nobody-else"
START_WITHIN = 30.0  # seconds
ANSWER_WITHIN = 30.0  # seconds


class Answer(NamedTuple):
    """What a node said over HTTP; `body` is JSON already."""

    status: int
    body: Any


class NodeProcess(Program):
    """One node, hosting `folder`, started by `with NodeProcess(…) as node` and gone at the end of the block.

    It serves on a port of its own, the same one after each start. What it prints goes to `<folder>.log`.
    `within`: a command that starts the command that follows it, in a network namespace say.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.folder = folder
        self.name = folder.name
        self.host = host
        (self.port,) = free_ports(1)
        serve = [sys.executable, "-m", "penstock", "serve", str(folder), "--host", host, "--port", str(self.port)]
        self._command = [*within, *serve, "--name", self.name, *options]
        self._environment = {**os.environ, "PENSTOCK_TOKEN": TOKEN, **(environment or {})}
        self._log = folder.with_name(f"{folder.name}.log")

    # -- its process

    @property
    def log(self) -> str:
        """All that it printed, over all of its lives."""
        return self._log.read_text()

    def start(self) -> None:
        """Start it; nothing is waited for. Nothing happens if it runs."""
        if self.pid is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = launched(self._command, self._log, env=self._environment)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def halt(self, beside: Path | None = None) -> None:
        """It stands still until `go_on`; `beside`: but not in the middle of a transaction of this SQLite file."""
        assert self._process is not None
        halt(self._process.pid, beside)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM; nothing is waited for."""
        self._signal(signal.SIGTERM)

    def ended(self, within: float = 60.0) -> int:
        """Its exit status, once it has one.

        :raises TimeoutError: it goes on.
        """
        assert self._process is not None
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} goes on after {within:g} s") from None

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.terminate()
        return self.ended()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    # -- its HTTP

    @property
    def ready(self) -> bool:
        """What `/readyz` says.

        :raises RuntimeError: it has ended; the error has its last words.
        """
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self._process.returncode}: {self.log[-2000:]}")
        try:
            return self.ask("GET", "/readyz").status == 200
        except OSError:
            return False

    def wait_until_ready(self) -> None:
        """:raises TimeoutError: it is not, though it had time."""
        wait_until(lambda: self.ready, f"{self.name} is ready", START_WITHIN)

    def ask(self, method: str, path: str, body: Any = None, token: str | None = TOKEN) -> Answer:
        """A request. `body`: text goes as YAML, anything else as JSON.

        :raises OSError: nobody answers.
        """
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        sent: bytes | None = None
        if isinstance(body, str):
            sent, headers["Content-Type"] = body.encode(), "application/yaml"
        elif body is not None:
            sent, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        line = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_WITHIN)
        try:
            line.request(method, path, sent, headers)
            answer = line.getresponse()
            text = answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            line.close()
        kind = answer.headers.get_content_type()
        return Answer(answer.status, json.loads(text) if kind == "application/json" else text)

    def get(self, path: str) -> Any:
        """What it answers to a question that it can answer.

        :raises RuntimeError: it refused.
        """
        answer = self.ask("GET", path)
        if answer.status != 200:
            raise RuntimeError(f"GET {path}: {answer.status} {answer.body}")
        return answer.body
