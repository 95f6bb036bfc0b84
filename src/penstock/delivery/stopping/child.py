"""A child process: carries out calls one after another, and ends with whoever made it.

`python -m penstock.delivery.stopping` for functions that can be imported, with the line to the parent in
`$PENSTOCK_LINE`; `serve` in a fork for others. The first frame from the parent is a `Start`, each later one
a call. What is said of a call bears its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import os
import queue
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from penstock import codec
from penstock.context import Settings, current_app, current_headers, current_progress, importing
from penstock.errors import Unavailable, printable

HEAD = 4  # bytes of a frame's length
MAX_FRAME = 1 << 30
MAX_MESSAGE = 4000  # characters
MAX_TRACEBACK = 6000
LINE = "PENSTOCK_LINE"
"""What a child is told as it starts: the number of its end of the line, and its parent's process id."""
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
OTHER_MAIN = "__penstock_main__"
"""The `__name__` of a script that is run again so that its functions are there."""


class Start(msgspec.Struct, tag_field="frame", tag="start"):
    """How to get at the function, and the settings."""

    module: str
    name: str
    script: str | None
    """The file of `__main__`, where the function is from there."""
    path: list[str]
    argv: list[bytes]
    settings: bytes


class Numbered(msgspec.Struct):
    """Something about one call."""

    number: int


class Call(Numbered, tag_field="frame", tag="call"):
    """Arguments as JSON."""

    body: bytes


class Begun(Numbered, tag_field="frame", tag="begun"):
    """From here on the function may have done something."""


class Progress(Numbered, tag_field="frame", tag="progress"):
    done: float
    total: float


class Result(Numbered, tag_field="frame", tag="result"):
    """What the function returned, as a body, and the headers of the reply."""

    body: bytes
    described: dict[str, Any]
    headers: dict[str, Any]


class Failed(Numbered, tag_field="frame", tag="failed"):
    """What it raised."""

    type: str
    message: str
    traceback: str | None
    unavailable: bool
    """It was `Unavailable`: an outage, and no failure of its own."""


Frame = Start | Call | Begun | Progress | Result | Failed

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


def pack(frame: Frame) -> bytes:
    data = _encode(frame)
    return len(data).to_bytes(HEAD, "big") + data


def unpack(data: bytes) -> Frame:
    frame: Frame = _decode(data)
    return frame


def find(module: str, name: str, script: str | None) -> Any:
    """What a name stands for in a module, or in a script that is run as a module."""
    found: Any
    if script is None:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    found = runpy.run_path(script, run_name=OTHER_MAIN)
    first, *rest = name.split(".")
    found = found[first]
    for part in rest:
        found = getattr(found, part)
    return found


class Child:
    """The child's side of the line. What it forks has no part in it."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        os.register_at_fork(after_in_child=self._line.close)

    def serve(self, target: Callable[..., Any] | None, settings: bytes = b"{}") -> None:
        """Carry out calls until the parent goes away; `target` None: it says where to find it."""
        problem: BaseException | None = None
        if target is None:
            start = self._read()
            if not isinstance(start, Start):
                return  # the parent is gone
            settings = start.settings
            try:
                target = prepare(start)
            except BaseException as error:
                problem = error
        threading.Thread(target=self._listen, name="penstock-line", daemon=True).start()
        if target is not None:
            enter(target, msgspec.json.decode(settings))
        while True:
            call = self._calls.get()
            if problem is not None:
                self._write(failed(problem, call.number))
            elif target is not None:
                self._write(self._carry_out(target, call))

    def _carry_out(self, target: Callable[..., Any], call: Call) -> Frame:
        headers: dict[str, Any] = {}
        current_headers.set(headers)
        current_progress.set(lambda done, total: self._write(Progress(call.number, done, total)))
        asked = msgspec.json.decode(call.body)
        self._write(Begun(call.number))
        frame: Frame
        try:
            run = getattr(target, "call_plain", target)
            frame = _result(run(*asked["args"], **asked["kwargs"]), headers, call.number)
        except BaseException as error:
            frame = failed(error, call.number)
        if os.getpid() != self._pid:  # the function has forked, and this is the copy
            os._exit(1)
        return frame

    def _listen(self) -> None:
        """Take in calls. When the parent is gone, in the middle of a run too, so are we."""
        try:
            while isinstance(frame := self._read(), Call):
                self._calls.put(frame)
        finally:
            end_all()

    def _read(self) -> Frame | None:
        head = self._exactly(HEAD)
        body = None if head is None else self._exactly(int.from_bytes(head, "big"))
        return None if body is None else unpack(body)

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            part = self._line.recv(min(size - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)

    def _write(self, frame: Frame) -> None:
        with self._writing:
            self._line.sendall(pack(frame))


def prepare(start: Start) -> Any:
    """Make this process like the parent, as far as imports can see, and find the function."""
    sys.path[:] = start.path
    sys.argv[:] = [os.fsdecode(one) for one in start.argv]
    before = importing.set(True)
    try:
        return find(start.module, start.name, start.script)
    finally:
        importing.reset(before)


def _result(value: Any, headers: dict[str, Any], number: int) -> Result:
    """What a function returned as data.

    :raises Exception: it cannot be said, or it raised once awaited.
    """
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    if isinstance(value, tuple) and hasattr(value, "headers") and hasattr(value, "value"):  # a Reply
        headers.update(value.headers)
        value = value.value
    body, described = codec.encode(value)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a result of {len(body)} bytes is too large for a pipe")
    made = Result(number, body, dict(described), headers)
    pack(made)  # headers that cannot be said are the function's failure
    return made


async def _awaited(value: Any) -> Any:
    return await value


def failed(error: BaseException, number: int) -> Failed:
    """An error as data."""
    trace = printable("".join(traceback.format_exception(error))[-MAX_TRACEBACK:])[-MAX_TRACEBACK:]
    try:
        text = printable(str(error)[:MAX_MESSAGE])[:MAX_MESSAGE]
    except Exception:
        text = "(it cannot say itself)"
    return Failed(number, type(error).__name__, text, trace, isinstance(error, Unavailable))


def enter(target: Any, settings: dict[str, Any]) -> None:
    """Make `penstock.context` speak of the target's app, with settings of our own."""
    app = getattr(target, "app", None)
    if app is not None:
        app.settings = Settings(settings)
        current_app.set(app)


def quiet_signals() -> None:
    """The parent tells us when to end, not the terminal."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with(parent: int) -> None:
    """Have the system kill us when the parent is gone, whatever we are at. Linux alone can: elsewhere `_listen`
    sees to it, once the function lets another thread run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(0)


def end_all() -> NoReturn:
    """End, with everything that the functions have started."""
    with contextlib.suppress(OSError):
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """`python -m penstock.delivery.stopping`."""
    fd, parent = (int(one) for one in os.environ.pop(LINE).split())
    end_with(parent)
    quiet_signals()
    os.set_inheritable(fd, False)
    Child(socket.socket(fileno=fd)).serve(None)
