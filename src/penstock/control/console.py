"""What a console and a shell say to one another, over `WS /console`: JSON in text frames, one object each.

A shell says `line`, `run`, `end` and `interrupt`. A console begins with `hello` and `prompt`, and answers each of the
first three, in order, with what the input printed and a `prompt`: with `more`, if it waits for another line of it.
`output` and `shown` may come at any time. What a side does not know is for it to refuse.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MOST_INPUT = 2**20
"""Characters of an input, and of what was sent and is not looked at yet; a frame of the socket holds no more bytes."""

Outcome = Literal["none", "ok", "failed", "interrupted"]
"""Of the input that has just ended; `none`: there was none."""


class Line(msgspec.Struct, tag_field="type", tag="line", frozen=True, forbid_unknown_fields=True):
    """A line, as it is typed. Python's own rules say when an input is complete; one with `await` ends with an
    empty line."""

    text: str


class Run(msgspec.Struct, tag_field="type", tag="run", frozen=True, forbid_unknown_fields=True):
    """A whole input of any number of lines, in place of what is open."""

    code: str


class End(msgspec.Struct, tag_field="type", tag="end", frozen=True, forbid_unknown_fields=True):
    """No more lines: what is open is run as it stands."""


class Interrupt(msgspec.Struct, tag_field="type", tag="interrupt", frozen=True, forbid_unknown_fields=True):
    """Cancel what runs, and forget what is open and what was sent ahead."""


Asked = Line | Run | End | Interrupt


class Hello(msgspec.Struct, tag_field="type", tag="hello", frozen=True):
    """Whose console it is."""

    node: str
    version: str


class Prompt(msgspec.Struct, tag_field="type", tag="prompt", frozen=True):
    """It waits for a line."""

    more: bool = False
    """Of an input that is not complete."""
    outcome: Outcome = "none"


class Output(msgspec.Struct, tag_field="type", tag="output", frozen=True):
    """What was printed: any piece of text, line ends included."""

    text: str


class Problem(msgspec.Struct, tag_field="type", tag="problem", frozen=True):
    """Why an input failed: a traceback, line ends included."""

    text: str


class Shown(msgspec.Struct, tag_field="type", tag="shown", frozen=True):
    """A value from the debug channel, without a line end."""

    node: str
    text: str


class Left(msgspec.Struct, tag_field="type", tag="left", frozen=True):
    """The input ended the session; the connection is closed next."""

    status: int
    """As of a process that ended so."""


Told = Hello | Prompt | Output | Problem | Shown | Left
