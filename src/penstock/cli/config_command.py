"""`penstock config`."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Annotated, Any

import msgspec
import typer

from penstock import config
from penstock.cli import remote
from penstock.cli.command import Call, with_node_options
from penstock.cli.output import clean, print_json, print_table
from penstock.cli.places import VARIABLE
from penstock.client.publishing import resolve_store
from penstock.config import Setting, mask
from penstock.errors import ConfigError, near

STARS = "***"

app = typer.Typer(help="Settings of this directory, or with --url a node's configurations: list, show.")

Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.callback(invoke_without_command=True)
@with_node_options
def _list_by_default(call: Call) -> None:
    """Settings of this directory, or with --url a node's configurations: list (also without a word), show."""
    _show_all(call)


@app.command("list")
@with_node_options
def _list(call: Call) -> None:
    """Every setting that commands have here, and where it comes from; with --url every configuration of a node."""
    _show_all(call)


def _show_all(call: Call) -> None:
    node = remote.asked(call)
    if node is not None:
        from penstock.node.page import Stored  # only here: it takes its time to import

        found = node.get("/definitions/configs", list[Stored])
        if call.json:
            print_json(found)
        else:
            rows = [[one.name, f"{one.file}:{one.line}", _time(one.at), one.by] for one in found]
            print_table(["configuration", "file", "written", "by"], rows)
        return
    settings = _settings(call)
    if call.json:
        print_json(settings)
        return
    rows = [[one.name, _text(one.value), _source(one)] for one in settings]
    print_table(["setting", "value", "from"], rows)


@app.command()
@with_node_options
def show(call: Call, name: Name) -> None:
    """One setting, or one configuration of a node, its secrets masked."""
    node = remote.asked(call)
    if node is not None:
        from penstock.node.page import Stored

        stored = node.get(f"/definitions/configs/{'/'.join(map(remote.part, name.split('/')))}", Stored)
        if call.json:
            print_json(stored)
        else:
            print(clean(stored.text.rstrip("\n"), lines=True))
        return
    settings = {one.name: one for one in _settings(call)}
    if name not in settings:
        raise ConfigError(f"there is no setting {name!r}{near(name, settings)}")
    if call.json:
        print_json(settings[name])
    else:
        print(clean(_text(settings[name].value)))


def _settings(call: Call) -> list[Setting]:
    """What is in force for commands in this directory, by name, with nothing secret."""
    found = {one.name: one for one in config.explain()}
    flags = {"broker": call.broker, "store": call.store, "log_level": call.log_level, "log_format": call.given_format}
    for name, value in flags.items():
        if value is not None:
            found[name] = Setting(name, value, "flag", f"--{name.replace('_', '-')}")
    if call.host is not None or call.port is not None:
        found["broker"] = Setting("broker", call.url, "flag", "-H, -P")
    found["broker"] = msgspec.structs.replace(found["broker"], value=call.url)
    if found["store"].value is None:
        found["store"] = Setting("store", resolve_store(None, call.url), "default")
    found["token"] = _token()
    return [msgspec.structs.replace(found[name], value=_masked(found[name].value)) for name in sorted(found)]


def _token() -> Setting:
    if not config.secret(VARIABLE, os.environ):
        return Setting("token", None, "default")
    variable = VARIABLE if VARIABLE in os.environ else f"{VARIABLE}_FILE"
    return Setting("token", STARS, "environment", variable)


def _masked(value: Any) -> Any:
    return mask(value) if isinstance(value, str) else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _source(one: Setting) -> str:
    return one.source if one.where is None or one.source == "default" else one.where


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().isoformat(" ", "seconds")[:19]
