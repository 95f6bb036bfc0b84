"""`/nodes`, `/schedules`, `/audit`, `/metrics/history`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from penstock.control.audit import AuditEntry
from penstock.control.cluster import NodeView
from penstock.control.metrics import QueueSample, Sample
from penstock.control.schedules import ScheduleView
from penstock.control.schedules import schedules as all_schedules
from penstock.web.answers import Answer
from penstock.web.schema import documented
from penstock.web.shown import shown
from penstock.web.site import site_of

router = APIRouter(tags=["node"])

_NODE = NodeView(
    id="alpha-1",
    name="alpha",
    host="alpha",
    pid=4711,
    version="1.0.0",
    started_at=1.8e9,
    seen_at=1.8e9,
    url="http://127.0.0.1:8470",
    master=True,
    epoch=1,
    ready=True,
    workers=2,
    jobs=1,
)
_SCHEDULE = ScheduleView(
    name="collect",
    definition="every 60.0 s",
    last="2026-01-01T12:00:00.000000+00:00",
    next="2026-01-01T12:01:00.000000+00:00",
    overdue=False,
    enqueuing=0,
)
_ENTRY = AuditEntry(
    id="0006500000000000.a1b2c3d4e5f6",
    at=1.8e9,
    who="token edit 127.0.0.1",
    what="worker.restart",
    target="produce",
    detail="",
    outcome="ok",
)
_SAMPLE = Sample(at=1.8e9, node="alpha", uptime=60.0, rss=60_000_000, queues=[QueueSample("hello", 3, 1, 1, 0)])

Text = Annotated[str, Query(min_length=1, max_length=200, pattern="^[^\x00]*$")]


@router.get("/nodes", responses=documented(list[NodeView], [_NODE]))
async def nodes(request: Request) -> Answer:
    """The nodes of the cluster that live, by name. Times are Unix seconds."""
    return Answer(await site_of(request).desk.cluster.nodes())


@router.get("/schedules", responses=documented(list[ScheduleView], [_SCHEDULE]))
async def schedules(request: Request) -> Answer:
    """Every schedule in the store, by name."""
    return Answer(await all_schedules(site_of(request).desk.store))


@router.get("/audit", responses=documented(list[AuditEntry], [_ENTRY], 422))
async def audit(
    request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: Text | None = None
) -> Answer:
    """Who changed what: the latest entries, the newest first; those before the entry with the id `after`."""
    return await shown(request, await site_of(request).audit.latest(limit, after))


@router.get("/metrics/history", responses=documented(list[Sample], [_SAMPLE], 422))
async def history(
    request: Request, since: Annotated[float | None, Query(ge=0, le=2**40)] = None, node: str | None = None
) -> Answer:
    """One sample a minute of each node, of the last day, the oldest first; those after `since` (Unix seconds)."""
    return Answer(await site_of(request).metrics.history(since, node))
