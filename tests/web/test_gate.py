"""The gate: nobody comes past it, and each gets only as far as their role."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from penstock.web import access
from penstock.web.access import Access, Caller, Failures
from penstock.web.gate import Gate, Head
from penstock.web.hosts import Hosts
from penstock.web.pages import Pages
from penstock.web.roles import PROBES, SIGN_IN, Role, required
from tests.web.conftest import TOKENS, Served, started

OPEN = {*itertools.product(["GET"], PROBES), ("GET", SIGN_IN), ("POST", SIGN_IN)}


def walk(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Method and path of each route, `WEBSOCKET` for those; also of what is mounted or included."""
    for route in routes:
        path = getattr(route, "path", "")
        if isinstance(route, WebSocketRoute) or "WebSocket" in type(route).__name__:
            yield "WEBSOCKET", path
        elif getattr(route, "methods", None):
            for method in route.methods:  # type: ignore[attr-defined]
                yield method, path
        else:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None) or route
            assert hasattr(inner, "routes"), f"what is {route}?"
            for method, below in walk(inner.routes):
                yield method, path + below


def routes_of(gate: Gate) -> list[tuple[str, str]]:
    pages = gate._app
    assert isinstance(pages, Pages)
    found = list(walk(pages.app.routes))
    assert len(found) > 25
    return found


def filled(path: str) -> str:
    for name in ("{kind}", "{name:path}", "{queue:path}", "{taskid}", "{action}"):
        path = path.replace(name, {"{kind}": "jobs", "{action}": "pause"}.get(name, "greet"))
    assert "{" not in path
    return path


# -- who


async def test_every_route_wants_a_token_but_the_probes_and_the_way_in(gates: list[Gate], tmp_path: Path) -> None:
    async with started(tmp_path) as served:
        app = gates[0]._app
        assert isinstance(app, Pages)
        assert isinstance(app.app, FastAPI)
        app.app.add_api_websocket_route("/later", lambda websocket: None)
        asked = 0
        async with served.client(None) as client:
            for method, path in routes_of(gates[0]):
                if method == "WEBSOCKET":
                    with pytest.raises(InvalidStatus) as refused:
                        await connect(served.url.replace("http", "ws") + filled(path), proxy=None)
                    assert refused.value.response.status_code == 401
                    asked += 1
                    continue
                answer = await client.request(method, filled(path))
                if (method, path) in OPEN:
                    assert answer.status_code in (200, 403), path
                else:
                    assert answer.status_code == 401, (method, path)
                    assert list(answer.json()) == ["detail"]
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                    asked += 1
        assert asked > 22


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/nothing", "/livez/", "/metrics/history", "/signin/", "//livez", "/LIVEZ"])
async def test_what_is_not_there_wants_a_token_too(served: Served, method: str, path: str) -> None:
    assert (await served.ask(method, path, None)).status_code == 401


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer x",
        f"Basic {TOKENS[Role.EDIT]}",
        TOKENS[Role.EDIT],
        f"Bearer {TOKENS[Role.EDIT]}x",
    ],
)
async def test_a_wrong_token_is_none(served: Served, authorization: str) -> None:
    answer = await served.ask("GET", "/nodes", None, headers={"Authorization": authorization})
    assert answer.status_code == 401
    assert TOKENS[Role.EDIT] not in answer.text


async def test_a_wrong_token_is_not_mended_by_a_session(served: Served) -> None:
    cookie = await served.signed_in()
    headers = {"Authorization": "Bearer wrong", "Cookie": cookie}
    assert (await served.ask("GET", "/nodes", None, headers=headers)).status_code == 401
    assert (await served.ask("GET", "/nodes", None, headers={"Cookie": cookie})).status_code == 200


# -- may they

MATRIX = [
    ("GET", "/nodes", Role.VIEW),
    ("GET", "/definitions/jobs", Role.VIEW),
    ("GET", "/openapi.json", Role.VIEW),
    ("POST", "/tasks", Role.OPERATE),
    ("POST", "/workers/produce/restart", Role.OPERATE),
    ("POST", "/queues/greet/pause", Role.OPERATE),
    ("POST", "/queues/greet/dead/discard", Role.OPERATE),
    ("PUT", "/definitions/jobs/greet", Role.EDIT),
    ("POST", "/definitions", Role.EDIT),
    ("DELETE", "/definitions/jobs/greet", Role.EDIT),
    ("POST", "/whatever/comes", Role.EDIT),
    ("POST", "/tasksandmore", Role.EDIT),
]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("method", "path", "least"), MATRIX)
async def test_each_role_gets_as_far_as_it_should(
    served: Served, method: str, path: str, least: Role, role: Role
) -> None:
    answer = await served.ask(method, path, role)
    assert (answer.status_code == 403) == (role < least), answer.text
    assert answer.status_code != 401


def test_a_websocket_is_for_editing() -> None:
    assert required("WEBSOCKET", "/console") is required("WEBSOCKET", "/tasks") is Role.EDIT


# -- which page


async def test_a_session_changes_things_from_our_own_pages_only(served: Served) -> None:
    cookie = await served.signed_in()
    for headers, status in [
        ({}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": served.url + ".evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": served.url, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Origin": served.url}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": served.url, "Sec-Fetch-Site": "same-origin"}, 200),
    ]:
        answer = await served.ask("POST", "/workers/produce/restart", None, headers={"Cookie": cookie, **headers})
        assert answer.status_code == status, (headers, answer.text)


async def test_a_token_needs_no_page_and_is_not_taken_from_a_foreign_one(served: Served) -> None:
    assert (await served.ask("POST", "/workers/produce/restart")).status_code == 200
    foreign = {"Origin": "http://evil.example"}
    assert (await served.ask("POST", "/workers/produce/restart", headers=foreign)).status_code == 403


async def test_nothing_is_shared_with_other_origins(served: Served) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = await served.ask(method, "/tasks", headers=asked)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:80", 400),
        ("", 400),
        ("10.0.0.1", 400),
        ("localhost@evil.example", 400),
        ("localhost/", 400),
        ("LOCALHOST:99", 200),
        ("[::1]:8470", 200),
        ("127.0.0.1", 200),
        ("localhost.", 200),
    ],
)
async def test_only_our_own_names_are_answered_to(served: Served, host: str, status: int) -> None:
    for path in ("/nodes", "/metrics"):
        assert (await served.ask("GET", path, headers={"Host": host})).status_code == status
    assert (await served.ask("GET", "/livez", headers={"Host": host})).status_code == 200


async def test_names_can_be_added(tmp_path: Path) -> None:
    async with started(tmp_path, hosts=["penstock.example"]) as served:
        assert (await served.ask("GET", "/nodes", headers={"Host": "Penstock.Example:443"})).status_code == 200
        assert (await served.ask("GET", "/nodes", headers={"Host": "other.example"})).status_code == 400


def test_any_address_is_ours_where_all_are_listened_on() -> None:
    hosts = Hosts(any_address=True)
    assert hosts.allows("10.1.2.3:8470")
    assert hosts.allows("[fe80::1]")
    assert not hosts.allows("rebound.example")


def test_an_origin_is_ours_to_the_letter() -> None:
    hosts = Hosts(["penstock.example"])
    assert hosts.same_origin("http://127.0.0.1:8470", "127.0.0.1:8470", "http")
    assert hosts.same_origin("https://penstock.example", "penstock.example", "http")  # a proxy speaks TLS
    assert not hosts.same_origin("http://penstock.example", "penstock.example", "https")
    assert not hosts.same_origin("http://127.0.0.1:8471", "127.0.0.1:8470", "http")
    assert not hosts.same_origin("http://localhost:8470", "127.0.0.1:8470", "http")
    assert not hosts.same_origin("http://evil.example", "evil.example", "http")


async def test_two_of_a_header_are_refused(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"GET /nodes HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


# -- WebSockets


class Console:
    """A WebSocket behind a gate, without a server."""

    def __init__(self) -> None:
        async def echo(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.close()

        self.access = Access(TOKENS)
        app = Starlette(routes=[WebSocketRoute("/console", echo)])
        self.gate = Gate(app, self.access, Hosts(), "penstock-1", 1000)

    async def knock(self, **headers: str) -> tuple[str, int | None]:
        """The first thing that is answered, and its status."""
        given = {"host": "localhost:1", **headers}
        scope: dict[str, Any] = {
            "type": "websocket", "path": "/console", "raw_path": b"/console", "query_string": b"", "scheme": "ws",
            "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "subprotocols": [],
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
            "extensions": {"websocket.http.response": {}},
        }  # fmt: skip
        said: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            said.append(message)

        await self.gate(scope, receive, send)
        return said[0]["type"], said[0].get("status")


REFUSED = "websocket.http.response.start"


async def test_a_websocket_comes_from_exactly_our_own_page() -> None:
    console = Console()
    cookie = f"penstock-1={console.access.open_session(Role.EDIT)}"
    accepted = ("websocket.accept", None)
    assert await console.knock(cookie=cookie, origin="http://localhost:1") == accepted
    for origin in ("http://localhost", "http://localhost:2", "http://127.0.0.1:1", "http://evil.example", "null", ""):
        assert await console.knock(cookie=cookie, origin=origin) == (REFUSED, 403), origin
    assert await console.knock(cookie=cookie) == (REFUSED, 403)
    assert await console.knock(cookie=cookie, sec_fetch_site="same-origin") == (REFUSED, 403)
    assert await console.knock(authorization=f"Bearer {TOKENS[Role.EDIT]}") == accepted
    foreign = await console.knock(authorization=f"Bearer {TOKENS[Role.EDIT]}", origin="http://evil.example")
    assert foreign == (REFUSED, 403)


async def test_a_websocket_wants_role_and_token_before_it_is_accepted() -> None:
    console = Console()
    assert await console.knock() == (REFUSED, 401)
    assert await console.knock(host="evil.example") == (REFUSED, 400)
    assert await console.knock(authorization=f"Bearer {TOKENS[Role.OPERATE]}") == (REFUSED, 403)
    weak = f"penstock-1={console.access.open_session(Role.VIEW)}"
    assert await console.knock(cookie=weak, origin="http://localhost:1") == (REFUSED, 403)
    other = f"penstock-2={console.access.open_session(Role.EDIT)}"
    assert await console.knock(cookie=other, origin="http://localhost:1") == (REFUSED, 401)


async def test_a_refused_websocket_fills_no_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with pytest.raises(InvalidStatus):
            async with connect(served.url.replace("http", "ws", 1) + "/console"):
                pass
    assert (await served.ask("GET", "/livez")).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


# -- too much


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 10_000):
        yield b" " * 10_000


@pytest.mark.parametrize("path", ["/tasks", "/definitions", "/queues/greet/dead/replay"])
async def test_a_body_over_the_ceiling_is_413_however_it_comes(served: Served, path: str) -> None:
    limit = 100_000 + 65_536
    for content in (b" " * (limit + 1), chunks(limit + 20_000), b" " * 5_000_000):
        answer = await served.ask("POST", path, content=content)
        assert answer.status_code == 413, answer.text
        assert str(limit) in answer.json()["detail"]
    below = await served.ask("POST", path, content=chunks(limit - 10_000))
    assert below.status_code == 422


async def test_a_stranger_s_body_is_not_read(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")  # and nothing follows
    async with asyncio.timeout(5):
        assert b" 401 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_length_is_believed_before_a_byte_has_come(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    token = TOKENS[Role.EDIT].encode()
    writer.write(b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + token)
    writer.write(b"\r\nContent-Length: 99999999\r\n\r\n")
    async with asyncio.timeout(5):
        assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_what_is_packed_is_not_unpacked(served: Served) -> None:
    answer = await served.ask("POST", "/tasks", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


# -- too often


class SetClock:
    now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def head(token: str, address: str) -> Head:
    return Head("GET", "/nodes", "http", "localhost", None, None, f"Bearer {token}", "", address, None, "", False)


async def test_guessing_ends_for_a_while(served: Served) -> None:
    statuses = [
        (await served.ask("GET", "/nodes", None, headers={"Authorization": f"Bearer {number}"})).status_code
        for number in range(access.FAILURES + 3)
    ]
    assert statuses == [401] * access.FAILURES + [429] * 3
    answer = await served.ask("GET", "/nodes", None, headers={"Authorization": "Bearer x"})
    assert 0 < int(answer.headers["retry-after"]) <= access.WINDOW + 1
    # What cannot be guessed is not kept out by somebody else's guesses.
    assert (await served.ask("GET", "/nodes")).status_code == 200


def test_a_token_that_can_be_guessed_is_not_found_while_guessing_is_over() -> None:
    clock = SetClock()
    gate = Gate(Starlette(), Access({Role.EDIT: "hunter2"}, clock), Hosts(), "c", 1)

    def status(token: str, address: str = "10.0.0.1") -> int:
        try:
            caller = gate.admit(head(token, address))
        except Exception as refused:
            return int(refused.status)  # type: ignore[attr-defined]
        assert isinstance(caller, Caller)
        assert caller.address == address
        return 200

    assert [status("wrong") for _ in range(access.FAILURES)] == [401] * access.FAILURES
    assert status("hunter2") == 429
    assert status("hunter2", "10.0.0.2") == 200
    clock.now += access.WINDOW
    assert status("hunter2") == 200


def test_a_whole_ipv6_network_guesses_as_one_and_the_memory_of_it_is_bounded() -> None:
    failures = Failures(SetClock())
    for number in range(access.FAILURES):
        failures.count(f"2001:db8::{number:x}")
    assert failures.wait("2001:db8::ffff") > 0
    assert failures.wait("2001:db8:1::1") == 0
    for number in range(access.MOST_ADDRESSES + 10):
        failures.count(str(number))
    assert len(failures._seen) == access.MOST_ADDRESSES


# -- every answer


@pytest.mark.parametrize("path", ["/livez", "/nodes", "/nothing", "/signin", "/metrics"])
async def test_every_answer_has_the_headers_of_a_careful_server(served: Served, path: str) -> None:
    for role in (Role.EDIT, None):
        answer = await served.ask("GET", path, role)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
