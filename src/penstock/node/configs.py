"""Configurations: `${ENV}` in their values, and what of them may be shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from penstock.config import mask
from penstock.control import masking
from penstock.errors import ConfigError

MASK = masking.STARS
_MASKED = re.compile(rf"(?:[:=]|=>|//|Bearer|Basic)\s*{re.escape(MASK)}|{re.escape(MASK)}@", re.I)
"""What was not shown of a text."""
SECRET = re.compile(masking.WORDS, re.IGNORECASE)
"""A key like this names something that nobody is shown."""
SHORTEST = 6
"""Characters of a secret that is looked for in other text."""
_REFERENCE = re.compile(r"\$(?:\$|\{([^}]*)(?:\}|\Z))", re.S)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Those in C, where there are any: those in Python need seconds for what a file may hold.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
"""Emoji and the like, which the dumper in C writes as \\U…."""


def expand(values: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Values with `${NAME}` replaced by environment variables, `${NAME:-text}` by a default where there is none.
    `$$` is a dollar sign.

    :raises ConfigError: a variable that is not set, something else between the braces.
    """
    environ = os.environ if environ is None else environ

    def one(found: re.Match[str]) -> str:
        if found.group(1) is None:
            return "$"
        name, default, otherwise = _reference(found)
        if name in environ:
            return environ[name]
        if not default:
            raise ConfigError(f"the environment variable {name} is not set")
        return otherwise

    if isinstance(values, str):
        return _REFERENCE.sub(one, values)
    if isinstance(values, Mapping):
        return {key: expand(value, environ) for key, value in values.items()}
    if isinstance(values, list):
        return [expand(value, environ) for value in values]
    return values


def check(values: Any) -> None:
    """:raises ConfigError: what refers to the environment, and can name no variable."""
    if isinstance(values, str):
        for found in _REFERENCE.finditer(values):
            if found.group(1) is not None:
                _reference(found)
    elif isinstance(values, Mapping):
        for value in values.values():
            check(value)
    elif isinstance(values, list):
        for value in values:
            check(value)


def _reference(found: re.Match[str]) -> tuple[str, str, str]:
    """The variable, whether there is a default, and which.

    :raises ConfigError: it names no variable, or has no end.
    """
    name, default, otherwise = found.group(1).partition(":-")
    if not _NAME.fullmatch(name) or not found.group().endswith("}"):
        raise ConfigError("what follows ${ does not name an environment variable: ${NAME}; $$ is a dollar sign")
    return name, default, otherwise


def masked(values: Any) -> Any:
    """Values fit to be shown: no secret by its name, no password in a URL. What refers to the environment stays."""
    if isinstance(values, Mapping):
        return {
            key: MASK if SECRET.search(str(key)) and not refers(value) else masked(value)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [masked(value) for value in values]
    return masking.masked(mask(values)) if isinstance(values, str) else values


def secrets(values: Any, environ: Mapping[str, str] | None = None) -> set[str]:
    """What is not shown of them, as scripts get it: what is too short to be told from other text is left out."""
    if isinstance(values, Mapping):
        return {
            secret
            for key, value in values.items()
            for secret in (_texts(value, environ) if SECRET.search(str(key)) else secrets(value, environ))
        }
    if isinstance(values, list):
        return {secret for value in values for secret in secrets(value, environ)}
    return set()


def _texts(values: Any, environ: Mapping[str, str] | None) -> set[str]:
    if isinstance(values, Mapping):
        return {text for value in values.values() for text in _texts(value, environ)}
    if isinstance(values, list):
        return {text for value in values for text in _texts(value, environ)}
    try:
        text = str(expand(values, environ))
    except ConfigError:
        return set()
    return {text} if len(text) >= SHORTEST else set()


def masked_text(text: str) -> str:
    """A configuration's YAML, with its secrets masked. Comments go, for they may hold one."""
    values = masked(yaml.load(text, Loader=_Loader))  # noqa: S506 - a safe one
    if _ASTRAL.search(text):
        return text_of(values)
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def unmasked(values: Any, old: Any) -> Any:
    """The reverse, as far as `old` has something in the same place."""
    if isinstance(values, Mapping):
        known = old if isinstance(old, Mapping) else {}
        return {key: unmasked(value, known.get(key)) for key, value in values.items()}
    if isinstance(values, list):
        others = old if isinstance(old, list) and len(old) == len(values) else [None] * len(values)
        return [unmasked(value, other) for value, other in zip(values, others, strict=True)]
    if isinstance(values, str) and old is not None and values == masked(old):
        return old
    return old if values == MASK and old is not None else values


def holds_mask(values: Any) -> bool:
    """Whether something in it stands for what was not shown."""
    if isinstance(values, Mapping):
        return any(map(holds_mask, values.values()))
    if isinstance(values, list):
        return any(map(holds_mask, values))
    return isinstance(values, str) and (values == MASK or _MASKED.search(values) is not None)


def text_of(values: Any) -> str:
    """As YAML."""
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def refers(value: Any) -> bool:
    """Whether a value says only where the secret is."""
    return isinstance(value, str) and _REFERENCE.sub("", value) == "" and ":-" not in value
