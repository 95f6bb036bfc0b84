"""`RabbitNode`: a RabbitMQ server of a test's own, to be stopped, killed, frozen and starved.

It has its own ports, data, cookie and configuration, all in one directory, and listens on loopback
only. Other servers on the machine are not concerned; only the port mapper (epmd) is shared.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports

PLACES = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
"""Where the server's own scripts are. Debian's in /usr/sbin are wrappers that lose the environment."""

COMMAND_WITHIN = 60.0  # seconds


class QueueFigures(NamedTuple):
    """A queue as the server sees it."""

    ready: int
    unacknowledged: int
    consumers: int


def find_server() -> Path | None:
    """The directory of `rabbitmq-server` and `rabbitmqctl`; None: not installed."""
    on_path = shutil.which("rabbitmq-server")
    for place in (*PLACES, *([str(Path(on_path).parent)] if on_path else [])):
        if all(os.access(Path(place) / name, os.X_OK) for name in ("rabbitmq-server", "rabbitmqctl")):
            return Path(place)
    return None


class RabbitNode(ServerNode):
    """A RabbitMQ server.

    `consumer_timeout`: seconds a message may stay unacknowledged (None: the server's 30 minutes),
    looked at every `tick` seconds. `max_message_size` in bytes.
    """

    what = "RabbitMQ"
    start_within = 60.0  # usually 3 to 8

    def __init__(
        self,
        folder: Path,
        *,
        consumer_timeout: float | None = None,
        max_message_size: int | None = None,
        tick: float = 0.5,
    ) -> None:
        scripts = find_server()
        if scripts is None:
            raise FileNotFoundError("no RabbitMQ server is installed")
        port, dist_port = free_ports(2)
        super().__init__(folder, port)
        self.name = f"penstock-{os.getpid()}-{secrets.token_hex(4)}@localhost"
        self._scripts = scripts
        self._environment = self._prepare(dist_port, consumer_timeout, max_message_size, tick)

    def _prepare(
        self, dist_port: int, consumer_timeout: float | None, max_message_size: int | None, tick: float
    ) -> Mapping[str, str]:
        """Write the configuration; returns the environment that leads server and tools to it."""
        home = self.folder / "home"
        for part in ("home", "data", "log", "schema", "generated", "plugins"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        cookie = home / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)
        lines = [f"listeners.tcp.local = 127.0.0.1:{self.port}", "log.console = false"]
        if consumer_timeout is not None:
            lines.append(f"consumer_timeout = {round(consumer_timeout * 1000)}")
        if max_message_size is not None:
            lines.append(f"max_message_size = {max_message_size}")
        files = {
            "rabbitmq.conf": "\n".join(lines) + "\n",
            "advanced.config": f"[{{rabbit, [{{channel_tick_interval, {round(tick * 1000)}}}]}}].\n",
            "enabled_plugins": "[].\n",
            "rabbitmq-env.conf": "\n",  # instead of the machine's own
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        return {
            **inherited,
            "HOME": str(home),
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server: its pid is the one to kill
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_SCHEMA_DIR": str(self.folder / "schema"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            "RABBITMQ_PLUGINS_EXPAND_DIR": str(self.folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_BYTES": "0",
        }

    def url(self, vhost: str = "", port: int | None = None, **options: object) -> str:
        """Where clients connect, or with `port` where a proxy to it listens."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"amqp://guest:guest@127.0.0.1:{port or self.port}/{vhost}{'?' + query if query else ''}"

    @property
    def serving(self) -> bool:
        """Whether it answers to a client's first bytes."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as line:
                line.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(line.recv(1))
        except OSError:
            return False

    def _command(self) -> Sequence[str | Path]:
        return [self._scripts / "rabbitmq-server"]

    def _surroundings(self) -> dict[str, Any]:
        return {"env": self._environment, "cwd": self.folder}

    # -- what an operator does

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints.

        :raises RuntimeError: it failed; the error says why.
        """
        command = [str(self._scripts / "rabbitmqctl"), "-q", "-n", self.name, *arguments]
        done = subprocess.run(
            command,
            env=self._environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_WITHIN,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add_vhost(self, name: str) -> None:
        """A namespace of its own for a test, for the user `guest`."""
        self.ctl("add_vhost", name)
        self.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")

    def delete_vhost(self, name: str) -> None:
        self.ctl("delete_vhost", name)

    def queues(self, vhost: str = "/") -> dict[str, QueueFigures]:
        """Every queue by name."""
        columns = ("name", "messages_ready", "messages_unacknowledged", "consumers")
        return dict(_figures(self.ctl("list_queues", "-p", vhost, "--no-table-headers", *columns)))

    def set_consumer_timeout(self, seconds: float | None) -> None:
        """For channels that are opened from now on; None: the server's default."""
        milliseconds = 1_800_000 if seconds is None else round(seconds * 1000)
        self.ctl("eval", f"application:set_env(rabbit, consumer_timeout, {milliseconds}).")

    def alarm(self, on: bool) -> None:
        """Short of memory, or not: with the alarm on it takes nothing from publishers."""
        self.ctl("set_vm_memory_high_watermark", "0.0000001" if on else "0.4")


def _figures(table: str) -> Iterator[tuple[str, QueueFigures]]:
    for line in table.splitlines():
        name, *counts = line.split("\t")
        if len(counts) == len(QueueFigures._fields):
            yield name, QueueFigures(*(int(count) if count.isdigit() else 0 for count in counts))
