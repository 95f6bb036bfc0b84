"""Every error a user can meet. One condition, one class; the message is one line."""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Iterable, Mapping


class PenstockError(Exception):
    """The root of Penstock's own errors."""


class ConfigError(PenstockError, ValueError):
    """A URL, an option, a key or a value that cannot be used."""


class DeclarationError(PenstockError, TypeError):
    """A handler or a route that could never work as declared."""


class DuplicateQueue(DeclarationError):
    """A queue that another handler of the same app already owns."""

    def __init__(self, queue: str, owner: str) -> None:
        self.queue = queue
        super().__init__(f"queue {queue!r} already belongs to {owner}")


class DuplicateTask(DeclarationError):
    """A task's name that the app has already."""

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        super().__init__(f"there is a task {name!r} already: {owner}")


class StoreRequired(ConfigError):
    """Something that must be remembered, where nothing is configured to remember it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs a store: give App(store=…), PENSTOCK_STORE or --store, sqlite:///tasks.db say")


class Unsupported(PenstockError):
    """Something that this message system cannot do, and that Penstock cannot supply for it."""


class BrokerError(PenstockError):
    """The message system could not do what was asked."""


class BrokerUnavailable(BrokerError, ConnectionError):
    """The message system cannot be reached or cannot write at the moment; trying again may work."""


class BrokerRefused(BrokerError):
    """The message system will not have us (credentials, no such file, not its format): trying again is no use."""


class UnknownQueue(BrokerError, LookupError):
    """A queue, or a dead letter of one, that is not there."""


class QueueMismatch(BrokerError):
    """A queue that exists with properties that contradict the declared ones."""


class PublishError(BrokerError):
    """Messages that could not be sent, or that the broker did not take.

    Of `publish_many`, `failed` maps the index of each such message to its error; the others are stored.
    """

    def __init__(self, message: str = "", failed: Mapping[int, PublishError] | None = None) -> None:
        self.failed: dict[int, PublishError] = dict(failed or {})
        super().__init__(message)


class Unroutable(PublishError):
    """A name to which no queue is bound: nobody would ever get the message."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no queue is bound to {name!r}: start its consumer once, or check the name")


class QueueFull(PublishError):
    """A queue at its declared length."""

    def __init__(self, queue: str, limit: int) -> None:
        self.queue, self.limit = queue, limit
        super().__init__(f"queue {queue!r} holds its limit of {limit} messages")


class StorageFull(PublishError):
    """The broker has no room to write; what it has confirmed is intact."""


class TimeoutError(PenstockError, builtins.TimeoutError):
    """Taken, and not answered in time; or not ended within the time one would wait."""


class PublishTimeout(PublishError, TimeoutError):
    """The broker did not confirm in time; whether it has the message is not known.

    Where it was never connected to, `reached` is False: it does not have the message.
    """

    def __init__(self, message: str = "", failed: Mapping[int, PublishError] | None = None, reached: bool = True):
        self.reached = reached
        super().__init__(message, failed)


class BodyTooLarge(PublishError, ValueError):
    """A body over `max_body`."""

    def __init__(self, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        super().__init__(f"body of {size} bytes is over the ceiling of {limit} bytes (max_body)")


class Unencodable(PublishError, TypeError):
    """A body that is neither bytes, nor text, nor something that JSON can say."""


class InvalidMessage(PenstockError, ValueError):
    """A received body that cannot be decoded or does not fit the handler's type."""


class InvalidArguments(InvalidMessage, TypeError):
    """Arguments that the task's function cannot be called with."""


class NotUnique(PublishError):
    """A task with the same unique key that has not ended yet: `taskid`."""

    def __init__(self, key: str, taskid: str) -> None:
        self.key, self.taskid = key, taskid
        super().__init__(f"unique key {key!r} belongs to task {taskid}, which has not ended")


class UnknownTask(PenstockError, LookupError):
    """A task of which the store knows nothing (any more)."""

    def __init__(self, taskid: str) -> None:
        self.taskid = taskid
        super().__init__(f"there is no task {taskid!r} in the store: never sent, or ended too long ago")


class TransactionError(PenstockError):
    """A transaction that is not to be had in that way: outside of a task's run, within another one, twice."""


class TransactionConflict(PenstockError):
    """What was asked of a transaction does not go with its `status`."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


class TransactionStopped(PenstockError):
    """A transaction goes on no more in this run, which is not tried again by itself."""


class TransactionSuspended(TransactionStopped):
    """Somebody has suspended it. Let it leave the task."""


class TransactionCancelled(TransactionStopped):
    """Somebody has cancelled it. Let it leave the block: what was done is undone there."""


class TransactionAborted(TransactionStopped):
    """Raise this in a transaction that cannot come to its end and is not to be undone; also: an undo has failed."""


class UnknownTransaction(PenstockError, LookupError):
    """A transaction of which the store knows nothing (any more)."""

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"there is no transaction {id!r} in the store: never begun, or ended too long ago")


class UnknownDefinition(PenstockError, LookupError):
    """A definition that the node does not have. `kind`: workers, jobs, functions or configs."""

    def __init__(self, kind: str, name: str, known: Iterable[str] = ()) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"there is no {name!r} among the {kind}{among(name, known)}")


class UnknownWorker(PenstockError, LookupError):
    """A worker that no node has."""

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name = name
        super().__init__(f"no worker is named {name!r}{among(name, known)}")


class ExpirationError(PenstockError):
    """Nobody took it in time."""


class TaskCancelled(PenstockError):
    """The task was cancelled before it ended."""

    def __init__(self, taskid: str) -> None:
        self.taskid = taskid
        super().__init__(f"task {taskid} was cancelled")


class RemoteError(PenstockError):
    """What a task raised, where it ran.

    `type` is the name of its class, `message` what it said, `traceback` the text of its traceback or None.
    Its own text is the first two in one line.
    """

    def __init__(self, type: str, message: str, traceback: str | None = None) -> None:
        self.type, self.message, self.traceback = type, message, traceback
        super().__init__(" ".join((f"{type}: {message}" if message else type).split()))


class Unavailable(PenstockError):
    """Raise this in a handler when what it writes to is away.

    The route pauses with backoff, the messages stay in their queue and no attempt is counted.
    """


def near(word: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the known word nearest to `word`, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f" (did you mean {found[0]!r}?)" if found else ""


def among(word: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known: the near one, or those there are."""
    names = sorted(known)
    few = ", ".join(names[:10]) + ("…" if len(names) > 10 else "")
    return near(word, names) or f": there are {few or 'none'}"


def one_line(error: BaseException) -> str:
    """An error as a single line: `Type: message`. Never fails, whatever the error."""
    try:
        text = printable(" ".join(str(error).split()))
    except Exception:
        text = "(it cannot say itself)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """Text that can be encoded: a lone surrogate, as in a file name that is not UTF-8, is written as `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()
