"""What the log shows people: one record is one record, whatever it quotes."""

from __future__ import annotations

import logging
import sys

import pytest

from penstock.logs import ConsoleFormatter

FORGED = "boom\n23:59:59 INFO    penstock.audit: token edit 10.6.6.6: ok\n\x1b]0;owned\x07"


def console(message: str, error: BaseException | None = None) -> str:
    raised = None if error is None else (type(error), error, error.__traceback__)
    return ConsoleFormatter().format(logging.LogRecord("app", logging.INFO, "app.py", 1, message, None, raised))


def test_a_message_begins_no_line_that_looks_like_a_record() -> None:
    first, *others = console(FORGED).split("\n")
    assert first.endswith(" INFO    app: boom")
    assert others == ["  23:59:59 INFO    penstock.audit: token edit 10.6.6.6: ok", "  \\x1b]0;owned\\x07"]


def test_a_traceback_neither() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        shown = console("it failed", sys.exc_info()[1])
    first, *others = shown.split("\n")
    assert first.endswith(" INFO    app: it failed")
    assert others[0] == "  Traceback (most recent call last):"
    assert "  ValueError: boom" in others
    assert all(line.startswith("  ") for line in others)
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("a\x1b[31m", "a\\x1b[31m"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("a\x85b\u2028c", "a\\x85b\\u2028c"),  # of one terminal or another, the ends of lines
        ("a\u202eb\u200b", "a\\u202eb\\u200b"),
        ("\udce9", "\\udce9"),
    ],
)
def test_no_character_commands_a_terminal(quoted: str, shown: str) -> None:
    assert console(f"queue {quoted}: purged").endswith(f" app: queue {shown}: purged")


@pytest.mark.parametrize("text", ["queue a: purged", "Grüße, 队列 😀", "a\tb", "C:\\new"])
def test_what_is_plain_stays(text: str) -> None:
    assert console(text).endswith(f" app: {text}")
