"""`Headcount`: who holds how much. The server cannot tell what is in hand from what waits to come again; the consumers
can, and are asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from penstock.brokers.nats.line import Line
from penstock.brokers.nats.names import Names

PATIENCE = 0.5
"""Seconds that all of them have for their answers."""
QUIET = 0.1
"""Seconds after the last answer, after which there is nobody else."""

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

        def answer(subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
            if not self._is_inbox(reply.decode(errors="replace")):
                return
            text = msgspec.json.encode(self._ours())
            line.write(b"PUB %b %d\r\n%b\r\n" % (reply, len(text), text))

        line.listen(self._subject, answer)

    async def take(self, line: Line) -> Mapping[str, tuple[int, int]]:
        """The sum of what consumers answer. One whose event loop hangs says nothing.

        :raises BrokerUnavailable: the connection has ended.
        """
        total: Count = {}
        answers = 0

        def hear(subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
            nonlocal answers
            answers += 1
            for queue, (held, consumers) in _decode(data).items():
                before = total.get(queue, (0, 0))
                total[queue] = (before[0] + held, before[1] + consumers)

        inbox = f"{line.inbox}.who.{id(total)}"
        sid = line.listen(inbox, hear)
        line.write(b"PUB %b %b 0\r\n\r\n" % (self._subject.encode(), inbox.encode()))
        until, seen = asyncio.get_running_loop().time() + PATIENCE, -1
        while seen != answers and asyncio.get_running_loop().time() < until:
            seen = answers
            await asyncio.sleep(QUIET)
        line.leave(sid)
        line.forget(sid)
        return total
