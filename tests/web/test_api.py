"""The routes: what they answer is so, what is wrong is one line, what was changed is in the audit."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from penstock.errors import BrokerUnavailable, QueueFull
from penstock.web.roles import Role
from tests.helpers import eventually
from tests.web.conftest import JOB, SLASHED, TOKENS, Served


async def sent(served: Served, content: dict[str, Any], topic: str = "hello") -> str:
    answer = await served.ask("POST", "/tasks", json={"topic": topic, "content": content})
    assert answer.status_code == 202
    return str(answer.json()["taskid"])


async def record(served: Served, taskid: str) -> Any:
    return (await served.ask("GET", f"/tasks/{taskid}")).json()


async def test_a_task_is_sent_found_and_tried_again(served: Served) -> None:
    done, failed = await sent(served, {"name": "Neo"}), await sent(served, {"a": 1}, "spoil")
    await eventually(lambda: _is(served, done, "succeeded"))
    await eventually(lambda: _is(served, failed, "failed"))
    assert (await record(served, done))["content"] == {"name": "Neo"}
    found = (await served.ask("GET", "/tasks?state=failed&topic=spoil")).json()
    assert [one["taskid"] for one in found] == [failed]
    assert (await served.ask("POST", f"/tasks/{failed}/retry")).status_code == 200
    assert (await served.ask("POST", f"/tasks/{done}/retry")).status_code == 409
    assert (await served.ask("POST", f"/tasks/{done}/cancel")).status_code == 409
    assert (await served.ask("GET", "/tasks/nothing")).status_code == 404


async def _is(served: Served, taskid: str, state: str) -> bool:
    return bool((await record(served, taskid))["state"] == state)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"\xff", b"null", b"[" * 10_000, b'{"a":' * 10_000, b'{"topic": "x"}',
        b'{"topic": "", "content": {}}', b'{"topic": "x", "content": []}', b'{"topic": "x", "content": "y"}',
        b'{"topic": "x", "content": {}, "expire": -1}', b'{"topic": "x", "content": {}, "expire": 1e400}',
        b'{"topic": "x", "content": {}, "expires": 1}', b'{"topic": "\\u0000", "content": {}}',
        b'{"topic": "\\ud800", "content": {}}',
    ],
)  # fmt: skip
async def test_what_is_no_task_is_one_line_of_why(served: Served, body: bytes) -> None:
    answer = await served.ask("POST", "/tasks", content=body)
    assert answer.status_code == 422, answer.text
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(("error", "status"), [(QueueFull("q", 1), 429), (BrokerUnavailable("away"), 503)])
async def test_what_cannot_be_taken_now_says_when_to_come_again(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def refuse(*_: Any) -> str:
        raise error

    monkeypatch.setattr(served.node, "send", refuse)
    answer = await served.ask("POST", "/tasks", json={"topic": "hello", "content": {}})
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "1")
    assert answer.json() == {"detail": str(error)}


async def test_a_fault_of_ours_tells_nobody_how(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: Any) -> str:
        raise KeyError("the cellar")

    monkeypatch.setattr(served.node, "send", fail)
    answer = await served.ask("POST", "/tasks", json={"topic": "hello", "content": {}})
    assert answer.status_code == 500
    assert "cellar" not in answer.text
    assert "cellar" in caplog.text
    assert (await served.ask("GET", "/livez")).status_code == 200


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2fa", "a%2f%2fb", ".%2fa", "a%0ab", "a%2f.."])
async def test_a_configuration_is_named_as_a_file_below_the_directory_could_be(served: Served, name: str) -> None:
    answer = await served.ask("PUT", f"/definitions/configs/{name}", content="a: 1\n")
    assert answer.status_code in (404, 422), answer.text
    assert (await served.ask("GET", "/definitions/configs")).json() == []


async def test_definitions_and_workers_are_told_by_category(served: Served) -> None:
    await served.ask("PUT", "/definitions/jobs/part", content=JOB.replace("greet", "part") + "category: mine\n")
    assert [one["name"] for one in (await served.ask("GET", "/definitions/jobs?category=mine")).json()] == ["part"]
    assert (await served.ask("GET", "/definitions/jobs?category=other")).json() == []
    assert [one["name"] for one in (await served.ask("GET", "/definitions/jobs")).json()] == ["greet", "part"]
    assert (await served.ask("GET", "/workers?category=other")).json() == []
    assert (await served.ask("POST", "/tasks", json={"topic": "a", "content": {}, "expire": None})).status_code == 202


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/nodes", "/definitions/jobs/greet", "/nothing"])
async def test_head_answers_as_get_does_without_the_body(served: Served, path: str) -> None:
    whole, head = await served.ask("GET", path), await served.ask("HEAD", path)
    assert (head.status_code, head.headers["content-type"]) == (whole.status_code, whole.headers["content-type"])
    assert whole.content
    assert not head.content


async def test_definitions_are_written_shown_and_removed(served: Served) -> None:
    other = JOB.replace("greet", "part")
    put = await served.ask("PUT", "/definitions/jobs/part", content=other)
    assert (put.status_code, put.json()["name"], put.json()["by"]) == (200, "part", "token edit 127.0.0.1")
    config = await served.ask("PUT", "/definitions/configs/a/b", json={"user": "x", "password": "hunter2"})
    assert config.json()["name"] == "a/b", config.text
    assert "hunter2" not in (await served.ask("GET", "/definitions/configs/a/b", Role.VIEW)).text
    assert (await served.ask("GET", "/definitions/configs/a%2Fb")).json()["name"] == "a/b"
    names = [one["name"] for one in (await served.ask("GET", "/definitions/jobs")).json()]
    assert names == ["greet", "part"]
    assert (await served.ask("DELETE", "/definitions/jobs/part")).status_code == 204
    assert (await served.ask("DELETE", "/definitions/jobs/part")).status_code == 404
    assert (await served.ask("GET", "/definitions/jokes")).status_code == 404


async def test_all_that_is_wrong_with_a_file_is_told_and_nothing_of_it_written(served: Served) -> None:
    good, bad = ("- name: good\n  topics: [a]\n  script: 'async def f(task): ...'\n", "- name: bad\n  topics: []\n")
    text = good + bad
    answer = await served.ask("POST", "/definitions", content=text)
    assert answer.status_code == 422
    assert answer.json()["problems"]
    assert {"file", "line", "text"} == set(answer.json()["problems"][0])
    assert "\n" not in answer.json()["detail"]
    assert (await served.ask("GET", "/definitions/jobs/good")).status_code == 404
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
    )
    assert (await served.ask("POST", "/definitions", content=bomb)).status_code == 422


async def test_workers_are_paused_on_every_node(served: Served) -> None:
    (worker,) = (await served.ask("GET", "/workers")).json()
    assert (worker["name"], worker["paused"]) == ("produce", False)
    assert (await served.ask("POST", "/workers/produce/pause")).json()["paused"] is True
    assert (await served.ask("POST", "/workers/produce/resume")).json()["paused"] is False
    assert (await served.ask("POST", "/workers/nobody/pause")).status_code == 404
    assert (await served.ask("POST", "/workers/produce/explode")).status_code == 422


async def test_queues_and_dead_letters_whatever_their_name(served: Served) -> None:
    name = SLASHED
    await eventually(lambda: _has_queue(served, name))
    assert (await served.ask("POST", f"/queues/{name}/pause")).json() == {"queue": name, "paused": True}
    assert (await served.ask("POST", f"/queues/{name.replace('/', '%2F')}/resume")).json()["paused"] is False
    assert (await served.ask("POST", f"/queues/{name}/purge")).json() == {"queue": name, "purged": 0}
    assert (await served.ask("GET", f"/queues/{name}/dead")).json() == {"letters": [], "total": 0}
    for action in ("replay", "discard"):
        answer = await served.ask("POST", f"/queues/{name}/dead/{action}", json={"ids": ["x"]})
        told = answer.json()
        assert time.time() - 30 < told.pop("before") <= time.time()
        assert told == {"done": 0, "stayed": 0, "why": None, "missing": ["x"]}
        assert (await served.ask("POST", f"/queues/nobody/dead/{action}")).status_code == 404
    assert (await served.ask("POST", "/queues/nobody/purge")).status_code == 404
    assert (await served.ask("POST", f"/queues/{name}/dead/replay", json={"reason": "bored"})).status_code == 422


async def _has_queue(served: Served, name: str) -> bool:
    return name in [one["name"] for one in (await served.ask("GET", "/queues")).json()]


async def test_each_change_is_in_the_audit_also_one_that_failed(served: Served) -> None:
    await served.ask("POST", "/workers/produce/restart", Role.OPERATE)
    await served.ask("POST", "/workers/nobody/restart", Role.OPERATE)
    taskid = await sent(served, {})
    await served.ask("POST", f"/tasks/{taskid}/cancel", Role.OPERATE)
    await served.ask("DELETE", "/definitions/jobs/greet")
    entries = await eventually(lambda: _entries(served, 4))
    told = {(one["who"], one["what"], one["target"], one["detail"]): one["outcome"] for one in entries}
    assert told["token operate 127.0.0.1", "worker.restart", "produce", ""] == "ok"
    assert "no worker" in told["token operate 127.0.0.1", "worker.restart", "nobody", ""]
    assert ("token operate 127.0.0.1", "task.cancel", taskid, "") in told
    assert told["token edit 127.0.0.1", "definition.delete", "jobs/greet", ""] == "ok"


async def _entries(served: Served, least: int) -> Any:
    found = (await served.ask("GET", "/audit?limit=10")).json()
    return found if len(found) >= least else None


async def test_no_secret_is_ever_in_a_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    link = served.http.sign_in_link()
    cookie = (await served.ask("GET", link, None)).headers["set-cookie"].partition(";")[0]
    await served.ask("GET", "/nodes", None, headers={"Cookie": cookie})
    await served.ask("GET", "/nodes", None, headers={"Authorization": "Bearer a-wrong-one-of-many"})
    await served.ask("POST", "/workers/produce/restart")
    secrets = [link.partition("=")[2], cookie.partition("=")[2], "a-wrong-one-of-many", *TOKENS.values()]
    logged = "\n".join(one.getMessage() for one in caplog.records if not one.name.startswith(("httpx", "httpcore")))
    assert "worker.restart" in logged
    assert not [secret for secret in secrets if secret in logged]
