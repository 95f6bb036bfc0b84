"""`/workers`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request

from penstock.control.cluster import WorkerOnNode, WorkerView
from penstock.web.answers import Answer
from penstock.web.schema import documented
from penstock.web.shown import shown
from penstock.web.site import site_of
from penstock.web.trail import audited

router = APIRouter(tags=["workers"])

_WORKER = WorkerView(
    name="produce",
    category=None,
    mode="single",
    watch_interval=10.0,
    paused=False,
    file="workers.yml",
    line=1,
    nodes=[
        WorkerOnNode(
            node="5f3c2a1b0d9e",
            node_name="alpha",
            state="running",
            since=1.8e9,
            runs=3,
            failures=0,
            last_error=None,
            log=["begun"],
        )
    ],
)


@router.get("/workers", responses=documented(list[WorkerView], [_WORKER]))
async def workers(request: Request, category: str | None = None) -> Answer:
    """Every worker, by name, and how it stands on each node; of one category only, if told."""
    found = await site_of(request).desk.cluster.workers()
    return await shown(request, [one for one in found if category is None or one.category == category])


@router.get("/workers/{name:path}", responses=documented(WorkerView, _WORKER, 404))
async def worker(request: Request, name: str) -> Answer:
    """One worker."""
    return await shown(request, await site_of(request).desk.cluster.worker(name))


@router.post("/workers/{name:path}/{action}", responses=documented(WorkerView, _WORKER, 404, 413, 415, 422))
async def act(request: Request, name: str, action: Literal["restart", "pause", "resume"]) -> Answer:
    """Have a worker begin anew, pause, or go on, on whichever node it runs."""
    cluster = site_of(request).desk.cluster
    async with audited(request, f"worker.{action}", name):
        if action == "restart":
            await cluster.restart(name)
        elif action == "pause":
            await cluster.pause(name)
        else:
            await cluster.resume(name)
        return await shown(request, await cluster.worker(name))
