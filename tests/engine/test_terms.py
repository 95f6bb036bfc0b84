"""What a task's header says, whoever wrote it."""

from __future__ import annotations

import msgspec
import pytest

from penstock import terms
from penstock.terms import PLAIN, Terms


def test_what_is_written_is_read() -> None:
    asked = Terms(arguments=True, recorded=True, retries=3, backoff=(0.5, 60.0), unique="k", runs=2, again=1.7e9)
    assert terms.read({terms.HEADER: terms.write(asked)}) == asked
    assert terms.read({}) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[]",
        '{"retries": "many"}',
        '{"x":' + "[" * 5000,
        '{"x":' * 5000,
        '{"backoff": [1e308, 1e308], "retries": 1000000000000}',
        '{"backoff": [5, 1]}',
        '{"backoff": [-1, 1]}',
        '{"retries": -1}',
        '{"runs": 0}',
        '{"limit": -1}',
        '{"deadline": 1e300}',
        '{"result_ttl": 1e300}',
        '{"recorded": true, "unique": "\\u0000"}',
        '{"topic": "a\\u0000"}',
        "\udcff",
    ],
)
def test_what_no_sender_of_ours_would_write_counts_for_nothing(text: str) -> None:
    assert terms.read({terms.HEADER: text}) == PLAIN
    assert terms.read({terms.HEADER: 7}) == PLAIN


def test_unknown_fields_of_a_later_version_are_passed_over() -> None:
    later = msgspec.json.encode({"retries": 2, "colour": "blue"}).decode()
    assert terms.read({terms.HEADER: later}) == Terms(retries=2)
