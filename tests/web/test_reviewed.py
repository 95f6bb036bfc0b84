"""What a reviewer got through, and gets through no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock import config
from penstock.cli import root
from penstock.control import tokens
from penstock.control.masking import masked
from penstock.control.tokens import Told
from penstock.errors import ConfigError
from penstock.node import configs
from penstock.web import protocol
from penstock.web.gate import MOST_OPEN
from penstock.web.hosts import check_name
from penstock.web.roles import Role
from penstock.web.server import _Server
from tests.helpers import eventually
from tests.web.conftest import TOKENS, Served, started

HOST = b"Host: localhost\r\n"
TOKEN = b"Authorization: Bearer " + TOKENS[Role.EDIT].encode() + b"\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: "
WEBSOCKET = UPGRADE + b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"


async def said(served: Served, *parts: bytes) -> bytes:
    """All that is answered until the node ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    try:
        async with asyncio.timeout(10):
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await reader.read()
    finally:
        writer.close()


# -- what of a request is lost, or comes late


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("framing", [b"Content-Length: 15\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_beside_an_upgrade_is_refused_and_not_taken_for_an_empty_one(
    served: Served, split: bool, framing: bytes
) -> None:
    await served.ask("POST", "/tasks", json={"topic": "spoil", "content": {}})
    await eventually(lambda: _dead(served))
    head = b"POST /queues/spoil/dead/discard HTTP/1.1\r\n" + HOST + TOKEN + framing + UPGRADE + b"h2c\r\n\r\n"
    body = b'{"ids": ["no"]}' if b"Length" in framing else b'f\r\n{"ids": ["no"]}\r\n0\r\n\r\n'
    answer = await (said(served, head, body) if split else said(served, head + body))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"content-length: ") == 1  # the body is no second request
    assert await _dead(served) == 1


async def _dead(served: Served) -> int:
    return int((await served.ask("GET", "/queues/spoil/dead")).json()["total"])


async def test_an_upgrade_without_a_body_is_ignored(served: Served) -> None:
    head = b"GET /nodes HTTP/1.1\r\n" + HOST + TOKEN + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
    assert (await said(served, head)).startswith(b"HTTP/1.1 200 ")


async def test_what_follows_a_body_says_nothing_of_who_asks(served: Served) -> None:
    head = b"GET /nodes HTTP/1.1\r\nConnection: close\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert (await said(served, head + b"0\r\n" + TOKEN + b"\r\n")).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("line", [b"X: y\r\n", b"x" * 1000])
async def test_what_follows_a_body_has_an_end(served: Served, line: bytes) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"POST /tasks HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ")
    sent = 0
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while sent < 50_000_000:
                writer.write(line * 1000)
                await writer.drain()
                sent += len(line) * 1000
    writer.close()
    assert sent < 50_000_000


# -- connections that nobody ends


@pytest.mark.parametrize(
    "more",
    [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"X: " + b"y" * 20_000 + b"\r\n", b"X: y\r\n" * 300],
)
async def test_a_websocket_s_head_that_cannot_be_is_refused(served: Served, more: bytes) -> None:
    assert (await said(served, b"GET /console HTTP/1.1\r\n" + HOST + more + WEBSOCKET)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("rest", [b"", b"x" * 100])
async def test_a_stranger_s_body_does_not_hold_a_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr(protocol, "REST_WITHIN", 0.2)
    monkeypatch.setattr(protocol, "HEAD_WITHIN", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    async with asyncio.timeout(4):  # a connection that is kept for another request would last five seconds
        writer.write(b"POST /tasks HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.write(rest or b"x")
        await reader.read()
    writer.close()


async def test_connections_beyond_the_ceiling_are_not_kept(tmp_path: Path, servers: list[_Server]) -> None:
    async with started(tmp_path) as served:
        servers[0].config.limit_concurrency = 2
        kept = [await asyncio.open_connection("127.0.0.1", served.http.port) for _ in range(2)]
        await eventually(lambda: len(servers[0].server_state.connections) == 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        for _, one in [*kept, (reader, writer)]:
            one.close()


# -- too much


async def test_a_stranger_sends_little(served: Served) -> None:
    own = {"Origin": served.url}
    for content in (b"x" * (MOST_OPEN + 1), b"token=" + b"x" * MOST_OPEN):
        assert (await served.ask("POST", "/signin", None, content=content, headers=own)).status_code == 413


@pytest.mark.parametrize("depth", [900, 10_000])
async def test_content_that_is_nested_deeply_is_no_fault_of_the_node(served: Served, depth: int) -> None:
    content = '{"a":' * depth + "1" + "}" * depth
    answer = await served.ask("POST", "/tasks", content=f'{{"topic": "hello", "content": {content}}}'.encode())
    assert answer.status_code == 422
    assert "deeply" in answer.json()["detail"]


# -- names of hosts


@pytest.mark.parametrize("name", ["penstock.example", "PENSTOCK", "10.0.0.1", "::1", "[fe80::1]", "a_b-c.d."])
def test_names_that_hosts_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "*", "*.example", "a:80", "http://a", "a/b", "[::1]:80", "a b", "a,b", "[x]"])
def test_names_that_no_host_has_end_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a host"):
        check_name(name)


@pytest.mark.parametrize(
    ("flags", "environ", "written", "expected"),
    [
        ([], {}, "", []),
        (["--allowed-host", "a.example", "--allowed_host", "b.example"], {}, "", ["a.example", "b.example"]),
        ([], {"PENSTOCK_ALLOWED_HOSTS": "a.example, b.example,"}, "", ["a.example", "b.example"]),
        ([], {}, 'allowed_hosts = "c.example"', ["c.example"]),
        (["--allowed-host", "a.example"], {"PENSTOCK_ALLOWED_HOSTS": "b.example"}, "", ["a.example"]),
        ([], {"PENSTOCK_ALLOWED_HOSTS": ""}, 'allowed_hosts = "c.example"', []),
    ],
)
def test_serve_is_told_of_further_hosts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environ: dict[str, str],
    written: str,
    expected: list[str],
) -> None:
    asked: list[Any] = []

    def consume(served: Any) -> int:
        asked.append(list(served._hosts))
        return 0

    monkeypatch.setattr("penstock.cli.serve.running.consume", consume)
    monkeypatch.setattr("penstock.cli.serve.signal.signal", lambda *_: None)
    monkeypatch.setattr("penstock.cli.serve.logs.configure", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "penstock.toml").write_text(written)
    result = CliRunner().invoke(root.app, ["serve", str(tmp_path), *flags])
    assert result.exit_code == 0, result.output
    assert asked == [expected]


@pytest.mark.parametrize(("host", "status"), [("0.0.0.0", 200), ("127.0.0.1", 400)])
async def test_metrics_answer_to_any_name_where_other_machines_may_ask(tmp_path: Path, host: str, status: int) -> None:
    async with started(tmp_path, host=host) as served:
        served.url = f"http://127.0.0.1:{served.http.port}"
        asked = {"Host": "penstock.default.svc:8470"}
        assert (await served.ask("GET", "/metrics", None, headers=asked)).status_code == status
        assert (await served.ask("GET", "/nodes", headers=asked)).status_code == 400
        assert (await served.ask("GET", "/metrics/history", headers=asked)).status_code == 400


# -- secrets


@pytest.mark.parametrize("host", ["127.evil.example", "127.0.0.1.evil.example", "127.1.evil", "localhost.evil.example"])
def test_a_token_of_this_machine_goes_to_no_name_that_looks_like_it(tmp_path: Path, host: str) -> None:
    told = Told("http://127.0.0.1:8470", "secret", os.getpid())
    tokens.write(told, tmp_path / "state")
    assert tokens.find(f"http://{host}:8470", tmp_path / "state") is None
    for own in ("127.0.0.2", "[::1]", "LOCALHOST"):
        assert tokens.find(f"http://{own}:8470", tmp_path / "state") == told


async def test_a_session_begun_behind_tls_stays_there(served: Served) -> None:
    for scheme, secure in (("https", True), ("http", False)):
        own = {"Origin": served.url.replace("http", scheme)}
        answer = await served.ask("POST", "/signin", None, data={"token": TOKENS[Role.VIEW]}, headers=own)
        assert ("secure" in answer.headers["set-cookie"].lower()) == secure


URLS = [
    "nats://hunter2@host:4222",
    "tls://hunter2@host",
    "nats://host?token=hunter2&name=a",
    "postgresql://host/db?user=a&password=hunter2",
    "postgresql://host/db?sslpassword=hunter2",
    "redis://:hunter2@host?db=1",
]


@pytest.mark.parametrize("url", URLS)
def test_what_a_url_lets_in_with_is_masked_and_can_be_written_back(url: str) -> None:
    shown = config.mask(url)
    assert "hunter2" not in shown
    assert "host" in shown
    assert configs.unmasked({"url": configs.masked(url)}, {"url": url}) == {"url": url}
    assert configs.holds_mask(shown)
    assert "hunter2" not in masked(f"cannot reach {url} now")


@pytest.mark.parametrize("url", ["nats://host:4222/a?name=b", "sqlite:///a@b.db", "amqp://guest@host/", "a", ""])
def test_a_url_without_a_secret_is_shown_as_it_is(url: str) -> None:
    assert config.mask(url) == url
    assert not configs.holds_mask(config.mask(url))


@pytest.mark.parametrize("key", ["pass", "db_pass", "smtpPass", "pwd", "PGPWD"])
def test_short_names_of_passwords_are_names_of_secrets(key: str) -> None:
    assert configs.masked({key: "hunter2"}) == {key: configs.MASK}
    assert "hunter2" not in masked(f"{key}=hunter2")
    assert configs.masked({"passenger": "Neo"}) == {"passenger": "Neo"}


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        config.secret("PENSTOCK_TOKEN", {"PENSTOCK_TOKEN_FILE": str(tmp_path / "token")})
