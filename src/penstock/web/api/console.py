"""`WS /console`: what `penstock.control.console` says, in text frames."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from penstock.control.console import Asked
from penstock.errors import one_line
from penstock.node.console import NOT_ALLOWED, Session, TooManySessions
from penstock.web import answers
from penstock.web.answers import Refused
from penstock.web.gate import cookie_of
from penstock.web.site import Site, caller_of, site_of
from penstock.web.trail import Deed, note

log = logging.getLogger("penstock.web")

router = APIRouter()

CLOSE_WITHIN = 2.0  # seconds that a shell may be slow to take the last words
LOOK = 2.0  # seconds between looks whether somebody is still signed in
MOST_REASON = 120  # bytes of a reason

_decoder = msgspec.json.Decoder(Asked)


@router.websocket("/console")
async def console(websocket: WebSocket) -> None:
    """A console of the live node."""
    site = site_of(websocket)
    caller, desk = str(caller_of(websocket.scope)), site.desk
    opened = Deed("console.open", desk.name)
    if desk.console is None:
        await note(site, caller, opened, "refused: it is off")
        raise Refused(403, "the console of this node is off: `penstock serve --console` has one")

    async def record(text: str, outcome: str) -> None:
        await note(site, caller, Deed("console.input", desk.name, text), outcome)

    try:
        async with desk.console.session(caller, record, lambda: _signed_in(site, websocket)) as session:
            await note(site, caller, opened)
            await websocket.accept()
            await _talk(websocket, session)
    except TooManySessions as many:
        await note(site, caller, opened, str(many))
        raise Refused(503, str(many), {"Retry-After": "1"}) from None


async def _talk(websocket: WebSocket, session: Session) -> None:
    """Until one of the two has gone."""
    hearing = asyncio.create_task(_hear(websocket, session), name="penstock-console hearing")
    telling = asyncio.create_task(_tell(websocket, session), name="penstock-console telling")
    looking = asyncio.create_task(_look(session), name="penstock-console looking")
    all_of_it = {hearing, telling, looking}
    try:
        await asyncio.wait(all_of_it, return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            await asyncio.wait((telling,), timeout=CLOSE_WITHIN)  # a shell that does not read keeps nothing open
        if telling.done() or looking.done():  # the session is over; else the shell has gone
            code, reason = session.closing
            reason = reason.encode()[:MOST_REASON].decode(errors="ignore")
            async with asyncio.timeout(CLOSE_WITHIN):
                await websocket.close(code, reason)
                await hearing
    except (TimeoutError, WebSocketDisconnect, RuntimeError) as error:  # it has gone without a word
        log.debug("a console ended: %s", one_line(error))
    finally:
        for task in all_of_it:
            task.cancel()
        await asyncio.gather(*all_of_it, return_exceptions=True)


async def _hear(websocket: WebSocket, session: Session) -> None:
    """All that the shell asks, as it comes: also while an input runs, or nobody could interrupt that."""
    while True:
        message: dict[str, Any] = dict(await websocket.receive())
        if message["type"] == "websocket.disconnect":
            return
        data = message.get("text")
        try:
            session.hear(_decoder.decode(data if data is not None else b""))
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            session.close(NOT_ALLOWED, f"not what a shell says: {one_line(error)}")


async def _look(session: Session) -> None:
    """So that it ends also while an input runs, or nobody types."""
    while True:
        if not session.look():
            return
        await asyncio.sleep(LOOK)


def _signed_in(site: Site, websocket: WebSocket) -> bool:
    """Whether what let somebody in still would: a token does as long as the node runs."""
    caller = caller_of(websocket.scope)
    if caller.by != "session":
        return True
    secret = cookie_of("; ".join(websocket.headers.getlist("cookie")), site.cookie)
    return secret is not None and site.access.session(secret) is caller.role


async def _tell(websocket: WebSocket, session: Session) -> None:
    while (message := await session.told()) is not None:
        await websocket.send_text(answers.encode(message).decode())
