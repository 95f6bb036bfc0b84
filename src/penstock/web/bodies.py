"""Reading what was sent: in time, not too much, and of its type."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from penstock.web.answers import Refused

T = TypeVar("T")

WITHIN = 30.0
"""Seconds that a body may take to arrive."""


async def read(request: Request) -> bytes:
    """A body, whole; the gate counts its bytes.

    :raises Refused: too large, or too slow.
    """
    try:
        async with asyncio.timeout(WITHIN):
            return await request.body()
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {WITHIN:g} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the body ended early") from None


async def read_json(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    """A body of JSON; without one, an empty object.

    :raises Refused: not JSON, or not of that type.
    """
    body = await read(request)
    try:
        return decoder.decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Refused(422, f"the body: {error}") from None
    except RecursionError:
        raise Refused(422, "the body: it is nested too deeply") from None


async def read_text(request: Request) -> str:
    """A body of text.

    :raises Refused: not UTF-8.
    """
    try:
        return (await read(request)).decode()
    except UnicodeDecodeError as error:
        raise Refused(422, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
