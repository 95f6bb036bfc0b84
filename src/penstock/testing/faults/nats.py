"""`NatsNode`: a NATS server of a test's own, to be stopped, killed and frozen."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.testing.faults.waiting import wait_until

START_WITHIN = 20.0  # seconds; usually a tenth of one
STOP_WITHIN = 20.0
# Outside of the range from which the system gives ports to connections.
PORTS = (20_000, 30_000)


def find_nats_server() -> str | None:
    """The program; None: not installed."""
    return shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class NatsNode:
    """One server, started by `with NatsNode(folder) as node` and gone at the end of the block. It listens on loopback
    only and has its data in `folder`.

    `config`: more of its configuration; `jetstream` may be turned off.
    """

    def __init__(self, folder: Path, *, config: str = "", jetstream: bool = True) -> None:
        program = find_nats_server()
        if program is None:
            raise FileNotFoundError("no NATS server is installed")
        self.folder = folder
        self.port = _free_port()
        self._config = folder / "nats.conf"
        store = f'jetstream {{ store_dir: "{folder / "data"}" }}\n' if jetstream and "jetstream" not in config else ""
        self._config.write_text(f"listen: 127.0.0.1:{self.port}\n{store}{config}\n")
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def url(self, space: str = "", port: int | None = None, login: str = "", **options: object) -> str:
        """Where clients connect, or with `port` where a proxy to it listens."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return (
            f"nats://{login}{'@' if login else ''}127.0.0.1:{port or self.port}/{space}{'?' + query if query else ''}"
        )

    @property
    def serving(self) -> bool:
        """Whether it greets a client."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as line:
                return line.recv(4) == b"INFO"
        except OSError:
            return False

    def start(self) -> float:
        """Start it on the data it has, and wait until it serves; how many seconds that took.

        :raises RuntimeError: it ended instead; the error has its last words.
        """
        if self._process is not None and self._process.poll() is None:
            return 0.0
        began = time.monotonic()
        with (self.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self._config)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        atexit.register(self.kill)

        def ready() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError("NATS did not start: " + (self.folder / "output").read_text()[-2000:])
            return self.serving

        try:
            wait_until(ready, "NATS serves", START_WITHIN, pause=0.02)
        except BaseException:
            self.kill()
            raise
        return time.monotonic() - began

    def stop(self) -> None:
        """Stop it in good order."""
        self._signal(signal.SIGTERM)
        self._gone()

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        self._signal(signal.SIGKILL)
        self._gone()
        atexit.unregister(self.kill)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

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


def _free_port() -> int:
    rng = random.Random()
    while True:
        port = rng.randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
