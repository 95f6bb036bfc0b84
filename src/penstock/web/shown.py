"""What of people's data is shown to whom: who may edit could run code that reads it anyway, others see no secrets."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request

from penstock.control import masking
from penstock.web.answers import Answer
from penstock.web.roles import Role
from penstock.web.site import caller_of, site_of


def shown(request: Request, found: Any) -> Answer:
    """An answer that holds bodies, results or tracebacks; masked for everybody below `edit`."""
    if caller_of(request.scope).role is Role.EDIT:
        return Answer(found)
    return Answer(masking.values(msgspec.to_builtins(found), site_of(request).hidden))
