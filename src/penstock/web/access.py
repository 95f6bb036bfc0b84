"""Tokens, sign-in codes and sessions: kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections import OrderedDict
from collections.abc import Mapping

import msgspec

from penstock.clock import SYSTEM_CLOCK, Clock
from penstock.web.roles import Role

STRONG = 32
"""Characters from which on a token cannot be guessed, and wrong ones from the same address do it no harm."""
FAILURES = 20
"""Wrong tokens from an address within `WINDOW`, from which on it is heard no more until that is over."""
WINDOW = 60.0  # seconds
CODE_LIVES = 15 * 60.0  # seconds
SESSION_LIVES = 12 * 3600.0  # seconds
MOST_CODES, MOST_SESSIONS, MOST_ADDRESSES = 100, 1000, 10_000


class Caller(msgspec.Struct, frozen=True):
    """Who makes a request."""

    role: Role
    by: str
    """`token` or `session`."""
    address: str

    def __str__(self) -> str:
        return f"{self.by} {self.role.name.lower()} {self.address}"


class Granted(msgspec.Struct, frozen=True):
    """A role, until a moment of the monotonic clock."""

    role: Role
    until: float


class Access:
    """What lets somebody in. For one event loop; codes and sessions live as long as this process."""

    def __init__(self, tokens: Mapping[Role, str], clock: Clock = SYSTEM_CLOCK) -> None:
        self._tokens = [(_hash(token), role, len(token) >= STRONG) for role, token in tokens.items()]
        self._codes: OrderedDict[bytes, Granted] = OrderedDict()
        self._sessions: OrderedDict[bytes, Granted] = OrderedDict()
        self._clock = clock
        self.failures = Failures(clock)

    def role_of(self, token: str, *, strong: bool = False) -> Role | None:
        """The role a token gives; None: it is none of ours. `strong`: only one that cannot be guessed counts."""
        given, found = _hash(token), None
        for digest, role, is_strong in self._tokens:  # each of them, so that the time tells nothing
            if hmac.compare_digest(digest, given) and (is_strong or not strong):
                found = role
        return found

    def invite(self, role: Role = Role.EDIT) -> str:
        """A code that lets one browser in, once, within a quarter of an hour."""
        return self._grant(self._codes, role, CODE_LIVES, MOST_CODES)

    def redeem(self, code: str) -> Role | None:
        """The role of a code, which is used up with that; None: unknown, used or too old."""
        granted = self._codes.pop(_hash(code), None)
        return granted.role if granted is not None and granted.until > self._clock.monotonic() else None

    def open_session(self, role: Role) -> str:
        """A new session's secret."""
        return self._grant(self._sessions, role, SESSION_LIVES, MOST_SESSIONS)

    def session(self, secret: str) -> Role | None:
        """The role of a session; None: there is none, or it is over."""
        granted = self._sessions.get(_hash(secret))
        return granted.role if granted is not None and granted.until > self._clock.monotonic() else None

    def close_session(self, secret: str) -> None:
        self._sessions.pop(_hash(secret), None)

    def _grant(self, kept: OrderedDict[bytes, Granted], role: Role, lives: float, most: int) -> str:
        secret = secrets.token_urlsafe(32)
        kept[_hash(secret)] = Granted(role, self._clock.monotonic() + lives)
        alike = [digest for digest, granted in kept.items() if granted.role is role]
        if len(alike) > most:  # of each role by itself: nobody drives out who may do more
            del kept[alike[0]]
        return secret


class Failures:
    """How often each address was wrong of late."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, address: str) -> None:
        """It was wrong."""
        key, now = network(address), self._clock.monotonic()
        began, times = self._seen.pop(key, (now, 0))
        self._seen[key] = (now, 1) if now - began >= WINDOW else (began, times + 1)
        while len(self._seen) > MOST_ADDRESSES:
            self._seen.popitem(last=False)

    def wait(self, address: str) -> float:
        """Seconds for which it is not heard; 0: it is."""
        if not self._seen:
            return 0.0
        began, times = self._seen.get(network(address), (0.0, 0))
        return max(began + WINDOW - self._clock.monotonic(), 0.0) if times >= FAILURES else 0.0


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def network(address: str) -> str:
    """Whoever has an IPv6 address has 2^64 of them; but one of IPv4 that is written as such is one."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
