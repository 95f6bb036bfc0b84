"""Running a handler: in the event loop, or a plain function in a thread."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from penstock.delivery.arguments import function_of


class Executor:
    """Calls one handler. Threads, where it needs them, are as many as its concurrency."""

    def __init__(self, handler: Callable[..., Any], concurrency: int, name: str) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._handler = handler
        self.call: Callable[[Any], Awaitable[Any]]
        """Runs the handler to its end; what it raises comes out here."""
        if is_async(handler):
            self.call = handler
        else:
            self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix=f"penstock-{name}")
            self.call = self._in_thread

    async def _in_thread(self, argument: Any) -> Any:
        surroundings = contextvars.copy_context()
        call = functools.partial(surroundings.run, _call, self._handler, argument)
        result = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if inspect.isawaitable(result):
            return await result
        return result

    def close(self) -> None:
        """Take no more calls. A call that is stuck in its thread stays there."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _call(handler: Callable[..., Any], argument: Any) -> Any:
    try:
        return handler(argument)
    except StopIteration as error:  # no future may hold one: its waiter would wait for ever
        raise RuntimeError("the handler raised StopIteration") from error


def is_async(handler: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function_of(handler))
