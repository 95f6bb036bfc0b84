"""The world of one run of tasks: senders, processes, and the broker and store that they share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from penstock.brokers.base import Ack, Move, Release, Settlement
from penstock.delivery import history
from penstock.delivery.consumer import queues_of
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.suspects import SUFFIX
from penstock.errors import PenstockError
from penstock.message import Delivery, Outgoing
from penstock.stores.base import Change, Put
from penstock.stores.ledger import Ledger
from penstock.stores.memory import MemoryStoreServer
from penstock.tasks.limits import SLOT_LEASE
from penstock.testing.simulation.ground import Ground
from penstock.testing.simulation.line import FaultySubscription
from penstock.testing.simulation.process import Life
from penstock.testing.simulation.tasks.audit import Audit
from penstock.testing.simulation.tasks.functions import Functions
from penstock.testing.simulation.tasks.judge import Judge
from penstock.testing.simulation.tasks.operator import Operator
from penstock.testing.simulation.tasks.passages import Passages
from penstock.testing.simulation.tasks.plan import CALM_FOR, CALM_WITHIN, FAULTY_FOR, LOST_AFTER, Plan, Spec
from penstock.testing.simulation.tasks.process import TaskProcess
from penstock.testing.simulation.tasks.sender import Sender
from penstock.testing.simulation.tasks.steady import steady
from penstock.testing.simulation.tasks.store import FaultyStore, FaultyWatch
from penstock.testing.virtual import VirtualLoop


class TaskWorld(Ground):
    """One simulated run of tasks and a schedule."""

    replay = "--tasks"

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        super().__init__(seed, loop)
        self.plan = Plan.draw(self.rng)
        self.chance = self.plan.chance
        self.store = MemoryStoreServer(self.clock)
        self.watches: list[FaultyWatch] = []
        self.audit = Audit(self)
        self.passages = Passages(self)
        self.operator = Operator(self)
        self.functions = Functions(self)
        self.senders: list[Sender] = []
        self.workers: list[TaskProcess] = []
        self.closing = False
        """No schedule begins any more."""
        self.closed_at = 0.0
        self.stored: Counter[str] = Counter()
        """How often a message of this id came into the broker from outside."""
        self.sent: set[str] = set()
        """Of these the senders were told that they are sent."""
        self.refusals: dict[str, str] = {}
        """Tasks that were not unique → who was in the way."""
        self.told: dict[str, str] = {}
        """How tasks had ended, as those who waited were told."""
        self.cancelled: set[str] = set()
        self.places_lost = False
        """A place among those that run at once may have been lost while its run went on."""
        self._away_until = 0.0

    # -- told by those who do it

    def published(self, message: Outgoing) -> None:
        self.stored[message.id] += 1
        if self.stored[message.id] > 1:
            self.excused.add(message.id)

    def refused(self, spec: Spec, holder: str) -> None:
        self.refusals[spec.id] = holder
        other = self.plan.specs.get(holder)
        same = other is not None and (other.topic, other.unique) == (spec.topic, spec.unique)
        self.require(same and holder != spec.id, f"{spec.id} is not unique because of {holder}")

    def settling(self, subscription: FaultySubscription, item: Settlement) -> None:
        """What is acknowledged has ended, or there is another copy of it."""
        delivery = item.delivery
        if isinstance(item, Release) or (isinstance(item, Move) and _history(item.message) == _history(delivery)):
            self.excused.add(delivery.id)  # given back, perhaps out of the middle of its run
        record = self.server.records.get(delivery.token)
        if not isinstance(item, Ack) or record is None or record.owner is not subscription.inner:
            return
        run = (delivery.id, delivery.queue.removesuffix(SUFFIX))
        if run in self.audit.ended or run in self.audit.revived:  # its next message may not be published yet
            return
        copies = [one for one in self.contents() if (one.id, one.queue.removesuffix(SUFFIX)) == run]
        self.require(len(copies) > 1, f"the last message of {'/'.join(run)} is acknowledged, and it has not ended")

    # -- the store

    def change(self, life: Life | None, change: Change) -> int | None:
        """Make a change in the store, and see that it may be made."""
        (before,) = self.store.get([change.key])
        (version,) = self.store.apply([change])
        if version is not None:
            self.audit.saw(life, change, before)
            if getattr(change, "tell", False):
                for watch in self.watches:
                    if watch.life is None or watch.life.alive:
                        watch.tell(change.key)
        return version

    def unheard(self, life: Life | None, changes: Sequence[Change]) -> None:
        """Whoever wanted these changes does not know whether they were made."""
        for change in changes:
            self.audit.unheard(life, change)
            if isinstance(change, Put) and change.key.startswith("place/"):
                self.places_lost = True

    def store_is_away(self) -> bool:
        if self.happens("store away"):
            self._away_until = self.loop.now + self.rng.choice([0.5, 3.0, 12.0])
            self.places_lost = True
        return not self.calm and self.loop.now < self._away_until

    # -- acting

    async def play(self) -> None:
        with steady(self.rng):
            await self._play()

    async def _play(self) -> None:
        for task in self.functions.tasks.values():
            for queue in queues_of(task.route):
                self.server.declare("", queue)
        calm = Ledger(FaultyStore(self, None), self.clock, worker="None")
        self.calm = True  # no fault befalls what is declared
        for task in self.functions.tasks.values():
            await calm.topics.register(task.name, task.topics)
        self.calm = False
        self.workers = [TaskProcess(self, n) for n in range(self.plan.processes)]
        self.senders = [Sender(self, n, specs) for n, specs in enumerate(self.plan.senders)]
        self.processes = [*self.workers, *self.senders]
        for process in self.processes:
            process.boot()
        operating = asyncio.get_running_loop().create_task(self.operator.work())
        await asyncio.sleep(FAULTY_FOR)
        self.calm = True
        judge = Judge(self, calm)
        try:
            async with asyncio.timeout(CALM_WITHIN):
                await operating
                await self._end_schedules(judge)
                await self._come_to_rest(calm, judge)
        except TimeoutError:
            self.require(False, f"never done: {judge.unended()}, {self._messages()}, {self.closed_at}")
        await asyncio.sleep(SLOT_LEASE + 1)
        await judge.check()
        for one in self.processes:
            await one.shut_down()
            await one.check_drained()
        await self.operator.close()

    async def _end_schedules(self, judge: Judge) -> None:
        await asyncio.sleep(CALM_FOR)
        while not judge.schedule_rests():  # tasks that kill may do so still
            await asyncio.sleep(0.5)
        self.closing, self.closed_at = True, self.clock.time()
        for process in self.workers:
            await process.end_schedules()

    async def _come_to_rest(self, ledger: Ledger, judge: Judge) -> None:
        for id, spec in self.plan.specs.items():
            if spec.kind == "endless" and self.stored[id]:
                await ledger.cancel(id)
        empty_since = None
        while judge.unended() or not all(sender.done for sender in self.senders) or self._messages():
            await asyncio.sleep(0.5)
            if self._messages():
                empty_since = None
                continue
            empty_since = empty_since or self.loop.now
            for id in sorted({id for id, queue in self.audit.revived - self.audit.ended.keys()}):
                await ledger.cancel(id)  # the operator was not told that it is published
            lost = self.loop.now - empty_since > LOST_AFTER
            self.require(not lost, f"lost: {judge.unended()}")
            awaited = {id for sender in self.senders for id in sender.waiting}  # who waits for it looks by himself
            for id in {what.split("/")[0]: None for what in judge.unended()}:
                if id not in awaited:
                    await self._look(ledger, id)

    async def _look(self, ledger: Ledger, id: str) -> None:
        """Who looks at a task finds it expired."""
        try:
            await ledger.record(id)
        except PenstockError as error:
            self.require(False, f"the record of {id}: {error}")

    def _messages(self) -> list[str]:
        """What waits in the broker, beside dead letters."""
        dead = {dead_queue(name) for name in self.functions.tasks}
        return [f"{one.id} in {one.queue}" for one in self.contents() if one.queue not in dead]


def _history(message: Outgoing | Delivery) -> history.History:
    return history.read(message.headers)
