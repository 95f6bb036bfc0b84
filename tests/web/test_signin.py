"""Signing in: a link works once, a session is a cookie that no script and no other site can use."""

from __future__ import annotations

import pytest

from penstock.web.access import CODE_LIVES, MOST_SESSIONS, SESSION_LIVES, Access
from penstock.web.roles import Role
from tests.web.conftest import TOKENS, Served


class SetClock:
    now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


async def test_a_link_works_once(served: Served) -> None:
    link = served.http.sign_in_link()
    answer = await served.ask("GET", link, None)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert f"penstock-{served.http.port}=" in cookie
    assert (await served.ask("GET", link, None)).status_code == 401
    assert (await served.ask("GET", "/signin?code=guess", None)).status_code == 401


async def test_a_link_is_not_used_up_by_looking_ahead(served: Served) -> None:
    link = served.http.sign_in_link()
    assert (await served.ask("GET", link, None, headers={"Sec-Purpose": "prefetch"})).status_code == 503
    assert (await served.ask("HEAD", link, None)).status_code == 401
    assert (await served.ask("GET", link, None)).status_code == 200


def test_codes_and_sessions_end() -> None:
    clock = SetClock()
    access = Access({}, clock)
    late, session = access.invite(), access.open_session(Role.VIEW)
    clock.now += CODE_LIVES
    assert access.redeem(late) is None
    assert access.session(session) is Role.VIEW
    clock.now += SESSION_LIVES
    assert access.session(session) is None


def test_no_secret_is_kept_as_it_is() -> None:
    access = Access(TOKENS)
    secrets = [*TOKENS.values(), access.invite(), access.open_session(Role.EDIT)]
    kept = repr(vars(access))
    assert not [secret for secret in secrets if secret in kept]


@pytest.mark.parametrize("role", Role)
async def test_a_session_has_the_role_of_its_token(served: Served, role: Role) -> None:
    own = {"Origin": served.url}
    answer = await served.ask("POST", "/signin", None, data={"token": TOKENS[role]}, headers=own)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].partition(";")[0]
    asked = {"Cookie": cookie, **own}
    assert (await served.ask("GET", "/nodes", None, headers=asked)).status_code == 200
    changed = await served.ask("POST", "/workers/produce/restart", None, headers=asked)
    assert (changed.status_code == 200) == (role >= Role.OPERATE)
    if role >= Role.OPERATE:
        (entry, *_) = (await served.ask("GET", "/audit")).json()
        assert entry["who"] == f"session {role.name.lower()} 127.0.0.1"


async def test_a_wrong_token_opens_no_session_and_no_other_site_can_try(served: Served) -> None:
    own = {"Origin": served.url}
    assert (await served.ask("POST", "/signin", None, data={"token": "x"}, headers=own)).status_code == 401
    for headers in ({}, {"Origin": "http://evil.example"}):
        answer = await served.ask("POST", "/signin", None, data={"token": TOKENS[Role.EDIT]}, headers=headers)
        assert answer.status_code == 403


async def test_signing_out_ends_the_session(served: Served) -> None:
    asked = {"Cookie": await served.signed_in(Role.VIEW), "Origin": served.url}
    assert (await served.ask("POST", "/signout", None, headers=asked)).status_code == 204
    assert (await served.ask("GET", "/nodes", None, headers=asked)).status_code == 401


def test_sessions_of_one_role_drive_out_none_of_another() -> None:
    access = Access(TOKENS)
    editor = access.open_session(Role.EDIT)
    viewer = access.open_session(Role.VIEW)
    for _ in range(MOST_SESSIONS):
        access.open_session(Role.VIEW)
    assert access.session(editor) is Role.EDIT
    assert access.session(viewer) is None
