"""The page at `/`: what a browser sees once it has signed in, with nothing in it that somebody else wrote as markup."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.errors import BrokerUnavailable
from penstock.web.roles import Role
from tests.helpers import eventually
from tests.web.conftest import Served


async def _page(served: Served, **options: Any) -> str:
    answer = await served.ask("GET", "/", Role.VIEW, **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return answer.text


async def test_who_has_signed_in_sees_how_everything_stands(served: Served) -> None:
    taskid = await served.node.send("hello", {})
    cookie = await served.signed_in(Role.VIEW)
    answer = await served.ask("GET", "/", None, headers={"Cookie": cookie})
    assert answer.status_code == 200

    async def told() -> bool:
        page = await _page(served)
        return all(one in page for one in (served.node.name, "produce", "greet", "master", taskid))

    await eventually(told, "all of it is told")
    assert (await served.ask("GET", "/", None)).status_code == 401


async def test_names_are_not_markup_and_nothing_may_be_loaded(served: Served) -> None:
    evil = "<script>alert(1)</script>\"'&"
    await served.node.send(evil, {})
    page = await _page(served)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    policy = (await served.ask("GET", "/")).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy


async def test_what_cannot_be_told_is_a_line_and_the_rest_is_there(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> None:
        raise BrokerUnavailable("the broker <b>is away")

    monkeypatch.setattr(served.node, "broker", away)
    page = await _page(served)
    assert "the broker &lt;b&gt;is away" in page
    assert "produce" in page
