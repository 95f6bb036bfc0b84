"""The functions of the simulated tasks: nothing can be relied on in them either."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.context import context
from penstock.errors import Unavailable
from penstock.tasks.definition import TaskFunction
from penstock.tasks.signature import Task
from penstock.testing.simulation.process import Life, current_life
from penstock.testing.simulation.tasks.plan import ALPHA, BETA, BOTH, ENDLESS, TICK

if TYPE_CHECKING:
    from penstock.testing.simulation.tasks.world import TaskWorld


class Running(msgspec.Struct):
    """A call of a task's function."""

    life: Life
    task: str
    id: str


class Functions:
    """The tasks of a world, and what is seen from inside them."""

    def __init__(self, world: TaskWorld) -> None:
        self._world = world
        self.running: list[Running] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        """Of each run."""
        self.begun_at: dict[str, list[float]] = {name: [] for name in (ALPHA, BETA, TICK)}
        self._values = 0
        self.tasks = {name: self._declare(name) for name in (ALPHA, BETA, TICK)}

    def _declare(self, name: str) -> TaskFunction[Any, Any]:
        function: Callable[..., Coroutine[Any, Any, str]]
        if name == TICK:

            async def tick(task: Task) -> str:
                return await self._call(name, task)

            function = tick
        else:

            async def run(number: int, task: Task) -> str:
                return await self._call(name, task)

            function = run
        topics = (BOTH,) if name != TICK else ()
        return TaskFunction(function, name, topics, self._world.plan.policies[name], _no_client)

    async def _call(self, name: str, task: Task) -> str:
        world, life = self._world, current_life.get()
        assert life is not None
        running = Running(life, name, task.taskid)
        self._check_start(running)
        self.running.append(running)
        try:
            await self._work(running)
            self._values += 1
            value = f"{task.taskid} {name} {self._values}"
            world.audit.returned[task.taskid, name].add(value)
            return value
        finally:
            if running in self.running:
                self.running.remove(running)

    async def _work(self, running: Running) -> None:
        world, rng = self._world, self._world.rng
        spec = world.plan.specs.get(running.id)
        kind = "plain" if spec is None else spec.kind
        if rng.random() < 0.2:
            context.progress(1, 3)
        await asyncio.sleep(ENDLESS if kind == "endless" else rng.choice([0.0, 0.01, 0.3, 2.5, 6.0]))
        if spec is not None and spec.steps > 0:
            if world.happens("task error"):
                raise ValueError("the task failed before its transaction")
            await world.passages.walk(running, spec.steps)
        context.progress(3, 3)
        if kind == "poison":
            running.life.process.crash()
            await asyncio.sleep(0)
        if kind == "stubborn" or world.happens("task error"):
            raise ValueError("the task failed")
        if world.happens("outage"):
            raise Unavailable("what the task needs is away")
        if world.happens("cancelled"):
            raise asyncio.CancelledError

    def _check_start(self, running: Running) -> None:
        world, run = self._world, (running.id, running.task)
        spec = world.plan.specs.get(running.id)
        world.require(spec is None or spec.kind != "misfit", f"misfit {running.id} reached the function")
        world.audit.calls(running.life, run)
        self.calls[run] += 1
        self.begun_at[running.task].append(world.loop.now)
        limit = world.plan.policies[running.task].cluster_limit
        if limit is not None and not world.places_lost:
            count = 1 + sum(one.task == running.task and one.life.alive for one in self.running)
            world.require(count <= limit, f"{count} of {running.task} run at once, the limit is {limit}")


def _no_client() -> Any:
    raise AssertionError("these tasks are sent by their senders")
