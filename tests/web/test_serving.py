"""Serving: one line where it cannot be, a bounded end, a token that only its user finds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.web import protocol
from penstock.web.roles import Role
from penstock.web.server import _Server
from tests.helpers import eventually
from tests.web.conftest import ENVIRON, TOKENS, Served, started


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use") as refused:
            async with started(tmp_path, port=port):
                pass
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_other_machines_need_a_token_that_somebody_chose(tmp_path: Path, host: str) -> None:
    environ = {name: token for name, token in ENVIRON.items() if name != "PENSTOCK_TOKEN"}
    with pytest.raises(ConfigError, match="PENSTOCK_TOKEN"):
        async with started(tmp_path, host=host, environ=environ):
            pass


async def test_with_one_all_addresses_can_be_served(tmp_path: Path) -> None:
    async with started(tmp_path, host="0.0.0.0") as served:
        served.url = f"http://127.0.0.1:{served.http.port}"
        assert (await served.ask("GET", "/nodes")).status_code == 200
        told = json.loads((tmp_path / "state" / f"{served.http.port}.json").read_bytes())
        assert told == {"url": served.url, "token": None, "pid": os.getpid()}, "a token that was given is kept nowhere"
    assert not list((tmp_path / "state").iterdir())


async def test_a_place_for_that_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    async with started(tmp_path) as served:
        assert (await served.ask("GET", "/nodes")).status_code == 200
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "state").write_text("a file")
    with pytest.raises(ConfigError):  # nobody would ever know the token
        async with started(tmp_path / "again", environ={}):
            pass


@pytest.mark.parametrize(
    "environ",
    [{"PENSTOCK_TOKEN": ""}, {"PENSTOCK_TOKEN": "a b"}, {"PENSTOCK_TOKEN": "ü" * 20},
     {"PENSTOCK_TOKEN": "x" * 20, "PENSTOCK_TOKEN_VIEW": "x" * 20}, {"PENSTOCK_TOKEN_FILE": "/nowhere"}],
)  # fmt: skip
async def test_a_token_that_cannot_be_one_ends_the_start(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        async with started(tmp_path, environ=environ):
            pass
    assert "x" * 20 not in str(refused.value)


async def test_a_token_that_was_made_up_is_in_a_file_of_its_user_and_gone_at_the_end(tmp_path: Path) -> None:
    async with started(tmp_path, environ={}) as served:
        path = tmp_path / "state" / f"{served.http.port}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = json.loads(path.read_bytes())
        assert told == {"url": served.url, "token": served.node.token, "pid": os.getpid()}
        headers = {"Authorization": f"Bearer {told['token']}"}
        assert (
            await served.ask("PUT", "/definitions/configs/a", None, content="a: 1", headers=headers)
        ).status_code == 200
    assert not path.exists()
    assert served.node.url is served.node.token is None


async def test_the_end_waits_for_nobody_for_long(tmp_path: Path, servers: list[_Server]) -> None:
    stuck = []
    async with started(tmp_path, grace=1.0) as served:
        token = TOKENS[Role.EDIT].encode()
        for start in (
            b"",
            b"POST /tasks HTTP/1.1\r\nHost:",
            b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
            + token
            + b"\r\nContent-Length: 9\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
            writer.write(start)
            stuck.append((reader, writer))
        await eventually(lambda: len(servers[0].server_state.connections) == 4)
        await eventually(lambda: servers[0].server_state.tasks)
        before = time.monotonic()
    assert time.monotonic() - before < 8.0
    for reader, writer in stuck:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()


async def test_signals_stay_the_node_s(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with started(tmp_path):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_before_the_node_has_started_only_the_probes_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.node, "_ledger", None)
    monkeypatch.setattr(served.node, "_seen_at", 0.0)
    assert (await served.ask("GET", "/livez", None)).status_code == 200
    assert (await served.ask("GET", "/readyz", None)).status_code == 503
    answer = await served.ask("POST", "/tasks", json={"topic": "hello", "content": {}})
    assert (answer.status_code, answer.json()) == (503, {"detail": "the node has not started yet, or is about to end"})


async def test_a_head_without_end_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"GET /livez HTTP/1.1\r\nX: " + b"x" * (protocol.MOST_HEAD + 300_000))
    async with asyncio.timeout(10):
        assert b" 400 " in await reader.readline()
    writer.close()
    monkeypatch.setattr(protocol, "HEAD_WITHIN", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"GET /livez HTTP/1.1\r\n")
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()


async def test_what_is_no_http_is_one_line_of_json(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
    writer.write(b"\x16\x03\x01 hello\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "detail" in json.loads(answer.partition(b"\r\n\r\n")[2])
    writer.close()
