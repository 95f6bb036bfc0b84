"""What the demo claims, each claim held against what the processes wrote down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Kill:
    """A consumer killed, and what it was doing."""

    pid: int
    point: str
    """The last that it wrote down: `started` (not inserted yet), `stored` (not acknowledged yet), or what it was
    that was no middle of a batch."""
    batch: tuple[str, ...]
    at: float
    """Unix seconds."""


@dataclass(frozen=True)
class Evidence:
    """Collected after the last process has ended. Messages are told by their ids."""

    published: list[str]
    """Confirmed by the broker, by the sources' own ledger."""
    stored: list[tuple[str, int]]
    """Id and attempt of each row of the database."""
    seen: list[str]
    """By the alerts route, as often as it has seen them."""
    kills: list[Kill]
    prefetch: int
    refused: list[tuple[str, int]]
    """Id and attempt, each time the database was away."""
    refusals: int
    """Times `Unavailable` was raised."""
    dead: int | None
    """Dead letters; None: the message system cannot say."""
    left: int | None
    """Messages still in the queues; None: the message system cannot say."""


@dataclass(frozen=True)
class Claim:
    what: str
    found: str
    claimed: str
    holds: bool | None
    """None: it cannot be known here."""


def judge(evidence: Evidence) -> list[Claim]:
    """Every claim, true or not."""
    published = set(evidence.published)
    rows = Counter(id for id, _ in evidence.stored if id in published)
    seen = Counter(id for id in evidence.seen if id in published)
    lost = len(published) - len(rows)
    bound = len(evidence.kills) * evidence.prefetch
    committed = {id for kill in evidence.kills if kill.point == "stored" for id in kill.batch}
    twice = rows.total() - len(rows)
    seen_twice = seen.total() - len(seen)
    middle = {kill.point for kill in evidence.kills} & {"started", "stored"}
    counted = _attempts_counted(evidence)
    return [
        Claim("readings published", f"{len(published)}", "confirmed by the broker", len(published) > 0),
        Claim("readings stored", f"{len(rows)}", f"{len(published)}", len(rows) == len(published)),
        Claim("lost", f"{lost}", "0", lost == 0),
        Claim("seen by alerts", f"{len(seen)}", f"{len(published)}", len(seen) == len(published)),
        Claim("killed in mid-batch", f"{len(middle)}", "2: before, after storing", len(middle) == 2),
        Claim("stored twice", f"{twice}", f"{len(committed)} to {bound} in flight", len(committed) <= twice <= bound),
        Claim("seen twice by alerts", f"{seen_twice}", f"0 to {bound} in flight", seen_twice <= bound),
        Claim("Unavailable raised", f"{evidence.refusals}", "1 or more", evidence.refusals > 0),
        Claim("attempts it cost", f"{counted}", "0", counted == 0),
        Claim("dead letters", _number(evidence.dead), "0", _none(evidence.dead)),
        Claim("left in the queues", _number(evidence.left), "0", _none(evidence.left)),
    ]  # fmt: skip


def holds(claims: list[Claim]) -> bool:
    return all(claim.holds is not False for claim in claims)


def table(claims: list[Claim]) -> Table:
    sheet = Table(title="Published = stored", title_justify="left", title_style="bold")
    sheet.add_column("")
    sheet.add_column("found", justify="right")
    sheet.add_column("claimed")
    sheet.add_column("holds")
    for claim in claims:
        mark = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "[yellow]unknown[/]"}[claim.holds]
        sheet.add_row(claim.what, claim.found, claim.claimed, mark)
    return sheet


def _attempts_counted(evidence: Evidence) -> int:
    """How many readings the outage cost an attempt: refused at one, stored at a later one."""
    at_storing: dict[str, int] = {}
    for id, attempt in evidence.stored:
        at_storing.setdefault(id, attempt)
    refused = dict(reversed(evidence.refused))  # the first refusal of each
    return sum(at_storing.get(id, attempt) > attempt for id, attempt in refused.items())


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count}"


def _none(count: int | None) -> bool | None:
    return None if count is None else count == 0
