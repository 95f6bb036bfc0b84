"""The words of `@app.route(options={…})`."""

from __future__ import annotations

from enum import Enum


class Actions(Enum):
    """What becomes of a message once its handler has ended."""

    ACK = "ack"
    """Done: remove it from the queue."""
    REJECT = "reject"
    """Not wanted: to the dead letters."""
    REQUEUE = "requeue"
    """Once more, later: counts one attempt and backs off; after `max_attempts`, to the dead letters."""


class Events(Enum):
    """When an action is taken: keys of `options=`."""

    ON_SUCCESS = "on_success"
    ON_EXCEPTION = "on_exception"


class Options(Enum):
    """Every keyword of `route()` that can be written as a key of `options=`."""

    BULK_SIZE = "bulk_size"
    BULK_TIMEOUT = "bulk_timeout"
    CONCURRENCY = "concurrency"
    PREFETCH = "prefetch"
    MAX_ATTEMPTS = "max_attempts"
    BACKOFF = "backoff"
    PRIORITIES = "priorities"
    ORDERED = "ordered"
