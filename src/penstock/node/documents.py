"""Documents: a YAML file as keys and values that know their lines, and no more of it than anybody would write."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

from penstock.errors import ConfigError, near, printable
from penstock.node.scripts import Script, ScriptError

T = TypeVar("T")

MAX_FILE = 2**20  # bytes of a file
MAX_ALIASES = 100  # of a file; the members they stand for are counted below, each time
MAX_MEMBERS = 100_000
MAX_DEPTH = 100


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


def compose(file: str, text: bytes) -> yaml.Node | None:
    """A file's one document as nodes that know their lines; None: it is empty.

    :raises InvalidDefinitions: it is not YAML in UTF-8, or more than anybody would write.
    """

    def invalid(line: int, what: str) -> InvalidDefinitions:
        return InvalidDefinitions([Problem(Place(file, line), what)])

    if len(text) > MAX_FILE:
        raise invalid(1, f"a file may hold {MAX_FILE} bytes")
    try:
        text.decode()
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


class Keys:
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
        """Note a problem, in the line of a key, or in the first one."""
        line = self.place.line if key is None else self.lines.get(key, self.place.line)
        self.problems.append(Problem(Place(self.file, line), text))

    def take(self, key: str, check: Callable[[Any], str | None], default: T) -> Any | T:
        """A key's value; `check` says what is wrong with it."""
        if key not in self.nodes:
            return default
        value = construct(self.file, self.nodes[key])
        wrong = check(value)
        if wrong is not None:
            self.complain(key, f"{key} {wrong}, not {shown(value)}")
            return default
        return value

    def need(self, key: str, check: Callable[[Any], str | None], default: T, what: str) -> Any | T:
        """As `take`, of a key that has to be there."""
        if key not in self.nodes:
            self.complain(None, f"{what} needs {key!r}")
        return self.take(key, check, default)

    def only(self, known: Sequence[str], what: str) -> None:
        """Note every other key as a problem."""
        for key in self.nodes:
            if key not in known:
                self.complain(key, f"{what} has no key {printable(key)!r}{near(key, known)}")

    def script(self, key: str, compile: Callable[[Script], T]) -> T | None:
        """What is compiled of a key's text."""
        node = self.nodes.get(key)
        text = self.take(key, is_text, None)
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


def construct(file: str, node: yaml.Node) -> Any:
    """The values of a node.

    :raises InvalidDefinitions: a tag that nobody knows, or that is not for such a value; a date that there is not.
    """
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except Exception as error:  # the constructors raise whatever comes up
        mark = getattr(error, "problem_mark", None) or node.start_mark
        what = getattr(error, "problem", None) or "a value is not of the kind that its tag says"
        raise InvalidDefinitions([Problem(Place(file, mark.line + 1), f"not YAML: {printable(what)}")]) from None
    finally:
        loader.dispose()


def excerpt(file: str, text: str, node: yaml.Node) -> str:
    """The part of a file that a node is, so that it says the same by itself.

    As it was written, without its indentation; where it refers to other parts of the file, written anew.

    :raises InvalidDefinitions: as `construct`.
    """
    start, end = node.start_mark, node.end_mark
    lines = text.splitlines(keepends=True)[start.line : end.line + 1]
    if end.line < start.line + len(lines):
        lines[-1] = lines[-1][: end.column]
    lines[0] = " " * start.column + lines[0][start.column :]
    written = textwrap.dedent("".join(lines)).rstrip() + "\n"
    means = _plain(file, node)
    try:
        alone = yaml.compose(written, Loader=_Loader)
        if alone is not None and _plain(file, alone) == means:
            return written
    except (yaml.YAMLError, InvalidDefinitions):
        pass  # an alias of what stands elsewhere
    return yaml.safe_dump(means, allow_unicode=True, sort_keys=False)


def _plain(file: str, node: yaml.Node) -> Any:
    """The values of a node, untouched by who asks."""
    return construct(file, copy.deepcopy(node))  # merges are written out in the node itself


def is_text(value: Any) -> str | None:
    """What is wrong with a value that should be text."""
    return None if isinstance(value, str) and value else "is text and not empty"


def shown(value: Any) -> str:
    """A value in an error."""
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}…"
