"""`Passage`: what a run makes of a transaction's record as it goes through it, decided without doing anything."""

from __future__ import annotations

from collections.abc import Callable

from penstock.errors import (
    TransactionAborted,
    TransactionCancelled,
    TransactionError,
    TransactionStopped,
    TransactionSuspended,
    one_line,
    printable,
)
from penstock.stores.records import Body
from penstock.tasks.journal import FINISHED, OPEN, Done, Status, Stored, Wish


class Passage:
    """The changes that an attempt of a run makes, its number being `run`. Each alters what it is given, and says
    whether it has; each may be made twice, where it is not known whether it was made.

    All but `enter` raise `TransactionError` where a later run has entered the transaction and this one would go on.
    """

    def __init__(self, run: int, now: Callable[[], float], tells: bool) -> None:
        self.run = run
        self._now = now
        self._tells = tells

    def enter(self, stored: Stored, first: Stored, lost: set[int]) -> bool:
        """The run enters it. `first`: how it begins; `lost`: the attempts of its run whose processes went away.

        :raises TransactionError: it is another one's, or a later run has entered it.
        """
        if (stored.name, stored.queue) != (first.name, first.queue):
            other = f"{stored.name!r}, of {stored.queue!r}"
            raise TransactionError(f"a task has one transaction, and that of this task is another one: {other}")
        if stored.run > self.run:
            raise _elsewhere()
        if stored.status in FINISHED:
            return True  # written once more, it does not expire under way
        again, crashed = stored.run == self.run and stored.turns > 0, stored.run in lost
        stored.run = self.run
        if stored.turns == 0:
            self._turn(stored, "Processing")
        elif stored.wish == "cancel":
            self._cancel(stored)
        elif stored.wish == "suspend" and stored.status in OPEN:
            self._turn(stored, "Suspending", stored.error)
        elif stored.status == "Suspending" and not again and not (stored.wish == "suspend" and crashed):
            stored.wish = None  # somebody has the run begin again
            self._turn(stored, "RecoveryProcessing")
        return True

    def begin(self, stored: Stored, name: str) -> bool:
        """A step is about to be done, if its status, and what is wished of it, allows that."""
        if stored.status in FINISHED:
            return False
        self._check_ours(stored)
        if stored.status in OPEN and stored.wish == "cancel":
            self._cancel(stored)
        elif stored.status in OPEN and stored.wish == "suspend":
            self._turn(stored, "Suspending")
        elif stored.status in OPEN:
            stored.step, stored.updated_at = name, self._now()
        else:
            return False
        return True

    def begin_undo(self, stored: Stored, name: str) -> bool:
        """A step is about to be undone, if it is still to be."""
        if stored.status != "Cancelling":
            return False
        self._check_ours(stored)
        stored.step, stored.updated_at = name, self._now()
        return True

    def record(self, stored: Stored, name: str, result: Body) -> bool:
        """A step is done."""
        self._check_ours(stored)
        if stored.done(name) is not None:
            return False
        now = self._now()
        stored.steps.append(Done(name, now, result))
        stored.step, stored.updated_at = name, now
        return True

    def record_undone(self, stored: Stored, name: str) -> bool:
        """A step is undone."""
        self._check_ours(stored)
        done = stored.done(name)
        if done is None or done.undone:
            return False
        done.undone, stored.updated_at = True, self._now()
        return True

    def leave(self, stored: Stored, error: BaseException | None) -> bool:
        """The block has ended, with an error or without."""
        if stored.status in FINISHED:
            return False
        if error is None:
            self._check_ours(stored)
        if stored.run != self.run or stored.status not in OPEN:
            return False
        if isinstance(error, TransactionAborted):
            stored.wish = None
            self._turn(stored, "Aborted", _said(error))
        elif stored.wish == "cancel" or isinstance(error, TransactionCancelled):
            self._cancel(stored, None if error is None else _said(error))
        elif error is not None:
            return self._suspend(stored, _said(error), "suspend" if isinstance(error, TransactionSuspended) else None)
        else:
            stored.wish = None  # there is nothing left to suspend
            self._turn(stored, "Complete" if stored.status == "Processing" else "RecoveryComplete")
        return True

    def end(self, stored: Stored, status: Status, error: str | None) -> bool:
        """The undoing has come to its end."""
        self._check_ours(stored)
        if stored.status != "Cancelling":
            return False
        stored.wish = None
        self._turn(stored, status, error)
        return True

    def give_up(self, stored: Stored, error: str) -> bool:
        """The run has ended otherwise than by leaving the block."""
        return stored.run == self.run and self._suspend(stored, error)

    def _suspend(self, stored: Stored, error: str, wish: Wish | None = None) -> bool:
        if stored.status not in OPEN:
            return False
        stored.wish = stored.wish or wish
        self._turn(stored, "Suspending", error)
        return True

    def _cancel(self, stored: Stored, error: str | None = None) -> None:
        stored.wish = None
        if stored.status != "Cancelling":
            self._turn(stored, "Cancelling", error or stored.error)

    def _turn(self, stored: Stored, status: Status, error: str | None = None) -> None:
        stored.turn(status, self._now(), self._tells, error)

    def _check_ours(self, stored: Stored) -> None:
        """:raises TransactionError: another run has entered it since."""
        if stored.run != self.run:
            raise _elsewhere()


def _elsewhere() -> TransactionError:
    return TransactionError("this run was taken for dead: another one goes on with its transaction")


def _said(error: BaseException) -> str:
    """An error in one line; of ours, whose kind the status says, the message alone."""
    return printable(" ".join(str(error).split())) if isinstance(error, TransactionStopped) else one_line(error)
