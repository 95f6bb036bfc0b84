"""Signing in with a browser: by a link that works once, or with a token; a cookie keeps it."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from penstock.web.access import SESSION_LIVES, Caller
from penstock.web.answers import Refused
from penstock.web.bodies import read_text
from penstock.web.gate import cookie_of, try_token
from penstock.web.roles import SIGN_IN, SIGN_OUT, Role
from penstock.web.site import site_of
from penstock.web.trail import Deed, note

router = APIRouter(include_in_schema=False)

MOST_FORM = 8192  # characters

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Penstock</title>{head}</head><body>{body}</body></html>
"""
# A page, not a redirect: a browser that comes from another site would follow that without its new cookie.
_IN = _PAGE.format(head='<meta http-equiv="refresh" content="0;url=/">', body='<p><a href="/">Signed in</a></p>')
_FORM = _PAGE.format(
    head="",
    body='<form method="post" action="/signin"><label>Token <input type="password" name="token" required '
    'autocomplete="current-password"></label> <button>Sign in</button></form>',
)


@router.get(SIGN_IN)
async def by_link(request: Request, code: str | None = None) -> Response:
    """Use a sign-in link up; without one, the form."""
    if code is None:
        return HTMLResponse(_FORM)
    if "prefetch" in request.headers.get("sec-purpose", ""):
        raise Refused(503, "a link that works once is not fetched ahead")
    role = site_of(request).access.redeem(code)
    if role is None:
        raise Refused(401, "this link was used already, or is too old: sign in with the token at /signin")
    return await _let_in(request, role, "a link")


@router.post(SIGN_IN)
async def by_token(request: Request) -> Response:
    """Sign in with a token, from the form."""
    text = await read_text(request)
    try:
        fields = parse_qs(text[:MOST_FORM], max_num_fields=10)
    except ValueError as error:
        raise Refused(422, str(error)) from None
    given = fields.get("token", [""])[0].strip()
    if not given:
        raise Refused(422, "there is no token")
    address = request.client.host if request.client else ""
    role = try_token(site_of(request).access, given, address)
    if role is None:
        raise Refused(401, "wrong token")
    return await _let_in(request, role, "a token")


@router.post(SIGN_OUT)
async def sign_out(request: Request) -> Response:
    """End the session."""
    site = site_of(request)
    secret = cookie_of(request.headers.get("cookie", ""), site.cookie)
    if secret is not None:
        site.access.close_session(secret)
    answer = Response(status_code=204)
    answer.delete_cookie(site.cookie, path="/", httponly=True, samesite="strict")
    return answer


async def _let_in(request: Request, role: Role, how: str) -> Response:
    site = site_of(request)
    address = request.client.host if request.client else ""
    caller = Caller(role, "session", address)
    await note(site, str(caller), Deed("session.begin", "", f"by {how}"))
    answer = HTMLResponse(_IN)
    answer.set_cookie(
        site.cookie,
        site.access.open_session(role),
        max_age=int(SESSION_LIVES),
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https" or request.headers.get("origin", "").lower().startswith("https://"),
    )
    return answer
