"""Messages as rows, and rows as deliveries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from penstock.brokers.meta import encode_meta, to_delivery
from penstock.message import Delivery, Outgoing


def meta_of(message: Outgoing) -> str:
    """For the column `meta`."""
    return encode_meta(message).decode()


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
        [meta_of(message) for message in messages],
        [message.body for message in messages],
    )


def deliveries(rows: Sequence[Any], names: Mapping[int, str]) -> list[Delivery]:
    """Of the columns seq, queue, redelivered, meta, body; `names` of queues by id."""
    return [to_delivery(names[row["queue"]], row["meta"], row["body"], row["redelivered"], row["seq"]) for row in rows]
