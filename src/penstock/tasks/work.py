"""`Work`: one task at work. From a message to a run, and from what came of it to a record or a reply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from penstock import codec, terms
from penstock.brokers.base import Broker
from penstock.client.publishing import check_headers
from penstock.clock import LONGEST, backoff_delay
from penstock.context import current_headers, current_progress
from penstock.delivery import history
from penstock.delivery.settlement import Burial
from penstock.delivery.stopping import Overrun, RemoteFailure, Runner
from penstock.delivery.surroundings import Surroundings
from penstock.errors import (
    BodyTooLarge,
    BrokerRefused,
    BrokerUnavailable,
    RemoteError,
    TimeoutError,
    TransactionStopped,
    TransactionSuspended,
    Unavailable,
    one_line,
    printable,
)
from penstock.message import Message, Outgoing
from penstock.stores.ledger import Held, Ledger
from penstock.stores.records import Body, RunState, State
from penstock.tasks.definition import TaskFunction
from penstock.tasks.limits import Limits
from penstock.tasks.lookout import Lookout
from penstock.tasks.progress import Progress, nowhere, unheard
from penstock.tasks.signature import Bound, Task
from penstock.tasks.transaction import Transaction, given_up
from penstock.terms import EXPIRED, FAILED, REPLY, TAKEN, Failure, Reply, Terms

log = logging.getLogger("penstock.tasks")

T = TypeVar("T")

FIRST_RETRY, LONGEST_RETRY = 0.05, 5.0  # seconds
MAX_TRACEBACK = 6000  # characters
MAX_MESSAGE = 4000
UNDOING = 3
"""Times that a run begins again, beyond its retries, to undo what somebody has cancelled."""
OUTSIDE = "its run ended outside of it"
MAX_HEADERS = 16_000  # characters of an answer's headers, so that every system can carry them


class Work:
    """What becomes of a task's messages. `handle` is the route's handler, `announce` hears of burials."""

    def __init__(
        self,
        task: TaskFunction[Any, Any],
        runner: Runner,
        broker: Broker,
        ledger: Ledger | None,
        limits: Limits | None,
        around: Surroundings,
    ) -> None:
        self._task = task
        self._runner = runner
        self._broker = broker
        self._ledger = ledger
        self._lookout = None if ledger is None else Lookout(ledger)
        self._limits = limits
        self._around = around
        self._begun: dict[str, tuple[Held, Terms, Transaction | None]] = {}
        """Runs that have failed and are about to be buried."""
        self._under_way: dict[str, asyncio.Event] = {}

    async def handle(self, message: Message) -> None:
        """Run it, and answer or record. Raises what is to be tried again or buried."""
        asked = terms.read(message.source.headers)
        if self._limits is None or await self._needs_no_turn(message, asked):
            await self._handle(message, asked)
            return
        async with contextlib.AsyncExitStack() as admitted:
            message.taken = False  # it has to wait its turn
            try:
                await admitted.enter_async_context(self._limits.admitted())
            except BrokerUnavailable as error:
                raise Unavailable(f"the store: {one_line(error)}") from error
            message.taken = True
            await self._handle(message, asked)

    async def announce(self, burial: Burial) -> bool:
        """Tell whoever waits that a message is given up; whether it belongs into the dead letters."""
        delivery = burial.delivery
        asked = terms.read(delivery.headers)
        failure = _as_failure(burial.error, burial.reason)
        if delivery.reply_to is not None:
            if asked.deadline is None or self._around.clock.time() <= asked.deadline:
                await self._reply(delivery.reply_to, delivery.id, FAILED, *codec.encode(failure))
            return burial.reason == "crashed"  # the caller has all there is to know of the others
        number = history.read(delivery.headers).attempts + delivery.redelivered + 1
        begun = self._begun.pop(delivery.id, None)
        if self._ledger is None or not asked.recorded:
            return True
        if begun is not None and begun[0].delivery >= number:
            held, asked, transaction = begun
        else:  # or it is of an earlier delivery, which was lost before it was buried
            transaction = None
            held = await self._ledger.at_hand(delivery.id, self._task.name, asked, number)
            if held.over:
                await self._given_up_late(self._ledger, held, asked)
                return held.state.state == "failed"  # else it is done with
            if await given_up(self._ledger, held, asked, _line(failure)):
                asked = _for_long(asked)
        run = await self._finish(held, "failed", asked, transaction, error=failure, line=_line(failure))
        return run.state == "failed"

    async def _needs_no_turn(self, message: Message, asked: Terms) -> bool:
        """Whether no run will come of it: it has expired, or ended, or been cancelled."""
        if self._is_late(message, asked):
            return True
        if self._ledger is None or not asked.recorded:
            return False
        try:
            held = await self._ledger.at_hand(message.id, self._task.name, asked, message.attempt)
        except BrokerUnavailable:
            return False
        return asked.again is None and (held.over or held.state.cancel)

    def _is_late(self, message: Message, asked: Terms) -> bool:
        now, expires_at = self._around.clock.time(), message.source.expires_at
        if message.source.reply_to is not None and asked.deadline is not None and now > asked.deadline:
            return True
        return expires_at is not None and message.attempt == 1 and now > expires_at

    async def _handle(self, message: Message, asked: Terms) -> None:
        if message.source.reply_to is not None:
            await self._answer(message, message.source.reply_to, asked)
        else:
            await self._once_here(message, asked)

    # -- calls

    async def _answer(self, message: Message, to: str, asked: Terms) -> None:
        source, now = message.source, self._around.clock.time()
        if asked.tell_taken and source.expires_at is not None and now > source.expires_at and message.attempt == 1:
            await self._reply(to, source.id, EXPIRED)
            return
        if asked.deadline is not None and now > asked.deadline:
            log.debug("%s: the caller of %s waits no more", self._task.name, source.id)
            return
        if asked.tell_taken:
            await self._reply(to, source.id, TAKEN)
        headers: dict[str, Any] = {}
        current_progress.set(nowhere if self._ledger is None else unheard)
        try:
            value = await self._run(message, asked, headers)
            body, described = await self._encode(value, headers)
        except Exception as error:
            trace = None if isinstance(error, Stopped) else error  # where it was stopped is nowhere in particular
            log.warning("%s failed on call %s: %s", self._task.name, source.id, one_line(error), exc_info=trace)
            await self._reply(to, source.id, FAILED, *codec.encode(_as_failure(error, "failed")))
        else:
            await self._reply(to, source.id, None, body, described)

    async def _reply(
        self, to: str, id: str, kind: str | None, body: bytes = b"", headers: Mapping[str, Any] | None = None
    ) -> None:
        """If it cannot be sent, the caller's connection has most likely gone with ours: it waits no more."""
        headers = headers or {}
        if kind is not None:
            headers = {**headers, REPLY: kind}
        reply = Outgoing(id=id, topic=to, body=body, headers=headers, persistent=False)
        try:
            await self._broker.reply([reply])
        except BrokerUnavailable as error:
            log.warning("%s: no answer to call %s: %s", self._task.name, id, one_line(error))

    # -- tasks

    async def _once_here(self, message: Message, asked: Terms) -> None:
        """A second copy waits for the first to end. It may be all there is, if that one is not ours any more."""
        while (other := self._under_way.get(message.id)) is not None:
            await other.wait()
        ended = self._under_way[message.id] = asyncio.Event()
        try:
            await self._carry_out(message, asked)
        finally:
            del self._under_way[message.id]
            ended.set()

    async def _carry_out(self, message: Message, asked: Terms) -> None:
        source, ledger, lookout = message.source, self._ledger, self._lookout
        if self._is_late(message, asked):
            log.info("%s: task %s waited here until it had expired", self._task.name, source.id)
            if ledger is not None and asked.recorded:
                await self._until_done(lambda: ledger.expire(source.id, self._task.name, asked))
            return
        if ledger is None or lookout is None or not asked.recorded:
            if asked.recorded:
                log.warning("%s: nobody hears of task %s: this app has no store", self._task.name, source.id)
            current_progress.set(nowhere if self._ledger is None else unheard)
            try:
                await self._encode(await self._run(message, asked, {}), {})
            except Unavailable:
                raise
            except Exception:
                self._try_again(message, asked)
                raise
            return
        try:
            held = await ledger.begin(source.id, self._task.name, asked, message.attempt)
        except BrokerUnavailable as error:
            raise Unavailable(f"the store: {one_line(error)}") from error
        if held.over:
            log.debug("%s: task %s is %s, and needs no other run", self._task.name, source.id, held.state.state)
            await self._until_done(lambda: self._given_up_late(ledger, held, asked))
            _bury_if_failed(held.state)
            return
        progress = Progress(ledger, held)
        current_progress.set(progress)
        try:
            value = await self._watched(message, asked, held, lookout)
            if value is _CANCELLED:
                await progress.close()
                if not await self._taken_over(ledger, held, progress.transaction):
                    asked = await self._outlasting(held, progress.transaction, asked, "its task was cancelled")
                _bury_if_failed(await self._finish(held, "cancelled", asked, progress.transaction))
                return
            body, described = await self._encode(value, {})
        except Exception as error:
            await progress.close()
            line, transaction, away = one_line(error), progress.transaction, isinstance(error, Unavailable)
            if not away and transaction is not None:
                await transaction.give_up(line)
            if away or self._begins_again(message, asked, transaction, error):
                if transaction is not None:
                    held.state.lasts = not transaction.over
                await self._until_done(lambda: ledger.requeue(held, line))
                raise
            asked = await self._outlasting(held, transaction, asked, line)
            if transaction is not None and (state := transaction.end_with(error)) is not None:
                await self._finish(held, state, asked, transaction, error=_as_failure(error, "failed"), line=line)
                return  # somebody wanted that: it is no dead letter
            self._begun[source.id] = held, asked, transaction
            raise
        finally:
            progress.stop()
        await progress.close()
        if progress.transaction is None:
            await self._outlasting(held, None, asked, OUTSIDE)
        elif progress.transaction.left_open:
            await progress.transaction.give_up(OUTSIDE)
        result = Body(body, dict(described))
        _bury_if_failed(await self._finish(held, "succeeded", asked, progress.transaction, result=result))

    async def _outlasting(self, held: Held, transaction: Transaction | None, asked: Terms, line: str) -> Terms:
        """The terms of a run that ends without success: a task is remembered for as long as its transaction goes on."""
        ledger = self._ledger
        assert ledger is not None
        if transaction is not None:
            await transaction.give_up(line)
            return asked if transaction.over else _for_long(asked)
        if not _may_have_begun_one(held):
            return asked
        return _for_long(asked) if await self._until_done(lambda: given_up(ledger, held, asked, line)) else asked

    async def _given_up_late(self, ledger: Ledger, held: Held, asked: Terms) -> None:
        """A run was ended by somebody else than who carried it out: what that one would have done of `_outlasting`."""
        run = held.state
        if not run.ended or run.state == "succeeded" or not _may_have_begun_one(held):
            return
        line = "its task was cancelled" if run.error is None else _line(run.error)
        if await given_up(ledger, held, asked, line):
            await ledger.keep(held)

    async def _taken_over(self, ledger: Ledger, held: Held, transaction: Transaction | None) -> bool:
        """Whether the run of a transaction goes on with a later delivery."""
        if transaction is None:
            return False
        latest = await self._until_done(lambda: ledger.look_at(held))
        return not latest.ended and held.delivery < latest.delivery

    def _begins_again(self, message: Message, asked: Terms, transaction: Transaction | None, error: Exception) -> bool:
        """Whether a run that failed is to be tried again, as `_try_again`, unless its transaction says otherwise."""
        if isinstance(error, TransactionStopped) or (transaction is not None and transaction.rests):
            return False
        return self._try_again(message, asked, UNDOING if transaction is not None and transaction.to_undo else 0)

    def _try_again(self, message: Message, asked: Terms, more: int = 0) -> bool:
        """Whether a run that failed is to be tried again, by its message's verdict; `more` times than is asked."""
        failures = history.read(message.source.headers).failures + 1
        retries = self._task.policy.retries if asked.retries is None else asked.retries
        if failures > retries + more:
            return False
        message.retry(backoff_delay(failures, asked.backoff or self._task.policy.backoff, self._around.rng))
        return True

    async def _watched(self, message: Message, asked: Terms, held: Held, lookout: Lookout) -> Any:
        """Run it, unless somebody cancels the task meanwhile."""
        run = lookout.enter(held)
        try:
            return await self._run(message, asked, {})
        except asyncio.CancelledError:
            if not run.cancelled or run.task.uncancel():
                raise
            return _CANCELLED
        finally:
            lookout.leave(run)

    async def _finish(
        self,
        held: Held,
        state: State,
        asked: Terms,
        transaction: Transaction | None,
        *,
        result: Body | None = None,
        error: Failure | None = None,
        line: str | None = None,
    ) -> RunState:
        """Write the end of a run down; how it stands then, perhaps in another way."""
        ledger = self._ledger
        assert ledger is not None
        if asked.result_ttl is None:
            asked = terms.replace(asked, result_ttl=self._task.policy.result_ttl)
        run = await self._until_done(lambda: ledger.finish(held, state, asked, result=result, error=error, line=line))
        if run.state != state:
            log.warning("%s: task %s has %s too late: it is %s", self._task.name, held.taskid, state, run.state)
        if asked.result_ttl == LONGEST and run.ended and run.state != "succeeded" and not run.lasts:
            await self._until_done(lambda: ledger.keep(held))  # whoever has ended it did not know of the transaction
        if transaction is not None and (run.state == "succeeded" or (run.ended and asked.runs == 1)):
            await transaction.expire()
        return run

    async def _until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """What has come of a run is written down, however long the store is away; its message waits."""
        delay = FIRST_RETRY
        while True:
            try:
                return await work()
            except BrokerRefused:
                raise
            except BrokerUnavailable as error:
                log.warning("%s: cannot be recorded, again in %.1f s: %s", self._task.name, delay, one_line(error))
            await asyncio.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY)

    # -- both

    async def _run(self, message: Message, asked: Terms, headers: dict[str, Any]) -> Any:
        """One run, within its limit: the smaller of the task's and the caller's.

        :raises TimeoutError: it was stopped there.
        """
        bound: Bound = message.body
        current_headers.set(headers)
        whole = Task(message.id, asked.topic or message.topic, bound.content, message)
        args, kwargs = self._task.signature.with_task(bound, whole)
        limit = self._task.policy.timeout
        if asked.limit is not None and (limit is None or asked.limit < limit):
            limit = asked.limit
        try:
            value = await self._runner.run(args, kwargs, limit)
        except Overrun as error:
            raise Stopped(f"task {self._task.name!r} was stopped: it ran for over {error.limit:g} s") from None
        if isinstance(value, Reply):
            headers.update(value.headers)
            return value.value
        return value

    async def _encode(self, value: Any, headers: dict[str, Any]) -> tuple[bytes, Mapping[str, Any]]:
        """:raises Unencodable, BodyTooLarge, ValueError: what the function returned cannot be sent."""
        if headers:
            check_headers(headers)
            size = sum(len(name) + len(str(value)) for name, value in headers.items())
            if size > MAX_HEADERS:
                raise ValueError(f"the headers of an answer hold {MAX_HEADERS} characters, and not {size}")
        data, described = codec.encode(value, headers)
        if len(data) > self._around.max_body:
            raise BodyTooLarge(len(data), self._around.max_body)
        return await codec.compress_aside(data, described)


class Stopped(TimeoutError):
    """A run was stopped at its limit. (Any other `TimeoutError` is the function's own.)"""


class _Cancelled:
    """In place of a result."""


_CANCELLED: Any = _Cancelled()


def _may_have_begun_one(held: Held) -> bool:
    """Whether an attempt may have begun a transaction: it says so, or was lost and could not say anything."""
    run = held.state
    forgotten = len(run.trials) < run.started
    return run.lasts or forgotten or any(trial.outcome == "lost" for trial in run.trials)


def _for_long(asked: Terms) -> Terms:
    return terms.replace(asked, result_ttl=LONGEST)


def _bury_if_failed(run: RunState) -> None:
    """With a message of a run that has failed in other hands: whether it has come to the dead letters is not known.

    :raises RemoteError: what it failed with.
    """
    if run.state == "failed" and (run.error is None or run.error.type != TransactionSuspended.__name__):
        error = run.error or Failure("Failed", "it is not known why")
        raise RemoteError(error.type, error.message, error.traceback)


def _as_failure(error: BaseException | str | None, reason: str) -> Failure:
    """An error as data."""
    if isinstance(error, RemoteFailure | RemoteError):
        return Failure(error.type, error.message[:MAX_MESSAGE], error.traceback)
    if isinstance(error, BaseException):
        trace = None
        if error.__traceback__ is not None:
            trace = printable("".join(traceback.format_exception(error)))[-MAX_TRACEBACK:]
        try:
            text = printable(str(error))[:MAX_MESSAGE]
        except Exception:
            text = "(it cannot say itself)"
        if isinstance(error, Stopped):
            return Failure("TimeoutError", text, trace, timeout=True)
        return Failure(type(error).__name__, text, trace)
    return Failure(reason.capitalize(), error or "it is not known why")


def _line(failure: Failure) -> str:
    text = " ".join(failure.message.split())
    return f"{failure.type}: {text}" if text else failure.type
