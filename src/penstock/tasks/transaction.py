"""`transaction`: a block in a task's run whose steps are done once, and can be undone."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from penstock import codec, terms
from penstock.client.publishing import MAX_BODY, check_text
from penstock.context import current_app, current_message, current_progress
from penstock.delivery.execution import Executor, is_async
from penstock.errors import (
    BodyTooLarge,
    BrokerUnavailable,
    StoreRequired,
    TransactionAborted,
    TransactionCancelled,
    TransactionError,
    TransactionStopped,
    TransactionSuspended,
    Unavailable,
    UnknownTransaction,
    one_line,
)
from penstock.stores.ledger import MOST_BODY, Held, Ledger
from penstock.stores.records import Body, State
from penstock.tasks.journal import (
    CANCELLED,
    COMPLETE,
    FINISHED,
    OPEN,
    Done,
    Journal,
    Kept,
    Status,
    Stored,
    remembered,
    transaction_id,
)
from penstock.tasks.passage import Passage
from penstock.tasks.progress import Progress, nowhere, unheard
from penstock.terms import Terms

if TYPE_CHECKING:
    from penstock.app import App

log = logging.getLogger("penstock.transactions")

FIRST_RETRY, LONGEST_RETRY = 0.05, 5.0  # seconds
MOST_STEPS = 1000
"""Of a transaction: each writes all of them."""
LONGEST_NAME = 200  # characters


def transaction(name: str | None = None) -> Transaction:
    """`async with transaction("order") as t:` in a task: what `t.step` has done is not done again when the run is
    repeated, and can be undone. The default of `name` is the task's.

    :raises ValueError: a name that is no text of 1 to 200 characters.
    """
    return Transaction(name)


class Transaction:
    """The steps of a task's run, recorded in the store under the task's id. See `transaction`."""

    def __init__(self, name: str | None = None) -> None:
        if name is not None:
            _check_name("a transaction's name", name)
        self._name = name
        self._kept: Kept | None = None
        self._changing = asyncio.Lock()  # of the loop that the store is on
        self._begun = self._unread = False
        self._entered = False
        self._seen: set[str] = set()
        self._undos: dict[str, Callable[[Any], Any] | None] = {}
        self._under_way: set[asyncio.Future[None]] = set()

    @property
    def id(self) -> str:
        """The task's; if that has several runs, with the name of this one's task behind it.

        :raises TransactionError: it has not begun.
        """
        return self._stands.id

    @property
    def status(self) -> Status:
        """As far as it is known here."""
        return self._stands.stored.status

    @property
    def over(self) -> bool:
        """Whether nothing more becomes of it, as far as it is known here, or nothing has."""
        return not self._unread and (self._kept is None or self._kept.stored.status in FINISHED)

    @property
    def left_open(self) -> bool:
        """Whether the run has not left the block, as far as it is known here."""
        return self._kept is None or self.status in OPEN

    @property
    def rests(self) -> bool:
        """Whether somebody has suspended it in this run."""
        return self._ours and self.status == "Suspending" and self._stands.stored.wish == "suspend"

    @property
    def to_undo(self) -> bool:
        """Whether somebody has cancelled it, and this run has not undone it."""
        return self._ours and (self.status == "Cancelling" or self._stands.stored.wish == "cancel")

    @property
    def _ours(self) -> bool:
        return self._kept is not None and self._kept.stored.run == self._passage.run

    @property
    def _stands(self) -> Kept:
        if self._kept is None:
            raise TransactionError("the transaction has not begun: async with it")
        return self._kept

    # -- the block

    async def __aenter__(self) -> Self:
        """:raises StoreRequired: nothing would remember it.
        :raises TransactionError: not in a task's run, or begun already; the task has another one; another run goes on
            with it.
        :raises TransactionSuspended, TransactionCancelled, TransactionAborted: it is not to go on.
        """
        progress = _at_hand()
        if self._begun:
            raise TransactionError("this transaction has begun already: make one for each run")
        if progress.transaction is not None:
            raise TransactionError("a run has one transaction, and this one has begun it already")
        if progress.over:
            raise TransactionError("a transaction is in a task's run, and this run has ended")
        self._begun = True
        progress.transaction = self
        held = progress.held
        task = None if (app := current_app.get(None)) is None else app.tasks.get(held.queue)
        asked = terms.read(current_message.get().source.headers)
        self._home, run = progress.loop, held.attempt or 0
        self._held, journal = held, _journal(progress.ledger, app)
        self._id, self._journal = transaction_id(held.taskid, held.queue, asked.runs), journal
        passage = self._passage = Passage(run, journal.now, journal.tells)
        self._max_body = MAX_BODY if app is None else app.max_body
        now, name = journal.now(), self._name or held.queue
        ttl = remembered(asked.result_ttl, None if task is None else task.policy.result_ttl)
        first = Stored(name, held.queue, now, ttl, run, updated_at=now)
        if self._id != held.taskid:
            first.taskid = held.taskid
        lost = {trial.number for trial in held.state.trials if trial.outcome == "lost"}
        await self._change(lambda stored: passage.enter(stored, first, lost), self._id, first)
        self._entered = True
        if self.status not in (OPEN | COMPLETE | {"Cancelling"}):
            self._entered = False
            raise self._why_not()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """:raises TransactionStopped: it was suspended, cancelled or aborted meanwhile."""
        if error is not None and not isinstance(error, Exception):
            self._entered = False  # the run was interrupted, and another one goes on
            return
        while self._under_way:
            await asyncio.wait(self._under_way)
        self._entered = False
        if isinstance(error, Unavailable):
            return  # it begins again, and goes on
        await self._change(lambda stored: self._passage.leave(stored, error))
        if self._stands.stored.run != self._passage.run:
            return
        if self.status == "Cancelling":
            await self._undo()
            if not isinstance(error, TransactionCancelled):
                raise self._why_not() from error
        held = self.status == "Suspending" and self._stands.stored.wish == "suspend"
        finished = self.status in FINISHED - COMPLETE
        stopped = error is None and self.status not in COMPLETE
        if not isinstance(error, TransactionStopped) and (held or finished or stopped):
            raise self._why_not() from error

    async def step(
        self,
        name: str,
        function: Callable[..., Any],
        /,
        *args: Any,
        undo: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the function returned, as JSON says it: this time, or the time that is in the record, when it is not
        called again. A plain function runs in a thread. `undo(result)` is called should the transaction be cancelled.

        A process that dies in the middle of a step has it done again: let it be repeatable.

        :raises TransactionError: outside of the block; a name that another step has; another run goes on with it; it
            has 1000 steps already.
        :raises TransactionSuspended, TransactionCancelled: somebody wants that.
        :raises BodyTooLarge, Unencodable: its result cannot be recorded: it counts as not done.
        :raises ValueError: a name that is no text of 1 to 200 characters.
        """
        _check_name("a step's name", name)
        if not self._entered:
            raise TransactionError(f"step {name!r} is outside of its transaction's block")
        if name in self._seen:
            raise TransactionError(f"transaction {self.id} has two steps named {name!r}")
        self._seen.add(name)
        done = self._stands.stored.done(name)
        if done is None:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._under_way.add(ended)
            try:
                done = await self._carry_out(name, functools.partial(function, *args, **kwargs))
            except BaseException:
                self._seen.discard(name)  # it may be tried again
                raise
            finally:
                self._under_way.discard(ended)
                ended.set_result(None)
        self._undos[name] = undo
        return self._value(done)

    async def give_up(self, error: str) -> None:
        """The run has ended in another way than by leaving the block: at its limit, or cancelled."""

        def give_up(stored: Stored) -> bool:
            if stored.queue != self._held.queue:
                raise UnknownTransaction(self._id)
            return self._passage.give_up(stored, error)

        try:
            await self._change(give_up, self._id)
        except UnknownTransaction:
            pass  # it was about to begin, or was refused for another one
        except TransactionError as unread:
            log.warning("%s", unread)
            self._unread = True

    async def expire(self) -> None:
        """The run has ended, and with it the need to keep the transaction, if that is finished."""
        if self._kept is not None:
            try:
                await self._journal.expire(self._kept)
            except BrokerUnavailable as error:
                log.warning("transaction %s is kept for longer: %s", self.id, one_line(error))

    def end_with(self, error: BaseException) -> State | None:
        """How a run ends that this error has left, since somebody has suspended or cancelled the transaction; None:
        it has failed as any other.
        """
        if self.rests:
            return "failed"
        if self._kept is not None and isinstance(error, TransactionSuspended) and self.status == "Suspending":
            return "failed"
        if self._kept is not None and isinstance(error, TransactionCancelled) and self.status in CANCELLED:
            return "cancelled"
        return None

    # -- doing and undoing

    async def _carry_out(self, name: str, call: Callable[[], Any]) -> Done:
        known = self._seen.union(done.name for done in self._stands.stored.steps)
        if len(known) > MOST_STEPS:
            raise TransactionError(f"step {name!r}: transaction {self.id} has {MOST_STEPS} steps, the most it may have")
        await self._change(lambda stored: self._passage.begin(stored, name))
        if self.status not in OPEN:
            raise self._why_not(f"step {name!r} is none of it")
        data, described = codec.encode(await _run(call, name))
        size = len(data)
        self._check_size(self._stands.stored, size)  # before it is compressed
        data, described = await codec.compress_aside(data, described)
        result = Body(data, dict(described))

        def record(stored: Stored) -> bool:
            if stored.done(name) is None:
                self._check_size(stored, size)
            return self._passage.record(stored, name, result)

        await self._change(record)
        done = self._stands.stored.done(name)
        assert done is not None
        return done

    async def _undo(self) -> None:
        """Undo what was done, the latest first.

        :raises TransactionAborted: an undo has failed, or the task has not come to a step that was done.
        """
        left = [done for done in reversed(self._stands.stored.steps) if not done.undone]
        for done in left:
            if done.name not in self._undos:
                await self._abort(f"how to undo step {done.name!r} is not known: this run has not come to it", None)
        for done in left:
            undo = self._undos[done.name]
            if undo is not None and self.status == "Cancelling":
                await self._undo_step(done, undo)
        await self._change(lambda stored: self._passage.end(stored, "Cancelled", stored.error))

    async def _undo_step(self, done: Done, undo: Callable[[Any], Any]) -> None:
        await self._change(lambda stored: self._passage.begin_undo(stored, done.name))
        if self.status != "Cancelling":
            return
        try:
            await _run(functools.partial(undo, self._value(done)), done.name)
        except Unavailable:
            raise
        except Exception as error:
            await self._abort(f"step {done.name!r} could not be undone: {one_line(error)}", error)
        await self._change(lambda stored: self._passage.record_undone(stored, done.name))

    async def _abort(self, why: str, error: Exception | None) -> None:
        """:raises TransactionAborted: always."""
        await self._change(lambda stored: self._passage.end(stored, "Aborted", why))
        raise TransactionAborted(why) from error

    def _check_size(self, stored: Stored, size: int) -> None:
        """:raises BodyTooLarge: another result of this size is too much."""
        size += sum(len(one.result.data) for one in stored.steps)
        if size > self._max_body:
            raise BodyTooLarge(size, self._max_body)

    def _value(self, done: Done) -> Any:
        return codec.decode(done.result.data, done.result.headers, max(MOST_BODY, self._max_body))

    def _why_not(self, otherwise: str = "nothing more is done") -> TransactionError | TransactionStopped:
        """Why it does not go on, by its status."""
        id, stored, _ = self._stands
        why = "" if stored.error is None else f": {stored.error}"
        if stored.status == "Suspending":
            return TransactionSuspended(f"transaction {id} was suspended")
        if stored.status in ("Cancelling", "Cancelled", "ForceCancelled"):
            return TransactionCancelled(f"transaction {id} was cancelled{why}")
        if stored.status == "Aborted":
            return TransactionAborted(stored.error or f"transaction {id} was aborted")
        if stored.status == "ForceRecoveryComplete":
            return TransactionStopped(f"transaction {id} was declared complete: nothing more of it is done")
        return TransactionError(f"transaction {id} is {stored.status}: {otherwise}")

    # -- the store

    async def _change(
        self, alter: Callable[[Stored], bool], id: str | None = None, first: Stored | None = None
    ) -> None:
        journal, id = self._journal, id or self.id

        async def work() -> None:
            async with self._changing:  # steps may be under way together
                kept = self._keep(await _written(journal, id, alter, self._kept, first))
            self._keep(await journal.tell(kept))

        if asyncio.get_running_loop() is self._home:
            await work()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._home))

    def _keep(self, kept: Kept) -> Kept:
        if self._kept is None or kept.version > self._kept.version:
            self._kept = kept
        return kept


async def given_up(ledger: Ledger, held: Held, asked: Terms, error: str) -> bool:
    """A task's run has ended without success where nothing of its transaction ran: the one that it may have begun is
    suspended. Whether there is one that is not over, or cannot be read.

    :raises BrokerUnavailable: the store is away.
    """
    journal = _journal(ledger, current_app.get(None))
    try:
        kept = await journal.find(transaction_id(held.taskid, held.queue, asked.runs))
    except TransactionError as unread:
        log.warning("%s", unread)
        return True
    if kept is None or kept.stored.queue != held.queue:
        return False

    def suspend(stored: Stored) -> bool:
        if stored.status not in OPEN or stored.run > held.state.started:
            return False
        stored.turn("Suspending", journal.now(), journal.tells, error)
        return True

    kept = await journal.tell(await journal.change(kept.id, suspend, kept))
    return kept.stored.status not in FINISHED


def _at_hand() -> Progress:
    """The run in which this is called.

    :raises StoreRequired, TransactionError: as `Transaction.__aenter__`.
    """
    progress = current_progress.get(None)
    if isinstance(progress, Progress):
        return progress
    if progress is nowhere:
        raise StoreRequired("transaction()")
    if progress is unheard:
        raise TransactionError("a transaction is in a task that was sent, with a store: this run is in no record")
    if progress is not None:
        raise TransactionError("a transaction cannot be in a task with isolation='process'")
    raise TransactionError("a transaction is in a task's run, and none is running here")


def _journal(ledger: Ledger, app: App | None) -> Journal:
    return Journal(ledger.store) if app is None else app.transactions.journal(ledger)


async def _run(call: functools.partial[Any] | Callable[[], Any], name: str) -> Any:
    """A plain function in a thread of its own: those that others share may all be taken."""
    if is_async(call):
        return await call()
    executor = Executor(lambda _: call(), 1, name)
    try:
        return await executor.call(None)
    finally:
        executor.close()


async def _written(
    journal: Journal, id: str, alter: Callable[[Stored], bool], known: Kept | None, first: Stored | None
) -> Kept:
    """What was done is written down, however long the store is away."""
    delay = FIRST_RETRY
    while True:
        try:
            return await journal.change(id, alter, known, first)
        except BrokerUnavailable as error:
            log.warning("transaction %s cannot be recorded, again in %.1f s: %s", id, delay, one_line(error))
        known = None  # the change may have been made
        await asyncio.sleep(delay)
        delay = min(delay * 2, LONGEST_RETRY)


def _check_name(what: str, name: Any) -> None:
    """:raises ValueError: no text, or none that every store could keep, or too long a one."""
    check_text(what, name)
    if not 0 < len(name) <= LONGEST_NAME:
        raise ValueError(f"{what} has 1 to {LONGEST_NAME} characters, not {len(name)}")
