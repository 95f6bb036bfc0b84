"""The demo's own processes: started, killed, and none left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from demo.database import FOLDER

ROOT = Path(__file__).resolve().parent.parent
STOPPING = 15.0  # seconds for a process to finish what it has begun
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the new process: even if the demo itself is killed, it leaves none behind. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """`python -m MODULE`, logging into a file of the demo's folder."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.log = FOLDER / f"{module.rpartition('.')[2]}.log"
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={**os.environ, "DEMO_FOLDER": str(FOLDER), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,
                start_new_session=True,  # Ctrl-C is the demo's to handle: it stops its children in order
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: no goodbye, no cleaning up. Idempotent."""
        if self.running:
            self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def has_said(self, words: str) -> bool:
        return words in self.log.read_text(errors="replace")

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
