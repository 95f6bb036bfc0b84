"""Running an app as a process: signals, the link to a supervisor, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from penstock import config, logs
from penstock.errors import ConfigError, PenstockError, StoreRequired, near, one_line

if TYPE_CHECKING:
    from penstock.app import App
    from penstock.life import Life

log = logging.getLogger("penstock")

LINK = "PENSTOCK_SUPERVISOR_FD"
"""Set for a supervised process: the number of its end of a socket to the supervisor."""

DRAIN, CANCEL, ABANDON = 1, 2, 3
"""How a process is asked to end: finish what runs, cancel what runs, leave at once."""

WORN_OUT = 75  # exit status: drained because too much was stuck, to be started again (EX_TEMPFAIL)

MOST = {DRAIN: 5.0, CANCEL: 4.0}
"""Seconds, after the grace or the second signal, in which a process has ended, whatever it waits for."""

LAST_WAIT = 2.0  # seconds for cancelled tasks and threads to end by themselves


class Report(msgspec.Struct, omit_defaults=True):
    """What a supervised process tells its supervisor, one JSON object a line."""

    grace: float | None = None
    """It consumes; told to drain, it takes at most this many seconds."""
    error: str | None = None
    """Why it could not start, on one line."""


class Link:
    """A supervised process's end. The supervisor writes a byte (`DRAIN` or `CANCEL`); its death reads as `DRAIN`."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls) -> Self | None:
        """The link of a supervised process. The variable is taken away: it is not for what we start ourselves."""
        fd = os.environ.pop(LINK, None)
        try:
            return None if fd is None else cls(int(fd))
        except (ValueError, OSError):
            return None

    def tell(self, report: Report) -> None:
        """Never fails: a supervisor that has gone need not know."""
        with contextlib.suppress(OSError):
            self._socket.sendall(msgspec.json.encode(report) + b"\n")

    def watch(self, asked: Callable[[int], None]) -> None:
        """Have `asked` called in the running loop with each order."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            try:
                orders = self._socket.recv(16)
            except BlockingIOError:
                return
            except OSError:
                orders = b""
            if not orders:
                loop.remove_reader(self._socket)
            asked(max(orders, default=DRAIN))

        loop.add_reader(self._socket, readable)


OWN_FLAGS = ("--verbose", "--log-level", "--logging", "--log-format", "--broker", "--store", "--host", "--port")


def run_from_argv(app: App) -> None:
    """`app.run()` of a script: its flags, then consume; ends the process unless all went well.

    Flags that are not ours are left to the script.
    """
    parser = argparse.ArgumentParser(description="Consume until SIGTERM or SIGINT.", allow_abbrev=False)
    parser.add_argument("-v", "--verbose", action="store_true", help="log at debug level")
    parser.add_argument("--log-level", "--logging", dest="log_level", help=", ".join(logs.LEVELS))
    parser.add_argument("--log-format", help=" or ".join(logs.FORMATS))
    parser.add_argument("--broker", help="the broker's URL")
    parser.add_argument("--store", help="the store's URL")
    parser.add_argument("-H", "--host", help="RabbitMQ host")
    parser.add_argument("-P", "--port", type=int, help="RabbitMQ port")
    flags, others = parser.parse_known_args()
    for other in others:
        if other.startswith("--") and (hint := near(other.partition("=")[0], OWN_FLAGS, 0.8)):
            parser.error(f"unknown option {other}{hint}")
    try:
        settings = config.load()
        point(app, flags.broker, flags.host, flags.port, flags.store)
        if not logging.getLogger().handlers:
            level = "debug" if flags.verbose else flags.log_level or settings.log_level
            logs.configure(level, flags.log_format or settings.log_format)
        status = consume(app)
    except PenstockError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    if status:
        sys.exit(status)


def point(app: App, broker: str | None, host: str | None, port: int | None, store: str | None = None) -> None:
    """Give an app another broker or store than it declared, from flags.

    :raises ConfigError: both a URL and a host; a URL that no adapter serves.
    :raises StoreRequired: it has schedules, and with that broker no store.
    """
    if host is not None or port is not None:
        if broker is not None:
            raise ConfigError("give --broker or --host and --port, not both")
        broker = config.amqp_url(host or "127.0.0.1", port or 5672)
    if store is not None:
        app._given_store = store
    if broker is not None or store is not None:
        app.url = broker or app.url
        if app.store is not None:
            return
        if app.schedules:
            raise StoreRequired(f"the schedule of {app.schedules[0].name!r}")
        for worker in app.workers.values():
            if worker.mode == "single":
                raise StoreRequired(f"the single worker {worker.name!r}")


class Service(Protocol):
    """What a process runs: an `App`, or something around one."""

    @property
    def grace(self) -> float:
        """Seconds that what runs gets at the stop."""
        ...

    @property
    def _life(self) -> Life | None:
        """Of the app, while it runs."""
        ...

    async def __aenter__(self) -> Any: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def consume(app: Service, link: Link | None = None) -> int:
    """Consume until told to stop; the exit status: 0 drained, 1 failed, 130 interrupted.

    The first SIGTERM or SIGINT drains, the second cancels the handler calls under way and releases
    their messages, the third leaves at once. An error that ends the start is one line, on stderr or to
    the supervisor. A process in which too many runs are stuck drains and is started again: by the
    supervisor, else by itself.
    """
    runner = asyncio.Runner(loop_factory=_loop_factory())
    process = _Process(app, link)
    status = runner.run(process.run())
    if status == WORN_OUT and link is None:
        _start_again()
    if process.abandoned or _stuck_threads():
        # A handler that never returned would keep the interpreter from ending.
        log.error("leaving without the handler calls that did not end; their messages come again")
        logging.shutdown()
        os._exit(status or 1)
    runner.close()
    return status


def _start_again() -> None:
    """Become a new process of the same command: what was stuck is gone with the old one."""
    log.warning("starting again")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - it is what we were started with


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _stuck_threads() -> bool:
    """Whether a thread that ran handlers is still at it after a last wait."""
    until = time.monotonic() + LAST_WAIT
    for thread in threading.enumerate():
        if thread.name.startswith("penstock-") and not thread.daemon:
            thread.join(max(until - time.monotonic(), 0.0))
            if thread.is_alive():
                return True
    return False


class _Process:
    """One run of an app from its start to the end of the process."""

    def __init__(self, app: Service, link: Link | None) -> None:
        self.abandoned = False
        """Tasks are left that would not end."""
        self._app = app
        self._link = link
        self._level = 0
        self._signals: list[signal.Signals] = []
        self._started = False
        self._life: Life | None = None

    async def run(self) -> int:
        """Consume until asked to end; the exit status."""
        self._stop = asyncio.Event()
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(thread_name_prefix="penstock-default")
        loop.set_default_executor(threads)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heard, number)
        if self._link is not None:
            self._link.watch(self._asked)
        try:
            return await self._consume()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self.abandoned = await _cancel_the_rest()

    async def _consume(self) -> int:
        app = self._app
        try:
            async with app:
                self._started = True
                life = app._life
                assert life is not None
                self._life = life
                if self._link is not None:
                    self._link.tell(Report(grace=app.grace))
                stopped, worn_out = (asyncio.ensure_future(one.wait()) for one in (self._stop, life.worn_out))
                await asyncio.wait((stopped, worn_out, life.failed), return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                worn_out.cancel()
        except asyncio.CancelledError:
            if not self._level:
                raise
            return self._told_status()
        except PenstockError as error:
            self._complain(str(error) or one_line(error))
            return 1
        except Exception as error:
            log.critical("the start failed", exc_info=error)
            self._complain(f"the start failed: {one_line(error)}")
            return 1
        if life.failed.done():
            return 1
        return WORN_OUT if life.worn_out.is_set() and not self._stop.is_set() else self._told_status()

    def _told_status(self) -> int:
        return 130 if self._signals[:1] == [signal.SIGINT] else 0

    def _complain(self, text: str) -> None:
        if self._link is not None and not self._started:
            self._link.tell(Report(error=text))
        else:
            print(f"error: {text}", file=sys.stderr)

    def _heard(self, number: signal.Signals) -> None:
        self._signals.append(number)
        self._asked(len(self._signals), number.name)

    def _asked(self, level: int, by: str = "the supervisor") -> None:
        """Go to a level of haste; one that is reached already changes nothing."""
        if level <= self._level:
            return
        self._level = level
        if level < ABANDON:
            most = MOST[level] + (self._app.grace if level == DRAIN else 0.0)
            asyncio.get_running_loop().call_later(most, self._asked, ABANDON, f"not ended within {most:g} s")
        if level == DRAIN:
            log.info("%s: finishing what runs, for at most %g s", by, self._app.grace)
        self._stop.set()
        if not self._started and self._task is not None:
            self._task.cancel()
        if level == CANCEL:
            log.warning("%s again: cancelling what runs", by)
            if self._life is not None:
                self._life.cancel()
        elif level >= ABANDON:
            log.error("%s: leaving at once", by)
            logging.shutdown()
            os._exit(self._told_status() or 1)


async def _cancel_the_rest() -> bool:
    """Cancel what still runs in the loop; whether something would not end."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if not rest:
        return False
    _, pending = await asyncio.wait(rest, timeout=LAST_WAIT)
    return bool(pending)
