"""Coroutines, in the event loop: stopped by cancelling, as often as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from penstock.delivery.arguments import name_of
from penstock.delivery.stopping.base import Abandoned, Overrun, for_certain, presentable, raise_if_cancelled

AGAIN = 0.05  # seconds between cancellations of a run that swallows them
PATIENCE = 1.0  # seconds until it is left behind


class LoopRunner:
    """Runs a coroutine function, each run in a task of its own."""

    def __init__(self, function: Callable[..., Any], abandoned: Abandoned, name: str | None = None) -> None:
        self._function = function
        self._abandoned = abandoned
        self._name = name or name_of(function)

    async def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any], limit: float | None) -> Any:
        loop = asyncio.get_running_loop()
        run = loop.create_task(self._contained(arguments, keywords))
        overdue = False

        def stop() -> None:
            nonlocal overdue
            overdue = True
            waiter.cancel()

        # Not the task itself is awaited: our cancellation must not count as its own.
        waiter: asyncio.Future[None] = loop.create_future()
        run.add_done_callback(lambda run: _done(waiter))
        timer = None if limit is None else loop.call_later(limit, stop)
        try:
            await waiter
        except asyncio.CancelledError:
            await self._stop(run)
            if not overdue:
                raise
            raise_if_cancelled()
            assert limit is not None
            raise Overrun(limit) from None
        finally:
            if timer is not None:
                timer.cancel()
        if run.cancelled():
            raise RuntimeError("the function cancelled itself")
        error = run.exception()
        if error is not None:
            raise presentable(error)
        return run.result()

    async def close(self) -> None:
        """There is nothing to close."""

    async def _contained(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """A run, without what would end the loop along with its task."""
        try:
            return await self._function(*arguments, **keywords)
        except (SystemExit, KeyboardInterrupt) as error:
            raise presentable(error) from error

    async def _stop(self, run: asyncio.Task[Any]) -> None:
        """Cancel a run until it has ended, or is left behind."""
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        while not run.done() and loop.time() < until:
            run.cancel()
            await for_certain(run, AGAIN)
        if not run.done():
            self._abandoned.add(self._name)
            run.add_done_callback(self._came_back)
        elif not run.cancelled():
            run.exception()  # it is of no interest any more

    def _came_back(self, run: asyncio.Task[Any]) -> None:
        self._abandoned.discard(self._name)
        if not run.cancelled():
            run.exception()


def _done(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
