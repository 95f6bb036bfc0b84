"""`WS /console`: off unless switched on, for those who may edit, and nobody who has gone keeps anything running."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from penstock.clock import SystemClock
from penstock.node import console as console_module
from penstock.node.node import NodeOptions
from penstock.web.access import SESSION_LIVES
from penstock.web.api import console as console_api
from penstock.web.roles import Role
from tests.helpers import eventually
from tests.web.conftest import TOKENS, Served, started

EDIT = {"Authorization": f"Bearer {TOKENS[Role.EDIT]}"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with started(tmp_path, NodeOptions(console=True, name="alpha")) as one:
        yield one


class Typist:
    """A shell, as a page of a browser could be one."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, **asked: Any) -> None:
        await self.socket.send(json.dumps(asked))

    async def until(self, kind: str) -> list[dict[str, Any]]:
        """What it says, up to the first of a kind."""
        said: list[dict[str, Any]] = []
        async with asyncio.timeout(20):
            while not said or said[-1]["type"] != kind:
                said.append(json.loads(await self.socket.recv()))
        return said

    async def run(self, code: str) -> tuple[str, str]:
        """What came of it, and what it printed."""
        await self.say(type="run", code=code)
        *said, prompt = await self.until("prompt")
        return prompt["outcome"], "".join(one["text"] for one in said)

    async def closed(self) -> tuple[int, str]:
        """Code and reason."""
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or ""


def address(served: Served) -> str:
    return served.url.replace("http", "ws", 1) + "/console"


@contextlib.asynccontextmanager
async def opened(served: Served, headers: dict[str, str] | None = None, **options: Any) -> AsyncIterator[Typist]:
    given = EDIT if headers is None else headers
    async with connect(address(served), additional_headers=given, proxy=None, **options) as socket:
        typist = Typist(socket)
        await typist.until("prompt")
        yield typist


async def refused(served: Served, **headers: str) -> tuple[int, str]:
    """Status and line."""
    with pytest.raises(InvalidStatus) as error:
        async with connect(address(served), additional_headers=headers, proxy=None):
            pass
    answer = error.value.response
    return answer.status_code, json.loads(answer.body or b"{}")["detail"]


async def audit(served: Served, what: str) -> list[dict[str, Any]]:
    """The oldest first."""
    found = (await served.ask("GET", "/audit")).json()
    return [one for one in reversed(found) if one["what"] == what]


# -- who


async def test_it_is_off_even_for_who_may_do_everything(tmp_path: Path) -> None:
    async with started(tmp_path) as served:
        status, why = await refused(served, **EDIT)
        assert (status, why) == (403, "the console of this node is off: `penstock serve --console` has one")
        assert [one["outcome"] for one in await audit(served, "console.open")] == ["refused: it is off"]


async def test_only_who_may_edit_comes_in(served: Served) -> None:
    assert (await refused(served))[0] == 401
    assert (await refused(served, Authorization="Bearer wrong"))[0] == 401
    for role in (Role.VIEW, Role.OPERATE):
        assert (await refused(served, Authorization=f"Bearer {TOKENS[role]}"))[0] == 403
        weak = await served.signed_in(role)
        assert (await refused(served, Cookie=weak, Origin=served.url))[0] == 403
    assert (await refused(served, Host="evil.example", **EDIT))[0] == 400
    async with opened(served) as typist:
        assert await typist.run("1 + 1") == ("ok", "2\n")


async def test_a_session_comes_in_from_exactly_our_own_page(served: Served) -> None:
    cookie = await served.signed_in()
    for origin in ("http://evil.example", "null", served.url + "1", served.url.replace("127.0.0.1", "localhost")):
        assert (await refused(served, Cookie=cookie, Origin=origin))[0] == 403, origin
        assert (await refused(served, Origin=origin, **EDIT))[0] == 403, origin
    assert (await refused(served, Cookie=cookie))[0] == 403
    async with opened(served, {"Cookie": cookie, "Origin": served.url}) as typist:
        assert await typist.run("'in'") == ("ok", "'in'\n")


# -- what it says


async def test_it_begins_with_who_it_is_and_answers_line_by_line(served: Served) -> None:
    async with connect(address(served), additional_headers=EDIT, proxy=None) as socket:
        typist = Typist(socket)
        hello, prompt = await typist.until("prompt")
        assert (hello["type"], hello["node"]) == ("hello", "alpha")
        assert prompt == {"type": "prompt", "more": False, "outcome": "none"}
        await typist.say(type="line", text="print(await asyncio.sleep(0, 'é'))")
        assert await typist.until("prompt") == [{"type": "prompt", "more": True, "outcome": "none"}]
        await typist.say(type="line", text="")
        assert await typist.until("prompt") == [
            {"type": "output", "text": "é\n"},
            {"type": "prompt", "more": False, "outcome": "ok"},
        ]
        await typist.say(type="run", code="exit(3)")
        assert await typist.until("left") == [{"type": "left", "status": 3}]
        assert await typist.closed() == (1000, "")


async def test_what_runs_is_interrupted(served: Served) -> None:
    async with opened(served) as typist:
        await typist.say(type="run", code="print('begun')\nawait asyncio.sleep(1000)")
        await typist.until("output")
        await typist.say(type="interrupt")
        problem, prompt = await typist.until("prompt")
        assert (problem["text"], prompt["outcome"]) == ("KeyboardInterrupt\n", "interrupted")
        assert await typist.run("1") == ("ok", "1\n")


@pytest.mark.parametrize("frame", ["", "[]", "{}", '{"type":"line"}', '{"type":"sing"}', '{"type":"end","x":1}', b"\0"])
async def test_what_no_shell_says_ends_the_session_and_not_the_node(served: Served, frame: str | bytes) -> None:
    async with opened(served) as typist:
        await typist.socket.send(frame)
        code, why = await typist.closed()
        assert code == 1008
        assert why.startswith("not what a shell says")
    async with opened(served) as typist:
        assert await typist.run("1") == ("ok", "1\n")


async def test_an_input_has_a_ceiling(served: Served) -> None:
    async with opened(served) as typist:
        assert (await typist.run("x = '" + "x" * 1_000_000 + "'"))[0] == "ok"
        await typist.say(type="run", code="x" * 2**20)
        assert (await typist.closed())[0] == 1009


# -- who has gone


async def test_a_shell_that_vanishes_leaves_nothing_running(served: Served) -> None:
    async with opened(served) as typist:
        await typist.run("import builtins")
        await typist.run("debug()")
        code = "print('begun')\ntry:\n  await asyncio.sleep(1000)\nfinally: context.settings['ended'] = True"
        await typist.say(type="run", code=code)
        await typist.until("output")
        typist.socket.transport.abort()
        await eventually(lambda: "ended" in served.node.app.settings)
    console = served.node.console
    assert console is not None
    await eventually(lambda: not console._sessions)
    assert served.node.app.client._listening.find("penstock.debug", None) == []
    last = (await audit(served, "console.input"))[-1]
    assert (last["outcome"], last["detail"].startswith("print('begun')")) == ("cancelled: the session ended", True)


async def test_who_signs_out_or_is_out_of_time_has_no_console_any_more(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def signs_out(cookie: str) -> None:
        answer = await served.ask("POST", "/signout", None, headers={"Cookie": cookie, "Origin": served.url})
        assert answer.status_code == 204

    async def waits(_: str) -> None:
        clock.ahead += SESSION_LIVES

    clock = Ahead()
    monkeypatch.setattr(served.http._site.access, "_clock", clock)
    monkeypatch.setattr(console_api, "LOOK", 0.01)
    for end in (signs_out, waits):
        for code in ("", "print('begun')\nawait asyncio.sleep(1000)"):
            cookie = await served.signed_in()
            async with opened(served, {"Cookie": cookie, "Origin": served.url}) as typist, opened(served) as other:
                if code:
                    await typist.say(type="run", code=code)
                    await typist.until("output")
                await end(cookie)
                assert await typist.closed() == (1008, "the session is over: sign in again")
                assert await other.run("1") == ("ok", "1\n")  # it has a token
    assert [one["outcome"] for one in await audit(served, "console.input") if "begun" in one["detail"]] == [
        "cancelled: the session ended",
        "cancelled: the session ended",
    ]


async def test_an_input_after_the_sign_out_is_not_run(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_api, "LOOK", 1000.0)
    cookie = await served.signed_in()
    async with opened(served, {"Cookie": cookie, "Origin": served.url}) as typist:
        await served.ask("POST", "/signout", None, headers={"Cookie": cookie, "Origin": served.url})
        await typist.say(type="run", code="context.settings['ran'] = True")
        assert (await typist.closed())[0] == 1008
    assert "ran" not in served.node.app.settings


async def test_who_is_signed_out_and_does_not_read_keeps_nothing_running(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_api, "LOOK", 0.01)
    monkeypatch.setattr(console_api, "CLOSE_WITHIN", 0.1)
    cookie = await served.signed_in()
    given = {"Cookie": cookie, "Origin": served.url}
    async with opened(served, given, max_queue=1, compression=None) as typist:
        stubborn = (
            "while True:\n  print('x' * 100_000)\n  try: await asyncio.sleep(0.001)\n  except BaseException: n += 1"
        )
        await typist.say(type="run", code=f"n = 0\n{stubborn.replace('True', 'n < 3')}")
        console = served.node.console
        assert console is not None
        await eventually(lambda: any(one._screen._size > 2**20 for one in console._sessions))
        await served.ask("POST", "/signout", None, headers=given)
        await eventually(lambda: not console._sessions)
        typist.socket.transport.abort()


class Ahead(SystemClock):
    """A clock that can be put forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


async def test_the_node_s_stop_ends_sessions_with_a_reason(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with started(tmp_path, NodeOptions(console=True)) as served:
            typist = await stack.enter_async_context(opened(served))
            await typist.say(type="run", code="print('begun')\nawait asyncio.sleep(1000)")
            await typist.until("output")
            closed = asyncio.create_task(typist.closed())
        assert await closed == (1001, "the node is stopping")


async def test_who_does_not_read_costs_bounded_memory_and_holds_up_nobody(served: Served) -> None:
    async with opened(served) as other, opened(served, max_queue=1, compression=None) as typist:
        await typist.say(type="run", code="for n in range(300):\n  print('x' * 100_000)\n  await asyncio.sleep(0)")
        assert await other.run("1") == ("ok", "1\n")
        console = served.node.console
        assert console is not None
        await eventually(lambda: any(one._screen._size > 2**20 and not one._running for one in console._sessions))
        assert all(one._screen._size < 3 * 2**20 for one in console._sessions)
        said = await typist.until("prompt")
        text = "".join(one["text"] for one in said[:-1])
        assert "characters are left out" in text
        assert len(text) < 30_000_000
        assert await typist.run("2") == ("ok", "2\n")


async def test_there_are_so_many_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "MOST_SESSIONS", 1)
    async with opened(served):
        assert await refused(served, **EDIT) == (503, "1 consoles are open already: a node has no more")
    console = served.node.console
    assert console is not None
    await eventually(lambda: not console._sessions)
    async with opened(served) as typist:
        assert await typist.run("1") == ("ok", "1\n")


# -- what is written down


async def test_opening_and_each_input_are_in_the_audit_without_secrets(served: Served) -> None:
    async with opened(served) as typist:
        await typist.run("password = 'swordfish'")
        await typist.run("1/0")
        await typist.run("x = '" + "y" * 5000 + "'")
    (entry,) = await audit(served, "console.open")
    assert (entry["who"], entry["target"], entry["outcome"]) == ("token edit 127.0.0.1", "alpha", "ok")
    first, second, third = await audit(served, "console.input")
    assert (first["who"], first["target"], first["outcome"]) == ("token edit 127.0.0.1", "alpha", "ok")
    assert first["detail"].startswith("password = ***")
    assert "swordfish" not in json.dumps(first)
    assert (second["detail"], second["outcome"]) == ("1/0", "ZeroDivisionError: division by zero")
    assert len(third["detail"]) <= 1000
