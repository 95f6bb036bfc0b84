"""`PostgresNode`: a PostgreSQL server of a test's own, to be stopped, killed and frozen.

It has its own port and data, with fsync on, and listens on loopback only. The server does not run as root:
who is root has it run as `postgres`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports
from penstock.testing.faults.waiting import wait_until

PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt/postgresql")


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


class PostgresNode(ServerNode):
    """A PostgreSQL server, in a folder of its own."""

    what = "PostgreSQL"
    start_within = 60.0  # usually 1

    def __init__(self, **settings: object) -> None:
        programs = find_postgres()
        if programs is None:
            raise FileNotFoundError("no PostgreSQL server is installed")
        self._programs = programs
        self._user = "postgres" if os.getuid() == 0 else None
        self._settings = settings
        super().__init__(Path(tempfile.mkdtemp(prefix="penstock-postgres-")), *free_ports(1))
        if self._user is not None:
            shutil.chown(self.folder, self._user)

    def __enter__(self) -> Self:
        self._run("initdb", "-D", str(self.data), "-U", "penstock", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
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

    @property
    def serving(self) -> bool:
        arguments = ("-h", "127.0.0.1", "-p", str(self.port), "-t", "5")
        return subprocess.run([self._programs / "pg_isready", *arguments], capture_output=True).returncode == 0

    def start(self) -> float:
        try:
            return super().start()
        except RuntimeError:  # what was killed is not quite gone yet, say
            return super().start()

    def stop(self) -> None:
        """As an operator does it: connections are ended, nothing is awaited."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGINT)
        self._gone()

    def kill(self) -> None:
        """SIGKILL to all its processes, as a power cut would."""
        family = self._family()
        super().kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "all of it is gone", 30)

    def _command(self) -> Sequence[str | Path]:
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", **self._settings}
        told = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._programs / "postgres", "-D", self.data, *told]

    def _surroundings(self) -> dict[str, Any]:
        return {"user": self._user, "cwd": "/"}

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

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments], user=self._user, check=True, capture_output=True, cwd="/"
        )
