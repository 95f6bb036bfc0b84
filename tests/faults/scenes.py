"""A queue system, a ledger and consumers in processes of their own: where the faults happen."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import aiormq
import nats
import psycopg
from pamqp.commands import Basic

from penstock import SyncClient
from penstock.brokers import registry
from penstock.brokers.base import QueueInfo
from penstock.brokers.redis import RedisBroker
from penstock.testing.faults import Ledger, NatsNode, Processes, RabbitNode, RedisNode, wait_until

LEASE = 1.5
PREFETCH = 16

ROOT = Path(__file__).parents[2]

QUEUES = ("work", "poisoned", "slow", "dawdling")

ALL = {queue + suffix for queue in QUEUES for suffix in ("", ".suspects", ".dead")}


class Letter(NamedTuple):
    """What a dead letter says of itself."""

    id: str
    reason: str
    attempts: int


class InHand(NamedTuple):
    """How much of a queue waits, and how much consumers hold."""

    ready: int
    unsettled: int


class Scene(ABC):
    """What the tests need of any system."""

    crowd = 10_000
    """Messages that it carries in some ten seconds, processes being killed meanwhile."""
    backlog = 50_000
    kills = 20
    """Of consumers, while it carries the crowd."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.ledger = Ledger(folder / "ledger")
        self.client = SyncClient(url)
        self._log = folder / "consumers.log"

    def close(self) -> None:
        self.client.close()

    def consumers(self, count: int, *, url: str | None = None) -> Processes:
        """`url`: another way to the same system."""
        environment = {
            "FAULTS_BROKER": url or self.url,
            "FAULTS_LEDGER": str(self.ledger.path),
            "FAULTS_LEASE": str(LEASE),
            "FAULTS_PREFETCH": str(PREFETCH),
            "PYTHONPATH": str(ROOT),
        }
        return Processes(["-m", "tests.faults.consumer"], count, environment, self._log)

    def publish(self, queue: str, bodies: list[Any], **options: Any) -> list[str]:
        """Publish once the consumers have declared the queue."""
        wait_until(self.declared, "the queues are declared", 20)
        return self.client.publish_many(queue, bodies, **options)

    def wait_for_finished(self, goal: int) -> None:
        wait_until(lambda: self.ledger.count("finished") >= goal, f"{goal} finished", 60)

    def wait_for_all(self, ids: list[str], within: float = 60) -> None:
        """Until each of these is finished and nothing is left in any queue but dead letters."""
        wanted = set(ids)
        wait_until(lambda: wanted <= set(self.ledger.times("finished")), "all are finished", within, pause=0.2)
        wait_until(lambda: not self.left(), "all are settled", 30, pause=0.2)

    @abstractmethod
    def declared(self) -> bool:
        """Whether every queue of the consumers exists."""

    @abstractmethod
    def in_hand(self, queue: str) -> InHand: ...

    @abstractmethod
    def left(self) -> int:
        """Messages in all queues but those of dead letters."""

    @abstractmethod
    def dead(self) -> list[Letter]: ...

    def by(self, port: int, *, quick: bool = False) -> str:
        """The URL by which it is reached at another port, a proxy's; `quick`: a silent line is noticed in 6 s."""
        raise NotImplementedError

    def sound(self) -> bool:
        """Whether the system's own data is whole, as far as it can say."""
        return True


class SqliteScene(Scene):
    def __init__(self, folder: Path) -> None:
        self.file = folder / "queue.db"
        super().__init__(folder, f"sqlite:///{self.file}")

    def query(self, statement: str) -> list[Any]:
        with sqlite3.connect(self.file) as connection:
            return connection.execute(statement).fetchall()

    def declared(self) -> bool:
        if not self.file.exists() or not self.query("SELECT 1 FROM sqlite_master WHERE name = 'queues'"):
            return False
        names = {name for (name,) in self.query("SELECT name FROM queues")}
        return names >= ALL

    def in_hand(self, queue: str) -> InHand:
        select = f"FROM messages JOIN queues ON id = queue WHERE name = '{queue}'"
        ((count, held),) = self.query(f"SELECT count(*), coalesce(sum(owner > 0), 0) {select}")
        return InHand(count - held, held)

    def left(self) -> int:
        statement = "SELECT count(*) FROM messages JOIN queues ON id = queue WHERE name NOT LIKE '%.dead'"
        return int(self.query(statement)[0][0])

    def dead(self) -> list[Letter]:
        rows = self.query("SELECT meta FROM messages JOIN queues ON id = queue WHERE name LIKE '%.dead'")
        described = [json.loads(meta) for (meta,) in rows]
        return [_letter(id, headers) for id, *_, headers in described]

    def sound(self) -> bool:
        return self.query("PRAGMA integrity_check") == [("ok",)]


class PostgresScene(Scene):
    kills = 50

    def query(self, statement: str) -> list[Any]:
        """`{s}`: the schema."""
        url, _, schema = self.url.partition("?schema=")
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(statement.replace("{s}", f'"{schema}"').encode()).fetchall()

    def declared(self) -> bool:
        if self.query("SELECT to_regclass('{s}.queues')") == [(None,)]:
            return False
        names = {name for (name,) in self.query("SELECT name FROM {s}.queues")}
        return names >= ALL

    def in_hand(self, queue: str) -> InHand:
        select = f"FROM {{s}}.messages m JOIN {{s}}.queues q ON q.id = m.queue WHERE name = '{queue}'"
        ((count, held),) = self.query(f"SELECT count(*), count(owner) {select}")
        return InHand(count - held, held)

    def left(self) -> int:
        select = "FROM {s}.messages m JOIN {s}.queues q ON q.id = m.queue"
        return int(self.query(f"SELECT count(*) {select} WHERE name NOT LIKE '%.dead'")[0][0])

    def dead(self) -> list[Letter]:
        select = "FROM {s}.messages m JOIN {s}.queues q ON q.id = m.queue"
        described = [json.loads(meta) for (meta,) in self.query(f"SELECT meta {select} WHERE name LIKE '%.dead'")]
        return [_letter(id, headers) for id, *_, headers in described]


class Served(Scene):
    """A system that is a server of ours."""

    node: RabbitNode | RedisNode


class RabbitScene(Served):
    crowd = 4_000
    backlog = 20_000

    node: RabbitNode

    def __init__(self, folder: Path, node: RabbitNode, vhost: str) -> None:
        self.node = node
        self.vhost = vhost
        node.add_vhost(vhost)
        super().__init__(folder, node.url(vhost))

    def close(self) -> None:
        super().close()
        self.node.delete_vhost(self.vhost)

    def by(self, port: int, *, quick: bool = False) -> str:
        return self.node.url(self.vhost, port, **({"heartbeat": 1} if quick else {}))

    def declared(self) -> bool:
        return set(self.node.queues(self.vhost)) >= ALL

    def in_hand(self, queue: str) -> InHand:
        figures = self.node.queues(self.vhost)[queue]
        return InHand(figures.ready, figures.unacknowledged)

    def left(self) -> int:
        queues = self.node.queues(self.vhost).items()
        return sum(found.ready + found.unacknowledged for name, found in queues if not name.endswith(".dead"))

    def dead(self) -> list[Letter]:
        queues = self.node.queues(self.vhost).items()
        return asyncio.run(
            read_dead(self.url, [name for name, found in queues if name.endswith(".dead") and found.ready])
        )


class RedisScene(Served):
    kills = 50
    node: RedisNode

    def __init__(self, folder: Path, node: RedisNode, vhost: str) -> None:
        self.node = node
        self.vhost = vhost
        super().__init__(folder, node.url(vhost))

    def by(self, port: int, *, quick: bool = False) -> str:
        return self.node.url(self.vhost, port, **({"timeout": 2} if quick else {}))

    def queues(self) -> dict[str, QueueInfo]:
        return asyncio.run(self._inspect())

    async def _inspect(self) -> dict[str, QueueInfo]:
        broker = RedisBroker(self.url)
        try:
            return {info.name: info for info in await broker.admin.inspect()}
        finally:
            await broker.close()

    def declared(self) -> bool:
        return set(self.queues()) >= ALL

    def in_hand(self, queue: str) -> InHand:
        found = self.queues()[queue]
        return InHand(found.ready or 0, found.unsettled or 0)

    def left(self) -> int:
        queues = self.queues().items()
        return sum((one.ready or 0) + (one.unsettled or 0) for name, one in queues if not name.endswith(".dead"))

    def dead(self) -> list[Letter]:
        return asyncio.run(self._dead())

    async def _dead(self) -> list[Letter]:
        broker = RedisBroker(self.url)
        try:
            names = [info.name for info in await broker.admin.inspect() if info.name.endswith(".dead")]
            pages = [(await broker.admin.browse(name, 1000))[0] for name in names]
            return [_letter(one.id, dict(one.headers)) for page in pages for one in page]
        finally:
            await broker.close()


class NatsScene(Scene):
    kills = 50
    backlog = 20_000

    def __init__(self, folder: Path, node: NatsNode, space: str) -> None:
        self.node = node
        self.space = space
        super().__init__(folder, node.url(space))

    def _look(self) -> dict[str, tuple[int, int]]:
        """Messages and those handed out, by queue."""
        return asyncio.run(count_streams(self.node.url(), f"{self.space}-q-"))

    def declared(self) -> bool:
        return self._look().keys() >= {name.replace(".", "=2E") for name in ALL}

    def in_hand(self, queue: str) -> InHand:
        count, held = self._look()[queue]
        return InHand(count - held, held)

    def left(self) -> int:
        return sum(count for name, (count, _) in self._look().items() if not name.endswith("=2Edead"))

    def dead(self) -> list[Letter]:
        async def read() -> list[Letter]:
            broker = registry.connect(self.url)
            await broker.open()
            try:
                assert broker.admin is not None
                names = [info.name for info in await broker.admin.inspect() if info.name.endswith(".dead")]
                pages = [await broker.admin.browse(name, 10_000) for name in names]
                return [_letter(one.id, dict(one.headers)) for page, _ in pages for one in page]
            finally:
                await broker.close()

        return asyncio.run(read())


async def count_streams(url: str, prefix: str) -> dict[str, tuple[int, int]]:
    """Messages in the streams of a prefix and how many of them are handed out, by the rest of the name."""
    client = await nats.connect(url)
    try:
        manager = client.jsm()
        found = {}
        for stream in await manager.streams_info():
            name = stream.config.name or ""
            if name.startswith(prefix):
                consumers = await manager.consumers_info(name)
                held = sum(one.num_ack_pending or 0 for one in consumers)
                found[name.removeprefix(prefix)] = (stream.state.messages, held)
        return found
    finally:
        await client.close()


async def read_dead(url: str, queues: list[str]) -> list[Letter]:
    """The dead letters of some queues on RabbitMQ. They are left where they are."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        found = []
        for queue in queues:
            while isinstance((message := await channel.basic_get(queue)).delivery, Basic.GetOk):
                properties = message.header.properties
                found.append(_letter(str(properties.message_id), dict(properties.headers or {})))
        return found
    finally:
        await connection.close()


def _letter(id: str, headers: dict[str, Any]) -> Letter:
    death = json.loads(headers["penstock-dead"])
    return Letter(id, death["reason"], death["attempts"])
