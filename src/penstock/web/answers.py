"""Answers as JSON, and the one line that an error is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from penstock.control.tasks import Conflict
from penstock.errors import (
    BodyTooLarge,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    DeclarationError,
    InvalidMessage,
    NotUnique,
    PenstockError,
    PublishTimeout,
    QueueFull,
    StorageFull,
    StoreRequired,
    TimeoutError,
    TransactionConflict,
    Unencodable,
    UnknownDefinition,
    UnknownQueue,
    UnknownTask,
    UnknownTransaction,
    UnknownWorker,
    Unroutable,
    Unsupported,
    printable,
)

_encoder = msgspec.json.Encoder()

_STATUS: tuple[tuple[type[PenstockError], int], ...] = (
    (UnknownTask, 404),
    (UnknownTransaction, 404),
    (UnknownWorker, 404),
    (UnknownDefinition, 404),
    (UnknownQueue, 404),
    (Conflict, 409),
    (TransactionConflict, 409),
    (NotUnique, 409),
    (BodyTooLarge, 413),
    (QueueFull, 429),
    (Unencodable, 422),
    (Unroutable, 422),
    (InvalidMessage, 422),
    (StorageFull, 503),
    (PublishTimeout, 503),
    (BrokerUnavailable, 503),
    (TimeoutError, 503),
    (Unsupported, 501),
    (StoreRequired, 501),
    (ConfigError, 422),
    (DeclarationError, 422),
    (BrokerError, 502),
)
"""The first that fits."""


class Answer(Response):
    """Anything that msgspec can say, as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class Refused(Exception):
    """A request that is answered with an error, and nothing else.

    Not an `HTTPException`: what is mounted here shall not answer it in its own words.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.detail, self.headers = status, detail, dict(headers or {})
        super().__init__(detail)


def encode(content: Any) -> bytes:
    """As JSON; text that has no encoding is written escaped."""
    try:
        return _encoder.encode(content)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(content)).encode()


def error(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Answer:
    """`{"detail": "one line"}`, and what else there is to say of it."""
    return Answer({"detail": line(detail), **more}, status, headers)


def line(text: str) -> str:
    """Text on one line."""
    return printable(" ".join(text.split()))


def status_of(problem: PenstockError) -> int:
    """The status that says best what is wrong."""
    return next((status for kind, status in _STATUS if isinstance(problem, kind)), 500)


def of(problem: PenstockError) -> Answer:
    """The answer to an error of ours."""
    status = status_of(problem)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    problems = getattr(problem, "problems", None)
    if problems is None:
        return error(status, str(problem) or type(problem).__name__, headers)
    told = [{"file": one.place.file, "line": one.place.line, "text": line(one.text)} for one in problems]
    return error(status, "; ".join(map(str, problems)) or str(problem), headers, problems=told)
