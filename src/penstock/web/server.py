"""`serving`: a node's HTTP in the node's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn

from penstock.control import tokens
from penstock.control.tokens import Told
from penstock.errors import BrokerUnavailable, ConfigError
from penstock.web import keys, pages
from penstock.web.access import Access
from penstock.web.desk import Desk
from penstock.web.gate import ANY_HOST, Gate
from penstock.web.hosts import Hosts, check_name
from penstock.web.protocol import Protocol
from penstock.web.roles import SIGN_IN, Role
from penstock.web.site import Site

log = logging.getLogger("penstock.web")

HOST, PORT = "127.0.0.1", 8470
GRACE = 5.0
"""Seconds that requests under way may still take when the node stops."""
LAST_WAIT = 2.0  # seconds for what was cancelled
STARTED_YET = 0.25  # seconds between two looks
MOST_CONNECTIONS = 1000
ENVELOPE = 65_536
"""Bytes that a request may have beyond the largest body of a message."""
BACKLOG = 2048
WEBSOCKET_MESSAGE = 2**20  # bytes
SCRAPED = frozenset({"/metrics"})
"""Asked for by whatever name, where whoever can connect may read it anyway. On loopback only programs of this machine
are, which know its name: there a page whose name was bound to this machine shall not read the names of queues."""


class Serving:
    """HTTP that is being served."""

    def __init__(self, url: str, port: int, site: Site, *, made: bool) -> None:
        self.url = url
        self.port = port
        self.made = made
        """Nobody configured a token: one was made up, and is in the file of `control.tokens`."""
        self._site = site

    def sign_in_link(self, role: Role = Role.EDIT) -> str:
        """A link that lets one browser in, once, within a quarter of an hour."""
        return f"{self.url}{SIGN_IN}?code={self._site.access.invite(role)}"


@asynccontextmanager
async def serving(
    desk: Desk,
    host: str = HOST,
    port: int = PORT,
    *,
    hosts: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
    grace: float = GRACE,
) -> AsyncIterator[Serving]:
    """Serve a node until the end of the block, started or not yet; the end takes at most `grace` seconds and a few.

    `port` 0: any free one. `hosts`: further names that it answers to. `folder`: where a token that was made up
    is kept (`control.tokens`). `desk.url` and `desk.token` are set meanwhile.

    :raises ConfigError: a port that is in use, an address that is none of this machine's; one that is not
        loopback, without a token that somebody configured; a token that cannot be one; a name that no host has.
    """
    hosts = [check_name(name) for name in hosts]
    environ = os.environ if environ is None else environ
    found = await asyncio.to_thread(keys.read, environ)
    address = await _resolve(host, port)
    if found.made and not address.is_loopback:
        raise ConfigError(
            f"{host} is open to other machines: set PENSTOCK_TOKEN (or PENSTOCK_TOKEN_FILE) to serve there"
        )
    listener = _listen(host, str(address), port)
    try:
        port = listener.getsockname()[1]
        shown = socket.gethostname() if address.is_unspecified else host.strip("[]")
        url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
        access = Access(found.tokens)
        own = [shown, str(address), *hosts, *([] if address.is_loopback else [socket.gethostname()])]
        site = Site(desk, access, f"penstock-{port}", desk.app.max_body + ENVELOPE)
        allowed = Hosts(own, any_address=address.is_unspecified)
        any_host = ANY_HOST if address.is_loopback else ANY_HOST | SCRAPED
        gate = Gate(pages.Pages(site), access, allowed, site.cookie, site.max_body, any_host=any_host)
        site.counts = lambda: gate.counts
        site.tokens = frozenset(found.tokens.values())
        server = _Server(_configuration(gate, grace))
        task = asyncio.create_task(server.serve([listener]), name="penstock-http")
    except BaseException:
        listener.close()
        raise
    reached = _own(listener) if address.is_unspecified else url
    told = Told(reached, found.tokens[Role.EDIT] if found.made else None, os.getpid())
    sampling = asyncio.create_task(_sample(site), name="penstock-metrics")
    try:
        await server.begun(task)
        with contextlib.nullcontext() if found.made else contextlib.suppress(ConfigError):  # else it is a help alone
            await asyncio.to_thread(tokens.write, told, folder)
        desk.url, desk.token = url, found.tokens[Role.EDIT]
        desk.own_url = _own(listener)
        log.info("serving HTTP at %s", url)
        yield Serving(url, port, site, made=found.made)
    finally:
        desk.url = desk.own_url = desk.token = None
        sampling.cancel()
        await server.end(task, grace)
        await asyncio.gather(sampling, return_exceptions=True)
        await asyncio.to_thread(tokens.remove, told, folder)


async def _sample(site: Site) -> None:
    """Take samples, from when the node has started."""
    while True:
        try:
            metrics = site.metrics
        except BrokerUnavailable:
            await asyncio.sleep(STARTED_YET)
        else:
            await metrics.run()


async def _resolve(host: str, port: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address to listen on; of several IPv4's.

    :raises ConfigError: a name that nobody knows.
    """
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host.strip("[]") or "?", port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError):
        raise ConfigError(f"{host!r} is no host of this machine: give an address such as {HOST} or 0.0.0.0") from None
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return ipaddress.ip_address(str(infos[0][4][0]).partition("%")[0])


def _own(listener: socket.socket) -> str:
    """Where the node reaches itself: the address that it listens on, or loopback; no name that may lead elsewhere."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def _listen(host: str, address: str, port: int) -> socket.socket:
    """:raises ConfigError: the port is in use, or not to be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The protocol is named: else asyncio takes it for none of TCP's, and each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OverflowError:
        listener.close()
        raise ConfigError(f"port {port} is not one: 0 to 65535") from None
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            why = "is in use: stop what listens there (another node?), or choose another one with --port"
        else:
            why = f"cannot be listened on: {error.strerror or error}"
        raise ConfigError(f"port {port} of {host} {why}") from None
    return listener


def _configuration(gate: Gate, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        gate,
        http=Protocol,
        ws="websockets-sansio",
        ws_max_size=WEBSOCKET_MESSAGE,
        interface="asgi3",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(grace),
    )


def _is_fault(record: logging.LogRecord) -> bool:
    """uvicorn takes a WebSocket that was refused with an answer for one that was forgotten."""
    return record.msg != "ASGI callable returned without completing handshake."


class _Server(uvicorn.Server):
    """uvicorn as a guest: signals are the node's, and so is the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_fault)
        self._up = asyncio.Event()
        self._ending = asyncio.Event()

    async def main_loop(self) -> None:
        """Once a second, for the date in its answers; uvicorn's own wakes up ten times."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._ending.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            raise RuntimeError("HTTP could not be started") from None
        self._up.set()

    async def begun(self, task: asyncio.Task[None]) -> None:
        """Wait until it serves."""
        up = asyncio.create_task(self._up.wait())
        try:
            await asyncio.wait((up, task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if task.done():
            await task
            raise RuntimeError("HTTP ended at its start")

    async def end(self, task: asyncio.Task[None], grace: float) -> None:
        """Stop accepting, let what is under way end, then cut what is left."""
        self.should_exit = True
        self._ending.set()
        _, late = await asyncio.wait((task,), timeout=grace + LAST_WAIT)
        if late:
            task.cancel()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        left = {*self.server_state.tasks, task}
        for one in left - {task}:
            one.cancel()
        await asyncio.wait(left, timeout=LAST_WAIT)
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.error("HTTP failed", exc_info=error)
