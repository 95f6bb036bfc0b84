"""Consumers in processes of their own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.testing.faults.program import launched


class Processes:
    """Some processes running the same command, to be killed and started again. None outlives the block."""

    def __init__(self, command: Sequence[str], count: int, environment: Mapping[str, str], log: Path) -> None:
        self._command = [sys.executable, *command]
        self._environment = {**os.environ, **environment}
        self._count = count
        self._log = log
        self.running: list[subprocess.Popen[bytes]] = []
        self.ended: list[int] = []
        """Exit statuses of those that were stopped or found dead; negative: the signal."""

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    @property
    def log(self) -> str:
        """All that they printed."""
        return self._log.read_text()

    def start(self) -> subprocess.Popen[bytes]:
        process = launched(self._command, self._log, env=self._environment)
        self.running.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(process, signal.SIGKILL)

    def send(self, process: subprocess.Popen[bytes], number: int, within: float = 30.0) -> int:
        """Send a signal that ends a process; its exit status."""
        process.send_signal(number)
        status = process.wait(within)
        self.running.remove(process)
        self.ended.append(status)
        return status

    def replace_dead(self) -> int:
        """Start another one for each that has ended by itself; how many those were."""
        dead = [process for process in self.running if process.poll() is not None]
        for process in dead:
            self.running.remove(process)
            self.ended.append(process.wait())
            self.start()
        return len(dead)
