"""What things are called on the server: a name is one token of a subject, a queue is one stream."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

from penstock.errors import BrokerRefused

CONSUMER = "penstock"
"""The one durable consumer of each queue's stream."""
LONGEST_NAME = 255  # bytes of UTF-8
_LONGEST_STREAM = 120  # characters of a token in a stream's name, which is a directory's name too

_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


@lru_cache(maxsize=10_000)
def token(name: str) -> str:
    """A name as one token of a subject: letters, digits, `_` and `-` as they are, else `=` and two hex digits
    for each byte of UTF-8."""
    return _PLAIN.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), name)


@lru_cache(maxsize=10_000)
def name_of(token: str) -> str:
    """The name that a token stands for."""
    text = re.sub(rb"=([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), token.encode())
    return text.decode(errors="replace")


def can_be_named(name: str) -> bool:
    """Whether a subject has room for such a name."""
    if not name:
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def check(*names: str) -> None:
    """:raises BrokerRefused: a name that cannot be one."""
    for name in names:
        if not name:
            raise BrokerRefused("a queue needs a name")
        if not can_be_named(name):
            size = len(name.encode(errors="replace"))
            raise BrokerRefused(f"on NATS names have up to {LONGEST_NAME} bytes of UTF-8: {name[:40]!r}… has {size}")


class Names:
    """The names in one space, `penstock` unless the URL says another: spaces share nothing."""

    def __init__(self, space: str) -> None:
        self.space = space
        self.bindings_stream = f"{space}-bindings"
        self.notes_stream = f"{space}-notes"
        self.all_of_bindings = f"{space}.bind.>"
        """What the stream of the bindings keeps: them, and what was unbound."""
        self.all_bindings = f"{space}.bind.*.*"
        self.unbound = f"{space}.unbound"
        """Where it is told that queues are bound to topics no more."""
        self.all_notes = f"{space}.note.>"
        self.news = f"{space}.news"
        """Where it is told that a queue's lease changes, or its stream was made anew."""

    def stream(self, queue: str) -> str:
        """The stream of a queue."""
        coded = token(queue)
        if len(coded) > _LONGEST_STREAM:
            coded = f"{coded[:64]}={hashlib.sha256(queue.encode()).hexdigest()[:32]}"
        return f"{self.space}-q-{coded}"

    def subject(self, topic: str, queue: str) -> str:
        """What is published to a topic, for one of the queues bound to it."""
        return f"{self.space}.q.{token(topic)}.{token(queue)}"

    def subjects(self, queue: str) -> str:
        """All subjects of a queue's stream."""
        return f"{self.space}.q.*.{token(queue)}"

    def binding(self, topic: str, queue: str) -> str:
        return f"{self.space}.bind.{token(topic)}.{token(queue)}"

    def unbinding(self, topic: str, queue: str) -> str:
        """Says that a queue was unbound from a topic: whoever declared it must declare it anew."""
        return f"{self.binding(topic, queue)}.not"

    def bound_to(self, topic: str) -> str:
        """The bindings of a topic."""
        return f"{self.space}.bind.{token(topic)}.*"

    def bindings_of(self, queue: str) -> str:
        return f"{self.space}.bind.*.{token(queue)}"

    def unbindings_of(self, queue: str) -> str:
        return f"{self.bindings_of(queue)}.not"

    def note(self, queue: str, stamp: str, seq: str) -> str:
        """The note about one message: its place in the stream and the time it got there make it unique."""
        return f"{self.space}.note.{hashlib.sha256(queue.encode()).hexdigest()[:24]}.{stamp}.{seq}"

    def broadcast(self, topic: str) -> str:
        return f"{self.space}.cast.{token(topic)}"

    def next(self, queue: str) -> bytes:
        """Where messages of a queue are asked for."""
        return f"$JS.API.CONSUMER.MSG.NEXT.{self.stream(queue)}.{CONSUMER}".encode()


def tail(subject: str) -> tuple[str, str]:
    """Topic and queue, of a subject or a binding."""
    *_, topic, queue = subject.split(".")
    return name_of(topic), name_of(queue)
