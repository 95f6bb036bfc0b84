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
from typing import Any, NamedTuple, TypeVar

import msgspec
import yaml

from penstock.clock import is_seconds
from penstock.errors import ConfigError, near, printable
from penstock.node import scripts
from penstock.node.scripts import Script, ScriptError
from penstock.workers.definition import MODES, WATCH_INTERVAL, Mode

T = TypeVar("T")

MAX_FILE = 2**20  # bytes of a file
MAX_ALIASES = 100  # of a file; the members they stand for are counted below, each time
MAX_MEMBERS = 100_000
MAX_DEPTH = 100
MAX_NAME = 255  # characters
CONFIGS = "configs"
SUFFIXES = (".yml", ".yaml")


class Place(NamedTuple):
    """Where something stands."""

    file: str
    """Relative to the directory."""
    line: int
    """From 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Problem(NamedTuple):
    """What is wrong, and where."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class InvalidDefinitions(ConfigError):
    """All that is wrong with some definitions, a line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(map(str, self.problems)))


class WorkerDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that is resident."""

    name: str
    category: str | None
    place: Place
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
    app_token: str | None
    code_injection: bool


class JobDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A script that is run for each task on its topics."""

    name: str
    category: str | None
    place: Place
    topics: tuple[str, ...]
    script: str | None
    slack: SlackOption | None
    code: CodeType | None
    """None: it has no script of its own."""


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that scripts reach as an attribute of `context`."""

    name: str
    category: str | None
    place: Place
    script: str
    code: CodeType


class ConfigDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """What `get_service_config(name)` gives."""

    name: str
    place: Place
    values: dict[str, Any]


class Definitions(msgspec.Struct, kw_only=True):
    """All that a directory defines, by kind and name."""

    workers: dict[str, WorkerDefinition] = {}
    jobs: dict[str, JobDefinition] = {}
    functions: dict[str, FunctionDefinition] = {}
    configs: dict[str, ConfigDefinition] = {}


Definition = WorkerDefinition | JobDefinition | FunctionDefinition | ConfigDefinition


def read_directory(folder: Path) -> Definitions:
    """:raises InvalidDefinitions: everything that is wrong in it.
    :raises ConfigError: there is no such directory.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory")
    texts: dict[str, bytes] = {}
    problems: list[Problem] = []
    for file in files_of(folder):
        try:
            texts[file] = read_confined(folder, file)
        except OSError as error:
            problems.append(Problem(Place(file, 1), f"cannot be read: {error.strerror or error}"))
        except ConfigError as error:
            problems.append(Problem(Place(file, 1), str(error)))
    return read_texts(texts, problems)


def read_texts(texts: Mapping[str, bytes], problems: Iterable[Problem] = ()) -> Definitions:
    """The definitions in some files, by their names relative to the directory.

    :raises InvalidDefinitions: everything that is wrong with them, and `problems`.
    """
    found, wrong = Definitions(), list(problems)
    for file in sorted(texts):
        try:
            for definition in read_text(file, texts[file]):
                _add(found, definition, wrong)
        except InvalidDefinitions as invalid:
            wrong += invalid.problems
    if wrong:
        raise InvalidDefinitions(wrong)
    return found


def read_text(file: str, text: bytes) -> list[Definition]:
    """The definitions in one file: a list of mappings, or one mapping.

    :raises InvalidDefinitions: everything that is wrong with it.
    """
    node = _compose(file, text)
    if node is None:
        return []
    if is_config(file):
        return [_config(file, node)]
    members = node.value if isinstance(node, yaml.SequenceNode) else [node]
    definitions: list[Definition] = []
    problems: list[Problem] = []
    for member in members:
        try:
            definitions.append(_definition(_Mapping(file, member, "a definition")))
        except InvalidDefinitions as invalid:
            problems += invalid.problems
    if problems:
        raise InvalidDefinitions(problems)
    return definitions


def files_of(folder: Path) -> list[str]:
    """The YAML files of a directory and its folders, relative to it; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder):
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


# -- the YAML


def _compose(file: str, text: bytes) -> yaml.Node | None:
    """:raises InvalidDefinitions: it is not YAML, or more than anybody would write."""

    def invalid(line: int, what: str) -> InvalidDefinitions:
        return InvalidDefinitions([Problem(Place(file, line), what)])

    if len(text) > MAX_FILE:
        raise invalid(1, f"a file may hold {MAX_FILE} bytes")
    try:
        depth = aliases = 0
        for event in yaml.parse(text, Loader=_Loader):
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise invalid(line, f"it is nested more than {MAX_DEPTH} deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):
                aliases += 1
                if aliases > MAX_ALIASES:
                    raise invalid(line, f"it has more than {MAX_ALIASES} aliases")
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _members(node, {}) > MAX_MEMBERS:
            raise invalid(1, f"its aliases stand for more than {MAX_MEMBERS} members")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise invalid(1 if mark is None else mark.line + 1, f"not YAML: {printable(what)}") from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise invalid(1, f"not YAML: {printable(' '.join(str(error).split()))}") from None
    return node


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _members(node: yaml.Node, known: dict[int, int]) -> int:
    """How many members a node has once every alias is written out. One that holds itself has no end."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_MEMBERS + 1  # while it is counted
    count = 1
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            count += _members(part, known)
    known[id(node)] = count
    return count


class _Mapping:
    """A mapping of a file: its values, and where each key stands."""

    def __init__(self, file: str, node: yaml.Node, what: str) -> None:
        self.file = file
        self.place = Place(file, node.start_mark.line + 1)
        self.problems: list[Problem] = []
        self.nodes: dict[str, yaml.Node] = {}
        self.lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            raise InvalidDefinitions([Problem(self.place, f"{what} is a mapping of keys")])
        merged = _flatten(node)
        own: set[str] = set()
        for number, (key, value) in enumerate(node.value):
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(Place(file, line), "a key is a word"))
                continue
            if key.value in own:
                self.problems.append(Problem(Place(file, line), f"the key {key.value!r} is there twice"))
            if number >= merged:
                own.add(key.value)
            self.nodes[key.value], self.lines[key.value] = value, line

    def complain(self, key: str | None, text: str) -> None:
        line = self.place.line if key is None else self.lines.get(key, self.place.line)
        self.problems.append(Problem(Place(self.file, line), text))

    def take(self, key: str, check: Callable[[Any], str | None], default: T) -> Any | T:
        """A key's value; `check` says what is wrong with it."""
        if key not in self.nodes:
            return default
        value = _construct(self.file, self.nodes[key])
        wrong = check(value)
        if wrong is not None:
            self.complain(key, f"{key} {wrong}, not {_shown(value)}")
            return default
        return value

    def need(self, key: str, check: Callable[[Any], str | None], default: T, what: str) -> Any | T:
        if key not in self.nodes:
            self.complain(None, f"{what} needs {key!r}")
        return self.take(key, check, default)

    def only(self, known: Sequence[str], what: str) -> None:
        for key in self.nodes:
            if key not in known:
                self.complain(key, f"{what} has no key {printable(key)!r}{near(key, known)}")

    def script(self, key: str, compile: Callable[[Script], T]) -> T | None:
        """What is compiled of a key's text."""
        node = self.nodes.get(key)
        text = self.take(key, _is_text, None)
        if node is None or text is None:
            return None
        # The text of a block begins in the line after its sign.
        first = node.start_mark.line + (2 if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">") else 1)
        try:
            return compile(Script(text, self.file, first))
        except ScriptError as error:
            self.problems.append(Problem(Place(self.file, error.line), str(error)))
            return None


def _flatten(node: yaml.MappingNode) -> int:
    """Put what is merged (`<<`) in front of a mapping's own members; how many that are."""
    own = sum(key.tag != "tag:yaml.org,2002:merge" for key, _ in node.value)
    loader = yaml.SafeLoader("")
    try:
        loader.flatten_mapping(node)
    except yaml.YAMLError:  # what is not a mapping cannot be merged: `<<` is an unknown key then
        return 0
    finally:
        loader.dispose()
    return int(len(node.value) - own)


def _construct(file: str, node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None) or node.start_mark
        what = getattr(error, "problem", None) or str(error)
        raise InvalidDefinitions([Problem(Place(file, mark.line + 1), f"not YAML: {printable(what)}")]) from None
    finally:
        loader.dispose()


# -- the kinds


def _definition(given: _Mapping) -> Definition:
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


def _worker(given: _Mapping) -> WorkerDefinition:
    given.only(("name", "category", "mode", "script", "watch_interval"), "a worker")
    name = given.need("name", _is_name, "", "a worker")
    mode: Mode = given.need("mode", _is_mode, "single", "a worker")
    script = given.need("script", _is_text, "", "a worker")
    interval = given.take("watch_interval", _is_seconds, None)
    made = given.script("script", lambda script: scripts.compile_worker(script, name))
    code, function = made or (_NOTHING, "")
    return WorkerDefinition(
        name=name,
        category=given.take("category", _is_text, None),
        place=given.place,
        mode=mode,
        script=script,
        watch_interval=interval,
        code=code,
        function=function,
    )


def _job(given: _Mapping) -> JobDefinition:
    given.only(("name", "category", "topics", "script", "slack"), "a job")
    name = given.need("name", _is_name, "", "a job")
    topics = given.need("topics", _is_topics, (), "a job")
    slack = None
    if "slack" in given.nodes:
        try:
            option = _Mapping(given.file, given.nodes["slack"], "slack")
            slack = _slack(option)
            given.problems += option.problems
        except InvalidDefinitions as invalid:
            given.problems += invalid.problems
    injects = slack is not None and slack.code_injection
    if not injects and "script" not in given.nodes:
        given.complain(None, "a job needs 'script'")
    code = given.script("script", scripts.compile_job)
    return JobDefinition(
        name=name,
        category=given.take("category", _is_text, None),
        place=given.place,
        topics=(topics,) if isinstance(topics, str) else tuple(topics),
        script=given.take("script", _is_text, None),
        slack=slack,
        code=code,
    )


def _slack(given: _Mapping) -> SlackOption:
    given.only(("token", "app_token", "code_injection"), "slack")
    return SlackOption(
        token=given.need("token", _is_text, "", "slack"),
        app_token=given.take("app_token", _is_text, None),
        code_injection=given.take("code_injection", _is_flag, False),
    )


def _function(given: _Mapping) -> FunctionDefinition:
    given.only(("name", "category", "code"), "a function")
    name = given.need("name", _is_identifier, "", "a function")
    code = given.script("code", lambda script: scripts.compile_function(script, name))
    return FunctionDefinition(
        name=name,
        category=given.take("category", _is_text, None),
        place=given.place,
        script=given.take("code", _is_text, ""),
        code=code or _NOTHING,
    )


def _config(file: str, node: yaml.Node) -> ConfigDefinition:
    place = Place(file, node.start_mark.line + 1)
    values = _construct(file, node)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InvalidDefinitions([Problem(place, "a configuration is a mapping of names")])
    name = os.path.splitext(file.partition(os.sep)[2])[0].replace(os.sep, "/")
    return ConfigDefinition(name=name, place=place, values=values)


_NOTHING = compile("", "<nothing>", "exec")

_KINDS: Mapping[str, set[str]] = {"a worker": {"mode"}, "a job": {"topics"}, "a function": {"code"}}
_MAKERS: Mapping[str, Callable[[_Mapping], Definition]] = {"a worker": _worker, "a job": _job, "a function": _function}


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


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is text and not empty"


def _is_name(value: Any) -> str | None:
    good = isinstance(value, str) and 0 < len(value) <= MAX_NAME and value == printable(value) and "/" not in value
    return None if good else f"is text of 1 to {MAX_NAME} printable characters without '/'"


def _is_identifier(value: Any) -> str | None:
    good = isinstance(value, str) and value.isidentifier() and not value.startswith("_")
    return None if good else "is a name that Python knows, and does not begin with '_'"


def _is_mode(value: Any) -> str | None:
    return None if value in MODES else "is 'single' or 'multi'" + near(str(value), MODES)


def _is_topics(value: Any) -> str | None:
    topics = [value] if isinstance(value, str) else value
    good = isinstance(topics, list) and topics and all(isinstance(topic, str) and topic for topic in topics)
    return None if good else "is a list of names"


def _is_seconds(value: Any) -> str | None:
    return None if is_seconds(value) else f"is a number of seconds, 0 or more ({WATCH_INTERVAL:g} by default)"


def _is_flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is true or false"
