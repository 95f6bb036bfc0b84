"""Messages as they are written into Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.brokers.meta import encode_meta, to_delivery
from penstock.message import Delivery, Outgoing
from penstock.redis.line import Word


class Place(NamedTuple):
    """An entry of a stream: the handle of a delivery. It is void once it is given back, moved or taken over,
    for then the message is another entry."""

    stream: str
    """`rank:queue`."""
    entry: bytes
    keyed: bool
    """Whether others of its key may be waiting behind it."""


_UNREADABLE = (TypeError, ValueError, IndexError, msgspec.MsgspecError)


def stored(message: Outgoing) -> tuple[Word, ...]:
    """Topic, rank, delay, expires at, key, meta, body: as the scripts take them."""
    return (
        message.topic,
        2 * message.priority,
        max(message.delay, 0),
        "" if message.expires_at is None else repr(message.expires_at),
        "" if message.key is None else f"={message.key}",
        encode_meta(message),
        message.body,
    )


def packed(arguments: Sequence[Word], most: int) -> Sequence[Word]:
    """The arguments of PUBLISH; if they are more than `most` in one word, a MessagePack array of the kind of strings
    that scripts understand, after an empty one."""
    if len(arguments) <= most:
        return arguments
    written = [b"\xdd", (len(arguments) + 1).to_bytes(4), b"\xa0"]
    for word in arguments:
        text = word if isinstance(word, bytes) else str(word).encode()
        written += (b"\xdb", len(text).to_bytes(4), text)
    return [b"".join(written)]


def deliveries(names: Sequence[str], found: Sequence[Any], broken: list[Place]) -> Iterator[Delivery]:
    """What a claim found: `[number of the queue, rank, entries] …`. Entries that are gone, or none of ours, are added
    to `broken`."""
    for number, rank, entries in found:
        name = names[number]
        stream = f"{rank.decode()}:{name}"
        for entry, fields in entries:
            try:
                yield _delivery(name, stream, entry, fields)
            except _UNREADABLE:
                broken.append(Place(stream, entry, False))


def browsed(queue: str, fields: Sequence[bytes], token: Any) -> list[Delivery]:
    """An entry to look at; nothing, if it is none of ours."""
    try:
        more = dict(zip(fields[4::2], fields[5::2], strict=True))
        return [to_delivery(queue, fields[1], fields[3], int(more.get(b"r", 0)), token)]
    except _UNREADABLE:
        return []


def _delivery(name: str, stream: str, entry: bytes, fields: Any) -> Delivery:
    if len(fields) == 4:
        return to_delivery(name, fields[1], fields[3], 0, Place(stream, entry, False))
    more = dict(zip(fields[4::2], fields[5::2], strict=True))
    return to_delivery(name, fields[1], fields[3], int(more.get(b"r", 0)), Place(stream, entry, b"k" in more))


def encode_spoken(message: Outgoing) -> bytes:
    """A message on a channel: the length of its meta, a line's end, its meta, its body."""
    meta = encode_meta(message)
    return b"%d\n%b%b" % (len(meta), meta, message.body)


def decode_spoken(data: bytes) -> Delivery:
    """:raises ValueError: not ours."""
    size, _, rest = data.partition(b"\n")
    length = int(size)
    try:
        return to_delivery("", rest[:length], rest[length:], 0, None)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
