"""`penstock queues`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from penstock.cli import remote
from penstock.cli.command import Call, with_node_options
from penstock.cli.output import note, number, print_json, print_table, seconds
from penstock.control import queues
from penstock.control.brokers import admin_of, connected, listing_admin_of, missing_file
from penstock.control.queues import Overview, QueueStatus
from penstock.errors import UnknownQueue, near


class _Told(QueueStatus, frozen=True, kw_only=True):
    """A queue, as a node tells of it."""

    paused: bool

    def status(self) -> QueueStatus:
        return QueueStatus(**{name: getattr(self, name) for name in QueueStatus.__struct_fields__})


class _Purged(msgspec.Struct):
    purged: int


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
@with_node_options
def _list_by_default(call: Call) -> None:
    """Queues: list (also without a word), purge, pause, resume."""
    _show(call, [])


@app.command("list")
@with_node_options
def _list(call: Call, names: Names = None) -> None:
    """Every queue, or those named: waiting, in hand, consumers, dead letters, age of the oldest."""
    _show(call, names or [])


def _show(call: Call, names: list[str]) -> None:
    node = remote.asked(call)
    missing = missing_file(call.url) if node is None else None
    if node is not None:
        found = _told(node.get("/queues", list[_Told]), names)
    elif missing is not None:
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
@with_node_options
def purge(call: Call, queue: Name, yes: Yes = False) -> None:
    """Remove every message that waits in a queue.

    The records of tasks among them stay: they are queued until they expire, or until `penstock tasks cancel`.
    """
    call.confirm(f"Remove every message that waits in {queue}?", yes)
    node = remote.asked(call)
    count = call.run(_purge(call.url, queue)) if node is None else node.post(_path(queue, "purge"), _Purged).purged
    if call.json:
        print_json({"queue": queue, "purged": count})
    else:
        print(f"purged {count} from {queue}")


@app.command()
@with_node_options
def pause(call: Call, queue: Name) -> None:
    """Hand out nothing from a queue until it is resumed."""
    _set_paused(call, queue, True)


@app.command()
@with_node_options
def resume(call: Call, queue: Name) -> None:
    """Hand out a paused queue's messages again."""
    _set_paused(call, queue, False)


def _set_paused(call: Call, queue: str, paused: bool) -> None:
    node = remote.asked(call)
    if node is None:
        call.run(_pause(call.url, queue, paused))
    else:
        node.post(_path(queue, "pause" if paused else "resume"), dict)
    if call.json:
        print_json({"queue": queue, "paused": paused})
    else:
        print(f"{queue} is {'paused' if paused else 'handed out again'}")


def _path(queue: str, verb: str) -> str:
    return f"/queues/{remote.part(queue)}/{verb}"


def _told(found: list[_Told], names: list[str]) -> Overview:
    """:raises UnknownQueue: a named queue that the node does not tell of."""
    known = {one.name for one in found}
    for name in names:
        if name not in known:
            raise UnknownQueue(f"there is no queue {name!r}{near(name, known)}")
    wanted = [one for one in found if not names or one.name in names]
    paused = frozenset(one.name for one in wanted if one.paused)
    return Overview(queues=[one.status() for one in wanted], paused=paused)


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
