"""Definitions: what the YAML files of a directory say, each checked, with file and line.

The kind of a definition is told by its keys: `mode` and `script` make a worker, `topics` a job, `code` a
function. Files below `configs/` are configurations, named by their file. Nothing here runs a script, and
nothing half-right comes out: all that is wrong with a directory is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import msgspec
import yaml

from penstock.clock import is_seconds
from penstock.context import Context
from penstock.delivery import dead_letters, suspects
from penstock.errors import ConfigError, near, printable
from penstock.node import configs, scripts
from penstock.node.documents import (
    MAX_FILE,
    InvalidDefinitions,
    Keys,
    Place,
    Problem,
    compose,
    construct,
    excerpt,
    is_text,
)
from penstock.workers.definition import MODES, WATCH_INTERVAL, Mode

MAX_NAME = 240  # bytes: a job's queue has its name, and RabbitMQ's may have 255 with what we add
CONFIGS = "configs"
SUFFIXES = (".yml", ".yaml")
RESERVED = (dead_letters.SUFFIX, suspects.SUFFIX)
"""What the names of queues end in that others have beside them."""


class WorkerDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that is resident."""

    name: str
    category: str | None
    place: Place
    text: str = ""
    """Its YAML as it was written; that of a part of a file without the file's indentation."""
    mode: Mode
    script: str
    watch_interval: float | None
    """Seconds; None: the node's."""
    code: CodeType
    function: str
    """The name of the function that the script defines."""


class SlackOption(msgspec.Struct, frozen=True, kw_only=True):
    """A job that listens to direct messages."""

    token: str
    """Of the bot; `${ENV}` as in configurations."""
    app_token: str | None
    """For Socket Mode; None: that of the environment."""
    code_injection: bool


class JobDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A script that is run for each task on its topics."""

    name: str
    category: str | None
    place: Place
    text: str = ""
    """Its YAML as it was written; that of a part of a file without the file's indentation."""
    topics: tuple[str, ...]
    script: str | None
    slack: SlackOption | None
    code: CodeType | None
    """None: it has no script of its own."""

    @property
    def bound(self) -> tuple[str, ...]:
        """The topics of its queue; those of a job that listens to Slack are people."""
        return self.topics if self.slack is None else ()

    @property
    def injects(self) -> bool:
        """Whether it runs what people write, and no script."""
        return self.slack is not None and self.slack.code_injection


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that scripts reach as an attribute of `context`."""

    name: str
    category: str | None
    place: Place
    text: str = ""
    """Its YAML as it was written; that of a part of a file without the file's indentation."""
    script: str
    code: CodeType


class ConfigDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """What `get_service_config(name)` gives."""

    name: str
    place: Place
    text: str = ""
    """Its YAML as it was written; that of a part of a file without the file's indentation."""
    values: dict[str, Any]


class Definitions(msgspec.Struct, kw_only=True):
    """All that a directory defines, by kind and name."""

    workers: dict[str, WorkerDefinition] = {}
    jobs: dict[str, JobDefinition] = {}
    functions: dict[str, FunctionDefinition] = {}
    configs: dict[str, ConfigDefinition] = {}
    not_understood: frozenset[tuple[str, str]] = frozenset()
    """Kind and name of what is defined too, in a way that only others understand."""


Definition = WorkerDefinition | JobDefinition | FunctionDefinition | ConfigDefinition


def read_texts(texts: Mapping[str, bytes], problems: Iterable[Problem] = ()) -> Definitions:
    """The definitions in some files, by their names relative to the directory.

    :raises InvalidDefinitions: everything that is wrong with them, and `problems`.
    """
    return collect([*(parse(file, texts[file]) for file in sorted(texts)), InvalidDefinitions(list(problems))])


def collect(parts: Iterable[Sequence[Definition] | InvalidDefinitions]) -> Definitions:
    """What several files define together.

    :raises InvalidDefinitions: everything that is wrong with them.
    """
    found = Definitions()
    wrong: list[Problem] = []
    for part in parts:
        if isinstance(part, InvalidDefinitions):
            wrong += part.problems
        else:
            for definition in part:
                _add(found, definition, wrong)
    if wrong:
        raise InvalidDefinitions(wrong)
    return found


def read_text(file: str, text: bytes) -> list[Definition]:
    """The definitions in one file: a list of mappings, or one mapping.

    :raises InvalidDefinitions: everything that is wrong with it.
    """
    node = compose(file, text)
    if node is None:
        return []
    if is_config(file):
        return [msgspec.structs.replace(_config(file, node), text=text.decode())]
    whole = text.decode("utf-8-sig")
    members = node.value if isinstance(node, yaml.SequenceNode) else [node]
    definitions: list[Definition] = []
    problems: list[Problem] = []
    for member in members:
        try:
            written = whole if member is node else excerpt(file, whole, member)
            made = _definition(Keys(file, member, "a definition"))
            definitions.append(msgspec.structs.replace(made, text=written))
        except InvalidDefinitions as invalid:
            problems += invalid.problems
    if problems:
        raise InvalidDefinitions(problems)
    return definitions


def parse(file: str, text: bytes) -> list[Definition] | InvalidDefinitions:
    """As `read_text`, for whoever collects what is wrong."""
    try:
        return read_text(file, text)
    except InvalidDefinitions as invalid:
        return invalid


def files_of(folder: Path) -> list[str]:
    """The YAML files of a directory and its folders, relative to it; hidden ones are left out.

    :raises InvalidDefinitions: a folder that cannot be read: nobody knows what it holds.
    """
    found = []

    def refused(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it has just gone
            place = Place(printable(os.path.relpath(error.filename, folder)), 1)
            raise InvalidDefinitions([Problem(place, f"cannot be read: {error.strerror or error}")])

    for place, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(place, folder)
        found += [
            os.path.normpath(os.path.join(inside, file))
            for file in files
            if file.endswith(SUFFIXES) and not file.startswith(".")
        ]
    return sorted(found)


def is_config(file: str) -> bool:
    """Whether a file is a configuration, by where it is."""
    return file.split(os.sep)[0] == CONFIGS


def confined(folder: Path, file: str) -> Path:
    """A file of a directory, wherever links lead.

    :raises ConfigError: it is outside.
    """
    inside = folder.resolve()
    path = (inside / file).resolve()
    if not path.is_relative_to(inside):
        raise ConfigError(f"{file!r} leads out of {folder}")
    return path


def read_confined(folder: Path, file: str) -> bytes:
    """:raises OSError: it cannot be read.
    :raises ConfigError: it is outside, or too large.
    """
    with confined(folder, file).open("rb") as opened:
        text = opened.read(MAX_FILE + 1)
    if len(text) > MAX_FILE:
        raise ConfigError(f"a file may hold {MAX_FILE} bytes")
    return text


# -- the kinds


def _definition(given: Keys) -> Definition:
    """:raises InvalidDefinitions: all that is wrong with it."""
    keys = given.nodes.keys()
    kinds = [kind for kind, telling in _KINDS.items() if telling & keys]
    if len(kinds) != 1:
        which = "it is " + " and ".join(kinds) + " at once" if kinds else "its kind is not clear"
        given.complain(
            None, f"{which}: 'mode' and 'script' make a worker, 'topics' and 'script' a job, 'code' a function"
        )
        raise InvalidDefinitions(given.problems)
    made: Definition = _MAKERS[kinds[0]](given)
    if given.problems:
        raise InvalidDefinitions(given.problems)
    return made


def _worker(given: Keys) -> WorkerDefinition:
    given.only(("name", "category", "mode", "script", "watch_interval"), "a worker")
    name = given.need("name", _is_name, "", "a worker")
    mode: Mode = given.need("mode", _is_mode, "single", "a worker")
    script = given.need("script", is_text, "", "a worker")
    interval = given.take("watch_interval", _is_seconds, None)
    made = given.script("script", lambda script: scripts.compile_worker(script, name))
    code, function = made or (_NOTHING, "")
    return WorkerDefinition(
        name=name,
        category=given.take("category", is_text, None),
        place=given.place,
        mode=mode,
        script=script,
        watch_interval=interval,
        code=code,
        function=function,
    )


def _job(given: Keys) -> JobDefinition:
    given.only(("name", "category", "topics", "script", "slack"), "a job")
    name = given.need("name", _is_job_name, "", "a job")
    topics = given.need("topics", _is_topics, (), "a job")
    slack = None
    if "slack" in given.nodes:
        try:
            option = Keys(given.file, given.nodes["slack"], "slack")
            slack = _slack(option)
            given.problems += option.problems
        except InvalidDefinitions as invalid:
            given.problems += invalid.problems
    injects = slack is not None and slack.code_injection
    if not injects and "script" not in given.nodes:
        given.complain(None, "a job needs 'script'")
    code = given.script("script", lambda script: scripts.compile_job(script, name))
    return JobDefinition(
        name=name,
        category=given.take("category", is_text, None),
        place=given.place,
        topics=(topics,) if isinstance(topics, str) else tuple(topics),
        script=given.take("script", is_text, None),
        slack=slack,
        code=code,
    )


def _slack(given: Keys) -> SlackOption:
    given.only(("token", "app_token", "code_injection"), "slack")
    return SlackOption(
        token=given.need("token", is_text, "", "slack"),
        app_token=given.take("app_token", is_text, None),
        code_injection=given.take("code_injection", _is_flag, False),
    )


def _function(given: Keys) -> FunctionDefinition:
    given.only(("name", "category", "code"), "a function")
    name = given.need("name", _is_function_name, "", "a function")
    code = given.script("code", lambda script: scripts.compile_function(script, name)) if name else None
    return FunctionDefinition(
        name=name,
        category=given.take("category", is_text, None),
        place=given.place,
        script=given.take("code", is_text, ""),
        code=code or _NOTHING,
    )


def _config(file: str, node: yaml.Node) -> ConfigDefinition:
    place = Place(file, node.start_mark.line + 1)
    values = construct(file, node)
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise InvalidDefinitions([Problem(place, "a configuration is a mapping of names")])
    if odd := [problem for key, _ in node.value if (problem := _odd_key(file, key)) is not None]:
        raise InvalidDefinitions(odd)
    try:
        configs.check(values)
    except ConfigError as error:
        raise InvalidDefinitions([Problem(place, str(error))]) from None
    name = os.path.splitext(file.partition(os.sep)[2])[0].replace(os.sep, "/")
    if len(name.encode()) > MAX_NAME:
        raise InvalidDefinitions([Problem(place, f"a configuration's name has {MAX_NAME} bytes at most")])
    return ConfigDefinition(name=name, place=place, values=values)


def _odd_key(file: str, key: yaml.Node) -> Problem | None:
    """What is wrong with a key that YAML takes for something else than text, as `on`."""
    value = construct(file, key)
    if isinstance(value, str):
        return None
    meant = yaml.safe_dump(value).splitlines()[0]
    written = printable(key.value) if isinstance(key, yaml.ScalarNode) else "…"
    return Problem(Place(file, key.start_mark.line + 1), f'key {meant} is not text: quote it, as "{written[:60]}"')


_NOTHING = compile("", "<nothing>", "exec")

_KINDS: Mapping[str, set[str]] = {"a worker": {"mode"}, "a job": {"topics"}, "a function": {"code"}}
_MAKERS: Mapping[str, Callable[[Keys], Definition]] = {"a worker": _worker, "a job": _job, "a function": _function}


def _add(found: Definitions, definition: Definition, wrong: list[Problem]) -> None:
    kinds: dict[type, tuple[dict[str, Any], str]] = {
        WorkerDefinition: (found.workers, "worker"),
        JobDefinition: (found.jobs, "job"),
        FunctionDefinition: (found.functions, "function"),
        ConfigDefinition: (found.configs, "configuration"),
    }
    known, kind = kinds[type(definition)]
    if definition.name in known:
        other = known[definition.name].place
        wrong.append(Problem(definition.place, f"another {kind} is named {definition.name!r}: {other}"))
    else:
        known[definition.name] = definition


# -- values


def _is_name(value: Any) -> str | None:
    good = isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= MAX_NAME and "/" not in value
    return None if good else f"is text of 1 to {MAX_NAME} bytes, printable and without '/'"


def _is_job_name(value: Any) -> str | None:
    reserved = isinstance(value, str) and value.endswith(RESERVED)
    return f"ends in neither of {', '.join(RESERVED)}: queues beside those of jobs do" if reserved else _is_name(value)


def _is_identifier(value: Any) -> str | None:
    good = isinstance(value, str) and value.isidentifier() and not value.startswith("_")
    if good and len(value.encode()) > MAX_NAME:
        return f"has {MAX_NAME} bytes at most"
    return None if good else "is a name that Python knows, and does not begin with '_'"


def _is_function_name(value: Any) -> str | None:
    if isinstance(value, str) and hasattr(Context, value):
        return "is not the name of something that `context` has by itself"
    return _is_identifier(value)


def _is_mode(value: Any) -> str | None:
    return None if value in MODES else "is 'single' or 'multi'" + near(str(value), MODES)


def _is_topics(value: Any) -> str | None:
    topics = [value] if isinstance(value, str) else value
    good = isinstance(topics, list) and topics and all(_is_topic(topic) for topic in topics)
    return None if good else "is a list of names"


def _is_topic(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value and value == printable(value)


def _is_seconds(value: Any) -> str | None:
    return None if is_seconds(value) else f"is a number of seconds, 0 or more ({WATCH_INTERVAL:g} by default)"


def _is_flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is true or false"
