"""The trail of changes: each request that changes something is in the audit, also one that failed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from penstock.errors import BrokerError, one_line
from penstock.web.answers import Refused
from penstock.web.site import Site, caller_of, site_of

log = logging.getLogger("penstock.web")


class Deed(msgspec.Struct):
    """What is being done; whoever does it says more as it comes to be known."""

    what: str
    target: str
    detail: str = ""


@asynccontextmanager
async def audited(request: Request, what: str, target: str) -> AsyncIterator[Deed]:
    """Do something, and write down that it was done, or why not. `what`: `worker.restart`, say."""
    deed = Deed(what, target)
    outcome = "ok"
    try:
        yield deed
    except BaseException as error:
        outcome = error.detail if isinstance(error, Refused) else one_line(error)
        raise
    finally:
        await note(site_of(request), str(caller_of(request.scope)), deed, outcome)


async def note(site: Site, who: str, deed: Deed, outcome: str = "ok") -> None:
    """Write down what was done. Where the store is away that is only logged: what was done stays done."""
    try:
        await site.audit.write(who, deed.what, deed.target, deed.detail, outcome)
    except BrokerError as error:
        log.warning("not in the audit: %s %s by %s: %s", deed.what, deed.target, who, one_line(error))
