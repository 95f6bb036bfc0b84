"""uvicorn's HTTP protocol with what it lacks: ceilings of time and size, and no body that gets lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.web import answers
from penstock.web.access import network

MOST_HEAD = 65_536
"""Bytes of a request's first line and headers, and of what follows its body; one read more at worst."""
HEAD_WITHIN = 20.0
"""Seconds that they may take to arrive, from the connection's beginning or their first byte."""
REST_WITHIN = 20.0
"""Seconds that what is left of a body may take, once its request is answered."""
TAKEN_WITHIN = 30.0
"""Seconds within which a client takes `LEAST_TAKEN` of what waits for it, or all of that: else it is cut off."""
LEAST_TAKEN = 16_384  # bytes
OF_ONE_PLACE = 0.75
"""What a client may have of the connections that there may be."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    _in_head = True
    _head = 0
    _after = 0
    _heads = 0
    _refused = False
    _late: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.access_log = False  # it would hold sign-in codes; the configuration's word for it is not heeded here

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of all that is not taken
        if self.limit_concurrency is not None and self._is_one_too_many(self.limit_concurrency):
            self.transport.abort()  # one that is told why has a file open all the while
        else:
            self._expect_head()

    def _is_one_too_many(self, most: int) -> bool:
        """Of all, or of those from one place: nobody keeps all others out."""
        of_one, here = math.ceil(most * OF_ONE_PLACE), _place(self)
        if len(self.connections) <= of_one:
            return False
        return len(self.connections) > most or sum(_place(one) == here for one in self.connections) > of_one

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._taking is None:
            self._expect_taking()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        before, heads = self._in_head, self._heads
        if before and self._late is None:
            self._expect_head()
        self._after += len(data)
        super().data_received(data)
        if self._in_head and before and self._heads == heads:  # else a whole request was in it, with its body
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
        self._heads += 1
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
        self.transport.set_write_buffer_limits()
        self._taken()  # what the buffer holds is the WebSocket's to watch
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

    def _expect_taking(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(TAKEN_WITHIN, self._look_what_is_taken, left)

    def _look_what_is_taken(self, before: int) -> None:
        """What is written meanwhile cannot hide that nothing is taken: nobody writes before all is."""
        if self.transport.get_write_buffer_size() > before - LEAST_TAKEN:
            self.transport.abort()
        else:
            self._expect_taking()

    def _taken(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


def _place(connection: object) -> str:
    """Where a connection comes from."""
    client = getattr(connection, "client", None)
    return network(client[0]) if client else ""


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)
