"""The web examples, over HTTP and RabbitMQ, do what they say."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
from tornado.httpserver import HTTPServer

from tests.examples.conftest import SITES, WEB, Stage
from tests.helpers import eventually

CRIPPLED = """
from penstock import App

app = App()

@app.task("test")
def test(request):
    return "Wake up Neo.\\n"

@app.task("stat")
def stat(request):
    raise LookupError("no such figure")

if __name__ == "__main__":
    app.run()
"""


def browser(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=40)


async def begin_poll(web: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
    """A long poll that has been asked for."""
    asked = asyncio.Event()

    async def trace(event: str, info: Any) -> None:
        if event == "http11.send_request_body.complete":
            asked.set()

    poll = asyncio.create_task(web.get("/subscribe", extensions={"trace": trace}))
    await asked.wait()
    return poll


async def test_the_worker_answers_counts_and_names_itself(stage: Stage) -> None:
    url = stage.start_site()
    stage.start_worker()
    async with browser(url) as web:
        answer = await web.get("/")
        assert (answer.status_code, answer.text) == (200, "str: Wake up Neo.\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        for count in (2, 3):
            answer = await web.get("/stat")
            assert answer.status_code == 200
            found = re.fullmatch(r'str: I\'m worker "(\w+)"\. And I serve (\d+) tasks', answer.text)
            assert found, answer.text
            assert found.groups() == (answer.headers["x-worker"], str(count))


async def test_a_hung_task_is_a_timeout_and_stops_nobody_else(stage: Stage) -> None:
    url = stage.start_site()
    worker = stage.start_worker()
    async with browser(url) as web:
        for _ in range(2):  # what was stopped once can be asked for again
            hung = asyncio.create_task(web.get("/fast"))
            answers = [await web.get("/") for _ in range(5)]
            assert not hung.done()
            assert {answer.text for answer in answers} == {"str: Wake up Neo.\n"}
            answer = await hung
            assert (answer.status_code, answer.text) == (504, "Timeout")
        assert "serve 11 tasks" in (await web.get("/stat")).text
    assert worker.end() == 0


async def test_without_a_worker_all_are_gone(stage: Stage) -> None:
    url = stage.start_site()
    async with browser(url) as web:
        for _ in ("none was ever there", "one was"):
            answer = await web.get("/fast")
            assert (answer.status_code, answer.text) == (503, "All workers are gone")
            assert stage.start_worker().end() == 0
        stage.start_worker()
        answer = await web.get("/")
        assert (answer.status_code, answer.text) == (200, "str: Wake up Neo.\n")


@pytest.mark.parametrize("path", ["/publish", "/publish2"])
async def test_what_is_published_reaches_everyone_who_polls(stage: Stage, path: str) -> None:
    first, second = stage.start_site(), stage.start_site()
    stage.start_worker()
    async with browser(first) as web, browser(second) as other:
        for body in ("Follow the white rabbit. 🐇".encode(), b"Knock, knock, Neo."):
            polls = [await begin_poll(one) for one in (web, web, web, other, other)]
            for url in (first, second):  # on a new connection behind theirs: once it is answered, they are in
                assert (await asyncio.to_thread(httpx.get, f"{url}/nothing")).status_code == 404
            answer = await web.post(path, content=body)
            assert (answer.status_code, answer.content) == (204, b"")
            answers = await asyncio.gather(*polls)
            assert [(answer.status_code, answer.content) for answer in answers] == [(200, body)] * 5


async def test_calls_in_parallel_are_both_answered(stage: Stage) -> None:
    url = stage.start_site()
    stage.start_worker()
    async with browser(url) as web:
        answer = await web.get("/parallel")
        pattern = r'Test result: Wake up Neo\.\n\nStat result: I\'m worker "\w+"\. And I serve [12] tasks'
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.headers["content-type"].startswith("text/plain")


async def test_what_fails_in_the_worker_is_a_value_among_parallel_calls_and_an_error_alone(
    stage: Stage, tmp_path: Path
) -> None:
    crippled = tmp_path / "crippled.py"
    crippled.write_text(CRIPPLED)
    url = stage.start_site()
    stage.start_worker(crippled)
    async with browser(url) as web:
        answer = await web.get("/parallel")
        text = "Test result: Wake up Neo.\n\nStat result: failed, LookupError: no such figure"
        assert (answer.status_code, answer.text) == (200, text)
        answer = await web.get("/stat")
        assert (answer.status_code, answer.text) == (502, "The worker failed")
    site = stage.running[0]
    assert "LookupError: no such figure" in site.log
    assert "crippled.py" in site.log, "where it was raised"


async def test_a_body_over_the_ceiling_is_refused(stage: Stage) -> None:
    url = stage.start_site()
    stage.start_worker()
    async with browser(url) as web:
        for path in ("/publish", "/publish2"):
            answer = await web.post(path, content=b"x" * (8 * 2**20 + 1))
            assert (answer.status_code, answer.text) == (413, "Too much")


async def test_a_site_ends_while_somebody_polls(stage: Stage) -> None:
    url = stage.start_site()
    async with browser(url) as web:
        poll = await begin_poll(web)
        await asyncio.to_thread(httpx.get, f"{url}/nothing")
        site = stage.running[0]
        assert await asyncio.to_thread(site.end) in (0, -15), site.log
        assert "Traceback" not in site.log
        assert (await poll).status_code == 200, "who polls is let go of, and not cut off"


# -- in this process, to see what a site remembers


@pytest.mark.parametrize("name", SITES)
async def test_who_polls_no_more_is_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_BROKER", f"memory://{name}")
    site = load(name)
    async with served(site) as url, browser(url) as web:
        polls = [await begin_poll(web) for _ in range(3)]
        await eventually(lambda: len(site.polls) == 3)
        for poll in polls[1:]:
            poll.cancel()
        await asyncio.gather(*polls[1:], return_exceptions=True)
        await eventually(lambda: len(site.polls) == 1)
        assert (await web.post("/publish2", content=b"still here?")).status_code == 204
        assert (await polls[0]).content == b"still here?"
        assert not site.polls


@pytest.mark.parametrize("name", SITES)
async def test_a_poll_that_hears_nothing_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_BROKER", f"memory://{name}")
    site = load(name)
    monkeypatch.setattr(site, "LONGEST_POLL", 0.2)
    async with served(site) as url, browser(url) as web:
        answer = await web.get("/subscribe")
        assert (answer.status_code, answer.content) == (204, b"")
        assert not site.polls


def load(name: str) -> ModuleType:
    """An example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"examples_web_{name}", WEB / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def served(module: ModuleType) -> AsyncIterator[str]:
    """The site of a module in this event loop; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    if module.__name__.endswith("tornado"):
        async with module.client:
            await module.listener
            server = HTTPServer(module.site)
            server.add_sockets([listening])
            yield url
            server.stop()
            await server.close_all_connections()
    else:
        uvicorn_server = uvicorn.Server(uvicorn.Config(module.site, log_config=None, timeout_graceful_shutdown=5))
        serving = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
        yield url
        uvicorn_server.should_exit = True
        await serving
