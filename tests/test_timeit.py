"""`Timeit`: told once, by the outermost, whatever happens inside."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from penstock import Timeit


async def test_the_callback_is_called_once_with_inner_names_first() -> None:
    told: list[Any] = []

    async def callback(**about: Any) -> None:
        told.append(about)

    async with Timeit(name="a", callback=callback) as t, t(name="b"), t(name="c"):
        await asyncio.sleep(0.01)
    (about,) = told
    assert list(about["transactions"]) == ["c", "b", "a"]
    assert 0.01 <= about["transactions"]["c"] <= about["transactions"]["b"] <= about["transactions"]["a"]
    assert (about["exc_type"], about["exc_val"], about["exc_tb"]) == (None, None, None)


async def test_an_exception_is_told_and_passes_on() -> None:
    told: list[Any] = []
    with pytest.raises(KeyError, match="error"):
        async with Timeit(name="a", callback=lambda **about: told.append(about)):
            raise KeyError("error")
    assert told[0]["exc_type"] is KeyError
    assert isinstance(told[0]["exc_val"], KeyError)
    assert told[0]["exc_tb"] is not None


async def test_decorated_calls_at_once_do_not_mix_and_the_signature_is_kept() -> None:
    told: list[dict[str, float]] = []

    def callback(transactions: dict[str, float], **rest: Any) -> None:
        told.append(transactions)

    @Timeit(name="work", callback=callback)
    async def work(n: int, *, pause: float = 0.0) -> int:
        """Its docstring."""
        await asyncio.sleep(pause)
        return n

    assert await asyncio.gather(*(work(n, pause=0.02 * n) for n in range(3))) == [0, 1, 2]
    assert len(told) == 3
    assert all(set(transactions) == {"work"} for transactions in told)
    assert told[0]["work"] < told[1]["work"] < told[2]["work"]
    assert list(inspect.signature(work).parameters) == ["n", "pause"]
    assert work.__doc__ == "Its docstring."


async def test_an_instance_can_be_used_again() -> None:
    told: list[Any] = []
    timer = Timeit(name="a", callback=lambda **about: told.append(dict(about["transactions"])))
    for _ in range(2):
        async with timer as t, t(name="b"):
            pass
    assert [list(transactions) for transactions in told] == [["b", "a"], ["b", "a"]]


def test_only_coroutine_functions_can_be_decorated() -> None:
    with pytest.raises(TypeError, match="coroutine functions"):
        Timeit(name="a")(len)
    with pytest.raises(TypeError, match="needs a name"):
        Timeit(name="a")()
