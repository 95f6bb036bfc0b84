"""`penstock transactions`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from penstock.cli import remote
from penstock.cli.command import Call, one_of, with_node_options
from penstock.cli.output import clean, moment, note, print_facts, print_json, print_table
from penstock.cli.records import text
from penstock.tasks.journal import STATUSES, Status, TransactionRecord

MOST = 1000
"""Transactions that a node tells at once."""

app = typer.Typer(help="Transactions of a node's cluster: list, show, suspend, resume, cancel.")

Id = Annotated[str, typer.Argument(metavar="ID", help="Its id, or that of its task.")]


@app.callback(invoke_without_command=True)
@with_node_options
def _list_by_default(call: Call) -> None:
    """Transactions of a node's cluster: list (also without a word), show, suspend, resume, cancel."""
    _show_latest(call, None, None, 50)


@app.command("list")
@with_node_options
def _list(
    call: Call,
    status: Annotated[str | None, typer.Option("--status", help=f"Only these: {', '.join(STATUSES)}.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only those of this name.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=MOST, metavar="N", help="At most so many.")] = 50,
) -> None:
    """The latest transactions, one a line, the newest first."""
    _show_latest(call, one_of("--status", status, STATUSES), name, limit)


def _show_latest(call: Call, status: Status | None, name: str | None, limit: int) -> None:
    asked = {"status": status, "name": name, "limit": min(limit + 1, MOST)}
    found = remote.required(call).get("/transactions", list[TransactionRecord], **asked)
    shown = found[:limit]
    if call.json:
        print_json(shown)
    else:
        rows = [
            [one.id, one.name, one.status, one.step or "-", str(len(one.steps)), moment(one.updatedAt), one.error or ""]
            for one in shown
        ]
        print_table(["id", "name", "status", "step", "done", "updated", "error"], rows, right=(4,))
    if len(found) > limit:
        note(f"these are the latest {limit}: --limit shows more")


@app.command()
@with_node_options
def show(call: Call, id: Id) -> None:
    """One transaction whole: its status, and each step that was done with its result."""
    found = remote.required(call).get(_path(id), TransactionRecord)
    if call.json:
        print_json(found)
        return
    facts = (
        ("id", found.id),
        ("name", found.name),
        ("task", found.task),
        ("status", found.status),
        ("wanted", found.wish),
        ("created", found.createdAt),
        ("updated", found.updatedAt),
        ("step", found.step),
        ("error", found.error),
    )
    print_facts(facts, 10)
    for step in found.steps:
        undone = ", undone" if step.undone else ""
        print(clean(f"done:     {step.name} at {step.at}{undone}: {text(step.result)}", lines=True))


@app.command()
@with_node_options
def suspend(call: Call, id: Id) -> None:
    """Have a transaction that runs stop before its next step."""
    _do(call, id, "suspend", None)


@app.command()
@with_node_options
def resume(
    call: Call,
    id: Id,
    force: Annotated[bool, typer.Option("--force", help="Declare it complete, and run nothing.")] = False,
) -> None:
    """Have a suspended transaction go on where it was."""
    _do(call, id, "resume", {"force": force})


@app.command()
@with_node_options
def cancel(
    call: Call,
    id: Id,
    force: Annotated[bool, typer.Option("--force", help="Declare it cancelled, and undo nothing.")] = False,
) -> None:
    """Have what a transaction has done undone, the latest first."""
    _do(call, id, "cancel", {"force": force})


def _do(call: Call, id: str, verb: str, body: Any) -> None:
    found = remote.required(call).post(f"{_path(id)}/{verb}", TransactionRecord, body)
    if call.json:
        print_json(found)
    else:
        print(clean(f"{found.id} is told to {verb}: it is {found.status}"))


def _path(id: str) -> str:
    return f"/transactions/{remote.part(id)}"
