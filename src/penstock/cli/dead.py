"""`penstock dead`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, get_args

import msgspec
import typer

from penstock.brokers.base import Broker
from penstock.cli.command import Call, UsageError, one_of, with_common_options
from penstock.cli.output import Advance, clean, note, print_json, print_table, progress
from penstock.control import dead_letters
from penstock.control.brokers import connected
from penstock.control.dead_letters import Letters, Outcome, Selection
from penstock.delivery.dead_letters import DeadLetter, Reason
from penstock.errors import BrokerError

app = typer.Typer(help="Dead letters: list, show, replay, discard.")

TICK = 0.1  # seconds between looks at how far it has come

Name = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue whose dead letters these are.")]
Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this one; repeatable.")]
OneReason = Annotated[str | None, typer.Option("--reason", help=f"Only these: {', '.join(get_args(Reason))}.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most so many.")]
ListLimit = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many.")]
Newest = Annotated[bool, typer.Option("--newest", help="The last ones, not the first.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

Work = Callable[[Broker, Outcome], Awaitable[None]]


@app.callback()
@with_common_options
def _group(call: Call) -> None:
    """Dead letters: list, show, replay, discard."""


@app.command("list")
@with_common_options
def _list(call: Call, queue: Name, limit: ListLimit = 50, newest: Newest = False) -> None:
    """The dead letters of a queue, one a line, the oldest first."""
    found = call.run(_look(call.url, queue, limit, newest))
    if call.json:
        print_json(found.letters)
    else:
        rows = [[one.id, one.reason, str(one.attempts), one.time, one.error or ""] for one in found.letters]
        print_table(["id", "reason", "attempts", "time", "error"], rows, right=(2,))
    _say_if_more(found)


@app.command()
@with_common_options
def show(
    call: Call,
    queue: Name,
    id: Annotated[str | None, typer.Argument(metavar="ID", help="One letter; else the first ones.")] = None,
    limit: ListLimit = 50,
    newest: Newest = False,
) -> None:
    """Dead letters whole: error, traceback and body."""
    if id is not None:
        letter = call.run(_find(call.url, queue, id))
        if call.json:
            print_json(letter)
        else:
            _print_letter(letter)
        return
    found = call.run(_look(call.url, queue, limit, newest))
    if call.json:
        print_json(found.letters)
    else:
        for index, letter in enumerate(found.letters):
            print(end="\n" if index else "")
            _print_letter(letter)
    _say_if_more(found)


@app.command()
@with_common_options
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
    selection = _selection(id, reason, limit)

    async def work(broker: Broker, outcome: Outcome) -> None:
        async with AsyncExitStack() as stack:
            other = None if to is None else await stack.enter_async_context(connected(to))
            await dead_letters.replay(broker, queue, selection, outcome, other)

    _carry_out(call, queue, "replayed", selection, work)


@app.command()
@with_common_options
def discard(
    call: Call, queue: Name, id: Ids = None, reason: OneReason = None, limit: Limit = None, yes: Yes = False
) -> None:
    """Remove dead letters for good; by default all."""
    selection = _selection(id, reason, limit)
    what = "these" if id else f"the {reason}" if reason else "all"
    call.confirm(f"Remove {what} dead letters of {queue} for good?", yes)

    async def work(broker: Broker, outcome: Outcome) -> None:
        await dead_letters.discard(broker, queue, selection, outcome)

    _carry_out(call, queue, "discarded", selection, work)


def _selection(ids: list[str] | None, reason: str | None, limit: int | None) -> Selection:
    chosen: Reason | None = one_of("--reason", reason, get_args(Reason))
    if ids and limit is not None:
        raise UsageError("give --id or --limit, not both")
    return Selection(ids=frozenset(ids or ()), reason=chosen, limit=limit)


def _carry_out(call: Call, queue: str, done: str, selection: Selection, work: Work) -> None:
    """Do it with a progress bar and say what became of it, also when it was interrupted."""
    outcome = Outcome()
    try:
        call.run(_with_progress(call.url, queue, selection, work, outcome))
    except (KeyboardInterrupt, BrokerError) as error:
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


async def _with_progress(url: str, queue: str, selection: Selection, work: Work, outcome: Outcome) -> None:
    async with connected(url) as broker:
        total = len(selection.ids) or selection.limit
        if total is None:
            total = await dead_letters.count(broker, queue)
        with progress(queue, total) as advance:
            showing = asyncio.create_task(_show_progress(outcome, advance))
            try:
                await work(broker, outcome)
            finally:
                showing.cancel()


async def _show_progress(outcome: Outcome, advance: Advance) -> None:
    while True:
        advance(outcome.done, outcome.done)
        await asyncio.sleep(TICK)


async def _look(url: str, queue: str, limit: int, newest: bool) -> Letters:
    async with connected(url) as broker:
        return await dead_letters.look(broker, queue, limit, newest=newest)


async def _find(url: str, queue: str, id: str) -> DeadLetter:
    async with connected(url) as broker:
        return await dead_letters.find(broker, queue, id)


def _say_if_more(found: Letters) -> None:
    if found.total is not None and found.total > len(found.letters):
        note(f"these are {len(found.letters)} of {found.total}: --limit shows more")


def _print_letter(letter: DeadLetter) -> None:
    for name in ("id", "queue", "reason", "error", "attempts", "origin", "time"):
        print(f"{name + ':':<10}{clean(str(getattr(letter, name) or '-'))}")
    body = letter.body if isinstance(letter.body, str) else msgspec.json.encode(letter.body).decode()
    print(f"{'body:':<10}{clean(body, lines=True)}")
    if letter.traceback:
        print(clean(letter.traceback.rstrip(), lines=True))
