"""Somebody who suspends, resumes and cancels simulated transactions, over the same bad lines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

from penstock.app import App
from penstock.errors import BrokerUnavailable, PenstockError
from penstock.tasks.journal import Journal
from penstock.testing.simulation.process import Process
from penstock.testing.simulation.tasks.client import SimulatedClient
from penstock.testing.simulation.tasks.plan import Spec

if TYPE_CHECKING:
    from penstock.control.transactions import Transactions
    from penstock.testing.simulation.tasks.world import TaskWorld


def transactions_of(world: TaskWorld, client: SimulatedClient) -> Transactions:
    """`app.transactions` of an app with this client, told what time it is."""
    made: Transactions = vars(App)["transactions"].func(SimpleNamespace(client=client))
    made.journal = lambda ledger: Journal(ledger.store, None, world.clock)  # type: ignore[method-assign]
    return made


class Operator(Process):
    """Does what the plan says, to whatever is there by then. It does not die: nobody would end what it has begun."""

    world: TaskWorld

    def __init__(self, world: TaskWorld) -> None:
        super().__init__(world, 0)
        self._client = SimulatedClient(world, self)
        self.transactions = transactions_of(world, self._client)

    @property
    def name(self) -> str:
        return "operator"

    async def work(self) -> None:
        orders = [(at, verb, spec) for spec in self.world.plan.specs.values() for at, verb in spec.orders]
        await asyncio.gather(*(self._carry_out(*order) for order in orders))

    async def _carry_out(self, at: float, verb: str, spec: Spec) -> None:
        await asyncio.sleep(at)
        for queue in self.world.audit.queues(spec.id):
            await self._ask(verb, self.world.passages.id((spec.id, queue)))

    async def _ask(self, verb: str, id: str) -> None:
        """Again, as long as it is not known whether it is done."""
        while True:
            try:
                await getattr(self.transactions, verb)(id)
                return
            except (BrokerUnavailable, TimeoutError):
                await asyncio.sleep(1)
            except PenstockError:  # it does not go with how it stands
                return

    async def close(self) -> None:
        await self._client.close()
