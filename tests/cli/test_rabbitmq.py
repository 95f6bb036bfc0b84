"""The command line on RabbitMQ: what it cannot see is said in one line, dead letters are taken and given back."""

from __future__ import annotations

import asyncio

import pytest

from penstock.brokers.amqp import AmqpBroker
from penstock.brokers.base import Queue
from penstock.delivery.dead_letters import bury
from penstock.delivery.history import NEW
from penstock.message import Delivery
from tests.cli.conftest import Shell

IDS = [f"id{number}" for number in range(5)]


@pytest.fixture
def shell(penstock: Shell, amqp_url: str) -> Shell:
    """With two queues, in one of which five messages have failed."""
    penstock.environment["PENSTOCK_BROKER"] = amqp_url
    asyncio.run(fill(amqp_url))
    return penstock


async def fill(url: str) -> None:
    broker = AmqpBroker(url)
    for name in ("orders", "orders.suspects", "orders.dead", "other"):
        await broker.declare(Queue(name))
    letters = []
    for id in IDS:
        delivery = Delivery("orders", id, "orders", b'"x"', {}, None, 0, 1.0, None, 0, None)
        letter = bury(delivery, "orders", "failed", NEW, "no good", 2.0, abroad=True)
        letter.topic = "orders.dead"
        letters.append(letter)
    assert set(await broker.publish(letters)) == {None}
    await broker.close()


def test_queues_have_to_be_named(shell: Shell) -> None:
    error = shell("queues", status=1).error
    assert "does not tell which queues there are: name them" in error
    assert "guest:guest" not in error
    assert error == shell("queues", "list", "--json", status=1).error


def test_named_queues_are_shown_as_far_as_they_can_be_seen(shell: Shell) -> None:
    shell("publish", "orders", "1")
    orders, other = shell("queues", "orders", "other", "--json").json
    assert orders == {"name": "orders", "ready": 1, "unsettled": None, "consumers": 0, "dead": 5, "oldest_s": None}
    assert other["name"] == "other"
    assert shell("queues", "list", "orders").out.splitlines()[1].split() == ["orders", "1", "?", "0", "5", "-"]
    assert shell("queues", "order", status=1).error == "there is no queue 'order'"


def test_a_queue_can_be_purged_and_not_paused(shell: Shell) -> None:
    for number in range(3):
        shell("publish", "orders", str(number))
    assert shell("queues", "purge", "orders", "--yes").out == "purged 3 from orders\n"
    for verb in ("pause", "resume"):
        assert "RabbitMQ cannot pause a queue" in shell("queues", verb, "orders", status=1).error
    assert shell("queues", "purge", "never", "--yes", status=1).error == "there is no queue 'never'"


def test_looking_at_dead_letters_leaves_them_in_their_order(shell: Shell) -> None:
    def seen(*arguments: str) -> list[str]:
        return [letter["id"] for letter in shell("dead", *arguments, "--json").json]

    assert seen("list", "orders") == IDS
    assert seen("list", "orders", "--limit", "2") == IDS[:2]
    assert seen("list", "orders", "--newest", "--limit", "2") == IDS[3:]
    assert seen("show", "orders") == IDS
    assert shell("dead", "show", "orders", "id3", "--json").json["error"] == "no good"
    assert shell("dead", "show", "orders", "id9", status=1).error == "'orders' has no dead letter 'id9'"
    assert shell("dead", "list", "other", status=1).error == "no dead letters of 'other' are kept on this broker"
    assert shell("dead", "list", "never", status=1).error == "there is no queue 'never'"


def test_dead_letters_are_replayed_and_discarded(shell: Shell) -> None:
    assert shell("dead", "replay", "orders", "--id", "id1", "--json").json["replayed"] == 1
    assert shell("dead", "discard", "orders", "--id", "id2", "--yes", "--json").json["discarded"] == 1
    (orders,) = shell("queues", "orders", "--json").json
    assert (orders["ready"], orders["dead"]) == (1, 3)
    assert shell("dead", "replay", "orders", "--json").json["replayed"] == 3
    (orders,) = shell("queues", "orders", "--json").json
    assert (orders["ready"], orders["dead"]) == (4, 0)


def test_a_server_that_is_away_or_refuses_is_one_line(shell: Shell) -> None:
    assert "127.0.0.1:1" in shell("queues", "orders", "--broker", "amqp://127.0.0.1:1/", status=1).error
    error = shell("publish", "orders", "1", "--broker", "amqp://guest:secret-word@127.0.0.1/", status=1).error
    assert "refuses the login" in error
    assert "secret-word" not in error
