"""The gate: one ASGI middleware over everything, HTTP and WebSockets, before anything of a request is parsed.

In this order: is it us that is asked (`Host`), who asks, may they, does one of our own pages ask (`Origin`,
`Sec-Fetch-Site`), is it too much. What is not open is refused by default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.errors import PenstockError, one_line
from penstock.web import answers
from penstock.web.access import Access, Caller
from penstock.web.answers import Refused
from penstock.web.hosts import Hosts
from penstock.web.roles import SAFE, SIGN_IN, Role, required
from penstock.web.site import CALLER

log = logging.getLogger("penstock.web")

HEADERS: Mapping[bytes, bytes] = {
    b"content-security-policy": b"default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
"""In every answer, unless the route says otherwise."""

ANY_HOST = frozenset({"/livez", "/readyz"})
"""Orchestrators ask for these by whatever address, and they say nothing that matters."""
MOST_OPEN = 16_384
"""Bytes of a body where everybody may send one."""

_ONCE = (b"host", b"origin", b"authorization", b"content-length", b"sec-fetch-site")
"""Headers of which two are one too many."""


class Head(msgspec.Struct):
    """What the gate reads of a request."""

    method: str
    path: str
    scheme: str
    host: str | None
    origin: str | None
    site: str | None
    """`Sec-Fetch-Site`: from where a browser was told to ask."""
    authorization: str | None
    cookie: str
    address: str
    length: str | None
    encoding: str
    body: bool


class Gate:
    """Lets in who may come in, and answers everybody else."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        hosts: Hosts,
        cookie: str,
        max_body: int,
        *,
        any_host: frozenset[str] = ANY_HOST,
    ) -> None:
        """`any_host`: paths that are answered whatever the `Host`."""
        self._app = app
        self._access = access
        self._hosts = hosts
        self._cookie = cookie
        self._max_body = max_body
        self._any_host = any_host
        self.counts = {"http_requests": 0, "http_refused": 0, "http_failed": 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        answer = _Answering(send, websocket=scope["type"] == "websocket")
        self.counts["http_requests"] += 1
        try:
            head = _head(scope)
            caller = self.admit(head)
            if caller is not None:
                scope[CALLER] = caller
            counted = _Counted(receive, self._limit(caller)) if head.body else receive
            await self._app(scope, counted, answer)
        except Refused as refused:
            self.counts["http_refused"] += 1
            await answer.refuse(scope, refused)
        except Exception as error:
            self.counts["http_failed"] += 1
            log.exception("%s %s failed", scope.get("method", "WEBSOCKET"), _printable(scope["path"]))
            told = answers.line(str(error)) if isinstance(error, PenstockError) else "an error of the node: see its log"
            await answer.refuse(scope, Refused(500, told))

    def admit(self, head: Head) -> Caller | None:
        """Who is let in; None: somebody, to what is open.

        :raises Refused: nobody is.
        """
        host = head.host or ""
        if head.path not in self._any_host and not self._hosts.allows(host):
            raise Refused(400, f"this node does not answer to the host {host!r}")
        if "\0" in head.path:
            raise Refused(400, "a path holds no null character")
        role = required(head.method, head.path)
        caller = None
        if role is not None:
            caller = self._caller(head)
            if caller.role < role:
                raise Refused(403, f"this needs the role {role.name.lower()}, not {caller.role.name.lower()}")
        self._check_origin(head, caller)
        if head.encoding not in ("", "identity"):
            raise Refused(415, f"a body is sent as it is, not as {head.encoding!r}")
        limit = self._limit(caller)
        if head.length is not None and (not _is_number(head.length) or int(head.length) > limit):
            raise _too_large(limit)
        return caller

    def _limit(self, caller: Caller | None) -> int:
        """Bytes that a body may have."""
        return min(self._max_body, MOST_OPEN) if caller is None else self._max_body

    def _caller(self, head: Head) -> Caller:
        """:raises Refused: neither a token nor a session of ours."""
        if head.authorization is not None:
            return self._bearer(head.authorization, head.address)
        secret = cookie_of(head.cookie, self._cookie)
        role = None if secret is None else self._access.session(secret)
        if role is None:
            raise _unknown("no token" if secret is None else "the session is over")
        return Caller(role, "session", head.address)

    def _bearer(self, authorization: str, address: str) -> Caller:
        """:raises Refused: a wrong token, or one that could be guessed after too many wrong ones."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unknown("it is `Authorization: Bearer TOKEN` that is wanted")
        role = try_token(self._access, token.strip(), address)
        if role is None:
            raise _unknown("wrong token")
        return Caller(role, "token", address)

    def _check_origin(self, head: Head, caller: Caller | None) -> None:
        """:raises Refused: a page of another site has a browser ask, or might have."""
        if head.method in SAFE:
            return
        if head.origin is not None and not self._hosts.same_origin(head.origin, head.host or "", head.scheme):
            raise Refused(403, f"a page of {head.origin!r} may not ask for this")
        if head.site is not None and head.site != "same-origin":
            raise Refused(403, "a page of another site may not ask for this")
        by_browser = head.path == SIGN_IN or (caller is not None and caller.by == "session")
        known = head.origin is not None or (head.site is not None and head.method != "WEBSOCKET")
        if by_browser and not known:
            raise Refused(403, "a browser asks for this from a page of this node, and says so (Origin)")


def try_token(access: Access, token: str, address: str) -> Role | None:
    """The role of a token; a wrong one is counted.

    :raises Refused: too many wrong ones came from there; then only what cannot be guessed is heard.
    """
    wait = access.failures.wait(address)
    role = access.role_of(token, strong=wait > 0)
    if role is None:
        if wait > 0:
            raise Refused(429, "too many wrong tokens: try again later", {"Retry-After": str(int(wait) + 1)})
        access.failures.count(address)
        log.warning("a wrong token from %s", _printable(address))
    return role


def cookie_of(header: str, name: str) -> str | None:
    """A cookie's value. The first of that name: it has the longest path."""
    for part in header.split(";"):
        key, equals, value = part.strip().partition("=")
        if equals and key == name:
            return value
    return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def _unknown(why: str) -> Refused:
    return Refused(401, f"unauthorized: {why}", {"WWW-Authenticate": 'Bearer realm="penstock"'})


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is over the ceiling of {limit} bytes")


def _head(scope: Scope) -> Head:
    """:raises Refused: a header that must be there once is there twice."""
    found: dict[bytes, bytes] = {}
    cookies: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"cookie":
            cookies.append(value)
        elif name in found and name in _ONCE:
            raise Refused(400, f"two headers {name.decode('latin-1')}")
        else:
            found[name] = value

    def text(name: bytes) -> str | None:
        return found[name].decode("latin-1") if name in found else None

    websocket = scope["type"] == "websocket"
    client = scope.get("client")
    scheme = str(scope.get("scheme", "http"))
    return Head(
        method="WEBSOCKET" if websocket else scope["method"],
        path=scope["path"],
        scheme={"ws": "http", "wss": "https"}.get(scheme, scheme),
        host=text(b"host"),
        origin=text(b"origin"),
        site=text(b"sec-fetch-site"),
        authorization=text(b"authorization"),
        cookie=b"; ".join(cookies).decode("latin-1"),
        address=client[0] if client else "",
        length=text(b"content-length"),
        encoding=(text(b"content-encoding") or "").strip().lower(),
        body=b"content-length" in found or b"transfer-encoding" in found,
    )


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text[:200])


class _Counted:
    """A request's body, as long as it is not too large."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                raise _too_large(self._limit)
        return message


class _Answering:
    """The answer on its way out, with the headers that each has."""

    def __init__(self, send: Send, *, websocket: bool) -> None:
        self._send = send
        self._websocket = websocket
        self._begun = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            present = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(one for one in HEADERS.items() if one[0] not in present)]
        if kind in ("http.response.start", "websocket.accept", "websocket.close", "websocket.http.response.start"):
            self._begun = True
        await self._send(message)

    async def refuse(self, scope: Scope, refused: Refused) -> None:
        """Say no, if nothing else has been said yet."""
        if self._begun:
            if self._websocket:
                await self._try_to_close()
            return
        answer = answers.error(refused.status, refused.detail, refused.headers)
        headers = [*answer.raw_headers, *HEADERS.items()]
        kind = "http.response"
        if self._websocket:
            if "websocket.http.response" not in scope.get("extensions", {}):
                await self._send({"type": "websocket.close", "code": 1008, "reason": refused.detail[:100]})
                return
            kind = "websocket.http.response"
        await self._send({"type": f"{kind}.start", "status": refused.status, "headers": headers})
        await self._send({"type": f"{kind}.body", "body": answer.body})

    async def _try_to_close(self) -> None:
        try:
            await self._send({"type": "websocket.close", "code": 1011, "reason": ""})
        except Exception as error:  # it is closed already
            log.debug("a WebSocket had gone: %s", one_line(error))
