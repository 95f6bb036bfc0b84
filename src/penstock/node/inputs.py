"""Inputs of a console: lines put together as Python's own shell does it, and what is told of one that failed."""

from __future__ import annotations

import ast
import codeop
import inspect
import os
import re
import traceback
from pathlib import Path
from types import CodeType

import penstock
from penstock.control.console import MOST_INPUT
from penstock.errors import one_line
from penstock.node import scripts

FILE = "<console>"
LONGEST_PROBLEM = 64 * 2**10  # characters
SMALL = 2048
"""Characters of an input up to which each of its lines is judged at once."""

_OWN = str(Path(penstock.__file__).parent) + os.sep
_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_CLAUSE = re.compile(r"\s|#|(?:elif|else|except|finally)\b")
"""How a line begins with which an open block may go on."""
_OPENING = re.compile(r"""\"""|'''|["']|[()\[\]{}]|#""")
_CLOSING = {quote: re.compile(rf"\\.|{quote}") for quote in ('"""', "'''", '"', "'")}


class Inputs:
    """Lines become inputs. One that has an `await` goes on until an empty line, as an open block does.

    What is open is compiled again where a line may complete it; else, once it is long, only when it has doubled.
    """

    def __init__(self) -> None:
        self.last = ""
        """The input that the latest line completed, or that is none because of it."""
        self._compile = codeop.CommandCompiler()
        self._compile.compiler.flags |= _FLAGS
        self._begin()

    @property
    def open(self) -> str:
        """The lines of an input that is not complete."""
        return "\n".join(self._lines)

    @property
    def more(self) -> bool:
        """Whether there are any."""
        return bool(self._lines)

    def add(self, line: str) -> CodeType | None:
        """One more line; the input, if that completes it.

        :raises SyntaxError, ValueError, OverflowError, MemoryError, RecursionError: it is none. It is forgotten.
        """
        line = line.rstrip("\r\n")
        empty = not line.strip()
        if empty and not self._lines:
            return None
        self._lines.append(line)
        self._length += len(line) + 1
        try:
            if "\n" in line:
                raise ValueError("a line has no line end in it")
            if self._length > MOST_INPUT + 1:
                raise ValueError(f"an input has {MOST_INPUT} characters at most")
            self._bounds.pass_over(line)
            code = self._judge(empty) if self._may_be_judged(line, empty) else None
        except BaseException:
            self.drop()
            raise
        if code is not None:
            self.drop()
        return code

    def end(self) -> CodeType | None:
        """No more lines: what is open, as it stands.

        :raises SyntaxError, ValueError, OverflowError, MemoryError, RecursionError: it is no input.
        """
        self.drop()
        return whole(self.last) if self.last else None

    def drop(self) -> None:
        """Forget what is open."""
        self.last = self.open
        self._begin()

    def _begin(self) -> None:
        self._lines: list[str] = []
        self._length = 0
        self._judged = 0
        self._bounds = _Bounds()
        self._block = self._awaits = False

    def _may_be_judged(self, line: str, empty: bool) -> bool:
        if self._length <= SMALL or self._length >= 2 * self._judged:
            return True
        if self._bounds.open:  # should that be wrong, a second empty line shows it
            return empty and not self._lines[-2].strip()
        return empty or not (self._awaits or (self._block and _CLAUSE.match(line)))

    def _judge(self, empty: bool) -> CodeType | None:
        text = self.open
        self._judged = self._length
        if not self._awaits:
            code = self._compile(text, FILE, "single")
            if code is None:
                self._block = self._block or not self._bounds.open
            if code is None or not awaits(code):
                return code
            self._awaits = True
        code = self._compile(text, FILE, "exec")  # of several statements, and none of them echoes
        return code if empty else None


class _Bounds:
    """Whether a string, a bracket or a line is open that goes on in the next one, as far as can be told at a glance."""

    def __init__(self) -> None:
        self._quote = ""
        self._depth = 0
        self._continued = False

    @property
    def open(self) -> bool:
        return bool(self._quote) or self._depth > 0 or self._continued

    def pass_over(self, line: str) -> None:
        """One more line."""
        at, self._continued = 0, False
        while True:
            if self._quote:
                parts = _CLOSING[self._quote].finditer(line, at)
                end = next((part for part in parts if part[0] == self._quote), None)
                if end is None:
                    self._continued = line.endswith("\\")
                    if len(self._quote) == 1 and not self._continued:
                        self._quote = ""  # an error, which is found where it is compiled
                    return
                at, self._quote = end.end(), ""
            found = _OPENING.search(line, at)
            if found is None:
                self._continued = line.endswith("\\")
                return
            what, at = found[0], found.end()
            if what == "#":
                return
            if what in "([{":
                self._depth += 1
            elif what in ")]}":
                self._depth -= 1
            else:
                self._quote = what


def whole(text: str) -> CodeType:
    """An input of any number of lines. Its expressions echo unless it has an `await`.

    :raises SyntaxError, ValueError, OverflowError, MemoryError, RecursionError: it is none.
    """
    tree = scripts.parse(text, FILE)
    code = _compiled(tree, "exec")
    return code if awaits(code) else _compiled(ast.Interactive(tree.body), "single")


def _compiled(tree: ast.Module | ast.Interactive, mode: str) -> CodeType:
    with scripts.one_at_a_time:  # as for `parse`
        code: CodeType = compile(tree, FILE, mode, _FLAGS, dont_inherit=True)
        return code


def awaits(code: CodeType) -> bool:
    """Whether it is a coroutine that running it makes."""
    return bool(code.co_flags & inspect.CO_COROUTINE)


def told_of(error: BaseException) -> tuple[str, str]:
    """Its traceback, and a line. For a thread: both call what the error brought along."""
    try:
        short = one_line(error)
    except BaseException as another:
        short = f"{type(error).__name__}: (it raises {type(another).__name__})"
    return problem_of(error), short


def problem_of(error: BaseException) -> str:
    """A traceback, without what is ours in it. It reads source files, and may call what the error brought along."""
    try:
        told = traceback.TracebackException.from_exception(error, compact=True)
        if isinstance(error, SyntaxError) and error.filename == FILE:
            told.stack.clear()
        _leave_ours_out(told)
        text = "".join(told.format())
    except BaseException as another:  # its own fault: what it says of itself cannot be had
        text = f"{type(error).__name__} (what it says cannot be shown: {type(another).__name__})\n"
    return text if len(text) <= LONGEST_PROBLEM else text[:LONGEST_PROBLEM] + "…\n"


def _leave_ours_out(told: traceback.TracebackException | None) -> None:
    """Also of what it was caused by, and of its parts."""
    waiting = [told]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not frame.filename.startswith(_OWN)]
        waiting += [one.__cause__, one.__context__, *(one.exceptions or () if hasattr(one, "exceptions") else ())]
