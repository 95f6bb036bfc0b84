"""What a key may be; and which keys begin with a prefix, said as a range that an ordered index can look up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_LAST = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)  # no text that can be encoded holds one


class KeyRange(NamedTuple):
    """The keys from `low` on, and below `high`; None: to the end."""

    low: str
    high: str | None


def end_of(prefix: str) -> str | None:
    """The first text, by code point, behind all that begin with `prefix`; None: there is none."""
    kept = prefix.rstrip(chr(_LAST))
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    if following in _SURROGATES:
        following = _SURROGATES.stop
    return kept[:-1] + chr(following)


def key_range(prefix: str, after: str | None, newest_first: bool) -> KeyRange:
    """The keys that begin with `prefix` and are beyond `after`: above it, or below it if `newest_first`."""
    high = end_of(prefix)
    if after is None:
        return KeyRange(prefix, high)
    if newest_first:
        return KeyRange(prefix, after if high is None else min(high, after))
    return KeyRange(max(prefix, after + "\0"), high)  # nothing lies between a text and itself with a null character


def check_keys(keys: Iterable[str]) -> None:
    """:raises ValueError: one that not every store could keep."""
    for key in keys:
        if "\0" in key:
            raise ValueError(f"key {key!r} holds a null character")
        if not key.isascii():
            key.encode()  # a lone surrogate has no encoding
