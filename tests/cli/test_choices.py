"""A word that chooses among some is that one, however it is written."""

from __future__ import annotations

from tests.cli.conftest import Shell


def test_a_reason_in_capitals_discards_those_letters_and_no_others(penstock: Shell) -> None:
    penstock.make_dead_letters(3)
    assert penstock("dead", "discard", "orders", "--reason", "REJECTED", "--yes", "--json").json["discarded"] == 0
    assert penstock.queue()["dead"] == 3
    assert penstock("dead", "discard", "orders", "--reason", "Failed", "--yes", "--json").json["discarded"] == 3
    assert penstock.queue()["dead"] == 0


def test_a_state_in_capitals_lists_those_tasks_and_no_others(penstock: Shell) -> None:
    penstock.make_queues()
    penstock("send", "nobody", "{}")
    assert [one["topic"] for one in penstock("tasks", "list", "--state", "QUEUED", "--json").json] == ["nobody"]
    assert penstock("tasks", "list", "--state", "Failed", "--json").json == []


def test_a_reason_that_there_is_not_is_told(penstock: Shell) -> None:
    result = penstock("dead", "replay", "orders", "--reason", "faild", status=2)
    assert "--reason faild: it is one of" in result.error
    assert "did you mean 'failed'?" in result.error


def test_a_log_format_in_capitals_is_that_one(penstock: Shell) -> None:
    penstock.make_queues()
    penstock("queues", "--log-level", "Error", "--log-format", "JSON")
