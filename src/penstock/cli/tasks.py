"""`penstock tasks`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperGroup

from penstock.cli.command import Call, one_of, with_common_options
from penstock.cli.output import complain, note, print_json, print_table
from penstock.cli.records import names, print_record, took
from penstock.control import tasks
from penstock.control.brokers import connected, missing_store_file, remembered, require_files
from penstock.control.tasks import Conflict
from penstock.errors import PublishError, StoreRequired, UnknownTask
from penstock.stores.ledger import Ledger
from penstock.stores.records import State, TaskRecord

T = TypeVar("T")


class _Group(TyperGroup):
    """`penstock tasks --state failed` lists; a word that is no command is told as such."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and not {*self.commands, *ctx.help_option_names} & {*args}:
            args = ["list", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(cls=_Group, help="Tasks that were sent: list, show, cancel, retry.")

Ids = Annotated[list[str], typer.Argument(metavar="ID…")]


@app.callback(invoke_without_command=True)
@with_common_options
def _list_by_default(call: Call) -> None:
    """Tasks that were sent: list (also without a word), show, cancel, retry."""
    _show_latest(call, None, None, 50)


@app.command("list")
@with_common_options
def _list(
    call: Call,
    state: Annotated[str | None, typer.Option("--state", help=f"Only these: {', '.join(get_args(State))}.")] = None,
    topic: Annotated[str | None, typer.Option("--topic", help="Only those sent to this name.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many.")] = 50,
) -> None:
    """The latest tasks, one a line, the newest first."""
    _show_latest(call, one_of("--state", state, get_args(State)), topic, limit)


def _show_latest(call: Call, state: State | None, topic: str | None, limit: int) -> None:
    url = _store_of(call)
    missing = missing_store_file(url)
    if missing is not None:
        found: list[TaskRecord] = []
        note(f"{missing} does not exist yet")
    else:
        found = call.run(_ask(url, lambda ledger: tasks.latest(ledger, limit + 1, state=state, topic=topic)))
    shown = found[:limit]
    if call.json:
        print_json(shown)
    else:
        rows = [[one.taskid, one.topic, one.state, _time(one.createdAt), took(one), names(one)] for one in shown]
        print_table(["taskid", "topic", "state", "created", "took", "tasks"], rows, right=(4,))
    if len(found) > limit:
        note(f"these are the latest {limit}: --limit shows more")


@app.command()
@with_common_options
def show(call: Call, id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """One task whole: its content, and each run with result, error, progress and attempts."""
    record = call.run(_ask(_store_of(call), lambda ledger: tasks.find(ledger, id)))
    if call.json:
        print_json(record)
    else:
        print_record(record)


@app.command()
@with_common_options
def cancel(call: Call, ids: Ids) -> None:
    """Have tasks end: what nobody has begun never will be, what runs is stopped."""

    async def one(ledger: Ledger, taskid: str) -> dict[str, Any]:
        record = await tasks.cancel(ledger, taskid)
        if not call.json:
            print(f"{taskid} {'is cancelled' if record.ended else 'is being stopped'}")
        return {"taskid": taskid, "state": record.state}

    async def work() -> list[str]:
        async with remembered(_store_of(call)) as ledger:
            return await _each(call, ids, lambda taskid: one(ledger, taskid))

    _end(call.run(work()))


@app.command()
@with_common_options
def retry(call: Call, ids: Ids) -> None:
    """Have the runs of tasks that did not succeed begin again, under the same id and without an expiry.

    What succeeded stays as it is.
    """
    store = _store_of(call)
    require_files(call.url, store)

    async def work() -> list[str]:
        async with connected(call.url) as broker, remembered(store) as ledger:

            async def one(taskid: str) -> dict[str, Any]:
                again = await tasks.retry(ledger, broker, taskid)
                if not call.json:
                    print(f"{taskid} is queued again for {', '.join(again)}")
                return {"taskid": taskid, "tasks": again}

            return await _each(call, ids, one)

    _end(call.run(work()))


def _store_of(call: Call) -> str:
    """:raises StoreRequired: nothing remembers tasks."""
    url = call.store_url
    if url is None:
        raise StoreRequired("penstock tasks")
    return url


async def _ask(url: str, work: Callable[[Ledger], Awaitable[T]]) -> T:
    async with remembered(url) as ledger:
        return await work(ledger)


async def _each(call: Call, ids: list[str], work: Callable[[str], Awaitable[dict[str, Any]]]) -> list[str]:
    """Do it to each task, whatever became of the others; what went wrong, a line each."""
    done: list[dict[str, Any]] = []
    wrong: list[str] = []
    try:
        for taskid in dict.fromkeys(ids):
            try:
                done.append(await work(taskid))
            except (UnknownTask, Conflict, PublishError) as error:
                wrong.append(str(error))
    finally:
        if call.json:
            print_json(done)
    return wrong


def _end(wrong: list[str]) -> None:
    for line in wrong:
        complain(line)
    if wrong:
        raise typer.Exit(1)


def _time(moment: str) -> str:
    """An ISO 8601 time without what nobody reads in a list."""
    return moment[:19].replace("T", " ")
