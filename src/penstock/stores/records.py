"""What is known of a task: as people read it (`TaskRecord`), and as it is stored (`Sent`, `RunState`)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from penstock import codec, terms
from penstock.errors import InvalidMessage, one_line
from penstock.terms import Failure, Terms

State = Literal["queued", "running", "succeeded", "failed", "expired", "cancelled"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "expired", "cancelled"})
MOST_ATTEMPTS = 50
"""Of a run's attempts the record keeps the first and the latest, so many in all."""


class Attempt(msgspec.Struct, frozen=True):
    """One time that a run was begun. Times are ISO 8601 with offset."""

    number: int
    startedAt: str  # noqa: N815 - the document's own spelling
    endedAt: str | None  # noqa: N815
    outcome: Literal["running", "succeeded", "failed", "cancelled", "lost"]
    """`lost`: its process went away."""
    error: str | None
    """One line."""
    worker: str
    """Host and process id."""


class Run(msgspec.Struct, frozen=True):
    """A task's run by one of the functions on its topic."""

    task: str
    """The function's task name."""
    state: State
    result: Any
    error: Failure | None
    progress: tuple[float, float] | None
    """Done and total, as the function said last."""
    attempts: list[Attempt]


class TaskRecord(msgspec.Struct, frozen=True):
    """Everything that is known of a task. Times are ISO 8601 with offset and microseconds."""

    taskid: str
    topic: str
    content: Any
    state: State
    createdAt: str  # noqa: N815
    completedAt: str | None  # noqa: N815
    expiresAt: str | None  # noqa: N815
    runs: list[Run]

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A value as it travels: bytes, and the headers that describe them."""

    data: bytes
    headers: dict[str, Any]

    def size(self, limit: int) -> int:
        """Bytes of its `value(limit)`, roughly: of gzip, what that says itself (RFC 1952, ISIZE)."""
        unpacked = int.from_bytes(self.data[-4:], "little") if codec.CONTENT_ENCODING in self.headers else 0
        return max(len(self.data), unpacked if unpacked <= limit else 0)

    def value(self, limit: int) -> Any:
        """What it says; what cannot be read is shown as it is."""
        try:
            return codec.decode(self.data, self.headers, limit)
        except InvalidMessage:
            return self.data


class Sent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Stored at `task/<id>` when a task is sent; only where it has no runs is it changed again, to be cancelled."""

    topic: str
    content: Body
    """With all headers of its message."""
    created_at: float
    expires_at: float | None
    queues: list[str]
    """Where a copy went to."""
    result_ttl: float | None = None
    priority: int = 0
    due_at: float | None = None
    """When its delay is over."""
    cancelled_at: float | None = None
    """When it was cancelled, if nobody was on its topic."""

    @property
    def terms(self) -> Terms:
        """How it was asked for."""
        asked = terms.read(self.content.headers)
        return terms.replace(asked, runs=max(len(self.queues), 1), result_ttl=self.result_ttl)


class Trial(msgspec.Struct, array_like=True, gc=False):
    """An attempt as it is stored."""

    number: int
    started_at: float
    worker: str
    ended_at: float | None = None
    outcome: str = "running"
    error: str | None = None


class RunState(msgspec.Struct, array_like=True, gc=False):
    """Stored at `run/<id>/<queue>`, from the first attempt on. Whoever changes it knows the version it had."""

    state: State
    trials: list[Trial] = []
    result: Body | None = None
    error: Failure | None = None
    progress: tuple[float, float] | None = None
    cancel: bool = False
    """Somebody wants it to end; whoever runs it sees to that."""
    ended_at: float | None = None
    started: int = 0
    """Attempts begun."""
    delivery: int = 0
    """Which delivery of its message the latest attempt was begun with: one with an earlier one is void."""
    again: float = 0.0
    """When its message was last taken out of the dead letters."""
    lasts: bool = False
    """Ended without success it is remembered for long: something goes on that it has begun."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def begin(self, worker: str, now: float, delivery: int) -> None:
        """Another attempt. One that is still open was lost."""
        self.close("lost", now)
        self.started += 1
        self.delivery = delivery
        self.state, self.progress, self.error = "running", None, None
        self.ended_at, self.cancel = None, False
        if len(self.trials) >= MOST_ATTEMPTS:
            del self.trials[MOST_ATTEMPTS // 2]
        self.trials.append(Trial(self.started, now, worker))

    def end(self, attempt: int | None, state: State, now: float, line: str | None) -> None:
        """The run has ended with this attempt, or without one. `line` is the error in one line."""
        self.close("lost", now)
        for trial in self.trials:
            if trial.number == attempt:
                trial.ended_at, trial.outcome, trial.error = now, state, line
        self.state, self.ended_at, self.cancel = state, now, False

    def close(self, outcome: str, now: float, error: str | None = None) -> None:
        """The attempt under way, if there is one, has ended."""
        if self.trials and self.trials[-1].ended_at is None:
            last = self.trials[-1]
            last.ended_at, last.outcome, last.error = now, outcome, error


_encoder = msgspec.msgpack.Encoder()
_sent = msgspec.msgpack.Decoder(Sent)
_run = msgspec.msgpack.Decoder(RunState)

encode = _encoder.encode
decode_sent = _sent.decode


def decode_run(data: bytes) -> RunState:
    """A run; one that cannot be read has failed, and disturbs nothing else."""
    try:
        return _run.decode(data)
    except msgspec.DecodeError as error:
        return RunState("failed", error=Failure("Unreadable", one_line(error)), ended_at=0.0)


def new_taskid(now: float | None = None) -> str:
    """A random id of 128 bits whose first 48 are the time: later ones sort behind earlier ones."""
    milliseconds = int((time.time() if now is None else now) * 1000)
    return f"{milliseconds & (2**48 - 1):012x}{os.urandom(10).hex()}"


def moment(seconds: float) -> str:
    """A time for people and programs: ISO 8601, this machine's zone, microseconds; at most the calendar's end."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="microseconds")
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC).isoformat(timespec="microseconds")


class Standing(msgspec.Struct, gc=False):
    """How a task stands: what is stored of it, read."""

    taskid: str
    sent: Sent
    runs: dict[str, RunState]
    """By queue; also of those that nobody has begun."""
    state: State

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def size(self, limit: int) -> int:
        """Bytes of the content and the results of its `as_record(limit)`, roughly."""
        results = (run.result.size(limit) for run in self.runs.values() if run.result is not None)
        return self.sent.content.size(limit) + sum(results)

    def as_record(self, limit: int) -> TaskRecord:
        """The same for people. Values of more than `limit` bytes are shown as they came."""
        sent = self.sent
        completed = None
        if self.ended:
            ends = [run.ended_at for run in self.runs.values() if run.ended_at is not None]
            completed = max(ends, default=sent.expires_at if sent.cancelled_at is None else sent.cancelled_at)
        return TaskRecord(
            taskid=self.taskid,
            topic=sent.topic,
            content=sent.content.value(limit),
            state=self.state,
            createdAt=moment(sent.created_at),
            completedAt=None if completed is None else moment(completed),
            expiresAt=None if sent.expires_at is None else moment(sent.expires_at),
            runs=[_as_run(name, run, limit) for name, run in sorted(self.runs.items())],
        )


def state_of(sent: Sent, runs: Mapping[str, RunState], now: float) -> State:
    """Of a task, from its runs'."""
    if not runs:  # nobody is on the topic
        if sent.cancelled_at is not None:
            return "cancelled"
        return "expired" if sent.expires_at is not None and now >= sent.expires_at else "queued"
    states = {run.state for run in runs.values()}
    if not states <= ENDED:
        return "queued" if states == {"queued"} else "running"
    order: tuple[State, ...] = ("failed", "cancelled", "expired", "succeeded")
    return next(state for state in order if state in states)


def _as_run(name: str, run: RunState, limit: int) -> Run:
    attempts = [
        Attempt(
            number=one.number,
            startedAt=moment(one.started_at),
            endedAt=None if one.ended_at is None else moment(one.ended_at),
            outcome=one.outcome,  # type: ignore[arg-type]
            error=one.error,
            worker=one.worker,
        )
        for one in run.trials
    ]
    result = None if run.result is None else run.result.value(limit)
    return Run(name, run.state, result, run.error, run.progress, attempts)
