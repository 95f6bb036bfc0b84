"""A node behind HTTP."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from blockbuster import BlockBuster

from penstock import App
from penstock.node.node import Node, NodeOptions
from penstock.web.gate import Gate
from penstock.web.roles import Role
from penstock.web.server import Serving, _Server, serving
from tests.helpers import eventually

TOKENS = {role: f"{role.name.lower()}-{'0123456789' * 4}" for role in Role}
ENVIRON = {
    "PENSTOCK_TOKEN": TOKENS[Role.EDIT],
    "PENSTOCK_TOKEN_OPERATE": TOKENS[Role.OPERATE],
    "PENSTOCK_TOKEN_VIEW": TOKENS[Role.VIEW],
}
JOB = """
name: greet
topics: [hello]
script: |
  async def greet(task):
      pass
"""
SLASHED = "asgard/counts/dead"
"""A queue whose name looks like one of our paths."""
WORKER = """
name: produce
mode: multi
script: |
  async def produce():
      pass
"""

_numbers = itertools.count(1)


class Served:
    """A node, its HTTP, and clients of it."""

    def __init__(self, node: Node, http: Serving) -> None:
        self.node = node
        self.http = http
        self.url = http.url

    def client(self, role: Role | None = Role.EDIT, **headers: str) -> httpx.AsyncClient:
        """A client with the token of a role, or without one."""
        given = {} if role is None else {"Authorization": f"Bearer {TOKENS[role]}"}
        return httpx.AsyncClient(base_url=self.url, headers=given | headers, trust_env=False, timeout=20)

    async def ask(self, method: str, path: str, role: Role | None = Role.EDIT, **options: Any) -> httpx.Response:
        async with self.client(role) as client:
            return await client.request(method, path, **options)

    async def signed_in(self, role: Role = Role.EDIT) -> str:
        """The cookie of a new session."""
        answer = await self.ask("GET", self.http.sign_in_link(role), None)
        assert answer.status_code == 200
        return answer.headers["set-cookie"].partition(";")[0]


@asynccontextmanager
async def started(folder: Path, hosting: NodeOptions | None = None, **options: Any) -> AsyncIterator[Served]:
    """A node with a job and a worker, served at a free port."""
    (folder / "definitions").mkdir()
    (folder / "definitions" / "job.yml").write_text(JOB)
    (folder / "definitions" / "worker.yml").write_text(WORKER)
    app = App(f"memory://web-{os.getpid()}-{next(_numbers)}", grace=2.0, max_body=100_000)

    @app.task("spoil")
    async def spoil(task: Any) -> None:
        raise ValueError("told to")

    @app.route(SLASHED)
    async def count(messages: list[Any]) -> None: ...

    node = Node(folder / "definitions", app, hosting)
    options = {"port": 0, "environ": ENVIRON, "folder": folder / "state", **options}
    async with serving(node, **options) as http, node:
        await eventually(lambda: node.ready)
        yield Served(node, http)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with started(tmp_path) as one:
        yield one


@pytest.fixture(autouse=True)
def what_others_do_once(nothing_blocks_the_loop: BlockBuster | None) -> None:
    """FastAPI looks each endpoint up in its file, once."""
    for function in (nothing_blocks_the_loop.functions if nothing_blocks_the_loop else {}).values():
        function.can_block_in("fastapi/routing.py", {"_extract_endpoint_context"})


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[_Server]:
    """Every server that is made from now on."""
    made: list[_Server] = []
    begin = _Server.__init__

    def remember(self: _Server, config: Any) -> None:
        begin(self, config)
        made.append(self)

    monkeypatch.setattr(_Server, "__init__", remember)
    return made


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Gate]:
    """Every gate that is made from now on."""
    made: list[Gate] = []
    begin = Gate.__init__

    def remember(self: Gate, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        made.append(self)

    monkeypatch.setattr(Gate, "__init__", remember)
    return made
