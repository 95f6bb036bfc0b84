"""`NatsNode`: a NATS server of a test's own, to be stopped, killed and frozen; `NatsCluster`: three of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.testing.faults.node import ServerNode
from penstock.testing.faults.ports import free_ports
from penstock.testing.faults.waiting import wait_until


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


class ClusterNode(NatsNode):
    """One of a `NatsCluster`, which tells of itself over HTTP."""

    def __init__(self, folder: Path, name: str, route: int, routes: Sequence[int], monitor: int, config: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        cluster = f"cluster {{ name: penstock, listen: 127.0.0.1:{route}, routes: [{others}] }}"
        super().__init__(folder, config=f"server_name: {name}\nhttp: 127.0.0.1:{monitor}\n{cluster}\n{config}")
        self.name = name
        self._monitor = monitor

    def ask(self, page: str) -> dict[str, Any]:
        """A page of its monitoring; empty: it gives none now."""
        if self.pid is None:
            return {}
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._monitor}/{page}", timeout=2.0) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:  # one that is not well says so with an error
            with error:
                return dict(json.load(error))
        except (OSError, ValueError):
            return {}

    def streams(self, what: str) -> list[dict[str, Any]]:
        """What it knows of streams and, if it is asked for, their consumers."""
        accounts = self.ask(f"jsz?accounts=1&{what}").get("account_details") or []
        return [stream for account in accounts for stream in account.get("stream_detail") or []]

    @property
    def illness(self) -> str:
        """Why it is not well; empty: it runs, and has of the streams that it leads as much as the others."""
        health = self.ask("healthz?js-server-only=1")  # of consumers that nobody uses it might never say so
        if health.get("status") != "ok":
            return str(health.get("error") or "it does not answer")
        for stream in self.streams("streams=1"):
            cluster = stream.get("cluster", {})
            if not cluster.get("leader"):
                return f"{stream['name']} has no leader"
            if cluster["leader"] == self.name and not all(one["current"] for one in cluster.get("replicas") or []):
                return f"{stream['name']} is not the same everywhere"
        return ""


class NatsCluster:
    """Three NATS servers with JetStream, `with NatsCluster(folder) as cluster`: what is kept on all three survives the
    loss of one. `config` is more of each one's configuration."""

    start_within = 30.0
    """Seconds; an election takes 4 to 9 of them."""

    def __init__(self, folder: Path, *, size: int = 3, config: str = "") -> None:
        routes, monitors = free_ports(size), free_ports(size)
        self.nodes = [
            ClusterNode(folder / f"n{number}", f"n{number}", route, routes, monitor, config)
            for number, (route, monitor) in enumerate(zip(routes, monitors, strict=True))
        ]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start those that do not run, and wait until all are well and have a leader."""
        for node in self.nodes:
            node.start()
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        """:raises TimeoutError: one of them is not well in time, or they do not agree on a leader."""
        try:
            wait_until(lambda: self.is_whole, "the cluster is whole", self.start_within)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {', '.join(f'{node.name}: {node.illness}' for node in self.nodes)}") from None

    def kill(self) -> None:
        """All of them."""
        for node in self.nodes:
            node.kill()

    @property
    def is_whole(self) -> bool:
        return self.leader is not None and not any(node.illness for node in self.nodes)

    def url(self, space: str = "", first: ClusterNode | None = None, **options: object) -> str:
        """The addresses of all of them, beginning with `first`; with three replicas, unless told otherwise."""
        first = first or self.nodes[0]
        others = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes if node is not first)
        query = "&".join(f"{name}={value}" for name, value in {"replicas": 3, "servers": others, **options}.items())
        return f"{first.url(space)}?{query}"

    @property
    def leader(self) -> ClusterNode | None:
        """Who decides where streams are; None: nobody just now."""
        for node in self.nodes:
            told = node.ask("jsz").get("meta_cluster", {}).get("leader")
            if told:
                return self._named(told)
        return None

    def leader_of(self, stream: str) -> ClusterNode | None:
        """Who takes what is published to a stream; None: nobody just now."""
        for found in self._details("streams=1"):
            if found["name"] == stream and (leader := found.get("cluster", {}).get("leader")):
                return self._named(leader)
        return None

    def consumer_leader_of(self, stream: str) -> ClusterNode | None:
        """Who hands out what is in a stream; None: nobody just now."""
        for found in self._details("streams=1&consumers=1"):
            for consumer in found.get("consumer_detail") or [] if found["name"] == stream else []:
                if leader := consumer.get("cluster", {}).get("leader"):
                    return self._named(leader)
        return None

    def streams(self) -> dict[str, int]:
        """Messages in each stream, as its leader sees it; without those that have none just now."""
        return {
            found["name"]: found["state"]["messages"]
            for node in self.nodes
            for found in node.streams("streams=1")
            if found.get("cluster", {}).get("leader") == node.name
        }

    def _details(self, what: str) -> Iterator[dict[str, Any]]:
        """What each node says of each stream."""
        for node in self.nodes:
            yield from node.streams(what)

    def _named(self, name: str) -> ClusterNode | None:
        """The one of that name, if it runs."""
        return next((node for node in self.nodes if node.name == name and node.pid is not None), None)
