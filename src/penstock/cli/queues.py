"""`penstock queues`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from penstock.cli.command import Call, with_common_options
from penstock.cli.output import note, number, print_json, print_table, seconds
from penstock.control import queues
from penstock.control.brokers import admin_of, connected, listing_admin_of, missing_file
from penstock.control.queues import Overview


class _Group(TyperGroup):
    """`penstock queues NAME …` lists these; a word like a command's is taken for a typing error."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not get_close_matches(args[0], self.commands, n=1, cutoff=0.75):
            args = ["list", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Group, help="Queues: list, purge, pause, resume.")

Names = Annotated[list[str] | None, typer.Argument(metavar="[QUEUE …]", help="These only; by default all.")]
Name = Annotated[str, typer.Argument(metavar="QUEUE")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback(invoke_without_command=True)
@with_common_options
def _list_by_default(call: Call) -> None:
    """Queues: list (also without a word), purge, pause, resume."""
    _show(call, [])


@app.command("list")
@with_common_options
def _list(call: Call, names: Names = None) -> None:
    """Every queue, or those named: waiting, in hand, consumers, dead letters, age of the oldest."""
    _show(call, names or [])


def _show(call: Call, names: list[str]) -> None:
    missing = missing_file(call.url)
    if missing is not None:
        found = Overview(queues=[], paused=frozenset())
        note(f"{missing} does not exist yet")
    else:
        found = call.run(_overview(call.url, names))
    if call.json:
        print_json(found.queues)
        return
    rows = [
        [
            one.name,
            number(one.ready),
            number(one.unsettled),
            number(one.consumers),
            number(one.dead),
            seconds(one.oldest_s),
            "paused" if one.name in found.paused else "",
        ]
        for one in found.queues
    ]
    print_table(["queue", "ready", "unsettled", "consumers", "dead", "oldest", ""], rows, right=(1, 2, 3, 4, 5))


@app.command()
@with_common_options
def purge(call: Call, queue: Name, yes: Yes = False) -> None:
    """Remove every message that waits in a queue."""
    call.confirm(f"Remove every message that waits in {queue}?", yes)
    count = call.run(_purge(call.url, queue))
    if call.json:
        print_json({"queue": queue, "purged": count})
    else:
        print(f"purged {count} from {queue}")


@app.command()
@with_common_options
def pause(call: Call, queue: Name) -> None:
    """Hand out nothing from a queue until it is resumed."""
    _set_paused(call, queue, True)


@app.command()
@with_common_options
def resume(call: Call, queue: Name) -> None:
    """Hand out a paused queue's messages again."""
    _set_paused(call, queue, False)


def _set_paused(call: Call, queue: str, paused: bool) -> None:
    call.run(_pause(call.url, queue, paused))
    if call.json:
        print_json({"queue": queue, "paused": paused})
    else:
        print(f"{queue} is {'paused' if paused else 'handed out again'}")


async def _overview(url: str, names: list[str]) -> Overview:
    async with connected(url) as broker:
        admin = admin_of(broker, url) if names else listing_admin_of(broker, url)
        return await queues.overview(admin, names)


async def _purge(url: str, queue: str) -> int:
    async with connected(url) as broker:
        return await queues.purge(admin_of(broker, url), queue)


async def _pause(url: str, queue: str, paused: bool) -> None:
    async with connected(url) as broker:
        await queues.pause(admin_of(broker, url), queue, paused)
