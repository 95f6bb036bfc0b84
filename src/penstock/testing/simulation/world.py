"""The world of one run: the processes, the broker they share, and the ledger outside of both."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from penstock.brokers.base import Ack, Move, Settlement
from penstock.delivery import dead_letters
from penstock.delivery.arguments import bind
from penstock.delivery.consumer import queues_of
from penstock.delivery.dead_letters import dead_queue
from penstock.delivery.route import MAX_CRASHES, Route
from penstock.errors import BrokerUnavailable
from penstock.message import Delivery, Message, Outgoing
from penstock.testing.simulation.ground import Ground
from penstock.testing.simulation.line import FaultyBroker, FaultySubscription
from penstock.testing.simulation.plan import CALM_WITHIN, FAULTY_FOR, LANE, QUEUE, Plan
from penstock.testing.simulation.worker import Worker
from penstock.testing.virtual import VirtualLoop


class World(Ground):
    """One simulated run: the processes, the broker they share, and the ledger outside of both."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        super().__init__(seed, loop)
        self.plan = Plan.draw(self.rng)
        self.chance = self.plan.chance
        self.ordered = self.plan.policy.ordered
        self.confirmed: dict[str, str | None] = {}  # id → key, in publishing order
        self.finished: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.rejected: set[str] = set()
        self.lone_losses: Counter[str] = Counter()  # times a process was lost with this message alone in its lane
        self.buried: dict[str, str] = {}  # id → reason
        self._fewest = 0

    # -- judging

    def check(self) -> None:
        if len(self.server.records) < self._fewest:
            self.check_conservation()
        self._fewest = len(self.server.records)

    def lost_in_hand(self, delivery: Delivery) -> None:
        super().lost_in_hand(delivery)
        if delivery.queue == LANE:
            self.lone_losses[delivery.id] += 1

    def check_conservation(self) -> None:
        present = {delivery.id for delivery in self.contents()}
        for id in self.confirmed:
            self.require(
                id in present or id in self.buried or self.finished[id] > 0,
                f"message {id} is gone, unfinished and not in the dead letters",
            )

    def settling(self, subscription: FaultySubscription, item: Settlement) -> None:
        id = item.delivery.id
        if isinstance(item, Ack):
            self.require(self.finished[id] > 0, f"message {id} is acknowledged before it was finished")
        elif isinstance(item, Move) and item.to == dead_queue(QUEUE):
            self._judge_burial(id, dead_letters._decode(str(item.message.headers[dead_letters.HEADER])))

    def _judge_burial(self, id: str, death: dead_letters.Death) -> None:
        why = {
            "failed": self.failed[id] >= (self.plan.policy.max_attempts or 0),
            "rejected": id in self.rejected,
            "invalid": id in self.plan.invalid,
            "crashed": self.lone_losses[id] >= MAX_CRASHES,
        }
        self.require(why[death.reason], f"message {id} goes to the dead letters as {death.reason} without cause")
        self.require(death.queue == QUEUE, f"dead letter {id} names queue {death.queue}")
        self.buried[id] = death.reason

    # -- acting

    async def play(self) -> None:
        for queue in queues_of(self.route(lambda messages: None)):
            self.server.declare("", queue)
        self.processes = [Worker(self, n) for n in range(self.plan.processes)]
        for process in self.processes:
            process.boot()
        await self._publish_all()
        await asyncio.sleep(FAULTY_FOR)
        self.calm = True
        try:
            async with asyncio.timeout(CALM_WITHIN):
                while any(record.address[1] != dead_queue(QUEUE) for record in self.server.records.values()):
                    await asyncio.sleep(0.5)
        except TimeoutError:
            left = [(one.id, one.queue) for one in self.contents() if one.queue != dead_queue(QUEUE)]
            self.require(False, f"never done with {left}")
        self.check_conservation()
        self._check_end()
        for process in self.processes:
            await process.shut_down()
            self.require(not process.holds_anything(), "a drained process still holds messages")

    async def _publish_all(self) -> None:
        """Publish with confirmation, again when the confirmation is lost."""
        publisher = FaultyBroker(self, None)
        keys = ["a", "b", None]
        for n in range(self.plan.messages):
            id = str(n)
            body = b"{" if id in self.plan.invalid else b'{"n": 1}'
            key = self.rng.choice(keys)
            message = Outgoing(
                id=id,
                topic=QUEUE,
                body=body,
                headers={"content-type": "application/json"},
                key=key,
                enqueued_at=self.clock.time(),
                delay=self.rng.choice([0.0, 0.0, 1.5]),
            )
            while True:
                try:
                    await publisher.publish([message])
                    break
                except BrokerUnavailable:
                    self.excused.add(id)  # it may be in the queue twice now
            self.confirmed[id] = key
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.random())

    def _check_end(self) -> None:
        for id in self.confirmed:
            dead = self.buried.get(id)
            if id in self.plan.poison:
                self.require(dead is not None, f"poison {id} is not in the dead letters but {self.finished[id]}×")
            if id in self.plan.invalid:
                self.require(dead == "invalid", f"invalid {id} ended as {dead}")
            if self.finished[id] > 1:
                self.require(id in self.excused, f"message {id} was finished {self.finished[id]} times for no reason")

    def route(self, handler: Any) -> Route:
        async def batch(messages: list[Message]) -> None:
            await handler(messages)

        async def single(message: Message) -> None:
            await handler([message])

        chosen = batch if self.plan.batches else single
        return Route(
            name="handler",
            queues=(QUEUE,),
            topics=(),
            handler=chosen,
            binding=bind(chosen),
            policy=self.plan.policy,
            broker=None,
            vhost=None,
            prefetch=self.plan.prefetch,
        )
