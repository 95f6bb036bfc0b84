"""`Runtime`: what a resident function may ask about itself."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.workers.resident import Run

current_run: ContextVar[Run | None] = ContextVar("penstock_worker_run", default=None)


class Runtime:
    """For loops that are to end in time: `while Runtime.running(): …`."""

    @staticmethod
    def running() -> bool:
        """Whether the worker that asks is to go on. False at the stop, when it is replaced or paused, and once
        another process may have become the one that runs it. True outside a worker."""
        run = current_run.get()
        return run is None or run.wanted

    @staticmethod
    def epoch() -> int | None:
        """Of a `single` worker: a number that is higher than that of every run of it in another process before.
        To be handed on to whatever should refuse what a halted predecessor writes late. Else None."""
        run = current_run.get()
        return None if run is None else run.epoch
