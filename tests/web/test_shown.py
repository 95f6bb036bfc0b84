"""Who may only look, or operate, sees no secret in what others have sent, logged or raised."""

from __future__ import annotations

import pytest

from penstock.web.roles import Role
from tests.helpers import eventually
from tests.web.conftest import TOKENS, Served

JOB = """
name: fails
topics: [fail]
script: |
  raise ValueError("amqp://neo:hunter2@zion/ did not answer")
"""
CONTENT = {"password": "hunter2", "to": [{"url": "amqp://neo:hunter2@zion/"}], "author": "Neo", "token": "", "n": 1}
SHOWN = {"password": "***", "to": [{"url": "amqp://neo:***@zion/"}], "author": "Neo", "token": "", "n": 1}


@pytest.mark.parametrize("role", Role)
async def test_secrets_in_tasks_and_dead_letters_are_shown_to_who_may_edit_alone(served: Served, role: Role) -> None:
    await served.ask("PUT", "/definitions/jobs/fails", content=JOB)

    async def has_queue() -> bool:
        return "fails" in (await served.ask("GET", "/queues")).text

    await eventually(has_queue)
    taskid = (await served.ask("POST", "/tasks", json={"topic": "fail", "content": CONTENT})).json()["taskid"]

    async def failed() -> bool:
        letters = (await served.ask("GET", "/queues/fails/dead")).json()["letters"]
        return bool(letters) and (await served.ask("GET", f"/tasks/{taskid}")).json()["state"] == "failed"

    await eventually(failed)
    ways = [f"/tasks/{taskid}", "/tasks?topic=fail", "/queues/fails/dead"]
    for path in ways:
        answer = await served.ask("GET", path, role)
        assert answer.status_code == 200, answer.text
        assert ("hunter2" in answer.text) == (role is Role.EDIT), path
        assert "did not answer" in answer.text
    record = (await served.ask("GET", f"/tasks/{taskid}", role)).json()
    assert record["content"] == (CONTENT if role is Role.EDIT else SHOWN)
    assert (record["taskid"], record["topic"]) == (taskid, "fail")


async def test_the_values_of_secrets_are_not_shown_whatever_stands_around_them(served: Served) -> None:
    await served.ask("PUT", "/definitions/configs/db", content="password: swordfish\nuser: neo\n")
    job = "name: tells\ntopics: [tell]\nscript: |\n  return 'got ' + (await get_service_config('db'))['password']\n"
    await served.ask("PUT", "/definitions/jobs/tells", content=job)

    async def told() -> bool:
        taskid = (await served.ask("POST", "/tasks", json={"topic": "tell", "content": {}})).json()["taskid"]
        record = await served.node.app.waitfor(taskid, 10)
        return bool(record.runs and record.runs[0].result == "got swordfish")

    await eventually(told)
    await served.node.send("hello", {"said": f"I am {TOKENS[Role.EDIT]}, {TOKENS[Role.OPERATE]}, neo"})
    for role in (Role.VIEW, Role.OPERATE):
        text = (await served.ask("GET", "/tasks", role)).text
        assert "got ***" in text
        assert "I am ***, ***, neo" in text
    assert "got swordfish" in (await served.ask("GET", "/tasks")).text


async def test_neither_the_page_nor_the_audit_shows_the_value_of_a_secret(served: Served) -> None:
    await served.ask("PUT", "/definitions/configs/db", content="password: swordfish\n")
    worker = "name: tells\nmode: multi\nscript: |\n  async def run():\n    raise ValueError('it is swordfish!')\n"
    await served.ask("PUT", "/definitions/workers/tells", content=worker)
    assert (await served.ask("POST", "/queues/swordfish/purge")).status_code == 404

    async def told() -> bool:
        return "it is ***!" in (await served.ask("GET", "/", Role.VIEW)).text

    await eventually(told, "the worker's error is on the page")
    for path in ("/", "/audit", "/workers"):
        assert "swordfish" not in (await served.ask("GET", path, Role.VIEW)).text, path
    assert "swordfish" in (await served.ask("GET", "/audit")).text


async def test_the_page_shows_no_secret_to_anybody(served: Served) -> None:
    await served.node.send("amqp://neo:hunter2@zion/", {})
    assert "hunter2" not in (await served.ask("GET", "/")).text
