"""`Notes`: how many deliveries of a message do not count as losses.

The server counts how often it has handed a message out, and not why it had to do so again. So whoever gives a message
back notes it first, in a stream of its own, and whoever gets one that was handed out before looks for its note. A
note that is lost makes a message a suspect, which is run alone, and nothing worse.

A note may also say with which headers the message goes on: so a full queue needs no room to try one again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from penstock.brokers.nats.api import Api, Refusal, as_ours
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.names import Names
from penstock.brokers.nats.wire import Token, rewrite
from penstock.errors import BrokerError, BrokerUnavailable, one_line
from penstock.message import Delivery

KEPT = 14 * 24 * 3600
"""Seconds."""
PATIENCE = 3.0
"""Seconds for which somebody who gives a message back waits for his note."""


class Note(NamedTuple):
    """Of a message that is given back."""

    delivery: Delivery
    redelivered: int
    """With which it is to come again."""
    block: bytes = b""
    """The headers with which it goes on; empty: those that are stored."""


class _Stored:
    """Notes on their way."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.error: BrokerError | None = None
        self.is_gone = False
        """Nobody keeps notes."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None:
        if block is not None and block.startswith(b"NATS/1.0 503"):
            self.is_gone, self.error = True, BrokerUnavailable("the stream of the notes is gone")
        elif not payload.startswith(b'{"stream'):
            self.error = BrokerUnavailable(f"a note could not be stored: {payload.decode(errors='replace')[:200]}")
        self._one_less()

    def refused(self, number: int, error: Exception) -> None:
        self.error = error if isinstance(error, BrokerError) else BrokerUnavailable(one_line(error))
        self._one_less()

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class Notes:
    def __init__(self, names: Names, replicas: int, timeout: float) -> None:
        self._names = names
        self._replicas = replicas
        self._timeout = timeout

    async def begin(self, api: Api) -> None:
        """Make sure of their stream."""
        try:
            await api.make_stream(
                name=self._names.notes_stream,
                subjects=[self._names.all_notes],
                max_msgs_per_subject=1,
                max_age=KEPT * 10**9,
                num_replicas=self._replicas,
                description="Penstock: deliveries that do not count",
            )
        except Refusal as refusal:
            raise as_ours(refusal, f"stream {self._names.notes_stream}") from None

    def _subject(self, delivery: Delivery) -> str:
        token: Token = delivery.token
        return self._names.note(delivery.queue, token.stamp, token.place)

    async def write(self, line: Line, notes: Sequence[Note]) -> None:
        """All in one round trip.

        :raises BrokerUnavailable, BrokerRefused: some may not be stored.
        """
        stored = await self._write(line, notes)
        if stored.is_gone:
            await self.begin(Api(line, self._timeout))
            stored = await self._write(line, notes)
        if stored.error is not None:
            raise stored.error

    async def _write(self, line: Line, notes: Sequence[Note]) -> _Stored:
        stored = _Stored(len(notes))
        for number, (delivery, redelivered, block) in enumerate(notes):
            text = b"%d" % (delivery.token.delivered - redelivered)
            if block:
                text += b"\r\n" + block
            subject = self._subject(delivery)
            reply = line.expect(stored, number, subject)
            line.write(b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply, len(text), text))
        try:
            await asyncio.wait({stored.done}, timeout=min(self._timeout, PATIENCE))
        finally:
            if stored.left:
                line.give_up(stored)
        if stored.left and stored.error is None:
            stored.error = BrokerUnavailable("no answer in time")
        return stored

    async def read(self, line: Line, deliveries: Sequence[Delivery]) -> None:
        """Set `redelivered` of each, and its headers if it was noted that it goes on with others.

        :raises BrokerUnavailable, BrokerRefused: it is not known.
        """
        api = Api(line, self._timeout)
        questions = [{"last_by_subj": self._subject(delivery)} for delivery in deliveries]
        try:
            found = await api.messages(self._names.notes_stream, questions)
        except Refusal as refusal:
            raise as_ours(refusal, "notes") from None
        for delivery, note in zip(deliveries, found, strict=True):
            count, _, block = (b"" if note is None else note.body).partition(b"\r\n")
            if block:
                rewrite(delivery, block)
            uncounted = int(count) if count.isdigit() else 0
            delivery.redelivered = max(delivery.token.delivered - 1 - uncounted, 0)
