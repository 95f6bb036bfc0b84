"""One question to every broker of a space, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.brokers.nats.line import Line

PATIENCE = 0.5
"""Seconds that all of them have for their answers."""
QUIET = 0.1
"""Seconds after the last answer, after which there is nobody else."""


async def ask_everybody(line: Line, subject: str, question: bytes, hear: Callable[[bytes], None]) -> None:
    """Have `hear` called with each answer, our own among them. One whose event loop hangs says nothing.

    :raises BrokerUnavailable: the connection has ended.
    """
    answers = 0

    def count(subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        nonlocal answers
        answers += 1
        hear(data)

    inbox = f"{line.inbox}.all.{id(count)}"
    sid = line.listen(inbox, count)
    try:
        line.write(b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), inbox.encode(), len(question), question))
        until, seen = asyncio.get_running_loop().time() + PATIENCE, -1
        while seen != answers and asyncio.get_running_loop().time() < until:
            seen = answers
            await asyncio.sleep(QUIET)
    finally:
        line.leave(sid)
        line.forget(sid)


def answer(line: Line, reply: bytes, text: bytes) -> None:
    """:raises BrokerUnavailable: the connection has ended."""
    line.write(b"PUB %b %d\r\n%b\r\n" % (reply, len(text), text))
