"""What all ways of running a function have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

log = logging.getLogger("penstock.stopping")


class Overrun(Exception):
    """The run did not end within its limit, and was stopped or abandoned."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        super().__init__(f"it ran for over {limit:g} s")


class RemoteFailure(Exception):
    """What a function raised in a process of its own. `type` is its class's name, `traceback` text."""

    def __init__(self, type: str, message: str, traceback: str | None) -> None:
        self.type, self.message, self.traceback = type, message, traceback
        super().__init__(f"{type}: {message}" if message else type)


class Runner(Protocol):
    """Runs one function, so that each run can be stopped."""

    async def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any], limit: float | None) -> Any:
        """Run the function to its end; what it returns, or raises, comes out.

        Cancelling stops the run too, and returns once it is stopped or abandoned.

        :raises Overrun: it did not end within `limit` seconds.
        """
        ...

    async def close(self) -> None:
        """Take no more runs. Idempotent."""
        ...


class Abandoned:
    """The runs of a process that would not end. `too_many(name)` is called once, in the event loop, when more than
    `most` are stuck at the same time."""

    def __init__(self, most: int, too_many: Callable[[str], None]) -> None:
        self.count = 0
        self._most = most
        self._too_many = too_many
        self._told = False

    def add(self, name: str) -> None:
        self.count += 1
        log.error("%s: a run would not be stopped and is left behind; %d such runs are stuck", name, self.count)
        if self.count > self._most and not self._told:
            self._told = True
            self._too_many(name)

    def discard(self, name: str) -> None:
        """One has ended after all."""
        self.count -= 1
        log.warning("%s: a run that was left behind has ended after all; %d are stuck", name, self.count)


async def for_certain(ended: asyncio.Future[Any], seconds: float) -> None:
    """Until it is done or for `seconds`, even if we are cancelled meanwhile. `asyncio` remembers that we were."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not ended.done() and (left := until - loop.time()) > 0:
        try:
            await asyncio.wait([ended], timeout=left)
        except asyncio.CancelledError:
            continue


def raise_if_cancelled() -> None:
    """:raises CancelledError: we were cancelled while something had to be seen to its end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def presentable(error: BaseException) -> BaseException:
    """What came out of a function, fit to be raised elsewhere: nothing that ends threads, loops or generators."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    what = type(error).__name__
    told = f"the function raised {what}" + (f": {error}" if str(error) else "")
    made = RuntimeError(told)
    made.__cause__ = error
    return made
