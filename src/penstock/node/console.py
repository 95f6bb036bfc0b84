"""The console of a live node: Python that is typed in, run among the names of scripts in the node's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import Context, copy_context
from types import CodeType
from typing import Any, NoReturn

import penstock
from penstock.control.console import (
    MOST_INPUT,
    Asked,
    Hello,
    Interrupt,
    Left,
    Line,
    Outcome,
    Problem,
    Prompt,
    Run,
    Told,
)
from penstock.control.masking import line
from penstock.errors import BrokerUnavailable, PenstockError
from penstock.node.debug import DebugSwitch, Subscribe
from penstock.node.inputs import Inputs, told_of, whole
from penstock.node.names import Names
from penstock.node.printed import Screen, current_screen, divide, divided

log = logging.getLogger("penstock.console")

NAME = "console"
"""Of the script that an input is to `logger`."""
MOST_SESSIONS = 16
SHORT = 200  # characters of an input in the log
RECORD_WITHIN = 2.0  # seconds that a session waits for its record
AGAIN = 0.05  # seconds between cancellations of an input that swallows them
PATIENCE = 2.0  # seconds until it is left behind
MOST_AHEAD = 1000  # messages that are sent and not looked at yet

NORMAL, GOING_AWAY, NOT_ALLOWED, TOO_BIG = 1000, 1001, 1008, 1009
"""How a WebSocket is closed."""
ENDED = "cancelled: the session ended"
"""What came of an input that nobody waits for any more."""

Record = Callable[[str, str], Coroutine[Any, Any, None]]
"""Writes down an input: its text, and what came of it."""
May = Callable[[], bool]
"""Whether whoever opened a session still may have it."""


class TooManySessions(PenstockError):
    """There are as many consoles open as a node has."""


class Leave(BaseException):
    """An input ends its session. Not a `SystemExit`: in a task of its own that would end the node."""

    def __init__(self, code: object = None) -> None:
        self.code = code
        super().__init__(code)


class Console:
    """Hands out sessions. For one event loop; it is made where the app's context is."""

    def __init__(self, names: Names, node: str, subscribe: Subscribe) -> None:
        self._names = names
        self._node = node
        self._subscribe = subscribe
        self._context = copy_context()
        self._sessions: set[Session] = set()
        self._gone = asyncio.Event()
        self._closed = False

    @contextlib.asynccontextmanager
    async def session(self, who: str, record: Record, may: May = lambda: True) -> AsyncIterator[Session]:
        """One more session, with names and variables of its own, until the end of the block.

        It looks whether it still `may` before each input, and whenever it is told to `look`.

        :raises TooManySessions: it has to wait until another one ends.
        :raises BrokerUnavailable: the node is stopping.
        """
        if self._closed:
            raise BrokerUnavailable("the node is stopping")
        if len(self._sessions) >= MOST_SESSIONS:
            raise TooManySessions(f"{MOST_SESSIONS} consoles are open already: a node has no more")
        session = Session(self._node, who, record, may, self._subscribe, self._context.copy())
        self._sessions.add(session)
        self._gone.clear()
        try:
            with contextlib.suppress(ImportError):
                await asyncio.to_thread(importlib.import_module, "aiohttp")  # it takes its time
            with divided():
                session.begin(self._names.given(NAME, "aiohttp"))
                try:
                    yield session
                finally:
                    await session.end()
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._gone.set()

    async def close(self) -> None:
        """End all sessions: what runs in them is cancelled. Idempotent."""
        self._closed = True
        for session in self._sessions:
            session.close(GOING_AWAY, "the node is stopping")
        if self._sessions:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE * 2):
                    await self._gone.wait()


class Session:
    """One shell: what it asks is carried out in turn, what comes of it is told in order."""

    def __init__(self, node: str, who: str, record: Record, may: May, subscribe: Subscribe, context: Context) -> None:
        self.closing: tuple[int, str] = (NORMAL, "")
        """Code and reason with which its WebSocket is closed."""
        self._who = who
        self._record = record
        self._may = may
        self._context = context
        self._screen = Screen()
        self._debug = DebugSwitch(self._screen, subscribe)
        self._inputs = Inputs()
        self._asked: deque[Asked | None] = deque()
        self._ahead = 0
        self._unwritten: tuple[str, str] | None = None
        """An input that has begun, and what came of it should the session end now."""
        self._some = asyncio.Event()
        self._living: asyncio.Task[None] | None = None
        self._running: asyncio.Task[BaseException | None] | None = None
        self._interrupted = False
        self._records: set[asyncio.Task[None]] = set()
        self._hello = Hello(node, penstock.__version__)

    def begin(self, names: dict[str, Any]) -> None:
        """Take inputs, which see these names."""
        names |= {"debug": self._debug, "exit": _leave, "quit": _leave}
        self._screen.names = names
        self._context.run(current_screen.set, self._screen)
        self._screen.tell(self._hello, Prompt())
        self._living = asyncio.create_task(self._live(), name="penstock-console", context=self._context)

    def hear(self, asked: Asked) -> None:
        """Something the shell asks. Nothing is waited for."""
        if self.closing != (NORMAL, ""):
            return
        if isinstance(asked, Interrupt):
            self._interrupt()
            return
        self._ahead += _length(asked)
        self._asked.append(asked)
        if self._ahead > MOST_INPUT or len(self._asked) > MOST_AHEAD:
            self.close(TOO_BIG, "more was sent ahead than is kept")
        self._some.set()

    def look(self) -> bool:
        """Whether it goes on; it ends if it may not."""
        if self.closing == (NORMAL, "") and not self._may():
            self.close(NOT_ALLOWED, "the session is over: sign in again")
        return self.closing == (NORMAL, "")

    async def told(self) -> Told | None:
        """What the shell is told next; None: the session is over."""
        return await self._screen.take()

    def close(self, code: int, reason: str) -> None:
        """Have it end."""
        self.closing = (code, reason)
        for task in (self._living, self._running):
            if task is not None:
                task.cancel()
        self._screen.end()

    async def end(self) -> None:
        """Cancel what runs, and wait until it has ended. What was begun as a task of its own goes on."""
        self._screen.end()
        try:
            if self._living is not None:
                self._living.cancel()
                await asyncio.wait((self._living,))
            if self._running is not None:
                await _stop(self._running, self._who)
        finally:
            if self._unwritten is not None:
                self._write_down(*self._unwritten)
        await self._debug.close()
        if self._records:
            await asyncio.wait(self._records, timeout=RECORD_WITHIN)
        self._screen.drop()

    # -- what it asks

    async def _live(self) -> None:
        while True:
            while not self._asked:
                self._some.clear()
                await self._some.wait()
            asked = self._asked.popleft()
            if asked is None:
                self._screen.tell(Prompt(outcome="interrupted"))
                continue
            if not self.look():
                return
            self._ahead -= _length(asked)
            left, outcome = await self._take(asked)
            if left is not None:
                self._screen.tell(left)
                self._screen.end()
                return
            self._screen.tell(Prompt(self._inputs.more, outcome))
            await self._screen.drained()

    async def _take(self, asked: Asked) -> tuple[Left | None, Outcome]:
        """Carry out what is asked: whether the session is over, and what came of the input that it completed."""
        try:
            code = self._code(asked)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            return await self._came_to(_text(asked, self._inputs), error)
        if code is None:
            return None, "none"
        text = _text(asked, self._inputs)
        log.info("%s runs: %s", self._who, line(text, SHORT))  # first: it may end the process
        self._unwritten, self._interrupted = (text, ENDED), False
        divide()
        self._running = asyncio.create_task(self._run(code), name="penstock-console input", context=self._context)
        await asyncio.wait((self._running,))
        running, self._running = self._running, None
        return await self._came_to(text, asyncio.CancelledError() if running.cancelled() else running.result())

    def _code(self, asked: Asked) -> CodeType | None:
        """:raises SyntaxError, ValueError, OverflowError, MemoryError, RecursionError: as `Inputs.add`."""
        if isinstance(asked, Line):
            return self._inputs.add(asked.text)
        if isinstance(asked, Run):
            self._inputs.drop()
            return whole(asked.code)
        return self._inputs.end()

    async def _run(self, code: CodeType) -> BaseException | None:
        """What it raised. Nothing comes through: some of that would end the loop along with its task."""
        try:
            made = eval(code, self._screen.names)  # noqa: S307 - that is what a console is for
            if inspect.iscoroutine(made):
                await made
            await self._debug.settled()
        except BaseException as error:
            return error
        return None

    async def _came_to(self, text: str, error: BaseException | None) -> tuple[Left | None, Outcome]:
        """Tell, and write down, what came of an input."""
        left: Left | None = None
        outcome: Outcome = "ok"
        came = ""
        if isinstance(error, Leave | SystemExit):
            left = self._left(error.code)
        elif isinstance(error, asyncio.CancelledError) and self._interrupted:
            outcome = "interrupted"
            self._screen.tell(Problem("KeyboardInterrupt\n"))
        elif error is not None:
            outcome = "failed"
            self._unwritten = text, f"{type(error).__name__}: the session ended before it was told"
            problem, came = await asyncio.to_thread(told_of, error)
            self._screen.tell(Problem(problem))
        await asyncio.wait((self._write_down(text, came or outcome),), timeout=RECORD_WITHIN)
        return left, outcome

    def _left(self, code: object) -> Left:
        if code is None or isinstance(code, int):
            return Left(int(code or 0) & 0xFF)
        self._screen.tell(Problem(f"{code}\n"))
        return Left(1)

    def _write_down(self, text: str, outcome: str) -> asyncio.Task[None]:
        """To wait for, so that it is in turn; but not for long, if the store is away."""
        self._unwritten = None
        record = asyncio.create_task(self._record(text, outcome), name="penstock-console record")
        self._records.add(record)
        record.add_done_callback(self._records.discard)
        return record

    def _interrupt(self) -> None:
        self._asked = deque([None] * len(self._asked))  # each is answered
        self._ahead = 0
        self._inputs.drop()
        if self._running is not None:
            self._interrupted = True
            self._running.cancel()


async def _stop(running: asyncio.Task[Any], who: str) -> None:
    """Cancel an input until it has ended, or is left behind."""
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE
    while not running.done() and loop.time() < until:
        running.cancel()
        await asyncio.wait((running,), timeout=AGAIN)
    if not running.done():
        log.warning("an input of %s does not end though it was cancelled: it is left behind", who)


def _leave(code: object = None) -> NoReturn:
    """End this session; the node goes on."""
    raise Leave(code)


def _text(asked: Asked, inputs: Inputs) -> str:
    """Of the input that it has completed, or that is none."""
    return asked.code if isinstance(asked, Run) else inputs.last


def _length(asked: Asked) -> int:
    if isinstance(asked, Line):
        return len(asked.text)
    return len(asked.code) if isinstance(asked, Run) else 0
