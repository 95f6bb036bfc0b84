"""`Line`: publishing on one channel, straight to the connection.

The driver's `basic_publish` takes a lock, a timeout and a place in a list for each message, and never
waits for a line that takes no more bytes. Requests and replies need neither.
"""

from __future__ import annotations

import asyncio

from aiormq.channel import Channel
from aiormq.exceptions import ChannelInvalidStateError
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.frame import marshal
from pamqp.header import ContentHeader

_FRAME_OVERHEAD = 64  # bytes of a header frame that are not properties, generously
LARGEST_HEADERS = 65_536
"""Bytes for a user's headers; the engine adds its own to a dead letter, in the same frame."""

AHEAD = 256 * 1024
"""Bytes handed to the connection after which somebody waits until the line has taken them."""
TIMEOUT = 15.0  # seconds for a line that takes no more bytes
TOGETHER = 32 * 1024
"""Bytes that go out in one write, where so much comes before the driver's writer has its turn."""


class Line:
    """Each message is written whole, in the order in which the calls return."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.ended = False
        """Set by whoever is about to close the channel."""
        self.room = room_for_headers(channel)
        self._ahead = 0
        self._waiting: _Frames | None = None
        """What the writer has not come to yet, and more can be added to."""

    @property
    def closed(self) -> bool:
        """The driver counts a channel as closed only some turns after it has agreed to the server's closing it."""
        channel = self.channel
        return self.ended or channel.is_closed or channel._close_exception is not None

    def marshal(self, exchange: str, to: str, properties: Basic.Properties, body: bytes, mandatory: bool) -> bytes:
        """The frames of a message. Raises what the driver raises where it cannot write them."""
        number, most = self.channel.number, self.channel.max_content_size
        frames = [
            marshal(Basic.Publish(exchange=exchange, routing_key=to, mandatory=mandatory), number),
            marshal(ContentHeader(properties=properties, body_size=len(body)), number),
        ]
        if len(body) <= most:
            if body:
                frames.append(marshal(ContentBody(body), number))
        else:
            frames += [marshal(ContentBody(body[at : at + most]), number) for at in range(0, len(body), most)]
        return b"".join(frames)

    async def write(self, data: bytes) -> None:
        """Cancelled, or where this raises, nothing was written.

        :raises ChannelInvalidStateError: the channel is closed.
        :raises TimeoutError: the line takes nothing.
        """
        if self.closed:
            raise ChannelInvalidStateError("the channel is closed")
        if self._waiting is not None and self._waiting.add(data):
            return
        self._ahead += len(data)
        drain = self._ahead > AHEAD
        if drain:
            self._ahead = 0
        frames = _Frames(self, data, drain)
        queue = self.channel.write_queue
        if not queue.full():
            queue.put_nowait(frames)
        else:
            async with asyncio.timeout(TIMEOUT):
                await queue.put(frames)
            if self.closed:
                raise ChannelInvalidStateError("the channel is closed")
        self._waiting = frames  # and no longer what others have put before it meanwhile


class _Frames:
    """What the driver's writer takes from its queue; nothing, once the channel has closed: the server ends
    a connection on which it reads something for a channel that is no more."""

    __slots__ = ("_data", "_line", "_size", "should_drain")

    should_close = False

    def __init__(self, line: Line, data: bytes, drain: bool) -> None:
        self._line = line
        self._data = [data]
        self._size = len(data)
        self.should_drain = drain
        """Whether the writer waits until the line has taken it, and so whoever writes next."""

    def add(self, data: bytes) -> bool:
        """Whether it goes out with this."""
        if self.should_drain or self._size >= TOGETHER:
            return False
        self._data.append(data)
        self._size += len(data)
        self._line._ahead += len(data)
        return True

    @property
    def payload(self) -> bytes:
        """The writer's turn has come."""
        if self._line._waiting is self:
            self._line._waiting = None
        return b"" if self._line.closed else b"".join(self._data)

    def drain(self) -> None:
        """The line has taken it: nobody waits for this one."""


def room_for_headers(channel: Channel, *, of_the_user: bool = True) -> int:
    """Bytes for the properties of a message: they go in one frame."""
    room = channel.max_content_size - _FRAME_OVERHEAD
    return min(room, LARGEST_HEADERS) if of_the_user else room
