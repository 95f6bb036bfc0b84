"""`Hand`: what a consumer holds on one channel, until it is settled or the channel is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from aiormq.channel import Channel

from penstock.brokers.amqp.acks import Acks
from penstock.brokers.amqp.publisher import Letter, Publisher
from penstock.brokers.base import Ack, Move, Release, Settlement
from penstock.errors import BrokerError, BrokerUnavailable
from penstock.message import Delivery

SEND_TIMEOUT = 15.0
"""Seconds for the confirmation of what is moved or given back, before it is tried again."""


class Hand:
    """A tag means something on its own channel only, so each channel has a hand of its own.

    `stuck` is called when the line takes no more bytes.
    """

    def __init__(self, channel: Channel, publisher: Publisher, enough: int, stuck: Callable[[], None]) -> None:
        self.held: dict[int, Delivery] = {}
        """By tag, in the order of arrival."""
        self._acks = Acks(channel, self.held, enough)
        self._publisher = publisher
        self._stuck = stuck
        self._moving: set[int] = set()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._carried_out: dict[int, Delivery] = {}
        """Settled by a call that then failed: settling them again is done already."""

    def lose(self) -> list[Delivery]:
        """The channel is gone: everything is lost, and marked so."""
        lost = list(self.held.values())
        self.held.clear()
        self._carried_out.clear()
        self._acks.forget()
        for delivery in lost:
            delivery.lost = True
        return lost

    def drop(self, delivery: Delivery) -> None:
        """Acknowledge it in a moment."""
        del self.held[delivery.token.tag]
        self._acks.add_soon(delivery.token.tag)

    async def give_back(self) -> None:
        """All that is held, once nothing of it is on its way elsewhere; what is delayed with the rest of its delay.

        :raises BrokerUnavailable: some of it could not be given back.
        """
        await self._at_rest.wait()
        now = time.time()
        left = list(self.held.values())
        await self.settle([Release(delivery, max(delivery.token.due - now, 0.0)) for delivery in left])
        await self._acks.flush()

    async def settle(self, items: Sequence[Settlement]) -> list[Delivery]:
        """As the contract says."""
        held = self.held
        acked: list[int] = []
        moves: list[Move | Release] = []
        lost: list[Delivery] = []
        again: list[int] = []
        for item in items:
            delivery = item.delivery
            tag = delivery.token.tag
            if held.get(tag) is not delivery or tag in self._moving:
                if self._carried_out.get(tag) is delivery:
                    again.append(tag)
                else:
                    lost.append(delivery)
            elif isinstance(item, Ack):
                del held[tag]
                acked.append(tag)
            else:
                moves.append(item)
        if acked:
            await self._acknowledge(acked)
        if moves:
            failure = await self._move(moves)
            if failure is not None:
                theirs = {id(delivery) for delivery in lost}
                done = [item.delivery for item in items if id(item.delivery) not in theirs and not item.delivery.lost]
                self._carried_out |= {one.token.tag: one for one in done if held.get(one.token.tag) is not one}
                raise failure
        for tag in again:
            self._carried_out.pop(tag, None)
        return lost

    async def _acknowledge(self, tags: Sequence[int]) -> None:
        """:raises BrokerUnavailable: the line takes nothing; what we held comes again."""
        try:
            await self._acks.add(tags)
        except TimeoutError:
            self._stuck()
            raise BrokerUnavailable("the line to RabbitMQ takes no acknowledgements") from None

    async def _move(self, items: Sequence[Move | Release]) -> BrokerError | None:
        """Publish copies to where they are to go, then acknowledge each that is confirmed; why the first of
        the others is not. Giving back with `nack` would count as a redelivery."""
        letters = [_letter(item) for item in items]
        tags = [item.delivery.token.tag for item in items]
        self._moving.update(tags)
        self._at_rest.clear()
        outcomes: Sequence[BrokerError | None]
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                outcomes = await self._publisher.send(letters)
        except TimeoutError:
            outcomes = [BrokerUnavailable("no confirmation in time")] * len(items)
        except BrokerError as error:
            outcomes = [error] * len(items)
        finally:
            self._moving.difference_update(tags)
            if not self._moving:
                self._at_rest.set()
        done: list[int] = []
        failure: BrokerError | None = None
        for item, letter, outcome in zip(items, letters, outcomes, strict=True):
            tag = item.delivery.token.tag
            if outcome is None:
                if self.held.pop(tag, None) is not None:
                    done.append(tag)
            elif failure is None:
                failure = BrokerUnavailable(f"cannot put a message into {letter.to!r}: {outcome}")
        if done:
            await self._acknowledge(done)
        return failure


def _letter(item: Move | Release) -> Letter:
    if isinstance(item, Move):
        return Letter(item.message, item.to, park=True)
    delivery = item.delivery
    message = delivery.outgoing()
    message.delay = item.delay
    return Letter(message, delivery.queue, park=True, taken=delivery.token.taken)
