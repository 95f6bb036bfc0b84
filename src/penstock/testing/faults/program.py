"""`Program`: one that runs in a process of its own, to be killed and started again."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Program:
    """A program, started by `with …(…) as it` and gone at the end of the block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int | None:
        """None: it does not run."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> object:
        """Nothing happens if it runs."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Idempotent."""
        raise NotImplementedError


def launched(command: Sequence[str | Path], output: Path, **surroundings: Any) -> subprocess.Popen[bytes]:
    """A process that has just begun, and adds what it prints to a file.

    :param surroundings: its environment and the like, as `Popen` takes them.
    """
    with output.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **surroundings)
