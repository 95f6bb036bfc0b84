"""The OpenAPI of the routes: shapes from the very structs that are answered with, each with an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import penstock
from penstock.web.roles import PROBES, required

_REF = "#/components/schemas/{name}"
_known: dict[str, Any] = {}


class Error(msgspec.Struct):
    """What went wrong."""

    detail: str
    """In one line."""


class Wrong(msgspec.Struct):
    """One thing that is wrong with a definition."""

    file: str
    line: int
    text: str


class DefinitionError(Error):
    """All that is wrong with definitions."""

    problems: list[Wrong] = []


ERRORS = {
    400: "Not a request for this node: its host, its headers or its path.",
    401: "Without a token or a session, or with a wrong one.",
    403: "This role may not do this; or a page of another site asks.",
    404: "There is none of that name.",
    405: "Not with this method.",
    408: "The body did not arrive in time.",
    409: "It does not go with how things stand.",
    413: "The body is over the ceiling.",
    415: "A compressed body.",
    422: "Not what is wanted here.",
    429: "Too much waits already; or too many wrong tokens came from there.",
    500: "A fault of the node.",
    501: "This message system cannot do that.",
    502: "The message system could not do it.",
    503: "Message system or store are away: try again.",
}
_ALWAYS = (400, 401, 403, 405, 422, 429, 500, 503)


def shape(type: Any) -> dict[str, Any]:
    """The JSON schema of a type, its parts among the components."""
    (schema,), parts = msgspec.json.schema_components([type], ref_template=_REF)
    for name, part in parts.items():
        assert _known.setdefault(name, part) == part, f"two shapes named {name}"
    return schema


def documented(
    type: Any, example: Any, *errors: int, status: int = 200, says: str = "Done.", problems: bool = False
) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: what it answers, and what it refuses with. `type` None: nothing.

    `problems`: what is wrong with definitions is told one by one.
    """
    answer: dict[str, Any] = {"description": says}
    if type is not None:
        answer["content"] = {"application/json": {"schema": shape(type), "example": msgspec.to_builtins(example)}}
    found: dict[int | str, dict[str, Any]] = {status: answer}
    for number in sorted({*_ALWAYS, *errors} - {status}):
        kind = DefinitionError if problems and number == 422 else Error
        found[number] = {
            "description": ERRORS[number],
            "content": {"application/json": {"schema": shape(kind), "example": {"detail": "one line"}}},
        }
    return found


def body(type: Any, example: Any, media: Sequence[str] = ("application/json",)) -> dict[str, Any]:
    """`openapi_extra=` of a route that reads a body."""
    content = {one: {"schema": shape(type), "example": example} for one in media}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole description; each operation says which role it needs."""
    found = get_openapi(
        title="Penstock",
        version=penstock.__version__,
        description="A Penstock node: its tasks, definitions, workers and queues. `/signin` opens a browser's session.",
        routes=app.routes,
    )
    components = found.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **_known}
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "`PENSTOCK_TOKEN`, `…_OPERATE` or `…_VIEW`."}
    }
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _say_role(operation, method, path)
    return found


def _say_role(operation: dict[str, Any], method: str, path: str) -> None:
    role = required(method.upper(), path)
    operation["security"] = [] if path in PROBES or role is None else [{"token": []}]
    if role is not None:
        said = f"Role: {role.name.lower()}."
        operation["description"] = f"{operation.get('description', '')}\n\n{said}".strip()
