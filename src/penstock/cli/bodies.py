"""What commands send: JSON as an argument or from stdin, headers, times."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer

from penstock.cli.command import UsageError
from penstock.client.client import MAX_BODY
from penstock.client.publishing import check_text
from penstock.clock import is_seconds
from penstock.errors import BodyTooLarge, InvalidMessage

Priority = Annotated[int, typer.Option(min=0, max=255, help="Higher goes first.")]
Headers = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; repeatable.")]
Body = Annotated[
    str | None, typer.Argument(metavar="JSON|-", help="What it gets; `-` reads it from stdin; none is null.")
]

NEVER = "never"


def headers(given: Sequence[str] | None) -> dict[str, str]:
    """:raises UsageError: not NAME=VALUE."""
    return dict(_pair(one) for one in given or ())


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UsageError(f"--header {text}: write NAME=VALUE")
    return name, value


def one(body: str | None) -> Any:
    """The one body that a command sends: its argument, or `-`, all of stdin.

    :raises UsageError: an argument that is not JSON; stdin is closed.
    :raises InvalidMessage: stdin is not JSON.
    :raises BodyTooLarge: as it says.
    """
    if body != "-":
        return argument(body)
    require_stdin("text")
    try:
        return parse(sys.stdin.buffer.read(MAX_BODY + 1).strip())
    except InvalidMessage as error:
        raise InvalidMessage(f"stdin is {error}") from None


def argument(body: str | None) -> Any:
    """:raises UsageError: it is not JSON."""
    if body is None:
        return None
    try:
        return parse(body.encode(errors="surrogateescape"))
    except InvalidMessage as error:
        raise UsageError(f"the body is {error}; text is written '\"…\"', in both quotes") from None


def parse(text: bytes) -> msgspec.Raw:
    """JSON as it stands, found to be right.

    :raises InvalidMessage: it is not.
    :raises BodyTooLarge: as it says.
    """
    if len(text) > MAX_BODY:
        raise BodyTooLarge(len(text), MAX_BODY)
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        why = str(error).removeprefix("JSON is malformed: ")
        raise InvalidMessage(f"not JSON: {why}") from None
    except UnicodeDecodeError:
        raise InvalidMessage("not JSON: not UTF-8") from None
    except RecursionError:
        raise InvalidMessage("not JSON that can be read: nested too deeply") from None
    return msgspec.Raw(text)


def require_stdin(what: str) -> None:
    """:raises UsageError: stdin is closed."""
    if sys.stdin is None:
        verb = "are" if what.endswith("s") else "is"
        raise UsageError(f"stdin is closed: there {verb} no {what} to read")


def expiry(text: str) -> float | None:
    """The value of `--expires`: seconds, or None for `never`.

    :raises UsageError: neither.
    """
    if text == NEVER:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not is_seconds(seconds):
        raise UsageError(f"--expires {text}: write a number of seconds, or {NEVER}")
    return seconds


def name(value: str) -> str:
    """The callback of an argument that names what something is sent to.

    :raises BadParameter: nothing can have that name.
    """
    if not value:
        raise typer.BadParameter("it is empty")
    try:
        check_text("a name", value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def seconds(value: float | None) -> float | None:
    """The callback of an option in seconds: `inf` and `nan` are numbers to the parser.

    :raises BadParameter: it cannot be waited for.
    """
    if value is not None and not is_seconds(value):
        raise typer.BadParameter(f"{value:g} is not a number of seconds that can be waited for")
    return value
