"""`ServerNode`: a server of a test's own, to be stopped, killed and frozen."""

from __future__ import annotations

import atexit
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from penstock.testing.faults.program import Program, launched
from penstock.testing.faults.waiting import wait_until

STOP_WITHIN = 30.0  # seconds


class ServerNode(Program):
    """One server, started by `with …Node(folder) as node` and gone at the end of the block.

    It has its own port, and its data in `folder`, and listens on loopback only. What it prints goes to
    `folder/output`.
    """

    what: ClassVar[str]
    start_within: ClassVar[float] = 20.0  # seconds

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__()
        self.folder = folder
        self.port = port

    @property
    def serving(self) -> bool:
        """Whether it answers to a client's first words."""
        raise NotImplementedError

    def start(self) -> float:
        """Start it on the data it has, and wait until it serves; how many seconds that took.

        :raises RuntimeError: it ended instead; the error has its last words.
        """
        if self.pid is not None:
            return 0.0
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = launched(
            self._command(),
            self.folder / "output",
            start_new_session=True,  # Ctrl-C is for the tests
            **self._surroundings(),
        )
        atexit.register(self.kill)

        def ready() -> bool:
            if self.pid is None:
                raise RuntimeError(f"{self.what} did not start: {(self.folder / 'output').read_text()[-2000:]}")
            return self.serving

        try:
            wait_until(ready, f"{self.what} serves", self.start_within)
        except BaseException:
            self.kill()
            raise
        return time.monotonic() - began

    def stop(self) -> None:
        """Stop it in good order: clients are told."""
        self._signal(signal.SIGTERM)
        self._gone()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._gone()
        atexit.unregister(self.kill)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    # -- what each is

    def _command(self) -> Sequence[str | Path]:
        """What starts it."""
        raise NotImplementedError

    def _surroundings(self) -> dict[str, Any]:
        """Its environment and the like, as `Popen` takes them."""
        return {"cwd": self.folder}

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _gone(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(STOP_WITHIN)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_WITHIN)
            self._process = None
