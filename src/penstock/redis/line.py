"""`Line`: one connection, on which commands follow one another without waiting for answers.

It is hiredis on an asyncio protocol. redis-py's asyncio client costs three times as much a command, and takes one
at a time on each connection; `docs/decisions/7-redis.md` has the figures.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import hiredis

from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable
from penstock.redis.address import Address
from penstock.redis.errors import Reply, translate

Word: TypeAlias = str | bytes | int | float
Heard: TypeAlias = Callable[[list[Any]], None]

CONNECT_TIMEOUT = 5.0  # seconds
_MORE = object()


async def connect(address: Address) -> Line:
    """A line to a server, with nothing said on it yet.

    :raises BrokerUnavailable: not reachable now.
    :raises BrokerRefused: its certificate is not to be trusted, or ours cannot be read.
    """
    loop = asyncio.get_running_loop()
    tls = None if address.tls is None else await asyncio.to_thread(address.ssl_context)  # it reads files

    def make() -> Line:
        return Line(address.name, address.timeout)

    try:
        async with asyncio.timeout(min(CONNECT_TIMEOUT, address.timeout)):
            if address.path is not None:
                _, line = await loop.create_unix_connection(make, address.path)
            else:
                _, line = await loop.create_connection(make, address.host, address.port, ssl=tls)
    except ssl.SSLCertVerificationError as error:
        raise BrokerRefused(
            f"Redis at {address.name} has a certificate not to be trusted: {error.verify_message}"
        ) from None
    except TimeoutError:
        raise BrokerUnavailable(f"Redis at {address.name} does not answer") from None
    except (OSError, UnicodeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise BrokerUnavailable(f"Redis at {address.name} cannot be reached: {reason}") from None
    return line


class Line(asyncio.Protocol):
    """Answers come in the order of the commands. What is sent in one turn of the loop goes out in one piece."""

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self.heard: Heard | None = None
        """Gets each message of subscribed channels, on a line for nothing else."""
        self.ended: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        """Done once the line is gone; its result is the error to raise for it."""
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=Reply, notEnoughData=_MORE)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._out: list[bytes] = []
        self._last = 0.0
        self._unsent = 0
        self._watch: asyncio.TimerHandle | None = None

    @property
    def up(self) -> bool:
        return not self.ended.done()

    @property
    def silent(self) -> float:
        """Seconds for which the server has owed us an answer and neither said nor taken anything."""
        self._notice_sending()
        return self._loop.time() - self._last if self.up and self._waiting else 0.0

    async def call(self, *command: Word) -> Any:
        """The answer to one command. Cancelling does not take it back.

        :raises Reply: the server answered with an error.
        :raises BrokerUnavailable: the line broke; whether the command was carried out is not known.
        """
        return await self.send(command)

    def send(self, command: Sequence[Word]) -> asyncio.Future[Any]:
        """Send one command; its answer to come."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if self.ended.done():
            answer.set_exception(self.ended.result())
            return answer
        if not self._out:
            self._loop.call_soon(self._flush)
        if not self._waiting:
            self._last = self._loop.time()
            if self._watch is None:
                self._watch = self._loop.call_later(self._timeout, self._look)
        self._out.append(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]
        self._waiting.append(answer)
        return answer

    def say(self, *command: Word) -> None:
        """Send a command whose answers are messages (`SUBSCRIBE`, say)."""
        if self.ended.done():
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]

    def close(self) -> None:
        """End it at once. Idempotent."""
        self._end(BrokerUnavailable("the connection is closed"), politely=True)

    def abort(self, reason: str) -> None:
        """Give it up for broken."""
        self._end(BrokerUnavailable(f"Redis at {self.name} {reason}"))

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        self._last = self._loop.time()
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not _MORE:
                if self.heard is not None and type(reply) is list:
                    self.heard(reply)
                elif waiting:
                    answer = waiting.popleft()
                    if answer.done():
                        continue  # cancelled
                    if type(reply) is Reply:
                        answer.set_exception(reply)
                    else:
                        answer.set_result(reply)
                elif type(reply) is Reply:
                    self._end(translate(reply, self.name))
        except hiredis.ProtocolError:
            self._end(BrokerRefused(f"what listens at {self.name} does not speak Redis's protocol"))

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc is not None and str(exc) else ""
        self._end(BrokerUnavailable(f"Redis at {self.name} has gone{reason}"))

    def _end(self, error: BrokerError, *, politely: bool = False) -> None:
        if self.ended.done():
            return
        self.ended.set_result(error)
        if self._watch is not None:
            self._watch.cancel()
        self._flush()
        while self._waiting:
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # whoever was cancelled does not fetch it
        if self._transport is not None:
            if politely:
                self._transport.close()
            else:
                self._transport.abort()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._notice_sending()
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
            self._unsent = self._transport.get_write_buffer_size()

    def _look(self) -> None:
        """Whether the server still answers."""
        self._watch = None
        if not self._waiting:
            return
        self._notice_sending()
        left = self._last + self._timeout - self._loop.time()
        if left <= 0:
            self.abort(f"has not answered for {self._timeout:g} s")
        else:
            self._watch = self._loop.call_later(left, self._look)

    def _notice_sending(self) -> None:
        """What the server takes, slowly, is a sign of life."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if unsent < self._unsent:
            self._last = self._loop.time()
        self._unsent = unsent
