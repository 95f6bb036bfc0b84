"""`Supervisor`: the workers of a process, each run where it is to be run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable

from penstock.delivery.stopping import Abandoned
from penstock.errors import ConfigError
from penstock.stores.base import Store
from penstock.stores.election import Election
from penstock.workers import tail
from penstock.workers.definition import Worker
from penstock.workers.resident import Resident, WorkerStatus


class Supervisor:
    """Runs some workers: `multi` ones here, of each `single` one the run of the process that is elected for it.

    `grace`: seconds that a run has to end by itself when it is told to. `failed(error)` is called when one
    can never be run again: the store is not ours any more, say. For one event loop.
    """

    def __init__(
        self,
        workers: Iterable[Worker],
        store: Store | None,
        grace: float,
        abandoned: Abandoned,
        failed: Callable[[BaseException], None],
    ) -> None:
        rng = random.Random()  # noqa: S311 - jitter
        self._store = store
        self._failed = failed
        self._residents = {worker.name: Resident(worker, grace, abandoned, rng) for worker in workers}
        self._serving: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; to be undone by `stop`."""
        tail.catch()
        for name, resident in self._residents.items():
            serving = asyncio.create_task(self._serve(name, resident), name=f"penstock-supervisor {name}")
            serving.add_done_callback(self._over)
            self._serving.append(serving)

    @property
    def statuses(self) -> list[WorkerStatus]:
        """How each worker stands in this process."""
        return [resident.status for resident in self._residents.values()]

    def find(self, name: str) -> Resident:
        """:raises ConfigError: there is no worker of that name."""
        if name not in self._residents:
            raise ConfigError(f"no worker is named {name!r}: there are {', '.join(self._residents) or 'none'}")
        return self._residents[name]

    async def stop(self) -> None:
        """Have all of them end, within their grace, else by cancelling; offices are given up. Idempotent."""
        if not self._serving:
            return
        try:
            for resident in self._residents.values():
                resident.pause()
            for resident in self._residents.values():
                await resident.ended()
        finally:
            self.cancel()
            await asyncio.wait(self._serving)
            for resident in self._residents.values():
                await resident.close()
            self._serving.clear()
            tail.let_go()

    def cancel(self) -> None:
        """Cut the grace short."""
        for task in self._serving:
            task.cancel()

    async def _serve(self, name: str, resident: Resident) -> None:
        if resident.worker.mode == "multi":
            await resident.serve()
            return
        assert self._store is not None
        await Election(self._store, f"worker/{name}").run(resident.serve)

    def _over(self, serving: asyncio.Task[None]) -> None:
        if not serving.cancelled() and (error := serving.exception()) is not None:
            self._failed(error)
