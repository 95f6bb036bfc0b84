"""Calls: a request through a queue, and its answer straight back to who asked."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from penstock import codec
from penstock.brokers.base import Broker, Inbox
from penstock.clock import backoff_delay
from penstock.errors import (
    BrokerError,
    BrokerUnavailable,
    ExpirationError,
    PublishTimeout,
    RemoteError,
    TimeoutError,
    one_line,
)
from penstock.message import RESERVED, Delivery, Outgoing
from penstock.terms import EXPIRED, FAILED, REPLY, TAKEN, Failure, Reply

log = logging.getLogger("penstock.client")

SLACK = 0.5
"""Seconds after its expiry in which the word that a call was taken may still arrive."""
RECEIVE_WAIT = 1.0  # seconds between looks whether answers can still come
BACKOFF = (0.05, 2.0)  # seconds, first and longest


class _Pending:
    """A call that waits for its answer."""

    __slots__ = ("answer", "complaint", "life", "limit", "sent", "taken")

    def __init__(self, answer: asyncio.Future[Delivery], limit: asyncio.Timeout) -> None:
        self.answer = answer
        self.limit = limit
        self.life: int | None = None
        """That of the inbox in which it was asked; None: it was not asked yet."""
        self.complaint = ""
        """Why not."""
        self.sent = False
        """The broker may have it, though it has not said so."""
        self.taken = False

    def fail(self, error: BaseException) -> None:
        """It raises this, and tries no more to ask."""
        if not self.answer.done():
            self.answer.set_exception(error)
            if not self.limit.expired():
                self.limit.reschedule(0)

    @property
    def failure(self) -> BaseException | None:
        answer = self.answer
        return answer.exception() if answer.done() and not answer.cancelled() else None

    def expire(self) -> None:
        if not self.taken:
            self.fail(ExpirationError(f"nobody took the call in time{self.complaint}"))


class Calls:
    """The calls of a client over one broker, until `close`. One inbox for all of them, opened on first use.

    A call that cannot be answered any more, because the connection that its answer would come over is
    gone, fails at once.
    """

    def __init__(self, get_broker: Callable[[], Awaitable[Broker]], max_body: int) -> None:
        self._get_broker = get_broker
        self._max_body = max_body
        self._inbox: Inbox | None = None
        self._opening: asyncio.Future[Inbox] | None = None
        self._pumping: asyncio.Task[None] | None = None
        self._pending: dict[str, _Pending] = {}
        self._closed = False

    async def call(self, message: Outgoing, timeout: float | None, expires: float | None) -> Reply:
        """Send a request and wait for its answer; `timeout` and `expires` are seconds from now.

        :raises Unroutable, QueueFull, …: no queue took it.
        :raises ExpirationError: nobody took it within `expires`.
        :raises TimeoutError: not answered within `timeout`, or stopped where it ran.
        :raises PublishTimeout: the broker could not be asked within `timeout`.
        :raises RemoteError: it was raised where it ran.
        :raises BrokerUnavailable: the connection was lost meanwhile; whether it ran is not known.
        """
        if self._closed:
            raise BrokerUnavailable("the client is closed")
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(timeout)
        pending = _Pending(loop.create_future(), limit)
        timer = None if expires is None else loop.call_later(expires + SLACK, pending.expire)
        try:
            async with limit:
                self._pending[message.id] = pending
                await self._request(message, pending)
                answer = await pending.answer
        except builtins.TimeoutError as error:
            if pending.failure is not None:
                raise pending.failure from None
            if isinstance(error, TimeoutError) or timeout is None:
                raise
            if expires is not None and expires <= timeout and not pending.taken:
                why = f"nobody took the call to {message.topic!r} within {expires:g} s{pending.complaint}"
                raise ExpirationError(why) from None
            if pending.life is None:
                raise PublishTimeout(
                    f"not confirmed within {timeout:g} s{pending.complaint}", reached=pending.sent
                ) from None
            raise TimeoutError(f"no answer from {message.topic!r} within {timeout:g} s") from None
        finally:
            if timer is not None:
                timer.cancel()
            self._pending.pop(message.id, None)
            if not pending.answer.cancel() and not pending.answer.cancelled():
                pending.answer.exception()  # it may have come when nobody waited any more
        return self._read(answer)

    async def close(self) -> None:
        """Calls under way fail, and nothing is asked any more. Idempotent."""
        self._closed = True
        self._fail(BrokerUnavailable("the client was closed before the answer came"))
        await _end(self._opening)
        inbox = self._inbox
        await _end(self._pumping)
        if inbox is not None:
            await _close(inbox)

    async def _request(self, message: Outgoing, pending: _Pending) -> None:
        """Send it, trying again for as long as nothing can be sent."""
        failures = 0
        while True:
            try:
                inbox = self._live_inbox() or await self._open()
                pending.life, pending.sent = inbox.life, True
                await inbox.request(message, pending.fail)
                pending.complaint = ""
                return
            except BrokerUnavailable as error:
                pending.life, pending.complaint = None, f": {error}"
                failures += 1
                log.debug("cannot call %r: %s", message.topic, one_line(error))
            await asyncio.sleep(backoff_delay(failures, BACKOFF, random.Random()))  # noqa: S311 - jitter

    def _live_inbox(self) -> Inbox | None:
        """The inbox, if its answers are handed out here: its event loop may have ended with the one before."""
        pumping = self._pumping
        return None if pumping is None or pumping.done() or not _runs_here(pumping) else self._inbox

    async def _open(self) -> Inbox:
        if self._opening is None or not _runs_here(self._opening):
            self._opening = asyncio.ensure_future(self._new_inbox())
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, opening: asyncio.Future[Inbox]) -> None:
        if self._opening is opening:
            self._opening = None
        if not opening.cancelled():
            opening.exception()  # whoever waits for it is told

    async def _new_inbox(self) -> Inbox:
        inbox = (await self._get_broker()).inbox()
        life = inbox.life
        try:
            await inbox.listen(frozenset())
        except BaseException:
            await _close(inbox)
            raise
        self._inbox = inbox
        self._pumping = asyncio.create_task(self._pump(inbox, life), name="penstock-replies")
        return inbox

    async def _pump(self, inbox: Inbox, life: int) -> None:
        """Hand out answers until a life of the inbox has ended and nobody asks in the next, or it fails for good."""
        try:
            await self._hand_out_all(inbox, life)
        except Exception as error:
            log.error("answers cannot come in: %s", one_line(error), exc_info=not isinstance(error, BrokerError))
            self._fail(error if isinstance(error, BrokerError) else BrokerUnavailable("answers cannot come in"))
        finally:
            if self._inbox is inbox:
                self._inbox = None  # the next call opens another one
            await _close(inbox)

    async def _hand_out_all(self, inbox: Inbox, life: int) -> None:
        first, failures = life, 0
        while inbox.life == first or self._is_anybody_asking():
            try:
                arrived = await inbox.receive(RECEIVE_WAIT)
                failures = 0
            except BrokerUnavailable as error:
                arrived = []
                failures += 1
                log.warning("answers cannot come in: %s", one_line(error))
            for delivery in arrived:
                self._hand_out(delivery)
            if inbox.life != life:
                life = inbox.life
                self._fail(BrokerUnavailable("the connection was lost before the answer came"), before=life)
            if failures:
                await asyncio.sleep(backoff_delay(failures, BACKOFF, random.Random()))  # noqa: S311 - jitter
            elif not arrived and life != first:
                await asyncio.sleep(BACKOFF[0])  # it may be closed, and return at once

    def _is_anybody_asking(self) -> bool:
        return any(one.life is not None and not one.answer.done() for one in self._pending.values())

    def _hand_out(self, delivery: Delivery) -> None:
        pending = self._pending.get(delivery.id)
        if pending is None or pending.answer.done():
            return  # it has given up waiting
        if delivery.headers.get(REPLY) == TAKEN:
            pending.taken = True
        else:
            pending.answer.set_result(delivery)

    def _fail(self, error: BrokerError, before: int | None = None) -> None:
        for pending in tuple(self._pending.values()):
            if before is None or (pending.life is not None and pending.life < before):
                pending.fail(error)

    def _read(self, answer: Delivery) -> Reply:
        kind = answer.headers.get(REPLY)
        if kind == EXPIRED:
            raise ExpirationError("nobody took the call in time")
        if kind == FAILED:
            raise_failure(read_failure(codec.decode(answer.raw, answer.headers, self._max_body)))
        value = codec.decode(answer.raw, answer.headers, self._max_body)
        headers = {
            name: value
            for name, value in answer.headers.items()
            if name not in codec.CONTENT and not name.startswith(RESERVED)
        }
        return Reply(value, headers)


def read_failure(data: Any) -> Failure:
    try:
        return msgspec.convert(data, Failure)
    except msgspec.ValidationError:
        return Failure("Exception", str(data))


def raise_failure(failure: Failure) -> None:
    """:raises TimeoutError, RemoteError: what it says."""
    if failure.timeout:
        raise TimeoutError(failure.message)
    raise RemoteError(failure.type, failure.message, failure.traceback)


def _runs_here(work: asyncio.Future[Any]) -> bool:
    return work.get_loop() is asyncio.get_running_loop()


async def _end(work: asyncio.Future[Any] | None) -> None:
    if work is not None and _runs_here(work):
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def _close(inbox: Inbox) -> None:
    with contextlib.suppress(BrokerError):
        await inbox.close()
