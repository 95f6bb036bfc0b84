"""`Line`: one connection, from its beginning to its end. It is never repaired: a `Link` makes another.

The driver connects, signs in, reads, writes and looks after the line's health. What arrives is handed over where
it is read, in its order; the driver's own way has a queue and a task for each subscription.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from nats.aio.client import Client
from nats.errors import Error as NatsError

from penstock.brokers.nats.wire import status_of
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable

log = logging.getLogger("penstock.nats")

Handler = Callable[[bytes, bytes, bytes, "bytes | None"], None]
"""Called with subject, reply subject, payload and header block (None: none)."""

HIGH_WATER = 1_000_000  # bytes written but not yet on their way, beyond which writers wait
MANY = "maximum connections exceeded"
"""The server's word for it."""
CLOSE_TIMEOUT = 5.0  # seconds
ASK_AGAIN = 1.0
"""Seconds after which a question without an answer is asked again."""
ABORT_TIMEOUT = 0.5
"""Seconds to end what never began: a failed handshake may be waited for in vain."""


class Asker(Protocol):
    """Who waits for answers."""

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None: ...

    def refused(self, number: int, error: Exception) -> None:
        """There will be no answer."""
        ...


class _Greeting:
    """Stands for the transport while we sign in: what is written goes in one piece, when an answer is awaited.

    A server that will not have us says why and closes at once. What we write first is then answered by a reset, on
    which a second write fails, and asyncio closes without reading what is still in the socket: those last words.
    """

    def __init__(self, transport: Any, begun: Callable[[], None]) -> None:
        self._transport = transport
        self._begun = begun
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._held.append(data)

    async def drain(self) -> None:
        """Nothing is on its way yet."""

    def readline(self) -> Awaitable[bytes]:
        self._begun()
        self._transport.write(b"".join(self._held))
        line: Awaitable[bytes] = self._transport.readline()
        return line


class _Wire(Client):
    """The driver's client, which tells its line what comes and when it ends. `secure`: nothing is said in clear."""

    def __init__(self, line: Line, secure: bool) -> None:
        super().__init__()
        self._line = line
        self._secure = secure

    def _connect_command(self) -> bytes:
        """:raises BrokerRefused: TLS was asked for, and the server that greeted us would go on without."""
        if self._secure and not (self._server_info.get("tls_required") or self.options["tls_handshake_first"]):
            raise BrokerRefused("this server speaks no TLS, which the URL asks for: nothing was sent to it")
        command = super()._connect_command()
        transport: Any = self._transport

        def begun() -> None:
            self._transport = transport

        self._transport = _Greeting(transport, begun)  # type: ignore[assignment]  # as far as signing in needs it
        return command

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self._line.arrived(sid, subject, reply, data, headers or None)

    async def _process_op_err(self, e: Exception) -> None:
        self._line.ended(e)
        await super()._process_op_err(e)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._line.ended(self._err)
        self._pending, self._pending_data_size = [], 0  # what is not written yet must not hold up the end
        await super()._close(status, do_cbs)

    @property
    def reads(self) -> bool:
        """An answer could be heard: not once everything in the event loop was cancelled."""
        return self._reading_task is not None and not self._reading_task.done()

    def hand_over(self, data: bytes) -> None:
        """Have it written soon."""
        self._pending.append(data)
        self._pending_data_size += len(data)
        if self._flush_queue is not None and self._flush_queue.empty():
            self.kick()

    def kick(self) -> asyncio.Future[Any]:
        """Done when all that was handed over before is on its way."""
        written: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._flush_queue is not None and not self._flush_queue.full():
            self._flush_queue.put_nowait(written)
        else:
            written.set_result(None)
        return written

    def last_words(self) -> str:
        """The error with which the server ended the connection, where the driver has not read it."""
        reader = getattr(self._transport, "_io_reader", None)
        _, found, text = bytes(getattr(reader, "_buffer", b"")).partition(b"-ERR ")
        return text.partition(b"\r\n")[0].decode(errors="replace").strip("'") if found else ""

    def words_in_clear(self, error: BaseException) -> str:
        """The same where TLS was to begin, and has eaten them: there it sends us away for one reason alone."""
        is_clear = isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER"
        return MANY if is_clear and self._server_info.get("tls_required") else ""

    async def end(self) -> None:
        """Close, whatever became of it."""
        try:
            if self._flush_queue is not None:  # else `connect` was never begun
                await self.close()
        finally:
            transport: Any = self._transport
            if transport:
                transport.close()
                with contextlib.suppress(OSError):
                    await transport.wait_closed()

    def ping(self, answered: asyncio.Future[Any]) -> None:
        self._pongs.append(answered)
        self.hand_over(b"PING\r\n")


class Line:
    """Made by `Link`. Every method is for the event loop that it was opened in."""

    def __init__(self, inbox_prefix: str, secure: bool) -> None:
        self.inbox = f"{inbox_prefix}.{secrets.token_hex(11)}"
        self.proven = False
        """JetStream is known to be there: without it the server is only not ready."""
        self._client = _Wire(self, secure)
        self._handlers: dict[int, Handler] = {}
        self._sids = itertools.count(1)
        self._numbers = itertools.count(1)
        self._asked: dict[bytes, tuple[Asker, int, str]] = {}
        self._watched: dict[str, Callable[[BrokerRefused], None]] = {}
        self._prefix = f"{self.inbox}.".encode()
        self._on_end: list[Callable[[], None]] = []
        self._ended: str | None = None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unheard: BrokerRefused | None = None
        self._open = False
        self.last_error: Exception | None = None

    async def open(self, **options: Any) -> None:
        """Raises what the driver raises."""
        try:
            await self._client.connect(allow_reconnect=False, error_cb=self._on_error, **options)
        except BaseException as error:
            self.ended(None)
            words = self._client.last_words() or self._client.words_in_clear(error)
            if words and isinstance(error, Exception):
                self.last_error = NatsError(words)
            raise
        self._open = True
        self.listen(f"{self.inbox}.*", self._on_answer)

    # -- what it is

    @property
    def closed(self) -> bool:
        return self._ended is not None or not self._open

    @property
    def reason(self) -> str:
        return self._ended or "the connection was closed"

    @property
    def largest(self) -> int:
        """Bytes of headers and body that the server takes together."""
        return self._client.max_payload

    @property
    def has_peers(self) -> bool:
        """The server is one of a cluster."""
        return bool(self._client._server_info.get("cluster"))

    @property
    def others(self) -> list[str]:
        """Other servers of the cluster, as this one named them."""
        return [f"{uri.scheme}://{uri.netloc}" for uri in self._client.discovered_servers]

    def on_end(self, call: Callable[[], None]) -> None:
        """Have it called when the connection has ended."""
        self._on_end.append(call)

    # -- writing

    def write(self, data: bytes) -> None:
        """:raises BrokerUnavailable: the connection has ended."""
        self.check()
        self._client.hand_over(data)

    def check(self) -> None:
        if self.closed:
            raise BrokerUnavailable(self.reason)

    async def room(self) -> None:
        """Wait while too much is still to be written."""
        if self._client.pending_data_size > HIGH_WATER and not self.closed:
            await asyncio.wait({self._client.kick(), self._end}, return_when=asyncio.FIRST_COMPLETED)

    def ping(self) -> asyncio.Future[Any]:
        """Done when the server has read all that was written before, and we what it had sent by then.

        :raises BrokerUnavailable: the connection has ended.
        """
        self.check()
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._client.ping(answered)
        return answered

    async def flush(self, timeout: float) -> None:
        """Until the server has read all that was written before, and we what it had sent by then.

        :raises BrokerUnavailable: the connection has ended, or it takes too long.
        :raises BrokerRefused: one of the subjects to be heard is not for this user.
        """
        answered = self.ping()
        await asyncio.wait({answered, self._end}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self.check()
        if not answered.done():
            raise BrokerUnavailable("no answer in time")
        if self._unheard is not None:
            refusal, self._unheard = self._unheard, None
            raise refusal

    def listen(self, subject: str, handler: Handler) -> int:
        """Hear a subject from now on; what to give to `leave`."""
        sid = next(self._sids)
        self.write(b"SUB %b  %d\r\n" % (subject.encode(), sid))
        self._handlers[sid] = handler
        return sid

    def leave(self, sid: int) -> None:
        """Hear it no more once the server has read this; until then its handler is still called."""
        if not self.closed:
            self.write(b"UNSUB %d \r\n" % sid)

    def forget(self, sid: int) -> None:
        self._handlers.pop(sid, None)

    # -- asking

    def watch(self, subject: str, refused: Callable[[BrokerRefused], None]) -> None:
        """Have it called when the server says that this user may not publish to `subject`."""
        self._watched[subject.lower()] = refused

    def expect(self, asker: Asker, number: int, subject: str) -> bytes:
        """A subject to which one answer to `asker` can be sent. `subject`: where it is asked."""
        word = b"%d" % next(self._numbers)
        self._asked[word] = (asker, number, subject)
        return self._prefix + word

    def drop(self, answer: bytes) -> None:
        """What comes to this subject is not waited for any more."""
        self._asked.pop(answer[len(self._prefix) :], None)

    def give_up(self, asker: Asker) -> None:
        """None of its answers is waited for any more."""
        for word in [word for word, asked in self._asked.items() if asked[0] is asker]:
            del self._asked[word]

    def arrived(self, sid: int, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        handler = self._handlers.get(sid)
        if handler is not None:
            try:
                handler(subject, reply, data, block)
            except Exception:
                log.exception("a message on %s could not be read", subject.decode(errors="replace"))

    def _on_answer(self, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        asked = self._asked.pop(subject[len(self._prefix) :], None)
        if asked is not None:
            asked[0].answered(asked[1], data, block)

    async def _on_error(self, error: Exception) -> None:
        """What the driver reports beside the calls. The server says no to subjects that this user may not use."""
        self.last_error = error
        text = " ".join(str(error).removeprefix("nats: ").strip("'").split())
        if not isinstance(error, NatsError) or "permissions violation" not in text:
            return
        log.error("the server refuses: %s", text)
        refusal = BrokerRefused(f"this user lacks a right on the server: {text}")
        if "subscription to" in text:
            self._unheard = self._unheard or refusal
            return
        for word, (asker, number, subject) in list(self._asked.items()):
            if f'"{subject.lower()}"' in text:
                del self._asked[word]
                asker.refused(number, refusal)
        for subject, refused in self._watched.items():
            if f'"{subject}"' in text:
                refused(refusal)

    # -- the end

    def ended(self, error: Exception | None) -> None:
        """The connection is gone: everybody who waits for something of it is told."""
        if self._ended is not None:
            return
        text = " ".join(str(error or "").removeprefix("nats: ").split())
        self._ended = text or "the connection was closed"
        if not self._end.done():
            self._end.set_result(None)
        self._handlers.clear()
        self._watched.clear()
        asked, self._asked = list(self._asked.values()), {}
        for asker, number, _ in asked:
            asker.refused(number, BrokerUnavailable(self._ended))
        calls, self._on_end = self._on_end, []
        for call in calls:
            call()

    async def close(self) -> None:
        """Write what is to be written, and end. Idempotent."""
        try:
            if not self.closed and self._client.reads:
                with contextlib.suppress(BrokerError):
                    await self.flush(CLOSE_TIMEOUT)
        finally:
            self.ended(None)
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT if self._open else ABORT_TIMEOUT):
                    await self._client.end()
            except (NatsError, OSError, TimeoutError) as error:
                log.debug("closing: %s", error)


class One:
    """Asks for one answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[bytes, bytes | None]] = asyncio.get_running_loop().create_future()

    def answered(self, number: int, payload: bytes, block: bytes | None) -> None:
        if not self.done.done():
            self.done.set_result((payload, block))

    def refused(self, number: int, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class NobodyThereError(Exception):
    """No one listens to the subject."""


async def ask(line: Line, subject: str, payload: bytes, timeout: float) -> tuple[bytes, bytes | None]:
    """The answer to one question: payload and header block. It is one that may be asked twice: who was to answer it
    in a cluster may have died, and whoever comes after him was not asked.

    :raises NobodyThereError: nobody is there to answer.
    :raises BrokerUnavailable: no answer in time, or the connection has ended.
    :raises BrokerRefused: this user may not ask it.
    """
    one = One()
    line.check()
    reply = line.expect(one, 0, subject)
    question = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply, len(payload), payload)
    try:
        async with asyncio.timeout(timeout):
            while not one.done.done():
                line.write(question)
                await asyncio.wait({one.done}, timeout=ASK_AGAIN)
            data, block = await one.done
    except TimeoutError:
        raise BrokerUnavailable("no answer in time") from None
    finally:
        line.drop(reply)
    status = status_of(block)
    if status is not None and status[0] == 503:
        raise NobodyThereError(subject)
    return data, block
