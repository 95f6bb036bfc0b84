"""`/transactions`: what is told is so, what is asked is done, written down, and refused to whom it is not for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock import transaction
from penstock.web.roles import Role
from tests.helpers import eventually
from tests.web.conftest import Served, started

JOB = """
- name: order
  topics: [order.placed]
  script: |
    async with transaction("order") as t:
        receipt = await t.step("pay", context.pay, task.content.amount, undo=context.refund)
        if task.content.amount > 9 and not context.settings.get("ready"):
            raise OSError("no ship")
        await t.step("ship", context.pay, 1)
    return receipt
- name: pay
  code: |-
    async def pay(amount):
        return {"paid": amount}
- name: refund
  code: |-
    def refund(receipt):
        context.settings["refunded"] = receipt
- name: clerk
  topics: [clerk]
  script: |
    r = await callout(path="/transactions/" + task.content.id + "/cancel", method="POST", body={"force": True})
    return r.status, json.loads(r.body)["status"]
"""


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Served]:
    """A node with the job `order`."""
    async with started(tmp_path) as served:
        (tmp_path / "definitions" / "order.yml").write_text(JOB)
        await eventually(lambda: {"order", "clerk"} <= served.node.app.tasks.keys(), "the jobs are there")
        yield served


async def ordered(served: Served, amount: int) -> str:
    """An order whose run has ended."""
    body = {"topic": "order.placed", "content": {"amount": amount}}
    taskid = str((await served.ask("POST", "/tasks", json=body)).json()["taskid"])
    await served.node.app.waitfor(taskid, 20)
    return taskid


async def post(served: Served, id: str, verb: str, role: Role = Role.OPERATE, **options: Any) -> Any:
    return await served.ask("POST", f"/transactions/{id}/{verb}", role, **options)


async def test_what_a_transaction_has_done_is_told(shop: Served) -> None:
    done, failed = await ordered(shop, 5), await ordered(shop, 10)
    answer = await shop.ask("GET", f"/transactions/{failed}", Role.VIEW)
    assert answer.status_code == 200
    told = answer.json()
    keys = "id name task status step createdAt updatedAt steps error wish"
    assert set(told) == set(keys.split())
    assert (told["id"], told["name"], told["task"], told["status"]) == (failed, "order", "order", "Suspending")
    assert told["error"] == "OSError: no ship"
    (step,) = told["steps"]
    assert (step["name"], step["result"], step["undone"]) == ("pay", {"paid": 10}, False)
    assert [one["id"] for one in (await shop.ask("GET", "/transactions", Role.VIEW)).json()] == [failed, done]
    for query, found in (
        ("status=Complete", [done]), ("name=order&limit=1", [failed]), ("name=other", []), ("status=Aborted", []),
    ):  # fmt: skip
        assert [one["id"] for one in (await shop.ask("GET", f"/transactions?{query}")).json()] == found


@pytest.mark.parametrize("role", Role)
async def test_secrets_in_results_and_errors_are_shown_to_who_may_edit_alone(shop: Served, role: Role) -> None:
    app = shop.node.app

    @app.task("secret")
    async def secret(request: Any) -> None:
        async with transaction() as t:
            await t.step("sign in", dict, token="hunter2", user="Neo")
            raise ValueError("amqp://neo:hunter2@zion/ did not answer")

    await employ(app, secret)
    id = await app.send("secret")
    await app.waitfor(id, 20)
    for path in (f"/transactions/{id}", "/transactions"):
        answer = await shop.ask("GET", path, role)
        assert ("hunter2" in answer.text) == (role is Role.EDIT)
        assert "did not answer" in answer.text
        assert "Neo" in answer.text
    if role >= Role.OPERATE:
        assert ("hunter2" in (await post(shop, id, "resume", role, json={"force": True})).text) == (role is Role.EDIT)


async def employ(app: Any, task: Any) -> None:
    """Have a running app run a task that was declared since."""
    app._disown(task)
    await app._life.take(task)


async def test_it_is_resumed_or_cancelled_by_whoever_may_operate(shop: Served) -> None:
    one, other = await ordered(shop, 10), await ordered(shop, 10)
    app = shop.node.app
    assert (await post(shop, other, "cancel")).status_code == 200
    await eventually(lambda: _stands(shop, other, "Cancelled"))
    assert app.settings["refunded"] == {"paid": 10}
    app.settings["ready"] = True
    assert (await post(shop, one, "resume", json={})).status_code == 200
    await eventually(lambda: _stands(shop, one, "RecoveryComplete"))


async def _stands(served: Served, id: str, status: str) -> bool:
    told = (await served.ask("GET", f"/transactions/{id}")).json()
    return bool(told["status"] == status)


async def test_one_that_runs_is_suspended(shop: Served) -> None:
    app, go, there = shop.node.app, asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        there.set()
        await go.wait()

    @app.task("slow")
    async def slow(request: Any) -> None:
        async with transaction() as t:
            await t.step("wait", wait)
            await t.step("more", wait)

    await employ(app, slow)
    id = await app.send("slow")
    await there.wait()
    answer = await post(shop, id, "suspend")
    assert (answer.json()["status"], answer.json()["wish"]) == ("Processing", "suspend")
    go.set()
    await eventually(lambda: _stands(shop, id, "Suspending"))


async def test_by_force_it_is_only_declared(shop: Served) -> None:
    one, other = await ordered(shop, 10), await ordered(shop, 10)
    assert (await post(shop, one, "resume", json={"force": True})).json()["status"] == "ForceRecoveryComplete"
    assert (await post(shop, other, "cancel", json={"force": True})).json()["status"] == "ForceCancelled"
    assert "refunded" not in shop.node.app.settings


async def test_a_script_may_operate_by_callout(shop: Served) -> None:
    id = await ordered(shop, 10)
    record = await shop.node.app.waitfor(await shop.node.send("clerk", {"id": id}), 20)
    assert record.runs[0].result == [200, "ForceCancelled"]


async def test_what_does_not_go_with_its_status_is_409_and_names_it(shop: Served) -> None:
    id = await ordered(shop, 5)
    for verb, force in (("suspend", None), ("resume", False), ("resume", True), ("cancel", False), ("cancel", True)):
        answer = await post(shop, id, verb, json={"force": force} if force is not None else None)
        assert answer.status_code == 409, verb
        assert answer.json()["detail"].endswith("it is Complete"), verb


@pytest.mark.parametrize("verb", ["suspend", "resume", "cancel"])
async def test_one_that_there_is_not_is_404(shop: Served, verb: str) -> None:
    assert (await post(shop, "nothing", verb)).status_code == 404
    assert (await shop.ask("GET", "/transactions/nothing")).status_code == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"force": 1}', b'{"forse": true}', b"\xff", b"null"])
async def test_a_body_that_is_none_of_ours_is_422_and_does_nothing(shop: Served, body: bytes) -> None:
    id = await ordered(shop, 10)
    for verb in ("resume", "cancel"):
        assert (await post(shop, id, verb, content=body)).status_code == 422
    assert await _stands(shop, id, "Suspending")


@pytest.mark.parametrize("query", ["status=Done", "limit=0", "limit=1001", "name=", "name=%00", "status="])
async def test_a_query_that_cannot_be_is_422(shop: Served, query: str) -> None:
    assert (await shop.ask("GET", f"/transactions?{query}")).status_code == 422


async def test_a_viewer_may_only_look_and_what_is_done_is_in_the_audit(shop: Served) -> None:
    id = await ordered(shop, 10)
    for verb in ("suspend", "resume", "cancel"):
        assert (await post(shop, id, verb, Role.VIEW)).status_code == 403
    assert (await shop.ask("GET", "/transactions", None)).status_code == 401
    await post(shop, id, "suspend")
    await post(shop, id, "cancel", json={"force": True})
    entries = (await shop.ask("GET", "/audit?limit=2")).json()
    assert [(one["what"], one["target"], one["detail"]) for one in entries] == [
        ("transaction.cancel", id, "by force"), ("transaction.suspend", id, ""),
    ]  # fmt: skip
    assert entries[0]["outcome"] == "ok"
    assert "it is Suspending" in entries[1]["outcome"]
