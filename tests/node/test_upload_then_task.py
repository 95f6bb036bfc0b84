"""What is uploaded over HTTP is there for the task that is sent next."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import App
from penstock.errors import BrokerUnavailable
from penstock.node import node as node_module
from penstock.node.book import Book
from penstock.node.node import Node
from penstock.node.roster import Roster
from penstock.web.server import serving

TOKEN = "edit-0123456789-0123456789-0123456789"


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Node, httpx.AsyncClient]]:
    """A node without a definition, and a client that may write some."""
    (folder / "definitions").mkdir()
    node = Node(folder / "definitions", App(f"memory://upload-{os.getpid()}-{folder.name}", grace=1.0))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        serving(node, port=0, environ={"PENSTOCK_TOKEN": TOKEN}, folder=folder / "state") as http,
        node,
        httpx.AsyncClient(base_url=http.url, headers=headers, trust_env=False, timeout=20) as client,
    ):
        yield node, client


def job(name: str, topic: str) -> dict[str, Any]:
    return {"name": name, "topics": [topic], "script": "return 1"}


async def send(client: httpx.AsyncClient, topic: str) -> str:
    answer = await client.post("/tasks", json={"topic": topic, "content": {}, "expire": 5})
    assert answer.status_code == 202
    taskid: str = answer.json()["taskid"]
    return taskid


async def test_a_task_that_follows_a_new_job_finds_it(tmp_path: Path) -> None:
    async with served(tmp_path) as (node, client):
        for number in range(10):
            assert (
                await client.put(f"/definitions/jobs/one{number}", json=job(f"one{number}", f"t{number}"))
            ).is_success
            record = await node.app.waitfor(await send(client, f"t{number}"), 10)
            assert [run.task for run in record.runs] == [f"one{number}"]


async def test_a_task_that_follows_many_new_jobs_finds_them_all(tmp_path: Path) -> None:
    names = [f"job{number}" for number in range(50)]
    async with served(tmp_path) as (node, client):
        assert (await client.post("/definitions", json=[job(name, "all") for name in names])).is_success
        record = await node.app.waitfor(await send(client, "all"), 20)
        assert sorted(run.task for run in record.runs) == sorted(names)


async def test_a_task_that_follows_a_jobs_removal_does_not_find_it(tmp_path: Path) -> None:
    async with served(tmp_path) as (node, client):
        assert (await client.post("/definitions", json=[job("stays", "topic"), job("goes", "topic")])).is_success
        assert (await client.delete("/definitions/jobs/goes")).status_code == 204
        record = await node.app.waitfor(await send(client, "topic"), 10)
        assert [run.task for run in record.runs] == ["stays"]


async def test_an_upload_is_answered_though_something_does_not_settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Roster) -> None:
        await asyncio.Event().wait()

    async with served(tmp_path) as (_, client):
        monkeypatch.setattr(Roster, "settled", never)
        monkeypatch.setattr(node_module, "CATCHING_UP", 0.2)
        assert (await client.put("/definitions/jobs/one", json=job("one", "topic"))).is_success
        assert (await client.delete("/definitions/jobs/one")).status_code == 204


async def test_an_upload_is_answered_though_the_store_goes_away_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(self: Book) -> Any:
        raise BrokerUnavailable("gone")

    async with served(tmp_path) as (_, client):
        monkeypatch.setattr(Book, "read", away)
        answer = await client.put("/definitions/jobs/one", json=job("one", "topic"))
        assert (answer.status_code, answer.json()["name"]) == (200, "one")
