"""A simulated process that sends tasks, waits for some and cancels others."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.client.handles import Handle
from penstock.errors import BrokerError, NotUnique, TimeoutError, UnknownTask
from penstock.stores.records import Standing
from penstock.terms import Terms
from penstock.testing.simulation.process import Process
from penstock.testing.simulation.tasks.client import SimulatedClient
from penstock.testing.simulation.tasks.plan import Spec

if TYPE_CHECKING:
    from penstock.testing.simulation.tasks.world import TaskWorld


class Sender(Process):
    """A simulated process that sends tasks. Started again, it goes on with the next one."""

    world: TaskWorld

    def __init__(self, world: TaskWorld, number: int, specs: list[Spec]) -> None:
        super().__init__(world, number)
        self._left = specs[::-1]
        self._client: SimulatedClient | None = None
        self.waiting: dict[str, asyncio.Task[None]] = {}
        """Who waits for a task's end, of this life."""

    @property
    def name(self) -> str:
        return f"sender {self.number}"

    @property
    def ready(self) -> bool:
        return self._client is not None

    @property
    def done(self) -> bool:
        """Whether all is sent."""
        return not self._left and self._main.done()

    def boot(self) -> None:
        self._client = None
        self.waiting = {}
        super().boot()

    async def start(self) -> None:
        client = self._client = SimulatedClient(self.world, self)
        while self._left and not self.draining:
            spec = self._left.pop()
            await asyncio.sleep(spec.pause)
            await self._send(client, spec)

    async def stop(self) -> None:
        assert self._client is not None
        for task in (self._main, *self.waiting.values()):
            task.cancel()
        await asyncio.gather(self._main, *self.waiting.values(), return_exceptions=True)
        await self._client.close()

    async def _send(self, client: SimulatedClient, spec: Spec) -> None:
        world = self.world
        body = "misfit" if spec.kind == "misfit" else 1
        asked = Terms(retries=spec.retries)
        options = {"delay": spec.delay, "expires": spec.expires}
        try:
            handle = await client._send_task(
                spec.topic, body, asked, spec.unique, options, spec.timeout, None, taskid=spec.id
            )
        except NotUnique as refused:
            world.refused(spec, refused.taskid)
            return
        except (BrokerError, TimeoutError):
            return  # it may have been sent, or not
        world.sent.add(spec.id)
        if spec.waits:
            self.waiting[spec.id] = asyncio.get_running_loop().create_task(self._wait(client, handle))
        if spec.cancel_after is not None:
            self.waiting[f"cancel {spec.id}"] = asyncio.get_running_loop().create_task(
                self._cancel(handle, spec.cancel_after)
            )

    async def _wait(self, client: SimulatedClient, handle: Handle) -> None:
        async def wait(of: object) -> Standing:
            return await client.ledger.wait(handle)  # the client would measure real time

        task = await client._with_ledger(wait, None)
        self.world.require(task.ended, f"the wait for {handle} ends while it is {task.state}")
        self.world.told[handle] = task.state

    async def _cancel(self, handle: Handle, after: float) -> None:
        await asyncio.sleep(after)
        try:
            await handle.cancel()
        except (BrokerError, TimeoutError, UnknownTask):
            return
        self.world.cancelled.add(handle)
