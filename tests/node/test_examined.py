"""Directories that lose and get back what they had, many who write at once, stores that forget, folders that move."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from penstock import BrokerUnavailable
from penstock.node import folder as folder_module
from penstock.node import sources
from penstock.node.book import Book
from penstock.node.definitions import read_text
from penstock.node.documents import InvalidDefinitions
from penstock.node.folder import Folder
from penstock.node.node import Node
from penstock.stores.base import Change, Delete, Put, Store
from tests.helpers import eventually
from tests.node.test_book import JOB, names, parts, store  # noqa: F401 - a fixture
from tests.node.test_node import hosting, job, result_of, write

SECONDS = 10.0  # in which whatever is right must have been done
OTHER = "name: other\ntopics: [t]\nscript: return 1\n"

# -- a file that goes and comes back


async def test_a_file_that_comes_back_unchanged_to_one_of_two_directories_is_defined_again(
    store: Store,  # noqa: F811 - the fixture
) -> None:
    book = Book(store)
    for origin in "ab":
        await book.take_in(parts(JOB), origin)
    await book.take_in([], "a")
    for origin in "ab":  # starts again, with what it had
        await book.take_in([] if origin == "a" else parts(JOB), origin)
    assert await names(book) == []
    assert (await book.take_in(parts(JOB), "a")).written == [("jobs", "greet")]
    assert await names(book) == ["jobs/greet"]
    await book.take_in([], "b")
    assert await names(book) == []
    await book.take_in(parts(JOB), "a")  # which has had it all the time
    assert await names(book) == []
    await book.take_in(parts(JOB), "b")
    assert await names(book) == ["jobs/greet"]


async def test_what_has_gone_from_a_directory_is_removed_once(store: Store) -> None:  # noqa: F811 - the fixture
    book = Book(store)
    for origin in "ab":
        await book.take_in(parts(JOB), origin)
    assert (await book.take_in([], "a")).removed == [("jobs", "greet")]
    await book.put("jobs", "greet", JOB.replace("return 1", "return 2"), "operator")
    assert (await book.take_in([], "a")).removed == []
    assert "return 2" in (await book.show("jobs", "greet")).text


async def test_what_was_deleted_over_http_stays_deleted_while_one_directory_loses_the_file(
    store: Store,  # noqa: F811 - the fixture
) -> None:
    book = Book(store)
    for origin in "ab":
        await book.take_in(parts(JOB), origin)
    await book.delete("jobs", "greet", "operator")
    await book.take_in([], "a")
    await book.take_in(parts(JOB), "b")
    assert await names(book) == []
    await book.take_in([], "b")
    assert await store.scan("definition/") == [], "nobody has it"


# -- many who write at once


class Slow:
    """A store that is some way off: others come in between."""

    def __init__(self, store: Store) -> None:  # noqa: F811 - the fixture's name
        self._store = store

    async def get(self, keys: Sequence[str]) -> Sequence[Any]:
        found = await self._store.get(keys)
        for _ in range(3):
            await asyncio.sleep(0)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_who_write_one_definition_on_one_node_at_once_all_get_it_written(
    store: Store,  # noqa: F811 - the fixture
) -> None:
    book = Book(cast(Store, Slow(store)))

    async def write_some(client: int) -> None:
        for number in range(4):
            await book.put("jobs", "greet", JOB.replace("return 1", f"return {client * 100 + number}"), "operator")

    results = await asyncio.gather(*map(write_some, range(40)), return_exceptions=True)
    assert [one for one in results if one is not None] == []


class Busy:
    """A store in which somebody else has changed each page before we do."""

    def __init__(self, store: Store) -> None:  # noqa: F811 - the fixture's name
        self._store = store

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        return [None for _ in changes]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_definition_that_others_change_all_the_time_is_the_same_error_for_every_verb(
    store: Store,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.node.book.PAUSE", (0.0, 0.0))
    await Book(store).put("jobs", "greet", JOB, "operator")
    book = Book(cast(Store, Busy(store)))
    for verb in (
        book.delete("jobs", "greet", "operator"),
        book.put("jobs", "greet", JOB, "operator"),
        book.put_all(JOB, "operator"),
        book.take_in(parts(OTHER), "here"),
    ):
        with pytest.raises(BrokerUnavailable, match="by others all the time"):
            await verb


# -- a store that was emptied


async def test_the_book_tells_that_it_was_emptied_and_not_that_something_was_taken_out(
    store: Store,  # noqa: F811 - the fixture
) -> None:
    book, both = Book(store), [*parts(JOB), *parts(OTHER)]
    await book.take_in(both, "here")
    await book.take_in(both, "there")
    await book.read()
    assert not book.has_lost(both, "here")
    assert not book.has_lost([], "here")
    await book.delete("jobs", "greet", "operator")
    await book.delete("jobs", "other", "operator")
    await book.read()
    assert not book.has_lost(both, "here"), "deleted over HTTP, and known"
    await book.take_in(parts(JOB), "there")  # another node of that name
    await book.read()
    assert not book.has_lost(both, "there")
    await _empty(store)
    await book.read()
    assert book.has_lost(both, "here")
    await book.take_in(both, "there")
    await book.read()
    assert book.has_lost(both, "here"), "another node has been first"
    await store.apply([Put(f"definition/jobs/{name}", b"\xc1") for name in ("greet", "other")])
    await book.read()
    assert not book.has_lost(both, "here"), "a later version's, to be left alone"


async def _empty(store: Store) -> None:  # noqa: F811 - the fixture's name
    await store.apply([Delete(entry.key) for entry in await store.scan("")])


async def test_a_store_that_was_emptied_is_told_again_what_the_directory_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LOOK_AGAIN", 0.1)
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        for _ in range(2):
            await _empty(node.store)
            assert await names(node.book) == []
            await eventually(lambda: _named(node, ["jobs/job"]), "the definition")
        write(tmp_path, b="- nonsense\n")
        await eventually(lambda: node.complaints, "a complaint")
        await _empty(node.store)
        await eventually(lambda: _named(node, ["jobs/job"]), "the definition, though another file is wrong")
        assert await result_of(node) == 1


async def test_a_directory_that_cannot_be_read_when_the_store_was_emptied_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "LOOK_AGAIN", 0.1)
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:

        def stale(self: Folder) -> Any:
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(Folder, "read", stale)
        await _empty(node.store)
        await eventually(lambda: _named(node, ["jobs/job"]), "the definition, as it was read before")
        assert await result_of(node) == 1
    assert "Stale file handle" in caplog.text


async def test_looking_again_brings_nothing_back_that_was_deleted_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LOOK_AGAIN", 0.01)
    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        await node.book.delete("jobs", "job", "operator")
        before = await node.store.scan("definition")
        looks, read = 0, node.book.read

        async def counted() -> Any:
            nonlocal looks
            looks += 1
            return await read()

        monkeypatch.setattr(node.book, "read", counted)
        await eventually(lambda: looks > 10, "some looks at the store")
        assert await node.store.scan("definition") == before


async def _named(node: Node, wanted: list[str]) -> bool:
    return await names(node.book) == wanted


# -- folders that move


@pytest.fixture
async def changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncIterator[None]]:
    """Of a directory with `old/a.yml` in it, from its first look on; the next one by itself is far off."""
    monkeypatch.setattr(folder_module, "MOST_QUIET", 1000)
    for name in ("out", "dir"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out", new__b=job("return 1", "b"))
    write(tmp_path / "dir", old__a=job("return 1", "a"))
    folder = Folder(tmp_path / "dir")
    assert await asyncio.to_thread(folder.read)
    following = folder.changes()
    await anext(following)
    yield following
    await following.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "target"), [("out/new", "dir/new"), ("dir/old", "out/old"), ("dir/old", "dir/v1.2")]
)
async def test_a_folder_that_is_moved_is_seen(
    tmp_path: Path, changes: AsyncIterator[None], source: str, target: str
) -> None:
    os.rename(tmp_path / source, tmp_path / target)
    async with asyncio.timeout(SECONDS):
        await anext(changes)


@pytest.mark.parametrize(
    ("change", "path", "concerns"),
    [
        ("added", "new", True),
        ("added", "new.v1", True),
        ("added", ".git", False),
        ("added", ".git/refs", False),
        ("added", "new/__pycache__", False),
        ("added", "plain", False),
        ("modified", "new", False),
        ("modified", "old/a.yml", True),
        ("deleted", "old", True),
        ("deleted", "new", False),
        ("deleted", "ol", False),
        ("deleted", "penstock.db-journal", False),
    ],
)
def test_only_folders_that_may_hold_definitions_are_told(
    tmp_path: Path, change: str, path: str, concerns: bool
) -> None:
    for name in ("old", "new.v1", ".git/refs", "new/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "plain").write_text("")
    write(tmp_path, old__a=job("return 1"))
    folder = Folder(tmp_path)
    folder.read()
    assert folder._concerns(change, str(tmp_path / path)) == concerns


# -- what is said of a file that is wrong


async def test_the_same_mistake_in_a_file_that_was_written_again_is_logged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> int:
        return sum(record.message.startswith("b.yml:1: ") for record in caplog.records)

    write(tmp_path, a=job("return 1"))
    async with hosting(tmp_path) as node:
        with caplog.at_level(logging.ERROR, "penstock.node"):
            for number in range(1, 4):
                write(tmp_path, b=f"- topics: [a]\n  script: return {number}\n")
                await eventually(lambda: told() >= number, "it was logged")  # noqa: B023 - awaited in its turn
            write(tmp_path, c="- topics: [a]\n  script: pass\n")
            await eventually(lambda: len(node.complaints) == 2, "another file is wrong too")
    assert told() == 3


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("on", 'key true is not text: quote it, as "on"'),
        ("no", 'key false is not text: quote it, as "no"'),
        ("1", 'key 1 is not text: quote it, as "1"'),
        ("~", 'key null is not text: quote it, as "~"'),
        ("2001-01-01", 'key 2001-01-01 is not text: quote it, as "2001-01-01"'),
    ],
)
def test_a_key_of_a_configuration_that_is_not_text_is_named_with_its_line(key: str, says: str) -> None:
    with pytest.raises(InvalidDefinitions) as caught:
        read_text("configs/odd.yml", f"# about\na: 1\n{key}: 2\nb: 3\n".encode())
    assert [str(one) for one in caught.value.problems] == [f"configs/odd.yml:3: {says}"]
    read_text("configs/odd.yml", f'a: 1\n"{key}": 2\n'.encode())
