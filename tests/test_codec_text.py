"""Handlers that take text or bytes get them as they are; JSON stays JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from penstock import codec
from penstock.errors import InvalidMessage

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain; charset=utf-8"}
LATIN = {"content-type": "text/plain; charset=latin-1"}
BYTES = {"content-type": "application/octet-stream"}
NONE: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("kind", "raw", "headers", "value"),
    [
        (str, b"text", TEXT, "text"),
        (str, b'{"a": 1}', TEXT, '{"a": 1}'),
        (str, b"caf\xe9", LATIN, "caf\xe9"),
        (str, b'"text"', JSON, "text"),
        (str, b"text", NONE, "text"),
        (str, b'"text"', NONE, "text"),
        (str, b"text", BYTES, "text"),
        (bytes, b"\x00\xff", BYTES, b"\x00\xff"),
        (bytes, b"text", TEXT, b"text"),
        (bytes, b'{"a": 1}', NONE, b'{"a": 1}'),
        (bytes, b'"AP8="', JSON, b"\x00\xff"),
        (str | None, b"text", TEXT, "text"),
        (str | None, b"null", JSON, None),
        (dict[str, int] | str, b'{"a": 1}', JSON, {"a": 1}),
        (dict[str, int] | str, b"text", TEXT, "text"),
        (dict[str, int] | bytes, b'{"a": 1}', NONE, {"a": 1}),
        (dict[str, int] | bytes, b"\x00\xff", NONE, b"\x00\xff"),
        (Literal["on", "off"], b"on", TEXT, "on"),
        (Annotated[str, msgspec.Meta(max_length=4)], b"text", TEXT, "text"),
        (str, b"42", NONE, "42"),
        (str, b"true", NONE, "true"),
        (str | None, b"42", NONE, "42"),
        (bytes | None, b"1234", NONE, b"1234"),
        (Annotated[bytes, msgspec.Meta(max_length=4)], b"1234", NONE, b"1234"),
        (Literal[1, "a"], b"a", TEXT, "a"),
        (Literal["a", None], b"a", TEXT, "a"),
        (Literal[1, "a"], b"1", JSON, 1),
        (int, b"5", TEXT, 5),
        (dict[str, int], b'{"a": 1}', BYTES, {"a": 1}),
    ],
)
def test_a_body_comes_in_the_form_that_is_taken(kind: Any, raw: bytes, headers: dict[str, Any], value: Any) -> None:
    assert codec.typed(kind)(raw, headers, 1000) == value


@pytest.mark.parametrize(
    ("kind", "raw", "headers"),
    [
        (str, b"\xff", TEXT),
        (str, b"\xff", NONE),
        (str, b"5", JSON),
        (dict[str, int] | str, b"5", NONE),
        (Literal["on", "off"], b"maybe", TEXT),
        (Annotated[str, msgspec.Meta(max_length=3)], b"text", TEXT),
        (int, b"text", TEXT),
    ],
)
def test_what_does_not_fit_is_invalid(kind: Any, raw: bytes, headers: dict[str, Any]) -> None:
    with pytest.raises(InvalidMessage):
        codec.typed(kind)(raw, headers, 1000)


@pytest.mark.parametrize("kind", [str, bytes])
def test_what_was_packed_is_unpacked_first(kind: type) -> None:
    raw, headers = codec.compress(*codec.encode("text" * 20_000))
    assert headers["content-encoding"] == "gzip"
    assert codec.typed(kind)(raw, headers, 100_000) in ("text" * 20_000, b"text" * 20_000)
