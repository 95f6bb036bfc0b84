"""PostgreSQL behind PgBouncer in session mode: the contract, through it."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from penstock.brokers.postgres import PostgresBroker
from penstock.testing import victim
from penstock.testing.conformance import Conformance, Harness
from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports
from tests.servers import absent, postgres_database

PLACES = ("/usr/sbin", "/usr/local/bin")


class PgBouncer(ServerNode):
    """A PgBouncer in front of the tests' database. It does not run as root."""

    what = "PgBouncer"

    def __init__(self, folder: Path, program: str) -> None:
        super().__init__(folder, *free_ports(1))
        self._program = program
        there = urlsplit(postgres_database())
        account = f"user={there.username} password={there.password}"
        lines = [
            "[databases]",
            f"{there.path[1:]} = host={there.hostname} port={there.port} {account}",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            "unix_socket_dir =",
            "auth_type = any",
            "pool_mode = session",
            "default_pool_size = 90",
            "ignore_startup_parameters = extra_float_digits",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        self._url = there

    def url(self, direct: str) -> str:
        """Where clients connect instead of to the server itself."""
        there = urlsplit(direct)
        return there._replace(netloc=f"{there.username}:{there.password}@127.0.0.1:{self.port}").geturl()

    @property
    def serving(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                return True
        except OSError:
            return False

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "pgbouncer.ini"]

    def _surroundings(self) -> dict[str, Any]:
        return {"user": "postgres" if Path("/proc/self").owner() == "root" else None, "cwd": self.folder}


@pytest.fixture(scope="session")
def bouncer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PgBouncer]:
    program = shutil.which("pgbouncer", path=":".join(PLACES))
    if program is None:
        absent("PgBouncer is not installed (Debian: pgbouncer)")
    folder = tmp_path_factory.mktemp("pgbouncer")
    for part in (folder, *folder.parents[:2]):
        part.chmod(0o755)
    with PgBouncer(folder, program) as server:
        yield server


class TestBehindPgBouncer(Conformance):
    @pytest.fixture
    def harness(self, postgres_url: str, bouncer: PgBouncer) -> Harness:
        url = bouncer.url(postgres_url)
        return Harness(connect=lambda: PostgresBroker(url), crash_consumer=victim.killed(url), lease=1.0)
