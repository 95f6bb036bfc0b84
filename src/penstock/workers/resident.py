"""`Resident`: one worker in this process, run again and again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from penstock.clock import backoff_delay
from penstock.delivery.execution import is_async
from penstock.delivery.stopping import Abandoned, ThreadRunner
from penstock.delivery.stopping.base import presentable
from penstock.errors import one_line
from penstock.stores.election import Term
from penstock.waiting import Bell
from penstock.workers.definition import Worker
from penstock.workers.runtime import current_run
from penstock.workers.tail import Tail

log = logging.getLogger("penstock.workers")

State = Literal["waiting", "running", "resting", "failing", "stopping", "paused", "stopped"]
"""`waiting`: another process runs it, or nobody yet; `resting`: it has ended, and is run again after its interval;
`failing`: it has raised, and is run again after its backoff."""

AGAIN = 0.05  # seconds between cancellations of a run that does not end
COMPLAIN_AFTER = 5.0  # seconds until such a run is named in the log
HEALTHY = 60.0  # seconds that a run must have lasted for the backoff to begin anew


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How a worker stands in a process."""

    name: str
    mode: str
    category: str | None
    state: State
    since: float
    """Of that state; Unix seconds."""
    runs: int
    """Begun in this process, the one under way included."""
    failures: int
    """Of them, those that raised."""
    last_error: str | None
    """The last failure in one line."""
    log: list[str]
    """The last lines that it has logged here."""


class Run:
    """One run of a worker, as it sees itself."""

    __slots__ = ("_term", "tail", "told")

    def __init__(self, term: Term | None, tail: Tail) -> None:
        self._term = term
        self.tail = tail
        self.told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once it is to end."""

    @property
    def wanted(self) -> bool:
        return not self.told.done() and (self._term is None or self._term.held)

    @property
    def epoch(self) -> int | None:
        return None if self._term is None else self._term.epoch

    def end(self) -> None:
        if not self.told.done():
            self.told.set_result(None)


class Resident:
    """Runs a worker's function: again after its interval when it ends, after a backoff when it raises.

    A coroutine function runs in the event loop, a plain one in a thread. For one event loop.
    """

    def __init__(
        self,
        worker: Worker,
        grace: float,
        abandoned: Abandoned,
        rng: random.Random,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.worker = worker
        self._changed = changed
        self._grace = grace
        self._rng = rng
        self._threads = None if is_async(worker.function) else ThreadRunner(worker.function, 1, worker.name, abandoned)
        self._bell = Bell()
        self._state: State = "waiting"
        self._since = time.time()
        self._run: Run | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._paused = False
        self._anew = False
        """It is to begin again at once."""
        self._runs = 0
        self._failures = 0
        self._in_a_row = 0
        self._last_error: str | None = None
        self._tail = Tail(changed)

    @property
    def status(self) -> WorkerStatus:
        worker = self.worker
        return WorkerStatus(
            name=worker.name,
            mode=worker.mode,
            category=worker.category,
            state=self._state,
            since=self._since,
            runs=self._runs,
            failures=self._failures,
            last_error=self._last_error,
            log=list(self._tail),
        )

    async def serve(self, term: Term | None = None) -> None:
        """Run it until cancelled; then it is cancelled too, as often as it takes, and has ended when this does.

        `term` is the office without which it must not run.
        """
        try:
            while True:
                if self._paused:
                    self._become("paused")
                    await self._bell.wait()
                    continue
                if term is not None and not term.held:  # we are about to be cancelled
                    await asyncio.sleep(AGAIN)
                    continue
                self._anew = False
                until = await self._once(term) + time.monotonic()
                while not self._anew and not self._paused and (left := until - time.monotonic()) > 0:
                    await self._bell.wait(left)
        finally:
            self._become("waiting")

    def pause(self) -> None:
        """`Runtime.running()` is false from now on; what runs has its grace, then it is cancelled. Nothing is run
        again until `resume`. Idempotent."""
        self._paused = True
        self._end()

    def resume(self) -> None:
        """Run it again. Nothing, if it was not paused."""
        self._paused = False
        self._bell.ring()

    def restart(self) -> None:
        """Have it end, and begin anew at once; one that is paused stays so."""
        self._anew = True
        self._end()

    async def ended(self) -> None:
        """Until nothing of it runs."""
        await self._idle.wait()

    async def close(self) -> None:
        """Nothing is run again. Idempotent."""
        if self._threads is not None:
            await self._threads.close()
        self._become("stopped")

    # -- one run

    async def _once(self, term: Term | None) -> float:
        """One run from beginning to end; the seconds until the next one."""
        run = self._run = Run(term, self._tail)
        self._idle.clear()
        self._runs += 1
        self._become("running")
        begun = time.monotonic()
        running = asyncio.create_task(self._call(run), name=f"penstock-worker {self.worker.name}")
        try:
            await asyncio.wait([running, run.told], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                self._become("stopping")
                await asyncio.wait([running], timeout=self._grace)
        finally:
            asked = run.told.done()  # then it may end as it likes
            run.end()
            await self._gone(running)
            self._run = None
            self._idle.set()
        error = None if running.cancelled() else running.exception()
        if error is None or asked:
            self._in_a_row = 0
            self._become("resting")
            return self.worker.watch_interval
        self._in_a_row = 1 if time.monotonic() - begun > HEALTHY else self._in_a_row + 1
        return self._failed(run, error)

    def _failed(self, run: Run, error: BaseException) -> float:
        delay = backoff_delay(self._in_a_row, self.worker.backoff, self._rng)
        self._failures += 1
        self._last_error = one_line(error)
        self._become("failing")
        token = current_run.set(run)  # its tail shows it too
        try:
            text = "worker %s has failed, again in %.1f s: %s"
            log.error(text, self.worker.name, delay, self._last_error, exc_info=error)
        finally:
            current_run.reset(token)
        return delay

    async def _call(self, run: Run) -> None:
        current_run.set(run)
        try:
            if self._threads is not None:
                await self._threads.run((), {}, None)
            else:
                await self.worker.function()
        except (SystemExit, KeyboardInterrupt) as error:  # or it would end the event loop
            raise presentable(error) from error

    async def _gone(self, running: asyncio.Task[None]) -> None:
        """Until it has ended, cancelling it again and again; also while this is cancelled itself."""
        cancelled, begun, complained = False, time.monotonic(), False
        while not running.done():
            self._become("stopping")
            running.cancel()
            try:
                await asyncio.wait([running], timeout=AGAIN)
            except asyncio.CancelledError:
                cancelled = True
            if not complained and time.monotonic() - begun > COMPLAIN_AFTER:
                complained = True
                log.error("worker %s does not end, however often it is cancelled", self.worker.name)
        if cancelled:
            raise asyncio.CancelledError

    def _end(self) -> None:
        if self._run is not None:
            self._run.end()
        self._bell.ring()

    def _become(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, time.time()
            self._changed()
