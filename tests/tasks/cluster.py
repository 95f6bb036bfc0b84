"""Several schedulers on one store, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from penstock.errors import BrokerUnavailable
from penstock.stores.base import Change, Entry, Put
from penstock.stores.memory import MemoryStore, MemoryStoreServer
from penstock.tasks.instants import Schedule, instant_id
from penstock.tasks.schedule import Scheduler, State, key
from penstock.testing.virtual import EPOCH, VirtualClock, VirtualLoop, run_virtual

Hook = Callable[["Process"], Awaitable[None]]


class DiedError(Exception):
    """The process is gone: whatever it does next does not happen."""


class World:
    """What the processes share: the store, and the list of what was enqueued."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.server = MemoryStoreServer(self.clock)
        self.log: list[tuple[float, float, str]] = []  # when, which instant, by whom
        self.calls: list[int] = []  # instants a call of `enqueue`
        self.processes: list[Process] = []

    def start(self, *schedules: Schedule, name: str = "", **hooks: Hook) -> Process:
        process = Process(self, schedules, name or f"p{len(self.processes)}", **hooks)
        self.processes.append(process)
        return process

    async def until(self, elapsed: float) -> None:
        """Since the beginning."""
        await asyncio.sleep(elapsed - self.loop.now)

    @property
    def instants(self) -> list[float]:
        return [instant for _, instant, _ in self.log]

    @property
    def doubled(self) -> set[float]:
        return {instant for instant, times in Counter(self.instants).items() if times > 1}

    def since_epoch(self) -> list[float]:
        """The instants, in seconds since the beginning of virtual time."""
        return [round(instant - EPOCH, 6) for instant in self.instants]

    async def state(self, name: str = "collect") -> State:
        (entry,) = self.server.get([key(name)])
        assert entry is not None
        return msgspec.json.decode(entry.value, type=State)

    async def stop(self) -> None:
        for process in self.processes:
            await process.stop()


class Process:
    """A scheduler with a clock of its own and lines of its own to store and broker."""

    def __init__(
        self,
        world: World,
        schedules: Sequence[Schedule],
        name: str,
        *,
        before_store: Hook | None = None,
        after_store: Hook | None = None,
        before_enqueue: Hook | None = None,
        after_enqueue: Hook | None = None,
    ) -> None:
        self.world, self.name = world, name
        self.ahead = 0.0  # of this process's clock
        self.dead = False
        self.holding: set[float] = set()  # instants it was enqueuing when it died
        self.writes = 0
        self.looks = 0
        self.before_store, self.after_store = before_store, after_store
        self.before_enqueue, self.after_enqueue = before_enqueue, after_enqueue
        self.store = MemoryStore(server=world.server)
        self.capabilities = self.store.capabilities
        store: Any = self
        self.scheduler = Scheduler(schedules, store, self.enqueue, self, random.Random(len(world.processes)))
        self.task = asyncio.create_task(self.scheduler.run(), name=name)

    # its clock

    def time(self) -> float:
        return self.world.clock.time() + self.ahead

    def monotonic(self) -> float:
        return self.world.clock.monotonic()

    # its line to the store

    async def get(self, keys: Sequence[str]) -> list[Entry | None]:
        await self._through(self.before_store)
        self.looks += 1
        return await self.store.get(keys)

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        await self._through(self.before_store)
        self.writes += 1
        versions = await self.store.apply(changes)
        for change, version in zip(changes, versions, strict=True):
            assert isinstance(change, Put)
            if version is not None:
                state = msgspec.json.decode(change.value, type=State)
                self.holding = set(state.claimed) if state.by else set()
        await self._through(self.after_store)
        return versions

    # its line to the broker

    async def enqueue(self, name: str, due: Sequence[tuple[str, float]]) -> None:
        await self._through(self.before_enqueue)
        assert all(id == instant_id(name, instant) for id, instant in due)
        self.world.calls.append(len(due))
        self.world.log += [(self.world.clock.time(), instant, self.name) for _, instant in due]
        await self._through(self.after_enqueue)

    async def _through(self, hook: Hook | None) -> None:
        self._check()
        if hook is not None:
            await hook(self)
        self._check()

    def _check(self) -> None:
        if self.dead:
            raise DiedError

    def die(self) -> None:
        self.dead = True

    async def stop(self) -> None:
        self.task.cancel()
        (end,) = await asyncio.gather(self.task, return_exceptions=True)
        assert isinstance(end, asyncio.CancelledError | DiedError), end


def play(main: Callable[[World], Awaitable[None]]) -> None:
    """In virtual time."""

    async def run(loop: VirtualLoop) -> None:
        world = World(loop)
        try:
            await main(world)
        finally:
            await world.stop()

    run_virtual(run)


def virtual(main: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    """A test in virtual time."""

    def test() -> None:
        play(main)

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


def down(process: Process) -> Awaitable[None]:
    raise BrokerUnavailable("away")
