"""Who may do what: view ≠ operate ≠ edit, told by method and path before anything is read."""

from __future__ import annotations

import enum

SIGN_IN = "/signin"
SIGN_OUT = "/signout"
PROBES = frozenset({"/livez", "/readyz", "/metrics"})
"""Open to everybody, for reading."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

_OPERATED = ("/tasks", "/transactions", "/workers", "/queues")


class Role(enum.IntEnum):
    """A larger one may do what a smaller one may."""

    VIEW = 1
    OPERATE = 2
    EDIT = 3
    """Also definitions, which are code."""


def required(method: str, path: str) -> Role | None:
    """The role that a request asks for; None: it is open. `WEBSOCKET` is a method here.

    What is not known here asks for the most.
    """
    if path in PROBES and method in ("GET", "HEAD"):
        return None
    if path == SIGN_IN and method in ("GET", "POST"):
        return None
    if method in SAFE or path == SIGN_OUT:
        return Role.VIEW
    if method != "WEBSOCKET" and any(path == one or path.startswith(f"{one}/") for one in _OPERATED):
        return Role.OPERATE
    return Role.EDIT
