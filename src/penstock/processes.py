"""Several processes of one app under a supervisor, and starting them again when the code changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from penstock.errors import ConfigError
from penstock.running import CANCEL, DRAIN, LINK, Report

log = logging.getLogger("penstock.processes")

FIRST_RESTART, LONGEST_RESTART = 0.1, 30.0  # seconds before a process that died is started again
SETTLED = 10.0  # seconds after which a process counts as having run well
LAGGARDS = 2.0  # seconds in which the others may turn out to be unable to start, too
KILL_AFTER = 10.0  # seconds beyond its own grace that a process gets before it is killed

_decode = msgspec.json.Decoder(Report).decode


class Child:
    """One process, and our end of the link to it."""

    def __init__(self, process: asyncio.subprocess.Process, link: socket.socket, number: int) -> None:
        self.number = number
        self.started = False
        """It has begun to consume."""
        self.error: str | None = None
        """Why it could not start."""
        self.asked = False
        """It was told to end."""
        self._grace = 0.0
        self._process = process
        self._link = link
        self._born = asyncio.get_running_loop().time()
        self._reading = asyncio.create_task(self._read(), name=f"reports of process {number}")

    @classmethod
    async def start(cls, arguments: Sequence[str], number: int) -> Self:
        """`python -m penstock ARGUMENTS`, in a process group of its own: a Ctrl-C at the terminal is for the
        supervisor alone, which passes it on."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "penstock", *arguments,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, LINK: str(theirs.fileno())},
                process_group=0,
            )  # fmt: skip
        ours.setblocking(False)
        return cls(process, ours, number)

    def __str__(self) -> str:
        return f"process {self.number} (pid {self._process.pid})"

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return asyncio.get_running_loop().time() - self._born

    def ask(self, order: int) -> None:
        """Tell it to drain or to cancel."""
        self.asked = True
        with contextlib.suppress(OSError):
            self._link.send(bytes([order]))
        if order == DRAIN:
            loop = asyncio.get_running_loop()
            loop.call_later(self._grace + KILL_AFTER, self._kill_late)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> int:
        """Its exit status, once it has ended; minus the signal's number if one killed it."""
        status = await self._process.wait()
        await asyncio.wait((self._reading,), timeout=1.0)  # something it forked may hold the other end open
        self._reading.cancel()
        self._link.close()
        return status

    def _kill_late(self) -> None:
        if self._process.returncode is None:
            log.error("%s has not ended %g s after its grace: killing it", self, KILL_AFTER)
            self.kill()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = b""
        while True:
            try:
                data = await loop.sock_recv(self._link, 4096)
            except OSError:
                return
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                report = _decode(line)
                self.error = report.error or self.error
                if report.grace is not None:
                    self.started, self._grace = True, report.grace


class Supervisor:
    """Keeps `count` processes running until told to stop.

    One that dies is started again, after a pause that grows while it dies young. Only when every one of
    them has said that it cannot start (a bad module, a broker that refuses) does the supervisor give up,
    with each different error told once. `reload` starts them again, drained, on every change
    of a `*.py` below the current directory, and waits for the next change when they cannot start.

    :raises ConfigError: `reload` without watchfiles.
    """

    def __init__(self, arguments: Sequence[str], count: int, *, reload: bool = False) -> None:
        self._arguments = arguments
        self._count = count
        self._reload = reload
        if reload:
            _require_watchfiles()
        self._children: dict[int, Child] = {}
        self._unstartable: dict[int, str] = {}
        self._signals: list[signal.Signals] = []

    def run(self) -> int:
        """Until SIGTERM or SIGINT (the second cancels what the processes run, the third kills them); the exit
        status: 0 drained, 1 failed, 130 interrupted."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)
        log.info("starting %d process%s", self._count, "" if self._count == 1 else "es")
        watching = asyncio.create_task(self._watch()) if self._reload else None
        statuses = await asyncio.gather(*(self._keep(number) for number in range(1, self._count + 1)))
        if watching is not None:
            await watching
        if not self._signals:
            for error in dict.fromkeys(self._unstartable.values()):
                print(f"error: {error}", file=sys.stderr)
            return 1
        if any(status not in (0, 130) for status in statuses):
            return 1
        return 130 if self._signals[0] is signal.SIGINT else 0

    def _heard(self, number: signal.Signals) -> None:
        self._signals.append(number)
        times = len(self._signals)
        if times == DRAIN:
            log.info("%s: the processes finish what they run", number.name)
            self._stop.set()
        elif times == CANCEL:
            log.warning("%s again: the processes cancel what they run", number.name)
        else:
            log.error("%s once more: killing the processes", number.name)
        for child in self._children.values():
            if times <= CANCEL:
                child.ask(times)
            else:
                child.kill()

    async def _keep(self, number: int) -> int:
        """Have a process of this number until the stop; the exit status of the last."""
        deaths = 0
        status = 0
        while not self._stop.is_set():
            self._changed.clear()
            child = self._children[number] = await Child.start(self._arguments, number)
            if self._stop.is_set():
                child.ask(DRAIN)
            status = await child.ended()
            del self._children[number]
            if child.asked:
                deaths = 0
            elif child.error is not None:
                await self._could_not_start(number, child.error)
            else:
                self._unstartable.pop(number, None)
                deaths = 0 if child.age >= SETTLED else deaths + 1
                pause = min(FIRST_RESTART * 2.0 ** max(deaths - 1, 0), LONGEST_RESTART)
                log.warning("%s %s; starting another in %.1f s", child, _fate(status), pause)
                await self._until_stop(pause)
        return status

    async def _could_not_start(self, number: int, error: str) -> None:
        """Wait for what may help: a change of the code, or time. When no process can start, give up."""
        self._unstartable[number] = error
        if self._reload:
            log.error("%s; waiting for a change", error)
            await self._until_stop(None)
        elif len(self._unstartable) == self._count:
            self._give_up()
        else:
            await self._until_stop(LAGGARDS)
            if not self._stop.is_set():
                log.error("process %d could not start, again in %.1f s: %s", number, SETTLED, error)
                await self._until_stop(SETTLED)

    def _give_up(self) -> None:
        self._stop.set()
        for child in self._children.values():
            child.ask(DRAIN)

    async def _until_stop(self, seconds: float | None) -> None:
        """Until the stop, a change of the code, or for `seconds`."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stop, self._changed)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _watch(self) -> None:
        import watchfiles

        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        here = os.getcwd()
        try:
            async for changes in watchfiles.awatch(
                here, watch_filter=watchfiles.PythonFilter(), stop_event=self._stop, raise_interrupt=False
            ):
                log.info("%s changed: starting again", _names(path for _, path in changes))
                self._changed.set()
                for child in self._children.values():
                    child.ask(DRAIN)
        except (OSError, RuntimeError) as error:
            log.error("cannot watch %s for changes any more: %s", here, error)


def _names(paths: Iterable[str]) -> str:
    return ", ".join(sorted({os.path.relpath(path) for path in paths}))


def _fate(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _require_watchfiles() -> None:
    """:raises ConfigError: it is not installed."""
    try:
        import watchfiles  # noqa: F401
    except ImportError:
        raise ConfigError("--reload needs watchfiles: pip install 'penstock[reload]'") from None
