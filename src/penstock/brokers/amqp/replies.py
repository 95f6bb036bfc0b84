"""Replies on RabbitMQ: to the address that the server put into a request, through the default exchange."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiormq.exceptions import ConnectionInternalError

from penstock.brokers.amqp import topology, wire
from penstock.brokers.amqp.line import Line
from penstock.brokers.amqp.publisher import unwritable
from penstock.errors import BrokerError
from penstock.message import Outgoing

if TYPE_CHECKING:
    from penstock.brokers.amqp.link import Link

log = logging.getLogger("penstock.amqp")

_DIRECT = wire.REPLY_TO + "."
_PROCESS = 12  # bytes at the end of an Erlang process id, after the name of its node


class Replier:
    """Sends replies on a channel of its own, unconfirmed.

    RabbitMQ ends the connection on which it is given the address of a node that it does not know, or none at
    all behind the right beginning. So the first reply to each node goes over a connection that is made for it,
    by `elsewhere`.
    """

    def __init__(self, link: Link, elsewhere: Callable[[], Link]) -> None:
        self._link = link
        self._elsewhere = elsewhere
        self._line: Line | None = None
        self._changing = asyncio.Lock()
        self._nodes: set[bytes] = set()
        """Those that the server knew."""
        self._good: set[str] = set()
        """Addresses on them."""

    async def send(self, messages: Sequence[Outgoing]) -> None:
        """All in one write.

        :raises BrokerUnavailable: they may not have been sent.
        """
        with self._link.guard():
            line = self._line
            if line is None or line.closed:
                line = await self._open()
            data: list[bytes] = []
            for message in messages:
                written = _marshal(line, message)
                if written and (message.topic in self._good or await self._is_good(message)):
                    data.append(written)
            if data:
                await line.write(b"".join(data))

    async def _open(self) -> Line:
        async with self._changing:
            if self._line is None or self._line.closed:
                line = self._line = Line(await self._link.channel(confirms=False))
                line.channel.closing.add_done_callback(lambda _: self._gone(line))
            return self._line

    def _gone(self, line: Line) -> None:
        reason = line.channel._close_exception
        if reason is not None:
            log.warning("the server closed the channel for replies, the last of them are lost: %s", reason)
        if line is self._line:
            self._line = None
        self._good.clear()  # a node may have gone
        self._nodes.clear()

    async def _is_good(self, message: Outgoing) -> bool:
        """Whether the message is still to be sent, to an address that costs nothing but itself."""
        address = message.topic
        if not address.startswith(_DIRECT):
            return True  # a queue of somebody who does not use inboxes
        node = _node(address)
        if node is None:
            log.debug("message %s is not sent: %r is nobody's address", message.id, address)
            return False
        async with self._changing:
            known = node in self._nodes
            if not known and not await self._try(message):
                log.debug("message %s is not sent: the server does not know the node of %r", message.id, address)
                return False
            self._nodes.add(node)
        if len(self._good) >= 10_000:
            self._good.clear()
        self._good.add(address)
        return known

    async def _try(self, message: Outgoing) -> bool:
        """Send it over another connection, and see whether that survives.

        :raises BrokerUnavailable: there is none.
        """
        link = self._elsewhere()
        try:
            line = Line(await link.channel(confirms=False))
            with link.guard():
                try:
                    await line.write(_marshal(line, message))
                    await line.channel.basic_qos(prefetch_count=0)  # answered in its turn
                except ConnectionInternalError:
                    return False
            return True
        finally:
            await link.close()


def _marshal(line: Line, message: Outgoing) -> bytes:
    """Nothing, of what cannot be sent."""
    try:
        properties = wire.to_properties(message, message.topic, topology.MOST_LEVELS, room=line.room)
        properties.correlation_id = message.id  # by which others tell replies apart
        if topology.can_be_named(message.topic):
            return line.marshal(topology.DEFAULT_EXCHANGE, message.topic, properties, message.body, mandatory=False)
        log.debug("message %s is not sent: %r is nobody's address", message.id, message.topic)
    except Exception as error:  # of this message alone
        reason = error if isinstance(error, BrokerError) else unwritable(message, error)
        log.warning("reply %s is not sent: %s", message.id, reason)
    return b""


def _node(address: str) -> bytes | None:
    """The node in a direct reply-to address, which is an Erlang process id and a key."""
    try:
        process = base64.b64decode(address[len(_DIRECT) :].split(".")[0], validate=True)
    except (binascii.Error, ValueError):
        return None
    return process[:-_PROCESS] or None
