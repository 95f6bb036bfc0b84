"""What the inputs of a console print: it goes to the shell that ran them, and waits there within bounds."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from penstock.control.console import Output, Shown, Told
from penstock.errors import printable

MOST_HELD = 2 * 2**20
"""Characters that wait for a shell which is slow to take them; what is beyond them is left out, with a mark.

Whoever prints cannot be made to wait: `print` is no coroutine, and to hold up the loop is to hold up the node."""
CHUNK = 32 * 2**10  # characters of a message

current_screen: ContextVar[Screen | None] = ContextVar("penstock_console_screen", default=None)


class Silent:
    """What is not echoed."""


class Screen:
    """What one shell is told, in order. Any thread may write; one task takes. For one event loop.

    Writing is also for `__del__`, which may be called in the middle of anything here: in the thread that has the lock.
    """

    def __init__(self, most: int = MOST_HELD) -> None:
        self.names: dict[str, Any] = {}
        """Of the inputs: `_` is the last value that was echoed."""
        self._most = most
        self._messages: deque[Told] = deque()
        self._text = io.StringIO()
        self._size = 0
        self._left_out = 0
        self._ended = False
        self._waiting = False
        self._lock = threading.RLock()
        self._loop = asyncio.get_running_loop()
        self._some, self._none = asyncio.Event(), asyncio.Event()
        self._none.set()

    def write(self, text: str) -> None:
        """Print something."""
        if not text.isascii():
            text = printable(text)
        with self._lock:
            room = self._room()
            self._add_text(text[:room])
            if len(text) > room:
                self._left_out += len(text) - room
            self._wake()

    def show(self, value: Any) -> None:
        """Echo what an expression came to, as `sys.displayhook`."""
        if value is not None and not isinstance(value, Silent):
            self.write(f"{value!r}\n")
            self.names["_"] = value

    def offer(self, message: Shown) -> None:
        """A message that may be left out."""
        size = _size(message)
        with self._lock:
            if self._room() < size:
                self._left_out += size
            else:
                self._put(message)
            self._wake()

    def tell(self, *messages: Told) -> None:
        """Messages that are told in any case: whoever tells them waits until they are `drained`."""
        with self._lock:
            if not self._ended:
                self._none.clear()
                self._mark()
                for message in messages:
                    self._put(message)
                self._wake()

    async def drained(self) -> None:
        """Wait until what was told has been taken."""
        await self._none.wait()

    async def take(self) -> Told | None:
        """The next message; None: there will be none."""
        while True:
            with self._lock:
                self._waiting = True  # first: what is written while it looks wakes it, too
                message = self._next()
                if message is not None:
                    self._waiting = False
                else:
                    self._none.set()
                    if self._ended:
                        return None
                    self._some.clear()
            if message is not None:
                return message
            await self._some.wait()

    def end(self) -> None:
        """Nothing more: what is written from now on is nobody's."""
        with self._lock:
            self._mark()
            self._ended = True
            self._wake()

    def drop(self) -> None:
        """Forget what nobody will take, and the names: tasks that live on have this screen in their context."""
        self.end()
        with self._lock:
            self._messages.clear()
            self._text, self._size = io.StringIO(), 0
        self.names = {}

    def _room(self) -> int:
        """Characters that may be written. After some were left out it takes a while until there are any."""
        if self._ended or (self._left_out and self._size > self._most // 2):
            return 0
        self._mark()
        return max(self._most - self._size, 0)

    def _mark(self) -> None:
        if self._left_out and not self._ended:
            count, self._left_out = self._left_out, 0
            self._add_text(f"\n[… {count} characters are left out: they came faster than this shell took them]\n")

    def _add_text(self, text: str) -> None:
        written = self._text.write(text)
        self._size += written

    def _put(self, message: Told) -> None:
        size = _size(message)
        self._close_text()
        self._messages.append(message)
        self._size += size

    def _close_text(self) -> None:
        closed, self._text = self._text, io.StringIO()
        text = closed.getvalue()
        for at in range(0, len(text), CHUNK):
            self._messages.append(Output(text[at : at + CHUNK]))

    def _next(self) -> Told | None:
        if not self._messages:
            self._mark()
            self._close_text()
        if not self._messages:
            return None
        message = self._messages.popleft()
        size = _size(message)
        self._size -= size
        return message

    def _wake(self) -> None:
        if self._waiting:
            self._waiting = False
            self._loop.call_soon_threadsafe(self._some.set)


def _size(message: Told) -> int:
    if isinstance(message, Shown):
        return len(message.node) + len(message.text)
    return len(message.text) if isinstance(message, Output) else 0


class _Divided:
    """A standard stream: for inputs of a console their screen and no keyboard, for everybody else what it was."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def write(self, text: str) -> int:
        screen = current_screen.get()
        if screen is not None:
            if not isinstance(text, str):
                raise TypeError(f"what is printed is text, not {type(text).__name__}")
            screen.write(text)
        elif self.real is not None:
            self.real.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if current_screen.get() is None and self.real is not None:
            self.real.flush()

    def close(self) -> None:
        if current_screen.get() is None and self.real is not None:
            self.real.close()

    def isatty(self) -> bool:
        return current_screen.get() is None and self.real is not None and bool(self.real.isatty())

    def fileno(self) -> int:
        if current_screen.get() is not None or self.real is None:
            raise io.UnsupportedOperation("a console has no file")
        return int(self.real.fileno())

    def read(self, size: int = -1) -> str:
        return "" if current_screen.get() is not None or self.real is None else str(self.real.read(size))

    def readline(self, size: int = -1) -> str:
        return "" if current_screen.get() is not None or self.real is None else str(self.real.readline(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def __enter__(self) -> _Divided:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_STREAMS = ("stdin", "stdout", "stderr")
_users = 0


def divide() -> None:
    """Have it so again, should somebody have replaced a stream. Idempotent."""
    for name in _STREAMS:
        if not isinstance(stream := getattr(sys, name), _Divided):
            setattr(sys, name, _Divided(stream))
    sys.displayhook = _display


@contextmanager
def divided() -> Iterator[None]:
    """Meanwhile what is printed where a `current_screen` is set goes there and nowhere else; so does what expressions
    come to. It is set in tasks that were begun where it is, and in `asyncio.to_thread`; another thread has a context of
    its own. Blocks may overlap."""
    global _users
    divide()
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            for name in _STREAMS:
                if isinstance(stream := getattr(sys, name), _Divided):  # not replaced by somebody else
                    setattr(sys, name, stream.real)
            if sys.displayhook is _display:
                sys.displayhook = sys.__displayhook__


def _display(value: Any) -> None:
    screen = current_screen.get()
    if screen is None:
        sys.__displayhook__(value)
    else:
        screen.show(value)
