"""`/`: how the cluster stands, on one page that needs no scripts. Where a browser lands that has signed in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from html import escape

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from penstock.control import masking, tasks
from penstock.control.cluster import WorkerView
from penstock.errors import PenstockError
from penstock.web.api.queues import queues_seen
from penstock.web.desk import Desk
from penstock.web.site import site_of

router = APIRouter(include_in_schema=False)

LATEST = 20  # tasks
WITHIN = 10.0  # seconds that the page waits for what it tells
ANEW = 5  # seconds after which a browser asks again
MOST_CELL = 200  # characters

_STYLE = (
    ":root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}"
    "body{margin:1.5rem auto;max-width:72rem;padding:0 1rem}"
    "h1{font-size:1.4rem}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}div{overflow-x:auto}table{border-collapse:collapse;"
    "width:100%}th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8884;vertical-align:top}"
    "td{overflow-wrap:anywhere}th{font-weight:600}p,nav{color:GrayText}form{display:inline}"
)
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="{anew}"><title>{node} – Penstock</title><style>{style}</style></head><body>
<h1>{node}</h1><nav>{links} <form method="post" action="/signout"><button>Sign out</button></form></nav>
{sections}</body></html>
"""
_LINKS = ("/nodes", "/workers", "/queues", "/tasks", "/schedules", "/audit", "/metrics", "/openapi.json")

Rows = Sequence[Sequence[object]]


@router.get("/")
async def overview(request: Request) -> HTMLResponse:
    """Nodes, workers, queues and the latest tasks."""
    site = site_of(request)
    desk, text = site.desk, _Text(site.hidden)
    sections = await asyncio.gather(*(_section(title, headers, desk, rows, text) for title, headers, rows in _SECTIONS))
    links = " · ".join(f'<a href="{link}">{link[1:]}</a>' for link in _LINKS)
    page = _PAGE.format(anew=ANEW, node=text(desk.name), style=_STYLE, links=links, sections="\n".join(sections))
    return HTMLResponse(page, headers={"content-security-policy": _POLICY})


async def _section(
    title: str, headers: Sequence[str], desk: Desk, rows: Callable[[Desk], Awaitable[Rows]], text: _Text
) -> str:
    """A table; where it cannot be had, why."""
    try:
        async with asyncio.timeout(WITHIN):
            found = await rows(desk)
    except PenstockError as error:
        return f"<h2>{title}</h2><p>{text(error)}</p>"
    except TimeoutError:
        return f"<h2>{title}</h2><p>no answer within {WITHIN:g} s</p>"
    if not found:
        return f"<h2>{title}</h2><p>none</p>"
    head = "".join(f"<th>{one}</th>" for one in headers)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in found)
    return f"<h2>{title}</h2><div><table><tr>{head}</tr>{body}</table></div>"


async def _nodes(desk: Desk) -> Rows:
    return [
        [
            one.name,
            "master" if one.master else "",
            "ready" if one.ready else "not ready",
            one.workers,
            one.jobs,
            _ago(one.started_at),
            one.version,
            one.url,
        ]
        for one in await desk.cluster.nodes()
    ]


async def _workers(desk: Desk) -> Rows:
    return [[one.name, one.category, one.mode, *_standing(one)] for one in await desk.cluster.workers()]


def _standing(worker: WorkerView) -> list[object]:
    if not worker.nodes:
        return ["paused" if worker.paused else "on no node", "", "", ""]
    states = ", ".join(f"{one.state} on {one.node_name}" for one in worker.nodes)
    runs, failures = sum(one.runs for one in worker.nodes), sum(one.failures for one in worker.nodes)
    errors = [one.last_error for one in worker.nodes if one.last_error is not None]
    return [f"{states} (paused)" if worker.paused else states, runs, failures, errors[-1] if errors else ""]


async def _queues(desk: Desk) -> Rows:
    found = await queues_seen(desk)
    return [
        [
            one.name,
            *("?" if count is None else count for count in (one.ready, one.unsettled, one.consumers, one.dead)),
            "paused" if one.name in found.paused else "",
        ]
        for one in found.queues
    ]


async def _tasks(desk: Desk) -> Rows:
    return [[one.taskid, one.topic, one.state, one.createdAt] for one in await tasks.latest(desk.ledger, LATEST)]


_SECTIONS: Sequence[tuple[str, Sequence[str], Callable[[Desk], Awaitable[Rows]]]] = (
    ("Nodes", ("node", "", "", "workers", "jobs", "since", "version", "HTTP"), _nodes),
    ("Workers", ("worker", "category", "mode", "state", "runs", "failures", "last error"), _workers),
    ("Queues", ("queue", "ready", "unsettled", "consumers", "dead", ""), _queues),
    ("Latest tasks", ("task", "topic", "state", "created"), _tasks),
)


def _ago(at: float) -> str:
    minutes, seconds = divmod(int(max(time.time() - at, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


class _Text:
    """Makes of anything what can be neither markup nor a secret."""

    def __init__(self, hidden: Sequence[str]) -> None:
        self._hidden = hidden

    def __call__(self, value: object) -> str:
        text = "" if value is None else str(value)
        for secret in self._hidden:
            text = text.replace(secret, masking.STARS)
        return escape(masking.line(text, MOST_CELL))
