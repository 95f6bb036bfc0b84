"""The journal: what is stored of transactions, and how it is changed.

    transaction/<id>        one (`Stored`), under the id of the task in whose run it is (`transaction_id`)
    transaction-event/<id>  it has changes that nobody was told; since when, in Unix seconds

Two may want to change one: the run that it is in, and whoever suspends or cancels it. Each change names the
version it is made to, so exactly one of them comes first and the other one sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import quote

import msgspec

from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.errors import PenstockError, TransactionError, UnknownTransaction, one_line
from penstock.stores.base import ABSENT, Change, Delete, Entry, Put, Store, Touch
from penstock.stores.keys import check_keys
from penstock.stores.ledger import MOST_BODY, RESULT_TTL, SPARE
from penstock.stores.records import Body, moment

log = logging.getLogger("penstock.transactions")

Status = Literal[
    "Processing",
    "Complete",
    "Suspending",
    "RecoveryProcessing",
    "RecoveryComplete",
    "ForceRecoveryComplete",
    "Aborted",
    "Cancelling",
    "Cancelled",
    "ForceCancelled",
]
STATUSES: tuple[Status, ...] = get_args(Status)
OPEN: frozenset[Status] = frozenset({"Processing", "RecoveryProcessing"})
"""Steps are done in it."""
COMPLETE: frozenset[Status] = frozenset({"Complete", "RecoveryComplete"})
CANCELLED: frozenset[Status] = frozenset({"Cancelled", "ForceCancelled"})
FINISHED: frozenset[Status] = COMPLETE | CANCELLED | {"ForceRecoveryComplete"}
"""Nothing more becomes of it."""
UNFINISHED: frozenset[Status] = frozenset(STATUSES) - FINISHED
Wish = Literal["suspend", "cancel"]

TOPIC = "Transaction."
"""What the topics of events begin with; the status follows."""
LEFT = 5.0
"""Seconds after which what nobody was told is told by whoever finds it: its own process had the time."""
SETTLED = 60.0
"""Seconds after which a notice of something untold that does not exist is removed: it may be on its way."""
LONG = 30 * 86_400.0
"""Seconds for which a finished one is kept at least while its run goes on, or something of it is not told."""
PAGE = 100
LONGEST_QUEUE = 32  # characters of a queue's name in an id

Send = Callable[[str, Mapping[str, Any], str], Awaitable[None]]
"""`send(topic, content, taskid)` issues the task that an event is; the same id is the same task."""


class Step(msgspec.Struct, frozen=True):
    """A step that was done."""

    name: str
    at: str
    """When; ISO 8601 with offset."""
    result: Any
    undone: bool


class TransactionRecord(msgspec.Struct, frozen=True):
    """Everything that is known of a transaction. Times are ISO 8601 with offset and microseconds."""

    id: str
    """That of the task in whose run it is; if it has several runs, `….` and the name of this one's task behind it."""
    name: str
    task: str
    """The task's name."""
    status: Status
    step: str | None
    """The one under way, else the last one."""
    createdAt: str  # noqa: N815 - as in `TaskRecord`
    updatedAt: str  # noqa: N815
    steps: list[Step]
    error: str | None
    """Why it was suspended or aborted; one line."""
    wish: Wish | None
    """What somebody wants of it, and its run has not heard yet; `suspend` stays until it is resumed."""


class Done(msgspec.Struct, array_like=True, gc=False):
    """A step as it is stored."""

    name: str
    at: float
    result: Body
    undone: bool = False


class Turn(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A change of status that nobody was told yet."""

    number: int
    status: Status
    step: str | None
    at: float


class Stored(msgspec.Struct, array_like=True):
    """Stored at `transaction/<taskid>`. Whoever changes it knows the version it had."""

    name: str
    queue: str
    created_at: float
    ttl: float
    """Seconds it is remembered once it is finished."""
    run: int
    """The attempt of the run that has entered it last: no earlier one may change it."""
    status: Status = "Processing"
    updated_at: float = 0.0
    step: str | None = None
    steps: list[Done] = []
    error: str | None = None
    wish: Wish | None = None
    turns: int = 0
    """Changes of status."""
    untold: list[Turn] = []
    taskid: str | None = None
    """Of the task, where its id is another one."""

    def done(self, name: str) -> Done | None:
        return next((one for one in self.steps if one.name == name), None)

    def turn(self, status: Status, now: float, tell: bool, error: str | None = None) -> None:
        """Have another status."""
        self.status, self.updated_at, self.error = status, now, error
        self.turns += 1
        if tell:
            self.untold.append(Turn(self.turns, status, self.step, now))

    def as_record(self, id: str) -> TransactionRecord:
        """The same for people."""
        steps = [Step(one.name, moment(one.at), one.result.value(MOST_BODY), one.undone) for one in self.steps]
        return TransactionRecord(
            id=id,
            name=self.name,
            task=self.queue,
            status=self.status,
            step=self.step,
            createdAt=moment(self.created_at),
            updatedAt=moment(self.updated_at),
            steps=steps,
            error=self.error,
            wish=self.wish,
        )


class Kept(NamedTuple):
    """A transaction as it was in the store. It is not altered: `Journal.change` makes another one."""

    id: str
    stored: Stored
    version: int

    @property
    def taskid(self) -> str:
        """Of the task in whose run it is."""
        return self.id if self.stored.taskid is None else self.stored.taskid


class Journal:
    """Transactions in a store. For one event loop. `send` None: their changes of status are told to nobody."""

    def __init__(self, store: Store, send: Send | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._send = send
        self._clock = clock

    @property
    def tells(self) -> bool:
        return self._send is not None

    def now(self) -> float:
        return self._clock.time()

    async def find(self, id: str) -> Kept | None:
        """:raises TransactionError: what is there was written by another version.
        :raises BrokerUnavailable: the store is away.
        """
        check_keys([key(id)])
        (entry,) = await self._store.get([key(id)])
        if entry is None:
            return None
        try:
            return _read(entry)
        except msgspec.DecodeError as error:
            raise TransactionError(f"transaction {id} cannot be read: {one_line(error)}") from None

    async def get(self, id: str) -> Kept:
        """:raises UnknownTransaction: there is none.
        :raises BrokerUnavailable: the store is away.
        """
        kept = await self.find(id)
        if kept is None:
            raise UnknownTransaction(id)
        return kept

    async def of_task(self, taskid: str) -> list[Kept]:
        """The transactions of a task that has several runs, the first hundred.

        :raises BrokerUnavailable: the store is away.
        """
        prefix = key(f"{taskid}.")
        check_keys([prefix])
        entries = await self._store.scan(prefix, limit=PAGE)
        found: list[Kept] = []
        for entry in entries:
            with contextlib.suppress(msgspec.DecodeError):  # of another version
                if (kept := _read(entry)).taskid == taskid:
                    found.append(kept)
        return found

    async def latest(self, page: int = PAGE) -> AsyncGenerator[Kept, None]:
        """Every transaction, the latest first.

        :raises BrokerUnavailable: the store is away.
        """
        after: str | None = None
        while entries := await self._store.scan(key(""), after=after, limit=page, newest_first=True):
            for entry in entries:
                with contextlib.suppress(msgspec.DecodeError):  # of another version
                    yield _read(entry)
            after = entries[-1].key

    async def change(
        self, id: str, alter: Callable[[Stored], bool], known: Kept | None = None, first: Stored | None = None
    ) -> Kept:
        """Change a transaction; how it stands then. `alter` is given a copy, and says whether it has altered that; it
        is called again where somebody else came first, and whatever it raises comes through.

        `known`: how it stood last. `first`: how it begins, where there is none.

        :raises UnknownTransaction: there is none.
        :raises BrokerUnavailable: whether it is changed is not known; the same change may be made again.
        """
        while True:
            kept = known or await self.find(id)
            begun = first if kept is None else kept.stored
            if begun is None:
                raise UnknownTransaction(id)
            stored = _copy(begun)
            if not alter(stored) and kept is not None:
                return kept
            ttl = max(stored.ttl, LONG) + SPARE if stored.status in FINISHED else None  # until its run has ended
            put = Put(key(id), _encode(stored), ttl, ABSENT if kept is None else kept.version)
            changes: list[Change] = [put]
            if stored.turns > (0 if kept is None else kept.stored.turns) and stored.untold:
                changes.insert(0, Put(_notice(id), _encode(self.now())))  # first: it must not be missing
            version = (await self._store.apply(changes))[-1]
            if version is not None:
                return Kept(id, stored, version)
            known = None

    async def expire(self, kept: Kept) -> None:
        """The run of a finished transaction has ended, and the time begins that it is remembered.

        :raises BrokerUnavailable: the store is away.
        """
        if kept.stored.status in FINISHED and not kept.stored.untold:
            await self._store.apply([Touch(key(kept.id), kept.stored.ttl + SPARE)])

    # -- telling

    async def tell(self, kept: Kept) -> Kept:
        """Tell what nobody was told, in its order; how it stands then. What cannot be told now is told later."""
        if self._send is None or not kept.stored.untold:
            return kept
        try:
            (notice,) = await self._store.get([_notice(kept.id)])
            told = await self._send_all(self._send, kept)
            kept = await self.change(kept.id, lambda stored: _strike(stored, told), kept)
            if notice is not None and not kept.stored.untold:
                await self._store.apply([Delete(notice.key, expect=notice.version)])
        except PenstockError as error:
            log.warning("what became of transaction %s is told later: %s", kept.id, one_line(error))
        return kept

    async def tell_left(self) -> None:
        """Tell what others should have told and did not.

        :raises BrokerUnavailable: the store is away.
        """
        if self._send is None:
            return
        after: str | None = None
        while notices := await self._store.scan(_notice(""), after=after, limit=PAGE):
            for notice in notices:
                await self._tell_left(notice)
            after = notices[-1].key

    async def _tell_left(self, notice: Entry) -> None:
        now = self.now()
        try:
            age = now - _since(notice.value)
        except msgspec.DecodeError:  # of another version
            age = now
        if age < LEFT:
            return
        kept = await self.find(notice.key.removeprefix(_notice("")))
        if kept is None or not kept.stored.untold:
            if age > SETTLED:
                await self._store.apply([Delete(notice.key, expect=notice.version)])
            return
        (claimed,) = await self._store.apply([Put(notice.key, _encode(now), expect=notice.version)])
        if claimed is not None:  # else another process is at it
            await self.tell(kept)

    async def _send_all(self, send: Send, kept: Kept) -> int:
        """The number of the last one that was told."""
        told = 0
        for one in kept.stored.untold:
            content = {
                "id": kept.id,
                "name": kept.stored.name,
                "status": one.status,
                "step": one.step,
                "time": moment(one.at),
            }
            try:
                await send(TOPIC + one.status, content, _event_id(kept.id, one))
            except PenstockError as error:
                log.warning("%s of transaction %s is told later: %s", one.status, kept.id, one_line(error))
                break
            told = one.number
        return told


def transaction_id(taskid: str, queue: str, runs: int) -> str:
    """The id of the transaction in the run of a task in this queue: the task's, if that is its only run, else with
    the queue's name behind it, in which what is no letter, digit or one of `_.-` is written `~2F`: it stands in URLs.
    """
    if runs == 1:
        return taskid
    text = quote(queue, safe="").replace("~", "%7E").replace("%", "~")
    if len(text) > LONGEST_QUEUE:
        text = f"~{hashlib.sha256(queue.encode()).hexdigest()[: LONGEST_QUEUE - 1]}"
    return f"{taskid}.{text}"


def key(id: str) -> str:
    return f"transaction/{id}"


def _notice(id: str) -> str:
    return f"transaction-event/{id}"


def remembered(ttl: float | None, otherwise: float | None) -> float:
    """Seconds that a task is remembered: what its sender says, else its own, else the usual."""
    return next((one for one in (ttl, otherwise) if one is not None), RESULT_TTL)


def _event_id(id: str, turn: Turn) -> str:
    """The same for the same event, and in the order of time among those of other tasks (`new_taskid`)."""
    return f"{int(turn.at * 1000):012x}.{id}.{turn.number}"


def _strike(stored: Stored, told: int) -> bool:
    left = [one for one in stored.untold if one.number > told]
    altered = len(left) < len(stored.untold)
    stored.untold = left
    return altered


def _read(entry: Entry) -> Kept:
    return Kept(entry.key.removeprefix(key("")), _decode(entry.value), entry.version)


def _copy(stored: Stored) -> Stored:
    return _decode(_encode(stored))


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Stored).decode
_since = msgspec.msgpack.Decoder(float).decode
