"""The book: the definitions of a cluster, in the store that its nodes share.

    definition/<kind>/<name>   one definition as it was written (`Page`)
    definitions                touched with each change, for whoever follows the book
    definitions-draft          several pages on their way into the book (`Draft`); nearly always there is none

A node reads its directory into the book when it starts and when a file changes; what is changed over HTTP is
written into the book alone. That stands until a file changes: each page knows what each directory said when it was
last read. So neither does a node that starts again with old files bring back what another one's new files replaced.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from penstock.clock import backoff_delay
from penstock.errors import BrokerUnavailable, UnknownDefinition
from penstock.node import configs
from penstock.node.definitions import (
    ConfigDefinition,
    Definition,
    Definitions,
    JobDefinition,
    read_text,
)
from penstock.node.documents import MAX_FILE, InvalidDefinitions, Place, Problem
from penstock.node.page import (
    MOST_READERS,
    Draft,
    Kind,
    Page,
    Stored,
    category_of,
    compiled,
    decode_draft,
    encode,
    gone,
    key_of,
    kind_in,
    kind_of,
    known,
    name_in,
    os_path,
    page_of,
    read_in,
    shown,
    written_over,
)
from penstock.node.slack import tokens
from penstock.stores.base import ABSENT, Change, Delete, Entry, Put, Store
from penstock.stores.keys import check_keys
from penstock.stores.scanning import all_under

BELL = "definitions"
"""The key to follow."""
DRAFT = "definitions-draft"
TRIES = 20  # of a change that others come before
PAUSE = (0.005, 0.2)  # seconds between these

Changes: TypeAlias = list[Change]
Problems: TypeAlias = list[Problem]


class Imported(msgspec.Struct, frozen=True):
    """What reading a directory changed in the book."""

    written: list[tuple[Kind, str]]
    removed: list[tuple[Kind, str]]


class Book:
    """The definitions in a store. For one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[int, Definition | InvalidDefinitions | None]] = {}
        self._readers: dict[str, Collection[str] | None] = {}
        """Of each page, as it was read last; None: of a page that another version wrote."""
        self._writing = asyncio.Lock()  # else those who write here are each other's others

    # -- reading

    async def read(self) -> tuple[Definitions, Sequence[Problem]]:
        """All definitions, and what is wrong with those that this version of Penstock does not understand.

        :raises BrokerUnavailable: call again later.
        """
        found, strange = Definitions(), set[tuple[str, str]]()
        seen: dict[str, Collection[str] | None] = {}
        problems: Problems = []
        await self._finish()
        for entry in await all_under(self._store, "definition/"):
            page = page_of(entry)
            seen[entry.key] = None if page is None else page.readers
            made = self._compiled(entry)
            if isinstance(made, InvalidDefinitions):
                problems += made.problems
                _, kind, name = entry.key.split("/", 2)
                strange.add((kind, name))
            elif made is not None:
                _members(found, kind_of(made))[made.name] = made
        for key in self._read.keys() - seen.keys():
            del self._read[key]
        self._readers = seen
        found.not_understood = frozenset(strange)
        return found, problems

    def has_lost(self, definitions: Iterable[Definition], origin: str) -> bool:
        """Whether the book, as it was read last, knows nothing of all that `take_in` wrote: somebody emptied the store,
        or it forgets what it holds when it ends. Where some is known another node with its name has taken the rest out.
        """
        pages = [self._readers.get(key_of(kind_of(one), one.name), ()) for one in definitions]
        return bool(pages) and all(
            readers is not None and origin not in readers and len(readers) < MOST_READERS for readers in pages
        )

    async def list(self, kind: str) -> Sequence[Stored]:
        """By name.

        :raises UnknownDefinition: there is no such kind.
        """
        entries = await all_under(self._store, f"definition/{known(kind)}/")
        return await asyncio.to_thread(_all_shown, known(kind), entries)  # masking takes its time

    async def show(self, kind: str, name: str) -> Stored:
        """:raises UnknownDefinition: there is none of that name."""
        (entry,) = await self._store.get([key_of(kind, name)])
        page = page_of(entry)
        if page is None or page.text is None:
            raise UnknownDefinition(kind, name, [one.name for one in await self.list(kind)])
        return await asyncio.to_thread(shown, name, known(kind), page)

    # -- writing

    async def put(self, kind: str, name: str, text: str, by: str) -> Stored:
        """Write one definition, new or in place of the old one.

        :param text: its YAML; JSON is YAML.
        :raises InvalidDefinitions: all that is wrong with it; nothing was changed.
        :raises UnknownDefinition: there is no such kind.
        """
        file = os_path(name) if known(kind) == "configs" else "-"
        made = await self._unmasked(_definitions(file, text))
        if len(made) != 1 or (kind_of(made[0]), made[0].name) != (kind, name):
            what = ", ".join(f"{kind_of(one)}/{one.name}" for one in made) or "nothing"
            raise InvalidDefinitions([Problem(Place("-", 1), f"it should define {kind}/{name}, and defines {what}")])
        await self._write(made, by)
        return await self.show(kind, name)

    async def put_all(self, text: str, by: str) -> Sequence[Stored]:
        """Write the definitions of a whole YAML file, all or none of them.

        :raises InvalidDefinitions: all that is wrong with them; nothing was changed.
        """
        made = await self._unmasked(_definitions("-", text))
        if not made:
            raise InvalidDefinitions([Problem(Place("-", 1), "it defines nothing")])
        seen: set[tuple[str, str]] = set()
        twice: Problems = []
        for one in made:
            if (kind_of(one), one.name) in seen:
                twice.append(Problem(one.place, f"another of the {kind_of(one)} is named {one.name!r}"))
            seen.add((kind_of(one), one.name))
        if twice:
            raise InvalidDefinitions(twice)
        await self._write(made, by)
        return [await self.show(kind_of(one), one.name) for one in made]

    async def delete(self, kind: str, name: str, by: str) -> None:
        """:raises UnknownDefinition: there is none of that name.
        :raises BrokerUnavailable: call again later.
        """
        key = key_of(kind, name)
        async with self._writing:
            await self._delete(key, kind, name, by)

    async def _delete(self, key: str, kind: str, name: str, by: str) -> None:
        await self._finish()
        for failures in range(TRIES):
            await _pause(failures)
            await self.show(kind, name)
            (entry,) = await self._store.get([key])
            if entry is None:
                continue
            page = page_of(entry)
            if page is None or not page.readers:
                change: Change = Delete(key, expect=entry.version)
            else:  # a file has it still
                deleted = msgspec.structs.replace(page, text=None, by=by, at=time.time())
                change = Put(key, encode(deleted), expect=entry.version)
            if (await self._apply([change]))[0] is not None:
                return
        raise _others()

    async def _unmasked(self, made: Sequence[Definition]) -> Sequence[Definition]:
        """Definitions with what they hold of `***`, as they were shown, put back."""
        return [await self._unmasked_one(one) if _holds_mask(one) else one for one in made]

    async def _unmasked_one(self, one: Definition) -> Definition:
        (entry,) = await self._store.get([key_of(kind_of(one), one.name)])
        old = None if entry is None else self._compiled(entry)
        if isinstance(one, JobDefinition):
            text = tokens.unmasked(one.text, old.slack if isinstance(old, JobDefinition) else None)
            if text is not None:
                return msgspec.structs.replace(one, text=text)
        elif isinstance(one, ConfigDefinition):
            values = configs.unmasked(one.values, old.values if isinstance(old, ConfigDefinition) else None)
            if not configs.holds_mask(values):
                return msgspec.structs.replace(one, values=values, text=configs.text_of(values))
        raise InvalidDefinitions([Problem(one.place, f"{configs.MASK} stands for a secret that was there before")])

    async def _write(self, definitions: Sequence[Definition], by: str) -> None:
        now = time.time()
        draft = Draft(
            {
                key_of(kind_of(one), one.name): Page(
                    text=one.text, file="-", line=one.place.line, by=by, at=now, category=category_of(one)
                )
                for one in definitions
            }
        )
        async with self._writing:
            for failures in range(TRIES):
                await _pause(failures)
                strange = await self._finish()
                if (await self._store.apply([Put(DRAFT, encode(draft), expect=strange)]))[0] is not None:
                    await self._finish()
                    return
        raise _others()

    async def _finish(self) -> int:
        """Bring the pages of a draft, if there is one, into the book. The version of one that is not understood, which
        is left to the nodes that wrote it as long as nobody else has something to write; else `ABSENT`.

        A page and the draft are read together, and a page is written only over what was read: so who is late
        undoes nothing that was written after the draft had gone.
        """
        for failures in range(TRIES):
            await _pause(failures)
            (found,) = await self._store.get([DRAFT])
            if found is None:
                return ABSENT
            try:
                pages = decode_draft(found.value).pages
            except msgspec.DecodeError:
                return found.version
            now, *entries = await self._store.get([DRAFT, *pages])
            if now is None or now.version != found.version:
                continue
            changes: Changes = []
            for (key, page), entry in zip(pages.items(), entries, strict=True):
                merged = written_over(page, page_of(entry))
                if merged != page_of(entry):
                    changes.append(Put(key, encode(merged), expect=ABSENT if entry is None else entry.version))
            written = all(version is not None for version in await self._apply(changes))
            if written and (await self._store.apply([Delete(DRAFT, expect=found.version)]))[0] is not None:
                return ABSENT
        raise _others()

    # -- a directory

    async def take_in(self, definitions: Iterable[Definition], origin: str) -> Imported:
        """Have the book say what a directory, `origin`, says: as far as that has changed since it was last read.

        :raises BrokerUnavailable: call again later; it may be done in part.
        """
        async with self._writing:
            return await self._take_in({key_of(kind_of(one), one.name): one for one in definitions}, origin)

    async def _take_in(self, given: Mapping[str, Definition], origin: str) -> Imported:
        written: dict[str, tuple[Kind, str]] = {}
        removed: dict[str, tuple[Kind, str]] = {}
        for failures in range(TRIES):
            await _pause(failures)
            await self._finish()
            entries = {entry.key: entry for entry in await all_under(self._store, "definition/")}
            changes: Changes = []
            for key in {**given, **entries}:
                one, entry = given.get(key), entries.get(key)
                old = page_of(entry)
                new = old if one is None else read_in(one, old, origin)
                if one is None and old is not None and old.readers.get(origin):
                    new = gone(old, origin)
                    removed[key] = kind_in(key), name_in(key)
                if new == old:
                    continue
                if one is not None and (old is None or new is None or new.text != old.text):
                    written[key] = kind_of(one), one.name
                expected = ABSENT if entry is None else entry.version
                changes.append(Delete(key, expected) if new is None else Put(key, encode(new), expect=expected))
            if not changes or all(done is not None for done in await self._apply(changes)):
                return Imported(list(written.values()), list(removed.values()))
        raise _others()

    # -- the store

    async def _apply(self, changes: Sequence[Change]) -> Sequence[int | None]:
        return (await self._store.apply([*changes, Put(BELL, b"", tell=True)]))[:-1]

    def _compiled(self, entry: Entry) -> Definition | InvalidDefinitions | None:
        """None: it was deleted."""
        before = self._read.get(entry.key)
        if before is None or before[0] != entry.version:
            before = self._read[entry.key] = entry.version, compiled(entry)
        return before[1]


async def _pause(failures: int) -> None:
    if failures:
        await asyncio.sleep(backoff_delay(failures, PAUSE, random.Random()))  # noqa: S311 - jitter


def _others() -> BrokerUnavailable:
    return BrokerUnavailable("the definitions in the store are being changed by others all the time")


def _members(found: Definitions, kind: Kind) -> dict[str, Definition]:
    members: dict[str, Definition] = getattr(found, kind)
    return members


def _definitions(file: str, text: str) -> list[Definition]:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InvalidDefinitions([Problem(Place(file, 1), "it holds a lone surrogate")]) from None
    if len(encoded) > MAX_FILE:
        raise InvalidDefinitions([Problem(Place(file, 1), f"a file may hold {MAX_FILE} bytes")])
    made = read_text(file, encoded)
    check_keys(one.name for one in made)
    return made


def _holds_mask(one: Definition) -> bool:
    if isinstance(one, JobDefinition):
        return one.slack is not None and configs.MASK in (one.slack.token, one.slack.app_token)
    return isinstance(one, ConfigDefinition) and configs.holds_mask(one.values)


def _all_shown(kind: Kind, entries: Sequence[Entry]) -> list[Stored]:
    pages = [(entry, page_of(entry)) for entry in entries]
    return [shown(name_in(entry.key), kind, page) for entry, page in pages if page and page.text is not None]
