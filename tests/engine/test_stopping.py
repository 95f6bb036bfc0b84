"""Whatever a run does in the loop or in a thread, it is stopped at its limit, and the next one is served."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from penstock.delivery.stopping import Abandoned, LoopRunner, Overrun, ThreadRunner
from tests.helpers import eventually

pytestmark = pytest.mark.blocks


@pytest.fixture
def abandoned() -> Abandoned:
    return Abandoned(1, lambda name: None)


@pytest.fixture
async def in_thread(abandoned: Abandoned) -> AsyncIterator[Callable[..., ThreadRunner]]:
    runners: list[ThreadRunner] = []

    def make(function: Callable[..., Any], slots: int = 1) -> ThreadRunner:
        runners.append(ThreadRunner(function, slots, "test", abandoned))
        return runners[-1]

    yield make
    for runner in runners:
        await runner.close()


# -- in the event loop


async def test_a_coroutine_is_cancelled_at_its_limit(abandoned: Abandoned) -> None:
    ended: list[str] = []

    async def wait(forever: bool) -> str:
        try:
            if forever:
                await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")
        return "done"

    runner = LoopRunner(wait, abandoned)
    with pytest.raises(Overrun) as caught:
        await runner.run((True,), {}, 0.05)
    assert caught.value.limit == 0.05
    assert ended == ["cleaned up"]
    assert await runner.run((False,), {}, 0.05) == "done"


async def test_a_coroutine_that_swallows_its_cancellation_is_left_behind() -> None:
    told: list[str] = []
    release = asyncio.Event()
    abandoned = Abandoned(0, told.append)

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await asyncio.wait_for(release.wait(), 60)
            except asyncio.CancelledError:
                continue

    runner = LoopRunner(stubborn, abandoned)
    for _ in range(2):
        with pytest.raises(Overrun):
            await runner.run((), {}, 0.05)
    assert abandoned.count == 2
    assert len(told) == 1
    release.set()
    await eventually(lambda: abandoned.count == 0)


async def test_a_coroutine_that_cancels_itself_has_failed(abandoned: Abandoned) -> None:
    async def odd() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="cancelled itself"):
        await LoopRunner(odd, abandoned).run((), {}, None)


async def test_an_exception_of_a_coroutine_comes_out(abandoned: Abandoned) -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def leave() -> None:
        raise StopAsyncIteration

    with pytest.raises(KeyError):
        await LoopRunner(fail, abandoned).run((), {}, 1)
    with pytest.raises(RuntimeError, match="StopAsyncIteration"):
        await LoopRunner(leave, abandoned).run((), {}, 1)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_a_coroutine_ends_no_loop(abandoned: Abandoned, error: BaseException) -> None:
    async def leave() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(RuntimeError, match="the function raised") as caught:
        await LoopRunner(leave, abandoned).run((), {}, 1)
    assert caught.value.__cause__ is error


# -- in threads


async def test_an_endless_loop_in_a_thread_is_stopped(in_thread: Callable[..., ThreadRunner]) -> None:
    ended: list[str] = []

    def spin(forever: bool) -> str:
        try:
            while forever:
                pass
        except SystemExit:
            ended.append("cleaned up")
            return "of no interest"
        return "done"

    runner = in_thread(spin)
    for _ in range(3):
        with pytest.raises(Overrun):
            await runner.run((True,), {}, 0.05)
        assert await runner.run((False,), {}, 5) == "done"
    assert ended == ["cleaned up"] * 3
    assert sum(thread.name.startswith("penstock-test-") for thread in threading.enumerate()) == 1


async def test_a_thread_that_sits_in_c_is_left_behind_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.delivery.stopping.threads.CLEANUP", 0.05)
    told: list[str] = []
    abandoned = Abandoned(1, told.append)
    release, blocked = socket.socketpair()

    def work(stuck: bool) -> str:
        if stuck:
            blocked.recv(1)
        return "done"

    runner = ThreadRunner(work, 1, "test", abandoned)
    for stuck in (1, 2, 3):
        with pytest.raises(Overrun):
            await runner.run((True,), {}, 0.05)
        assert abandoned.count == stuck
        assert await runner.run((False,), {}, 5) == "done"
    assert told == ["test"]  # once, when more than one was stuck
    release.close()
    await eventually(lambda: abandoned.count == 0)
    await runner.close()
    blocked.close()


async def test_a_function_that_swallows_every_stop_is_left_behind(
    in_thread: Callable[..., ThreadRunner], abandoned: Abandoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.delivery.stopping.threads.CLEANUP", 0.05)
    over = threading.Event()

    def stubborn() -> None:
        while not over.is_set():
            try:
                while not over.is_set():
                    pass
            except SystemExit:
                continue

    runner = in_thread(stubborn)
    with pytest.raises(Overrun):
        await runner.run((), {}, 0.05)
    assert abandoned.count == 1
    over.set()
    await eventually(lambda: abandoned.count == 0)


async def test_a_stop_never_hits_the_next_run(in_thread: Callable[..., ThreadRunner]) -> None:
    """Runs that end before, at and after their stop, which comes when the busy thread lets the loop have its turn."""
    served: list[int] = []

    def just(seconds: float) -> str:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        return "done"

    def count(n: int) -> int:
        for each in range(200):
            served.append(each + n)  # noqa: PERF401 - many instructions that a stop could hit
        return n

    def either(what: str, value: float) -> Any:
        return just(value) if what == "just" else count(int(value))

    runner = in_thread(either)
    overruns = 0
    for n in range(600):
        try:
            assert await runner.run(("just", 0.0005 * (n % 24)), {}, 0.002) == "done"
        except Overrun:
            overruns += 1
        assert await runner.run(("count", n), {}, None) == n
    assert overruns > 0
    assert len(served) == 600 * 200


async def test_cancelling_stops_the_thread_too(in_thread: Callable[..., ThreadRunner]) -> None:
    ended = threading.Event()

    def spin() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    runner = in_thread(spin)
    running = asyncio.create_task(runner.run((), {}, None))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()


async def test_what_would_end_a_thread_comes_out_as_a_failure(in_thread: Callable[..., ThreadRunner]) -> None:
    def leave(how: str) -> str:
        if how == "exit":
            sys.exit(3)
        if how == "stop":
            raise StopIteration
        if how == "interrupt":
            raise KeyboardInterrupt
        return how

    runner = in_thread(leave)
    for how in ("exit", "stop", "interrupt"):
        with pytest.raises(RuntimeError, match="the function raised"):
            await runner.run((how,), {}, None)
    assert await runner.run(("stay",), {}, None) == "stay"


async def test_a_thread_sees_its_context_and_may_return_an_awaitable(in_thread: Callable[..., ThreadRunner]) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")

    async def later() -> str:
        return variable.get() + " later"

    def start() -> Any:
        assert variable.get() == "seen"
        return later()

    assert await in_thread(start).run((), {}, 5) == "seen later"


async def test_no_more_threads_than_slots(in_thread: Callable[..., ThreadRunner]) -> None:
    lock = threading.Lock()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    runner = in_thread(work, 3)
    await asyncio.gather(*(runner.run((), {}, None) for _ in range(20)))
    assert most == 3


async def test_an_awaitable_from_a_thread_is_stopped_at_the_limit_of_both(
    in_thread: Callable[..., ThreadRunner],
) -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    async def leave() -> None:
        sys.exit(3)

    @functools.wraps(wait)
    def wrapped(forever: bool) -> Any:
        time.sleep(0.05)
        return wait() if forever else leave()

    runner = in_thread(wrapped)
    with pytest.raises(Overrun) as caught:
        await asyncio.wait_for(runner.run((True,), {}, 0.2), 10)
    assert caught.value.limit == 0.2
    assert ended == ["cleaned up"]
    with pytest.raises(RuntimeError, match="the function raised SystemExit"):
        await runner.run((False,), {}, 5)


async def test_an_awaitable_from_a_thread_keeps_its_slot(in_thread: Callable[..., ThreadRunner]) -> None:
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    runner = in_thread(lambda: work(), 2)
    await asyncio.gather(*(runner.run((), {}, None) for _ in range(10)))
    assert most == 2


async def test_a_coroutine_in_a_thread_is_cancelled(
    in_thread: Callable[..., ThreadRunner], abandoned: Abandoned
) -> None:
    ended: list[BaseException] = []

    async def wait(forever: bool) -> int:
        try:
            if forever:
                await asyncio.sleep(30)
        except BaseException as error:
            ended.append(error)
            raise
        return threading.get_ident()

    runner = in_thread(wait)
    first = await runner.run((False,), {}, 5)
    assert first != threading.get_ident()
    for _ in range(2):
        with pytest.raises(Overrun):
            await runner.run((True,), {}, 0.1)
        assert await runner.run((False,), {}, 5) == first
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 2
    assert abandoned.count == 0


async def test_a_coroutine_in_a_thread_that_swallows_its_cancellation_meets_a_system_exit(
    in_thread: Callable[..., ThreadRunner], abandoned: Abandoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.delivery.stopping.threads.CLEANUP", 0.5)
    cancelled: list[int] = []

    async def stubborn(forever: bool) -> str:
        while forever:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(1)
        return "done"

    runner = in_thread(stubborn)
    with pytest.raises(Overrun):
        await runner.run((True,), {}, 0.1)
    assert cancelled
    assert abandoned.count == 0
    assert await runner.run((False,), {}, 5) == "done"


async def test_a_coroutine_in_a_thread_that_sits_in_c_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.delivery.stopping.threads.CLEANUP", 0.05)
    abandoned = Abandoned(1, lambda name: None)
    release, blocked = socket.socketpair()

    async def work(stuck: bool) -> str:
        if stuck:
            blocked.recv(1)
        return "done"

    runner = ThreadRunner(work, 1, "test", abandoned)
    with pytest.raises(Overrun):
        await runner.run((True,), {}, 0.05)
    assert abandoned.count == 1
    assert await runner.run((False,), {}, 5) == "done"
    release.close()
    await eventually(lambda: abandoned.count == 0)
    await runner.close()
    blocked.close()
