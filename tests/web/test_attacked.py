"""What somebody who may do little, or nothing, could do to a node or learn from it, and can no more."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
from typing import Any

import pytest

from penstock.control import masking
from penstock.web import protocol
from penstock.web import shown as showing
from penstock.web.access import FAILURES, Failures
from penstock.web.gate import Gate
from penstock.web.hosts import Hosts, check_name
from penstock.web.roles import Role
from penstock.web.server import _Server
from tests.helpers import eventually
from tests.web.conftest import TOKENS, Served

TOKEN = b"Authorization: Bearer " + TOKENS[Role.OPERATE].encode() + b"\r\n"

# -- what is in the way


async def test_a_body_that_comes_together_with_its_head_may_be_as_large_as_any(served: Served) -> None:
    content = {"topic": "nobody", "content": {"text": "x" * (protocol.MOST_HEAD + 20_000)}}
    body = json.dumps(content).encode()
    head = b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + TOKEN
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 202 "), answer[-200:]


async def test_who_does_not_take_the_answer_is_cut_off(
    gates: list[Gate], servers: list[_Server], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could hold every connection that there may be, with what is open to everybody, too."""
    monkeypatch.setattr(protocol, "TAKEN_WITHIN", 0.2)
    connections = servers[0].server_state.connections
    with socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        idle.connect(("127.0.0.1", served.http.port))
        idle.sendall((b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n" + TOKEN + b"\r\n") * 300)
        await eventually(lambda: gates[0].counts["http_requests"] > 0)
        await eventually(lambda: not connections, "it is cut off")
        assert gates[0].counts["http_requests"] < 300, "its buffers did not hold all answers"


async def test_nobody_can_take_all_connections(servers: list[_Server], served: Served) -> None:
    servers[0].config.limit_concurrency = 8
    connections = servers[0].server_state.connections
    idle = [await asyncio.open_connection("127.0.0.1", served.http.port) for _ in range(6)]
    try:
        await eventually(lambda: len(connections) == 6)
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http.port)
        idle.append((reader, writer))
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        other = await asyncio.open_connection("127.0.0.1", served.http.port, local_addr=("127.0.0.2", 0))
        idle.append(other)
        other[1].write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 200 " in await other[0].readline()
    finally:
        for _, writer in idle:
            writer.close()


class Waiting:
    """The transport of an answer of which some waits to be taken."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(("left", "aborted"), [(0, False), (1, True)])
async def test_who_takes_the_answer_slowly_may_go_on(
    servers: list[_Server], served: Served, monkeypatch: pytest.MonkeyPatch, left: int, aborted: bool
) -> None:
    async with served.client(None) as client:
        await client.get("/livez")
        (connection,) = servers[0].server_state.connections
        assert isinstance(connection, protocol.Protocol)
        waiting = Waiting(100_000 - protocol.LEAST_TAKEN + left)
        monkeypatch.setattr(connection, "transport", waiting)
        connection._look_what_is_taken(100_000)
        assert waiting.aborted is aborted
        assert (connection._taking is None) is aborted
        connection._taken()
        monkeypatch.undo()


@pytest.mark.parametrize("mapped", [True, False])
def test_others_that_come_by_ipv4_are_heard_whatever_one_of_them_does(mapped: bool) -> None:
    """Where `::` is listened on, each of them has an address of IPv6."""
    prefix = "::ffff:" if mapped else ""
    failures = Failures()
    for _ in range(FAILURES):
        failures.count(f"{prefix}203.0.113.9")
    assert failures.wait(f"{prefix}203.0.113.9") > 0
    assert failures.wait(f"{prefix}198.51.100.7") == 0


@pytest.mark.parametrize("host", ["[127.0.0.1]", "[127.0.0.1]:8470"])
def test_a_host_in_brackets_is_of_ipv6(host: str) -> None:
    assert not Hosts(any_address=True).allows(host)
    assert Hosts(any_address=True).allows("[::1]:8470")
    assert check_name("::1") == "::1"


# -- what is learned


async def test_masking_does_not_hold_up_the_node(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of a few MiB takes seconds to be masked: for whoever asks, and not for all that the node does."""
    inside = threading.Event()
    go_on = threading.Event()
    mask = masking.values

    def slowly(value: Any, hidden: Any = ()) -> Any:
        inside.set()
        assert go_on.wait(20)
        return mask(value, hidden)

    monkeypatch.setattr(masking, "values", slowly)
    await served.node.send("nobody", {"password": "hunter2"})
    asking = asyncio.create_task(served.ask("GET", "/tasks", Role.VIEW))
    try:
        await eventually(inside.is_set, "it is being masked")
        assert (await served.ask("GET", "/livez", None)).status_code == 200
        assert not asking.done()
    finally:
        go_on.set()
    answer = await asking
    assert answer.status_code == 200
    assert "hunter2" not in answer.text


async def test_what_cannot_be_looked_at_in_time_is_not_shown(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showing, "MOST_TEXT", 10_000)
    texts = ["said " * 100] * 100
    taskid = await served.node.send("nobody", {"texts": texts, "n": 1})
    content = (await served.ask("GET", f"/tasks/{taskid}", Role.VIEW)).json()["content"]
    assert content["texts"][0] == texts[0]
    assert content["texts"][-1] == masking.STARS
    assert content["n"] == 1
    assert (await served.ask("GET", f"/tasks/{taskid}")).json()["content"]["texts"] == texts


async def test_a_task_that_is_nested_deeply_hides_no_other(served: Served) -> None:
    deep: Any = "hunter2"
    for _ in range(900):
        deep = [deep]
    other = await served.node.send("nobody", {"name": "Neo"})
    await served.node.app.client.send("nobody", {"deep": deep})
    answer = await served.ask("GET", "/tasks", Role.VIEW)
    assert answer.status_code == 200, answer.text
    assert other in answer.text
    assert "hunter2" not in answer.text


async def test_a_body_that_is_no_text_is_shown_to_who_may_edit_alone(served: Served) -> None:
    """Nor is one that unpacks to more than is looked at, which is shown packed."""
    body = b"\xff\xfe password=hunter2"
    await served.node.app.client.publish("greet", body, headers={"content-type": "application/json"})

    async def dead() -> bool:
        return bool((await served.ask("GET", "/queues/greet/dead")).json()["letters"])

    await eventually(dead)
    coded = base64.b64encode(body).decode()
    (letter,) = (await served.ask("GET", "/queues/greet/dead")).json()["letters"]
    assert letter["body"] == {"base64": coded}
    for role in (Role.VIEW, Role.OPERATE):
        (letter,) = (await served.ask("GET", "/queues/greet/dead", role)).json()["letters"]
        assert letter["body"] == {"base64": masking.STARS}


async def test_what_a_script_holds_is_shown_to_who_may_edit_alone(served: Served) -> None:
    job = "name: asks\ntopics: [ask]\nscript: |\n  api_key = 'hunter2'\n  return len(task.content)\n"
    assert (await served.ask("PUT", "/definitions/jobs/asks", content=job)).status_code == 200
    for path in ("/definitions/jobs", "/definitions/jobs/asks"):
        assert "hunter2" in (await served.ask("GET", path)).text
        for role in (Role.VIEW, Role.OPERATE):
            text = (await served.ask("GET", path, role)).text
            assert "hunter2" not in text
            assert "return len(task.content)" in text


@pytest.mark.parametrize("left", [4, 8, 10])
async def test_a_secret_that_was_cut_in_two_is_not_shown_either(served: Served, left: int) -> None:
    """Whoever sends the task says where the error, of which 1000 characters are kept, is cut."""
    secret = "swordfish-42"
    await served.ask("PUT", "/definitions/configs/db", content=f"password: {secret}\n")
    job = (
        "name: tells\ntopics: [tell]\nscript: |\n"
        "  raise ValueError(task.content.pad + (await get_service_config('db'))['password'] + ' is refused')\n"
    )
    await served.ask("PUT", "/definitions/jobs/tells", content=job)
    pad = "x" * (1000 - len("ValueError: ") - left)

    async def dead() -> bool:
        await served.ask("POST", "/tasks", json={"topic": "tell", "content": {"pad": pad}})
        answer = await served.ask("GET", "/queues/tells/dead")
        return answer.status_code == 200 and bool(answer.json()["letters"])

    await eventually(dead)
    error = (await served.ask("GET", "/queues/tells/dead")).json()["letters"][0]["error"]
    assert error.endswith("x" + secret[:left]), "it is cut there"
    for role in (Role.VIEW, Role.OPERATE):
        letters = (await served.ask("GET", "/queues/tells/dead", role)).json()["letters"]
        assert letters[0]["error"].endswith("x")


@pytest.mark.parametrize("cut", ["", "…"])
@pytest.mark.parametrize("part", ["abab", "ababc", "ababcab", "ababcaba"])
def test_what_is_left_of_a_secret_at_the_ends_of_a_text_goes_and_nothing_else(part: str, cut: str) -> None:
    secret, told = "ababcabab", "it was told " * 20
    bounds = showing._Bounds([secret])
    assert bounds.within(told + part + cut) == told
    assert bounds.within(secret[-len(part) :] + told) == told
    assert bounds.within(f"{told}cab{cut}") == f"{told}cab{cut}"
    assert bounds.within(f"bab {told}") == f"bab {told}"
    assert bounds.within(part) == part
