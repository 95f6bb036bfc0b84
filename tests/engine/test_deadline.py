"""A deadline is kept, whatever the work waits for, and whatever it makes of being cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from penstock.waiting import Deadline


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_work_that_ends_in_time_is_not_disturbed() -> None:
    deadline, done = Deadline(), []

    async def work() -> None:
        await asyncio.sleep(0.01)
        done.append("all")

    deadline.within(5)
    assert await deadline.allow(work())
    assert done == ["all"]


async def test_what_work_raises_in_time_is_raised() -> None:
    async def work() -> None:
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        await Deadline().allow(work())


async def test_each_of_several_waits_is_cut_short_in_its_turn() -> None:
    deadline, begun = Deadline(), []

    async def work() -> None:
        try:
            begun.append("first")
            await for_ever()
        finally:
            try:
                begun.append("second")
                await for_ever()
            finally:
                begun.append("third")
                await for_ever()

    deadline.within(0.05)
    began = time.monotonic()
    assert not await deadline.allow(work())
    assert begun == ["first", "second", "third"]
    assert time.monotonic() - began < 2


async def test_it_comes_nearer_for_what_is_under_way() -> None:
    deadline = Deadline()
    deadline.within(60)
    asyncio.get_running_loop().call_later(0.05, deadline.within, 0.0)
    async with asyncio.timeout(5):
        assert not await deadline.allow(for_ever())
    deadline.within(60)
    assert deadline.left <= 0, "it goes away no more"


async def test_it_comes_nearer_for_a_block_under_way() -> None:
    deadline = Deadline()
    deadline.within(60)
    asyncio.get_running_loop().call_later(0.05, deadline.within, 0.0)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with deadline.limit():
            await for_ever()
    assert time.monotonic() - began < 5


async def test_after_it_work_is_begun_still() -> None:
    deadline, said = Deadline(), []

    async def work() -> None:
        said.append("goodbye")
        await for_ever()

    deadline.within(0)
    assert not await deadline.allow(work())
    assert said == ["goodbye"]


async def test_work_that_swallows_its_cancellations_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.waiting.MOMENT", 0.01)
    deadline, let_go = Deadline(), asyncio.Event()

    async def work() -> None:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    deadline.within(0.01)
    async with asyncio.timeout(5):
        assert not await deadline.allow(work())
    let_go.set()
