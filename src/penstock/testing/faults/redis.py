"""A Redis server of our own, to be killed, stopped, frozen and starved."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports

ANSWER_WITHIN = 5.0  # seconds


def find_redis() -> str | None:
    """The path of `redis-server`; None: not installed."""
    return shutil.which("redis-server")


class RedisNode(ServerNode):
    """A Redis server. Unless `settings` say otherwise it writes each change to its disk before it confirms it.

    `settings` are those of `redis.conf`, `maxmemory="20mb"` say, with `_` for `-`. `within`: a command that starts
    the command that follows it, a shell with limits say.
    """

    what = "Redis"

    def __init__(self, folder: Path, *, within: Sequence[str] = (), **settings: object) -> None:
        program = find_redis()
        if program is None:
            raise FileNotFoundError("no Redis server is installed")
        super().__init__(folder, *free_ports(1))
        self._program = (*within, program)
        self._settings = {"appendonly": "yes", "appendfsync": "always", "save": "", **settings}

    def url(self, vhost: str = "", port: int | None = None, **options: object) -> str:
        """Where clients connect, or with `port` where a proxy to it listens."""
        options = {**({"vhost": vhost} if vhost else {}), **options}
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{port or self.port}/0{'?' + query if query else ''}"

    @property
    def serving(self) -> bool:
        try:
            return self.ask("PING").startswith(("+PONG", "-NOAUTH"))
        except OSError:
            return False

    def ask(self, *words: str) -> str:
        """What the server answers to one command, as it is written on the line."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_WITHIN) as line:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            line.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return line.recv(65536).decode()

    def _command(self) -> Sequence[str | Path]:
        command = [*self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        for name, value in self._settings.items():
            command += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
        return command
