"""A page of the book: what is stored of a definition, and what becomes of it when it is written or read again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from penstock.errors import UnknownDefinition, near, one_line
from penstock.node import configs
from penstock.node.definitions import (
    CONFIGS,
    MAX_NAME,
    ConfigDefinition,
    Definition,
    FunctionDefinition,
    JobDefinition,
    WorkerDefinition,
    read_text,
)
from penstock.node.documents import InvalidDefinitions, Place, Problem
from penstock.node.slack import tokens
from penstock.stores.base import Entry
from penstock.stores.keys import check_keys

Kind = Literal["workers", "jobs", "functions", "configs"]
KINDS: tuple[Kind, ...] = ("workers", "jobs", "functions", "configs")
MOST_READERS = 50  # directories that a page remembers; containers come under new names each time

_KIND_OF: Mapping[type, Kind] = {
    WorkerDefinition: "workers",
    JobDefinition: "jobs",
    FunctionDefinition: "functions",
    ConfigDefinition: "configs",
}


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a definition."""

    text: str | None
    """None: it was deleted, though its file has it still."""
    file: str
    line: int
    by: str
    at: float
    category: str | None = None
    base: str | None = None
    """A digest of the text that it was last read from; None: no directory has it."""
    readers: dict[str, str] = {}
    """The directories that have it, each with a digest of what it says; who was added first comes first. An empty one:
    it had it, and has it no more, while others have; these come before all others."""


class Draft(msgspec.Struct, frozen=True):
    """Pages that are written together: in one entry first, which whoever comes next finishes if its writer dies."""

    pages: dict[str, Page]
    """By key; what they say of directories is that of the entry they replace."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A definition of the cluster, for people."""

    kind: Kind
    name: str
    category: str | None
    text: str
    """YAML, as it was written; the secrets of a configuration and the tokens of a job are masked."""
    file: str
    """Relative to the directory of the node that read it; `-`: it came over HTTP."""
    line: int
    by: str
    """Who wrote it last."""
    at: float
    """When; Unix seconds."""


def kind_of(definition: Definition) -> Kind:
    return _KIND_OF[type(definition)]


def os_path(name: str) -> str:
    """The file of a configuration."""
    return f"{CONFIGS}/{name}.yml"


def compiled(entry: Entry) -> Definition | InvalidDefinitions | None:
    kind, name = entry.key.split("/", 2)[1:]
    try:
        page = _decode(entry.value)
        if page.text is None:
            return None
        file = os_path(name) if kind == "configs" else page.file
        (made,) = read_text(file, b"\n" * (page.line - 1 - _leading(page.text)) + page.text.encode())
    except InvalidDefinitions as invalid:
        return invalid
    except ValueError as error:  # of another version
        return InvalidDefinitions([Problem(Place(entry.key, 1), f"cannot be understood: {one_line(error)}")])
    return msgspec.structs.replace(made, text=page.text)


def _leading(text: str) -> int:
    """The lines of a file before what it defines begins."""
    count = 0
    for line in text.splitlines():
        if line.strip() not in ("", "---") and not line.lstrip().startswith(("#", "%")):
            break
        count += 1
    return count


def read_in(one: Definition, old: Page | None, origin: str) -> Page:
    """A page after a directory that has this definition was read."""
    digest = hashlib.sha256(one.text.encode()).hexdigest()
    back = old is not None and old.readers.get(origin) == ""
    others = [] if old is None else [one for one in old.readers.items() if one != (origin, "")]
    readers = dict([*others, (origin, digest)][-MOST_READERS:])
    if old is not None and not back and digest in (old.readers.get(origin), old.base):  # nothing is new here
        moved = old.text == one.text
        place = one.place if moved else Place(old.file, old.line)
        return msgspec.structs.replace(old, readers=readers, file=place.file, line=place.line)
    return Page(
        text=one.text,
        file=one.place.file,
        line=one.place.line,
        by=origin,
        at=time.time(),
        category=category_of(one),
        base=digest,
        readers=readers,
    )


def written_over(page: Page, old: Page | None) -> Page:
    """A page of a draft in place of the one there is."""
    if old is None:
        return page
    file = old.file if old.readers else "-"
    return msgspec.structs.replace(page, file=file, base=old.base, readers=old.readers)


def gone(old: Page, origin: str) -> Page | None:
    """A page after a directory was read that had this definition, and has it no more."""
    readers = {origin: ""} | {reader: digest for reader, digest in old.readers.items() if reader != origin}
    if not any(readers.values()):
        return None
    return msgspec.structs.replace(old, text=None, by=origin, at=time.time(), readers=readers)


def category_of(one: Definition) -> str | None:
    return None if isinstance(one, ConfigDefinition) else one.category


def shown(name: str, kind: Kind, page: Page) -> Stored:
    assert page.text is not None
    text = page.text
    if kind == "configs":
        text = configs.masked_text(text)
    elif kind == "jobs":
        text = tokens.masked(text)
    return Stored(
        kind=kind,
        name=name,
        category=page.category,
        text=text,
        file=page.file,
        line=page.line,
        by=page.by,
        at=page.at,
    )


def key_of(kind: str, name: str) -> str:
    """:raises UnknownDefinition: no such kind, or a name that no definition can have."""
    key = f"definition/{known(kind)}/{name}"
    try:
        check_keys([key])
        if len(name.encode()) > MAX_NAME:
            raise ValueError("too long")
        if kind == "configs" and (not name.isprintable() or {"", ".", ".."} & set(name.split("/"))):
            raise ValueError("a file below configs/ cannot be named so")
    except ValueError:
        raise UnknownDefinition(kind, name) from None
    return key


def known(kind: str) -> Kind:
    for one in KINDS:
        if one == kind:
            return one
    raise UnknownDefinition("kinds of definitions", kind, [kind for kind in KINDS if near(kind, KINDS)] or KINDS)


def page_of(entry: Entry | None) -> Page | None:
    """None: there is none, or one of another version."""
    try:
        return None if entry is None else _decode(entry.value)
    except msgspec.DecodeError:
        return None


def kind_in(key: str) -> Kind:
    return known(key.split("/", 2)[1])


def name_in(key: str) -> str:
    return key.split("/", 2)[2]


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Page).decode
decode_draft = msgspec.msgpack.Decoder(Draft).decode
