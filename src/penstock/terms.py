"""`Terms`: what a task's message says beside its body, in one reserved header."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from penstock.clock import LONGEST, is_backoff
from penstock.errors import one_line
from penstock.message import RESERVED

log = logging.getLogger("penstock.tasks")

HEADER = RESERVED + "task"
REPLY = RESERVED + "reply"
"""On a reply: what kind it is, where it is not simply the value."""

TAKEN, EXPIRED, FAILED = "taken", "expired", "failed"
"""The kinds of replies: somebody has begun; nobody took it in time; the body is a `Failure`."""


class Terms(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a task was asked for. A message without any is a task all the same, with the defaults."""

    arguments: bool = False
    """The body is `{"args": […], "kwargs": {…}}`; else it is the one positional argument, or the keywords."""
    recorded: bool = False
    """The sender has written it into the store."""
    deadline: float | None = None
    """Of a call: when the caller stops waiting; Unix seconds."""
    limit: float | None = None
    """Of a call: seconds a run may take."""
    tell_taken: bool = False
    """Of a call: the caller wants to know when somebody begins."""
    retries: int | None = None
    """In place of the task's own."""
    backoff: tuple[float, float] | None = None
    result_ttl: float | None = None
    unique: str | None = None
    """The store's key that is free again when this has ended (`unique_key`)."""
    topic: str | None = None
    """What it was sent to at first, where that is not what this message was published to."""
    again: float | None = None
    """When it was taken out of the dead letters, in Unix seconds: a run of it that had ended without success by then
    begins anew, once."""
    expiring: bool = False
    """It was sent with an expiry: what is written of it is kept once somebody has begun."""
    runs: int = 1
    """How many queues got a copy."""


class Reply(NamedTuple):
    """What a task returns to answer with headers too; what `call(…, with_headers=True)` gives."""

    value: Any = None
    headers: Mapping[str, Any] = {}
    """Names to text, numbers, booleans or None."""


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as data."""

    type: str
    message: str
    traceback: str | None = None
    timeout: bool = False
    """It was stopped at its limit."""


PLAIN = Terms()
COMMON = 500  # characters; longer terms are not remembered

_LATEST = 1e11
"""Unix seconds that no clock says."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Terms).decode


replace = msgspec.structs.replace


def unique_key(topic: str, unique: str) -> str:
    """The store's key of a task's unique key; no other topic and key share it."""
    return f"unique/{len(topic)}.{topic}/{unique}"


def write(terms: Terms) -> str:
    return _encode(terms).decode()


def read(headers: Mapping[str, Any]) -> Terms:
    """The terms in some headers; what is not ours counts for nothing."""
    text = headers.get(HEADER)
    if text is None:
        return PLAIN
    return _read_again(text) if type(text) is str and len(text) < COMMON else _read(str(text))


def _read(text: str) -> Terms:
    try:
        terms = _decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        log.warning("a message's %s header counts for nothing: %s", HEADER, one_line(error))
        return PLAIN
    if wrong := _wrong(terms):
        log.warning("a message's %s header counts for nothing: %s cannot be", HEADER, wrong)
        return PLAIN
    return terms


_read_again = lru_cache(maxsize=512)(_read)  # tasks that are sent alike say the same


def _wrong(terms: Terms) -> str | None:
    """The first field that no sender of ours would have written."""
    for name, most in (("deadline", _LATEST), ("again", _LATEST), ("limit", LONGEST), ("result_ttl", LONGEST)):
        value = getattr(terms, name)
        if value is not None and not 0 <= value <= most:
            return name
    if terms.backoff is not None and not is_backoff(terms.backoff):
        return "backoff"
    if (terms.retries is not None and not 0 <= terms.retries < 2**31) or not 0 < terms.runs < 2**31:
        return "retries or runs"
    if "\0" in (terms.unique or "") or "\0" in (terms.topic or ""):
        return "a name"
    return None
