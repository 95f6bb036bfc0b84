"""The book: what a directory and operators write of definitions, and how they get along."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from penstock import BrokerUnavailable, UnknownDefinition
from penstock.node.book import Book
from penstock.node.definitions import Definition, JobDefinition, read_text
from penstock.node.documents import InvalidDefinitions
from penstock.node.folder import Folder, all_of
from penstock.stores import registry
from penstock.stores.base import Change, Delete, Put, Store

WORKER = """\
# the first
- name: one
  mode: multi
  script: |-
    async def one():

        raise ValueError("here")
- name: two
  category: x
  mode: single
  script: |
    def two(): pass
"""
JOB = "name: greet\ntopics: [hello]\nscript: return 1\n"


@pytest.fixture(params=["memory://", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    url = request.param if "://" in request.param else f"sqlite:///{tmp_path}/book.db"
    made = registry.connect(url)
    await made.open()
    yield made
    await made.close()


def parts(text: str, file: str = "w.yml") -> list[Definition]:
    return read_text(file, text.encode())


async def names(book: Book) -> list[str]:
    return [
        f"{kind}/{one.name}" for kind in ("workers", "jobs", "functions", "configs") for one in await book.list(kind)
    ]


async def test_a_definition_keeps_its_file_and_lines(store: Store) -> None:
    await Book(store).take_in(parts(WORKER), "here")
    found, problems = await Book(store).read()
    assert not problems
    assert list(found.workers) == ["one", "two"]
    assert str(found.workers["one"].place) == "w.yml:2"
    assert str(found.workers["two"].place) == "w.yml:8"
    (shown,) = [one for one in await Book(store).list("workers") if one.name == "two"]
    assert (shown.file, shown.line, shown.category, shown.by) == ("w.yml", 8, "x", "here")
    assert shown.text.startswith("name: two\ncategory: x\n")
    space: dict[str, object] = {}
    exec(found.workers["one"].code, space)
    with pytest.raises(ValueError, match="here") as raised:
        await space["one"]()  # type: ignore[operator]
    trace = raised.value.__traceback__
    assert trace is not None
    assert trace.tb_next is not None
    assert trace.tb_next.tb_lineno == 7
    assert trace.tb_next.tb_frame.f_code.co_filename == "w.yml"


@pytest.mark.parametrize(
    "text",
    [
        "- &base {name: a, mode: multi, script: 'def a(): pass'}\n- {<<: *base, name: b}\n",
        "[{name: a, mode: multi, script: 'def a(): pass'}, {name: b, topics: [t],\n script: return 1}]",
        "- name: a\n  mode: multi\n  script: |\n    def a():\n        x = '''\n   \n        '''\n        return x\n",
        "\ufeff- name: ä\n  topics: ['ö', x]\n  script: |-\n    return 'ü'   \n\n\n\n# the end\n",
        "-   name: a\n    topics: t\n    script: >\n      return\n      1\n",
    ],
)
async def test_what_is_written_means_what_the_file_means(store: Store, text: str) -> None:
    before = parts(text)
    await Book(store).take_in(before, "here")
    found, problems = await Book(store).read()
    assert not problems
    after = all_of(found)
    for one in before:
        (same,) = [other for other in after if other.name == one.name]
        assert (type(same), getattr(same, "script", None)) == (type(one), getattr(one, "script", None))


@pytest.mark.parametrize("before", ["", "\n", "\n# about it\n\n---\n# more\n"])
async def test_lines_are_the_files_whatever_stands_before_a_definition(store: Store, before: str) -> None:
    given = read_text("a.yml", (before + JOB).encode())
    await Book(store).take_in(given, "folder")
    found, problems = await Book(store).read()
    assert not problems
    (read,) = found.jobs.values()
    assert read.place == given[0].place
    assert isinstance(given[0], JobDefinition)
    assert read.code is not None
    assert given[0].code is not None
    assert read.code.co_consts[0].co_firstlineno == given[0].code.co_consts[0].co_firstlineno
    assert read.text == given[0].text, "comments stay"


async def test_reading_the_same_directory_again_changes_nothing(store: Store) -> None:
    book = Book(store)
    first = await book.take_in(parts(WORKER), "here")
    assert len(first.written) == 2
    versions = [entry.version for entry in await store.scan("definition/")]
    assert not (await book.take_in(parts(WORKER), "here")).written
    assert [entry.version for entry in await store.scan("definition/")] == versions
    assert not (await book.take_in(parts(WORKER), "there")).written


async def test_what_leaves_a_directory_is_removed_and_another_directorys_stays(store: Store) -> None:
    book = Book(store)
    await book.take_in(parts(WORKER), "here")
    await book.take_in(parts(JOB, "j.yml"), "there")
    taken = await book.take_in(parts(WORKER)[:1], "here")
    assert taken.removed == [("workers", "two")]
    assert await names(book) == ["workers/one", "jobs/greet"]


async def test_an_operators_change_stands_until_the_file_changes(store: Store) -> None:
    book = Book(store)
    await book.take_in(parts(JOB, "j.yml"), "here")
    await book.put("jobs", "greet", JOB.replace("return 1", "return 2"), "operator")
    await book.take_in(parts(JOB, "j.yml"), "here")
    assert "return 2" in (await book.show("jobs", "greet")).text
    await book.take_in(parts(JOB.replace("return 1", "return 3"), "j.yml"), "here")
    shown = await book.show("jobs", "greet")
    assert "return 3" in shown.text
    assert shown.by == "here"


async def test_what_an_operator_deleted_does_not_come_back_by_itself(store: Store) -> None:
    book = Book(store)
    await book.take_in(parts(JOB, "j.yml"), "here")
    await book.delete("jobs", "greet", "operator")
    await book.take_in(parts(JOB, "j.yml"), "here")
    assert await names(book) == []
    found, _ = await book.read()
    assert not found.jobs
    with pytest.raises(UnknownDefinition):
        await book.delete("jobs", "greet", "operator")
    await book.take_in(parts(JOB.replace("return 1", "return 3"), "j.yml"), "here")
    assert await names(book) == ["jobs/greet"]


async def test_what_an_operator_made_is_the_operators_to_delete(store: Store) -> None:
    book = Book(store)
    await book.put("jobs", "greet", JOB, "operator")
    await book.take_in([], "here")
    assert await names(book) == ["jobs/greet"]
    await book.delete("jobs", "greet", "operator")
    assert await store.scan("definition/") == []


@pytest.mark.parametrize(
    ("kind", "name", "text", "says"),
    [
        ("jobs", "greet", JOB.replace("greet", "other"), "should define jobs/greet, and defines jobs/other"),
        ("workers", "greet", JOB, "should define workers/greet, and defines jobs/greet"),
        ("jobs", "greet", f"- {JOB.replace(chr(10), chr(10) + '  ')}\n- {{name: x, topics: t, script: x}}", "defines"),
        ("jobs", "greet", "", "defines nothing"),
        ("jobs", "greet", JOB + "colour: red\n", "no key 'colour'"),
        ("jobs", "greet", "name: greet\ntopics: [hello]\nscript: |\n  return (\n", "not Python"),
        ("jobs", "greet", "\ud800", "surrogate"),
        ("configs", "db", "- a list", "mapping"),
    ],
)
async def test_what_is_wrong_with_one_changes_nothing(store: Store, kind: str, name: str, text: str, says: str) -> None:
    book = Book(store)
    await book.put("jobs", "greet", JOB, "operator")
    before = await store.scan("")
    with pytest.raises(InvalidDefinitions, match=says):
        await book.put(kind, name, text, "operator")
    assert await store.scan("") == before


async def test_a_whole_file_is_written_or_nothing_of_it(store: Store) -> None:
    book = Book(store)
    with pytest.raises(InvalidDefinitions) as raised:
        await book.put_all(WORKER + "- name: one\n  mode: multi\n  script: 'def one(): pass'\n", "operator")
    assert [str(one) for one in raised.value.problems] == ["-:13: another of the workers is named 'one'"]
    assert await store.scan("") == []
    stored = await book.put_all(WORKER, "operator")
    assert [one.name for one in stored] == ["one", "two"]


class Dying:
    """A store that makes so many changes, each by itself, and is away from then on."""

    def __init__(self, store: Store, changes: int) -> None:
        self._store, self._left = store, changes

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        outcomes: list[int | None] = []
        for change in changes:
            if not self._left:
                raise BrokerUnavailable("away")
            self._left -= 1
            outcomes += await self._store.apply([change])
        return outcomes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("changes", range(6))
async def test_a_store_that_goes_away_in_the_midst_of_a_file_has_all_of_it_or_nothing(
    store: Store, changes: int
) -> None:
    await Book(store).put("jobs", "greet", JOB, "operator")
    await Book(store).take_in(parts(WORKER), "folder")
    text = WORKER.replace("here", "there") + "- name: three\n  mode: multi\n  script: 'def three(): pass'\n"
    with contextlib.suppress(BrokerUnavailable):
        await Book(cast(Store, Dying(store, changes))).put_all(text, "operator")
    found, _ = await Book(store).read()
    written = ["one", "two", "three"] if changes else ["one", "two"]
    assert sorted(found.workers) == sorted(written)
    assert ("there" in found.workers["one"].script) == bool(changes)
    assert found.workers["one"].place.file == "w.yml", "what the directory said is known still"
    assert await names(Book(store)) == [*(f"workers/{name}" for name in sorted(written)), "jobs/greet"]
    await Book(store).put("workers", "one", parts(WORKER)[0].text, "operator")
    assert "here" in (await Book(store).read())[0].workers["one"].script


class Late:
    """A store that waits before a change is made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.there, self.go = asyncio.Event(), asyncio.Event()

    async def apply(self, changes: Sequence[Change]) -> list[int | None]:
        self.there.set()
        await self.go.wait()
        return await self._store.apply(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_who_is_late_with_a_file_undoes_nothing_that_came_after_it(store: Store) -> None:
    with contextlib.suppress(BrokerUnavailable):
        await Book(cast(Store, Dying(store, 1))).put_all(WORKER, "operator")
    late = Late(store)
    reading = asyncio.create_task(Book(cast(Store, late)).read())
    await late.there.wait()
    await Book(store).put("workers", "one", parts(WORKER.replace("here", "there"))[0].text, "operator")
    late.go.set()
    found, _ = await reading
    assert "there" in found.workers["one"].script
    assert sorted(found.workers) == ["one", "two"]


async def test_a_kind_or_name_that_there_is_not_suggests_one(store: Store) -> None:
    book = Book(store)
    await book.put("jobs", "greet", JOB, "operator")
    with pytest.raises(UnknownDefinition, match="did you mean 'greet'"):
        await book.show("jobs", "gret")
    with pytest.raises(UnknownDefinition, match="did you mean 'jobs'"):
        await book.list("job")
    with pytest.raises(UnknownDefinition):
        await book.show("jobs", "a\0b")


async def test_a_configurations_secrets_are_not_shown_and_survive_an_edit(store: Store) -> None:
    book = Book(store)
    await book.put("configs", "aws/handson", "region: eu\naws_secret_access_key: geheim\n", "operator")
    shown = await book.show("configs", "aws/handson")
    assert "geheim" not in shown.text
    await book.put("configs", "aws/handson", shown.text.replace("eu", "us"), "operator")
    found, _ = await book.read()
    assert found.configs["aws/handson"].values == {"region": "us", "aws_secret_access_key": "geheim"}
    with pytest.raises(InvalidDefinitions, match="stands for a secret"):
        await book.put("configs", "new", "password: '***'", "operator")


def test_only_changed_files_are_parsed_again(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(JOB)
    (tmp_path / "b.yml").write_text(WORKER)
    folder = Folder(tmp_path)
    first = folder.read()
    (tmp_path / "a.yml").write_text(JOB.replace("hello", "world"))
    second = folder.read()
    assert second.jobs["greet"].topics == ("world",)
    assert second.workers["one"] is first.workers["one"]
    (tmp_path / "b.yml").unlink()
    assert not folder.read().workers


async def test_a_node_that_starts_again_with_old_files_brings_nothing_old_back(store: Store) -> None:
    book = Book(store)
    old, new = parts(JOB, "j.yml"), parts(JOB.replace("return 1", "return 2"), "j.yml")
    await book.take_in(old, "a")
    await book.take_in(old, "b")
    await book.take_in(new, "a")
    await book.take_in(old, "b")
    assert "return 2" in (await book.show("jobs", "greet")).text
    await book.put("jobs", "greet", JOB.replace("return 1", "return 3"), "operator")
    await book.take_in(new, "b")  # which says what was taken in before
    assert "return 3" in (await book.show("jobs", "greet")).text
    await book.take_in(old, "a")  # somebody goes back
    assert "return 1" in (await book.show("jobs", "greet")).text


async def test_a_name_that_no_key_can_hold_is_refused_and_wedges_nothing(store: Store) -> None:
    book, long = Book(store), "f" * 3000
    with pytest.raises(InvalidDefinitions, match="bytes"):
        await book.put("functions", long, f"name: {long}\ncode: 'def {long}(): pass'\n", "operator")
    with pytest.raises((InvalidDefinitions, UnknownDefinition)):
        await book.put("configs", long, "a: 1\n", "operator")
    await book.put("jobs", "greet", JOB, "operator")
    assert await names(book) == ["jobs/greet"]


async def test_a_draft_of_another_version_is_left_alone_until_somebody_writes(store: Store) -> None:
    await store.apply([Put("definitions-draft", b"\xc1")])
    book = Book(store)
    assert (await book.read())[1] == []
    assert (await store.get(["definitions-draft"]))[0] is not None
    await book.put("jobs", "greet", JOB, "operator")
    assert await names(book) == ["jobs/greet"]
    assert await store.get(["definitions-draft"]) == [None]


async def test_a_named_node_is_the_same_wherever_it_runs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book(store)
    (tmp_path / "a.yml").write_text(JOB)
    for name, left in ((None, ["jobs/greet"]), ("alpha", [])):
        for host, text in (("container-1", JOB), ("container-2", "")):
            monkeypatch.setattr("socket.gethostname", lambda host=host: host)
            (tmp_path / "a.yml").write_text(text)
            folder = Folder(tmp_path, name)
            await book.take_in(all_of(await asyncio.to_thread(folder.read)), folder.origin)
        assert await names(book) == left, name
        if left:
            await book.delete("jobs", "greet", "operator")
            await store.apply([Delete("definition/jobs/greet")])


async def test_what_leaves_one_of_several_directories_does_not_come_back_from_the_others(store: Store) -> None:
    book = Book(store)
    for origin in "abc":
        await book.take_in(parts(JOB, "j.yml"), origin)
    assert (await book.take_in([], "a")).removed == [("jobs", "greet")]
    await book.take_in(parts(JOB, "j.yml"), "b")
    await book.take_in(parts(JOB, "j.yml"), "d")  # a new node with the old files
    assert await names(book) == []
    for origin in "bcd":
        await book.take_in([], origin)
    assert await store.scan("definition/") == []
    await book.take_in(parts(JOB, "j.yml"), "a")
    assert await names(book) == ["jobs/greet"]
