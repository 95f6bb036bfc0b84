"""`Link`: one connection to the server, made again whenever it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import Iterator
from typing import Any, cast

import aiormq
from aiormq import exceptions
from aiormq.channel import Channel
from pamqp import constants, decode

from penstock.config import mask, parse_url
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable

log = logging.getLogger("penstock.amqp")

CONNECT_TIMEOUT = 10.0
"""Seconds for a connection or a channel, unless the URL says `timeout=`."""
CLOSE_TIMEOUT = 5.0  # seconds
LARGEST_FRAME = 2**28
"""Bytes that no server of AMQP announces; four letters of text where a length should be are more."""
ABORTED_WITHIN = 1.0  # seconds in which the driver notices that its line was broken off

BROKEN = (exceptions.AMQPError, exceptions.ChannelInvalidStateError, OSError, TimeoutError)
"""What the driver raises when the line or the server fails; beside `CancelledError`, see `Link.guard`."""

_driver_log = logging.getLogger("aiormq")

# The driver's codec lets through names of some ASCII letters only; the server takes any UTF-8.
constants.DOMAIN_REGEX["queue-name"] = re.compile(r"[\s\S]*")


def _short_text(data: bytes) -> tuple[int, str]:
    """A property as the driver reads it; where that fails, because it is no UTF-8, as much of it as can be said."""
    return data[0] + 1, data[1 : data[0] + 1].decode("utf-8", "replace")


def _table(data: bytes) -> tuple[int, Any]:
    """Headers as the driver reads them; none, where a name of them is no UTF-8."""
    try:
        return decode.field_table(data)
    except UnicodeDecodeError:
        return 4 + int.from_bytes(data[:4], "big"), {}


# Anybody may put such a message into a queue: it must not end the connection on which it is delivered.
decode.METHODS.update(shortstr=_short_text, table=_table)


class _Remembering(aiormq.TransportFactory):
    """Keeps what the driver hides in its writer."""

    def __init__(self, factory: aiormq.TransportFactory) -> None:
        self._factory = factory
        self.transport: asyncio.WriteTransport | None = None

    async def create(self, url: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self._factory.create(url, **kwargs)
        self.transport = writer.transport
        return reader, writer


class _Connection(aiormq.Connection):
    """The driver's, but for a silent line: it looks at it late, so it may wait for two heartbeats only."""

    HEARTBEAT_GRACE_MULTIPLIER = 2

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._line = self._transport_factory = _Remembering(self._transport_factory)

    async def end(self, within: float) -> None:
        """Close it; break it off when that takes longer, as it does for ever where the line takes no more bytes."""
        closing = asyncio.ensure_future(self.close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait({closing}, timeout=within)
        finally:
            if not closing.done() and self._line.transport is not None:
                self._line.transport.abort()
        await asyncio.wait({closing}, timeout=ABORTED_WITHIN)


def cancelled_by_caller() -> bool:
    """Whether a `CancelledError` just caught is meant for the current task."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Link:
    """A connection, opened on use. `channel` gives an open channel, on a new connection if need be."""

    def __init__(self, url: str, shown: str, timeout: float = CONNECT_TIMEOUT) -> None:
        self._url = url
        self._shown = mask(shown)
        self._timeout = timeout
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()
        self._closed = 0
        """How many times."""

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """What the driver raises inside comes out as one of ours.

        When a connection ends, the driver cancels some of those who wait for an answer. They must not
        take that for a cancellation of their own.
        """
        try:
            yield
        except asyncio.CancelledError:
            if cancelled_by_caller():
                raise
            raise BrokerUnavailable(f"{self._shown}: the connection was closed") from None
        except BrokerError:
            raise
        except BROKEN as error:
            raise self.translate(error) from None
        except Exception as error:
            if type(error) is not Exception:
                raise
            # what the driver raises where it ends without a reason
            raise BrokerUnavailable(f"{self._shown}: the connection was closed") from None

    async def channel(self, confirms: bool = True) -> Channel:
        """A new channel.

        :raises BrokerUnavailable, BrokerRefused: no connection.
        """
        async with self._opening:
            if self._connection is None or self._connection.is_closed:
                if _driver_log.level == logging.NOTSET:
                    _driver_log.setLevel(logging.CRITICAL)  # each failure is told once, by us
                closed = self._closed
                connection = _Connection(self._url)
                with self.guard():
                    async with asyncio.timeout(self._timeout):
                        await connection.connect()
                if closed != self._closed:
                    await connection.end(CLOSE_TIMEOUT)
                    raise BrokerUnavailable(f"{self._shown}: the connection was closed")
                self._connection = connection
            connection = self._connection
        with self.guard():
            async with asyncio.timeout(self._timeout):
                try:
                    return cast(Channel, await connection.channel(publisher_confirms=confirms))
                except RuntimeError as error:  # it has closed since
                    raise exceptions.AMQPConnectionError(*error.args) from None

    async def close(self) -> None:
        """Raises nothing."""
        self._closed += 1
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed:
            await connection.end(CLOSE_TIMEOUT)

    async def close_channel(self, channel: Channel | None) -> None:
        """Close a channel that may be closed already, and raise nothing."""
        if channel is not None and not channel.is_closed:
            with contextlib.suppress(BrokerError), self.guard():
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await channel.close()

    def translate(self, error: BaseException) -> BrokerError:
        """One of ours, in one line."""
        text = " ".join(str(error).split())
        cause = error.__cause__ or error
        if isinstance(error, exceptions.AuthenticationError | exceptions.ProbableAuthenticationError):
            return BrokerRefused(f"{self._shown} refuses the login: {text}")
        if isinstance(error, exceptions.InvalidFrameError) and "Connection.OpenOk" in text:
            vhost = parse_url(self._url).path[1:] or "/"
            return BrokerRefused(f"{self._shown}: there is no vhost {vhost!r}, or this user may not enter it")
        if isinstance(error, exceptions.ConnectionNotAllowed | exceptions.ChannelAccessRefused):
            return BrokerRefused(f"{self._shown}: {text}")
        if isinstance(cause, ssl.SSLCertVerificationError | FileNotFoundError):
            return BrokerRefused(f"{self._shown}: {' '.join(str(cause).split())}")
        if isinstance(cause, asyncio.IncompleteReadError) and (cause.expected or 0) > LARGEST_FRAME:
            return BrokerRefused(f"{self._shown}: what listens there does not speak AMQP")
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            return BrokerRefused(f"{self._shown}: what listens there does not speak TLS, which the URL asks for")
        if isinstance(error, TimeoutError) and not text:
            text = "no answer in time"
        return BrokerUnavailable(f"{self._shown}: {text or type(error).__name__}")
