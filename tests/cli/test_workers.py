"""`penstock workers`: what is told of them is so, and what they are told is done, on whichever node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.hosting import Hosted, hosted
from tests.helpers import eventually_sync


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with hosted(tmp_path_factory.mktemp("node")) as (shell, _):
        yield shell


def worker(shell: Hosted, name: str) -> Any:
    return shell("workers", "show", name, "--json").json


def state(shell: Hosted, name: str) -> str:
    (one,) = worker(shell, name)["nodes"]
    return str(one["state"])


def runs(shell: Hosted) -> int:
    return len((shell.folder / "served" / "produced").read_text())


def test_every_worker_is_listed_and_how_it_stands(shell: Hosted) -> None:
    head, *rows = shell("workers").out.splitlines()
    assert head.split() == ["worker", "mode", "state", "for", "runs", "failures", "node", "last", "error"]
    assert [row.split()[0] for row in rows] == ["fails?", "produce"]
    eventually_sync(lambda: "ValueError: no \\x1b[31mgood" in shell("workers", "list").out)
    first, second = shell("workers", "--json").json
    assert set(first) == {"name", "category", "mode", "watch_interval", "paused", "file", "line", "nodes"}
    assert (second["name"], second["category"], second["file"], second["paused"]) == (
        "produce",
        "demo",
        "workers.yml",
        False,
    )


def test_an_odd_name_is_one_name(shell: Hosted) -> None:
    eventually_sync(lambda: "no \\x1b[31mgood" in shell("workers", "show", "fails? 100%").out)
    text = shell("workers", "show", "fails? 100%").out
    assert "defined:    workers.yml:9" in text.splitlines()
    assert "\x1b" not in text
    assert worker(shell, "fails? 100%")["nodes"][0]["failures"] > 0


def test_a_paused_worker_rests_until_it_is_resumed(shell: Hosted) -> None:
    assert shell("workers", "pause", "produce").out == "produce is told to pause\n"
    eventually_sync(lambda: state(shell, "produce") == "paused")
    assert worker(shell, "produce")["paused"]
    before = runs(shell)
    shell("workers")
    assert runs(shell) == before
    assert shell("workers", "resume", "produce", "--json").json["paused"] is False
    eventually_sync(lambda: runs(shell) > before)


def test_a_restarted_worker_begins_anew(shell: Hosted) -> None:
    begun = worker(shell, "fails? 100%")["nodes"][0]["runs"]
    shell("workers", "restart", "fails? 100%")
    eventually_sync(lambda: worker(shell, "fails? 100%")["nodes"][0]["runs"] > begun)


@pytest.mark.parametrize("verb", ["show", "restart", "pause", "resume"])
def test_an_unknown_worker_is_one_line_and_the_near_one_is_named(shell: Hosted, verb: str) -> None:
    error = shell("workers", verb, "produse", status=1).error
    assert error == "no worker is named 'produse' (did you mean 'produce'?)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["workers", "lst"],
        ["workers", "show"],
        ["workers", "pause"],
        ["workers", "restart", "a", "b"],
        ["workers", "--url", "http://h:1", "--store", "memory://"],
        ["nodes", "more"],
        ["nodes", "--url"],
        ["config", "show"],
        ["config", "sho", "broker"],
        ["tasks", "--url", "http://h:1", "--broker", "memory://"],
        ["queues", "--url", "http://h:1", "-H", "h"],
        ["send", "x", "--url", "http://h:1"],
    ],
)
def test_wrong_use_is_one_line_and_status_2(penstock: Any, arguments: list[str]) -> None:
    result = penstock(*arguments, status=2)
    assert result.error
    assert result.out == ""


def test_a_viewer_may_look_and_not_touch(tmp_path: Path) -> None:
    viewer: dict[str, Any] = {"PENSTOCK_TOKEN": "viewer-of-all-things"}
    shell = Hosted(tmp_path)
    try:
        _, url = shell.serve(PENSTOCK_TOKEN_VIEW=viewer["PENSTOCK_TOKEN"])
        assert len(shell("workers", "--url", url, "--json", **viewer).json) == 2
        for arguments in (["workers", "pause", "produce"], ["queues", "pause", "greet"], ["tasks", "cancel", "x"]):
            error = shell(*arguments, "--url", url, status=1, **viewer).error
            assert "operate" in error
        assert not worker(shell, "produce")["paused"]
    finally:
        shell.stop()
