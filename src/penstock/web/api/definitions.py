"""`/definitions`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from penstock.node.page import KINDS, Stored
from penstock.web.answers import Answer
from penstock.web.bodies import read_text
from penstock.web.schema import body, documented
from penstock.web.shown import shown
from penstock.web.site import caller_of, site_of
from penstock.web.trail import audited

router = APIRouter(tags=["definitions"])

KindName = Annotated[str, Path(json_schema_extra={"enum": list(KINDS)})]

_TEXT = "name: greet\ntopics: [hello]\nscript: |\n  async def run(task): ...\n"
_STORED = Stored(
    kind="jobs", name="greet", category=None, text=_TEXT, file="jobs.yml", line=1, by="token edit 127.0.0.1", at=1.8e9
)
_YAML = body(str, _TEXT, ("application/yaml", "application/json"))
_WRITING = (408, 413, 415, 422)


@router.get("/definitions/{kind}", responses=documented(list[Stored], [_STORED], 404))
async def all_of(request: Request, kind: KindName, category: str | None = None) -> Answer:
    """The definitions of a kind, by name; of one category only, if told. Secrets of configurations and tokens of jobs
    are masked; in scripts, for whoever may not edit them."""
    found = await site_of(request).desk.book.list(kind)
    return await shown(request, [one for one in found if category is None or one.category == category])


@router.get("/definitions/{kind}/{name:path}", responses=documented(Stored, _STORED, 404))
async def show(request: Request, kind: KindName, name: str) -> Answer:
    """One definition as it was written. Secrets of a configuration and tokens of a job are masked; in a script, for
    whoever may not edit it."""
    return await shown(request, await site_of(request).desk.book.show(kind, name))


@router.put(
    "/definitions/{kind}/{name:path}",
    openapi_extra=_YAML,
    responses=documented(Stored, _STORED, 404, *_WRITING, problems=True),
)
async def put(request: Request, kind: KindName, name: str) -> Answer:
    """Write one definition, new or in place of the old one. The body is its YAML; JSON is YAML. It is answered when
    this node hosts it; after 5 s at most, when what it takes the place of has not ended, say."""
    text, desk = await read_text(request), site_of(request).desk
    async with audited(request, "definition.put", f"{kind}/{name}"):
        written = await desk.book.put(kind, name, text, str(caller_of(request.scope)))
    await desk.caught_up()
    return Answer(written)


@router.delete(
    "/definitions/{kind}/{name:path}", status_code=204, responses=documented(None, None, 404, 413, 415, status=204)
)
async def delete(request: Request, kind: KindName, name: str) -> Response:
    """Remove a definition from every node. It is answered when it has ended on this one; after 5 s at most."""
    desk = site_of(request).desk
    async with audited(request, "definition.delete", f"{kind}/{name}"):
        await desk.book.delete(kind, name, str(caller_of(request.scope)))
    await desk.caught_up()
    return Response(status_code=204)


@router.post(
    "/definitions",
    openapi_extra=_YAML,
    responses=documented(list[Stored], [_STORED], 404, *_WRITING, problems=True),
)
async def put_all(request: Request) -> Answer:
    """Write the definitions of a whole YAML file, all or none of them. It is answered when this node hosts them; after
    5 s at most."""
    text, desk = await read_text(request), site_of(request).desk
    async with audited(request, "definition.put_all", "a file") as deed:
        written = await desk.book.put_all(text, str(caller_of(request.scope)))
        deed.detail = ", ".join(f"{one.kind}/{one.name}" for one in written)
    await desk.caught_up()
    return Answer(written)
