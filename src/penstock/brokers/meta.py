"""`Meta`: what is stored of a message beside its body, as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.message import Delivery, Outgoing


class Meta(msgspec.Struct, array_like=True):
    """What never changes while a message waits."""

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
""":raises msgspec.MsgspecError: it is none."""


def encode_meta(message: Outgoing) -> bytes:
    """An array, without `reply_to` where nobody awaits an answer."""
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
    return _encode(said)


def to_delivery(queue: str, meta: bytes | str, body: bytes, redelivered: int, token: Any) -> Delivery:
    """:raises msgspec.MsgspecError: that is no meta."""
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
