"""Bad input at declaration: one clear line, at the earliest moment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock import Actions, App, Client, ConfigError, DeclarationError, DuplicateQueue, Message, Options, SyncClient


@pytest.fixture
def app() -> App:
    return App("memory://")


def takes_nothing() -> None: ...


def takes_two(message: Message, other: int) -> None: ...


def takes_a_keyword(message: Message, *, other: int) -> None: ...


def takes_only_keywords(*, message: Message) -> None: ...


def generates(message: Message) -> Any:
    yield message


async def generates_async(message: Message) -> Any:
    yield message


def unresolvable(message: Nonsense) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def undecodable(message: list[Callable[[], int]]) -> None: ...


@pytest.mark.parametrize(
    "handler",
    [
        takes_nothing,
        takes_two,
        takes_a_keyword,
        takes_only_keywords,
        generates,
        generates_async,
        unresolvable,
        undecodable,
        3,
    ],
)
def test_an_impossible_handler_is_refused_where_it_is_declared(app: App, handler: Any) -> None:
    with pytest.raises(DeclarationError) as caught:
        app.route("q")(handler)
    assert "\n" not in str(caught.value)
    assert app.routes == []


def test_a_handler_may_have_more_arguments_with_defaults(app: App) -> None:
    def handle(message: Message, other: int = 1, *more: Any, flag: bool = False, **rest: Any) -> None: ...

    app.route("q")(handle)


def test_the_handler_itself_comes_back_from_the_decorator(app: App) -> None:
    def handle(message: Message) -> None: ...

    assert app.route("q")(handle) is handle


def test_two_owners_of_a_queue_are_refused(app: App) -> None:
    @app.route("q")
    def first(message: Message) -> None: ...

    with pytest.raises(DuplicateQueue, match=r"'q' already belongs to first"):

        @app.route(["p", "q"])
        def second(message: Message) -> None: ...

    assert len(app.routes) == 1


@pytest.mark.parametrize(("first", "second"), [("q", "q.suspects"), ("q.suspects", "q")])
def test_a_route_also_owns_the_lane_of_its_suspects(app: App, first: str, second: str) -> None:
    app.route(first)(lambda messages: None)
    with pytest.raises(DuplicateQueue, match=r"'q.suspects' already belongs to"):
        app.route(second)(lambda messages: None)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"options": {"bulksize": 3}}, r"unknown option 'bulksize' \(did you mean 'bulk_size'\?\)"),
        ({"options": {Options.BULK_SIZE: 0}}, "bulk_size must be a whole number, 1 or more"),
        ({"options": {Options.BULK_SIZE: 3}, "bulk_size": 4}, "bulk_size is given twice"),
        ({"bulk_size": "many"}, "bulk_size must be"),
        ({"bulk_size": True}, "bulk_size must be"),
        ({"bulk_size": None}, "bulk_size must be"),
        ({"bulk_timeout": 0}, "bulk_timeout must be"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"prefetch": -1}, "prefetch must be"),
        ({"max_attempts": 0}, "max_attempts must be"),
        ({"backoff": 3}, "backoff must be"),
        ({"backoff": (5, 1)}, "backoff must be"),
        ({"priorities": 11}, "priorities must be"),
        ({"on_success": "ack"}, "on_success must be one of Actions.ACK"),
        ({"broker": "events"}, "no broker is named 'events'"),
    ],
)
def test_an_impossible_option_is_refused(app: App, given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        app.route("q", **given)


@pytest.mark.parametrize("queues", [[], "", [""], [3]])
def test_a_route_needs_queues_with_names(app: App, queues: Any) -> None:
    with pytest.raises(DeclarationError):
        app.route(queues)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlit:///x.db", r"no broker for sqlit:// URLs \(did you mean 'sqlite'\?\)"),
        ("just words", "is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///x.db?vhots=a", r"sqlite has no option 'vhots' \(did you mean 'vhost'\?\)"),
        ("kafka://h:notaport/", "is not a URL"),
    ],
)
async def test_an_impossible_url_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        await App(url).publish("q", 1)


@pytest.mark.parametrize("kind", [App, Client, SyncClient])
def test_an_unknown_scheme_is_refused_at_once(kind: Any) -> None:
    with pytest.raises(ConfigError, match="no broker for nothing://"):
        kind("nothing://user:secret@host")


@pytest.mark.parametrize(
    "given", [{"prefetch": 0}, {"lease": 0}, {"grace": -1}, {"max_body": "big"}, {"prefetch_count": 1.5}]
)
def test_an_impossible_number_of_an_app_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(given)).removesuffix("_count")):
        App("memory://", **given)


def test_an_app_takes_a_url_or_a_host_not_both() -> None:
    with pytest.raises(ConfigError, match="not both"):
        App("memory://", host="127.0.0.1")


def test_a_bulk_size_without_effect_is_said(app: App, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        app.route("q", bulk_size=10)(takes_one)
    assert "bulk_size=10 has no effect" in caplog.text


def test_a_bulk_size_above_the_prefetch_is_said(app: App, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        app.route("few", bulk_size=1000, prefetch=1000)(lambda messages: None)
        assert caplog.text == ""
        app.route("many", bulk_size=1000, concurrency=2)(lambda messages: None)
    assert "at most 128 messages, not bulk_size=1000" in caplog.text


def takes_one(message: Message) -> None: ...


def test_the_default_broker_is_a_file_beside_penstock_toml(
    own_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert App().url == f"sqlite:///{own_directory}/penstock.db"
    (own_directory / "penstock.toml").write_text("")
    (own_directory / "below").mkdir()
    monkeypatch.chdir(own_directory / "below")
    assert App().url == f"sqlite:///{own_directory}/penstock.db"
    (own_directory / "penstock.toml").write_text('broker = "memory://toml"')
    assert App().url == "memory://toml"
    (own_directory / "secret").write_text("memory://file\n")
    monkeypatch.setenv("PENSTOCK_BROKER_FILE", str(own_directory / "secret"))
    assert App().url == "memory://file"
    monkeypatch.setenv("PENSTOCK_BROKER", "memory://environment")
    assert App().url == "memory://environment"
    assert App("memory://given").url == "memory://given"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("brokre = 'x'", r"unknown key 'brokre' \(did you mean 'broker'\?\)"),
        ("broker = ", "penstock.toml"),
        ("processes = 'many'", "penstock.toml: processes: expected `int`"),
    ],
)
def test_a_bad_penstock_toml_is_refused(own_directory: Path, text: str, says: str) -> None:
    (own_directory / "penstock.toml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        App()
    assert "\n" not in str(caught.value)


def test_actions_are_what_the_documents_call_them() -> None:
    assert {action.name for action in Actions} == {"ACK", "REJECT", "REQUEUE"}
