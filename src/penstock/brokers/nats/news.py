"""`News`: what those who consume a queue must hear at once: a shorter lease that is to come, a stream made anew."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from penstock.brokers.nats.line import Line
from penstock.brokers.nats.names import Names

SHORTEST = 0.05
"""Seconds; what is told of a shorter lease is not believed."""


class Item(msgspec.Struct, omit_defaults=True):
    """What is told of a queue."""

    queue: str
    lease: float | None = None
    """Seconds, from a moment later on; None: its stream was made anew."""


_decode = msgspec.json.Decoder(Item).decode


class News:
    """Of one broker; `hear(item)` is called with what is told, by us as well."""

    def __init__(self, names: Names, hear: Callable[[Item], None]) -> None:
        self._subject = names.news
        self._hear = hear

    def begin(self, line: Line) -> None:
        """Listen on a new line."""
        line.listen(self._subject, self._arrived)

    def _arrived(self, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        item = _decode(data)
        if item.lease is None or item.lease >= SHORTEST:
            self._hear(item)

    def tell(self, line: Line, item: Item) -> None:
        """:raises BrokerUnavailable: the connection has ended."""
        text = msgspec.json.encode(item)
        line.write(b"PUB %b %d\r\n%b\r\n" % (self._subject.encode(), len(text), text))
