"""Rows of figures against their targets."""

from __future__ import annotations

import statistics


class Report:
    """Prints rows as they come; remembers whether one missed its target."""

    def __init__(self) -> None:
        self.missed = False

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def row(self, what: str, figure: str, target: str, met: bool) -> None:
        self.missed |= not met
        print(f"{what:<46} {figure:>44}   {'ok  ' if met else 'MISS'} {target}", flush=True)

    def ratio(self, what: str, pairs: list[tuple[float, float]], least: float) -> None:
        """The median of ours against the yardstick, round by round."""
        ratio = statistics.median(ours / yardstick for ours, yardstick in pairs)
        ours, yardstick = (statistics.median(column) for column in zip(*pairs, strict=True))
        figure = f"{ours:,.0f}/s of {yardstick:,.0f}/s raw = {ratio:.2f}"
        self.row(what, figure, f">= {least:.2f} of raw", ratio >= least)
