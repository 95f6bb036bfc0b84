"""`penstock check`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from penstock import running
from penstock.cli.command import Call, UsageError
from penstock.cli.output import clean, print_json
from penstock.control import checking
from penstock.control.loading import load


def check(
    call: Call,
    target: Annotated[
        str, typer.Argument(metavar="MODULE:APP|DIR", help="The app; `:app` may be left out. Or a node's directory.")
    ],
) -> None:
    """Load an app and hold it against its brokers, or read a directory's definitions.

    Nothing is made or changed; exit status 1 on problems.
    """
    if os.path.isdir(target):
        _check_folder(call, target)
        return
    if os.sep in target and not os.path.exists(target) and not os.path.exists(f"{target.partition(':')[0]}.py"):
        raise UsageError(f"there is no directory {target} (an app is written as MODULE:APP)")
    app = load(target, call.store)
    running.point(app, call.broker, call.host, call.port, call.store)
    report = call.run(checking.check(app))
    if call.json:
        print_json(report)
    else:
        _print(report)
    if not report.good:
        raise typer.Exit(1)


def _check_folder(call: Call, target: str) -> None:
    from penstock.node.documents import InvalidDefinitions  # what is a node's is imported by its commands alone
    from penstock.node.folder import Folder, all_of, missing_modules

    problems: list[str] = []
    notes: list[str] = []
    defined: list[dict[str, str]] = []
    try:
        found = Folder(Path(target)).read()
    except InvalidDefinitions as invalid:
        problems = [str(one) for one in invalid.problems]
    else:
        notes = [str(one) for one in missing_modules(found)]
        for one in all_of(found):
            kind = type(one).__name__.removesuffix("Definition").lower()
            defined.append({"kind": kind, "name": one.name, "place": str(one.place)})
    if call.json:
        print_json({"definitions": defined, "problems": problems, "notes": notes})
    else:
        for each in defined:
            print(clean(f"{each['kind']:<8} {each['name']}: {each['place']}"))
        _conclude(notes, [f"problem  {text}" for text in problems])
    if problems:
        raise typer.Exit(1)


def _print(report: checking.Report) -> None:
    for route in report.routes:
        queues = f"{', '.join(route.queues)}{_bound(route.topics)}"
        print(clean(f"route    {route.handler}: {queues} on {route.broker}"))
    for task in report.tasks:
        print(clean(f"task     {task.name}: {task.handler}{_bound(task.topics)} on {task.broker}"))
    for schedule in report.schedules:
        print(clean(f"schedule {schedule.task}: {schedule.definition}, next {schedule.next or 'never'}"))
    for worker in report.workers:
        print(
            clean(f"worker   {worker.name}: {worker.handler}, {worker.mode}, again after {worker.watch_interval:g} s")
        )
    if report.tasks or report.workers:
        print(clean(f"store    {report.store or 'none: results are not kept'}"))
    stale = [
        f"stale    queue {one.queue!r} is still bound to {one.topic!r}, which is not declared any more"
        for one in report.stale
    ]
    _conclude(report.notes, [*stale, *(f"problem  {text}" for text in report.problems)])


def _bound(topics: Sequence[str]) -> str:
    return f", bound to {', '.join(topics)}" if topics else ""


def _conclude(notes: Sequence[str], wrong: Sequence[str]) -> None:
    for text in notes:
        print(clean(f"note     {text}"))
    for line in wrong:
        print(clean(line))
    print(f"{len(wrong)} to look into" if wrong else "all is well")
