"""The client of a simulated process: the engine's own, told what time it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from penstock.brokers.base import Broker
from penstock.brokers.pool import Pool
from penstock.client import Client
from penstock.message import Outgoing
from penstock.stores.keeper import Keeper
from penstock.stores.ledger import Ledger
from penstock.testing.simulation.line import FaultyBroker
from penstock.testing.simulation.tasks.store import FaultyStore

if TYPE_CHECKING:
    from penstock.testing.simulation.process import Process
    from penstock.testing.simulation.tasks.world import TaskWorld


class OnePool:
    """A pool of one broker, connected."""

    def __init__(self, broker: FaultyBroker) -> None:
        self._broker = broker

    def check(self, name: str | None) -> None:
        assert name is None

    async def get(self, name: str | None = None, vhost: str | None = None) -> Broker:
        return self._broker

    async def close(self) -> None:
        await self._broker.close()


class SimulatedClient(Client):
    """The client of one life of a process. `ledger` is its ledger."""

    def __init__(self, world: TaskWorld, process: Process) -> None:
        self.broker = FaultyBroker(world, process)
        self.store = FaultyStore(world, process.life)
        super().__init__(pool=cast(Pool, OnePool(self.broker)), keeper=Keeper(None, self.store))
        self.ledger = self._known_ledger = Ledger(self.store, world.clock, worker=str(process.life))
        self._world = world

    def _message(self, *given: Any, **named: Any) -> Outgoing:
        message = super()._message(*given, **named)
        now = self._world.clock.time()
        if message.expires_at is not None:
            message.expires_at = now + round(message.expires_at - message.enqueued_at, 3)
        message.enqueued_at = now
        return message
