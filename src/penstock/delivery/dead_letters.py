"""Dead letters: the queue `Q.dead` beside each queue `Q`, the same on every system.

A dead letter is the message itself, body and headers untouched, with one reserved header that says
what happened.
"""

from __future__ import annotations

import base64
import time
import traceback
from typing import Any, Literal

import msgspec

from penstock import codec, terms
from penstock.delivery import history as histories
from penstock.delivery.history import History
from penstock.errors import InvalidMessage, one_line, printable
from penstock.message import RESERVED, Delivery, Outgoing

SUFFIX = ".dead"
HEADER = RESERVED + "dead"

Reason = Literal["failed", "rejected", "invalid", "crashed", "expired"]

MAX_ERROR = 1000  # characters; a header must fit a frame of every protocol
MAX_TRACEBACK = 6000


def dead_queue(queue: str) -> str:
    """The name of a queue's dead letters."""
    return queue + SUFFIX


class Death(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the header says. `time` is in Unix seconds."""

    queue: str
    reason: Reason
    attempts: int
    time: float
    error: str | None = None
    traceback: str | None = None
    origin: str | None = None
    """The topic, where the letter itself had to be published to its dead letters by name."""


class DeadLetter(msgspec.Struct, frozen=True):
    """A dead letter as people and programs read it."""

    id: str
    queue: str
    """Where it failed."""
    reason: Reason
    error: str | None
    traceback: str | None
    attempts: int
    origin: str
    """The name it was published to."""
    time: str
    """When it was given up; ISO 8601, UTC."""
    body: Any
    """Decoded; what is neither JSON nor text as `{"base64": …}`."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Death).decode


def bury(
    delivery: Delivery,
    queue: str,
    reason: Reason,
    past: History,
    error: BaseException | str | None,
    now: float,
    *,
    abroad: bool = False,
) -> Outgoing:
    """The dead letter of a delivery; `abroad`: to be published on another broker, not moved."""
    text, trace = None, None
    if isinstance(error, BaseException):
        text = one_line(error)
        if error.__traceback__ is not None:
            trace = printable("".join(traceback.format_exception(error)))[-MAX_TRACEBACK:]
    elif error is not None:
        text = error
    death = Death(queue, reason, past.attempts, now, text and text[:MAX_ERROR], trace)
    if abroad:
        death = msgspec.structs.replace(death, origin=delivery.topic)
    headers = {**delivery.headers, HEADER: _encode(death).decode()}
    letter = histories.again(delivery, histories.NEW, headers=headers)
    if abroad:
        letter.topic = dead_queue(queue)
    return letter


def revive(delivery: Delivery) -> tuple[str, Outgoing]:
    """The queue a dead letter came from and the message as it was, its attempts forgotten."""
    death = death_of(delivery)
    headers = {name: value for name, value in delivery.headers.items() if name != HEADER}
    if terms.HEADER in headers:
        headers[terms.HEADER] = terms.write(terms.replace(terms.read(headers), again=time.time()))
    message = histories.again(delivery, histories.NEW, headers=headers)
    message.topic = death.origin or delivery.topic
    return death.queue, message


def read(delivery: Delivery, limit: int) -> DeadLetter:
    """A dead letter for reading; bodies that unpack to over `limit` bytes are shown packed."""
    death = death_of(delivery)
    return DeadLetter(
        id=delivery.id,
        queue=death.queue,
        reason=death.reason,
        error=death.error,
        traceback=death.traceback,
        attempts=death.attempts,
        origin=death.origin or delivery.topic,
        time=_iso(death.time),
        body=_readable(delivery, limit),
    )


def death_of(delivery: Delivery) -> Death:
    """What happened to a dead letter."""
    try:
        return _decode(str(delivery.headers.get(HEADER)))
    except (msgspec.DecodeError, UnicodeError):  # put there by somebody else
        queue = delivery.queue.removesuffix(SUFFIX)
        return Death(queue, "rejected", histories.read(delivery.headers).attempts, delivery.enqueued_at)


def _iso(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # made up by somebody else
        return _iso(0)


def _readable(delivery: Delivery, limit: int) -> Any:
    try:
        body = codec.decode(delivery.raw, delivery.headers, limit)
    except InvalidMessage:
        body = delivery.raw
    if not isinstance(body, bytes):
        return body
    try:
        return body.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(body).decode()}
