"""Suspects: messages whose consumer went away while holding them.

Most are innocent bystanders of a crash, one may be its cause, and nobody can tell which. So each is
moved to the lane `Q.suspects` and run alone: nothing else runs in the process meanwhile, and nothing
else is held from that lane. A suspect whose run ends, well or badly, is a suspect no more. One that
is redelivered from the lane again and again has been shown to kill.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SUFFIX = ".suspects"


def suspect_queue(queue: str) -> str:
    """The name of a queue's lane of suspects."""
    return queue + SUFFIX


class Solitude:
    """Lets handlers run together, or one alone. One a process."""

    def __init__(self) -> None:
        self.running = 0
        """Handler calls under way; whoever runs one adds and takes away, and calls `left`."""
        self.closed = False
        """Somebody wants to be alone: wait for `opened` before starting anything."""
        self._turn = asyncio.Lock()
        self._quiet = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()

    async def opened(self) -> None:
        while self.closed:
            await self._open.wait()

    def left(self) -> None:
        """A handler call has ended."""
        self.running -= 1
        if self.closed and not self.running:
            self._quiet.set()

    @asynccontextmanager
    async def alone(self, patience: float) -> AsyncIterator[bool]:
        """Whether nothing else is running now, nor will while inside.

        False after `patience` seconds of waiting for handlers to end: one of them may itself be waiting
        for something that is not allowed to start.
        """
        async with self._turn:
            self.closed = True
            self._open.clear()
            self._quiet.clear()
            try:
                quiet = True
                if self.running:
                    try:
                        async with asyncio.timeout(patience):
                            await self._quiet.wait()
                    except TimeoutError:
                        quiet = False
                yield quiet
            finally:
                self.closed = False
                self._open.set()
