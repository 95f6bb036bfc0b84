"""Messages as rows, and rows as deliveries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.message import Delivery, Outgoing


class Meta(msgspec.Struct, array_like=True):
    """What never changes while a message waits, as it is written into `meta`."""

    id: str
    topic: str
    key: str | None
    priority: int
    enqueued_at: float
    expires_at: float | None
    headers: dict[str, Any]
    reply_to: str | None = None


_encode = msgspec.json.Encoder().encode
decode_meta = msgspec.json.Decoder(Meta).decode


def encode_meta(message: Outgoing) -> str:
    said: tuple[Any, ...] = (
        message.id,
        message.topic,
        message.key,
        message.priority,
        message.enqueued_at,
        message.expires_at,
        message.headers,
    )
    if message.reply_to is not None:
        said = (*said, message.reply_to)
    return _encode(said).decode()


class Columns(NamedTuple):
    """Many messages, field by field, as `publish` and `settle` take them."""

    priorities: list[int]
    delays: list[float | None]
    expiries: list[float | None]
    keys: list[str | None]
    metas: list[str]
    bodies: list[bytes]


def columns(messages: Sequence[Outgoing]) -> Columns:
    return Columns(
        [message.priority for message in messages],
        [message.delay if message.delay > 0 else None for message in messages],
        [message.expires_at for message in messages],
        [message.key for message in messages],
        [encode_meta(message) for message in messages],
        [message.body for message in messages],
    )


def delivery(queue: str, meta: str, body: bytes, redelivered: int, token: Any) -> Delivery:
    said = decode_meta(meta)
    return Delivery(
        queue,
        said.id,
        said.topic,
        body,
        said.headers,
        said.key,
        said.priority,
        said.enqueued_at,
        said.expires_at,
        redelivered,
        token,
        reply_to=said.reply_to,
    )


def deliveries(rows: Sequence[Any], names: Mapping[int, str]) -> list[Delivery]:
    """Of the columns seq, queue, redelivered, meta, body; `names` of queues by id."""
    return [delivery(names[row["queue"]], row["meta"], row["body"], row["redelivered"], row["seq"]) for row in rows]
