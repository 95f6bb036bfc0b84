"""What a command prints: results on stdout, everything about them on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

Advance = Callable[[int, int], None]
"""Called with how far it has come (in the unit of the total) and how many messages that were."""


def complain(text: str) -> None:
    """An error, on one line of stderr."""
    print(f"error: {clean(' '.join(text.split()))}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Something to know beside the result, on stderr."""
    print(clean(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON value on stdout, indented."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def clean(text: str, *, lines: bool = False) -> str:
    """Text without what could steer a terminal; other people's messages are shown through this.

    `lines`: line breaks and tabs may stay.
    """
    kept = "\n\t" if lines else ""
    return "".join(one if one.isprintable() or one in kept else repr(one)[1:-1] for one in text)


def print_facts(facts: Iterable[tuple[str, object]], width: int) -> None:
    """What is known of one thing, each after its name, which takes `width` characters; `-` for what there is not."""
    for name, value in facts:
        print(f"{name + ':':<{width}}{clean(str(value or '-'))}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout: for a terminal as wide as that, else in full, whatever its width."""
    rows = [[clean(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(headers, rows, right)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(headers):
        last = index == len(headers) - 1
        table.add_column(
            header,
            justify="right" if index in right else "left",
            no_wrap=True,
            overflow="ellipsis" if last else "fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A progress bar on stderr where that is a terminal, else nothing. `total` None: not known."""
    if not sys.stderr.isatty():
        yield lambda at, count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]:,}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, count=0)
        yield lambda at, count: bar.update(task, completed=at, count=count)


def seconds(value: float | None) -> str:
    """A duration as people say it."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.0f}s"
    minutes, rest = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def moment(time: str) -> str:
    """An ISO 8601 time without what nobody reads in a list."""
    return time[:19].replace("T", " ")


def number(value: int | None) -> str:
    """A count, or `?` where the system cannot say."""
    return "?" if value is None else str(value)
