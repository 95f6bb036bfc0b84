"""Settling: outcomes are gathered while one settlement is under way and go out together in the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from penstock.brokers.base import Ack, Broker, Settlement, Subscription
from penstock.errors import BrokerError, BrokerRefused, PublishError, one_line
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell

log = logging.getLogger("penstock.settlement")

FIRST_RETRY, LONGEST_RETRY = 0.05, 5.0  # seconds


class Forward(msgspec.Struct, frozen=True):
    """To a queue on another broker: published there first, then acknowledged here."""

    delivery: Delivery
    broker: Broker
    message: Outgoing


Outcome: TypeAlias = Settlement | Forward


class Settler:
    """Settles for one subscription. Nothing waits for company: when idle, an outcome goes out at once.

    `settled(n)` is called when `n` more deliveries have left our hands. A settlement that the broker
    cannot take now is tried again until it can, or until its delivery is known to be lost.
    """

    def __init__(self, subscription: Subscription, settled: Callable[[int], None]) -> None:
        self._subscription = subscription
        self._settled = settled
        self._waiting: list[Outcome] = []
        self._bell = Bell()
        self._abroad: list[Forward] = []
        self._carrier: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, outcome: Outcome) -> None:
        self.extend([outcome])

    def extend(self, outcomes: list[Outcome]) -> None:
        if not outcomes:
            return
        if not self._waiting:
            self._bell.ring()
            self._idle.clear()
        self._waiting += outcomes

    async def drained(self) -> None:
        """Until every outcome so far is settled."""
        await self._idle.wait()

    async def run(self) -> None:
        """Settle for ever."""
        try:
            while True:
                await self._bell.wait()
                if self._carrier is not None and self._carrier.done():
                    self._carrier.result()  # raises what ended it
                while self._waiting:
                    outcomes, self._waiting = self._waiting, []
                    if [outcome for outcome in outcomes if type(outcome) is Forward]:
                        outcomes = self._send_abroad(outcomes)
                    await self._settle(outcomes)
                    self._settled(len(outcomes))
                if not self._abroad:
                    self._idle.set()
        finally:
            if self._carrier is not None:
                self._carrier.cancel()

    async def _settle(self, outcomes: list[Outcome]) -> None:
        delay = FIRST_RETRY
        while True:
            outcomes = [outcome for outcome in outcomes if not outcome.delivery.lost]
            try:
                lost = await self._subscription.settle(outcomes)  # type: ignore[arg-type]  # no Forward is left
            except BrokerRefused:
                raise
            except BrokerError as error:
                log.warning("settling %d messages failed, again in %.1f s: %s", len(outcomes), delay, error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_RETRY)
            else:
                if lost:
                    log.warning("%d settlements came too late: the messages had been given to others", len(lost))
                return

    def _send_abroad(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Take out what goes to another broker: one that is away holds up nothing else."""
        self._abroad += [outcome for outcome in outcomes if isinstance(outcome, Forward)]
        if self._carrier is None or self._carrier.done():
            self._carrier = asyncio.create_task(self._carry())
            self._carrier.add_done_callback(lambda carrier: self._bell.ring())
        return [outcome for outcome in outcomes if not isinstance(outcome, Forward)]

    async def _carry(self) -> None:
        """Publish abroad, and put an `Ack` in the place of what has arrived there."""
        delay = FIRST_RETRY
        while self._abroad:
            forwards = self._abroad
            failure: BrokerError | None
            try:
                arrived, failure = await self._publish([one for one in forwards if not one.delivery.lost])
            except BrokerRefused:
                raise
            except BrokerError as error:
                arrived, failure = [], error
            gone = {id(one) for one in forwards if one.delivery.lost} | set(map(id, arrived))
            self.extend([Ack(one.delivery) for one in self._abroad if id(one) in gone])
            self._abroad = [one for one in self._abroad if id(one) not in gone]
            if failure is None:
                delay = FIRST_RETRY
            else:
                log.warning("forwarding failed, again in %.1f s: %s", delay, one_line(failure))
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_RETRY)

    async def _publish(self, forwards: list[Forward]) -> tuple[list[Forward], PublishError | None]:
        """Those that arrived, and why the first of the others did not.

        :raises BrokerError: none is known to have arrived; publishing them again doubles them at worst.
        """
        by_broker: dict[int, list[Forward]] = {}
        for forward in forwards:
            by_broker.setdefault(id(forward.broker), []).append(forward)
        arrived: list[Forward] = []
        failure = None
        for group in by_broker.values():
            refusals = await group[0].broker.publish([forward.message for forward in group])
            arrived += [forward for forward, refusal in zip(group, refusals, strict=True) if refusal is None]
            failure = failure or next((refusal for refusal in refusals if refusal is not None), None)
        return arrived, failure
