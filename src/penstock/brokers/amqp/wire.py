"""Messages as AMQP knows them: our envelope to properties and headers, and back; foreign ones too."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from penstock import codec
from penstock.errors import PublishError
from penstock.message import RESERVED, Delivery, Outgoing

# What AMQP has no property for, or not the precision. Times are Unix seconds as text: the driver writes
# floats with 32 bits, which is two minutes for a date.
AT = RESERVED + "at"
DUE = RESERVED + "due"
EXPIRES = RESERVED + "expires"
KEY = RESERVED + "key"
MORE = RESERVED + "more"
"""JSON of the user's headers that AMQP, the driver or the server would not carry as they are."""
PRIORITY = RESERVED + "priority"
TAKEN = RESERVED + "taken"
"""Somebody has had it in hand: it expires no more."""
TOPIC = RESERVED + "topic"

REPLY_TO = "amq.rabbitmq.reply-to"
"""Of a request: the server puts the address of the channel in its place."""
DELIVERY_COUNT = "x-delivery-count"
"""Of quorum queues: deliveries that did not end with an acknowledgement."""

_DIARY = ("x-death", "x-first-death", "x-last-death")
_OURS = frozenset({AT, DUE, EXPIRES, KEY, MORE, PRIORITY, TAKEN, TOPIC})
_SPECIAL = frozenset({*_OURS, DELIVERY_COUNT, "CC", "BCC", codec.CONTENT_TYPE, codec.CONTENT_ENCODING})
_LONGEST_HEADER_NAME = 128  # bytes; the driver cuts longer ones
_LONGEST_PROPERTY = 255  # bytes
_LONGEST_EXPIRATION = 10 * 365 * 86_400_000
"""Milliseconds; the server refuses more. What expires later does so when somebody receives it."""
_LATEST = 1e11
"""Unix seconds, some three thousand years on. A time beyond that is nobody's."""
_INTEGERS = range(-(2**63), 2**63)


class Token(NamedTuple):
    """What the adapter knows of a delivery: its tag on its channel, when its delay ends (Unix seconds), and
    whether somebody has had it in hand."""

    tag: int
    due: float = 0.0
    taken: bool = False


def to_properties(message: Outgoing, to: str, levels: int, *, room: int, taken: bool = False) -> Basic.Properties:
    """The properties of a message with the routing key `to`, for a queue of `levels` priorities.

    :raises PublishError: they would take more than `room` bytes, or cannot be written at all.
    """
    headers: dict[str, Any] = {AT: repr(message.enqueued_at)} if message.enqueued_at else {}
    content_type = content_encoding = expiration = priority = None
    length = len(message.id)
    if message.headers:
        more: dict[str, Any] = {}
        for name, value in message.headers.items():
            if name == codec.CONTENT_TYPE and _fits_property(value):
                content_type = value
            elif name == codec.CONTENT_ENCODING and _fits_property(value):
                content_encoding = value
            else:
                length += _add_header(headers, more, name, value)
        if more:
            headers[MORE] = _to_json(more)
            length += len(headers[MORE])
    if message.topic != to:
        headers[TOPIC] = message.topic
    if message.key is not None:
        headers[KEY] = message.key
        length += len(message.key)
    if message.expires_at is not None:
        headers[EXPIRES] = repr(message.expires_at)
        if taken:
            headers[TAKEN] = True
        else:
            left = max(0, round((message.expires_at - time.time()) * 1000))
            expiration = str(left) if left <= _LONGEST_EXPIRATION else None
    if message.priority:
        headers[PRIORITY] = message.priority
        priority = min(max(1, round(message.priority / 255 * levels)), 255)
    if message.delay > 0:
        headers[DUE] = repr(time.time() + message.delay)
    if message.reply_to == REPLY_TO:
        # On a channel that has no replies to get, the server answers with the end of the channel.
        raise PublishError(f"reply_to={REPLY_TO!r} is nobody's address")
    properties = Basic.Properties(
        content_type=content_type,
        content_encoding=content_encoding,
        headers=headers,
        delivery_mode=2 if message.persistent else 1,
        priority=priority,
        expiration=expiration,
        message_id=message.id,
        reply_to=message.reply_to,
    )
    if length * 4 > room and (size := len(properties.marshal())) > room:
        # The server answers a header that fills a frame by closing the connection, with all that is on it.
        raise PublishError(f"id, key and headers take {size} bytes: RabbitMQ carries up to {room}")
    return properties


def to_delivery(message: DeliveredMessage, queue: str, tag: int | None) -> Delivery:
    """A received message. A foreign one gets an id of its own, and keeps it once it has been moved; a foreign
    request has the one that its answer is to carry."""
    properties = message.header.properties
    delivery: Any = message.delivery
    headers: dict[str, Any] = properties.headers or {}  # made for this message, so it is ours to change
    topic, key, priority, expires_at, due, taken = delivery.routing_key, None, 0, None, 0.0, False
    redelivered = int(delivery.redelivered)
    at = _seconds(headers.pop(AT, None))
    if headers:
        topic = _text(headers.pop(TOPIC, None)) or topic
        key = _text(headers.pop(KEY, None))
        priority = _number(headers.pop(PRIORITY, 0))
        expires_at = _seconds(headers.pop(EXPIRES, None))
        due = _seconds(headers.pop(DUE, None)) or 0.0
        taken = headers.pop(TAKEN, False) is True
        redelivered = _number(headers.pop(DELIVERY_COUNT, redelivered))
        more = headers.pop(MORE, None)
        if "x-death" in headers:  # the server's diary of parking places
            for name in [name for name in headers if name.startswith(_DIARY)]:
                del headers[name]
        if more is not None:
            headers.update(_from_json(more))
    if at is None:
        at = properties.timestamp.timestamp() if properties.timestamp is not None else time.time()
        priority = priority or properties.priority or 0
    if properties.content_type is not None:
        headers[codec.CONTENT_TYPE] = properties.content_type
    if properties.content_encoding is not None:
        headers[codec.CONTENT_ENCODING] = properties.content_encoding
    reply_to = properties.reply_to
    return Delivery(
        queue,
        (reply_to and properties.correlation_id) or properties.message_id or uuid.uuid4().hex,
        topic or queue,
        message.body,
        headers,
        key,
        priority,
        at,
        expires_at,
        redelivered,
        None if tag is None else Token(tag, due, taken),
        reply_to=reply_to or None,
    )


def _add_header(headers: dict[str, Any], more: dict[str, Any], name: str, value: Any) -> int:
    """Put a user's header where it arrives as it is; its length, about."""
    kind = type(value)
    special = name in _SPECIAL or name.startswith(_DIARY) or len(name.encode()) > _LONGEST_HEADER_NAME
    if special or (kind is int and value not in _INTEGERS):
        more[name] = value
        return 0  # counted with the rest of the JSON
    if kind is float:
        more[name] = value
    headers[name] = bytearray(value) if kind is bytes else value
    return len(name) + (len(value) if kind is str or kind is bytes else 9)


def _fits_property(value: Any) -> bool:
    return type(value) is str and 0 < len(value.encode()) <= _LONGEST_PROPERTY


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _seconds(text: Any) -> float | None:
    try:
        seconds = float(text) if type(text) is str else None
    except ValueError:
        return None
    return seconds if seconds is not None and abs(seconds) <= _LATEST else None


def _to_json(headers: Mapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(headers).decode()
    except (TypeError, ValueError) as error:
        raise PublishError(f"headers {', '.join(map(repr, headers))}: {error}") from None


def _from_json(text: Any) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, TypeError):
        return {}
