"""`/tasks`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request

from penstock.clock import LONGEST
from penstock.control import tasks
from penstock.errors import PenstockError
from penstock.stores.records import State, TaskRecord
from penstock.web.answers import Answer, Refused
from penstock.web.bodies import read_json
from penstock.web.schema import body, documented
from penstock.web.shown import shown
from penstock.web.site import site_of
from penstock.web.trail import audited

router = APIRouter(tags=["tasks"])


class NewTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task to be sent."""

    topic: Annotated[str, msgspec.Meta(min_length=1)]
    content: dict[str, Any]
    expire: Annotated[float, msgspec.Meta(ge=0, le=LONGEST)] | None = 10.0
    """Seconds within which somebody must take it; null: whenever."""


class SentTask(msgspec.Struct, frozen=True):
    """A task that was sent."""

    taskid: str


_new = msgspec.json.Decoder(NewTask)

_TASKID = "01927f6f0c3a9d1e5b7c2a4f8e6d0b1c"
_RECORD = TaskRecord(
    taskid=_TASKID,
    topic="hello",
    content={"name": "Neo"},
    state="queued",
    createdAt="2026-01-01T12:00:00.000000+00:00",
    completedAt=None,
    expiresAt="2026-01-01T12:00:10.000000+00:00",
    runs=[],
)


@router.post(
    "/tasks",
    status_code=202,
    openapi_extra=body(NewTask, {"topic": "hello", "content": {"name": "Neo"}, "expire": 10}),
    responses=documented(SentTask, SentTask(_TASKID), 408, 413, 415, 422, status=202, says="Sent: it is durable."),
)
async def send(request: Request) -> Answer:
    """Send a task to a topic. Its record is what remains of that: the audit has what is done to the system, not
    the work that it carries."""
    task = await read_json(request, _new)
    try:
        taskid = await site_of(request).desk.send(task.topic, task.content, task.expire)
    except (TypeError, ValueError) as error:
        if isinstance(error, PenstockError):
            raise
        raise Refused(422, str(error)) from error
    except RecursionError:
        raise Refused(422, "the content: it is nested too deeply") from None
    return Answer(SentTask(str(taskid)), 202)


@router.get("/tasks", responses=documented(list[TaskRecord], [_RECORD], 422))
async def latest(
    request: Request,
    state: State | None = None,
    topic: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: str | None = None,
) -> Answer:
    """The latest tasks, newest first; of one state or topic only, if told. Fewer than `limit` where they carry much:
    `after`, the id of the last one, asks for those that are older."""
    ledger = site_of(request).desk.ledger
    return await shown(request, await tasks.latest(ledger, limit, state=state, topic=topic, after=after))


@router.get("/tasks/{taskid}", responses=documented(TaskRecord, _RECORD, 404))
async def find(request: Request, taskid: str) -> Answer:
    """All that is known of a task."""
    return await shown(request, await tasks.find(site_of(request).desk.ledger, taskid))


@router.post("/tasks/{taskid}/cancel", responses=documented(TaskRecord, _RECORD, 404, 409, 413, 415))
async def cancel(request: Request, taskid: str) -> Answer:
    """Have a task end. One that runs is stopped where it runs, a moment later."""
    async with audited(request, "task.cancel", taskid):
        return await shown(request, await tasks.cancel(site_of(request).desk.ledger, taskid))


@router.post("/tasks/{taskid}/retry", responses=documented(TaskRecord, _RECORD, 404, 409, 413, 415, 422, 502))
async def retry(request: Request, taskid: str) -> Answer:
    """Have the runs of a task that did not succeed begin again, under the same id."""
    desk = site_of(request).desk
    async with audited(request, "task.retry", taskid) as deed:
        deed.detail = ", ".join(await tasks.retry(desk.ledger, await desk.broker(), taskid))
        return await shown(request, await tasks.find(desk.ledger, taskid))
