"""A job that listens to Slack hears whom it lists, once, loses nothing that was written to it, and writes back.

Slack is a double (`slack_double`), spoken to by slack-sdk over HTTP and a WebSocket.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import App
from penstock.control.audit import Audit
from penstock.node import definitions, roster
from penstock.node.documents import InvalidDefinitions
from penstock.node.node import Node, NodeOptions
from penstock.node.slack import api, intake, line, said, switchboard, tokens
from penstock.node.slack.bot import Bot
from penstock.stores.base import Put
from tests.helpers import dead_letters, eventually
from tests.node.slack_double import APP, BOT, SELF, Slack, serving
from tests.node.test_node import hosting, job, result_of, write

ECHO = "return 'you said ' + task.content.text"


@pytest.fixture
async def slack(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slack]:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "SLACK_APP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    async with serving() as double:
        monkeypatch.setenv("SLACK_API_URL", double.url)
        yield double


def bot(script: str | None = ECHO, name: str = "bot", topics: str = "[neo]", **option: Any) -> str:
    given = {"token": BOT, "app_token": APP, **option}
    lines = "".join(
        f"    {key}: {str(value).lower() if value in (True, False) else value}\n" for key, value in given.items()
    )
    head = f"- name: {name}\n  topics: {topics}\n  slack:\n{lines}"
    if script is None:
        return head
    body = "\n".join(f"    {line}" for line in script.splitlines())
    return f"{head}  script: |-\n{body}\n"


def injecting(**option: Any) -> str:
    return bot(None, code_injection=True, **option)


async def connected(slack: Slack, count: int = 1) -> None:
    await eventually(lambda: len(slack.sockets) == count, f"{count} connections")


async def answered(slack: Slack, text: str, user: str = "U1") -> str:
    """What the bot writes back to one message."""
    before = len(slack.written)
    await slack.say(text, user)
    await eventually(lambda: len(slack.written) > before, f"an answer to {text!r}")
    return slack.texts[-1]


# -- messages become tasks


async def test_what_a_listed_user_writes_is_a_task_and_what_the_script_returns_is_written_back(
    tmp_path: Path, slack: Slack
) -> None:
    script = "context.settings.seen = task\nreturn 'you said ' + task.content.text"
    write(tmp_path, a=bot(script))
    async with hosting(tmp_path) as node:
        await connected(slack)
        assert await answered(slack, "a &lt; b &amp;&amp; c") == "you said a < b && c"
        task = node.app.settings.seen
        assert task.topic == "neo"
        assert task.taskid
        assert task.content == {"text": "a < b && c", "user": "U1", "channel": "DU1", "ts": "1700000000.000001"}
        assert slack.written == [{"channel": "DU1", "text": "you said a < b && c"}]


@pytest.mark.parametrize("topic", ["neo", "'@neo'", "U1", "Neo A.", "'@U1'"])
async def test_a_user_is_listed_by_account_id_or_display_name(tmp_path: Path, slack: Slack, topic: str) -> None:
    write(tmp_path, a=bot("return task.topic", topics=f"[someone, {topic}]"))
    async with hosting(tmp_path):
        await connected(slack)
        assert await answered(slack, "hello") == topic.strip("'")


async def test_nobody_is_heard_for_being_shown_as_an_id(tmp_path: Path, slack: Slack) -> None:
    slack.person("U0ADMIN1", "admin")
    slack.person("U2", "mallory", "U0ADMIN1")
    write(tmp_path, a=bot(topics="[U0ADMIN1, trinity]"))
    async with hosting(tmp_path):
        await connected(slack)
        envelope = await slack.say("from mallory", "U2")
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")
        assert await answered(slack, "hello", "U0ADMIN1") == "you said hello"
        assert slack.texts == ["you said hello"]


async def test_who_is_of_a_workspace_by_its_organisation_is_heard_by_name(tmp_path: Path, slack: Slack) -> None:
    slack.enterprise = "E1"
    slack.person("U2", "smith", team_id="T2", enterprise_user={"enterprise_id": "E1", "teams": ["T2"]})
    slack.person("U3", "smith", team_id="T3", enterprise_user={"enterprise_id": "E9", "teams": ["T1"]})
    slack.person("U4", "smith", team_id="T2", enterprise_user={"enterprise_id": "E1", "teams": ["T2", "T1"]})
    write(tmp_path, a=bot(topics="[smith]"))
    async with hosting(tmp_path):
        await connected(slack)
        envelopes = [await slack.say("not of it", user) for user in ("U2", "U3")]
        await eventually(lambda: set(envelopes) <= set(slack.acks), "they are acknowledged")
        assert await answered(slack, "hello", "U4") == "you said hello"
        assert slack.texts == ["you said hello"]


IGNORED: dict[str, dict[str, Any]] = {
    "an unlisted user": {"user": "U2"},
    "somebody with the name in another workspace": {"user": "U3"},
    "somebody with the name in another workspace, in a shared channel": {"user": "U4"},
    "itself": {"user": SELF},
    "another bot": {"bot_id": "B7"},
    "an edit": {"subtype": "message_changed"},
    "a channel": {"channel_type": "channel"},
    "a group": {"channel_type": "mpim"},
    "another event": {"type": "reaction_added"},
    "no user": {"user": None},
    "no text": {"text": None},
}


@pytest.mark.parametrize("what", IGNORED)
async def test_nothing_else_is_taken_and_slack_need_not_send_it_again(tmp_path: Path, slack: Slack, what: str) -> None:
    slack.person("U2", "smith")
    slack.person("U3", "neo", is_stranger=True)
    slack.person("U4", "neo", is_stranger=False, team_id="T9")
    write(tmp_path, a=bot(topics="[neo]"))
    async with hosting(tmp_path):
        await connected(slack)
        payload = slack.event("hello")
        payload["event"] |= IGNORED[what]
        envelope = await slack.send(payload)
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")
        assert await answered(slack, "after it") == "you said after it"
        assert slack.texts == ["you said after it"]


async def test_what_slack_sends_again_runs_once(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("context.settings.setdefault('runs', []).append(1)\nreturn len(context.settings.runs)"))
    async with hosting(tmp_path) as node:
        await connected(slack)
        payload = slack.event("hello")
        envelopes = [await slack.send(payload) for _ in range(3)]
        await eventually(lambda: set(envelopes) <= set(slack.acks), "all are acknowledged")
        await eventually(lambda: slack.texts == ["1"], "it has run")
        envelopes.append(await slack.send(payload))
        await eventually(lambda: envelopes[-1] in slack.acks, "that one too")
    async with hosting(tmp_path) as node:  # another life, which has seen nothing of it
        await connected(slack)
        envelope = await slack.send(payload)
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")
        assert await answered(slack, "another") == "1"
        assert slack.texts == ["1", "1"]
        assert node.ready


async def test_a_message_is_acknowledged_only_once_it_is_durable(tmp_path: Path, slack: Slack) -> None:
    """Its queue is full until the first one has ended."""
    write(tmp_path, a=bot("await context.settings.go.wait()\nreturn task.content.text"))
    async with hosting(tmp_path, NodeOptions(job_queue_size=1, job_queue_bulk_read_size=1)) as node:
        node.app.settings.go = asyncio.Event()
        await connected(slack)
        first = await slack.say("first")
        await eventually(lambda: first in slack.acks, "the first is durable")
        refused = slack.event("second")
        second = await slack.send(refused)
        third = await slack.send(refused)  # Slack does not wait for long
        other = await slack.say("not for it", "U9")
        await eventually(lambda: other in slack.acks, "others are not held up")
        assert not {second, third} & set(slack.acks)
        node.app.settings.go.set()
        await eventually(lambda: {second, third} <= set(slack.acks), "it is durable")
        await eventually(lambda: slack.texts == ["first", "second"], "each has run once")


async def test_a_message_that_waits_outlives_its_node(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("await asyncio.sleep(60)"))
    async with hosting(tmp_path, grace=0.1):
        await connected(slack)
        envelope = await slack.say("hello")
        await eventually(lambda: envelope in slack.acks, "it is durable")
    assert not slack.written
    write(tmp_path, a=bot())
    async with hosting(tmp_path):
        await eventually(lambda: slack.texts == ["you said hello"], "it is answered")


async def test_a_message_does_not_expire_while_its_job_is_behind(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("await context.settings.go.wait()\nreturn task.content.text"))
    async with hosting(tmp_path, NodeOptions(job_queue_bulk_read_size=1)) as node:
        node.app.settings.go = asyncio.Event()
        await connected(slack)
        first, payload = await slack.say("first"), slack.event("second")
        await eventually(lambda: first in slack.acks, "the first is durable")
        second = await slack.send(payload)
        await eventually(lambda: second in slack.acks, "the second is durable")
        found = said.direct_message(payload)
        assert found is not None
        record = await node.ledger.record(found.taskid("bot"))
        assert (record.state, record.expiresAt) == ("queued", None)
        node.app.settings.go.set()
        await eventually(lambda: slack.texts == ["first", "second"], "both are answered")


async def test_an_answer_has_4000_characters_at_most(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("return 'x' * int(task.content.text)"))
    async with hosting(tmp_path):
        await connected(slack)
        assert await answered(slack, "4000") == "x" * 4000
        cut = await answered(slack, "4001")
        assert len(cut) == 4000
        assert cut == "x" * 3993 + "… (cut)"


async def test_what_fails_is_told_in_one_line_and_kept_as_a_failure(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("raise ValueError('not <so>\\nxoxb-9-secret xapp-9-secret')"))
    async with hosting(tmp_path) as node:
        await connected(slack)
        assert await answered(slack, "hello") == "ValueError: not &lt;so&gt; *** ***"
        (letter,) = await eventually(lambda: dead_letters(node.app, "bot"), "a dead letter")
        assert letter.reason == "failed"


async def test_a_script_that_returns_nothing_writes_nothing(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("if task.content.text == 'speak':\n    return {'a': [1]}"))
    async with hosting(tmp_path):
        await connected(slack)
        await slack.say("hush")
        assert await answered(slack, "speak") == "{'a': [1]}"
        assert len(slack.written) == 1


async def test_slacks_limit_is_respected(tmp_path: Path, slack: Slack) -> None:
    limited = (429, {"Retry-After": "1"}, {"ok": False, "error": "ratelimited"})
    slack.failures["chat.postMessage"] = [limited]
    write(tmp_path, a=bot())
    async with hosting(tmp_path):
        await connected(slack)
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await answered(slack, "hello") == "you said hello"
        assert loop.time() - began >= 1
        assert slack.texts == ["you said hello"]


async def test_an_answer_that_slack_will_not_have_fails_no_run(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture
) -> None:
    slack.failures["chat.postMessage"] = [(200, {}, {"ok": False, "error": "channel_not_found"})]
    write(tmp_path, a=bot())
    async with hosting(tmp_path) as node:
        await connected(slack)
        await slack.say("hello")
        await eventually(lambda: "cannot be written: Slack says channel_not_found" in caplog.text, "it is logged")
        assert await answered(slack, "again") == "you said again"
        assert not await dead_letters(node.app, "bot")


async def test_an_answer_in_a_thread_stays_in_it(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path):
        await connected(slack)
        await slack.say("hello", thread_ts="1699999999.000001")
        await eventually(lambda: slack.written, "it is answered")
        assert slack.written[0]["thread_ts"] == "1699999999.000001"


async def test_users_are_no_topics(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot(), b=job("return 'b'", "b", "[neo]"))
    async with hosting(tmp_path) as node:
        assert await result_of(node, "neo") == "b"  # the only run
        assert await result_of(node, "bot", {"text": "hello"}) == "you said hello"
        assert not slack.written  # a task from elsewhere is answered as any other


FORGED = {
    "unsigned": '{"listed":"neo","channel":"DU1"}',
    "signed with nothing": "0" * 64 + ' {"listed":"neo","channel":"DU1"}',
    "signed with another token": said.header_of(said.Origin("neo", "DU1"), "bot", "xoxb-2"),
    "that of another job": said.header_of(said.Origin("neo", "DU1"), "other", BOT),
    "nothing": "",
}


@pytest.mark.parametrize("what", FORGED)
async def test_a_task_that_only_says_it_is_from_slack_writes_nothing_there(
    tmp_path: Path, slack: Slack, what: str
) -> None:
    write(tmp_path, a=bot("return task.topic"))
    async with hosting(tmp_path) as node:
        await connected(slack)
        taskid = await node.app.client.send("bot", {"text": "hello"}, headers={said.HEADER: FORGED[what]})
        (run,) = (await node.app.waitfor(taskid, 10)).runs
        assert run.result == "bot"
        assert await answered(slack, "hello") == "neo"
        assert slack.texts == ["neo"]


@pytest.fixture(params=["redis_url", "amqp_url"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> App:
    store = None if request.param == "redis_url" else f"sqlite:///{tmp_path}/penstock.db"
    return App(request.getfixturevalue(request.param), store=store, grace=1.0)


async def test_it_is_the_same_on_redis_and_rabbitmq(tmp_path: Path, slack: Slack, system: App) -> None:
    write(tmp_path, a=bot())
    async with Node(tmp_path, system):
        await connected(slack)
        payload = slack.event("hello")
        envelopes = [await slack.send(payload) for _ in range(3)]
        await eventually(lambda: set(envelopes) <= set(slack.acks), "all are acknowledged")
        await eventually(lambda: slack.written, "it is answered")
        assert await answered(slack, "again") == "you said again"
        assert slack.texts == ["you said hello", "you said again"]


# -- several jobs, several nodes


async def test_jobs_of_one_app_share_a_connection_and_each_hears_whom_it_lists(tmp_path: Path, slack: Slack) -> None:
    slack.person("U2", "smith")
    write(tmp_path, a=bot("return 'a'", "a") + bot("return 'b'", "b", "[neo, smith]"))
    async with hosting(tmp_path):
        await connected(slack)
        await slack.say("hello", "U2")
        await eventually(lambda: slack.texts == ["b"], "one hears")
        await slack.say("hello", "U1")
        await eventually(lambda: sorted(slack.texts) == ["a", "b", "b"], "both hear")
        assert slack.connections == 1


TWO = {"a": bot("return 'a'", "a", "[U1]"), "b": bot("return 'b'", "b", "[U2]")}


@pytest.fixture
def left(caplog: pytest.LogCaptureFixture) -> Callable[[str], Awaitable[object]]:
    """Waits until an event is left to Slack for the sake of a job."""
    caplog.set_level("INFO", "penstock.slack")
    return lambda name: eventually(lambda: f"may be for jobs that do not listen here: {name}" in caplog.text, name)


async def test_what_is_for_a_job_that_is_not_here_yet_is_not_acknowledged(
    tmp_path: Path, slack: Slack, left: Callable[[str], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, prepare = threading.Event(), roster._prepare

    def slowly(definition: Any) -> None:
        assert definition.name != "b" or go.wait(20)
        prepare(definition)

    monkeypatch.setattr(roster, "_prepare", slowly)
    slack.person("U2", "smith")
    write(tmp_path, a=TWO["a"])
    async with hosting(tmp_path) as node:
        try:
            await connected(slack)
            write(tmp_path, b=TWO["b"])
            await eventually(lambda: _wanted(node, "b"), "it is about to come")
            payload = slack.event("hello", "U2")
            envelope = await slack.send(payload)
            await left("b")
            assert await answered(slack, "hello") == "a"
            assert envelope not in slack.acks
        finally:
            go.set()
        again: list[str] = []
        await eventually(lambda: _heard(slack, payload, again), "it is here, and Slack sends it again")
        await eventually(lambda: slack.texts == ["a", "b"], "it is answered")


async def test_what_is_for_a_job_that_changes_is_not_acknowledged(
    tmp_path: Path, slack: Slack, left: Callable[[str], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slack.person("U2", "smith")
    write(tmp_path, **TWO)
    inside, go, close = asyncio.Event(), asyncio.Event(), intake.Intake.close

    async def slowly(self: intake.Intake) -> None:
        inside.set()
        await go.wait()
        await close(self)

    async with hosting(tmp_path):
        await connected(slack)
        assert await answered(slack, "hello", "U2") == "b"
        monkeypatch.setattr(intake.Intake, "close", slowly)
        write(tmp_path, b=bot("return 'new'", "b", "[U2, U3]"))
        await asyncio.wait_for(inside.wait(), 10)
        payload = slack.event("hello", "U2")
        envelope = await slack.send(payload)
        await left("b")
        assert envelope not in slack.acks
        go.set()
        again: list[str] = []
        await eventually(lambda: _heard(slack, payload, again), "it is here, and Slack sends it again")
        await eventually(lambda: slack.texts == ["b", "new"], "it is answered")


@pytest.mark.parametrize("why", ["its variable is missing", "Slack does not take its token"])
async def test_what_is_for_a_job_that_cannot_listen_here_is_not_acknowledged(
    tmp_path: Path, slack: Slack, left: Callable[[str], Awaitable[object]], why: str
) -> None:
    token = "${NOT_THERE}" if why == "its variable is missing" else "xoxb-wrong"
    write(tmp_path, a=TWO["a"], b=bot(name="b", topics="[U2]", token=token))
    async with hosting(tmp_path):
        await connected(slack)
        await eventually(lambda: why == "its variable is missing" or slack.calls.count("auth.test") == 2, "both ask")
        assert await answered(slack, "hello") == "a"
        envelope = await slack.say("hello", "U2")
        await left("b")
        assert await answered(slack, "again") == "a"
        assert envelope not in slack.acks


async def test_a_job_of_another_app_that_cannot_listen_holds_up_nothing(tmp_path: Path, slack: Slack) -> None:
    other = bot(name="b", topics="[U2]", token="${NOT_THERE}", app_token="xapp-2")
    write(tmp_path, a=TWO["a"], b=other)
    async with hosting(tmp_path):
        await connected(slack)
        envelope = await slack.say("hello", "U2")
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")


@pytest.mark.parametrize("how", ["the node stops", "its job goes"])
async def test_nothing_is_heard_any_more_before_the_first_job_leaves(
    tmp_path: Path, slack: Slack, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    left: list[str] = []
    close_line, close_intake = line.Line.close, intake.Intake.close

    async def line_closes(self: line.Line) -> None:
        await close_line(self)
        left.append("line")

    async def intake_closes(self: intake.Intake) -> None:
        left.append(self._job.definition.name)
        await close_intake(self)

    stops = how == "the node stops"
    write(tmp_path, **(TWO if stops else {"a": TWO["a"]}))
    async with hosting(tmp_path):
        await connected(slack)
        assert await answered(slack, "hello") == "a"
        monkeypatch.setattr(line.Line, "close", line_closes)
        monkeypatch.setattr(intake.Intake, "close", intake_closes)
        if not stops:
            (tmp_path / "a.yml").unlink()
            await eventually(lambda: len(left) == 2, "it has gone")
    assert left[0] == "line"
    assert sorted(left[1:]) == (["a", "b"] if stops else ["a"])


async def test_a_full_queue_shuts_out_no_other_job(
    tmp_path: Path, slack: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (line, intake):
        monkeypatch.setattr(module, "MOST_AT_HAND", 3, raising=False)
    full = bot("await context.settings.go.wait()\nreturn 'a'", "a", "[U0000001]")
    write(tmp_path, a=full, b=bot("return 'b'", "b", "[U0000002]"))
    async with hosting(tmp_path, NodeOptions(job_queue_size=1, job_queue_bulk_read_size=1)) as node:
        node.app.settings.go = asyncio.Event()
        await connected(slack)
        first = await slack.say("hello", "U0000001")
        await eventually(lambda: first in slack.acks, "its queue is full")
        for _ in range(12):
            await slack.say("hello", "U0000001")
        assert node._roster is not None
        hearing = node._roster._slack._lines[APP]
        await eventually(lambda: len(hearing._at_hand) == 3, "what it may hold is held")
        envelope = await slack.say("hello", "U0000002")
        await eventually(lambda: envelope in slack.acks, "the other job's is taken")
        node.app.settings.go.set()


def _wanted(node: Node, name: str) -> bool:
    assert node._roster is not None
    return name in node._roster._wanted.jobs


async def _heard(slack: Slack, payload: dict[str, Any], sent: list[str]) -> bool:
    """Whether it is acknowledged, now that Slack sends it once more."""
    sent.append(await slack.send(payload))
    return not set(slack.acks).isdisjoint(sent)


async def test_every_node_connects_and_one_of_them_answers(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("await asyncio.sleep(0.2)\n" + ECHO))
    async with hosting(tmp_path), Node(tmp_path, App(f"sqlite:///{tmp_path}/penstock.db", grace=1.0)):
        await connected(slack, 2)
        payload = slack.event("hello")
        for socket in slack.sockets:
            await socket.send_json({"type": "events_api", "envelope_id": str(id(socket)), "payload": payload})
        await eventually(lambda: len(slack.acks) == 2, "both are acknowledged")
        await eventually(lambda: slack.written, "it is answered")
        assert await answered(slack, "another") == "you said another"
        assert slack.texts == ["you said hello", "you said another"]


async def test_what_a_node_took_and_died_over_another_one_keeps(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path) as node:
        await connected(slack)
        payload = slack.event("hello")
        found = said.direct_message(payload)
        assert found is not None
        claim = Put(f"slack/{found.taskid('bot')}", intake.TRYING, ttl=0.3)
        await node.store.apply([claim])
        envelope = await slack.send(payload)
        other = await slack.say("not for it", "U9")
        await eventually(lambda: other in slack.acks, "others are not held up")
        assert envelope not in slack.acks
        await eventually(lambda: envelope in slack.acks, "it is durable")
        await eventually(lambda: slack.texts == ["you said hello"], "it is answered")


async def test_a_job_under_way_at_the_stop_still_answers(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot("context.settings.begun.set()\nawait asyncio.sleep(0.3)\n" + ECHO))
    async with hosting(tmp_path, grace=10) as node:
        node.app.settings.begun = asyncio.Event()
        await connected(slack)
        await slack.say("hello")
        await node.app.settings.begun.wait()
    assert slack.texts == ["you said hello"]
    assert not slack.sockets


# -- the connection


@pytest.mark.parametrize("how", ["drop", "refresh_requested", "link_disabled"])
async def test_a_connection_that_is_lost_is_begun_again(tmp_path: Path, slack: Slack, how: str) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path):
        await connected(slack)
        if how == "drop":
            slack.drop()
        else:
            await slack.disconnect(how)
        await eventually(lambda: slack.connections == 2 and len(slack.sockets) == 1, "it is connected anew")
        assert await answered(slack, "hello") == "you said hello"


async def test_what_is_said_while_slack_has_the_connection_replaced_is_heard(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path):
        await connected(slack)
        slack.opening.clear()
        await slack.disconnect("warning")
        await eventually(lambda: slack.calls.count("apps.connections.open") == 2, "another one is asked for")
        assert await answered(slack, "meanwhile") == "you said meanwhile"
        assert slack.connections == 1
        slack.opening.set()
        await eventually(lambda: slack.connections == 2 and len(slack.sockets) == 1, "the old one ends")
        assert await answered(slack, "after") == "you said after"


async def test_slack_that_is_away_is_tried_again_each_failure_logged_once(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "BACKOFF", (0.01, 0.02))
    away: tuple[int, dict[str, str], dict[str, Any]] = (503, {}, {"ok": False, "error": "service_unavailable"})
    slack.failures["apps.connections.open"] = [away] * 3
    write(tmp_path, a=bot(), b=job("return 1"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
        await connected(slack)
        assert caplog.text.count("not connected to Slack") == 3
        assert "Traceback" not in caplog.text


@pytest.mark.parametrize("which", ["bot", "app"])
async def test_a_wrong_token_is_told_once_and_disturbs_no_other_job(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    wrong = {"token": "xoxb-wrong"} if which == "bot" else {"app_token": "xapp-wrong"}
    write(tmp_path, a=bot(**wrong), b=job("return 1"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: "Slack says invalid_auth" in caplog.text, "it is told")
        assert await result_of(node) == 1
        assert caplog.text.count("Slack says invalid_auth") == 1
        assert "wrong" not in caplog.text
        assert not slack.sockets
        write(tmp_path, a=bot())
        await connected(slack)
        assert await answered(slack, "hello") == "you said hello"
        assert caplog.text.count("Slack says invalid_auth") == 1


async def test_without_an_app_token_the_job_idles_and_the_log_says_so(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, a=bot().replace(f"    app_token: {APP}\n", ""), b=job("return 1"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: "a.yml:1: job bot: it does not listen to Slack without an app token" in caplog.text)
        assert await result_of(node) == 1
        assert not slack.calls


@pytest.mark.parametrize("name", ["SLACK_APP_TOKEN", "PENSTOCK_SLACK_APP_TOKEN", "PENSTOCK_SLACK_APP_TOKEN_FILE"])
async def test_the_documents_two_keys_suffice(
    tmp_path: Path, slack: Slack, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(APP + "\n")
    monkeypatch.setenv(name, str(tmp_path / "secret") if name.endswith("FILE") else APP)
    monkeypatch.setenv("TEST_BOT", BOT)
    write(tmp_path, a=bot(token="${TEST_BOT}", code_injection=False).replace(f"    app_token: {APP}\n", ""))
    async with hosting(tmp_path):
        await connected(slack)
        assert await answered(slack, "hello") == "you said hello"


async def test_an_app_token_whose_file_comes_later_is_read_then(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switchboard, "SLOWLY", 0.02)
    monkeypatch.setenv("PENSTOCK_SLACK_APP_TOKEN_FILE", str(tmp_path / "secret"))
    write(tmp_path, a=bot().replace(f"    app_token: {APP}\n", ""))
    async with hosting(tmp_path):
        await eventually(lambda: "a.yml:1: job bot: it does not listen to Slack: PENSTOCK_SLACK" in caplog.text)
        (tmp_path / "secret").write_text(APP)
        await connected(slack)
        assert await answered(slack, "hello") == "you said hello"
        assert caplog.text.count("it does not listen to Slack") == 1


async def test_a_variable_that_is_not_set_is_told(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, a=bot(token="${NOT_THERE}"), b=job("return 1"))
    async with hosting(tmp_path) as node:
        await eventually(lambda: "a.yml:1: job bot: it does not listen to Slack: the environment" in caplog.text)
        assert await result_of(node) == 1


async def test_without_slack_sdk_the_rest_of_the_node_runs(
    tmp_path: Path, slack: Slack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "missing", lambda: "slack-sdk")
    write(tmp_path, a=bot(), b=job("return 1"))
    async with hosting(tmp_path) as node:
        assert await result_of(node) == 1
        assert caplog.text.count("slack-sdk is not installed: pip install 'penstock[slack]'") == 1
        write(tmp_path, b=job("return 2"))
        await eventually(lambda: _returns(node, 2), "the other job has changed")
        assert caplog.text.count("is not installed") == 1  # not each time that definitions are read


async def _returns(node: Node, value: Any) -> bool:
    return bool(await result_of(node) == value)


async def test_a_changed_script_keeps_the_connection_and_a_removed_job_ends_it(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path) as node:
        await connected(slack)
        write(tmp_path, a=bot("return 'new'"))
        await eventually(lambda: _is(node, "return 'new'"), "the new script is known")
        assert await answered(slack, "hello") == "new"
        assert slack.connections == 1
        slack.person("U2", "smith")
        write(tmp_path, a=bot("return task.topic", topics="[smith]"))
        await eventually(lambda: slack.connections == 2 and len(slack.sockets) == 1, "it listens to others")
        assert await answered(slack, "hello", "U2") == "smith"
        (tmp_path / "a.yml").unlink()
        await connected(slack, 0)
    assert slack.texts == ["new", "smith"]


async def _is(node: Node, script: str) -> bool:
    assert node._roster is not None
    return node._roster._jobs["bot"][0].definition.script == script


async def test_a_job_becomes_a_bot_and_a_bot_a_job(tmp_path: Path, slack: Slack) -> None:
    plain = job("return 'plain'", "bot", "[neo]")
    write(tmp_path, a=plain)
    async with hosting(tmp_path) as node:
        assert await result_of(node, "neo") == "plain"
        write(tmp_path, a=bot())
        await connected(slack)
        assert await answered(slack, "hello") == "you said hello"
        assert await node.ledger.store.get(["topic/neo"]) == [None]
        write(tmp_path, a=plain)
        await connected(slack, 0)
        await eventually(lambda: _bound(node, "neo"), "it has its topic again")
        assert await result_of(node, "neo") == "plain"


async def _bound(node: Node, topic: str) -> bool:
    (entry,) = await node.ledger.store.get([f"topic/{topic}"])
    return entry is not None


# -- code


async def test_code_runs_and_what_it_returns_is_written_back(tmp_path: Path, slack: Slack) -> None:
    functions = "- name: double\n  code: |-\n    async def double(n):\n        return 2 * n\n"
    write(tmp_path, a=injecting(), f=functions, b=job("return task.content.n + 1", "other", "[other]"))
    async with hosting(tmp_path) as node:
        node.app.settings.answer = 42
        await connected(slack)
        assert await answered(slack, "return 6 * 7") == "42"
        assert await answered(slack, "return context.settings.answer") == "42"
        assert await answered(slack, "```\nn = await context.double(4)\nreturn [n, task.topic]\n```") == "[8, 'neo']"
        code = "one = await waitfor(await task('other', {'n': 1}))\nreturn one.runs[0].result"
        assert await answered(slack, code) == "2"
        assert await answered(slack, "`return MU({'a': 1}).a &lt; 2`") == "True"
        assert len(await answered(slack, "return 'x' * 5000")) == 4000
        trail = await Audit(node.store).latest()
        assert len(trail) == 6
        assert [one.outcome for one in trail] == ["ok"] * 6
        assert (trail[-1].who, trail[-1].what, trail[-1].target) == ("slack neo (U1)", "slack.code", "jobs/bot")
        assert trail[-1].detail == "return 6 * 7"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os\ncontext.settings.ran = True", "ScriptError: `import` is not allowed here"),
        ("from os import path", "ScriptError: `import` is not allowed here"),
        ("context.settings.ran = True\nfor x in [1]: pass", "ScriptError: `for` is not allowed here"),
        ("async for x in y: pass", "ScriptError: `for` is not allowed here"),
        ("while True: pass", "ScriptError: `while` is not allowed here"),
        ("def f():\n    while True: pass", "ScriptError: `while` is not allowed here"),
        ("return (", "ScriptError: not Python: '(' was never closed"),
        ("...", None),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise asyncio.CancelledError", "RuntimeError: the function cancelled itself"),
    ],
)
async def test_what_is_refused_or_fails_is_told_in_one_line(
    tmp_path: Path, slack: Slack, code: str, says: str | None
) -> None:
    write(tmp_path, a=injecting())
    async with hosting(tmp_path) as node:
        await connected(slack)
        if says is None:
            await slack.say(code)
        else:
            found = await answered(slack, code)
            assert found.partition("\n")[0] == found
            assert says in found
        assert await answered(slack, "return 'alive'") == "alive"
        assert "ran" not in node.app.settings
        assert len(slack.written) == (1 if says is None else 2)


async def test_code_that_takes_too_long_is_stopped_and_told(
    tmp_path: Path, slack: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "LIMIT", 0.05)
    write(tmp_path, a=injecting())
    async with hosting(tmp_path) as node:
        await connected(slack)
        code = "try:\n    await asyncio.sleep(60)\nfinally:\n    context.settings.stopped = True"
        assert await answered(slack, code) == "TimeoutError: stopped: it ran for over 0.05 s"
        assert node.app.settings.stopped


async def test_a_task_that_is_sent_to_a_job_of_code_runs_nothing(tmp_path: Path, slack: Slack) -> None:
    """Also one that says it is from Slack, and one whose job has a script."""
    write(tmp_path, a=injecting() + "  script: context.settings.ran = True\n")
    code = {"text": "context.settings.ran = True", "user": "U1", "channel": "DU1", "ts": "1.0"}
    async with hosting(tmp_path) as node:
        await connected(slack)
        with pytest.raises(RuntimeError, match="Unsupported: job 'bot' runs what is written to it in Slack"):
            await result_of(node, "bot", code)
        forged = {said.HEADER: said.header_of(said.Origin("neo", "DU1"), "bot", BOT)}
        sent = await node.app.client.send("bot", code, headers=forged)
        (run,) = (await node.app.waitfor(sent, 10)).runs
        assert run.state == "failed"
        assert "ran" not in node.app.settings
        assert not slack.written
        assert not await Audit(node.store).latest()


async def test_without_code_injection_text_is_text(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=bot())
    async with hosting(tmp_path) as node:
        await connected(slack)
        assert await answered(slack, "context.settings.ran = True") == "you said context.settings.ran = True"
        assert "ran" not in node.app.settings


async def test_code_of_a_user_who_only_shows_a_listed_name_is_not_run(tmp_path: Path, slack: Slack) -> None:
    slack.person("U2", "smith", "neo")
    write(tmp_path, a=injecting())
    async with hosting(tmp_path):
        await connected(slack)
        envelope = await slack.say("return 'smith was here'", "U2")
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")
        assert await answered(slack, "return 1") == "1"
        assert slack.texts == ["1"]


async def test_code_of_a_listed_id_of_another_workspace_is_not_run(tmp_path: Path, slack: Slack) -> None:
    slack.person("U2", "smith", team_id="T9", is_stranger=False)
    write(tmp_path, a=bot(None, topics="[U2, neo]", code_injection=True))
    async with hosting(tmp_path):
        await connected(slack)
        envelope = await slack.say("return 'smith was here'", "U2")
        await eventually(lambda: envelope in slack.acks, "it is acknowledged")
        assert await answered(slack, "return 1") == "1"
        assert slack.texts == ["1"]


async def test_code_runs_once_on_one_node_however_often_slack_sends_it(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=injecting())
    one, other = App(f"sqlite:///{tmp_path}/penstock.db"), App(f"sqlite:///{tmp_path}/penstock.db")
    async with Node(tmp_path, one), Node(tmp_path, other):
        await connected(slack, 2)
        payload = slack.event("await asyncio.sleep(0.05)\nreturn 'ran'")
        for number in range(6):
            envelope = {"type": "events_api", "envelope_id": f"x{number}", "payload": payload}
            await slack.sockets[number % 2].send_json(envelope)
        await eventually(lambda: len(slack.acks) == 6, "all are acknowledged")
        await eventually(lambda: slack.texts == ["ran"], "it ran")
        assert await answered(slack, "return 'next'") == "next"
        assert slack.texts == ["ran", "next"]


async def test_code_that_runs_when_the_node_stops_is_told_to_its_writer(
    tmp_path: Path, slack: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, a=injecting())
    async with hosting(tmp_path, grace=0.1) as node:
        node.app.settings.begun = asyncio.Event()
        await connected(slack)
        await slack.say("context.settings.begun.set()\nawait asyncio.sleep(60)")
        await node.app.settings.begun.wait()
    assert slack.texts == ["cancelled: the node stops"]
    assert not slack.sockets


async def test_code_has_one_of_the_turns_of_the_jobs(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=injecting(), b=job("await context.settings.go.wait()"))
    async with hosting(tmp_path, NodeOptions(job_queue_bulk_read_size=1)) as node:
        node.app.settings.go = asyncio.Event()
        await connected(slack)
        taskid = await node.send("topic", {})
        await eventually(lambda: _begun(node, taskid), "the job has the only turn")
        envelope = await slack.say("context.settings.ran = True\nreturn 'ran'")
        await eventually(lambda: envelope in slack.acks, "it is taken")
        assert "ran" not in node.app.settings
        node.app.settings.go.set()
        await eventually(lambda: slack.texts == ["ran"], "it has its turn")


async def test_code_that_waits_for_its_turn_is_not_run_once_its_job_has_gone(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=injecting(), b=job("await context.settings.go.wait()"))
    async with hosting(tmp_path, NodeOptions(job_queue_bulk_read_size=1)) as node:
        node.app.settings.go = asyncio.Event()
        await connected(slack)
        taskid = await node.send("topic", {})
        await eventually(lambda: _begun(node, taskid), "the job has the only turn")
        envelope = await slack.say("context.settings.ran = True")
        await eventually(lambda: envelope in slack.acks, "it is taken")
        (tmp_path / "a.yml").unlink()
        await connected(slack, 0)
        node.app.settings.go.set()
        await eventually(lambda: slack.texts == ["Unsupported: the job listens no more, or to others"], "it is told")
        assert "ran" not in node.app.settings


async def _begun(node: Node, taskid: str) -> bool:
    return (await node.ledger.record(taskid)).state == "running"


# -- tokens

WRITTEN = """\
name: bot      # the bot
topics: [neo]
slack: {token: xoxb-1-very-secret, app_token: 'xapp-1-secret'}
script: |-
    # says it again
    return task.content.text
"""


async def test_tokens_are_shown_to_nobody_and_put_back(tmp_path: Path, slack: Slack) -> None:
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        shown = await node.book.put("jobs", "bot", WRITTEN, "somebody")
        expected = WRITTEN.replace("xoxb-1-very-secret", '"***"').replace("'xapp-1-secret'", '"***"')
        assert shown.text == expected
        assert [one.text for one in await node.book.list("jobs") if one.name == "bot"] == [expected]
        changed = shown.text.replace("says it again", "says it")
        for put in (node.book.put("jobs", "bot", changed, "x"), node.book.put_all(changed, "x")):
            await put
            found, problems = await node.book.read()
            assert not problems
            option, script = found.jobs["bot"].slack, found.jobs["bot"].script
            assert option is not None
            assert (option.token, option.app_token) == ("xoxb-1-very-secret", "xapp-1-secret")
            assert script == "# says it\nreturn task.content.text"
        with pytest.raises(InvalidDefinitions, match="stands for a secret that was there before"):
            await node.book.put("jobs", "other", changed.replace("name: bot", "name: other"), "x")
        assert await result_of(node) == 1


@pytest.mark.parametrize(
    ("slack", "shown"),
    [
        ("slack:\n  token: ${BOT}\n  code_injection: true\n", "slack:\n  token: ${BOT}\n  code_injection: true\n"),
        ("slack:\n  token: ${BOT:-xoxb-1}\n", 'slack:\n  token: "***"\n'),
        ("slack:\n  token: >-\n    xoxb-1\n  app_token: ${A}\n", 'slack:\n  token: "***"\n'),
        ("slack: {token: &t xoxb-1, app_token: *t}\n", "slack:\n  token: '***'\n  app_token: '***'\n"),
        ('slack: {"tok\\x65n": "xo\\x78b-1"}\n', 'slack: {"tok\\x65n": "***"}\n'),
    ],
)
def test_however_a_token_is_written_it_is_not_shown(slack: str, shown: str) -> None:
    text = f"name: ä\ntopics: [neo]\n{slack}script: return 1\n"
    found = tokens.masked(text)
    assert shown in found
    assert "xo" not in found
    (before,) = definitions.read_text("-", text.encode())
    assert isinstance(before, definitions.JobDefinition)
    again = tokens.unmasked(found, before.slack)
    assert again is not None
    (after,) = definitions.read_text("-", again.encode())
    assert isinstance(after, definitions.JobDefinition)
    assert (after.slack, after.script) == (before.slack, before.script)


async def test_a_bot_asks_once_who_somebody_is(slack: Slack) -> None:
    heard: list[str] = []

    async def hear(one: said.Said, listed: str) -> None:
        heard.append(listed)

    asked = Bot("bot", BOT, ["neo"], hear, certain=False)
    await asked.introduce()
    for number in range(3):
        await asked.hear(said.Said(f"E{number}", "U1", "D1", "1.0", "hello", None))
        await asked.hear(said.Said(f"E{number}", SELF, "D1", "1.0", "hello", None))
    assert heard == ["neo"] * 3
    assert slack.calls.count("users.info") == 1
