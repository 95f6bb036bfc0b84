"""A chart in the terminal: CPU as bars, memory as a line, and what happened below them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from statistics import fmean

from rich.text import Text

HEIGHT = 10  # rows
MARGIN = 6

Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """Something that happened, from one Unix time to another (the same: at once)."""

    sign: str
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class Glyphs:
    bars: str
    line: str
    span: str


FULL = Glyphs(" ▁▂▃▄▅▆▇█", "─", "▒")
ASCII = Glyphs(" .#", "-", "=")


def draw(cpu: Series, memory: Series, marks: list[Mark], width: int, glyphs: Glyphs = FULL) -> Text:
    """`width` columns in all. Both series are percentages and not empty."""
    columns = max(width - MARGIN - 1, 10)
    start = min(cpu[0][0], memory[0][0])
    end = max(cpu[-1][0], memory[-1][0])

    def column(at: float) -> int:
        return min(max(int((at - start) / max(end - start, 0.001) * columns), 0), columns - 1)

    bars, line = ([_mean(series, n, column) for n in range(columns)] for series in (cpu, memory))
    highest = max(value for value in (*bars, *line) if value is not None)
    scale = max(-(-highest // 10) * 10, 10)  # the next full ten
    chart = Text()
    for row in reversed(range(HEIGHT)):
        top = (row + 1) * scale / HEIGHT
        chart.append(f"{top:3.0f} % " if row + 1 in (HEIGHT // 2, HEIGHT) else " " * MARGIN, "dim")
        cells = [_cell(bar, level, row, scale, glyphs) for bar, level in zip(bars, line, strict=True)]
        for style, run in groupby(cells, key=itemgetter(1)):
            chart.append("".join(glyph for glyph, _ in run), style)
        chart.append("\n")
    chart.append(" " * MARGIN + _below(marks, column, columns, glyphs) + "\n", "bold red")
    seconds = f"{end - start:.0f} s"
    chart.append(f"{'0 s':>{MARGIN + 3}}{seconds:>{columns - 3}}\n", "dim")
    chart.append(" " * MARGIN)
    chart.append(f"{glyphs.bars[-1]} CPU  ", "cyan")
    chart.append(f"{glyphs.line} memory  ", "magenta")
    chart.append(
        "  ".join(f"{glyphs.span if mark.end > mark.start else mark.sign} {mark.what}" for mark in marks), "red"
    )
    return chart


def _mean(series: Series, number: int, column: Callable[[float], int]) -> float | None:
    values = [value for at, value in series if column(at) == number]
    return fmean(values) if values else None


def _cell(bar: float | None, level: float | None, row: int, scale: float, glyphs: Glyphs) -> tuple[str, str]:
    """A glyph and its colour: the line lies over the bars."""
    if level is not None and min(int(level * HEIGHT / scale), HEIGHT - 1) == row:
        return glyphs.line, "magenta"
    return _slice((bar or 0.0) * HEIGHT / scale - row, glyphs), "cyan"


def _slice(filled: float, glyphs: Glyphs) -> str:
    """How much of a row a bar fills: 1 or more is all."""
    steps = len(glyphs.bars) - 1
    return glyphs.bars[min(max(round(filled * steps), 0), steps)]


def _below(marks: list[Mark], column: Callable[[float], int], columns: int, glyphs: Glyphs) -> str:
    cells = [" "] * columns
    for mark in marks:
        first, last = column(mark.start), column(mark.end)
        for at in range(first, last + 1):
            cells[at] = glyphs.span if mark.end > mark.start else mark.sign
    return "".join(cells).rstrip()
