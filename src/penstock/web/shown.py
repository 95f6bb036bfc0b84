"""What of people's data is shown to whom: who may edit could run code that reads it anyway, others see no secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request

from penstock.control import masking
from penstock.control.masking import STARS
from penstock.web.answers import Answer
from penstock.web.roles import Role
from penstock.web.site import caller_of, site_of

MOST_TEXT = 8 * 2**20
"""Characters of an answer that are looked at for secrets, which takes seconds. What is beyond is left out."""
EACH = 16
"""As many more for each text, however short."""
DEEPEST = 100
"""Levels below which nothing is shown."""
MAY_BE_CUT = 200
"""Characters from which on a text may have been cut before it was kept, in the middle of a secret."""
PART = 4
"""Characters of a secret that are not shown, where a text is cut there."""


async def shown(request: Request, found: Any) -> Answer:
    """An answer that holds bodies, results, tracebacks or scripts; masked for everybody below `edit`."""
    if caller_of(request.scope).role is Role.EDIT:
        return Answer(found)
    site = site_of(request)
    async with site.masking:  # one at a time: a thread of this is nearly a processor
        return await asyncio.to_thread(_masked, found, site.hidden)


def _masked(found: Any, hidden: Sequence[str]) -> Answer:
    return Answer(masking.values(_Bounds(hidden).within(msgspec.to_builtins(found)), hidden))


class _Bounds:
    """What can be looked at in bounded time, and nothing that cannot be looked at."""

    def __init__(self, hidden: Sequence[str]) -> None:
        self._hidden = [secret for secret in hidden if len(secret) > PART]
        self._left = MOST_TEXT

    def within(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            self._left -= len(value) + EACH
            return self._without_parts(value) if self._left >= 0 else STARS
        if depth > DEEPEST:
            return STARS
        if isinstance(value, dict):
            if value.keys() == {"base64"}:  # a body that is no text, or packed
                return {"base64": STARS}
            self._left -= sum(map(len, value))
            return {key: self.within(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list):
            return [self.within(one, depth + 1) for one in value]
        return value

    def _without_parts(self, text: str) -> str:
        """Text without what is left of a secret at its ends."""
        if len(text) < MAY_BE_CUT:
            return text
        for secret in self._hidden:
            text = text[_last_part(text, secret) :]
            text = text[: _first_part(text, secret)]
        return text


def _last_part(text: str, secret: str) -> int:
    """Where a text goes on that begins with the last part of a secret; 0: it does not."""
    head = text[: len(secret) - 1]
    at = head.rfind(secret[-PART:])
    while at >= 0:
        if secret.endswith(head[: at + PART]):
            return at + PART
        at = head.rfind(secret[-PART:], 0, at + PART - 1)
    return 0


def _first_part(text: str, secret: str) -> int:
    """Where a text ends, but for the first part of a secret, which was cut with it."""
    end = len(text.removesuffix("…"))
    begin = max(end - len(secret) + 1, 0)
    at = text.find(secret[:PART], begin, end)
    while at >= 0:
        if secret.startswith(text[at:end]):
            return at
        at = text.find(secret[:PART], at + 1, end)
    return len(text)
