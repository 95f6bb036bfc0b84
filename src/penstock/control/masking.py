"""What must not be read, taken out of text that is shown or kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.errors import printable

STARS = "***"
LOOKED_AT = 16_384
"""Characters of a text that are looked at; what is beyond them is left out."""

WORDS = (
    r"passw|passphrase|pass(?![a-z])|pwd|secret|token|credential|private|api[_-]?key|access[_-]?key"
    r"|auth(?!or(?!i[sz]))|cookie|salt|signature"
)
"""What is named so is a secret; a regular expression, whatever the case."""
_SECRET = re.compile(WORDS, re.I)
_BLOCK = r"[|>][+-]?\d?[ \t]*\n(?:[ \t]+[^\n]*\n?)*"  # YAML's several lines
_ESCAPES = r"\\{0,7}"  # before a quotation mark: of JSON within JSON, thrice
_QUOTED = (
    r"\"(?:[^\"\\]|\\[\s\S])*\"?"
    r"|'(?:[^'\\]|\\[\s\S]|'')*(?:'[^\s,;&)\]}]*)?"  # in YAML, \' is an end: the next ' began another
    r"|(?P<escapes>\\{1,7})\"(?:(?!(?<!\\)(?P=escapes)\")(?:\\{1,15}\"|[^\"]))*(?:\\{1,7}\")?"
)

# All repetitions that could be tried from each character of a long text are bounded.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)", re.S), STARS),
    (re.compile(r"(://[^\s:/@]{0,200}:)\S{1,1000}@"), rf"\1{STARS}@"),
    (re.compile(r"\b((?:nats|tls)://)[^\s:/?@]{1,200}@", re.I), rf"\1{STARS}@"),
    (re.compile(r"\b(Bearer|Basic)[ \t]{1,5}[^\s\"',;]+", re.I), rf"\1 {STARS}"),
    (re.compile(r"\b(?:xox[a-z]|xapp)-[\w-]+"), STARS),
    (
        re.compile(
            rf"((?:{WORDS})[\w-]{{0,40}}{_ESCAPES}(?:[\"']?\s{{0,5}}:[ \t]{{1,5}}|[\"']:)|(?:passw(?:or)?d|secret):)"
            rf"(?:{_BLOCK}|{_QUOTED}|[^\n,}}]+)",
            re.I,
        ),
        rf"\1{STARS}",
    ),
    (
        re.compile(
            rf"((?:{WORDS})[\w-]{{0,40}}{_ESCAPES}[\"']?[ \t]{{0,5}}=>?[ \t]{{0,5}})(?:{_QUOTED}|[^\s&,;]+)", re.I
        ),
        rf"\1{STARS}",
    ),
)


def masked(text: str) -> str:
    """Text without the passwords of URLs, the tokens of headers, and the values of what is named like a secret.

    A guess: it takes out too much rather than too little.
    """
    if len(text) > LOOKED_AT:  # the last word may be a secret cut in two
        text = text[:LOOKED_AT].rpartition(" ")[0]
    for pattern, stars in _RULES:
        text = pattern.sub(stars, text)
    return text


def values(value: Any, hidden: Sequence[str] = ()) -> Any:
    """What JSON can say, in which no text and no value of a key that is named like a secret shows one, and nothing
    that is `hidden`."""
    if isinstance(value, Mapping):
        return {
            key: STARS if value and _SECRET.search(str(key)) else values(value, hidden) for key, value in value.items()
        }
    if isinstance(value, list):
        return [values(one, hidden) for one in value]
    if not isinstance(value, str):
        return value
    for secret in hidden:
        value = value.replace(secret, STARS)
    return masked(value)


def line(text: str, length: int) -> str:
    """The same on one line of at most so many characters, fit to be stored."""
    told = printable(" ".join(masked(text).split()))
    return told if len(told) <= length else told[: length - 1] + "…"
