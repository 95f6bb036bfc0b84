"""The page at `/` while something does not answer: it is waited for once, and not for long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.web import overview
from tests.web.conftest import Served


async def test_the_parts_of_the_page_are_asked_for_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    all_asked = asyncio.Barrier(3)

    async def rows(desk: Any) -> Any:
        await all_asked.wait()
        return [["together"]]

    monkeypatch.setattr(overview, "_SECTIONS", [(title, ("head",), rows) for title in ("One", "Two", "Three")])
    monkeypatch.setattr(overview, "WITHIN", 5.0)
    assert (await served.ask("GET", "/")).text.count("together") == 3


async def test_what_does_not_answer_in_time_is_a_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(desk: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(overview, "_SECTIONS", [("Hung", ("head",), never), *overview._SECTIONS])
    monkeypatch.setattr(overview, "WITHIN", 0.5)
    page = (await served.ask("GET", "/")).text
    assert "<h2>Hung</h2><p>no answer within 0.5 s</p>" in page
    assert served.node.name in page
