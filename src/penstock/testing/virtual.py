"""Virtual time: an event loop whose clock jumps to the next thing that happens."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

EPOCH = 1_700_000_000.0
"""Unix time at which virtual time begins."""


class Deadlock(AssertionError):
    """Nothing is ready and nothing ever will be."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: moves the loop's clock on instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            ready = super().select(0)
            if not ready:
                raise Deadlock("every task waits and no timer is set")
            return ready
        if timeout > 0:
            self.loop.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour of sleep takes no time, and the same run is the same every time."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


class VirtualClock:
    """The clock of a virtual loop, for brokers and the engine."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return EPOCH + self._loop.now

    def monotonic(self) -> float:
        return self._loop.now


def run_virtual(main: Any) -> Any:
    """Run a coroutine function, given the loop, in virtual time; returns its result."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
