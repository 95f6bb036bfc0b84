"""`callout`: a request of a script to the HTTP of its own node."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from penstock.errors import ConfigError
from penstock.node.mu import plain

if TYPE_CHECKING:
    import aiohttp

WITHIN = 60.0  # seconds for a request


class Served(Protocol):
    """What is served, and with what token."""

    own_url: str | None
    token: str | None


class Answer(msgspec.Struct, frozen=True):
    """What came back."""

    status: int
    body: str
    headers: dict[str, str]


class Callout:
    """Requests to the own node, with its token. For one event loop."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Ask the own node.

        :param path: from `/` on; with a query if there is one.
        :param body: sent as JSON; bytes and text as they are.
        :raises ValueError: another place than the own node.
        :raises ConfigError: this node serves no HTTP.
        :raises OSError: it could not be asked.
        """
        import aiohttp

        if not path.startswith("/") or path.startswith("//"):
            raise ValueError(f"callout asks the own node: a path begins with one '/', and {path!r} does not")
        if self._served.own_url is None:
            raise ConfigError("this node serves no HTTP: there is nobody to call out to")
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(WITHIN), trust_env=False)
        given = dict(headers or {})
        if self._served.token is not None:
            given["Authorization"] = f"Bearer {self._served.token}"
        data: bytes | str | None
        if body is None or isinstance(body, bytes | str):
            data = body
        else:
            data = msgspec.json.encode(plain(body))
            given.setdefault("Content-Type", "application/json")
        url = self._served.own_url.rstrip("/") + path
        async with self._session.request(method, url, data=data, headers=given, allow_redirects=False) as answer:
            return Answer(answer.status, await answer.text(errors="replace"), dict(answer.headers))

    async def close(self) -> None:
        """Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
            await asyncio.sleep(0)  # its connections end in the next turn
