"""The FastAPI application of a node, without its gate."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from penstock.errors import PenstockError
from penstock.web import answers, overview, probes, schema, signin
from penstock.web.answers import Answer, Refused
from penstock.web.api import console, definitions, nodes, queues, tasks, transactions, workers
from penstock.web.site import Site


class Pages:
    """All routes. Everything comes through `gate.Gate`: nothing here asks who somebody is.

    The one route that is asked for thousands of times a second does not pass through what FastAPI does for those
    with parameters: that would cost more than all the rest of it.
    """

    def __init__(self, site: Site) -> None:
        self.app = build(site)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        if scope["type"] == "http" and scope["path"] == "/tasks" and scope["method"] == "POST":
            scope["app"] = self.app
            request = Request(scope, receive)
            try:
                answer = await tasks.send(request)
            except (Refused, PenstockError) as error:
                answer = await (_refused if isinstance(error, Refused) else _failed)(request, error)
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def build(site: Site) -> FastAPI:
    """What is described at `/openapi.json`, too."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            Refused: _refused,
            PenstockError: _failed,
            RequestValidationError: _invalid,
            HTTPException: _http,
            Exception: _fault,
        },
    )
    app.state.site = site
    for one in (tasks, transactions, definitions, workers, queues, nodes, console, probes, signin, overview):
        app.include_router(one.router)
    described: list[dict[str, Any]] = []

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Answer:
        if not described:
            described.append(schema.describe(app))
        return Answer(described[0])

    return app


async def _refused(request: Request, error: Exception) -> Answer:
    assert isinstance(error, Refused)
    return answers.error(error.status, error.detail, error.headers)


async def _failed(request: Request, error: Exception) -> Answer:
    assert isinstance(error, PenstockError)
    return answers.of(error)


async def _invalid(request: Request, error: Exception) -> Answer:
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return answers.error(422, "; ".join(told))


async def _http(request: Request, error: Exception) -> Answer:
    """What the router itself refuses: no such route, not with this method."""
    assert isinstance(error, HTTPException)
    return answers.error(error.status_code, f"{error.detail}: {request.method} {request.url.path}", error.headers)


async def _fault(request: Request, error: Exception) -> Answer:
    """The gate logs it."""
    return answers.error(500, "an error of the node: see its log")
