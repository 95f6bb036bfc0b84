"""Messages as NATS knows them: our envelope is one header, the body is the payload; foreign ones come in too."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec

from penstock import codec
from penstock.brokers.nats.names import tail
from penstock.errors import BodyTooLarge, PublishError
from penstock.message import Delivery, Outgoing

HEAD = b"NATS/1.0\r\n"
ENVELOPE = b"Penstock: "
MSG_ID = b"Nats-Msg-Id: "
MOST_HEADERS = 65_535
"""Bytes of headers that a stream stores."""

_BEGINNING = HEAD + ENVELOPE


class TooLargeError(BodyTooLarge):
    """It will never be carried as it is."""

    def __init__(self, size: int, limit: int, what: str) -> None:
        super().__init__(size, limit)
        self.args = (what,)


class Envelope(msgspec.Struct, omit_defaults=True):
    """All of a message but its body. Times are Unix seconds."""

    id: str
    at: float = 0.0
    topic: str | None = None
    """Where it differs from the one in the subject."""
    headers: dict[str, Any] = {}
    key: str | None = None
    priority: int = 0
    expires: float | None = None
    due: float = 0.0
    """When its delay ends."""
    reply_to: str | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Envelope).decode


class Token(msgspec.Struct, frozen=True):
    """What the adapter knows of a delivery."""

    ack: bytes
    """The subject on which it is settled: stream, place and count in one."""
    source: Any
    """The `Source` it came from."""
    at: float
    """When it arrived, of the monotonic clock."""
    delivered: int
    """How often the server has handed it out, this time included."""
    place: str
    """Its sequence in the stream."""
    stamp: str
    """When it was stored, in nanoseconds."""
    due: float
    rewritten: bytes = b""
    """The header block that stands for the stored one, if it was noted that there is another."""


class Place(NamedTuple):
    """What the server says of a delivery, in the subject for its acknowledgement."""

    delivered: int
    seq: str
    stamp: str


def place_of(ack: bytes) -> Place:
    """:raises ValueError: not the acknowledgement subject of a stream's message."""
    parts = ack.decode().split(".")
    # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>, newer servers with
    # a domain and an account before the stream.
    first = 4 if len(parts) == 9 else 6
    if len(parts) < 9 or parts[0] != "$JS":
        raise ValueError(f"not a message of a stream: {ack!r}")
    return Place(int(parts[first]), parts[first + 1], parts[first + 3])


def header_of(message: Outgoing, topic: str, msg_id: str | None = None, now: float | None = None) -> bytes:
    """The header block of a message in a subject of `topic`.

    :raises PublishError: it cannot be written.
    :raises TooLargeError: it is larger than a stream stores.
    """
    due = 0.0
    if message.delay > 0:
        due = (time.time() if now is None else now) + message.delay
    envelope = Envelope(
        message.id,
        message.enqueued_at,
        None if message.topic == topic else message.topic,
        message.headers,  # type: ignore[arg-type]  # only written
        message.key,
        message.priority,
        message.expires_at,
        due,
        message.reply_to,
    )
    try:
        block = _BEGINNING + _encode(envelope) + b"\r\n"
        if msg_id is not None:
            block += MSG_ID + _in_a_line(msg_id) + b"\r\n"
    except (TypeError, ValueError, OverflowError) as error:
        raise PublishError(f"message {message.id[:80]!r} cannot be written as JSON: {error}") from None
    if len(block) > MOST_HEADERS:
        said = f"id, key and headers take {len(block)} bytes: NATS carries up to {MOST_HEADERS}"
        raise TooLargeError(len(block), MOST_HEADERS, said)
    return block + b"\r\n"


def _in_a_line(text: str) -> bytes:
    return text.encode() if text.isascii() and text.isprintable() and " " not in text else _encode(text)


def publication(subject: str, reply: bytes, block: bytes, body: bytes) -> bytes:
    """The line and the bytes with which a message is published."""
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
        subject.encode(),
        reply,
        len(block),
        len(block) + len(body),
        block,
        body,
    )


def to_delivery(
    subject: bytes, body: bytes, block: bytes | None, queue: str, source: Any = None, ack: bytes = b"", at: float = 0.0
) -> Delivery:
    """A received message; one without `ack` was not in a stream."""
    place = place_of(ack) if ack else None
    envelope = _envelope(block, place)
    topic = envelope.topic
    if topic is None:
        topic = tail(subject.decode())[0] if place else subject.decode()
    token = None
    if place is not None:
        token = Token(ack, source, at, place.delivered, place.seq, place.stamp, envelope.due)
    return Delivery(
        queue,
        envelope.id,
        topic,
        body,
        envelope.headers,
        envelope.key,
        envelope.priority,
        envelope.at,
        envelope.expires,
        place.delivered - 1 if place else 0,
        token,
        reply_to=envelope.reply_to,
    )


def _envelope(block: bytes | None, place: Place | None) -> Envelope:
    if block is not None and block.startswith(_BEGINNING):
        try:
            return _decode(block[len(_BEGINNING) : block.index(b"\r\n", len(_BEGINNING))])
        except (msgspec.MsgspecError, ValueError):
            pass
    return _foreign(headers_of(block), place)


def rewrite(delivery: Delivery, block: bytes) -> None:
    """Have all but its body from another header block of ours."""
    envelope = _envelope(block, None)
    delivery.headers, delivery.key, delivery.priority = envelope.headers, envelope.key, envelope.priority
    delivery.expires_at, delivery.reply_to = envelope.expires, envelope.reply_to
    delivery.token = msgspec.structs.replace(delivery.token, rewritten=block, due=envelope.due)


def _foreign(headers: dict[str, str], place: Place | None) -> Envelope:
    """A message that somebody else published keeps the id that its place gives it."""
    found: dict[str, Any] = {}
    for name, value in headers.items():
        lower = name.lower()
        found[lower if lower in (codec.CONTENT_TYPE, codec.CONTENT_ENCODING) else name] = value
    id = found.pop("Nats-Msg-Id", None)
    if place is None:
        return Envelope(id or "", time.time(), headers=found)
    return Envelope(id or f"{place.stamp}-{place.seq}", int(place.stamp) / 1e9, headers=found)


def headers_of(block: bytes | None) -> dict[str, str]:
    """Headers by name, the last of each; without the status line."""
    found: dict[str, str] = {}
    for line in (block or b"").split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            found[_text(name)] = _text(value)
    return found


def _text(raw: bytes) -> str:
    """What is no UTF-8 is taken for Latin-1: no two values become one."""
    try:
        return raw.decode().strip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip()


def status_of(block: bytes | None) -> tuple[int, str] | None:
    """Code and text of what is a word of the server's and no message: `NATS/1.0 408 Request Timeout`."""
    if block is None or not block.startswith(b"NATS/1.0 "):
        return None
    words = block[9 : block.index(b"\r\n")].decode(errors="replace").split(" ", 1)
    return (int(words[0]) if words[0].isdigit() else 0), words[-1]
