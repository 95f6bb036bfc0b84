"""How the process stands, told to systemd over `$NOTIFY_SOCKET` (sd_notify). Elsewhere nothing is said."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Self

log = logging.getLogger("penstock.node")

OFTEN = 3  # words within the time after which systemd takes the process for dead


class Notify:
    """`async with` it around what runs. Meanwhile the watchdog hears that the event loop turns, from the first
    moment to the last; `ready` and `stopping` say the rest. For one event loop.

    A service manager that cannot be reached changes nothing.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._within = _watchdog(environ)
        self._socket: socket.socket | None = None
        self._next: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            if self._within:
                self._beat()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._next.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self) -> None:
        """The start is over."""
        self._say("READY=1")

    def stopping(self) -> None:
        """The end has begun, and the process will be gone when it is over."""
        self._say("STOPPING=1")

    def _beat(self) -> None:
        """A timer of the loop and nothing else: a loop that is held up is silent."""
        self._say("WATCHDOG=1")
        self._next = asyncio.get_running_loop().call_later(self._within / OFTEN, self._beat)

    def _say(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as error:
            log.debug("systemd was not told %s: %s", text, error)


def _address(text: str) -> str:
    """A path, or an abstract name (`@`); empty: there is nobody to tell."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") and hasattr(socket, "AF_UNIX") else ""


def _watchdog(environ: Mapping[str, str]) -> float:
    """Seconds within which this process has to be heard; 0: nobody minds."""
    try:
        meant = int(environ.get("WATCHDOG_PID") or os.getpid())
        within = int(environ.get("WATCHDOG_USEC") or 0) / 1e6
    except ValueError:
        return 0.0
    return max(within, 0.0) if meant == os.getpid() else 0.0
