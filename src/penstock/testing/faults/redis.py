"""A Redis server of our own, to be killed, stopped, frozen and starved."""

from __future__ import annotations

import atexit
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.testing.faults.ports import free_ports
from penstock.testing.faults.waiting import wait_until

START_WITHIN = 20.0  # seconds; usually 0.1
STOP_WITHIN = 20.0
ANSWER_WITHIN = 5.0


def find_redis() -> str | None:
    """The path of `redis-server`; None: not installed."""
    return shutil.which("redis-server")


class RedisNode:
    """One server, started by `with RedisNode(folder) as node` and gone at the end of the block. Unless `settings`
    say otherwise it writes each change to its disk before it confirms it.

    `settings` are those of `redis.conf`, `maxmemory="20mb"` say, with `_` for `-`. `within`: a command that starts
    the command that follows it, a shell with limits say.
    """

    def __init__(self, folder: Path, *, within: Sequence[str] = (), **settings: object) -> None:
        program = find_redis()
        if program is None:
            raise FileNotFoundError("no Redis server is installed")
        self.folder = folder
        [self.port] = free_ports(1)
        self._program = (*within, program)
        self._settings = {"appendonly": "yes", "appendfsync": "always", "save": "", **settings}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def url(self, vhost: str = "", port: int | None = None, **options: object) -> str:
        """Where clients connect, or with `port` where a proxy to it listens."""
        options = {**({"vhost": vhost} if vhost else {}), **options}
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{port or self.port}/0{'?' + query if query else ''}"

    @property
    def pid(self) -> int | None:
        """The server's; None when it does not run."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

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

    def start(self) -> float:
        """Start it on the data it has, and wait until it serves; how many seconds that took.

        :raises RuntimeError: it ended instead; the error has its last words.
        """
        if self.pid is not None:
            return 0.0
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [*self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        for name, value in self._settings.items():
            command += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
        with (self.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        atexit.register(self.kill)

        def ready() -> bool:
            if self.pid is None:
                raise RuntimeError("Redis did not start: " + (self.folder / "output").read_text()[-2000:])
            return self.serving

        try:
            wait_until(ready, "Redis serves", START_WITHIN)
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
