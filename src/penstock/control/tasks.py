"""Tasks as an operator sees them: the latest, one whole, cancelled, tried again."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from penstock import terms
from penstock.brokers.base import Broker
from penstock.errors import BrokerUnavailable, PenstockError, PublishError, one_line
from penstock.message import Outgoing
from penstock.stores.ledger import MOST_BODY, Ledger
from penstock.stores.records import Sent, Standing, State, TaskRecord
from penstock.terms import Failure

FIRST_PAGE, PAGE = 20, 200  # tasks looked at together
LARGE = 2**20  # bytes
MOST_SHOWN = 64 * 2**20
"""Bytes of what tasks carry that are shown in one list."""
UNSUCCESSFUL: frozenset[State] = frozenset({"failed", "cancelled", "expired"})
"""The states of runs that can be tried again."""


class Conflict(PenstockError):
    """What was asked does not go with how the task stands."""


# -- looking


async def latest(
    ledger: Ledger, limit: int, *, state: State | None = None, topic: str | None = None, after: str | None = None
) -> list[TaskRecord]:
    """The latest tasks, newest first; only those of a state, or sent to a topic, if one is given. At least one, and
    no more than `MOST_SHOWN` bytes of what they carry: `after` is the last one's id of the list before.

    :raises BrokerUnavailable: the store is away.
    """
    found: list[TaskRecord] = []
    size = 0
    async with aclosing(_newest_first(ledger, min(limit, FIRST_PAGE), after)) as tasks:
        async for task in tasks:
            if state not in (None, task.state) or topic not in (None, task.sent.topic):
                continue
            size += task.size(MOST_BODY)
            if found and size > MOST_SHOWN:
                break
            found.append(await _shown(task))
            if len(found) >= limit:
                break
    return found


async def find(ledger: Ledger, taskid: str) -> TaskRecord:
    """One task.

    :raises UnknownTask: nothing is known of it.
    :raises BrokerUnavailable: the store is away.
    """
    return await _shown(await ledger.look(taskid))


def readable(record: TaskRecord) -> TaskRecord:
    """A record in which everything has a JSON form: of bytes their text, or `{"base64": …}`."""
    runs = [msgspec.structs.replace(run, result=plain(run.result)) for run in record.runs]
    return msgspec.structs.replace(record, taskid=str(record.taskid), content=plain(record.content), runs=runs)


def plain(value: Any) -> Any:
    """A decoded body as JSON can say it."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


async def _shown(task: Standing) -> TaskRecord:
    """A task for reading; a large one is read in a thread."""
    if task.size(MOST_BODY) <= LARGE:
        return readable(task.as_record(MOST_BODY))
    return await asyncio.to_thread(lambda: readable(task.as_record(MOST_BODY)))


async def _newest_first(ledger: Ledger, page: int, after: str | None) -> AsyncGenerator[Standing, None]:
    """Every task, or those that are older: their ids are in the order of time. Few together while they are large."""
    while tasks := await ledger.page(page, after):
        for task in tasks:
            yield task
        after = tasks[-1].taskid
        page = min(page * 4, PAGE) if sum(task.size(MOST_BODY) for task in tasks) < LARGE else max(page // 4, 1)


# -- cancelling


async def cancel(ledger: Ledger, taskid: str) -> TaskRecord:
    """Have a task end; how it stands then: cancelled, or running still and about to be stopped.

    :raises UnknownTask: nothing is known of it.
    :raises Conflict: it has ended otherwise.
    :raises BrokerUnavailable: the store is away.
    """
    asked = await ledger.cancel(taskid)
    record = await find(ledger, taskid)
    if asked or record.state == "cancelled":
        return record
    raise Conflict(f"task {taskid} cannot be cancelled: it has {_ended(record.state)}")


# -- trying again


async def retry(ledger: Ledger, broker: Broker, taskid: str) -> list[str]:
    """Have the runs of a task that did not succeed begin again, under the same id; the names of their tasks.

    Each is published to its queue's own name, without an expiry and with the retries it had at first.
    What a dead letter holds stays there; put back into its queue, it finds the run ended or replaced.

    :raises UnknownTask: nothing is known of it.
    :raises Conflict: no run of it has ended without success, or others than these would get it too.
    :raises PublishError: the broker did not take it; the run has failed once more.
    :raises BrokerUnavailable: store or broker are away; what is known of the runs says how far it came.
    """
    record = await ledger.record(taskid)
    wanted = [run.task for run in record.runs if run.state in UNSUCCESSFUL]
    if not wanted:
        raise Conflict(f"task {taskid} has no run to try again: {_why_none(record)}")
    reached = {queue: await _reached(ledger, broker, queue) for queue in wanted}
    _check_strangers(record, wanted, reached)
    sent, revived = await ledger.revive(taskid)
    names = _addresses(revived, reached)
    messages = [_again(taskid, sent, name) for name in names]
    try:
        refusals = await broker.publish(messages) if messages else []
    except BrokerUnavailable as error:
        doubt = f"task {taskid} may not have been published: if it stays queued, cancel and retry it"
        raise BrokerUnavailable(f"{doubt}: {error}") from error
    refused = {name: refusal for name, refusal in zip(names, refusals, strict=True) if refusal is not None}
    for name, refusal in refused.items():
        for queue in names[name]:
            await _give_up(ledger, taskid, queue, sent, refusal)
    if refused:
        raise next(iter(refused.values()))
    return revived


async def _reached(ledger: Ledger, broker: Broker, queue: str) -> set[str]:
    """The queues that get what is published to the name of one, as far as anybody knows."""
    found = {queue, *await ledger.topics.queues(queue)}
    if broker.admin is not None:
        found |= {info.name for info in await broker.admin.inspect() if queue in (info.bindings or ())}
    return found


def _check_strangers(record: TaskRecord, wanted: Sequence[str], reached: Mapping[str, set[str]]) -> None:
    """:raises Conflict: a queue would get a copy that is none of the task's, or is at it.

    A run that has succeeded heeds no further copy.
    """
    known = {*wanted, *(run.task for run in record.runs if run.state == "succeeded")}
    for queue, found in reached.items():
        if strangers := sorted(found - known):
            others = ", ".join(map(repr, strangers))
            raise Conflict(
                f"task {record.taskid} cannot be tried again: publishing to {queue!r} would also reach {others}"
            )


def _addresses(queues: Sequence[str], reached: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Which names to publish to, and the queues that each is for: a queue bound to another's name gets that copy."""
    names: dict[str, list[str]] = {}
    left = set(queues)
    for name in sorted(queues, key=lambda queue: (-len(reached[queue]), queue)):
        if name in left:
            names[name] = sorted(left & reached[name])
            left -= reached[name]
    return names


def _again(taskid: str, sent: Sent, queue: str) -> Outgoing:
    content = sent.content
    asked = terms.replace(sent.terms, topic=sent.topic)
    return Outgoing(
        id=str(taskid),  # a Handle is text that no broker knows
        topic=queue,
        body=content.data,
        headers={**content.headers, terms.HEADER: terms.write(asked)},
        priority=sent.priority,
        enqueued_at=time.time(),
    )


async def _give_up(ledger: Ledger, taskid: str, queue: str, sent: Sent, refusal: PublishError) -> None:
    """A run that was to begin again never will: it was not published."""
    held = await ledger.at_hand(taskid, queue, sent.terms)
    if not held.state.ended:
        failure = Failure(type(refusal).__name__, str(refusal))
        await ledger.finish(held, "failed", sent.terms, error=failure, line=one_line(refusal))


def _why_none(record: TaskRecord) -> str:
    if not record.runs:
        return f"nobody was on {record.topic!r} when it was sent: send it again"
    return f"it has {_ended(record.state)}" if record.ended else f"it is {record.state}"


def _ended(state: State) -> str:
    return f"been {state}" if state == "cancelled" else str(state)
