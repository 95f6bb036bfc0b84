"""`/livez`, `/readyz`, `/metrics`: for machines, open to them without a token."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from penstock.control.metrics import CONTENT_TYPE
from penstock.web.answers import Answer
from penstock.web.schema import documented
from penstock.web.site import site_of

router = APIRouter(tags=["probes"])

LATE = 10.0
"""Seconds by which the event loop may be late and still counts as alive."""


class Live(msgspec.Struct, frozen=True):
    """Whether the process makes progress."""

    live: bool
    lag: float
    """Seconds since its event loop last turned."""


class Ready(msgspec.Struct, frozen=True):
    """Whether work is taken."""

    ready: bool


def _not(type: Any, example: Any) -> dict[int | str, dict[str, Any]]:
    """The answer where it is not so: the same shape."""
    return {503: documented(type, example, status=503, says="It is not.")[503]}


@router.get("/livez", responses=documented(Live, Live(True, 0.001)) | _not(Live, Live(False, 12.0)))
async def livez(request: Request) -> Answer:
    """Whether the event loop turns; broker and store are not asked."""
    lag = site_of(request).any_desk.lag
    return Answer(Live(lag < LATE, round(lag, 3)), 200 if lag < LATE else 503)


@router.get("/readyz", responses=documented(Ready, Ready(True)) | _not(Ready, Ready(False)))
async def readyz(request: Request) -> Answer:
    """Whether the node is connected and consuming."""
    ready = site_of(request).any_desk.ready
    return Answer(Ready(ready), 200 if ready else 503)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"description": "The text format of Prometheus.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """What the node was like a moment ago."""
    return Response(site_of(request).metrics.prometheus(), media_type=CONTENT_TYPE)
