"""The console: Python's own rules for lines, each shell its own names and output, and nothing that ends the node."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock import App
from penstock.control.console import (
    MOST_INPUT,
    End,
    Hello,
    Interrupt,
    Left,
    Line,
    Output,
    Problem,
    Prompt,
    Run,
    Shown,
    Told,
)
from penstock.node import console as console_module
from penstock.node import inputs as inputs_module
from penstock.node import printed, scripts
from penstock.node.console import MOST_AHEAD, Console, Session, TooManySessions
from penstock.node.inputs import SMALL, Inputs, problem_of, whole
from penstock.node.node import Node, NodeOptions
from penstock.node.printed import Screen
from tests.helpers import eventually

JOB = """
name: example
topics: [hello]
script: |
  qprint("Hello, {}".format(task.content.name))
"""
FUNCTION = """name: shout
code: |
  def shout(text):
      print(text.upper())
      if not text:
          raise ValueError("nothing to shout")
"""
_numbers = itertools.count(1)


class Shell:
    """Types into a session, and reads what it says."""

    def __init__(self, session: Session, records: list[tuple[str, str]]) -> None:
        self.session = session
        self.records = records
        self._said: asyncio.Queue[Told | None] = asyncio.Queue()
        self._taking = asyncio.create_task(self._take())

    async def _take(self) -> None:
        while (message := await self.session.told()) is not None:
            self._said.put_nowait(message)
        self._said.put_nowait(None)

    async def told(self) -> Told | None:
        """What is said next; None: nothing more."""
        async with asyncio.timeout(20):
            return await self._said.get()

    async def until(self, kind: type[Any]) -> list[Told]:
        """What is said, up to the first of a kind."""
        said: list[Told] = []
        while not said or not isinstance(said[-1], kind):
            message = await self.told()
            assert message is not None, said
            said.append(message)
        return said

    async def types(self, *lines: str) -> tuple[Prompt, str, str]:
        """The last prompt, what was printed, and what went wrong."""
        said: list[Told] = []
        for line in lines:
            self.session.hear(Line(line))
            said += await self.until(Prompt)
        prompt = said[-1]
        assert isinstance(prompt, Prompt)
        printed = "".join(one.text for one in said if isinstance(one, Output))
        return prompt, printed, "".join(one.text for one in said if isinstance(one, Problem))

    async def runs(self) -> asyncio.Task[Any]:
        """An input that has begun."""
        await eventually(lambda: self.session._running is not None)
        running = self.session._running
        assert running is not None
        await asyncio.sleep(0)
        return running

    async def prints(self, *lines: str) -> str:
        prompt, printed, wrong = await self.types(*lines)
        assert prompt == Prompt(False, "ok"), wrong
        return printed


@contextlib.asynccontextmanager
async def opened(console: Console, who: str = "somebody") -> AsyncIterator[Shell]:
    records: list[tuple[str, str]] = []

    async def record(text: str, outcome: str) -> None:
        records.append((text, outcome))

    async with console.session(who, record) as session:
        shell = Shell(session, records)
        assert isinstance((await shell.until(Prompt))[0], Hello)
        yield shell


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "job.yml").write_text(JOB)
    (folder / "function.yml").write_text(FUNCTION)
    app = App(f"memory://console-{os.getpid()}-{next(_numbers)}", grace=2.0)
    async with Node(folder, app, NodeOptions(console=True, name="alpha")) as one:
        yield one


@pytest.fixture
def console(node: Node) -> Console:
    assert node.console is not None
    return node.console


@pytest.fixture
async def shell(console: Console) -> AsyncIterator[Shell]:
    async with opened(console) as one:
        yield one


# -- lines


@pytest.fixture(params=[SMALL, 0], ids=["short", "long"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs as if they were short, and as if they were long."""
    monkeypatch.setattr(inputs_module, "SMALL", request.param)


def continues(*lines: str) -> list[bool]:
    """After each line, whether another one is waited for."""
    inputs = Inputs()
    found = []
    for line in lines:
        code = inputs.add(line)
        assert code is None or not inputs.open
        found.append(bool(inputs.open))
    return found


@pytest.mark.parametrize(
    ("lines", "more"),
    [
        (["x = 1"], [False]),
        (["", "  "], [False, False]),
        (["await f()", ""], [True, False]),
        (["x = await f()", "print(x)", ""], [True, True, False]),
        (["for x in y:", "    x", ""], [True, True, False]),
        (["async def f():", "    await g()", "", "f()"], [True, True, False, False]),
        (["await f()", "for x in y:", "    await x", ""], [True, True, True, False]),
        (["await f(", "", ")", ""], [True, True, True, False]),
        (["x = '''a", "", "b'''"], [True, True, False]),
        (["await f('''a", "", "b''')", ""], [True, True, True, False]),
        (["async with x:", "    pass", ""], [True, True, False]),
        (["# nothing"], [False]),
        (["await f()\r\n", "\r\n"], [True, False]),
        (["x = \\", "1"], [True, False]),
        (["x = f(", "    a,", "    b)"], [True, True, False]),
        (["x = '''", "# (", "  '", "\\'''", "'''"], [True, True, True, True, False]),
        (["x = ['(', # [", '"a\\', 'b{", """', '"""]'], [True, True, True, False]),
        (["if f(", "  a):", "  pass", "elif b:", "  pass", "# no", "else:", "  pass", ""], [True] * 8 + [False]),
        (["def f():", "  '''", "", "  x", "", "  '''", "  return [", "", "  ]", ""], [True] * 9 + [False]),
        (["@f", "@g(", "  1)", "def f():", "    pass", "", "f()"], [True] * 5 + [False, False]),
        (["x = await f(", "  1)", "y = {", "", "}", ""], [True] * 5 + [False]),
        (["for x in y:", "  await f('''", "", "''')", "  g(x)", ""], [True] * 5 + [False]),
    ],
)
@pytest.mark.usefixtures("small")
def test_an_input_goes_on_exactly_as_long_as_it_should(lines: list[str], more: list[bool]) -> None:
    assert continues(*lines) == more


@pytest.mark.usefixtures("small")
def test_a_statement_after_a_block_without_an_empty_line_is_refused_at_once() -> None:
    inputs = Inputs()
    for line in ["def f():", *(f"    {name} = 1" for name in "abcdefghij")]:
        assert inputs.add(line) is None
    with pytest.raises(SyntaxError):
        inputs.add("f()")
    assert (inputs.open, inputs.last[-3:]) == ("", "f()")


@pytest.mark.parametrize(
    ("first", "each", "last"),
    [
        ("def f():", "    x{} = {} + g({}, a=[1, 2])", ""),
        ("def f():\n  '''", "x {} ) {} {}", "'''\n"),
        ("x = [", "({}, {}, {}),", "]"),
        ("await f()", "x{} = {} + {}", ""),
        ("if x: pass", "elif {} + {}: f({})", ""),
        ("x = '''", "{} {} {}", "'''"),
        ("for x in y:", "    await f({}, {}, {})", ""),
    ],
)
def test_a_long_input_is_not_compiled_for_each_of_its_lines(
    first: str, each: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs()
    real, compiled = inputs._compile, 0

    def counted(text: str, file: str, mode: str) -> Any:
        nonlocal compiled
        compiled += len(text)
        return real(text, file, mode)

    monkeypatch.setattr(inputs, "_compile", counted)
    lines = [*first.split("\n"), *(each.format(n, n, n) for n in range(500)), *last.split("\n")]
    *before, code = [inputs.add(line) for line in lines]
    assert not any(before)
    assert code is not None
    assert inputs.last == "\n".join(lines)
    assert compiled < 8 * len(inputs.last) + SMALL * SMALL // 8


def test_a_tree_is_compiled_while_no_other_thread_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = []

    def compiling(*given: Any, **named: Any) -> Any:
        alone.append(scripts.one_at_a_time.locked())
        return compile(*given, **named)

    monkeypatch.setattr(inputs_module, "compile", compiling, raising=False)
    whole("1 + 1")
    whole("await f()")
    assert alone == [True, True, True]


@pytest.mark.parametrize("line", ["x =", " x", "1 +* 2", "x\ny", "'", "return 1", "x = '\0'", "(" * 300 + ")" * 300])
def test_what_is_no_python_is_refused_and_forgotten(line: str) -> None:
    inputs = Inputs()
    with pytest.raises((SyntaxError, ValueError, MemoryError)):
        inputs.add(line)
    assert inputs.open == ""
    inputs.add("await f()")
    with pytest.raises(SyntaxError):
        inputs.add("x y")
    assert inputs.open == ""


def test_an_input_put_together_of_lines_has_the_same_ceiling_as_a_message() -> None:
    inputs = Inputs()
    inputs.add("x = '''" + "x" * (MOST_INPUT // 2))
    with pytest.raises(ValueError, match="at most"):
        inputs.add("x" * (MOST_INPUT // 2))
    assert inputs.open == ""


async def test_expressions_echo_and_those_with_await_do_not(shell: Shell) -> None:
    assert await shell.prints("1 + 1") == "2\n"
    assert await shell.prints("_ * 2") == "4\n"
    assert await shell.prints("None") == ""
    assert await shell.prints("_") == "4\n"
    assert await shell.prints("for x in 'ab':", "    x", "") == "'a'\n'b'\n"
    assert await shell.prints("await asyncio.sleep(0, 'x')", "") == ""
    assert await shell.prints("x = await asyncio.sleep(0, 'y')", "x", "print(x)", "") == "y\n"
    assert await shell.prints("x") == "'y'\n"


async def test_a_whole_input_is_as_if_it_were_typed(shell: Shell) -> None:
    shell.session.hear(Line("await forgotten("))
    await shell.until(Prompt)
    shell.session.hear(Run("def f():\n    return 3\nf()\n\n\nx = 1\nx + f()"))
    assert await shell.until(Prompt) == [Output("3\n4\n"), Prompt(False, "ok")]
    shell.session.hear(Run("print(await asyncio.sleep(0, 5))\nx"))
    assert await shell.until(Prompt) == [Output("5\n"), Prompt(False, "ok")]


async def test_at_the_end_what_is_open_is_run_as_it_stands(shell: Shell) -> None:
    await shell.types("await asyncio.sleep(0)", "print('x')")
    shell.session.hear(End())
    assert await shell.until(Prompt) == [Output("x\n"), Prompt(False, "ok")]
    await shell.types("x = (")
    shell.session.hear(End())
    wrong, prompt = await shell.until(Prompt)
    assert isinstance(wrong, Problem)
    assert "SyntaxError" in wrong.text
    assert prompt == Prompt(False, "failed")
    shell.session.hear(End())
    assert await shell.until(Prompt) == [Prompt()]


# -- names


async def test_the_names_are_those_of_scripts(shell: Shell) -> None:
    wanted = (
        "asyncio json aiohttp logger context qprint MU Runtime get_service_config task send waitfor callout publish"
    )
    for name in [*wanted.split(), "broadcast", "call", "debug"]:
        assert await shell.prints(f"{name} is None") == "False\n", name
    assert await shell.prints("logger.name") == "'penstock.script.console'\n"
    assert await shell.prints("context.shout('hey')") == "HEY\n"
    assert await shell.prints("'uuid' in context.settings") == "True\n"
    assert await shell.prints("Runtime.running()") == "True\n"


async def test_each_session_has_variables_of_its_own_that_live_on(console: Console, shell: Shell) -> None:
    async with opened(console) as other:
        await shell.prints("x = 1")
        await other.prints("x = 2")
        await other.prints("x")
        assert await shell.prints("x") == "1\n"
        assert await shell.prints("_") == "1\n"
        assert await other.prints("x, _") == "(2, 2)\n"
        await shell.prints("import contextvars; var = contextvars.ContextVar('var', default=0)")
        await shell.prints("token = var.set(7)")
        assert await shell.prints("var.get()") == "7\n"
    async with opened(console) as another:
        assert "NameError" in (await another.types("x"))[2]


async def test_output_goes_to_the_shell_that_ran_it_and_nowhere_else(
    console: Console, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    async with opened(console) as other:
        talk = ["for n in range(20): print('{}', n); await asyncio.sleep(0)".replace("{}", who) for who in "ab"]
        printed = await asyncio.gather(shell.prints(talk[0], ""), other.prints(talk[1], ""))
        for who, text in zip("ab", printed, strict=True):
            assert text == "".join(f"{who} {n}\n" for n in range(20))
        assert await shell.prints("import sys, pprint; pprint.pprint({'x': 1}); n = sys.stderr.write('warned')") == (
            "{'x': 1}\nwarned"
        )
        assert await shell.prints("await asyncio.to_thread(print, 'from a thread')", "") == "from a thread\n"
        print("the node's own")
    assert capsys.readouterr().out == "the node's own\n"


async def test_the_streams_are_what_they_were_once_nobody_is_there(console: Console) -> None:
    before = sys.stdin, sys.stdout, sys.stderr, sys.displayhook
    async with opened(console), opened(console):
        assert sys.stdout is not before[1]
        print("x", file=sys.stdout, flush=True)
    assert (sys.stdin, sys.stdout, sys.stderr, sys.displayhook) == before


@pytest.mark.blocks
async def test_there_is_no_keyboard_to_read_from(shell: Shell) -> None:
    async with asyncio.timeout(10):
        assert "EOFError" in (await shell.types("input('? ')"))[2]
        assert await shell.prints("import sys; sys.stdin.read()") == "''\n"
        assert (await shell.types("help()"))[0].outcome == "ok"


async def test_a_stream_can_be_a_context_manager_and_stays_open(shell: Shell) -> None:
    assert await shell.prints("import sys", "with sys.stdout as out: print('a'); n = out.write('b')", "") == "a\nb"
    assert await shell.prints("print('c')") == "c\n"
    own = io.StringIO()
    with contextlib.redirect_stdout(own), printed.divided():
        with sys.stdout:
            print("the node's own")
        assert own.closed


@pytest.mark.blocks
async def test_prints_of_other_threads_and_bytes_are_the_node_s_own(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    await shell.prints("import sys, threading")
    assert await shell.prints("t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()") == ""
    assert await shell.prints("await asyncio.get_running_loop().run_in_executor(None, print, 'executor')", "") == ""
    assert await shell.prints("n = sys.stdout.buffer.write(b'bytes')") == ""
    assert capsys.readouterr().out == "thread\nexecutor\nbytes"


async def test_what_was_begun_prints_later(shell: Shell) -> None:
    await shell.prints("async def later():", "    await go.wait()", "    print('now')", "")
    await shell.prints("go = asyncio.Event(); running = asyncio.create_task(later())")
    await shell.prints("when = asyncio.get_running_loop().call_later(0.05, go.set)")
    assert "now\n" in "".join(one.text for one in await shell.until(Output) if isinstance(one, Output))
    assert await shell.prints("running.done()") == "True\n"


async def test_output_that_does_not_encode_is_escaped(shell: Shell) -> None:
    assert await shell.prints(r"print('\ud800ü')") == "\\ud800ü\n"


# -- what goes wrong


async def test_an_error_is_told_without_what_is_ours_and_the_session_lives_on(shell: Shell) -> None:
    prompt, _, wrong = await shell.types("1/0")
    assert prompt == Prompt(False, "failed")
    assert wrong == (
        'Traceback (most recent call last):\n  File "<console>", line 1, in <module>\n'
        "ZeroDivisionError: division by zero\n"
    )
    await shell.prints("async def f():", "    raise KeyError('x') from ValueError('y')", "")
    _, _, wrong = await shell.types("await asyncio.gather(f())", "")
    assert wrong.count("<console>") == 2
    for text in ("ValueError: y", "direct cause", "KeyError: 'x'"):
        assert text in wrong
    _, _, wrong = await shell.types("await task('hello', 5)", "")
    assert "TypeError: the content of a task is a dict" in wrong
    assert "penstock" not in wrong
    _, _, wrong = await shell.types("context.shout('')")
    assert 'function.yml", line 6, in shout' in wrong
    assert await shell.prints("1") == "1\n"


@pytest.mark.parametrize(
    "raised",
    ["raise KeyboardInterrupt", "raise BaseException('x')", "raise GeneratorExit", "raise asyncio.CancelledError"],
)
async def test_nothing_that_is_raised_gets_through(shell: Shell, raised: str) -> None:
    for lines in ([raised], ["await asyncio.sleep(0)", raised, ""]):
        prompt, _, wrong = await shell.types(*lines)
        assert prompt.outcome == "failed"
        assert wrong.startswith("Traceback")
    assert await shell.prints("1") == "1\n"


async def test_an_error_that_cannot_say_what_it_is_is_told_anyway(shell: Shell) -> None:
    await shell.prints("class Mute(Exception):", "    def __str__(self):", "        raise self", "")
    assert "Mute" in (await shell.types("raise Mute"))[2]
    await shell.prints("class Odd:", "    def __repr__(self):", "        return 1/0", "")
    assert "ZeroDivisionError" in (await shell.types("Odd()"))[2]
    await shell.prints("def deep():", "    deep()", "")
    assert len((await shell.types("deep()"))[2]) < 2000
    assert len((await shell.types("raise ValueError('x' * 10**6)"))[2]) < 100_000
    await shell.prints("class Fatal(Exception):", "    def __str__(self):", "        raise SystemExit", "")
    await shell.prints("Fatal.__notes__ = property(Fatal.__str__)")
    prompt, _, wrong = await shell.types("raise Fatal")
    assert (prompt.outcome, "Fatal" in wrong) == ("failed", True)
    assert shell.records[-1] == ("raise Fatal", "Fatal: (it raises SystemExit)")
    assert "ExceptionGroup" in problem_of(ExceptionGroup("several", [ValueError("x")]))


@pytest.mark.parametrize(
    ("code", "status"),
    [("exit()", 0), ("quit(3)", 3), ("raise SystemExit", 0), ("import sys; sys.exit(True)", 1), ("exit('why')", 1)],
)
async def test_exit_ends_the_session_and_nothing_else(console: Console, code: str, status: int) -> None:
    for lines in ([code], ["await asyncio.sleep(0)", code, ""]):
        async with opened(console) as shell:
            for line in lines[:-1]:
                await shell.types(line)
            shell.session.hear(Line(lines[-1]))
            assert (await shell.until(Left))[-1] == Left(status)
            assert await shell.told() is None
    async with opened(console) as another:
        assert await another.prints("1") == "1\n"


async def test_exit_in_a_task_of_the_input_does_not_end_the_node(console: Console) -> None:
    async with opened(console) as shell:
        await shell.prints("async def leaves():", "    exit(4)", "")
        shell.session.hear(Run("await asyncio.gather(leaves())"))
        assert (await shell.until(Left))[-1] == Left(4)
    async with opened(console) as shell:
        await shell.prints("async def leaves():", "    exit(4)", "")
        await shell.prints("left = asyncio.create_task(leaves())")
        await shell.prints("await asyncio.sleep(0)", "")
        assert await shell.prints("left.done()") == "True\n"
        assert "Leave(4)" in await shell.prints("left.exception()")


# -- interrupting


async def test_an_interrupt_cancels_what_runs_and_the_session_lives_on(shell: Shell) -> None:
    await shell.prints("seen = []")
    await shell.types("try:", "    await asyncio.sleep(1000)", "finally:", "    seen.append('cleaned up')")
    shell.session.hear(Line(""))
    await shell.runs()
    shell.session.hear(Interrupt())
    assert await shell.until(Prompt) == [Problem("KeyboardInterrupt\n"), Prompt(False, "interrupted")]
    assert await shell.prints("seen") == "['cleaned up']\n"


async def test_an_interrupt_forgets_what_is_open_and_answers_what_was_sent_ahead(shell: Shell) -> None:
    await shell.types("x = (")
    shell.session.hear(Interrupt())
    assert await shell.prints("1") == "1\n"
    for text in ("await asyncio.sleep(1000)", "", "print('never')", "print('never')"):
        shell.session.hear(Line(text))
    assert await shell.until(Prompt) == [Prompt(True)]
    await shell.runs()
    shell.session.hear(Interrupt())
    said = [message for _ in range(3) for message in await shell.until(Prompt)]
    assert said == [Problem("KeyboardInterrupt\n"), *[Prompt(False, "interrupted")] * 3]
    assert await shell.prints("2") == "2\n"


async def test_an_interrupt_that_comes_with_its_line_leaves_nobody_waiting(shell: Shell) -> None:
    shell.session.hear(Line("await asyncio.sleep(1000)"))
    shell.session.hear(Line(""))
    shell.session.hear(Interrupt())
    said = [message for _ in range(2) for message in await shell.until(Prompt)]
    assert said == [Prompt(False, "interrupted")] * 2


async def test_a_session_that_ends_cancels_its_input_however_often_it_takes(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = "for n in range(3):\n    try:\n        await asyncio.sleep(1000)\n    except BaseException: pass"
    async with opened(console) as shell:
        shell.session.hear(Run(stubborn))
        running = await shell.runs()
        records = shell.records
    assert running.done()
    assert records == [(stubborn, "cancelled: the session ended")]
    monkeypatch.setattr(console_module, "PATIENCE", 0.1)
    async with opened(console) as shell:
        shell.session.hear(Run(ENDLESS))
        running = await shell.runs()
        names = shell.session._screen.names
        await eventually(lambda: "over" in names)
    assert not running.done()  # left behind
    names["over"].set()
    await asyncio.wait((running,), timeout=10)
    assert running.done()


ENDLESS = """
over = asyncio.Event()
while not over.is_set():
    try:
        await over.wait()
    except BaseException: pass
"""


# -- the debug channel


async def test_debug_connects_disconnects_and_shows_what_any_node_says(node: Node, shell: Shell) -> None:
    assert await shell.prints("debug()") == "debug channel connected\n"
    await node.app.broadcast("penstock.debug", {"node": "beta", "text": "from elsewhere"})
    assert await shell.until(Shown) == [Shown("beta", "from elsewhere")]
    await shell.prints("await task('hello', {'name': 'amuro'})", "")
    assert await shell.until(Shown) == [Shown("alpha", "Hello, amuro")]
    assert await shell.prints("debug()") == "debug channel disconnected\n"
    assert node.app.client._listening.find("penstock.debug", None) == []
    assert await shell.prints("await debug(True)", "print('on')", "") == "debug channel connected\non\n"
    assert await shell.prints("debug(False); debug(); debug(False)") == (
        "debug channel disconnected\ndebug channel connected\ndebug channel disconnected\n"
    )


async def test_a_session_that_ends_hears_nothing_more(node: Node, console: Console) -> None:
    async with opened(console) as shell:
        await shell.prints("debug()")
        assert node.app.client._listening.find("penstock.debug", None)
    assert node.app.client._listening.find("penstock.debug", None) == []


# -- ceilings


async def test_what_is_printed_too_fast_is_left_out_with_a_mark() -> None:
    screen = Screen(100)
    for number in range(100):
        screen.write(f"{number:>9}\n")
    screen.tell(Prompt())
    screen.end()
    said = []
    while (message := await screen.take()) is not None:
        said.append(message)
    assert said[-1] == Prompt()
    text = "".join(one.text for one in said if isinstance(one, Output))
    assert text.startswith("        0\n")
    assert text[:100].endswith("        9\n")
    assert "[… 900 characters are left out" in text
    assert len(text) < 300


async def test_after_some_was_left_out_it_goes_on_in_order() -> None:
    screen = Screen(10)
    screen.write("0123456789lost")
    screen.write("more")
    first = await screen.take()
    assert isinstance(first, Output)
    assert first.text.startswith("0123456789\n[… 8 characters are left out")
    screen.offer(Shown("node", "x" * 10))
    screen.write("y")
    second = await screen.take()
    assert isinstance(second, Output)
    assert second.text.startswith("\n[… 14 characters")
    screen.write("z")
    assert await screen.take() in (Output("z"), Output("yz"))


@pytest.mark.parametrize("where", ["Output", "StringIO", "room", "next", "wake"])
async def test_what_prints_in_the_middle_of_printing_is_told_once_and_deadlocks_nobody(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a `__del__` does that the garbage collector calls there."""
    screen = Screen()
    again = 5

    def between(real: Any, *, after: bool) -> Any:
        def does(*given: Any) -> Any:
            nonlocal again
            result = real(*given) if after else None
            if again:
                again -= 1
                screen.write("<gone>")
            return result if after else real(*given)

        return does

    if where == "Output":
        monkeypatch.setattr(printed, "Output", between(Output, after=False))
        monkeypatch.setattr(printed, "_size", len_of)
    elif where == "StringIO":
        monkeypatch.setattr(io, "StringIO", between(io.StringIO, after=True))
    else:
        monkeypatch.setattr(screen, f"_{where}", between(getattr(screen, f"_{where}"), after=True))
    text = ""
    async with asyncio.timeout(10):
        for n in range(10):
            taking = asyncio.create_task(screen.take())
            await asyncio.sleep(0)
            screen.write(f"[{n}]")
            while f"[{n}]" not in text or not taking.done():
                message = await taking
                assert isinstance(message, Output)
                text += message.text
                if f"[{n}]" not in text:
                    taking = asyncio.create_task(screen.take())
        screen.end()
        while (message := await screen.take()) is not None:
            assert isinstance(message, Output)
            text += message.text
    assert (text.count("<gone>"), screen._size, screen._left_out) == (5, 0, 0)
    assert [text.count(f"[{n}]") for n in range(10)] == [1] * 10


def len_of(message: Any) -> int:
    """`_size`, while `Output` is none of its types."""
    return len(message.text)


async def test_what_prints_just_before_it_is_waited_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    look, times = screen._next, 0

    def then_print() -> Told | None:
        nonlocal times
        times += 1
        found = look()
        if times == 1:
            screen.write("gone")
        return found

    monkeypatch.setattr(screen, "_next", then_print)
    async with asyncio.timeout(10):
        assert await screen.take() == Output("gone")


async def test_what_prints_as_the_names_are_dropped_deadlocks_nobody() -> None:
    screen = Screen()
    screen.names["x"] = Last(screen)
    screen.drop()
    assert Last.words == 1
    assert (screen.names, screen._size) == ({}, 0)


class Last:
    """Prints when it goes."""

    words = 0

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def __del__(self) -> None:
        self._screen.write("gone")
        Last.words += 1


async def test_threads_write_and_nothing_is_lost() -> None:
    screen = Screen()

    def write() -> None:
        for _ in range(2000):
            screen.write("x\n")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    count = 0
    async with asyncio.timeout(20):
        while count < 8000:
            message = await screen.take()
            assert isinstance(message, Output)
            count += message.text.count("x\n")
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert count == 8000


async def test_what_is_sent_ahead_is_bounded(console: Console) -> None:
    for messages in ([Line("pass")] * (MOST_AHEAD + 1), [Run("x" * (MOST_INPUT // 2 + 1))] * 2):
        async with opened(console) as shell:
            shell.session.hear(Run("await asyncio.sleep(1000)"))
            await shell.runs()
            for message in messages:
                shell.session.hear(message)
            assert await shell.told() is None
            assert shell.session.closing == (1009, "more was sent ahead than is kept")


async def test_what_outlives_its_session_keeps_nothing_of_it(console: Console) -> None:
    async with opened(console) as shell:
        await shell.prints(
            "async def later():", "    while True:", "        await asyncio.sleep(0); print('x' * 1000)", ""
        )
        await shell.prints("running = asyncio.create_task(later())")
        running, screen = shell.session._screen.names["running"], shell.session._screen
    for _ in range(20):
        await asyncio.sleep(0)
    assert not running.done()
    assert (screen.names, screen._size, len(screen._messages)) == ({}, 0, 0)
    running.cancel()


async def test_there_are_so_many_sessions_and_no_more(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "MOST_SESSIONS", 2)
    async with opened(console), opened(console):
        with pytest.raises(TooManySessions):
            async with opened(console):
                pass
    async with opened(console) as shell:
        assert await shell.prints("1") == "1\n"


# -- what is written down


async def test_each_input_is_written_down_with_what_came_of_it(shell: Shell) -> None:
    await shell.types("x = 1")
    await shell.types("for y in 'a':", "    y", "")
    await shell.types("1/0")
    await shell.types("x y")
    assert shell.records == [
        ("x = 1", "ok"),
        ("for y in 'a':\n    y\n", "ok"),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x y", "SyntaxError: invalid syntax (<console>, line 1)"),
    ]


SLOW = """
import threading
go, asked = threading.Event(), threading.Event()
class Slow(Exception):
    def __str__(self):
        asked.set()
        go.wait(20)
        return "x"
raise Slow
"""


async def test_an_input_whose_session_ends_before_it_was_told_is_written_down(console: Console) -> None:
    async with opened(console) as shell:
        shell.session.hear(Run(SLOW))
        names = shell.session._screen.names
        await eventually(lambda: "asked" in names and names["asked"].is_set())
    names["go"].set()
    assert shell.records == [(SLOW, "Slow: the session ended before it was told")]


async def test_an_input_is_written_down_also_where_the_end_itself_is_cancelled(console: Console) -> None:
    begun: list[Shell] = []

    async def connection() -> None:
        async with opened(console) as shell:
            shell.session.hear(Run(ENDLESS))
            await shell.runs()
            begun.append(shell)
            await asyncio.Event().wait()

    connected = asyncio.create_task(connection())
    await eventually(lambda: begun)
    (shell,) = begun
    names, running = shell.session._screen.names, shell.session._running
    assert running is not None
    await eventually(lambda: "over" in names)
    connected.cancel()
    await eventually(lambda: shell.session._screen._ended and running.cancelling() > 0)
    connected.cancel()
    await asyncio.wait((connected,), timeout=10)
    names["over"].set()
    await asyncio.wait((running,), timeout=10)
    assert shell.records == [(ENDLESS, "cancelled: the session ended")]


async def test_nothing_is_run_for_who_may_no_longer(console: Console) -> None:
    may = True
    records: list[tuple[str, str]] = []

    async def record(text: str, outcome: str) -> None:
        records.append((text, outcome))

    async with console.session("somebody", record, lambda: may) as session:
        shell = Shell(session, records)
        await shell.until(Prompt)
        assert await shell.prints("x = 1") == ""
        may = False
        session.hear(Line("x = 2"))
        session.hear(Line("x = 3"))
        assert await shell.told() is None
        assert session.closing == (1008, "the session is over: sign in again")
    assert records == [("x = 1", "ok")]


async def test_a_record_that_takes_its_time_holds_up_nobody_for_long(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "RECORD_WITHIN", 0.01)
    never = asyncio.Event()

    async def record(text: str, outcome: str) -> None:
        await never.wait()

    async with asyncio.timeout(10), console.session("somebody", record) as session:
        shell = Shell(session, [])
        await shell.until(Prompt)
        assert await shell.prints("1") == "1\n"
        never.set()


async def test_the_node_s_stop_ends_sessions_in_time(node: Node, console: Console) -> None:
    async with opened(console) as shell:
        shell.session.hear(Run("await asyncio.sleep(1000)"))
        running = await shell.runs()
        closing = asyncio.create_task(console.close())
        assert await shell.told() is None
        assert shell.session.closing == (1001, "the node is stopping")
        await asyncio.wait((running,), timeout=10)
        assert running.done()
    await closing
    with pytest.raises(ConnectionError, match="stopping"):
        async with opened(console):
            pass


async def test_it_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    async with Node(folder, App(f"memory://console-{os.getpid()}-{next(_numbers)}")) as node:
        assert node.console is None
