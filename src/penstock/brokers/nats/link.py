"""`Link`: a way to the server, on which a line is opened whenever there is none."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from nats.aio.client import RawCredentials
from nats.errors import Error as NatsError

from penstock.brokers.nats.line import MANY, Line
from penstock.config import URL, mask
from penstock.errors import BrokerError, BrokerRefused, BrokerUnavailable, ConfigError

CONNECT_TIMEOUT = 10.0
"""Seconds for a connection or an answer, unless the URL says `timeout=`."""

OPTIONS: dict[str, Any] = {
    "timeout": float,
    "ping_interval": float,
    "inbox_prefix": str,
    "name": str,
    "servers": str,
    "token": str,
    "creds": str,
    "nkeys_seed": str,
    "cafile": str,
    "certfile": str,
    "keyfile": str,
    "tls_hostname": str,
    "tls_first": bool,
}

INBOX = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
"""What can be the beginning of an inbox's address."""

_HOPELESS = re.compile("CERT|UNKNOWN_CA|WRONG_VERSION|PROTOCOL")
"""In why a handshake failed: it will fail again."""

_PLACE = re.compile(r"[^\s/@?#,]+")
"""What `servers` may name."""
_SEED = re.compile(r"S[A-Z2-7]{57}")
_CREDENTIALS = re.compile(
    rf"BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT.*BEGIN USER NKEY SEED-+\s+({_SEED.pattern})\s", re.DOTALL
)
"""What stands in a file of credentials: a token and a seed."""
_PATH = re.compile(r".*([/\\].*|\.(creds|nk|nkey|seed|key|jwt|txt))")
"""What looks like a file's name."""
_SECRET = re.compile(r"eyJ|BEGIN|\bS[A-Z2-7]{20}")
"""In what is a token, what stands in a file of credentials, or a seed."""
_CREDS = "-----BEGIN NATS USER JWT-----\n{}\n------END\n-----BEGIN USER NKEY SEED-----\n{}\n------END\n"
MAX_LOGIN = 2**16  # bytes of it
MOST_DISCOVERED = 32
"""Servers to remember that the URL does not name."""

_driver_log = logging.getLogger("nats")

OnOpen = Callable[[Line], Awaitable[None]]


class Link:
    """`on_open(line)` is called with each new line before anybody uses it.

    :raises ConfigError: options that cannot be used together.
    """

    def __init__(self, url: str, parts: URL, options: dict[str, Any], on_open: OnOpen) -> None:
        self.timeout = options.get("timeout", CONNECT_TIMEOUT)
        self._shown = mask(url.partition("?")[0])
        self._inbox_prefix = options.get("inbox_prefix", "_INBOX")
        if not INBOX.fullmatch(self._inbox_prefix):
            raise ConfigError(f"inbox_prefix is the beginning of a subject, without wildcards: {self._inbox_prefix!r}")
        self._host = parts.host or "127.0.0.1"
        places = [f"{f'[{self._host}]' if ':' in self._host else self._host}:{parts.port or 4222}"]
        places += [one.strip() for one in options.get("servers", "").split(",") if one.strip()]
        if not all(_PLACE.fullmatch(place) for place in places):
            raise ConfigError("servers are others of the cluster: host:port,host:port")
        self._servers = [f"{parts.scheme}://{place}" for place in places]
        self._discovered: list[str] = []
        self._last = ""
        """The one that had us last."""
        self._creds, self._seed = options.get("creds"), options.get("nkeys_seed")
        self._tls_files = {name: options.get(name) for name in ("cafile", "certfile", "keyfile")}
        self._secure = parts.scheme == "tls" or any(self._tls_files.values())
        if options.get("keyfile") and not options.get("certfile"):
            raise ConfigError("keyfile needs certfile")
        self._driver = _driver_options(parts, options)
        self._driver["connect_timeout"] = self.timeout
        self._on_open = on_open
        self._line: Line | None = None
        self._opening: asyncio.Task[Line] | None = None
        self._proven = False

    @property
    def current(self) -> Line | None:
        """The open line, if there is one."""
        return self._line if self._line is not None and not self._line.closed else None

    async def line(self) -> Line:
        """An open line.

        :raises BrokerUnavailable, BrokerRefused: there is none to be had now.
        """
        line = self.current
        if line is not None:
            return line
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open(), name="penstock-nats-opening")
            self._opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # who waits is told
        opening = self._opening
        try:
            return await asyncio.shield(opening)  # who cannot wait must not have the next one begin at the same server
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not opening.cancelled() or (task is not None and task.cancelling()):
                raise
            raise BrokerUnavailable(f"{self._shown}: it was closed meanwhile") from None

    async def _open(self) -> Line:
        """To the first server that has us and can be worked with. One that greets nobody, is cut off from its cluster
        or refuses us must not keep us from the others; we are refused when all say so that the URL names."""
        if self._line is not None:
            self._learn(self._line.others)
        failures: dict[str, BrokerError] = {}
        for server in self._in_turn():
            try:
                self._line = await self._open_to(server)
                return self._line
            except _OwnFaultError as error:
                raise BrokerRefused(str(error)) from None
            except (BrokerUnavailable, BrokerRefused) as error:
                failures[server] = error
        named = [failures[server] for server in dict.fromkeys(self._servers)]
        is_refused = all(isinstance(error, BrokerRefused) for error in named)
        told = named if is_refused else list(failures.values())
        raise (BrokerRefused if is_refused else BrokerUnavailable)("; ".join(map(str, told)))

    def _learn(self, servers: list[str]) -> None:
        """Remember others of the cluster, the latest that we were told of first."""
        self._discovered = list(dict.fromkeys([*servers, *self._discovered]))[:MOST_DISCOVERED]

    def _in_turn(self) -> list[str]:
        """The servers, the one that had us last behind its like; those that were not named in the URL may be out of
        reach from here."""
        named, found = list(self._servers), [one for one in self._discovered if one not in self._servers]
        for some in (named, found):
            if self._last in some:
                behind = some.index(self._last) + 1
                some[:] = some[behind:] + some[:behind]
        return list(dict.fromkeys(named + found))

    async def _open_to(self, server: str) -> Line:
        if _driver_log.level == logging.NOTSET:
            _driver_log.setLevel(logging.CRITICAL)  # each failure is told once, by us
        line = Line(self._inbox_prefix, self._secure)
        line.proven = self._proven
        shown = self._shown if server == self._servers[0] else server
        try:
            options = {**self._driver, **await self._tls(server), **await self._login()}
            try:
                async with asyncio.timeout(self.timeout):  # the driver tries twice
                    await line.open(servers=[server], **options)
            except (NatsError, OSError, TimeoutError, ValueError) as error:
                raise translate(line.last_error or error, shown) from None
            except ImportError as error:
                raise _OwnFaultError(f"creds and nkeys_seed need pip install 'penstock[nats]': {error}") from None
            except Exception as error:
                if not type(error).__module__.startswith("nkeys"):
                    raise
                raise _OwnFaultError(f"creds or nkeys_seed: {_in_one_line(error)}") from None
            self._last = server
            await self._on_open(line)
        except BaseException as error:
            await line.close()
            if isinstance(error, BrokerError):
                raise _said(error, shown) from None
            raise
        self._learn([*line.others, server])
        self._proven = line.proven = True
        return line

    async def _tls(self, server: str) -> dict[str, Any]:
        """:raises BrokerRefused: files that are none, or do not belong together."""
        if not self._secure:
            return {}
        try:
            options: dict[str, Any] = {"tls": await asyncio.to_thread(_context, **self._tls_files)}
        except (OSError, ValueError) as error:
            raise _OwnFaultError(f"cafile, certfile or keyfile: {_in_one_line(error)}") from None
        if server not in self._servers and _is_ip(urlsplit(server).hostname) and "tls_hostname" not in self._driver:
            options["tls_hostname"] = self._host  # certificates have names, and servers tell of each other by numbers
        return options

    async def _login(self) -> dict[str, Any]:
        """Read anew for each connection: a token does not live for ever. Even a server that asks for no login has the
        file looked at.

        :raises BrokerRefused: there is no such file, or no login in it.
        """
        login: dict[str, Any] = {}
        if self._creds is not None:
            found = _CREDENTIALS.search(await _read("creds", self._creds) + "\n")
            if found is None:
                raise _OwnFaultError(f"creds:{_named(self._creds)} holds no user's token and seed")
            login["user_credentials"] = RawCredentials(_CREDS.format(*found.groups()))
        if self._seed is not None:
            seed = self._seed if _SEED.fullmatch(self._seed) else (await _read("nkeys_seed", self._seed)).strip()
            if not _SEED.fullmatch(seed):
                raise _OwnFaultError(f"nkeys_seed:{_named(self._seed)} holds no seed")
            login["nkeys_seed_str"] = seed
        return login

    async def close(self) -> None:
        """Idempotent; another `line()` opens again. Whoever waits for a line that is being opened gets none."""
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        line, self._line = self._line, None
        if line is not None:
            await line.close()


class _OwnFaultError(BrokerRefused):
    """It is a file of ours: no server could have us."""


def _said(error: BrokerError, shown: str) -> BrokerError:
    """The same with the server's address before it."""
    text = str(error)
    return error if shown in text else type(error)(f"{shown}: {text}")


def translate(error: BaseException, shown: str) -> BrokerError:
    """What the driver says of a connection that could not be made, as one of ours, in one line."""
    text = _in_one_line(error)
    lower = text.lower()
    if "authorization" in lower or "authentication" in lower:
        return BrokerRefused(f"{shown} refuses the login: {text}")
    if isinstance(error, ssl.SSLError) and _HOPELESS.search(error.reason or ""):
        return BrokerRefused(f"{shown}: {text}")
    if isinstance(error, ssl.SSLCertVerificationError | FileNotFoundError):
        return BrokerRefused(f"{shown}: {text}")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return BrokerRefused(f"{shown}: {text}")
    if isinstance(error, NatsError) and any(word in lower for word in ("invalid", "nkeys", "credentials")):
        return BrokerRefused(f"{shown}: {text}")
    if MANY in lower:
        return BrokerUnavailable(f"{shown}: the server has as many connections as it may have")
    if isinstance(error, TimeoutError) and text in ("", "timeout"):
        text = "no answer in time"
    return BrokerUnavailable(f"{shown}: {text or type(error).__name__}")


async def _read(option: str, file: str) -> str:
    """:raises BrokerRefused: it cannot be."""

    def read() -> bytes:
        with open(file, "rb") as opened:
            return opened.read(MAX_LOGIN)

    try:
        return (await asyncio.to_thread(read)).decode(errors="replace")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no file's name"
        raise _OwnFaultError(f"{option}:{_named(file)} {why}") from None


def _named(file: str) -> str:
    """A file's name; nothing where it may be a secret that somebody gave instead of one."""
    return f" {file}" if _PATH.fullmatch(file) and not _SECRET.search(file) else ""


def _is_ip(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("nats: ").strip("'")


def _driver_options(parts: URL, options: dict[str, Any]) -> dict[str, Any]:
    """What the driver's `connect` takes."""
    made: dict[str, Any] = {
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": 0,
        "ping_interval": options.get("ping_interval", 10.0),
        "max_outstanding_pings": 2,
        "name": options.get("name", "penstock"),
        "pending_size": 0,  # ours is `Line.room`
        "dont_randomize": True,
    }
    if parts.user is not None and parts.password is None:
        made["token"] = parts.user  # nats://TOKEN@host, as NATS's own tools write it
    elif parts.user is not None:
        made.update(user=parts.user, password=parts.password)
    renamed = {
        "token": "token",
        "tls_hostname": "tls_hostname",
        "tls_first": "tls_handshake_first",
    }
    made.update({theirs: options[ours] for ours, theirs in renamed.items() if ours in options})
    return made


def _context(cafile: str | None, certfile: str | None, keyfile: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cafile)
    if certfile:
        context.load_cert_chain(certfile, keyfile)
    return context
