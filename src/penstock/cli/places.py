"""Where a node is, as its URL says it."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from penstock.config import mask, unquoted
from penstock.control import tokens
from penstock.errors import ConfigError

VARIABLE = "PENSTOCK_TOKEN"
EXAMPLE = f"http://127.0.0.1:{tokens.DEFAULT_PORT}"


class Place(NamedTuple):
    """A node's URL in parts."""

    secure: bool
    """Whether it is HTTPS."""
    host: str
    port: int
    prefix: str
    """What its paths begin with."""


def place_of(url: str) -> Place:
    """:raises ConfigError: a URL that no node can have."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{mask(url)!r} is no URL: {unquoted(error)}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{mask(url)!r} is no URL of a node: write it as {EXAMPLE}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"{mask(url)!r}: a node's URL is scheme, host and port; the token goes into {VARIABLE}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is no URL: it holds what has to be written as %…")
    secure = parts.scheme == "https"
    return Place(secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"))
