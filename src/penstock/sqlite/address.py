"""The URLs of files: `sqlite:///relative.db` or `sqlite:////absolute.db`, optionally `?vhost=namespace`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from penstock.config import mask, parse_url
from penstock.errors import ConfigError


class Address(NamedTuple):
    """A file, and the namespace in it."""

    path: str
    namespace: str


def parse_address(url: str, vhost: str | None = None) -> Address:
    """What a URL names. `vhost` overrides the URL's.

    :raises ConfigError: an unknown option, or no file that could ever be one.
    """
    parts = parse_url(url)
    options = parts.options({"vhost": str}, "sqlite")
    try:
        path = database_path(parts.path)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{mask(url)!r} names no file: {error}") from None
    if parts.host or not parts.path.strip("/"):
        raise ConfigError(f"{mask(url)!r} names no file: write sqlite:///relative.db or sqlite:////absolute/path.db")
    return Address(path, (vhost if vhost is not None else options.get("vhost", "")).strip("/"))


def database_path(path: str) -> str:
    """The file a URL's path names: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    :raises RuntimeError, ValueError: the home of nobody, a character that no file name has.
    """
    if "\0" in path:
        raise ValueError("it holds a null character")
    return str(Path(path[1:]).expanduser()) if path.startswith("/") else path
