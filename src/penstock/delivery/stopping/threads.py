"""Plain functions, in threads: stopped by an exception that is put into their thread.

`SystemExit` reaches Python code at its next instruction; it does not reach code that sits in C, such as
`time.sleep`. A thread that does not come back is left behind and another one takes its place.
A coroutine function gets an event loop of its own there, and is cancelled first.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import inspect
import itertools
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from penstock.delivery.execution import is_async
from penstock.delivery.stopping.base import Abandoned, Overrun, for_certain, presentable, raise_if_cancelled
from penstock.delivery.stopping.loop import AGAIN, LoopRunner
from penstock.delivery.stopping.own_loop import OwnLoop

CLEANUP = 1.0
"""Seconds that a function has to end after it was stopped; then it is stopped once more, and has them again."""

_numbers = itertools.count(1)


class _Run:
    """One run, from its start in a thread to its end in the event loop."""

    def __init__(self, call: Callable[[], Any], own_loop: OwnLoop | None) -> None:
        self.call = call
        self.own_loop = own_loop
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None
        self.left_behind = False


class _Thread:
    """A thread that carries out runs, one after another, until it is told to end or is left behind."""

    def __init__(self, name: str, came_back: Callable[[], None]) -> None:
        self._name = name
        self._came_back = came_back
        self._runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._guard = threading.Lock()  # over `_current`, and so over whom a `SystemExit` would hit
        self._current: _Run | None = None
        self._thread = threading.Thread(target=self._serve, name=f"penstock-{name}-{next(_numbers)}")
        self._thread.start()

    def begin(self, run: _Run | None) -> None:
        """Carry out a run; None: end."""
        self._runs.put(run)

    def interrupt(self, run: _Run) -> None:
        """Raise `SystemExit` in a run, if it is under way."""
        with self._guard:
            if self._current is run and self._thread.ident is not None:
                _raise_in(self._thread.ident, SystemExit)

    def leave(self, run: _Run) -> bool:
        """Count on a run no more; False: it has just ended."""
        with self._guard:
            run.left_behind = self._current is run
            return run.left_behind

    def _serve(self) -> None:
        while True:
            run = self._runs.get()
            if run is None:
                return
            if self._carry_out(run):
                return

    def _carry_out(self, run: _Run) -> bool:
        """Whether it was left behind meanwhile."""
        with self._guard:
            self._current = run
        # From here on a SystemExit may come at any instruction, until nothing is current any more.
        try:
            try:
                run.result = run.call()
            except BaseException as error:
                run.error = error
        except BaseException as error:  # it came between the two lines above
            run.error = error
        while True:
            try:
                with self._guard:
                    self._current = None
                    _raise_in(threading.get_ident(), None)  # one that was on its way
                break
            except SystemExit:
                continue
        # Nothing can be raised in here any more.
        if run.left_behind:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                run.loop.call_soon_threadsafe(self._came_back)
            return True
        with contextlib.suppress(RuntimeError):
            run.loop.call_soon_threadsafe(_set, run.ended)
        return False


def _set(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Have a thread raise something at its next instruction; None: take back what it has not raised yet."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


class ThreadRunner:
    """Runs a function in threads, at most `slots` at once; more wait their turn. What can be awaited of what
    a plain function returns is awaited in the event loop, within the same limit and slot."""

    def __init__(self, function: Callable[..., Any], slots: int, name: str, abandoned: Abandoned) -> None:
        self._function = function
        self._name = name
        self._abandoned = abandoned
        self._slots = asyncio.Semaphore(slots)
        self._idle: list[_Thread] = []
        self._closed = False
        self._is_async = is_async(function)
        self._awaiting = LoopRunner(_awaited, abandoned, name)

    async def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any], limit: float | None) -> Any:
        async with self._slots:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            result = await self._in_thread(arguments, keywords, limit)
            if not inspect.isawaitable(result):
                return result
            left = None if limit is None else max(begun + limit - loop.time(), 0.0)
            try:
                return await self._awaiting.run((result,), {}, left)
            except Overrun:
                assert limit is not None
                raise Overrun(limit) from None

    async def close(self) -> None:
        self._closed = True
        for thread in self._idle:
            thread.begin(None)
        self._idle.clear()

    async def _in_thread(self, arguments: tuple[Any, ...], keywords: dict[str, Any], limit: float | None) -> Any:
        run = self._prepare(arguments, keywords)
        thread = self._idle.pop() if self._idle else _Thread(self._name, self._came_back)
        thread.begin(run)
        try:
            await self._ended(thread, run, limit)
        finally:
            if not run.left_behind:
                self._put_back(thread)
        if run.error is not None:
            raise presentable(run.error)
        return run.result

    def _prepare(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Run:
        call = functools.partial(self._function, *arguments, **keywords)
        context = contextvars.copy_context()
        own_loop = OwnLoop(call) if self._is_async else None
        return _Run(functools.partial(context.run, own_loop or call), own_loop)

    async def _ended(self, thread: _Thread, run: _Run, limit: float | None) -> None:
        """Until the run has ended by itself.

        :raises Overrun: it had to be stopped.
        """
        try:
            done, _ = await asyncio.wait([run.ended], timeout=limit)
        except asyncio.CancelledError:
            await self._stop(thread, run)
            raise
        if not done:
            assert limit is not None
            await self._stop(thread, run)
            raise_if_cancelled()
            raise Overrun(limit)

    async def _stop(self, thread: _Thread, run: _Run) -> None:
        if run.own_loop is not None:
            await self._cancel(run, run.own_loop)
        for _ in range(2):
            if run.ended.done():
                return
            thread.interrupt(run)
            if run.own_loop is not None:
                run.own_loop.cancel()  # that wakes it, to meet its SystemExit
            await for_certain(run.ended, CLEANUP)
        if run.ended.done():
            return
        if thread.leave(run):
            self._abandoned.add(self._name)

    async def _cancel(self, run: _Run, own_loop: OwnLoop) -> None:
        """Cancel a run until it has ended, or `CLEANUP` is over."""
        until = run.loop.time() + CLEANUP
        while not run.ended.done() and run.loop.time() < until:
            own_loop.cancel()
            await for_certain(run.ended, AGAIN)

    def _put_back(self, thread: _Thread) -> None:
        if self._closed:
            thread.begin(None)
        else:
            self._idle.append(thread)

    def _came_back(self) -> None:
        self._abandoned.discard(self._name)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value
