"""Which tokens let somebody in, from the environment."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping

import msgspec

from penstock import config
from penstock.errors import ConfigError
from penstock.web.access import STRONG
from penstock.web.roles import Role

log = logging.getLogger("penstock.web")

VARIABLES = {
    Role.EDIT: "PENSTOCK_TOKEN",
    Role.OPERATE: "PENSTOCK_TOKEN_OPERATE",
    Role.VIEW: "PENSTOCK_TOKEN_VIEW",
}
SHORT = 12
"""Characters below which a token is warned of."""


class Keys(msgspec.Struct, frozen=True):
    """The tokens of a node."""

    tokens: dict[Role, str]
    made: bool
    """The one for editing is made up for this run: nobody configured one."""

    def __repr__(self) -> str:
        return f"Keys({', '.join(role.name for role in self.tokens)})"


def read(environ: Mapping[str, str] | None = None) -> Keys:
    """`PENSTOCK_TOKEN` (or `PENSTOCK_TOKEN_FILE`) for everything, `…_OPERATE` and `…_VIEW` for less. Blocks.

    :raises ConfigError: a file that cannot be read; a token that is empty, has spaces, or stands for two roles.
    """
    environ = os.environ if environ is None else environ
    found: dict[Role, str] = {}
    for role, name in VARIABLES.items():
        token = config.secret(name, environ)
        if token is None:
            continue
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{name} must be printable ASCII without spaces, and not empty")
        for other, same in found.items():
            if same == token:
                raise ConfigError(f"{name} and {VARIABLES[other]} are the same token: each role needs its own")
        if len(token) < SHORT:
            log.warning("%s has %d characters and can be guessed: better %d or more", name, len(token), STRONG)
        found[role] = token
    made = Role.EDIT not in found
    if made:
        found[Role.EDIT] = secrets.token_urlsafe(32)
    return Keys(found, made)
