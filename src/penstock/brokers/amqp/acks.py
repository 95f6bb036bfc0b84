"""`Acks`: acknowledgements of one channel, gathered and sent together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp.commands import Basic

from penstock.brokers.amqp.link import BROKEN, cancelled_by_caller

DELAY = 0.001
"""Seconds for which an acknowledgement may wait for company while other messages are held."""
CROWD = 8
"""So many that come together tell of more to come soon:"""
CROWD_DELAY = 0.005
"""seconds for which they wait."""
TIMEOUT = 15.0  # seconds for a line that takes no more bytes


class Acks:
    """`held` has what is not settled yet by tag, ascending: up to its first, one frame acknowledges all."""

    def __init__(self, channel: Channel, held: Mapping[int, Any], enough: int) -> None:
        self._channel = channel
        self._held = held
        self._enough = enough
        self._tags: list[int] = []
        self._sending = asyncio.Lock()
        self._soon: asyncio.Task[None] | None = None

    async def add(self, tags: Sequence[int]) -> None:
        """Acknowledge: at once when nothing else is held or many are waiting, else in a moment, together
        with what has come by then. When it returns, the line has them.

        :raises TimeoutError: the line takes nothing.
        """
        self._tags += tags
        if len(self._tags) >= self._enough or not self._held:
            await self.flush()
        else:
            await asyncio.shield(self._flush_soon())

    def add_soon(self, tag: int) -> None:
        self._tags.append(tag)
        self._flush_soon()

    async def flush(self) -> None:
        """Send what is gathered. Of a closed channel it is forgotten: the messages come again.

        :raises TimeoutError: the line takes nothing.
        """
        async with self._sending:  # an acknowledgement of all up to a tag must not overtake one of a tag below
            tags, self._tags = self._tags, []
            if not tags or self._channel.is_closed:
                return
            first_held = next(iter(self._held), None)
            below = [tag for tag in tags if first_held is None or tag < first_held]
            frames = [Basic.Ack(max(below), True)] if below else []
            if first_held is not None:
                frames += [Basic.Ack(tag) for tag in tags if tag > first_held]
            sent = self._channel.create_future()
            frame = ChannelFrame.marshall(self._channel.number, frames, drain_future=sent)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await self._channel.write_queue.put(frame)
                    await sent
            except (*BROKEN, asyncio.CancelledError):
                if not self._channel.is_closed or cancelled_by_caller():
                    raise

    def forget(self) -> None:
        """The channel is gone."""
        self._tags.clear()

    def _flush_soon(self) -> asyncio.Task[None]:
        if self._soon is None:
            self._soon = asyncio.create_task(self._wait_and_flush())
            self._soon.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._soon

    async def _wait_and_flush(self) -> None:
        await asyncio.sleep(DELAY if len(self._tags) < CROWD else CROWD_DELAY)
        self._soon = None
        await self.flush()
