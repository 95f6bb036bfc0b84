"""The watchdog: names the code that keeps the event loop from turning."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Self

log = logging.getLogger("penstock.watchdog")

BLOCKED_AFTER = 2.0  # seconds without a turn of the loop
TICK = 0.5


class Watchdog:
    """While entered, a thread watches the running event loop.

    A loop that has not turned for two seconds is reported once, with the line of code it is stuck in;
    so is the moment when it turns again.
    """

    def __init__(self, blocked_after: float = BLOCKED_AFTER) -> None:
        self._blocked_after = blocked_after
        self._turned = 0.0
        self._loop_thread = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._loop_thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()
        self._turn()
        self._thread = threading.Thread(target=self._watch, name="penstock-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.join()

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(TICK, self._turn)

    def _watch(self) -> None:
        blocked_since = 0.0
        last_look = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            stopped, last_look = now - last_look > self._blocked_after, now
            if stopped:
                continue  # the whole process stood still; the loop is not to blame
            if now - self._turned < self._blocked_after:
                if blocked_since:
                    log.warning("the event loop turns again after %.1f s", self._turned - blocked_since)
                blocked_since = 0.0
            elif not blocked_since:
                blocked_since = self._turned
                log.error(
                    "the event loop has been blocked for %.1f s by %s; move such work to a plain def or a thread",
                    now - self._turned,
                    self._culprit(),
                )

    def _culprit(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._loop_thread)
        if frame is None:
            return "an unknown frame"
        stack = traceback.extract_stack(frame)
        last = stack[-1]
        where = f"{last.name} ({last.filename}:{last.lineno})\n" + "".join(traceback.format_list(stack[-4:])).rstrip()
        task = None if self._loop is None else asyncio.current_task(self._loop)
        return where if task is None or task.get_name().startswith("Task-") else f"{task.get_name()}, in {where}"
