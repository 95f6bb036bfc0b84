"""`Asking`: the part of `Client` that asks for work: `send`, `call`, `parallel`, `waitfor`."""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from penstock import codec, terms
from penstock.brokers.base import Broker
from penstock.client.calls import Calls
from penstock.client.handles import Handle
from penstock.client.parallel import Parallel
from penstock.client.publishing import FIRST_RETRY, LONGEST_RETRY, Fits, Publishing, check_seconds, check_text
from penstock.clock import is_backoff, is_seconds
from penstock.errors import BrokerUnavailable, ExpirationError, PublishTimeout, TimeoutError, Unroutable, one_line
from penstock.message import Outgoing
from penstock.stores.ledger import MOST_BODY, Ledger
from penstock.stores.records import Body, Sent, Standing, TaskRecord, new_taskid
from penstock.terms import Reply, Terms

log = logging.getLogger("penstock.client")

T = TypeVar("T")

LAST_LOOK = 1.25
"""Seconds for a last look at a task that was waited for in vain."""

_DEFAULTS: Mapping[str, Any] = {
    "key": None, "headers": None, "priority": 0, "expires": None, "delay": None, "persistent": True
}  # fmt: skip


class Asking(Publishing):
    """Asks for work and hears what came of it. See `Client`."""

    _known_ledger: Ledger | None = None
    _ledger_loop: asyncio.AbstractEventLoop | None = None
    _calls: dict[str | None, Calls] | None = None

    async def send(
        self,
        topic: str,
        content: Any = None,
        *,
        priority: int = 0,
        expires: float | None = None,
        delay: float | None = None,
        unique: str | None = None,
        retries: int | None = None,
        backoff: tuple[float, float] | None = None,
        result_ttl: float | None = None,
        headers: Mapping[str, Any] | None = None,
        key: str | None = None,
        persistent: bool = True,
        timeout: float | None = 30,
        broker: str | None = None,
    ) -> Handle:
        """Have every task on `topic` run once with `content`; returns the task's id once it is durable.

        `expires`: seconds within which somebody must take it. `delay`: seconds before anybody can.
        `unique`: no other task of this topic with the same key until this one has ended. `retries` and
        `backoff` stand in for the task's own; `result_ttl` is for how many seconds it is remembered after
        its end. With a store, a topic that nobody is on accepts it too: it is recorded, and expires.

        :raises InvalidArguments: the app of this client has a task of that name, and it could not be called so.
        :raises NotUnique: a task that has not ended has the unique key.
        :raises StoreRequired: `unique` without a store.
        :raises Unroutable: nobody is on the topic, and there is no store to record that.
        :raises BodyTooLarge, Unencodable, QueueFull, StorageFull: as they say; nothing was sent.
        :raises PublishTimeout: not confirmed in time; it may have been sent.
        :raises ValueError: a number or header that cannot be.
        """
        asked = Terms(retries=retries, backoff=backoff, result_ttl=result_ttl)
        options = {"priority": priority, "expires": expires, "delay": delay, "headers": headers, "key": key}
        return await self._send_task(
            topic, content, asked, unique, options | {"persistent": persistent}, timeout, broker
        )

    async def call(
        self,
        name: str,
        data: Any = None,
        *,
        priority: int = 0,
        persistent: bool = True,
        expires: float | None = None,
        timeout: float | None = 30,
        headers: Mapping[str, Any] | None = None,
        with_headers: bool = False,
        broker: str | None = None,
    ) -> Any:
        """Have one task answer: `data` is its one argument, what it returns is returned here.

        `expires`: seconds within which somebody must take it; `timeout`: seconds to wait for the answer,
        and those a run may take. `with_headers`: give a `Reply`, the value and the answer's headers.

        :raises InvalidArguments: the app of this client has a task of that name, and it could not be called so.
        :raises Unroutable: nobody has ever been there to answer to this name.
        :raises ExpirationError: nobody took it within `expires`.
        :raises TimeoutError: not answered within `timeout`, or stopped where it ran at its own limit.
        :raises PublishTimeout: the broker could not be asked within `timeout`; nothing was sent.
        :raises RemoteError: what was raised where it ran.
        :raises BodyTooLarge, Unencodable: as they say; nothing was sent.
        :raises BrokerUnavailable: the connection was lost meanwhile; whether it ran is not known.
        :raises ValueError: a number or header that cannot be.
        """
        options = {"priority": priority, "expires": expires, "headers": headers, "persistent": persistent}
        reply = await self._call_task(name, data, False, options, timeout, broker)
        return reply if with_headers else reply.value

    def parallel(self) -> Parallel:
        """`async with client.parallel() as calls:` makes calls at the same time; see `Parallel`."""
        return Parallel(self.call)

    async def waitfor(self, taskid: str, timeout: float | None = None) -> TaskRecord:
        """The record of a task once all of its runs have ended, however they did.

        :raises ExpirationError: nobody took it in time.
        :raises TimeoutError: not within `timeout` seconds.
        :raises UnknownTask: the store knows nothing of it.
        :raises StoreRequired: nothing remembers tasks.
        """
        task = await self._wait(taskid, timeout, "waitfor()")
        if task.state == "expired":
            raise ExpirationError(f"nobody took task {taskid} in time")
        return task.as_record(MOST_BODY)

    # -- what handles and tasks use

    async def _send_task(
        self,
        topic: str,
        body: Any,
        asked: Terms,
        unique: str | None,
        options: dict[str, Any],
        timeout: float | None,
        broker: str | None,
        taskid: str | None = None,
    ) -> Handle:
        check_terms(asked)
        check_seconds("timeout", timeout)
        if unique is not None:
            check_text("a unique key", unique)
            self._keeper.require("unique=")
        taskid = taskid or new_taskid()
        message = await self._asking(topic, body, taskid, options, None if asked.arguments or broker else self._fits)
        if not self._keeper:
            message.headers = {**message.headers, terms.HEADER: terms.write(asked)}
            (refusal,) = await self._send([message], timeout, broker)
            if refusal is not None:
                raise refusal
            return Handle(taskid, self)
        if self._known_ledger is None:  # once connected, what this app itself consumes is known too
            await self._reach(_connected, timeout, broker)
        ledger = await self._ledger(timeout)
        queues = await ledger.topics.queues(topic)
        key = None if unique is None else terms.unique_key(topic, unique)
        asked = terms.replace(asked, recorded=True, runs=max(len(queues), 1), unique=key)
        asked = terms.replace(asked, expiring=message.expires_at is not None)
        content = Body(message.body, {**message.headers, terms.HEADER: terms.write(asked)})
        at, expires_at, ttl = message.enqueued_at, message.expires_at, asked.result_ttl
        sent = Sent(topic, content, at, expires_at, queues, ttl, message.priority, at + message.delay)
        new = await ledger.send(taskid, sent)
        if key is not None:
            try:
                await ledger.reserve(key, taskid, ledger.until_taken(sent))
            except BaseException:
                await self._unsend(ledger, taskid, asked, new)
                raise
        message.headers = {**message.headers, terms.HEADER: terms.write(asked)}
        try:
            (refusal,) = await self._send([message], timeout, broker)
        except PublishTimeout as error:
            if not error.reached:
                await self._unsend(ledger, taskid, asked, new)
            raise  # else it may have been sent, as when this is cancelled: what is written stays
        except Exception:
            await self._unsend(ledger, taskid, asked, new)
            raise
        if refusal is not None and not (isinstance(refusal, Unroutable) and not queues):
            await self._unsend(ledger, taskid, asked, new)
            raise refusal
        return Handle(taskid, self)

    async def _unsend(self, ledger: Ledger, taskid: str, asked: Terms, new: bool) -> None:
        try:
            if new:  # else it was sent before
                await ledger.unsend(taskid)
            if asked.unique is not None:
                await ledger.free(asked.unique, taskid)
        except BrokerUnavailable as error:
            log.warning("task %s was not sent, and stays in the store: %s", taskid, one_line(error))

    async def _call_task(
        self,
        name: str,
        data: Any,
        arguments: bool,
        options: dict[str, Any],
        timeout: float | None,
        broker: str | None,
    ) -> Reply:
        expires = options.get("expires")
        if timeout is not None and not is_seconds(timeout, above_zero=True):
            raise ValueError(f"timeout must be more than 0 seconds, not {timeout!r}")
        check_seconds("expires", expires)
        within = min((seconds for seconds in (expires, timeout) if seconds is not None), default=None)
        fits = None if arguments or broker else self._fits
        message = await self._asking(name, data, None, options | {"expires": within}, fits)
        asked = Terms(
            arguments=arguments,
            deadline=None if timeout is None else message.enqueued_at + timeout,
            limit=timeout,
            tell_taken=expires is not None,
        )
        message.headers = {**message.headers, terms.HEADER: terms.write(asked)}
        return await self._calls_over(broker).call(message, timeout, expires)

    async def _asking(
        self, name: str, data: Any, taskid: str | None, options: Mapping[str, Any], fits: Fits | None
    ) -> Outgoing:
        given = {**_DEFAULTS, "id": taskid, **options}
        message = self._message(name, data, **given)
        if fits is not None:
            fits(name, message.body, message.headers)
        message.body, message.headers = await codec.compress_aside(message.body, message.headers)
        return message

    def _calls_over(self, broker: str | None) -> Calls:
        self._pool.check(broker)
        self._listening.start()
        if self._calls is None:
            self._calls = {}
        calls = self._calls.get(broker)
        if calls is None:
            calls = self._calls[broker] = Calls(lambda: self._get_broker(broker), self._max_body)
        return calls

    async def _wait(self, taskid: str, timeout: float | None, what: str) -> Standing:
        self._keeper.require(what)
        check_seconds("timeout", timeout)
        try:
            return await self._with_ledger(lambda ledger: ledger.wait(taskid), timeout)
        except TimeoutError:
            task = await self._with_ledger(lambda ledger: ledger.look(taskid), LAST_LOOK)
        if task.ended:
            return task
        raise TimeoutError(f"task {taskid} has not ended within {timeout:g} s: it is {task.state}")

    async def _record(self, taskid: str) -> TaskRecord:
        self._keeper.require("the record of a task")
        return await self._with_ledger(lambda ledger: ledger.record(taskid), LONGEST_RETRY)

    async def _cancel(self, taskid: str) -> bool:
        self._keeper.require("cancel()")
        return await self._with_ledger(lambda ledger: ledger.cancel(taskid), LONGEST_RETRY)

    async def _ledger(self, timeout: float | None) -> Ledger:
        async def same(ledger: Ledger) -> Ledger:
            return ledger

        return await self._with_ledger(same, timeout)

    async def _with_ledger(self, work: Callable[[Ledger], Awaitable[T]], timeout: float | None) -> T:
        """Have the ledger do something, trying again while the store cannot be reached.

        :raises TimeoutError: it could not for `timeout` seconds.
        """
        delay = FIRST_RETRY
        complaint: BrokerUnavailable | None = None
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await work(await self._get_ledger())
                    except BrokerUnavailable as error:
                        complaint = error
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, LONGEST_RETRY)
        except builtins.TimeoutError as error:
            if isinstance(error, TimeoutError):
                raise
            raise TimeoutError(f"the store did not answer in time: {complaint or self._keeper}") from complaint

    async def _get_ledger(self) -> Ledger:
        store = await self._keeper.get()
        if self._known_ledger is None or self._known_ledger.store is not store:  # that of another event loop
            self._known_ledger, self._ledger_loop = Ledger(store), asyncio.get_running_loop()
        return self._known_ledger

    async def _stop_asking(self) -> None:
        calls, self._calls = self._calls, None
        ledger, self._known_ledger = self._known_ledger, None
        try:
            for one in (calls or {}).values():
                await one.close()
        finally:
            if ledger is not None and self._ledger_loop in (None, asyncio.get_running_loop()):
                await ledger.close()


async def _connected(broker: Broker) -> None:
    """Being given the broker is all."""


def check_terms(asked: Terms) -> None:
    """:raises ValueError: a number that cannot be."""
    retries, backoff, ttl = asked.retries, asked.backoff, asked.result_ttl
    if retries is not None and (type(retries) is not int or not 0 <= retries < 2**31):
        raise ValueError(f"retries must be a whole number, 0 or more, not {retries!r}")
    check_seconds("result_ttl", ttl)
    if backoff is not None and not is_backoff(backoff):
        raise ValueError(f"backoff must be (first, longest) in seconds, not {backoff!r}")
