"""How far a run is: what its function says, written down now and then."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from penstock.errors import BrokerError, StoreRequired, one_line
from penstock.stores.ledger import Held, Ledger

if TYPE_CHECKING:
    from penstock.tasks.transaction import Transaction

log = logging.getLogger("penstock.tasks")

EVERY = 0.5
"""Seconds between two times that it is written; what is said in between is superseded."""


class Progress:
    """`progress(done, total)`, from any thread. The latest is written soon; `close` waits for a write under way,
    so that it does not meet the run's end."""

    def __init__(self, ledger: Ledger, held: Held) -> None:
        self.ledger = ledger
        self.held = held
        self.loop = asyncio.get_running_loop()
        self.transaction: Transaction | None = None
        """The one that the run has begun."""
        self._latest: tuple[float, float] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._over = False

    def __call__(self, done: float, total: float) -> None:
        self._latest = (done, total)
        if self._writing is None and not self._over:
            self.loop.call_soon_threadsafe(self._begin)

    @property
    def over(self) -> bool:
        """The run has ended."""
        return self._over

    def stop(self) -> None:
        """Write no more."""
        self._over = True
        if self._writing is not None:
            self._writing.cancel()

    async def close(self) -> None:
        """Write no more; the latest goes with the run's end."""
        self.stop()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._latest is not None:
            self.held.state.progress = self._latest

    def _begin(self) -> None:
        if self._writing is None and not self._over:
            self._writing = asyncio.create_task(self._write(), name="penstock-progress")

    async def _write(self) -> None:
        written = None
        while self._latest is not None and self._latest != written:
            written = self._latest
            try:
                await self.ledger.progress(self.held, *written)
            except BrokerError as error:
                log.debug("progress of %s is not written: %s", self.held.taskid, one_line(error))
            await asyncio.sleep(EVERY)
        self._writing = None


def nowhere(done: float, total: float) -> None:
    """:raises StoreRequired: always."""
    raise StoreRequired("progress()")


def unheard(done: float, total: float) -> None:
    """Nobody looks: a call has no record."""
