"""`PostgresNode`: a PostgreSQL server of a test's own, to be stopped, killed and frozen.

It has its own port and data, with fsync on, and listens on loopback only. The server does not run as root:
who is root has it run as `postgres`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.testing.faults.waiting import wait_until

PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt/postgresql")
START_WITHIN = 60.0  # seconds; usually 1
PORTS = (20_000, 30_000)  # no port that a connection may be given


def find_postgres() -> Path | None:
    """The directory of `initdb` and `postgres`; None: not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    for place in PLACES:
        for programs in sorted(Path(place).glob("**/bin"), reverse=True):
            if (programs / "initdb").exists():
                return programs
    return None


class PostgresNode:
    """One server, started by `with PostgresNode() as node` and gone at the end of the block."""

    def __init__(self, **settings: object) -> None:
        programs = find_postgres()
        if programs is None:
            raise FileNotFoundError("no PostgreSQL server is installed")
        self._programs = programs
        self._user = "postgres" if os.getuid() == 0 else None
        self._settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-postgres-"))
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            shutil.chown(self.folder, self._user)

    def __enter__(self) -> Self:
        self._run("initdb", "-D", str(self.data), "-U", "penstock", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, schema: str = "penstock", port: int | None = None, **options: object) -> str:
        """Where clients connect, or with `port` where a proxy to it listens."""
        query = "".join(f"&{name}={value}" for name, value in options.items())
        return f"postgresql://penstock@127.0.0.1:{port or self.port}/postgres?schema={schema}{query}"

    def copy_from(self, other: PostgresNode) -> None:
        """Instead of data of our own: a standby of another node, read only."""
        source = ("-h", "127.0.0.1", "-p", str(other.port), "-U", "penstock")
        self._run("pg_basebackup", *source, "-D", str(self.data), "-R", "-X", "stream", "-c", "fast")

    def start(self) -> None:
        """Until it serves. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            return
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", **self._settings}
        told = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self.data), *told],
                user=self._user, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        wait_until(self._serves, "the server serves", START_WITHIN, pause=0.05)

    def stop(self) -> None:
        """As an operator does it: connections are ended, nothing is awaited."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to all its processes, as a power cut would."""
        family = self._family()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._end(signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "all of it is gone", 30)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _family(self) -> list[int]:
        if self._process is None or self._process.poll() is not None:
            return []
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def _end(self, number: int) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def _serves(self) -> bool:
        process = self._process
        if process is not None and process.poll() is not None:  # what was killed is not quite gone yet, say
            self._process = None
            self.start()
        arguments = ("-h", "127.0.0.1", "-p", str(self.port), "-t", "5")
        return subprocess.run([self._programs / "pg_isready", *arguments], capture_output=True).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments], user=self._user, check=True, capture_output=True, cwd="/"
        )


def _free_port() -> int:
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
