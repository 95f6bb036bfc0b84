"""`Confirmed`: publishing many messages on one channel, with the server's word on each.

The driver has a lock, a timeout, a task and a future for each message. Here there is one future for all
that are published together, and the count of the channel's messages, which is the server's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiormq import exceptions
from aiormq.channel import Channel
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from penstock.brokers.amqp.line import Line

TOGETHER = 256 * 1024
"""Bytes of frames made before they are handed over."""

_UNKNOWN: Any = object()


class Item(NamedTuple):
    """A message ready to be written."""

    id: str
    exchange: str
    to: str
    properties: Basic.Properties
    body: bytes


class _Batch:
    """What became of messages that were published together."""

    __slots__ = ("done", "left", "results")

    def __init__(self, count: int) -> None:
        self.results: list[Any] = [_UNKNOWN] * count
        self.left = count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(self, index: int, result: BaseException | None) -> None:
        """The server has spoken about one of them. What it said before, that no queue takes it, stands."""
        if self.results[index] is _UNKNOWN:
            self.results[index] = result
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class Confirmed:
    """Owns the channel: nobody else may publish on it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._line = Line(channel)
        self._writing = asyncio.Lock()
        self._tag = 0
        self._waiting: dict[int, tuple[_Batch, int, str]] = {}  # by tag, in their order
        self._by_id: dict[str, int] = {}
        ours: Any = channel
        ours._on_confirm_frame = self._on_confirm
        ours._on_return_frame = self._on_return
        ours.closing.add_done_callback(lambda _: self._end())

    @property
    def closed(self) -> bool:
        return self._line.closed

    async def put(self, items: Sequence[Item]) -> list[BaseException | None]:
        """Publish; for each None, or why it is not known to be in a queue. No two on their way have one id.

        The driver's `PublishError` says that no queue takes it, `DeliveryError` that one refused it.
        """
        batch = _Batch(len(items))
        async with self._writing:
            await self._write(items, batch)
        if batch.left:
            await batch.done
        return batch.results

    async def _write(self, items: Sequence[Item], batch: _Batch) -> None:
        first, frames, size = 0, list[bytes](), 0
        for index, item in enumerate(items):
            try:
                data = self._line.marshal(item.exchange, item.to, item.properties, item.body, mandatory=True)
            except Exception as error:  # of this message alone
                batch.settle(index, error)
                continue
            frames.append(data)
            size += len(data)
            self._tag += 1
            self._waiting[self._tag] = (batch, index, item.id)
            self._by_id[item.id] = self._tag
            if size >= TOGETHER:
                if not await self._hand_over(frames, batch, range(index + 1, len(items))):
                    return
                first, frames, size = index + 1, [], 0
        if frames:
            await self._hand_over(frames, batch, range(first, first))

    async def _hand_over(self, frames: list[bytes], batch: _Batch, rest: range) -> bool:
        """Whether the frames are on their way; else their messages, and the rest, have failed."""
        try:
            await self._line.write(b"".join(frames))
        except BaseException as error:
            for _ in frames:  # nothing was written: the next message takes the count of the first of these
                batch_of, index, id = self._waiting.pop(self._tag, (None, 0, ""))
                self._tag -= 1
                self._by_id.pop(id, None)
                if batch_of is not None:
                    batch_of.settle(index, error)
            for index in rest:
                batch.settle(index, error)
            if not isinstance(error, Exception):
                raise
            return False
        return True

    # -- in place of the driver's own

    async def _on_confirm(self, frame: Basic.Ack | Basic.Nack) -> None:
        last = frame.delivery_tag or 0
        tags = [last]
        if frame.multiple:
            tags = []
            for tag in self._waiting:
                if tag > last:
                    break
                tags.append(tag)
        refused = isinstance(frame, Basic.Nack)
        for tag in tags:
            known = self._waiting.pop(tag, None)
            if known is not None:
                batch, index, id = known
                if self._by_id.get(id) == tag:
                    del self._by_id[id]
                batch.settle(index, exceptions.DeliveryError(None, frame) if refused else None)

    async def _on_return(self, frame: Basic.Return) -> None:
        """No queue takes it. The confirmation follows."""
        header = await self.channel._get_frame()
        assert isinstance(header, ContentHeader)
        message = await self.channel._read_content(frame, header)
        tag = self._by_id.get(str(header.properties.message_id))
        if tag in self._waiting:
            batch, index, _ = self._waiting[tag]
            batch.results[index] = exceptions.PublishError(message, frame)

    def _end(self) -> None:
        """The channel has closed: of what the server has not spoken about nobody knows."""
        self._line.ended = True
        reason = self.channel._close_exception or exceptions.ChannelInvalidStateError("the channel has closed")
        waiting, self._waiting = self._waiting, {}
        self._by_id.clear()
        for batch, index, _ in waiting.values():
            batch.settle(index, reason)
