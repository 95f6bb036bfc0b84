"""A simulated process that runs tasks, put together as an app puts it together."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec

from penstock import life as app_life
from penstock.app import App
from penstock.client.publishing import MAX_BODY
from penstock.context import current_app
from penstock.delivery.consumer import Consumer
from penstock.delivery.route import Route
from penstock.delivery.stopping import Abandoned, LoopRunner
from penstock.delivery.surroundings import Surroundings
from penstock.delivery.suspects import Solitude
from penstock.tasks.definition import TaskFunction
from penstock.tasks.instants import Every
from penstock.tasks.limits import Limits
from penstock.tasks.schedule import Scheduler
from penstock.tasks.work import Work
from penstock.testing.simulation.process import Process
from penstock.testing.simulation.tasks.client import SimulatedClient
from penstock.testing.simulation.tasks.operator import transactions_of
from penstock.testing.simulation.tasks.plan import LEASE, TICK

AFTERMATH = 1.0
"""Seconds within which a request that nobody waits for any more is answered."""

if TYPE_CHECKING:
    from penstock.testing.simulation.tasks.world import TaskWorld


class TaskProcess(Process):
    """A simulated process that runs tasks and looks after their schedule."""

    world: TaskWorld

    def __init__(self, world: TaskWorld, number: int) -> None:
        super().__init__(world, number)
        self._consumers: list[Consumer] = []
        self._runners: list[LoopRunner] = []
        self._scheduling: asyncio.Task[None] | None = None
        self._client: SimulatedClient | None = None

    @property
    def ready(self) -> bool:
        return self._scheduling is not None

    def boot(self) -> None:
        self._consumers, self._runners = [], []
        self._scheduling = self._client = None
        super().boot()

    async def start(self) -> None:
        world = self.world
        client = self._client = SimulatedClient(world, self)
        transactions = transactions_of(world, client)
        app = SimpleNamespace(tasks=world.functions.tasks, transactions=transactions, max_body=MAX_BODY)
        current_app.set(cast(App, app))
        around = Surroundings(solitude=Solitude(), lease=LEASE, clock=world.clock, rng=world.rng)
        for task in world.functions.tasks.values():
            consumer = Consumer(self._staffed(task, client, around), client.broker, around, self.fatal())
            await consumer.start()
            self._consumers.append(consumer)
        schedules = [] if world.closing else [Every(TICK, world.plan.every)]
        scheduler = Scheduler(schedules, client.store, self._enqueue, world.clock, world.rng)
        self._scheduling = asyncio.get_running_loop().create_task(scheduler.run())

    def _staffed(self, task: TaskFunction[Any, Any], client: SimulatedClient, around: Surroundings) -> Route:
        policy, world = task.policy, self.world
        limits = None
        if policy.cluster_limit is not None or policy.rate_limit is not None:
            limits = Limits(task.name, client.store, policy.cluster_limit, policy.rate_limit, world.clock, world.rng)
        runner = LoopRunner(task.function, Abandoned(0, self._stuck))
        self._runners.append(runner)
        work = Work(task, runner, client.broker, client.ledger, limits, around)
        return msgspec.structs.replace(task.route, handler=work.handle, announce=work.announce)

    def _stuck(self, name: str) -> None:
        self.world.require(False, f"a run of {name} could not be stopped")

    async def _enqueue(self, name: str, instants: Any) -> None:
        app = SimpleNamespace(tasks=self.world.functions.tasks, client=self._client)
        await app_life.Life._enqueue(cast(app_life.Life, SimpleNamespace(app=app)), name, instants)

    async def end_schedules(self) -> None:
        if self._scheduling is not None:
            self._scheduling.cancel()
            await asyncio.gather(self._scheduling, return_exceptions=True)

    async def stop(self) -> None:
        assert self._client is not None
        await self.end_schedules()
        await asyncio.gather(*(consumer.stop(self.world.plan.grace) for consumer in self._consumers))
        for runner in self._runners:
            await runner.close()
        await self._client.close()

    async def check_drained(self) -> None:
        await super().check_drained()
        here, life = asyncio.current_task(), self.life
        if left := [task for task in life.unfinished() if task is not here]:
            await asyncio.wait(left, timeout=AFTERMATH)
        left = [task for task in life.unfinished() if task is not here]
        self.world.require(not left or not life.alive, f"a drained process still runs {left}")

    def lose_held(self) -> None:
        super().lose_held()
        self.world.excused.update(one.id for one in self.world.functions.running if one.life is self.life)
