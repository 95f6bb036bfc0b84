"""`penstock tasks`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperGroup

from penstock.cli import remote
from penstock.cli.command import Call, one_of, with_node_options
from penstock.cli.output import clean, complain, moment, note, print_json, print_table
from penstock.cli.records import names, print_record, took
from penstock.cli.remote import Refusal, Remote
from penstock.control import tasks
from penstock.control.brokers import connected, missing_store_file, remembered, require_files
from penstock.control.tasks import Conflict
from penstock.errors import PublishError, StoreRequired, UnknownTask
from penstock.stores.ledger import Ledger
from penstock.stores.records import State, TaskRecord

T = TypeVar("T")

MOST = 1000
"""Tasks that a node tells at once."""
ABOUT_ONE = (404, 409, 422, 429)
"""Statuses with which a node refuses one task, and not all."""


class _Group(TyperGroup):
    """`penstock tasks --state failed` lists; a word that is no command is told as such."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and not {*self.commands, *ctx.help_option_names} & {*args}:
            args = ["list", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(cls=_Group, help="Tasks that were sent: list, show, cancel, retry.")

Ids = Annotated[list[str], typer.Argument(metavar="ID…")]


@app.callback(invoke_without_command=True)
@with_node_options
def _list_by_default(call: Call) -> None:
    """Tasks that were sent: list (also without a word), show, cancel, retry."""
    _show_latest(call, None, None, 50)


@app.command("list")
@with_node_options
def _list(
    call: Call,
    state: Annotated[str | None, typer.Option("--state", help=f"Only these: {', '.join(get_args(State))}.")] = None,
    topic: Annotated[str | None, typer.Option("--topic", help="Only those sent to this name.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many.")] = 50,
) -> None:
    """The latest tasks, one a line, the newest first."""
    _show_latest(call, one_of("--state", state, get_args(State)), topic, limit)


def _show_latest(call: Call, state: State | None, topic: str | None, limit: int) -> None:
    node = remote.asked(call)
    if node is not None:
        found = node.get("/tasks", list[TaskRecord], state=state, topic=topic, limit=min(limit + 1, MOST))
    else:
        found = _latest(call, state, topic, limit + 1)
    shown = found[:limit]
    if call.json:
        print_json(shown)
    else:
        rows = [[one.taskid, one.topic, one.state, moment(one.createdAt), took(one), names(one)] for one in shown]
        print_table(["taskid", "topic", "state", "created", "took", "tasks"], rows, right=(4,))
    if len(found) > limit:
        note(f"these are the latest {limit}: --limit shows more")
    elif node is not None and len(found) == MOST:
        note(f"these are the latest {MOST}: a node tells no more at once")


def _latest(call: Call, state: State | None, topic: str | None, limit: int) -> list[TaskRecord]:
    url = _store_of(call)
    missing = missing_store_file(url)
    if missing is not None:
        note(f"{missing} does not exist yet")
        return []
    return call.run(_ask(url, lambda ledger: tasks.latest(ledger, limit, state=state, topic=topic)))


@app.command()
@with_node_options
def show(call: Call, id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """One task whole: its content, and each run with result, error, progress and attempts."""
    node = remote.asked(call)
    if node is not None:
        record = node.get(_path(id), TaskRecord)
    else:
        record = call.run(_ask(_store_of(call), lambda ledger: tasks.find(ledger, id)))
    if call.json:
        print_json(record)
    else:
        print_record(record)


@app.command()
@with_node_options
def cancel(call: Call, ids: Ids) -> None:
    """Have tasks end: what nobody has begun never will be, what runs is stopped."""

    def tell(many: _Many, record: TaskRecord) -> None:
        done = "is cancelled" if record.ended else "is being stopped"
        many.add({"taskid": record.taskid, "state": record.state}, f"{record.taskid} {done}")

    async def work() -> None:
        async with remembered(_store_of(call)) as ledger:
            with _Many(call) as many:
                for taskid in dict.fromkeys(ids):
                    with many.one():
                        tell(many, await tasks.cancel(ledger, taskid))

    node = remote.asked(call)
    if node is None:
        call.run(work())
        return
    with _Many(call) as many:
        for taskid in dict.fromkeys(ids):
            with many.one():
                tell(many, node.post(f"{_path(taskid)}/cancel", TaskRecord))


@app.command()
@with_node_options
def retry(call: Call, ids: Ids) -> None:
    """Have the runs of tasks that did not succeed begin again, under the same id and without an expiry.

    What succeeded stays as it is.
    """

    def tell(many: _Many, taskid: str, again: list[str]) -> None:
        many.add({"taskid": taskid, "tasks": again}, f"{taskid} is queued again for {', '.join(again)}")

    async def work(store: str) -> None:
        async with connected(call.url) as broker, remembered(store) as ledger:
            with _Many(call) as many:
                for taskid in dict.fromkeys(ids):
                    with many.one():
                        tell(many, taskid, await tasks.retry(ledger, broker, taskid))

    node = remote.asked(call)
    if node is None:
        store = _store_of(call)
        require_files(call.url, store)
        call.run(work(store))
        return
    with _Many(call) as many:
        for taskid in dict.fromkeys(ids):
            with many.one():
                tell(many, taskid, _retry_over_http(node, taskid))


class _Many:
    """Several tasks one after another, whatever becomes of the others. At the end what was done is told as JSON, and
    what went wrong, a line each."""

    def __init__(self, call: Call) -> None:
        self._json = call.json
        self._done: list[dict[str, Any]] = []
        self._wrong: list[str] = []

    def __enter__(self) -> _Many:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._json:
            print_json(self._done)
        if kind is not None:
            return
        for line in self._wrong:
            complain(line)
        if self._wrong:
            raise typer.Exit(1)

    @contextmanager
    def one(self) -> Iterator[None]:
        """One of them: what is wrong with it alone ends nothing else."""
        try:
            yield
        except (UnknownTask, Conflict, PublishError) as error:
            self._wrong.append(str(error))
        except Refusal as error:
            if error.status not in ABOUT_ONE:
                raise
            self._wrong.append(str(error))

    def add(self, done: dict[str, Any], line: str) -> None:
        """It is done."""
        self._done.append(done)
        if not self._json:
            print(clean(line))


def _retry_over_http(node: Remote, taskid: str) -> list[str]:
    """The names of the tasks that are run again."""
    before = node.get(_path(taskid), TaskRecord)
    node.post(f"{_path(taskid)}/retry", TaskRecord)
    return [run.task for run in before.runs if run.state in tasks.UNSUCCESSFUL]


def _path(taskid: str) -> str:
    return f"/tasks/{remote.part(taskid)}"


def _store_of(call: Call) -> str:
    """:raises StoreRequired: nothing remembers tasks."""
    url = call.store_url
    if url is None:
        raise StoreRequired("penstock tasks")
    return url


async def _ask(url: str, work: Callable[[Ledger], Awaitable[T]]) -> T:
    async with remembered(url) as ledger:
        return await work(ledger)
