"""`Timeit`: how long things took, told once, by the outermost."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Callback = Callable[..., Any]


class Timeit:
    """A timer of named transactions, as context manager or decorator.

    The outermost calls `callback(transactions=…, exc_type=…, exc_val=…, exc_tb=…)` once when it ends;
    `transactions` maps names to seconds, inner names first. An exception passes on. The callback may
    be plain or async.

        async with Timeit(name="a", callback=report) as t:
            async with t(name="b"):
                ...

    As a decorator every call is timed on its own, so concurrent calls do not mix.
    """

    def __init__(self, name: str, callback: Callback | None = None) -> None:
        self.name = name
        self.callback = callback
        self.transactions: dict[str, float] = {}
        self._root: Timeit = self
        self._started = 0.0

    def __call__(self, function: Any = None, /, *, name: str | None = None) -> Any:
        """With `name=`: a transaction inside this one. With a coroutine function: that function, timed."""
        if function is not None:
            return self._decorate(function)
        if name is None:
            raise TypeError("a nested transaction needs a name: async with t(name=…)")
        inner = Timeit(name)
        inner._root = self._root
        return inner

    async def __aenter__(self) -> Self:
        if self._root is self:
            self.transactions = {}
        self._started = time.perf_counter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self._root.transactions[self.name] = time.perf_counter() - self._started
        if self._root is self and self.callback is not None:
            told = self.callback(transactions=self.transactions, exc_type=exc_type, exc_val=exc_val, exc_tb=exc_tb)
            if asyncio.iscoroutine(told):
                await told

    def _decorate(self, function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        if not asyncio.iscoroutinefunction(function):
            raise TypeError(f"Timeit decorates coroutine functions, and {function!r} is not one")

        @functools.wraps(function)
        async def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            async with Timeit(self.name, self.callback):
                return await function(*args, **kwargs)

        return timed
