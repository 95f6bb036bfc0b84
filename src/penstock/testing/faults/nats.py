"""`NatsNode`: a NATS server of a test's own, to be stopped, killed and frozen."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports


def find_nats_server() -> str | None:
    """The program; None: not installed."""
    return shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class NatsNode(ServerNode):
    """A NATS server.

    `config`: more of its configuration; `jetstream` may be turned off.
    """

    what = "NATS"

    def __init__(self, folder: Path, *, config: str = "", jetstream: bool = True) -> None:
        program = find_nats_server()
        if program is None:
            raise FileNotFoundError("no NATS server is installed")
        super().__init__(folder, *free_ports(1))
        self._config = folder / "nats.conf"
        store = f'jetstream {{ store_dir: "{folder / "data"}" }}\n' if jetstream and "jetstream" not in config else ""
        self._config.write_text(f"listen: 127.0.0.1:{self.port}\n{store}{config}\n")
        self._program = program

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

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "-c", self._config]
