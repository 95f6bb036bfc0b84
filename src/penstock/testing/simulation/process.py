"""A simulated process: something with a broker that can die between any two awaits."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.testing.simulation.ground import Ground
    from penstock.testing.simulation.line import FaultySubscription

current_life: ContextVar[Life | None] = ContextVar("simulated_life", default=None)


MANY = 200  # tasks after which those that have ended are forgotten


class Life:
    """One life of a process: from its start until it is killed or has drained."""

    __slots__ = ("_started", "alive", "number", "process")

    def __init__(self, process: Process, number: int) -> None:
        self.process = process
        self.number = number
        self.alive = True
        self._started: dict[asyncio.Task[Any], Any] = {}
        process.world.lives.append(self)

    def __str__(self) -> str:
        return f"{self.process.name}/{self.number}"

    @contextlib.contextmanager
    def lived(self) -> Iterator[None]:
        """What is started inside belongs to this life."""
        token = current_life.set(self)
        try:
            yield
        finally:
            current_life.reset(token)

    def began(self, task: asyncio.Task[Any], coroutine: Any) -> None:
        if len(self._started) >= MANY:
            self.unfinished()
        self._started[task] = coroutine

    def unfinished(self) -> list[asyncio.Task[Any]]:
        """What runs still of all that it has started."""
        self._started = {task: coroutine for task, coroutine in self._started.items() if not task.done()}
        return list(self._started)

    def clean_up(self) -> None:
        """Dispose of what it was doing when it was killed."""
        for coroutine in self._started.values():
            with contextlib.suppress(BaseException):
                coroutine.close()


class Stepped(collections.abc.Coroutine[Any, Any, Any]):
    """A coroutine of a simulated process: watched at each step, and never resumed once the process is dead."""

    def __init__(self, inner: Any, life: Life) -> None:
        self._inner = inner
        self._life = life
        self._world = life.process.world

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        if not self._life.alive:
            self._world.bury_coroutine(self._inner)
            raise error[0]
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        self._world.bury_coroutine(self._inner)

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError("only tasks drive it")

    def _step(self, step: Any, *arguments: Any) -> Any:
        if not self._life.alive:
            self._world.bury_coroutine(self._inner)
            raise StopIteration
        try:
            return step(*arguments)
        finally:
            self._world.stepped(self._life.process)


class Process:
    """A simulated process; a supervisor starts it again when it has died.

    What it does is said by `start`, `stop` and `ready`.
    """

    def __init__(self, world: Ground, number: int) -> None:
        self.world = world
        self.number = number
        self.life = Life(self, 0)
        self.subscriptions: list[FaultySubscription] = []
        self.draining = False

    @property
    def name(self) -> str:
        return f"process {self.number}"

    @property
    def alive(self) -> bool:
        return self.life.alive

    @property
    def ready(self) -> bool:
        """Whether it has begun, so that it can be stopped."""
        raise NotImplementedError

    async def start(self) -> None:
        """Begin, inside a new life."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End as on SIGTERM."""
        raise NotImplementedError

    def boot(self) -> None:
        self.life = Life(self, self.life.number + 1)
        self.draining = False
        self.subscriptions = []
        with self.life.lived():
            self._main = asyncio.get_running_loop().create_task(self.start())

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        with self.life.lived():
            return asyncio.get_running_loop().create_task(coroutine)

    def fatal(self) -> Callable[[BaseException], None]:
        """For a consumer that cannot go on: nothing that this world does to it may have that effect."""
        life = self.life

        def fatal(error: BaseException) -> None:
            if life.alive:
                raise error

        return fatal

    # -- ending

    def drain(self) -> None:
        """SIGTERM: finish and release. Another life begins afterwards."""
        if not self.ready or self.draining:
            return
        self.draining = True
        asyncio.get_running_loop().create_task(self._drain(self.life))

    async def _drain(self, life: Life) -> None:
        await self.shut_down()
        if life.alive:  # it was not killed meanwhile
            await self.check_drained()
            life.alive = False
            self._restart()

    async def shut_down(self) -> None:
        """Stop as on SIGTERM, within this life."""
        life = self.life
        if not life.alive or not self.ready:
            return
        stopping = self.spawn(self.stop())
        while not stopping.done() and life.alive:
            await asyncio.wait([stopping], timeout=0.1)

    async def check_drained(self) -> None:
        """Of a process that was stopped properly."""
        self.world.require(not self.holds_anything(), "a drained process still holds messages")

    def holds_anything(self) -> bool:
        mine = [subscription.inner for subscription in self.subscriptions]
        return any(record.owner in mine for record in self.world.server.records.values())

    def crash(self) -> None:
        """SIGKILL: nothing of this life runs any more. Another life begins later."""
        self.lose_held()
        self.life.alive = False
        asyncio.get_running_loop().call_later(self.world.rng.uniform(0.0, 3.0), self._restart)

    def _restart(self) -> None:
        token = current_life.set(None)
        try:
            self.boot()
        finally:
            current_life.reset(token)

    def lose_lease(self) -> None:
        """What a long pause does: the broker gives everything to others while we believe it is ours."""
        self.lose_held()
        for subscription in self.subscriptions:
            self.world.server.forget(subscription.inner, counted=True)  # type: ignore[arg-type]  # a MemorySubscription

    def lose_held(self) -> None:
        for subscription in self.subscriptions:
            for delivery in subscription.held.values():
                self.world.lost_in_hand(delivery)
