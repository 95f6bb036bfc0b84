"""Which names a node answers to, so that no page of another site can have a browser speak to it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from penstock.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HOST = re.compile(r"(?:\[([0-9a-f]*:[0-9a-f:.]*)\]|([a-z0-9._-]+))(?::([0-9]{1,5}))?", re.I)


class Hosts:
    """Those in the `Host` header, and those a page may come from."""

    def __init__(self, names: Iterable[str] = (), *, any_address: bool = False) -> None:
        """`any_address`: any IP address is one of ours, as where all of a machine's are listened on. A page
        of another site comes from a name, so that costs nothing."""
        self._names = frozenset(_plain(name) for name in (*LOOPBACK, *names))
        self._any_address = any_address

    def allows(self, host: str) -> bool:
        """Whether a `Host` header names us."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _plain(match[1] or match[2])
        return name in self._names or (self._any_address and is_address(name))

    def same_origin(self, origin: str, host: str, scheme: str) -> bool:
        """Whether an `Origin` header is that of our own pages: same host and port, same scheme, or https where a
        proxy speaks that for us."""
        return self.allows(host) and origin.lower() in (f"{scheme}://{host.lower()}", f"https://{host.lower()}")


def check_name(name: str) -> str:
    """A name as it may be in a `Host` header, without a port.

    :raises ConfigError: it can be none.
    """
    match = _HOST.fullmatch(name if ":" not in name or name.startswith("[") else f"[{name}]")
    if match is None or match[3] is not None or (match[1] is not None and not is_address(match[1])):
        raise ConfigError(f"{name!r} is no name of a host: write it without scheme and port, and each one in full")
    return name


def is_address(name: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    return name.lower().strip("[]").rstrip(".")
