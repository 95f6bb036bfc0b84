"""`/transactions`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request

from penstock.tasks.journal import Status, Step, TransactionRecord
from penstock.web.answers import Answer
from penstock.web.bodies import read_json
from penstock.web.schema import body, documented
from penstock.web.shown import shown
from penstock.web.site import site_of
from penstock.web.trail import audited

router = APIRouter(tags=["transactions"])


class How(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a transaction is to end."""

    force: bool = False
    """Only declare it so: nothing more of it is done, or undone."""


_how = msgspec.json.Decoder(How)

_RECORD = TransactionRecord(
    id="01927f6f0c3a9d1e5b7c2a4f8e6d0b1c",
    name="order",
    task="order",
    status="Suspending",
    step="ship",
    createdAt="2026-01-01T12:00:00.000000+00:00",
    updatedAt="2026-01-01T12:00:01.000000+00:00",
    steps=[Step("pay", "2026-01-01T12:00:00.500000+00:00", {"receipt": 7}, False)],
    error="ConnectionError: no ship",
    wish=None,
)
_TOLD = documented(TransactionRecord, _RECORD, 404, 408, 409, 413, 415, 422, 502)
_HOW = body(How, {"force": True})

Name = Annotated[str, Query(min_length=1, max_length=200, pattern="^[^\x00]*$")]


@router.get("/transactions", responses=documented(list[TransactionRecord], [_RECORD], 422))
async def latest(
    request: Request,
    status: Status | None = None,
    name: Name | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Answer:
    """The latest transactions, newest first; of one status or name only, if told."""
    return await shown(request, await site_of(request).desk.app.transactions.list(status, name, limit))


@router.get("/transactions/{taskid}", responses=documented(TransactionRecord, _RECORD, 404, 409))
async def find(request: Request, taskid: str) -> Answer:
    """All that is known of a transaction. Its id is that of its task, which will do if the task has no other one; where
    that has several runs, with `.` and the name of this one's task behind it."""
    return await shown(request, await site_of(request).desk.app.transactions.get(taskid))


@router.post(
    "/transactions/{taskid}/suspend", responses=documented(TransactionRecord, _RECORD, 404, 409, 413, 415, 422, 502)
)
async def suspend(request: Request, taskid: str) -> Answer:
    """Have a transaction that runs stop before its next step."""
    async with audited(request, "transaction.suspend", taskid):
        return await shown(request, await site_of(request).desk.app.transactions.suspend(taskid))


@router.post("/transactions/{taskid}/resume", openapi_extra=_HOW, responses=_TOLD)
async def resume(request: Request, taskid: str) -> Answer:
    """Have a suspended transaction go on where it was; by force: declare it complete, also one that was aborted."""
    how = await read_json(request, _how)
    async with audited(request, "transaction.resume", taskid) as deed:
        deed.detail = _detail(how)
        return await shown(request, await site_of(request).desk.app.transactions.resume(taskid, how.force))


@router.post("/transactions/{taskid}/cancel", openapi_extra=_HOW, responses=_TOLD)
async def cancel(request: Request, taskid: str) -> Answer:
    """Have what a transaction has done undone, the latest first; by force: declare it cancelled, and undo nothing."""
    how = await read_json(request, _how)
    async with audited(request, "transaction.cancel", taskid) as deed:
        deed.detail = _detail(how)
        return await shown(request, await site_of(request).desk.app.transactions.cancel(taskid, how.force))


def _detail(how: How) -> str:
    return "by force" if how.force else ""
