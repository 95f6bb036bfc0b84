"""Asking a node: the answer or one line, in bounded time, whatever is there; and the token goes nowhere else.

And `penstock tasks` and `queues`: over HTTP they say what they say without.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from penstock.cli import remote
from penstock.cli.letters import OnNode
from penstock.cli.remote import NodeError, Refusal, Remote
from penstock.control.dead_letters import Letters, Outcome, Selection
from penstock.errors import ConfigError
from tests.cli.conftest import COMMAND, Shell
from tests.cli.hosting import Hosted, hosted, refused_port
from tests.helpers import eventually_sync


class Scripted(ThreadingHTTPServer):
    """Answers everything with what it is told, and remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: tuple[int, dict[str, str], bytes] = (200, {}, b"{}")
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def says(self, status: int, body: Any, **headers: str) -> None:
        self.answer = status, headers, body if isinstance(body, bytes) else json.dumps(body).encode()


class _Handler(BaseHTTPRequestHandler):
    def _reply(self) -> None:
        assert isinstance(self.server, Scripted)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        status, headers, answer = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = _reply

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of something that treats one connection so."""
    over = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            wire, _ = listener.accept()
            with wire:
                wire.recv(65_536)
                answer(wire)
                over.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def error_of(url: str, token: str | None = None) -> str:
    with pytest.raises(NodeError) as raised:
        Remote(url, token).get("/workers", list[str])
    text = str(raised.value)
    assert "\n" not in text
    return text


# -- what is sent


def test_names_and_queries_arrive_as_they_are(server: Scripted) -> None:
    node = Remote(f"{server.url}/below/", "abc")
    node.get(f"/tasks/{remote.part('a/b ?#ü%')}", dict, topic="x&y=z", state=None)
    node.post("/queues/q/pause", dict, {"limit": 3})
    (first, second) = server.seen
    assert first[:2] == ("GET", "/below/tasks/a%2Fb%20%3F%23%C3%BC%25?topic=x%26y%3Dz")
    assert first[2]["Authorization"] == "Bearer abc"
    assert second[:2] == ("POST", "/below/queues/q/pause")
    assert (second[2]["Content-Type"], second[3]) == ("application/json", b'{"limit":3}')


def test_the_token_follows_no_redirection(server: Scripted) -> None:
    with Scripted() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.says(307, b"", Location=f"{other.url}/workers")
        assert error_of(server.url, "abc") == f"{server.url} is somewhere else: --url {other.url}/workers"
        assert other.seen == []
        other.shutdown()
        thread.join()


def test_a_proxy_of_the_environment_is_not_asked(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{refused_port()}")
    server.says(200, ["x"])
    assert Remote(server.url, "abc").get("/workers", list[str]) == ["x"]


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8470",
        "ftp://h/",
        "http://",
        "http://h:x",
        "http://h:99999",
        "http://neo:swordfish@h",
        "http://h/?token=swordfish",
        "http://h/#x",
        "http://h/a b",
        "http://ü/",
        "",
    ],
)
def test_what_is_no_url_of_a_node_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Remote(url, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel", "tab\t"])
def test_what_no_header_can_hold_is_no_token(token: str) -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_TOKEN"):
        Remote("http://127.0.0.1", token)


# -- what comes back


def test_a_refusal_is_what_the_node_says(server: Scripted) -> None:
    for status in (404, 409, 422, 429):
        server.says(status, {"detail": "no worker is named 'x'"})
        assert error_of(server.url) == "no worker is named 'x'"
    server.says(409, {"detail": "taken"})
    with pytest.raises(Refusal) as raised:
        Remote(server.url, None).post("/x", dict)
    assert raised.value.status == 409


def test_all_problems_are_told(server: Scripted) -> None:
    problems = [{"file": "a.yml", "line": 3, "text": "no mode"}, {"file": None, "line": None, "text": "no script"}]
    server.says(422, {"detail": "invalid", "problems": problems})
    assert error_of(server.url) == "a.yml:3: no mode; no script"


def test_a_missing_and_a_wrong_token_are_told_apart(server: Scripted) -> None:
    server.says(401, {"detail": "sign in"})
    assert error_of(server.url).endswith("wants a token: set PENSTOCK_TOKEN or PENSTOCK_TOKEN_FILE")
    text = error_of(server.url, "swordfish")
    assert text.endswith("does not take the token of PENSTOCK_TOKEN")
    assert "swordfish" not in text


def test_an_error_of_the_server_says_its_number(server: Scripted) -> None:
    server.says(503, {"detail": "the broker is away"})
    assert error_of(server.url) == f"the node at {server.url} answers 503: the broker is away"
    server.says(500, b"<html>oh no</html>")
    assert error_of(server.url) == f"{server.url} answers GET /workers with status 500 (Internal Server Error)"


@pytest.mark.parametrize("body", [b"<html>", b"", b'{"a": 1}', b"[1]", b"\xff", b'{"detail": [1]}'])
def test_what_is_no_node_is_one_line(server: Scripted, body: bytes) -> None:
    server.says(200, body)
    assert "does not answer GET /workers as a node does: " in error_of(server.url)
    server.says(404, body)
    assert error_of(server.url) == f"{server.url} has no GET /workers: is it a node of Penstock?"


def test_an_answer_without_end_is_cut(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST", 2**20)
    server.says(200, b" " * (2**20 + 1))
    assert "with more than 1 MiB" in error_of(server.url)
    server.says(200, b" " * (2**20 - 2) + b"[]")
    assert Remote(server.url, None).get("/workers", list[str]) == []


@pytest.mark.parametrize("last", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]"])
def test_what_ends_early_or_speaks_otherwise_is_one_line(last: bytes) -> None:
    def answer(wire: socket.socket) -> None:
        wire.sendall(last)
        wire.shutdown(socket.SHUT_RDWR)

    with answering(answer) as url:
        assert url in error_of(url)


def test_no_answer_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER", 0.3)
    with answering(lambda wire: None) as url:
        assert error_of(url) == f"the node at {url} did not answer within 0.3 s"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b""])
def test_an_answer_that_drips_ends_in_time(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER", 0.5)

    def drip(wire: socket.socket) -> None:
        wire.sendall(head)
        for _ in range(2000):
            wire.sendall(b"x")
            time.sleep(0.01)

    with answering(drip) as url:
        begun = time.monotonic()
        assert "did not answer within 0.5 s" in error_of(url)
        assert time.monotonic() - begun < 5


def test_a_host_that_nobody_knows_and_a_port_that_nobody_has() -> None:
    assert "the host is not known" in error_of("http://nobody.invalid:8470")
    port = refused_port()
    assert error_of(f"http://127.0.0.1:{port}").startswith(f"no node answers at http://127.0.0.1:{port}: is `penstock")
    assert error_of(f"http://[::1]:{port}").startswith("no node answers at http://[::1]:")


def test_plain_http_is_not_taken_for_tls(server: Scripted) -> None:
    assert error_of(server.url.replace("http:", "https:"))


# -- as commands


def interrupted(shell: Shell, arguments: list[str]) -> int:
    """The status of a command that is interrupted while it waits for an answer."""
    asked = threading.Event()
    with answering(lambda wire: asked.set()) as url:
        process = subprocess.Popen([*COMMAND, *arguments, "--url", url], env=shell.environment)
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        return process.wait(10)


def test_an_error_is_status_1_and_an_interrupt_130(penstock: Shell) -> None:
    for arguments in (
        ["workers"],
        ["nodes"],
        ["config"],
        ["tasks"],
        ["queues"],
        ["tasks", "cancel", "x"],
        ["dead", "list", "q"],
    ):
        assert penstock(*arguments, "--url", f"http://127.0.0.1:{refused_port()}", status=1).error
    for arguments in (["workers"], ["tasks", "cancel", "x"], ["queues", "pause", "x"]):
        assert interrupted(penstock, arguments) == 130


def test_the_token_of_the_environment_is_sent_and_of_a_file_too(penstock: Shell, server: Scripted) -> None:
    server.says(200, [])
    (penstock.folder / "token").write_text("from-the-file\n")
    penstock("workers", "--url", server.url, PENSTOCK_TOKEN="from-the-environment")
    penstock("workers", "--url", server.url, PENSTOCK_TOKEN_FILE="token")
    penstock("workers", "--url", server.url, XDG_RUNTIME_DIR=str(penstock.folder))
    sent = [headers.get("Authorization") for _, _, headers, _ in server.seen]
    assert sent == ["Bearer from-the-environment", "Bearer from-the-file", None]


# -- tasks and queues of a real node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosted, str]]:
    with hosted(tmp_path_factory.mktemp("node")) as found:
        yield found


class Both:
    """A command asked over HTTP, and the broker and store asked directly."""

    def __init__(self, shell: Hosted, url: str) -> None:
        self.shell = shell
        self.http = ["--url", url]
        database = f"sqlite:///{shell.folder}/served/penstock.db"
        self.direct = ["--broker", database, "--store", database]

    def send(self, topic: str, content: str, *options: str) -> str:
        return self.shell("send", topic, content, *options, *self.direct).out.strip()

    def ended(self, taskid: str) -> None:
        """Wait for it."""
        eventually_sync(lambda: self.shell("tasks", "show", taskid, "--json", *self.http).json["completedAt"])

    def same(self, *arguments: str, status: int = 0) -> Any:
        """What both say, which is the same."""
        over = self.shell(*arguments, *self.http, status=status)
        assert over == self.shell(*arguments, *self.direct, status=status)
        return over


@pytest.fixture
def both(node: tuple[Hosted, str]) -> Both:
    return Both(*node)


def test_tasks_are_told_the_same_either_way(both: Both) -> None:
    done = both.send("hello", '{"name": "Neo"}')
    failed = both.send("hello", '{"name": "Smith"}')
    both.ended(done)
    both.ended(failed)
    assert [one["taskid"] for one in both.same("tasks", "--json").json] == [failed, done]
    assert [one["taskid"] for one in both.same("tasks", "list", "--state", "failed", "--json").json] == [failed]
    assert both.same("tasks", "list", "--topic", "slow", "--json").json == []
    assert both.same("tasks", "--limit", "1").err == "these are the latest 1: --limit shows more\n"
    assert both.same("tasks").out.count("\n") == 3
    assert "result:    hello Neo" in both.same("tasks", "show", done).out
    assert both.same("tasks", "show", failed, "--json").json["runs"][0]["error"]["type"] == "ValueError"
    assert "there is no task 'nono'" in both.same("tasks", "show", "nono", status=1).error
    assert "it has succeeded" in both.same("tasks", "retry", done, status=1).error
    assert "it has failed" in both.same("tasks", "cancel", failed, status=1).error
    assert (
        both.shell("tasks", "list", "--limit", "5000", "--json", *both.http).json == both.same("tasks", "--json").json
    )


def test_tasks_are_cancelled_and_tried_again_over_http(both: Both) -> None:
    taskid = both.send("slow", "{}")
    eventually_sync(lambda: both.shell("tasks", "show", taskid, "--json", *both.http).json["state"] == "running")
    result = both.shell("tasks", "cancel", taskid, "nono", "--json", *both.http, status=1)
    assert result.json == [{"taskid": taskid, "state": "running"}]
    assert "there is no task 'nono'" in result.error
    eventually_sync(lambda: both.shell("tasks", "show", taskid, "--json", *both.http).json["state"] == "cancelled")
    assert both.shell("tasks", "cancel", taskid, *both.http).out == f"{taskid} is cancelled\n"
    assert both.shell("tasks", "retry", taskid, *both.http).out == f"{taskid} is queued again for linger\n"
    both.shell("tasks", "cancel", taskid, *both.http)
    eventually_sync(lambda: both.shell("tasks", "show", taskid, "--json", *both.http).json["state"] == "cancelled")
    again = both.shell("tasks", "retry", taskid, "--json", *both.http).json
    assert again == [{"taskid": taskid, "tasks": ["linger"]}]
    both.shell("tasks", "cancel", taskid, *both.http)


def test_queues_are_told_the_same_either_way(both: Both) -> None:
    assert both.shell("queues", "pause", "greet", *both.http).out == "greet is paused\n"
    try:
        assert both.same("queues").out.count("paused") == 1
        assert [one["name"] for one in both.same("queues", "greet", "--json").json] == ["greet"]
        assert set(both.same("queues", "greet", "--json").json[0]) == {
            "name",
            "ready",
            "unsettled",
            "consumers",
            "dead",
            "oldest_s",
        }
        both.send("greet", '{"name": "x"}', "--expires", "never")
        eventually_sync(lambda: both.shell("queues", "greet", "--json", *both.http).json[0]["ready"] == 1)
        assert "--yes" in both.same("queues", "purge", "greet", status=2).error
        purged = both.shell("queues", "purge", "greet", "--yes", "--json", *both.http).json
        assert purged == {"queue": "greet", "purged": 1}
        assert "did you mean 'greet'?" in both.same("queues", "list", "gret", status=1).error
        for verb in ("pause", "resume"):
            assert "did you mean 'greet'?" in both.same("queues", verb, "gret", status=1).error
    finally:
        resumed = both.shell("queues", "resume", "greet", "--json", *both.http).json
    assert resumed == {"queue": "greet", "paused": False}


def test_dead_letters_are_told_and_settled_the_same_either_way(both: Both) -> None:
    def dead(*arguments: str, status: int = 0) -> Any:
        return both.same("dead", *arguments, status=status)

    def count() -> int:
        return len(both.shell("dead", "list", "greet", "--limit", "1000", "--json", *both.http).json)

    before = count()
    for _ in range(3):
        both.ended(both.send("hello", '{"name": "Smith"}'))
    eventually_sync(lambda: count() == before + 3)
    letters = dead("list", "greet", "--limit", "1000", "--json").json
    assert letters[-1]["error"] == "ValueError: not him"
    assert "not him" in dead("list", "greet").out
    assert f"these are 1 of {before + 3}" in dead("show", "greet", "--newest", "--limit", "1").err
    last = letters[-1]["id"]
    assert dead("show", "greet", last, "--json").json == letters[-1]
    assert "has no dead letter 'nono'" in dead("show", "greet", "nono", status=1).error
    assert "did you mean 'greet'?" in dead("list", "gret", status=1).error
    assert "--yes" in dead("discard", "greet", status=2).error
    assert "no such dead letters" in dead("replay", "greet", "--id", "nono", status=1).error
    discarded = both.shell("dead", "discard", "greet", "--id", last, "--yes", "--json", *both.http).json
    assert discarded == {"queue": "greet", "discarded": 1}
    replayed = both.shell("dead", "replay", "greet", "--reason", "failed", "--limit", "1", "--json", *both.http).json
    assert replayed == {"queue": "greet", "replayed": 1}
    eventually_sync(lambda: count() == before + 2, "it fails again")
    again = both.shell("dead", "replay", "greet", *both.http).out
    assert again == f"replayed {before + 2} of greet\n"
    eventually_sync(lambda: count() == before + 2, "all fail again, and are replayed once")
    assert "--to" in both.shell("dead", "replay", "greet", "--to", "memory://", *both.http, status=2).error
    assert both.shell("dead", "discard", "greet", "--yes", *both.http).out == f"discarded {before + 2} of greet\n"
    assert count() == 0


class Letterbox:
    """A node with as many dead letters as there are numbers; those that are stuck cannot be replayed, the others fail
    again at once."""

    def __init__(self, letters: int, stuck: int = 0) -> None:
        self.died = [0.0] * letters
        self.stuck = stuck
        self.replays = [0] * letters
        self.now = 0.0

    def get(self, path: str, type: Any, **query: Any) -> Any:
        return Letters([], len(self.died))

    def post(self, path: str, type: Any, body: Any) -> Any:
        self.now += 1
        before = body.get("before", self.now)
        chosen = [n for n, at in enumerate(self.died) if at <= before][: body["limit"]]
        gone = [n for n in chosen if n >= self.stuck]
        for n in gone:
            self.replays[n] += 1
            self.died[n] = self.now + 0.5
        told = {"done": len(gone), "stayed": len(chosen) - len(gone), "before": before, "why": "stuck"}
        return msgspec.convert(told if self.stuck else {**told, "why": None}, type)


@pytest.mark.parametrize(
    ("letters", "stuck", "limit"), [(2500, 0, None), (2500, 7, None), (2500, 0, 1200), (999, 1, None)]
)
def test_each_letter_is_replayed_once_however_many_there_are(letters: int, stuck: int, limit: int | None) -> None:
    node, outcome = Letterbox(letters, stuck), Outcome()
    OnNode(cast(Remote, node), "q").replay(Selection(reason="failed", limit=limit), outcome, None)
    assert outcome.done == sum(node.replays) == (limit or letters - stuck)
    assert max(node.replays) == 1
    assert outcome.stayed == stuck


def test_a_node_with_a_token_of_its_own_wants_it(tmp_path: Path) -> None:
    shell = Hosted(tmp_path)
    token: dict[str, Any] = {"PENSTOCK_TOKEN": "a-token-that-is-long-enough-for-all"}
    try:
        _, url = shell.serve(**token)
        assert "wants a token" in shell("queues", "--url", url, status=1).error
        wrong: dict[str, Any] = {"PENSTOCK_TOKEN": "wrong"}
        assert "does not take the token" in shell("queues", "--url", url, status=1, **wrong).error
        assert shell("queues", "--url", url, "--json", **token).json
    finally:
        shell.stop()


@pytest.mark.parametrize("command", [("nodes",), ("workers",), ("queues",), ("tasks", "list"), ("config",)])
def test_no_token_goes_where_a_file_found_here_says(penstock: Shell, command: tuple[str, ...]) -> None:
    (penstock.folder / "penstock.toml").write_text('url = "http://elsewhere.invalid:8470"\n')
    result = penstock(*command, status=1, PENSTOCK_TOKEN="secret")
    assert "is what a penstock.toml says: to send a token there give --url or PENSTOCK_URL" in result.err
