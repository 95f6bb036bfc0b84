"""`penstock dead`: a letter is in exactly one place, before, during and after."""

from __future__ import annotations

import asyncio
import signal

import pytest

from penstock.brokers import registry
from penstock.brokers.base import Broker, Queue, QueueInfo
from penstock.control import dead_letters
from penstock.control.dead_letters import Outcome, Selection
from penstock.delivery.consumer import queues_of
from penstock.delivery.dead_letters import bury
from penstock.delivery.history import NEW
from penstock.errors import BrokerError
from penstock.message import Delivery
from tests.cli.conftest import Shell, at_a_terminal
from tests.helpers import eventually_sync

KEYS = ["id", "queue", "reason", "error", "traceback", "attempts", "origin", "time", "body"]


def test_letters_have_exactly_their_keys(penstock: Shell) -> None:
    penstock.make_queues()
    penstock("publish", "all", '"fail"', "--id", "a")
    penstock.consume(lambda: penstock.queue()["dead"] == 1)
    (letter,) = penstock("dead", "list", "orders", "--json").json
    assert list(letter) == KEYS
    assert letter["id"] == "a"
    assert (letter["queue"], letter["origin"], letter["reason"]) == ("orders", "all", "failed")
    assert (letter["attempts"], letter["body"]) == (1, "fail")
    assert "ValueError" in letter["error"]
    assert "jobs.py" in letter["traceback"]
    assert penstock("dead", "show", "orders", "a", "--json").json == letter
    assert penstock("dead", "show", "orders", "--json").json == [letter]


def test_what_others_wrote_cannot_steer_the_terminal(penstock: Shell) -> None:
    penstock.make_dead_letters(1)
    for verb in ("list", "show"):
        out = penstock("dead", verb, "orders").out
        assert "\x1b" not in out
        assert "no \\x1b[31mgood" in out


def test_list_says_when_there_are_more(penstock: Shell) -> None:
    ids = penstock.make_dead_letters(60)
    result = penstock("dead", "list", "orders", "--json")
    assert [letter["id"] for letter in result.json] == ids[:50]
    assert "50 of 60" in result.err
    newest = penstock("dead", "list", "orders", "--json", "--newest", "--limit", "2").json
    assert [letter["id"] for letter in newest] == ids[-2:]
    assert len(penstock("dead", "list", "orders").out.splitlines()) == 51


def test_replay_brings_all_back_as_new(penstock: Shell) -> None:
    penstock.make_dead_letters(30)
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace('== "fail"', '== "no more"'))
    assert penstock("dead", "replay", "orders", "--json").json == {"queue": "orders", "replayed": 30}
    assert penstock.queue()["dead"] == 0
    penstock.consume(lambda: len(penstock.said("took")) == 30)


def test_replay_while_they_fail_again_ends(penstock: Shell) -> None:
    penstock.make_dead_letters(30)
    running = penstock.start("run", "jobs")
    running.until_logged("consuming orders")
    assert penstock("dead", "replay", "orders", "--json").json["replayed"] == 30
    eventually_sync(lambda: penstock.queue()["dead"] == 30)
    running.send(signal.SIGTERM)
    assert running.ended() == 0


def test_replay_of_some_leaves_the_others_where_they_were(penstock: Shell) -> None:
    ids = penstock.make_dead_letters(20)
    chosen = ids[3], ids[17]
    result = penstock("dead", "replay", "orders", "--id", chosen[0], "--id", chosen[1])
    assert result.out == "replayed 2 of orders\n"
    left = [letter["id"] for letter in penstock("dead", "list", "orders", "--json").json]
    assert left == [id for id in ids if id not in chosen]
    assert penstock.queue()["ready"] == 2


def test_unknown_id_is_an_error_and_the_known_one_is_done(penstock: Shell) -> None:
    ids = penstock.make_dead_letters(3)
    result = penstock("dead", "replay", "orders", "--id", "nobody", "--id", ids[0], status=1)
    assert "nobody" in result.error
    assert (penstock.queue()["ready"], penstock.queue()["dead"]) == (1, 2)
    assert "nobody" in penstock("dead", "show", "orders", "nobody", status=1).error


def test_filters_by_reason_and_limit(penstock: Shell) -> None:
    penstock.make_dead_letters(5)
    assert penstock("dead", "discard", "orders", "--reason", "invalid", "--yes", "--json").json["discarded"] == 0
    assert penstock("dead", "replay", "orders", "--reason", "failed", "--limit", "2", "--json").json["replayed"] == 2
    assert (penstock.queue()["ready"], penstock.queue()["dead"]) == (2, 3)


def test_discard_needs_a_yes(penstock: Shell) -> None:
    ids = penstock.make_dead_letters(3)
    assert "--yes" in penstock("dead", "discard", "orders", status=2).error
    assert penstock.queue()["dead"] == 3
    assert penstock("dead", "discard", "orders", "--id", ids[1], "-y").out == "discarded 1 of orders\n"
    assert penstock("dead", "discard", "orders", "-y", "--json").json == {"queue": "orders", "discarded": 2}
    assert penstock.queue()["dead"] == 0


def test_at_a_terminal_discard_asks(penstock: Shell) -> None:
    penstock.make_dead_letters(2)
    assert "nothing was removed" in at_a_terminal(penstock, ["dead", "discard", "orders"], typed="n\n")
    assert penstock.queue()["dead"] == 2
    assert "discarded 2 of orders" in at_a_terminal(penstock, ["dead", "discard", "orders"], typed="y\n")
    assert penstock.queue()["dead"] == 0


@pytest.mark.parametrize("command", ["list", "show", "replay", "discard"])
def test_unknown_queue_is_one_line(penstock: Shell, command: str) -> None:
    penstock.make_queues()
    options = ["--yes"] if command == "discard" else []
    assert "did you mean 'orders'?" in penstock("dead", command, "order", *options, status=1).error


# -- against brokers


async def make_broker(url: str, *queues: Queue) -> Broker:
    broker = registry.connect(url)
    await broker.open()
    for queue in queues:
        await broker.declare(queue)
    return broker


async def put_letters(broker: Broker, count: int, *, queue: str = "q", to: str = "q") -> list[str]:
    """Letters of `queue` among the dead letters of `to`."""
    ids = [f"{n:04}" for n in range(count)]
    letters = []
    for id in ids:
        delivery = Delivery(queue, id, "topic", b'"x"', {}, None, 0, 1.0, None, 0, None)
        letter = bury(delivery, queue, "failed", NEW, "error", 2.0, abroad=True)
        letter.topic = f"{to}.dead"
        letters.append(letter)
    assert set(await broker.publish(letters)) == {None}
    return ids


async def infos(broker: Broker) -> dict[str, QueueInfo]:
    assert broker.admin is not None
    return {info.name: info for info in await broker.admin.inspect()}


async def test_letter_of_a_queue_that_is_gone_stays(broker_url: str) -> None:
    broker = await make_broker(broker_url, Queue("q"), Queue("q.dead"))
    await put_letters(broker, 3, queue="gone")
    outcome = Outcome()
    await dead_letters.replay(broker, "q", Selection(), outcome)
    assert (outcome.done, outcome.stayed) == (0, 3)
    assert "no queue 'gone'" in str(outcome.why)
    assert (await infos(broker))["q.dead"].ready == 3
    await broker.close()


async def test_replay_restores_the_topic(broker_url: str) -> None:
    broker = await make_broker(broker_url, Queue("q"), Queue("q.dead"))
    await put_letters(broker, 1)
    assert (await dead_letters.find(broker, "q", "0000")).origin == "topic"
    await dead_letters.replay(broker, "q", Selection(), Outcome())
    subscription = broker.subscribe([Queue("q")], prefetch=1, lease=5, on_lost=lambda lost: None)
    (delivery,) = await subscription.receive(1, 5)
    assert (delivery.topic, delivery.raw) == ("topic", b'"x"')
    assert not [name for name in delivery.headers if name.startswith("penstock-")]
    await broker.close()


async def test_replay_to_another_broker_publishes_then_acknowledges(broker_url: str) -> None:
    home = await make_broker("memory://", Queue("q"), Queue("other"))
    broker = await make_broker(broker_url, Queue("q.dead"))
    await put_letters(broker, 5)
    outcome = Outcome()
    await dead_letters.replay(broker, "q", Selection(), outcome, to=home)
    assert outcome.done == 5
    assert (await infos(broker))["q.dead"].ready == 0
    assert {name: info.ready for name, info in (await infos(home)).items()} == {"other": 0, "q": 5}
    await broker.close()


@pytest.mark.parametrize("there", [Queue("other", ("q",)), Queue("q", max_length=1)])
async def test_what_the_other_broker_cannot_take_stays(broker_url: str, there: Queue) -> None:
    home = await make_broker("memory://", there, Queue("q", max_length=there.max_length))
    broker = await make_broker(broker_url, Queue("q.dead"))
    await put_letters(broker, 3)
    outcome = Outcome()
    await dead_letters.replay(broker, "q", Selection(), outcome, to=home)
    gone = 1 if there.max_length else 0
    assert (outcome.done, outcome.stayed) == (gone, 3 - gone)
    assert outcome.why
    assert (await infos(broker))["q.dead"].ready == 3 - gone
    await broker.close()


async def test_interrupted_replay_loses_nothing(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "BATCH", 7)
    broker = await make_broker(broker_url, Queue("q"), Queue("q.dead"))
    ids = await put_letters(broker, 500)
    for steps in range(0, 60, 3):
        outcome = Outcome()
        selection = Selection(ids=frozenset(ids[steps::2]))
        task = asyncio.create_task(dead_letters.replay(broker, "q", selection, outcome))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        found = await infos(broker)
        ready = [found[name].ready or 0 for name in ("q", "q.dead")]
        assert sum(ready) == 500, found
        assert not found["q.dead"].unsettled
        assert ready[0] >= outcome.done
    await broker.close()


async def test_no_more_is_shown_than_fits(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = await make_broker(broker_url, Queue("q"), Queue("q.dead"))
    ids = await put_letters(broker, 5)

    async def shown(newest: bool) -> list[str]:
        return [letter.id for letter in (await dead_letters.look(broker, "q", 4, newest=newest)).letters]

    monkeypatch.setattr(dead_letters, "MOST_SHOWN", 0)
    assert [await shown(False), await shown(True)] == [ids[:1], ids[-1:]]
    monkeypatch.setattr(dead_letters, "MOST_SHOWN", 2**20)
    assert [await shown(False), await shown(True)] == [ids[:4], ids[-4:]]
    await broker.close()


class WithoutAdmin:
    """A broker that shows nothing, as some systems do."""

    admin = None

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> object:
        return getattr(self._broker, name)


async def test_system_that_shows_nothing_still_lists_replays_and_discards(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "LOOK", 0.05)
    inner = await make_broker(broker_url, Queue("q"), Queue("q.dead"))
    broker: Broker = WithoutAdmin(inner)  # type: ignore[assignment]
    ids = await put_letters(inner, 10)
    assert [letter.id for letter in (await dead_letters.look(broker, "q", 4)).letters] == ids[:4]
    assert [letter.id for letter in (await dead_letters.look(broker, "q", 4, newest=True)).letters] == ids[-4:]
    outcome = Outcome()
    await dead_letters.replay(broker, "q", Selection(ids=frozenset(ids[5:7])), outcome)
    await dead_letters.discard(broker, "q", Selection(limit=3), outcome)
    assert outcome.done == 5
    found = await infos(inner)
    assert (found["q"].ready, found["q.dead"].ready) == (2, 5)
    assert found["q.dead"].unsettled in (0, None)
    await inner.close()


async def test_broker_that_goes_away_for_good_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.errors import BrokerUnavailable

    monkeypatch.setattr(dead_letters, "PATIENCE", 0.1)
    monkeypatch.setattr(dead_letters, "LOOK", 0.05)
    broker = await make_broker("memory://", Queue("q"), Queue("q.dead"))
    await put_letters(broker, 1)

    async def refuse(*_: object) -> None:
        raise BrokerUnavailable("away")

    subscribe = broker.subscribe

    def broken(*arguments: object, **keywords: object) -> object:
        subscription = subscribe(*arguments, **keywords)  # type: ignore[arg-type]
        subscription.settle = refuse  # type: ignore[method-assign,assignment]
        return subscription

    monkeypatch.setattr(broker, "subscribe", broken)
    with pytest.raises(BrokerError, match="away"):
        await dead_letters.replay(broker, "q", Selection(), Outcome())
    found = await infos(broker)
    assert found["q.dead"].ready == 1
    await broker.close()


def test_letters_sent_to_another_broker_keep_their_origin_and_come_home(penstock: Shell) -> None:
    jobs = penstock.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace('"sqlite:///q.db", ', '"sqlite:///q.db", dead_letters="sqlite:///d.db", '))
    penstock.make_queues()
    penstock("publish", "all", '"fail"')

    def dead() -> int:
        found = penstock("queues", "--json", "--broker", "sqlite:///d.db").json
        return sum(one["dead"] for one in found)

    penstock.consume(lambda: dead() == 1)
    (letter,) = penstock("dead", "list", "orders", "--json", "--broker", "sqlite:///d.db").json
    assert letter["origin"] == "all"
    there = ["dead", "replay", "orders", "--broker", "sqlite:///d.db"]
    assert "--to" in penstock(*there, status=1).error
    penstock(*there, "--to", "sqlite:///q.db")
    assert dead() == 0
    assert penstock.queue()["ready"] == 1


def test_lanes_have_the_names_that_are_folded() -> None:
    from penstock import App

    app = App("memory://")

    @app.route("q")
    async def handler(messages: list[object]) -> None: ...

    assert {queue.name for queue in queues_of(app.routes[0])} == {"q", "q.suspects", "q.dead"}
