"""What the YAML files of a directory define, and what is said of those that are wrong."""

from __future__ import annotations

import asyncio
import resource
import time
import traceback
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from penstock import ConfigError
from penstock.node import documents
from penstock.node.definitions import (
    Definitions,
    FunctionDefinition,
    JobDefinition,
    WorkerDefinition,
    read_texts,
)
from penstock.node.documents import InvalidDefinitions, Place
from penstock.node.folder import Folder

WORKER = """\
- name: consumer
  category: example
  mode: multi
  script: |-
    async def consume():
        while Runtime.running():
            await asyncio.sleep(1)
"""
JOB = """\
- name: example
  topics:
  - hello
  - world
  script: |-
    if task.topic == "hello":
        qprint("Hello, {}".format(task.content.name))
    elif task.topic == "world":
        qprint("Bye, {}".format(task.content.name))
"""
FUNCTION = """\
category: example
name: SQSProducer
code: |-
  async def SQSProducer(message):
      return message
"""


def read(**files: str) -> Definitions:
    return read_texts({name.replace("__", "/") + ".yml": text.encode() for name, text in files.items()})


def problems(**files: str) -> list[str]:
    with pytest.raises(InvalidDefinitions) as raised:
        read(**files)
    assert str(raised.value) == "\n".join(map(str, raised.value.problems))
    return [str(problem) for problem in raised.value.problems]


def run(code: CodeType, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


# -- the documents' forms


def test_a_worker() -> None:
    found = read(workers=WORKER).workers["consumer"]
    assert isinstance(found, WorkerDefinition)
    assert (found.mode, found.category, found.function) == ("multi", "example", "consume")
    assert found.place == Place("workers.yml", 1)
    assert found.watch_interval is None


def test_a_job() -> None:
    found = read(jobs=JOB).jobs["example"]
    assert isinstance(found, JobDefinition)
    assert found.topics == ("hello", "world")
    said: list[str] = []
    assert found.code is not None

    class Content:
        name = "amuro"

    class Record:
        topic, content = "world", Content

    asyncio.run(run(found.code, qprint=said.append)["job"](Record))
    assert said == ["Bye, amuro"]


def test_a_function_alone_in_its_file() -> None:
    found = read(functions=FUNCTION).functions["SQSProducer"]
    assert isinstance(found, FunctionDefinition)
    assert asyncio.run(run(found.code)["SQSProducer"]("hi")) == "hi"


def test_configurations_are_named_by_their_files() -> None:
    found = read(configs__handson="region: ap-northeast-1\nsqs: {queue_name: q}\n", configs__deep__one="a: 1\n")
    assert found.configs["handson"].values == {"region": "ap-northeast-1", "sqs": {"queue_name": "q"}}
    assert set(found.configs) == {"handson", "deep/one"}


def test_a_job_script_may_await_and_return() -> None:
    code = read(jobs="name: j\ntopics: [t]\nscript: |\n  if task:\n    return await wait()\n  x = 1\n").jobs["j"].code
    assert code is not None

    async def wait() -> str:
        return "waited"

    job = run(code, wait=wait)["job"]
    assert asyncio.run(job(1)) == "waited"
    assert asyncio.run(job(0)) is None


def test_the_function_of_several_that_has_the_workers_name() -> None:
    text = "name: second\nmode: multi\nscript: |\n  import os\n  def first(x): ...\n  async def second(): ...\n"
    assert read(w=text).workers["second"].function == "second"


def test_a_job_that_injects_code_needs_no_script() -> None:
    found = read(j="name: bot\ntopics: [neo]\nslack: {token: xoxb, code_injection: true}\n").jobs["bot"]
    assert found.code is None
    assert found.slack is not None
    assert found.slack.app_token is None
    assert found.slack.code_injection


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "deep" / "er" / "w.yaml").write_text(WORKER)
    (tmp_path / "jobs.yml").write_text(JOB)
    (tmp_path / "configs" / "handson.yml").write_text("a: 1")
    (tmp_path / "requirements.txt").write_text("aiokafka\n")
    (tmp_path / ".git" / "x.yml").write_text("]")
    (tmp_path / "empty.yml").write_text("# nothing\n")
    found = Folder(tmp_path).read()
    assert (set(found.workers), set(found.jobs), set(found.configs)) == ({"consumer"}, {"example"}, {"handson"})
    with pytest.raises(ConfigError, match="is not a directory"):
        Folder(tmp_path / "none").read()


def test_what_is_merged_counts_too() -> None:
    text = "- &base {name: a, mode: multi, script: 'def a(): ...'}\n- <<: *base\n  name: b\n  script: 'def b(): ...'\n"
    assert {name: one.mode for name, one in read(w=text).workers.items()} == {"a": "multi", "b": "multi"}


def test_errors_in_scripts_name_the_line_of_the_file() -> None:
    code = read(workers=WORKER.replace("await asyncio.sleep(1)", "raise ValueError")).workers["consumer"].code

    class Runtime:
        @staticmethod
        def running() -> bool:
            return True

    with pytest.raises(ValueError) as raised:  # noqa: PT011 - it is the script's
        asyncio.run(run(code, Runtime=Runtime)["consume"]())
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == ("workers.yml", 7)


# -- all that is wrong, at once


def test_all_problems_of_all_files_are_told_in_one_go() -> None:
    assert problems(
        a="- name: one\n  mode: sngle\n  script: |\n    def one(:\n      pass\n- name: two\n  topics: []\n",
        b=FUNCTION + "colour: red\n",
        c="]",
    ) == [
        "a.yml:2: mode is 'single' or 'multi' (did you mean 'single'?), not 'sngle'",
        "a.yml:4: not Python: invalid syntax",
        "a.yml:6: a job needs 'script'",
        "a.yml:7: topics is a list of names, not []",
        "b.yml:6: a function has no key 'colour'",
        "c.yml:1: not YAML: while parsing a block node did not find expected node content",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\n", "x.yml:1: its kind is not clear: 'mode' and 'script' make a worker"),
        ("name: a\nmode: multi\ncode: x\n", "x.yml:1: it is a worker and a function at once"),
        ("- 1\n", "x.yml:1: a definition is a mapping of keys"),
        ("just text\n", "x.yml:1: a definition is a mapping of keys"),
        ("name: a\nname: b\nmode: multi\nscript: 'def b(): ...'\n", "x.yml:2: the key 'name' is there twice"),
        ("[1]: a\nmode: multi\nname: x\nscript: 'def b(): ...'\n", "x.yml:1: a key is a word"),
        ("mode: multi\nscript: 'def b(): ...'\n", "x.yml:1: a worker needs 'name'"),
        ("name: 7\nmode: multi\nscript: 'def b(): ...'\n", "x.yml:1: name is text of 1 to 240 bytes"),
        ("name: a/b\nmode: multi\nscript: 'def b(): ...'\n", "x.yml:1: name is text of 1 to 240 bytes"),
        ("name: w\nmode: multi\n", "x.yml:1: a worker needs 'script'"),
        ("name: w\nmode: multi\nscript: 5\n", "x.yml:3: script is text and not empty, not 5"),
        ("name: w\nmode: multi\nscript: |\n\n  x = 1\n", "x.yml:4: the script defines no function"),
        (
            "name: w\nmode: multi\nscript: |\n  def a(): ...\n  def b(): ...\n",
            "x.yml:5: the script defines a, b: one of",
        ),
        ("name: w\nmode: multi\nscript: |\n  def a(b): ...\n", "x.yml:4: a is called without arguments, and wants b"),
        (
            "name: w\nmode: multi\nscript: |\n  def a(*, b): ...\n",
            "x.yml:4: a is called without arguments, and wants b",
        ),
        ("name: w\nmode: multi\nscript: |\n  async def a():\n    yield 1\n", "x.yml:4: a is a generator"),
        ("name: w\nmode: multi\nscript: |\n  async def a():\n    x = 1 +\n", "x.yml:5: not Python: invalid syntax"),
        ("name: w\nmode: multi\nscript: |\n  def a():\n    await b\n", "x.yml:5: not Python: 'await' outside async"),
        ("name: w\nmode: multi\nscript: 'def a(): ...'\nwatch_interval: soon\n", "x.yml:4: watch_interval is a number"),
        ("name: f\ncode: |\n  def g(): ...\n", "x.yml:3: the code must define the function 'f': it defines g"),
        ("name: f g\ncode: 'def f(): ...'\n", "x.yml:1: name is a name that Python knows"),
        ("name: j\ntopics: hello\n", "x.yml:1: a job needs 'script'"),
        ("name: j\ntopics: [1]\nscript: pass\n", "x.yml:2: topics is a list of names, not [1]"),
        ("name: j\ntopics: [a]\nscript: '# none'\n", "x.yml:3: the script is empty"),
        ("name: j\ntopics: [a]\nscript: pass\nslack: {}\n", "x.yml:4: slack needs 'token'"),
        ("name: j\ntopics: [a]\nscript: pass\nslack: 5\n", "x.yml:4: slack is a mapping of keys"),
        (
            "name: j\ntopics: [a]\nscript: pass\nslack: {token: x, tocken: y}\n",
            "slack has no key 'tocken' (did you mean",
        ),
        (
            "name: j\ntopics: [a]\nscript: pass\nslack: {token: x, code_injection: 1}\n",
            "code_injection is true or false",
        ),
        ("a: !!python/object:os.system x\n", "x.yml:1: its kind is not clear"),
        ("name: !!python/object/new:os.system [x]\nmode: multi\nscript: pass\n", "could not determine a constructor"),
        ("a: 1\n--- \nb: 2\n", "x.yml:2: not YAML: expected a single document"),
        ("a: \x00\n", "not YAML"),
        ("a: &x [*x]\nmode: multi\n", "members"),
    ],
)
def test_a_definition_that_cannot_be(text: str, problem: str) -> None:
    assert problem in "\n".join(problems(x=text))


def test_names_are_unique_within_a_kind() -> None:
    twice = problems(a=WORKER, b="\n" + WORKER)
    assert twice == ["b.yml:2: another worker is named 'consumer': a.yml:1"]
    read(a=WORKER, b=JOB.replace("example", "consumer"))


@pytest.mark.parametrize("text", ["- a\n", "5\n"])
def test_a_configuration_that_is_no_mapping(text: str) -> None:
    assert problems(configs__x=text) == ["configs/x.yml:1: a configuration is a mapping of names"]


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert problems(configs__x=bomb) == ["configs/x.yml:1: its aliases stand for more than 100000 members"]
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert problems(configs__x="a: &a 1\nb: [" + "*a, " * 101 + "]\n") == [
        "configs/x.yml:2: it has more than 100 aliases"
    ]


def test_what_is_too_deep_or_too_large_is_refused() -> None:
    assert problems(x="[" * 5000) == ["x.yml:1: it is nested more than 100 deep"]
    assert problems(x="#" * (documents.MAX_FILE + 1)) == ["x.yml:1: a file may hold 1048576 bytes"]
    deep = "name: w\nmode: multi\nscript: 'def w(): " + "(" * 3000 + "'\n"
    assert problems(x=deep)[0].startswith("x.yml:3: not Python: ")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.yml").write_text(WORKER)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inside.yml").write_text(JOB)
    (tmp_path / "dir" / "link.yml").symlink_to(tmp_path / "outside.yml")
    (tmp_path / "dir" / "gone.yml").symlink_to(tmp_path / "dir" / "nowhere")
    with pytest.raises(InvalidDefinitions) as raised:
        Folder(tmp_path / "dir").read()
    gone, link = map(str, raised.value.problems)
    assert gone == "gone.yml:1: cannot be read: No such file or directory"
    assert link.startswith("link.yml:1: 'link.yml' leads out of ")
