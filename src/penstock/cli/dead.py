"""`penstock dead`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, get_args

import msgspec
import typer

from penstock.cli.command import Call, UsageError, one_of, with_node_options
from penstock.cli.letters import letterbox
from penstock.cli.output import clean, note, print_facts, print_json, print_table
from penstock.control.dead_letters import Letters, Outcome, Selection
from penstock.delivery.dead_letters import DeadLetter, Reason
from penstock.errors import BrokerError, PenstockError

app = typer.Typer(help="Dead letters: list, show, replay, discard.")

Name = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue whose dead letters these are.")]
Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this one; repeatable.")]
OneReason = Annotated[str | None, typer.Option("--reason", help=f"Only these: {', '.join(get_args(Reason))}.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most so many.")]
ListLimit = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many.")]
Newest = Annotated[bool, typer.Option("--newest", help="The last ones, not the first.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback()
@with_node_options
def _group(call: Call) -> None:
    """Dead letters: list, show, replay, discard."""


@app.command("list")
@with_node_options
def _list(call: Call, queue: Name, limit: ListLimit = 50, newest: Newest = False) -> None:
    """The dead letters of a queue, one a line, the oldest first."""
    found = letterbox(call, queue).look(limit, newest=newest)
    if call.json:
        print_json(found.letters)
    else:
        rows = [[one.id, one.reason, str(one.attempts), one.time, one.error or ""] for one in found.letters]
        print_table(["id", "reason", "attempts", "time", "error"], rows, right=(2,))
    _say_if_more(found)


@app.command()
@with_node_options
def show(
    call: Call,
    queue: Name,
    id: Annotated[str | None, typer.Argument(metavar="ID", help="One letter; else the first ones.")] = None,
    limit: ListLimit = 50,
    newest: Newest = False,
) -> None:
    """Dead letters whole: error, traceback and body."""
    if id is not None:
        letter = letterbox(call, queue).find(id)
        if call.json:
            print_json(letter)
        else:
            _print_letter(letter)
        return
    found = letterbox(call, queue).look(limit, newest=newest)
    if call.json:
        print_json(found.letters)
    else:
        for index, letter in enumerate(found.letters):
            print(end="\n" if index else "")
            _print_letter(letter)
    _say_if_more(found)


@app.command()
@with_node_options
def replay(
    call: Call,
    queue: Name,
    id: Ids = None,
    reason: OneReason = None,
    limit: Limit = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="The broker of the queue, where it is another one.")
    ] = None,
) -> None:
    """Put dead letters back into the queue they came from; by default all.

    With --to they are published on that broker to the name of their queue, and removed here once that is
    confirmed.
    """
    selection, letters = _selection(id, reason, limit), letterbox(call, queue)
    _carry_out(call, queue, "replayed", lambda outcome: letters.replay(selection, outcome, to))


@app.command()
@with_node_options
def discard(
    call: Call, queue: Name, id: Ids = None, reason: OneReason = None, limit: Limit = None, yes: Yes = False
) -> None:
    """Remove dead letters for good; by default all."""
    selection = _selection(id, reason, limit)
    what = "these" if id else f"the {reason}" if reason else "all"
    call.confirm(f"Remove {what} dead letters of {queue} for good?", yes)
    letters = letterbox(call, queue)
    _carry_out(call, queue, "discarded", lambda outcome: letters.discard(selection, outcome))


def _selection(ids: list[str] | None, reason: str | None, limit: int | None) -> Selection:
    chosen: Reason | None = one_of("--reason", reason, get_args(Reason))
    if ids and limit is not None:
        raise UsageError("give --id or --limit, not both")
    return Selection(ids=frozenset(ids or ()), reason=chosen, limit=limit)


def _carry_out(call: Call, queue: str, done: str, work: Callable[[Outcome], None]) -> None:
    """Do it and say what became of it, also when it was interrupted."""
    outcome = Outcome()
    try:
        work(outcome)
    except (KeyboardInterrupt, PenstockError) as error:
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        if outcome.done or stopped == "interrupted":
            note(f"{stopped}: {outcome.done} {done}; the others are still dead letters")
        raise
    if call.json:
        print_json({"queue": queue, done: outcome.done})
    else:
        print(f"{done} {outcome.done} of {queue}")
    if outcome.why is not None:
        raise BrokerError(f"{outcome.stayed} dead letters stay: {outcome.why}")
    if outcome.missing:
        raise BrokerError(f"no such dead letters in {queue!r}: {', '.join(sorted(outcome.missing))}")


def _say_if_more(found: Letters) -> None:
    if found.total is not None and found.total > len(found.letters):
        note(f"these are {len(found.letters)} of {found.total}: --limit shows more")


def _print_letter(letter: DeadLetter) -> None:
    names = ("id", "queue", "reason", "error", "attempts", "origin", "time")
    print_facts(((name, getattr(letter, name)) for name in names), 10)
    body = letter.body if isinstance(letter.body, str) else msgspec.json.encode(letter.body).decode()
    print(f"{'body:':<10}{clean(body, lines=True)}")
    if letter.traceback:
        print(clean(letter.traceback.rstrip(), lines=True))
