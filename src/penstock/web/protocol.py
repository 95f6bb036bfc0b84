"""uvicorn's HTTP protocol with what it lacks: ceilings of time and size, and no body that gets lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.web import answers

MOST_HEAD = 65_536
"""Bytes of a request's first line and headers, and of what follows its body; one read more at worst."""
HEAD_WITHIN = 20.0
"""Seconds that they may take to arrive, from the connection's beginning or their first byte."""
REST_WITHIN = 20.0
"""Seconds that what is left of a body may take, once its request is answered."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _in_head = True
    _head = 0
    _after = 0
    _refused = False
    _late: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.access_log = False  # it would hold sign-in codes; the configuration's word for it is not heeded here

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            self.transport.abort()  # one that is told why has a file open all the while
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._in_head
        if before and self._late is None:
            self._expect_head()
        self._after += len(data)
        super().data_received(data)
        if self._in_head and before:
            self._head += len(data)
            if self._head > MOST_HEAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
        elif not self._in_head and self._after > MOST_HEAD:
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what follows a body comes too late to say who asks
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head, self._after = False, 0, 0
        self._head_came()
        if self.parser.should_upgrade() and not self._should_upgrade() and _has_body(self.headers):
            # The parser takes its body for the other protocol: it would be gone, and an empty one be heeded.
            self._refused = True
            self.send_400_response("A request with a body is not upgraded: ask with HTTP/1.1 and no Upgrade.")
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._after = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._after = True, 0
        if self._refused:
            return
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # nothing else ends this connection
            self._head_came()
            self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.transport.is_closing():
            self._late = self.loop.call_later(REST_WITHIN, self.transport.close)

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        websocket = self.transport.get_protocol()
        if not getattr(websocket, "handshake_initiated", True) and not self.transport.is_closing():
            self.send_400_response("Not the head of a WebSocket.")  # it would be waited for, for ever

    def send_400_response(self, msg: str) -> None:
        answer = answers.error(400, msg, {"Connection": "close"})
        lines = [b"HTTP/1.1 400 Bad Request"]
        lines += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self.transport.close()

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_WITHIN, self.transport.close)

    def _head_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)
