"""`Supervisor`: the workers of a process, each run where it is to be run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from penstock.delivery.stopping import Abandoned
from penstock.errors import ConfigError
from penstock.stores.base import Store
from penstock.stores.election import Election, Term
from penstock.workers import tail
from penstock.workers.definition import Worker
from penstock.workers.resident import Resident, WorkerStatus


def own_office(worker: Worker) -> str:
    """The office of a `single` worker where each has one of its own."""
    return f"worker/{worker.name}"


class Supervisor:
    """Runs some workers: `multi` ones here, `single` ones in the process that holds their office in the store.

    `grace`: seconds that a run has to end by itself when it is told to. `failed(error)` is called when one
    can never be run again: the store is not ours any more, say. Workers may come and go while it runs.
    For one event loop.
    """

    def __init__(
        self,
        store: Store | None,
        grace: float,
        abandoned: Abandoned,
        failed: Callable[[BaseException], None],
        office: Callable[[Worker], str] = own_office,
    ) -> None:
        self._store = store
        self._grace = grace
        self._abandoned = abandoned
        self._failed = failed
        self._office = office
        self._rng = random.Random()  # noqa: S311 - jitter
        self._groups: dict[str | None, _Group] = {}
        self._residents: dict[str, tuple[Resident, _Group]] = {}
        self._ended = False
        self.changes = 0
        """Another number when `statuses` says something else than before."""
        tail.catch()

    def add(self, worker: Worker) -> None:
        """Run a worker from now on.

        :raises ConfigError: one of that name is there.
        """
        if worker.name in self._residents:
            raise ConfigError(f"two workers are named {worker.name!r}")
        group = self._stand(None if worker.mode == "multi" else self._office(worker))
        resident = Resident(worker, self._grace, self._abandoned, self._rng, self._change)
        self._residents[worker.name] = resident, group
        self._change()
        group.add(resident)

    async def remove(self, name: str) -> None:
        """Have a worker end within its grace, and run it no more.

        :raises ConfigError: there is none of that name.
        """
        resident = self.find(name)
        resident.pause()
        await resident.ended()
        _, group = self._residents.pop(name)
        self._change()
        await group.remove(resident)

    def stand(self, office: str) -> None:
        """Stand for an office, also while no worker needs it."""
        self._stand(office)

    @property
    def statuses(self) -> list[WorkerStatus]:
        """How each worker stands in this process."""
        return [resident.status for resident, _ in self._residents.values()]

    def term(self, office: str) -> Term | None:
        """The office, while it is held here."""
        group = self._groups.get(office)
        return None if group is None else group.term

    def find(self, name: str) -> Resident:
        """:raises ConfigError: there is no worker of that name."""
        if name not in self._residents:
            raise ConfigError(f"no worker is named {name!r}: there are {', '.join(self._residents) or 'none'}")
        return self._residents[name][0]

    async def finish(self) -> None:
        """Have all of them end, within their grace, else by cancelling."""
        residents = [resident for resident, _ in self._residents.values()]
        for resident in residents:
            resident.pause()
        for resident in residents:
            await resident.ended()

    async def stop(self) -> None:
        """The same, and offices are given up. Idempotent."""
        if self._ended:
            return
        residents = [resident for resident, _ in self._residents.values()]
        try:
            await self.finish()
        finally:
            self.cancel()
            try:
                await asyncio.gather(*(group.ended() for group in self._groups.values()))
            finally:
                for resident in residents:
                    await resident.close()
                if not self._ended:
                    self._ended = True
                    tail.let_go()

    def cancel(self) -> None:
        """Cut the grace short."""
        for group in self._groups.values():
            group.cancel()

    def _change(self) -> None:
        self.changes += 1

    def _stand(self, office: str | None) -> _Group:
        if office not in self._groups:
            election = None
            if office is not None:
                assert self._store is not None
                election = Election(self._store, office)
            self._groups[office] = _Group(office, election, self._failed)
        return self._groups[office]


class _Group:
    """The workers that run while one office is held; without an office they run at once."""

    def __init__(self, office: str | None, election: Election | None, failed: Callable[[BaseException], None]) -> None:
        self.term: Term | None = None
        self._failed = failed
        self._residents: dict[Resident, asyncio.Task[None] | None] = {}
        self._running = False
        work = self._hold(None) if election is None else election.run(self._hold)
        self._task = asyncio.create_task(work, name=f"penstock-office {office or ''}".rstrip())
        self._task.add_done_callback(self._over)

    def add(self, resident: Resident) -> None:
        self._residents[resident] = None
        if self._running:
            self._begin(resident)

    async def remove(self, resident: Resident) -> None:
        task = self._residents.pop(resident)
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        finally:
            await resident.close()

    def cancel(self) -> None:
        self._task.cancel()

    async def ended(self) -> None:
        await asyncio.wait([self._task])

    async def _hold(self, term: Term | None) -> None:
        """Until cancelled; then nothing of them runs any more when this ends."""
        self.term, self._running = term, True
        try:
            for resident in self._residents:
                self._begin(resident)
            await asyncio.get_running_loop().create_future()
        finally:
            self.term, self._running = None, False
            tasks = [task for task in self._residents.values() if task is not None]
            for task in tasks:
                task.cancel()
            while any(not task.done() for task in tasks):
                try:
                    await asyncio.wait(tasks)
                except asyncio.CancelledError:  # once is enough
                    continue

    def _begin(self, resident: Resident) -> None:
        task = asyncio.create_task(resident.serve(self.term), name=f"penstock-resident {resident.worker.name}")
        task.add_done_callback(self._over)
        self._residents[resident] = task

    def _over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
