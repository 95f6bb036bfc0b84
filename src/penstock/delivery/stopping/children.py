"""Functions in processes of their own: stopped by SIGKILL, wherever they hang.

What goes over the line is data, nothing is pickled: the child gets the function by importing it, or,
where it has no name that can be imported, by being forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from penstock import codec
from penstock.context import current_headers, current_progress
from penstock.delivery.stopping import child
from penstock.delivery.stopping.base import Overrun, RemoteFailure, for_certain, raise_if_cancelled
from penstock.delivery.stopping.child import Begun, Call, Failed, Frame, Progress, Result, Start
from penstock.errors import PenstockError, Unavailable

log = logging.getLogger("penstock.stopping")

LAST_WAIT = 5.0  # seconds for a killed child to be gone
LAST_WORDS = 0.2  # seconds to read what a child wrote before it ended
LOOK = 0.05  # seconds between looks whether a fork has ended, where the system does not say so by itself
_OWN = "penstock.delivery.stopping"


class ProcessDied(PenstockError):
    """The process of a run ended in the middle of it. `begun`: the function may have done something."""

    def __init__(self, fate: str, begun: bool = True) -> None:
        self.begun = begun
        super().__init__(f"its process {fate}")


class _Child:
    """A child process and our end of the line to it. Whatever it has started ends with it."""

    def __init__(self, line: socket.socket, pid: int, process: asyncio.subprocess.Process | None) -> None:
        line.setblocking(False)
        self._line = line
        self._pid = pid
        self._gone = asyncio.create_task(self._see_exit(process), name=f"end of process {pid}")

    @property
    def alive(self) -> bool:
        return not self._gone.done()

    async def ask(self, call: Call) -> Result:
        """:raises ProcessDied, RemoteFailure, Unavailable: as they say."""
        begun = False
        try:
            await self.send(call)
            while (frame := await self._receive()) is not None:
                if isinstance(frame, Progress):  # a late one, of a thread that the last call left, counts no more
                    if frame.number == call.number:
                        current_progress.get()(frame.done, frame.total)
                elif not isinstance(frame, Begun | Result | Failed) or frame.number != call.number:
                    self.kill()
                    raise ProcessDied("answered another call and was killed")
                elif isinstance(frame, Begun):
                    begun = True
                elif isinstance(frame, Result):
                    return frame
                elif frame.unavailable:
                    raise Unavailable(frame.message)
                else:
                    raise RemoteFailure(frame.type, frame.message, frame.traceback)
        except OSError:
            pass
        raise ProcessDied(_fate(await self.end()), begun)

    async def send(self, frame: Frame) -> None:
        await asyncio.get_running_loop().sock_sendall(self._line, child.pack(frame))

    def kill(self) -> None:
        if self.alive:
            self._kill_group()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # a fork that has not come to its own group yet

    async def end(self) -> int | None:
        """See it end, by itself or by us; its exit status, minus the signal's number if one killed it."""
        await asyncio.wait([self._gone], timeout=LAST_WORDS)  # it may be ending by itself
        self.kill()
        await asyncio.wait([self._gone], timeout=LAST_WAIT)
        self._line.close()
        return None if self.alive or self._gone.cancelled() else self._gone.result()

    async def _see_exit(self, process: asyncio.subprocess.Process | None) -> int | None:
        """Its exit status, once it is gone. What it has forked may hold the line open: we hang up."""
        status = await _exit_of_fork(self._pid) if process is None else await process.wait()
        self._kill_group()
        asyncio.get_running_loop().call_later(LAST_WORDS, self._hang_up)
        return status

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # there is none, or but a zombie
            os.killpg(self._pid, signal.SIGKILL)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    async def _receive(self) -> Frame | None:
        head = await self._exactly(child.HEAD)
        body = None if head is None else await self._exactly(int.from_bytes(head, "big"))
        return None if body is None else child.unpack(body)

    async def _exactly(self, size: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < size:
            part = await loop.sock_recv(self._line, min(size - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)


class ProcessRunner:
    """Runs a function, at most `slots` at once, each in a child that is kept for the next run.

    `target` is the function, or something around it with the attributes `function` and `call_plain`.
    A child has settings of its own: those of `settings()` when it was made, as far as JSON can say them.
    """

    def __init__(self, target: Any, slots: int, name: str, settings: Callable[[], Mapping[str, Any]]) -> None:
        self._target = target
        self._name = name
        self._settings = settings
        self._slots = asyncio.Semaphore(slots)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._numbers = itertools.count(1)
        self._told_unsayable = False

    async def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any], limit: float | None) -> Any:
        """As `Runner.run`. What the function raises comes out as `RemoteFailure`, and `Unavailable` as itself.

        :raises ProcessDied: the child ended in the middle of it.
        :raises Unencodable: arguments that JSON cannot say.
        """
        call = Call(next(self._numbers), codec.encode({"args": arguments, "kwargs": keywords})[0])
        async with self._slots:
            run = asyncio.create_task(self._in_child(call))
            try:
                done, _ = await asyncio.wait([run], timeout=limit)
            except asyncio.CancelledError:
                await self._stop(run)
                raise
            if not done:
                assert limit is not None
                await self._stop(run)
                raise_if_cancelled()
                raise Overrun(limit)
        result = run.result()
        current_headers.get().update(result.headers)
        return codec.decode(result.body, result.described, child.MAX_FRAME)

    async def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for one in (*idle, *self._busy):
            one.kill()
        await asyncio.gather(*(one.end() for one in idle), *self._ending)

    async def _in_child(self, call: Call) -> Result:
        """Carry it out in a child that waits for work, else in a fresh one."""
        while (one := self._take()) is not None:
            try:
                return await self._carry_out(one, call)
            except ProcessDied as error:
                if error.begun or self._closed:
                    raise
        return await self._carry_out(await self._make(), call)

    def _take(self) -> _Child | None:
        while self._idle:
            one = self._idle.pop()
            if one.alive:
                return one
            self._see_end(one)
        return None

    async def _carry_out(self, one: _Child, call: Call) -> Result:
        self._busy.add(one)
        fit = False
        try:
            result = await one.ask(call)
            fit = True
            return result
        except (RemoteFailure, Unavailable):
            fit = True
            raise
        finally:
            self._busy.discard(one)
            if fit and not self._closed:
                self._idle.append(one)
            else:
                one.kill()
                self._see_end(one)

    async def _stop(self, run: asyncio.Task[Any]) -> None:
        run.cancel()
        await for_certain(run, LAST_WAIT)
        if run.done() and not run.cancelled():
            run.exception()

    def _see_end(self, one: _Child) -> None:
        ending = asyncio.get_running_loop().create_task(one.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _make(self) -> _Child:
        told = self._settings_told()
        start = _importable(self._target, told)
        ours, theirs = socket.socketpair()
        with theirs:
            if start is None:
                return _Child(ours, _fork(self._target, theirs, told), None)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", _OWN,
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                    env=_environment(theirs),
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        made = _Child(ours, process.pid, process)
        try:
            await made.send(start)
        except OSError:
            pass  # it is gone already: the call will say so
        except BaseException:
            made.kill()
            self._see_end(made)
            raise
        return made

    def _settings_told(self) -> bytes:
        """The settings that a child gets; which it does not get is logged once."""
        settings = {name: value for name, value in self._settings().items() if name != "uuid"}
        unsayable = [name for name, value in settings.items() if not _sayable({name: value})]
        if unsayable and not self._told_unsayable:
            self._told_unsayable = True
            names = ", ".join(map(str, unsayable))
            log.warning("%s: its processes have no settings %s: JSON cannot say them", self._name, names)
        return codec.encode({name: value for name, value in settings.items() if name not in unsayable})[0]


def _environment(line: socket.socket) -> dict[str, str]:
    path = os.pathsep.join(one for one in sys.path if one)
    return {**os.environ, "PYTHONPATH": path, child.LINE: f"{line.fileno()} {os.getpid()}"}


def _sayable(value: Any) -> bool:
    try:
        codec.encode(value)
    except Exception:
        return False
    return True


def _importable(target: Any, settings: bytes) -> Start | None:
    """Where another process finds the function; None: it would not."""
    function = getattr(target, "function", target)
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    there: Any = sys.modules.get(module or "")
    script = None
    if module == "__main__":
        script = getattr(there, "__file__", None)
        if script is None or getattr(there, "__spec__", None) is not None:
            return None
    for part in name.split("."):
        there = getattr(there, part, None)
    if there is None or getattr(there, "function", there) is not function:
        return None
    argv = [os.fsencode(one) for one in sys.argv]
    return Start(str(module), name, script, [one or os.getcwd() for one in sys.path], argv, settings)


def _fork(target: Any, line: socket.socket, settings: bytes) -> int:
    """A copy of this process that does nothing but carry out calls; its id."""
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child touches none of theirs
        pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        child.end_with(parent)
        child.quiet_signals()
        asyncio._set_running_loop(None)
        fd = line.fileno()
        os.closerange(3, fd)
        os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        child.Child(line).serve(target, settings)
    finally:
        os._exit(1)


async def _exit_of_fork(pid: int) -> int | None:
    """Its exit status, once it has ended; None: it has been told to somebody else."""
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not wait
        except ChildProcessError:
            return None
        if ended:
            return os.waitstatus_to_exitcode(status)
        await _sign_of_exit(pid)


async def _sign_of_exit(pid: int) -> None:
    """Until a process has ended; where the system does not say so, for a moment."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old one
        await asyncio.sleep(LOOK)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _fate(status: int | None) -> str:
    if status is None:
        return "went away"
    return f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
