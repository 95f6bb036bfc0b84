"""Several calls at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self


class Parallel:
    """`async with app.parallel() as calls:` — each `calls.call(…)` begins at once, the block ends when all have
    ended. Then `results` has them in order, and errors as values."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._under_way: list[asyncio.Future[Any]] = []
        self._results: list[Any] | None = None

    def call(self, name: str, data: Any = None, **options: Any) -> None:
        """`Client.call`, without waiting for it."""
        self._under_way.append(asyncio.ensure_future(self._call(name, data, **options)))

    @property
    def results(self) -> list[Any]:
        """What each call gave, in their order; an exception where one failed.

        :raises RuntimeError: inside the block.
        """
        if self._results is None:
            raise RuntimeError("the calls have not ended yet: look at their results after the block")
        return self._results

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._cancel()
        try:
            self._results = await asyncio.gather(*self._under_way, return_exceptions=True)
        except asyncio.CancelledError:
            self._cancel()
            raise

    def _cancel(self) -> None:
        for one in self._under_way:
            one.cancel()


class SyncParallel:
    """The blocking twin: the calls go out together at the end of the block."""

    def __init__(self, carry_out: Callable[[list[tuple[Any, Any, dict[str, Any]]]], list[Any]]) -> None:
        self._carry_out = carry_out
        self._asked: list[tuple[Any, Any, dict[str, Any]]] = []
        self._results: list[Any] | None = None

    def call(self, name: str, data: Any = None, **options: Any) -> None:
        """`SyncClient.call`, at the end of the block."""
        self._asked.append((name, data, options))

    @property
    def results(self) -> list[Any]:
        """As `Parallel.results`.

        :raises RuntimeError: inside the block.
        """
        if self._results is None:
            raise RuntimeError("the calls have not ended yet: look at their results after the block")
        return self._results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._results = self._carry_out(self._asked)
