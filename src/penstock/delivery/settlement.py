"""Settling: outcomes are gathered while one settlement is under way and go out together in the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from penstock.brokers.base import Ack, Broker, Move, Release, Settlement, Subscription
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, PublishError, one_line
from penstock.message import Delivery, Outgoing
from penstock.waiting import Bell

log = logging.getLogger("penstock.settlement")

FIRST_RETRY, LONGEST_RETRY = 0.05, 5.0  # seconds


class Forward(msgspec.Struct, frozen=True):
    """To a queue on another broker: published there first, then acknowledged here."""

    delivery: Delivery
    broker: Broker
    message: Outgoing


class Burial(msgspec.Struct, frozen=True):
    """To the dead letters by `letter`, once those who wait for what becomes of it have been told."""

    delivery: Delivery
    reason: str
    error: BaseException | str | None
    letter: Move | Forward


Outcome: TypeAlias = Settlement | Forward | Burial

Announce: TypeAlias = Callable[[Burial], Awaitable[bool]]
"""Tells those who wait. False: there is no need for a dead letter, the message is done with."""


class _Errand:
    """Outcomes that must first be put somewhere, carried out beside the acknowledgements, which wait for none.

    `carry` is given all that has come, and runs until it is done. `ended` is called each time that
    nothing is left, or that something ended it.
    """

    def __init__(self, carry: Callable[[list[Any]], Awaitable[None]], ended: Callable[[], None]) -> None:
        self._carry = carry
        self._ended = ended
        self._waiting: list[Any] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether all is carried out; raises what ended it."""
        if self._task is None:
            return True
        if not self._task.done():
            return False
        task, self._task = self._task, None
        task.result()
        return True

    def extend(self, outcomes: list[Any]) -> None:
        self._waiting += outcomes
        if outcomes and self.idle:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(lambda task: self._ended())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while self._waiting:
            outcomes, self._waiting = self._waiting, []
            await self._carry(outcomes)


class Settler:
    """Settles for one subscription. Nothing waits for company: when idle, an outcome goes out at once.

    `settled(n)` is called when `n` more deliveries have left our hands. A settlement that the broker
    cannot take now is tried again until it can, or until its delivery is known to be lost. Where
    nothing can be put at the moment (a queue is full, the server short of memory, another broker away),
    acknowledgements go on.
    """

    def __init__(
        self, subscription: Subscription, settled: Callable[[int], None], announce: Announce | None = None
    ) -> None:
        self._subscription = subscription
        self._settled = settled
        self._announce = announce
        self._waiting: list[Outcome] = []
        self._bell = Bell()
        self._moves = _Errand(self._put_here, self._bell.ring)
        self._forwards = _Errand(self._put_abroad, self._bell.ring)
        self._burials = _Errand(self._bury, self._bell.ring)
        self._apart: set[asyncio.Task[None]] = set()
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
                while self._waiting:
                    outcomes, self._waiting = self._waiting, []
                    acks = [outcome for outcome in outcomes if type(outcome) is Ack]
                    if len(acks) < len(outcomes):
                        self._moves.extend([one for one in outcomes if isinstance(one, Move | Release)])
                        self._forwards.extend([one for one in outcomes if isinstance(one, Forward)])
                        self._burials.extend([one for one in outcomes if isinstance(one, Burial)])
                    if acks:
                        await self._settle(acks)
                        self._settled(len(acks))
                busy = not (self._moves.idle and self._forwards.idle and self._burials.idle)
                for task in [task for task in self._apart if task.done()]:
                    self._apart.discard(task)
                    task.result()
                if not busy and not self._apart and not self._waiting:
                    self._idle.set()
        finally:
            for task in self._apart:
                task.cancel()
            self._burials.cancel()
            self._moves.cancel()
            self._forwards.cancel()

    async def _settle(self, outcomes: Sequence[Settlement], patient: bool = True) -> None:
        """:raises BrokerError: not `patient`: the system was there, and would not have it so."""
        delay = FIRST_RETRY
        while True:
            outcomes = [outcome for outcome in outcomes if not outcome.delivery.lost]
            try:
                lost = await self._subscription.settle(outcomes)
            except BrokerRefused:
                raise
            except BrokerError as error:
                if not patient and not isinstance(error, BrokerUnavailable):
                    raise
                log.warning("settling %d messages failed, again in %.1f s: %s", len(outcomes), delay, error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, LONGEST_RETRY)
            else:
                if lost:
                    log.warning("%d settlements came too late: the messages had been given to others", len(lost))
                return

    async def _put_here(self, outcomes: list[Settlement]) -> None:
        """Moves and releases: on some systems both are published."""
        try:
            await self._settle(outcomes, patient=False)
        except BrokerRefused:
            raise
        except BrokerError as error:  # one of them has nowhere to go: the others need not wait for that
            log.warning("%d messages are settled each by itself: %s", len(outcomes), one_line(error))
            for outcome in outcomes:
                task = asyncio.create_task(self._put_alone(outcome))
                self._apart.add(task)
                task.add_done_callback(lambda task: self._bell.ring())
        else:
            self._settled(len(outcomes))

    async def _put_alone(self, outcome: Settlement) -> None:
        await self._settle([outcome])
        self._settled(1)

    async def _bury(self, burials: list[Burial]) -> None:
        await asyncio.gather(*[self._bury_one(burial) for burial in burials])

    async def _bury_one(self, burial: Burial) -> None:
        delay = FIRST_RETRY
        letter: Outcome = burial.letter
        while self._announce is not None and not burial.delivery.lost:
            try:
                if not await self._announce(burial):
                    letter = Ack(burial.delivery)
                break
            except BrokerRefused:
                raise
            except Exception as error:
                if not isinstance(error, BrokerError):  # a fault of ours must not hold up everything else
                    log.exception("nobody can be told of %s", burial.delivery.id)
                    break
                log.warning("nobody can be told of %s, again in %.1f s: %s", burial.delivery.id, delay, one_line(error))
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)
        if letter is burial.letter and not burial.delivery.lost:
            log.warning("message %s goes to the dead letters: %s", burial.delivery.id, burial.reason)
        self.extend([letter])

    async def _put_abroad(self, forwards: list[Forward]) -> None:
        """Publish to the other broker, and acknowledge what has arrived there."""
        delay = FIRST_RETRY
        while forwards:
            failure: BrokerError | None
            try:
                arrived, failure = await self._publish([one for one in forwards if not one.delivery.lost])
            except BrokerRefused:
                raise
            except BrokerError as error:
                arrived, failure = [], error
            gone = {id(one) for one in forwards if one.delivery.lost} | set(map(id, arrived))
            self.extend([Ack(one.delivery) for one in forwards if id(one) in gone])
            forwards = [one for one in forwards if id(one) not in gone]
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
