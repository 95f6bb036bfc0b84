"""Transactions as an operator sees them: the latest, one whole, suspended, resumed, cancelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from penstock.client import Client
from penstock.control import tasks
from penstock.errors import TransactionConflict, UnknownTask, UnknownTransaction
from penstock.stores.base import Touch
from penstock.stores.ledger import SPARE, Ledger
from penstock.stores.records import RunState
from penstock.tasks.journal import FINISHED, OPEN, PAGE, UNFINISHED, Journal, Kept, Status, Stored, TransactionRecord
from penstock.terms import Terms

WITHIN = 5.0
"""Seconds to reach the store or the broker in."""
LEAVING = 5.0
"""Seconds that the run of a suspended transaction may take to end."""
LOOK = 0.1  # seconds between looks whether it has
UNSAID = "its run has ended, and nobody could say how"
UNHEARD = 10.0
"""Seconds after which an event expires that nobody is there for."""


class Transactions:
    """`app.transactions`: the transactions in the store of an app, whichever process they run in."""

    def __init__(self, client: Callable[[], Client]) -> None:
        self._client = client
        self.events = False
        """Each change of a transaction's status that is made in this process is a task on `Transaction.<Status>`."""

    # -- looking

    async def get(self, id: str) -> TransactionRecord:
        """One transaction, by its id, or by that of its task, if that has no other one.

        :raises UnknownTransaction: nothing is known of it.
        :raises TransactionConflict: the task has several.
        :raises StoreRequired, BrokerUnavailable, TimeoutError: there is no store, or it is away.
        """
        return _readable(await self._find(await self._ledger(), id))

    async def list(
        self, status: Status | None = None, name: str | None = None, limit: int = 100
    ) -> Sequence[TransactionRecord]:
        """The latest transactions, newest first; only those of a status or name, if one is given.

        :raises StoreRequired, BrokerUnavailable, TimeoutError: as `get`.
        """
        ledger = await self._ledger()
        found: list[Kept] = []
        async with aclosing(self.journal(ledger).latest(PAGE)) as latest:
            async for kept in latest:
                if name not in (None, kept.stored.name):
                    continue
                kept = await self._up_to_date(ledger, kept)
                if status in (None, kept.stored.status):
                    found.append(kept)
                    if len(found) >= limit:
                        break
        return [_readable(kept) for kept in found]

    # -- what an operator wants

    async def suspend(self, id: str) -> TransactionRecord:
        """Have a transaction that runs stop before its next step; how it stands.

        :raises TransactionConflict: it does not run, or is about to be cancelled.
        :raises UnknownTransaction, …: as `get`.
        """

        def wish(stored: Stored) -> bool:
            if stored.status not in OPEN:
                raise _conflict(id, stored.status, "suspended")
            if stored.wish == "cancel":
                raise TransactionConflict(stored.status, f"transaction {id} is about to be cancelled")
            altered, stored.wish = stored.wish is None, "suspend"
            return altered

        ledger = await self._ledger()
        id = (await self._find(ledger, id)).id
        return _readable(await self.journal(ledger).change(id, wish))

    async def resume(self, id: str, force: bool = False) -> TransactionRecord:
        """Have the run of a suspended transaction begin again, where it was; how it stands. `force`: declare it
        complete, also one that was aborted, and run nothing.

        :raises TransactionConflict: it is not suspended, or its task has no run that can begin again.
        :raises UnknownTransaction, …: as `get`.
        """
        if force:
            return await self._force(id, frozenset({"Suspending", "Aborted"}), "ForceRecoveryComplete", "resumed")
        ledger = await self._ledger()
        journal = self.journal(ledger)
        kept = await self._find(ledger, id)
        id, run = kept.id, await self._run(ledger, kept)
        if kept.stored.status != "Suspending" and not (kept.stored.status in OPEN and _stranded(run)):
            raise _conflict(id, kept.stored.status, "resumed")
        self._check_run(kept, run, "resumed")

        def grant(stored: Stored) -> bool:
            if stored.wish == "cancel":
                raise TransactionConflict(stored.status, f"transaction {id} is about to be cancelled")
            if stored.status not in OPEN | {"Suspending"}:
                raise _conflict(id, stored.status, "resumed")
            altered, stored.wish = stored.wish is not None, None
            if stored.status in OPEN:  # its run has ended, and did not say so
                stored.turn("Suspending", journal.now(), journal.tells, stored.error)
                altered = True
            return altered

        kept = await journal.tell(await journal.change(id, grant, kept))
        await self._begin_again(ledger, kept)
        return _readable(await journal.get(id))

    async def cancel(self, id: str, force: bool = False) -> TransactionRecord:
        """Have a transaction cancelled: what was done is undone, the latest first, by its run, which begins again for
        that if it has ended, with all runs of its task that did not succeed. How it stands. `force`: declare it
        cancelled, and undo nothing.

        :raises TransactionConflict: it is finished, or its task has no run that can begin again.
        :raises UnknownTransaction, …: as `get`.
        """
        ledger = await self._ledger()
        journal = self.journal(ledger)
        if force:
            return await self._force(id, UNFINISHED, "ForceCancelled", "cancelled")

        def wish(stored: Stored) -> bool:
            if stored.status in FINISHED:
                raise _conflict(id, stored.status, "cancelled")
            before.append(stored.wish)
            altered, stored.wish = stored.wish != "cancel", "cancel"
            return altered

        before: list[Any] = []
        id = (await self._find(ledger, id)).id
        kept = await journal.change(id, wish)
        run = await self._run(ledger, kept)
        if run is None or run.state not in ("queued", "running"):
            try:
                self._check_run(kept, run, "cancelled")
                await self._begin_again(ledger, kept)
            except TransactionConflict:
                await journal.change(id, lambda stored: _withdraw(stored, before[-1]))
                raise
        return _readable(await journal.get(id))

    async def _force(self, id: str, allowed: frozenset[Status], status: Status, how: str) -> TransactionRecord:
        ledger = await self._ledger()
        journal = self.journal(ledger)

        def declare(stored: Stored) -> bool:
            if stored.status not in allowed:
                raise _conflict(id, stored.status, f"{how} by force")
            stored.wish = None
            stored.turn(status, journal.now(), journal.tells, stored.error)
            return True

        id = (await self._find(ledger, id)).id
        kept = await journal.tell(await journal.change(id, declare))
        run = await self._run(ledger, kept)
        if run is None or run.ended:  # what was kept for the transaction's sake need be no more
            await journal.expire(kept)
        if run is not None and run.ended:
            await self._let_go(ledger, kept)
        return _readable(kept)

    # -- finding one

    async def _find(self, ledger: Ledger, id: str) -> Kept:
        journal = self.journal(ledger)
        kept = await journal.find(id)
        if kept is None:
            several = await journal.of_task(id)
            if not several:
                raise UnknownTransaction(id)
            kept = several[-1]
            if len(several) > 1:
                known = ", ".join(one.id for one in several)
                raise TransactionConflict(kept.stored.status, f"task {id} has several transactions: {known}")
        return await self._up_to_date(ledger, kept)

    async def _up_to_date(self, ledger: Ledger, kept: Kept) -> Kept:
        """One that goes on, as it seems, is suspended if its run has ended: that one's process could not say so."""
        if kept.stored.status not in OPEN:
            return kept
        try:
            run = (await ledger.look(kept.taskid)).runs.get(kept.stored.queue)
        except UnknownTask:
            return kept
        if run is None or not run.ended:
            return kept
        journal = self.journal(ledger)

        def suspend(stored: Stored) -> bool:
            if stored.status not in OPEN or stored.run != kept.stored.run:
                return False
            stored.turn("Suspending", journal.now(), journal.tells, stored.error or UNSAID)
            return True

        try:
            return await journal.tell(await journal.change(kept.id, suspend, kept))
        except UnknownTransaction:  # it was forgotten meanwhile
            return kept

    # -- the run that it is in

    async def _let_go(self, ledger: Ledger, kept: Kept) -> None:
        """A run that has ended was kept for the sake of a transaction; and its task, unless another run needs it."""
        taskid, ttl = kept.taskid, kept.stored.ttl
        touches = [Touch(f"run/{taskid}/{kept.stored.queue}", ttl + SPARE)]
        try:
            runs = (await ledger.look(taskid)).runs
        except UnknownTask:  # it was forgotten meanwhile
            return
        others = [queue for queue in runs if queue != kept.stored.queue]
        going = [one for one in await self.journal(ledger).of_task(taskid) if one.stored.status in UNFINISHED]
        if all(runs[queue].ended for queue in others) and not going:
            touches.insert(0, Touch(f"task/{taskid}", ttl))
        await ledger.store.apply(touches)

    async def _run(self, ledger: Ledger, kept: Kept) -> RunState | None:
        """That of its task; one that is about to end, as the transaction is, has ended. None: it is not known."""
        leaving = kept.stored.status in ("Suspending", "Aborted")
        until = self.journal(ledger).now() + LEAVING
        async with ledger.followers.follow([f"run/{kept.taskid}/{kept.stored.queue}"]) as bell:
            while True:
                try:
                    run = (await ledger.look(kept.taskid)).runs.get(kept.stored.queue)
                except UnknownTask:
                    return None
                if run is None or run.state != "running" or not leaving or self.journal(ledger).now() > until:
                    return run
                await bell.wait(LOOK)

    def _check_run(self, kept: Kept, run: RunState | None, how: str) -> None:
        """:raises TransactionConflict: it cannot begin again."""
        if run is not None and _stranded(run):
            return
        if run is None:
            why = "nothing is known of its task any more"
        elif run.state == "queued":
            why = "its run begins again by itself"
        else:
            why = "its run goes on" if run.state == "running" else "its run has succeeded all the same"
        status = kept.stored.status
        raise TransactionConflict(status, f"transaction {kept.id}, {status}, cannot be {how}: {why}")

    async def _begin_again(self, ledger: Ledger, kept: Kept) -> None:
        """:raises TransactionConflict: the task's run cannot."""
        try:
            await tasks.retry(ledger, await self._client()._get_broker(), kept.taskid)
        except (tasks.Conflict, UnknownTask) as error:
            raise TransactionConflict(kept.stored.status, str(error)) from error

    # -- events

    def journal(self, ledger: Ledger) -> Journal:
        """The transactions in a store, whose changes are told as this process does."""
        return Journal(ledger.store, self._send if self.events else None)

    async def tell_left(self) -> None:
        """Issue the events that another process should have issued and did not.

        :raises BrokerUnavailable, TimeoutError: the store is away.
        """
        await (await self._journal()).tell_left()

    async def _send(self, topic: str, content: Mapping[str, Any], taskid: str) -> None:
        """With somebody there for it, an event waits for as long as it takes."""
        client = self._client()
        expires = None if await (await client._ledger(WITHIN)).topics.queues(topic) else UNHEARD
        await client._send_task(topic, content, Terms(), None, {"expires": expires}, WITHIN, None, taskid=taskid)

    async def _journal(self) -> Journal:
        return self.journal(await self._ledger())

    async def _ledger(self) -> Ledger:
        client = self._client()
        client._keeper.require("transactions")
        return await client._ledger(WITHIN)


def _stranded(run: RunState | None) -> bool:
    return run is not None and run.state in tasks.UNSUCCESSFUL


def _withdraw(stored: Stored, wish: Any) -> bool:
    altered = stored.wish == "cancel"
    if altered:
        stored.wish = wish
    return altered


def _conflict(id: str, status: Status, how: str) -> TransactionConflict:
    return TransactionConflict(status, f"transaction {id} cannot be {how}: it is {status}")


def _readable(kept: Kept) -> TransactionRecord:
    """A record in which everything has a JSON form, as `tasks.readable`."""
    record = kept.stored.as_record(kept.id)
    steps = [msgspec.structs.replace(step, result=tasks.plain(step.result)) for step in record.steps]
    return msgspec.structs.replace(record, steps=steps)
