"""What every simulated world stands on: time, chance, a broker that is shared, and somebody who judges."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from penstock.brokers.base import Settlement
from penstock.brokers.memory import MemoryServer
from penstock.message import Delivery, Outgoing
from penstock.testing.simulation.plan import Violation
from penstock.testing.simulation.process import Life, Process, Stepped, current_life
from penstock.testing.virtual import VirtualClock, VirtualLoop

if TYPE_CHECKING:
    from penstock.testing.simulation.line import FaultySubscription


class Ground:
    """What every simulated world stands on. `chance` is that of each fault, each time it could happen."""

    replay = ""
    """What the command line wants to hear beside the seed to play this kind of world."""
    ordered = False
    """Whether messages that arrive in another order break a promise."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        self.seed = seed
        self.loop = loop
        self.rng = random.Random(seed)
        self.chance: dict[str, float] = {}
        self.clock = VirtualClock(loop)
        self.server = MemoryServer(self.clock)
        self.processes: list[Process] = []
        self.calm = False
        self.violation: Violation | None = None
        self.steps = 0
        self.excused: set[str] = set()
        """Messages that may be run more than once: doubled, or lost while in hand."""
        self.lives: list[Life] = []
        """Those that are over too: whatever a killed process was doing is kept from being finalised meanwhile, which
        would run its `finally` blocks in the middle of somebody else's step."""
        self._graveyard: list[Any] = []

    async def play(self) -> None:
        """From the beginning to the end.

        :raises Violation: a promise was broken.
        """
        raise NotImplementedError

    # -- judging

    def require(self, promise: bool, what: str) -> None:
        if not promise:
            # Kept as well: raised inside the handler, the engine would take it for the user's error.
            when = f"at {self.loop.now:.3f} s"
            self.violation = self.violation or Violation(self.seed, f"{when}, {what}", self.replay)
            raise self.violation

    def happens(self, fault: str) -> bool:
        return not self.calm and self.rng.random() < self.chance[fault]

    def stepped(self, process: Process) -> None:
        """After every step of a process: check, and perhaps let something befall it."""
        self.steps += 1
        self.check()
        if not process.alive:
            return
        for subscription in process.subscriptions:
            held = len(subscription.held)
            self.require(held <= subscription.prefetch, f"{held} held, prefetch is {subscription.prefetch}")
        if self.happens("crash"):
            process.crash()
        elif self.happens("lost lease"):
            process.lose_lease()
        elif self.happens("drain"):
            process.drain()

    def check(self) -> None:
        """What must be so after every step."""

    def contents(self) -> list[Delivery]:
        return [self.server._delivery(record) for record in self.server.records.values()]

    # -- told by those who do it

    def published(self, message: Outgoing) -> None:
        """A message is in the broker."""

    def settling(self, subscription: FaultySubscription, item: Settlement) -> None:
        """A settlement is about to reach the broker."""

    def lost_in_hand(self, delivery: Delivery) -> None:
        """A process does not hold this any more, whether it knows or not."""
        self.excused.add(delivery.id)

    # -- machinery

    def make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """The loop's task factory: tasks of a simulated process go through `Stepped`."""
        life = current_life.get()
        if life is None:
            return asyncio.Task(coroutine, loop=loop, **options)
        task = asyncio.Task(Stepped(coroutine, life), loop=loop, **options)
        life.began(task, coroutine)
        return task

    def bury_coroutine(self, coroutine: Any) -> None:
        """Keep what a dead process was doing from being finalised, which would run its `finally` blocks."""
        self._graveyard.append(coroutine)

    def clean_up(self) -> None:
        for coroutine in self._graveyard:
            with contextlib.suppress(BaseException):
                coroutine.close()
        for life in self.lives:
            life.clean_up()
