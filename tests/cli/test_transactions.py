"""`penstock transactions`: what is told is so, and what is asked is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.hosting import DEFINITIONS, Hosted
from tests.helpers import eventually_sync

ORDER = """
- name: order
  topics: [order.placed]
  script: |-
    import os
    async with transaction("order") as t:
        await t.step("pay", dict, receipt="\\x1b[31m7", undo=lambda receipt: open("refunded", "w").close())
        if not os.path.exists("ready"):
            raise OSError("no ship")
        await t.step("ship", int)
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    shell = Hosted(tmp_path_factory.mktemp("node"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DEFINITIONS, "order.yml", ORDER)
            shell.serve()
        yield shell
    finally:
        shell.stop()


def failed(shell: Hosted) -> str:
    """An order that is suspended."""
    (shell.folder / "served" / "ready").unlink(missing_ok=True)
    database = str(shell.folder / "served" / "penstock.db")
    told = shell("send", "order.placed", "{}", "--wait", "--json", "--broker", f"sqlite:///{database}", status=1)
    return str(told.json["taskid"])


def status(shell: Hosted, id: str) -> Any:
    return shell("transactions", "show", id, "--json").json["status"]


def test_the_latest_are_listed_and_one_is_shown(shell: Hosted) -> None:
    id = failed(shell)
    head, *rows = shell("transactions").out.splitlines()
    assert head.split() == ["id", "name", "status", "step", "done", "updated", "error"]
    assert rows[0].split()[:5] == [id, "order", "Suspending", "pay", "1"]
    assert shell("transactions", "list", "--status", "aborted", "--json").json == []
    assert len(shell("transactions", "list", "--name", "order", "--limit", "1", "--json").json) == 1
    text = shell("transactions", "show", id).out
    assert "status:   Suspending" in text.splitlines()
    assert "error:    OSError: no ship" in text.splitlines()
    assert "pay at" in text
    assert "\x1b" not in text


def test_it_is_resumed_cancelled_and_forced(shell: Hosted) -> None:
    one, two, three, four = (failed(shell) for _ in range(4))
    assert shell("transactions", "cancel", two).out.startswith(f"{two} is told to cancel: it is ")
    eventually_sync(lambda: status(shell, two) == "Cancelled")
    assert (shell.folder / "served" / "refunded").exists()
    assert shell("transactions", "resume", three, "--force", "--json").json["status"] == "ForceRecoveryComplete"
    assert shell("transactions", "cancel", four, "--force", "--json").json["status"] == "ForceCancelled"
    (shell.folder / "served" / "ready").touch()
    shell("transactions", "resume", one)
    eventually_sync(lambda: status(shell, one) == "RecoveryComplete")


@pytest.mark.parametrize("verb", ["show", "suspend", "resume", "cancel"])
def test_one_that_there_is_not_is_one_line(shell: Hosted, verb: str) -> None:
    assert "there is no transaction 'nothing'" in shell("transactions", verb, "nothing", status=1).error


def test_what_does_not_go_with_its_status_is_one_line(shell: Hosted) -> None:
    id = failed(shell)
    assert shell("transactions", "suspend", id, status=1).error.endswith("cannot be suspended: it is Suspending")


@pytest.mark.parametrize(
    "arguments",
    [["lst"], ["show"], ["list", "--status", "Done"], ["list", "--limit", "0"], ["suspend", "x", "--force"]],
)
def test_wrong_use_is_one_line_and_status_2(penstock: Any, arguments: list[str]) -> None:
    result = penstock("transactions", *arguments, status=2)
    assert result.error
    assert result.out == ""


def test_a_node_is_asked_and_no_other(penstock: Any, tmp_path: Path) -> None:
    penstock("transactions", "--url", "http://h:1", "--store", "memory://", status=2)
