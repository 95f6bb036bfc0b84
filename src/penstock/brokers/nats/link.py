"""`Link`: a way to the server, on which a line is opened whenever there is none."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

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

_CREDENTIALS = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")
"""What stands in a file of credentials."""
MAX_LOGIN = 2**16  # bytes of it

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
        self._servers = [_address(parts, f"{parts.host or '127.0.0.1'}:{parts.port or 4222}")]
        self._servers += [_address(parts, one) for one in options.get("servers", "").split(",") if one]
        self._discovered: list[str] = []
        self._tls_files = {name: options.get(name) for name in ("cafile", "certfile", "keyfile")}
        self._secure = parts.scheme == "tls" or any(self._tls_files.values())
        if options.get("keyfile") and not options.get("certfile"):
            raise ConfigError("keyfile needs certfile")
        self._driver = _driver_options(parts, options)
        self._driver["connect_timeout"] = self.timeout
        self._on_open = on_open
        self._line: Line | None = None
        self._opening = asyncio.Lock()
        self._closings = 0
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
        async with self._opening:
            line = self.current
            if line is None:
                line = self._line = await self._open()
            return line

    async def _open(self) -> Line:
        if _driver_log.level == logging.NOTSET:
            _driver_log.setLevel(logging.CRITICAL)  # each failure is told once, by us
        line = Line(self._inbox_prefix, self._secure)
        line.proven = self._proven
        closings = self._closings
        try:
            options = {**self._driver, **await self._tls()}
            await self._check_login()
            try:
                async with asyncio.timeout(2 * self.timeout + 1):
                    await line.open(servers=[*self._servers, *self._discovered], **options)
            except (NatsError, OSError, TimeoutError, ValueError) as error:
                raise self.translate(line.last_error or error) from None
            except ImportError as error:
                raise BrokerRefused(f"creds and nkeys_seed need pip install 'penstock[nats]': {error}") from None
            except Exception as error:
                if not type(error).__module__.startswith("nkeys"):
                    raise
                raise BrokerRefused(f"{self._shown}: creds or nkeys_seed: {_in_one_line(error)}") from None
            await self._on_open(line)
            if closings != self._closings:
                raise BrokerUnavailable("it was closed meanwhile")
        except BaseException as error:
            await line.close()
            if isinstance(error, BrokerError):
                raise self.say(error) from None
            raise
        self._discovered = line.others
        self._proven = line.proven = True
        return line

    async def _tls(self) -> dict[str, Any]:
        """:raises BrokerRefused: files that are none, or do not belong together."""
        if not self._secure:
            return {}
        try:
            return {"tls": await asyncio.to_thread(_context, **self._tls_files)}
        except (OSError, ValueError) as error:
            raise BrokerRefused(f"cafile, certfile or keyfile: {_in_one_line(error)}") from None

    async def _check_login(self) -> None:
        """A server that asks for no login would never have the file looked at.

        :raises BrokerRefused: there is no such file, or no login in it.
        """
        creds = self._driver.get("user_credentials")
        if creds is None:
            return
        try:
            held = await asyncio.to_thread(_read, creds)
        except OSError as error:
            raise BrokerRefused(f"creds: {creds}: {error.strerror}") from None
        if not all(mark in held for mark in _CREDENTIALS):
            raise BrokerRefused(f"creds: {creds} holds no user's token and seed")

    async def close(self) -> None:
        """Idempotent; another `line()` opens again. A line that is being opened is closed as soon as it is there."""
        self._closings += 1
        line, self._line = self._line, None
        if line is not None:
            await line.close()

    def say(self, error: BrokerError) -> BrokerError:
        """The same with the server's address before it."""
        text = str(error)
        return error if self._shown in text else type(error)(f"{self._shown}: {text}")

    def translate(self, error: BaseException) -> BrokerError:
        """What the driver says of a connection that could not be made, as one of ours, in one line."""
        text = _in_one_line(error)
        lower = text.lower()
        if "authorization" in lower or "authentication" in lower:
            return BrokerRefused(f"{self._shown} refuses the login: {text}")
        if isinstance(error, ssl.SSLError) and _HOPELESS.search(error.reason or ""):
            return BrokerRefused(f"{self._shown}: {text}")
        if isinstance(error, ssl.SSLCertVerificationError | FileNotFoundError):
            return BrokerRefused(f"{self._shown}: {text}")
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            return BrokerRefused(f"{self._shown}: {text}")
        if isinstance(error, NatsError) and any(word in lower for word in ("invalid", "nkeys", "credentials")):
            return BrokerRefused(f"{self._shown}: {text}")
        if MANY in lower:
            return BrokerUnavailable(f"{self._shown}: the server has as many connections as it may have")
        if isinstance(error, TimeoutError) and text in ("", "timeout"):
            text = "no answer in time"
        return BrokerUnavailable(f"{self._shown}: {text or type(error).__name__}")


def _read(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(MAX_LOGIN)


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("nats: ").strip("'")


def _address(parts: URL, place: str) -> str:
    return f"{parts.scheme}://{place}"


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
        "creds": "user_credentials",
        "nkeys_seed": "nkeys_seed",
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
