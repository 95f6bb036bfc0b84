"""Asking a node over HTTP: what it answers, or one line that says why it does not."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

import penstock
from penstock import config
from penstock.cli.command import Call
from penstock.cli.places import EXAMPLE, VARIABLE, place_of
from penstock.config import mask
from penstock.control import tokens
from penstock.control.tokens import Told
from penstock.errors import ConfigError, PenstockError, one_line

if TYPE_CHECKING:
    from websockets.sync.connection import Connection

T = TypeVar("T")

CONNECT, ANSWER = 5.0, 30.0  # seconds
PONG = 120.0  # seconds that the loop of a node may be held up before a WebSocket to it counts as broken
CLOSE = 2.0  # seconds for a WebSocket's end
MOST = 256 * 2**20  # bytes of an answer


class NodeError(PenstockError):
    """A node that does not answer, or not as a node does."""


class Refusal(NodeError):
    """A node that would not do what it was asked."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class Error(msgspec.Struct):
    """The body of a refusal, as far as it is understood."""

    detail: Any = None
    problems: list[dict[str, Any]] = []


class Remote:
    """A node at a URL.

    :raises ConfigError: a URL that no node can have, a token that no header can hold.
    """

    def __init__(self, url: str, token: str | None, source: str = VARIABLE) -> None:
        self._secure, self._host, self._port, self._prefix = place_of(url)
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
            raise ConfigError(f"{source} must be printable ASCII without spaces")
        self._token, self._source = token or None, source
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{'https' if self._secure else 'http'}://{host}:{self._port}{self._prefix}"

    def get(self, path: str, type: type[T], **query: Any) -> T:
        """What is there.

        :raises Refusal: the node says why.
        :raises NodeError: it does not answer in time, or is none.
        """
        wanted = {name: value for name, value in query.items() if value is not None}
        return self._ask("GET", f"{path}?{urlencode(wanted)}" if wanted else path, None, type)

    def post(self, path: str, type: type[T], body: Any = None) -> T:
        """The same of something done."""
        return self._ask("POST", path, None if body is None else msgspec.json.encode(body), type)

    @contextlib.contextmanager
    def connected(self, path: str) -> Iterator[Connection]:
        """A WebSocket there, until the end of the block.

        :raises Refusal: the node says why not.
        :raises NodeError: it does not answer in time, or is none.
        :raises ConfigError: this machine lacks what that needs.
        """
        try:
            from websockets.exceptions import InvalidHandshake, InvalidStatus
            from websockets.sync.client import connect
        except ImportError:
            raise ConfigError("a shell needs websockets: pip install 'penstock[server]'") from None
        url = f"{'wss' if self._secure else 'ws'}{self.url[self.url.index(':') :]}{path}"
        try:  # a wire of our own: no proxy and no redirection takes the token elsewhere
            wire = socket.create_connection((self._host, self._port), CONNECT)
        except OSError as error:
            raise NodeError(self._unreached(error, False)) from None
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(
                    connect(
                        url,
                        sock=wire,
                        additional_headers=self._headers,
                        user_agent_header=None,
                        open_timeout=ANSWER,
                        ping_timeout=PONG,
                        close_timeout=CLOSE,
                        max_size=MOST,
                    )
                )
            except InvalidStatus as error:
                answer = error.response
                status, body = answer.status_code, bytes(answer.body or b"")
                raise Refusal(status, self._why(status, body, f"WebSocket {path}")) from None
            except (OSError, EOFError, ValueError, InvalidHandshake) as error:
                wire.close()
                raise NodeError(self._unreached(error, isinstance(error, TimeoutError))) from None
            yield connection

    def _ask(self, method: str, path: str, body: bytes | None, type: type[T]) -> T:
        status, location, data = self._exchange(method, self._prefix + path, body)
        if 300 <= status < 400:
            raise NodeError(f"{self.url} is somewhere else: --url {mask(location) or '?'}")
        if not 200 <= status < 300:
            raise Refusal(status, self._why(status, data, f"{method} {path.partition('?')[0]}"))
        try:
            return msgspec.json.decode(data, type=type)
        except (msgspec.DecodeError, UnicodeError) as error:
            text = one_line(error)
            raise NodeError(f"{self.url} does not answer {method} {path} as a node does: {text}") from None

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        """Status, location and body. However slowly they arrive, it does not last longer than `ANSWER`."""
        headers = self._headers
        if body is not None:
            headers["Content-Type"] = "application/json"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT)
        late = threading.Event()
        timer: threading.Timer | None = None
        try:
            connection.connect()
            wire: socket.socket = connection.sock
            wire.settimeout(ANSWER)
            timer = threading.Timer(ANSWER, _cut, (wire, late))
            timer.daemon = True
            timer.start()
            connection.request(method, path, body, headers)
            with connection.getresponse() as response:
                data = response.read(MOST + 1)
                if response.length and len(data) <= MOST:
                    raise http.client.IncompleteRead(data, response.length)
                found = response.status, response.headers.get("Location") or "", data
        except (OSError, http.client.HTTPException) as error:
            raise NodeError(self._unreached(error, late.is_set())) from None
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if late.is_set():
            raise NodeError(self._unreached(TimeoutError(), True))
        if len(data) > MOST:
            raise NodeError(f"{self.url} answers {path} with more than {MOST // 2**20} MiB")
        return found

    @property
    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": f"penstock/{penstock.__version__}"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _unreached(self, error: Exception, late: bool) -> str:
        if late:
            return f"the node at {self.url} did not answer within {ANSWER:g} s"
        if isinstance(error, ConnectionRefusedError):
            return f"no node answers at {self.url}: is `penstock serve` running there? (--url says where else)"
        if isinstance(error, socket.gaierror):
            return f"no node at {self.url}: the host is not known ({error.strerror})"
        if isinstance(error, TimeoutError):
            return f"no node answers at {self.url} within {CONNECT:g} s"
        if isinstance(error, OSError):
            return f"no node answers at {self.url}: {error.strerror or one_line(error)}"
        return f"{self.url} does not speak HTTP as a node does: {one_line(error)}"

    def _why(self, status: int, data: bytes, what: str) -> str:
        """The one line that a refusal is."""
        if status == 401:
            if self._token is None:
                return f"the node at {self.url} wants a token: set {VARIABLE} or {VARIABLE}_FILE"
            return f"the node at {self.url} does not take the token of {self._source}"
        try:
            told = msgspec.json.decode(data, type=Error)
        except (msgspec.DecodeError, UnicodeError):
            told = Error()
        if not isinstance(told.detail, str) or not told.detail:
            if status == 404:
                return f"{self.url} has no {what}: is it a node of Penstock?"
            return f"{self.url} answers {what} with status {status}{_reason(status)}"
        problems = "; ".join(_problem(one) for one in told.problems)
        if problems:
            return problems
        return told.detail if status < 500 else f"the node at {self.url} answers {status}: {told.detail}"


def asked(call: Call) -> Remote | None:
    """The node that a command is told to ask; None: it is told of none.

    :raises ConfigError: a URL or a token that cannot be.
    """
    if call.node_url is None:
        return None
    if call.node_from_file and not tokens.is_local(call.node_url):
        raise ConfigError(
            f"{mask(call.node_url)} is what a {config.FILE} says: to send a token there give --url or PENSTOCK_URL"
        )
    return _remote(call.node_url, None)


def required(call: Call) -> Remote:
    """That, else the one that runs on this machine, at its usual port if it has left no word of itself.

    :raises ConfigError: a URL or a token that cannot be.
    """
    told = asked(call)
    if told is not None:
        return told
    here = tokens.find(None)
    return _remote(EXAMPLE if here is None else here.url, here)


def part(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")


def _remote(url: str, here: Told | None) -> Remote:
    token = config.secret(VARIABLE, os.environ)
    if token:
        return Remote(url, token, VARIABLE if os.environ.get(VARIABLE) else f"{VARIABLE}_FILE")
    remote = Remote(url, None)  # refuses what can be no URL
    here = here or tokens.find(url)
    return remote if here is None else Remote(url, here.token, "the node that was started there")


def _cut(wire: socket.socket, late: threading.Event) -> None:
    """End whatever waits for this connection."""
    late.set()
    with contextlib.suppress(OSError):  # it has just ended
        wire.shutdown(socket.SHUT_RDWR)


def _problem(one: dict[str, Any]) -> str:
    place = ":".join(str(one[name]) for name in ("file", "line") if one.get(name) is not None)
    return f"{place}: {one.get('text')}" if place else str(one.get("text"))


def _reason(status: int) -> str:
    reason = http.client.responses.get(status)
    return f" ({reason})" if reason else ""
