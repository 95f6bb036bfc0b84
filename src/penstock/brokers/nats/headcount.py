"""`Headcount`: who holds how much. The server cannot tell what is in hand from what waits to come again; the consumers
can, and are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from penstock.brokers.nats.everybody import answer, ask_everybody
from penstock.brokers.nats.line import Line
from penstock.brokers.nats.names import Names

Count = dict[str, tuple[int, int]]
"""By queue: messages in hand, consumers."""

_decode = msgspec.json.Decoder(Count).decode


class Headcount:
    """Of one broker; `ours()` says what it holds itself, to inboxes alone."""

    def __init__(self, names: Names, ours: Callable[[], Count], is_inbox: Callable[[str], bool]) -> None:
        self._subject = f"{names.space}.who"
        self._ours = ours
        self._is_inbox = is_inbox

    def begin(self, line: Line) -> None:
        """Answer on a new line."""

        def asked(subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
            if self._is_inbox(reply.decode(errors="replace")):
                answer(line, reply, msgspec.json.encode(self._ours()))

        line.listen(self._subject, asked)

    async def take(self, line: Line) -> Mapping[str, tuple[int, int]]:
        """The sum of what consumers answer. One whose event loop hangs says nothing.

        :raises BrokerUnavailable: the connection has ended.
        """
        total: Count = {}

        def hear(data: bytes) -> None:
            for queue, (held, consumers) in _decode(data).items():
                before = total.get(queue, (0, 0))
                total[queue] = (before[0] + held, before[1] + consumers)

        await ask_everybody(line, self._subject, b"", hear)
        return total
