"""`penstock doctor`."""

from __future__ import annotations

import sys

import typer

from penstock.cli.command import Call
from penstock.cli.output import clean, print_json
from penstock.control.doctor import Finding, Health, examine

_COLORS: dict[Health, str] = {"ok": "green", "note": "blue", "warning": "yellow", "failed": "red"}


def doctor(call: Call) -> None:
    """Look for what may be wrong with this machine, the configuration, the broker and the store. Nothing is changed."""
    findings = call.run(_examine(call))
    if call.json:
        print_json(findings)
    if any(finding.health == "failed" for finding in findings):
        raise typer.Exit(1)


async def _examine(call: Call) -> list[Finding]:
    findings = []
    async for finding in examine(call.url, call.store_url):
        findings.append(finding)
        if not call.json:
            _print(finding)
    return findings


def _print(finding: Finding) -> None:
    line = f"{finding.what:<14}{clean(finding.detail)}"
    if not sys.stdout.isatty():
        print(f"{finding.health:<9}{line}")
        return
    from rich.console import Console
    from rich.text import Text

    Console(soft_wrap=True).print(Text(f"{finding.health:<9}", _COLORS[finding.health]) + Text(line))
