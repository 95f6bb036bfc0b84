"""A queue system, a ledger and consumers in processes of their own: where the faults happen."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import aiormq
from pamqp.commands import Basic

from penstock import SyncClient
from penstock.testing.faults import Ledger, Processes, RabbitNode, wait_until

LEASE = 1.5
PREFETCH = 16

ROOT = Path(__file__).parents[2]

QUEUES = ("work", "poisoned", "slow", "dawdling")


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
        return names >= {f"{queue}.dead" for queue in QUEUES}

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


class RabbitScene(Scene):
    crowd = 4_000
    backlog = 20_000

    def __init__(self, folder: Path, node: RabbitNode, vhost: str) -> None:
        self.node = node
        self.vhost = vhost
        node.add_vhost(vhost)
        super().__init__(folder, node.url(vhost))

    def close(self) -> None:
        super().close()
        self.node.delete_vhost(self.vhost)

    def declared(self) -> bool:
        return set(self.node.queues(self.vhost)) >= {f"{queue}.dead" for queue in QUEUES}

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
