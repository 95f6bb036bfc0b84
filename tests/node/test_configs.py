"""Configurations: the environment in their values, and nothing secret in what is shown."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from penstock import ConfigError
from penstock.node import configs

ENV = {"REGION": "eu", "EMPTY": ""}


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("${REGION}", "eu"),
        ("in ${REGION}-1", "in eu-1"),
        ("${NONE:-fallback}", "fallback"),
        ("${NONE:-}", ""),
        ("${EMPTY:-x}", ""),
        ("$$ and $${REGION}", "$ and ${REGION}"),
        ("$REGION", "$REGION"),
        ({"a": ["${REGION}", 1, None]}, {"a": ["eu", 1, None]}),
    ],
)
def test_the_environment_is_put_in(given: Any, made: Any) -> None:
    assert configs.expand(given, ENV) == made


@pytest.mark.parametrize(
    ("given", "says"), [("${NONE}", "NONE is not set"), ("${}", "does not name"), ("${A B}", "does not name")]
)
def test_what_cannot_be_put_in_is_an_error(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configs.expand(given, ENV)


@pytest.mark.parametrize(
    "values",
    [
        {"password": "geheim"},
        {"aws_secret_access_key": "geheim"},
        {"aws_access_key_id": "geheim"},
        {"API-KEY": "geheim"},
        {"apiKey": "geheim"},
        {"deep": [{"auth_token": ["geheim", "geheim"]}]},
        {"credentials": {"any": "geheim"}},
        {"url": "amqp://user:geheim@host/"},
        {"urls": ["redis://:geheim@host:1"]},
        {"password": "${NAME:-geheim}"},
    ],
)
def test_no_secret_is_shown(values: Any) -> None:
    text = yaml.safe_dump(values)
    assert "geheim" in text
    assert "geheim" not in configs.masked_text(text + "# geheim\n")


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML is without libyaml here")
def test_what_is_shown_is_read_and_written_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python, what a file may hold takes seconds, in which the node does nothing else."""

    def slowly(*_: object) -> None:
        raise AssertionError("in Python")

    monkeypatch.setattr(yaml.scanner.Scanner, "fetch_more_tokens", slowly)
    monkeypatch.setattr(yaml.emitter.Emitter, "emit", slowly)
    text = "b: Grüße\na:\n- '1'\n- null\npassword: '***'\n"
    assert configs.masked_text(text.replace("'***'", "geheim")) == text


def test_what_is_shown_is_shown_as_it_was_written() -> None:
    assert configs.masked_text("greeting: hello 😀\n") == "greeting: hello 😀\n"


@pytest.mark.parametrize("text", ["password => geheim", "nats://a?servers=b,geheim@c", "guest:geheim@host"])
def test_what_was_masked_of_a_text_is_known_for_it(text: str) -> None:
    shown = configs.masked(text)
    assert "geheim" not in shown
    assert configs.holds_mask(shown)
    assert not configs.holds_mask(text)
    assert configs.unmasked(shown, text) == text


def test_what_only_says_where_a_secret_is_stays() -> None:
    assert configs.masked({"password": "${DB_PASSWORD}", "region": "eu"}) == {
        "password": "${DB_PASSWORD}",
        "region": "eu",
    }


def test_what_was_masked_is_put_back_where_it_was() -> None:
    old = {"password": "geheim", "url": "amqp://u:geheim@h/", "deep": [{"token": "t"}], "region": "eu"}
    shown = configs.masked(old)
    shown["region"] = "us"
    assert configs.unmasked(shown, old) == {**old, "region": "us"}
    assert configs.holds_mask(configs.unmasked({"new_password": "***"}, old))
    assert configs.holds_mask(configs.unmasked(shown, None))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("host=db password=hunter2 user=neo", "host=db password=*** user=neo"),
        ("Server=h;Pwd=hunter2;Database=d", "Server=h;Pwd=***;Database=d"),
        ("Bearer hunter2hunter2", "Bearer ***"),
        ("redis://:hunter2@db/0", "redis://:***@db/0"),
        ("a *** b", "a *** b"),
    ],
)
def test_a_secret_within_a_value_is_masked_and_put_back(value: str, shown: str) -> None:
    old = {"dsn": value, "region": "eu"}
    assert configs.masked(old) == {"dsn": shown, "region": "eu"}
    back = configs.unmasked({"dsn": shown, "region": "us"}, old)
    assert back == {"dsn": value, "region": "us"}
    assert not configs.holds_mask(back)
    assert configs.holds_mask({"dsn": shown}) == ("hunter2" in value)
