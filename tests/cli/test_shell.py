"""`penstock shell`: the documents' transcripts with a real node; one line and the right status when it cannot be."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.testing.faults.serving import TOKEN, NodeProcess
from tests.cli.conftest import COMMAND
from tests.cli.hosting import refused_port
from tests.helpers import eventually_sync

pytestmark = [pytest.mark.blocks, pytest.mark.timeout(90)]

JOBS = """\
- name: example
  topics:
    - hello
    - world
  script: |-
    if task.topic=="hello":
      qprint("Hello, {}".format(task.content.name))
    elif task.topic=="world":
      qprint("Bye, {}".format(task.content.name))
- name: hello.job
  topics: [hello.job]
  script: logger.info("%s %s %r" % (task.taskid, task.topic, task.content))
"""
PRODUCER = """\
category: example
name: SQSProducer
code: |-
  async def SQSProducer(message):
      qprint("message: %s" % message)
"""
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}[+-]\d\d:\d\d"
PLAIN = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]")


@contextlib.contextmanager
def node_at(folder: Path, *options: str) -> Iterator[NodeProcess]:
    served = folder / "served"
    served.mkdir()
    (served / "jobs.yml").write_text(JOBS)
    (served / "producer.yml").write_text(PRODUCER)
    with NodeProcess(served, *options) as node:
        node.wait_until_ready()
        yield node


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with node_at(tmp_path, "--console") as one:
        yield one


def environment(node: NodeProcess | None = None, **env: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    given = {} if node is None else {"PENSTOCK_URL": f"http://127.0.0.1:{node.port}", "PENSTOCK_TOKEN": TOKEN}
    return {**kept, "XDG_STATE_HOME": str(Path.cwd() / "state"), "XDG_RUNTIME_DIR": str(Path.cwd()), **given, **env}


def shell(node: NodeProcess | None, *arguments: str, typed: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One that ends by itself."""
    return subprocess.run(
        [*COMMAND, "shell", *arguments],
        env=environment(node, **env),
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that an error is."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class Terminal:
    """A shell at a terminal, and who types there."""

    def __init__(self, node: NodeProcess, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "shell", *arguments],
            env={**environment(node), "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: _control(theirs),
        )
        os.close(theirs)
        self._seen = ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, pattern: str) -> str:
        """What is printed from where it was looked last up to a match."""
        until = time.monotonic() + 30
        while True:
            plain = PLAIN.sub("", self._seen).replace("\r", "")
            if match := re.search(pattern, plain):
                self._seen = plain[match.end() :]
                return plain[: match.end()]
            assert time.monotonic() < until, f"no {pattern!r} in {plain!r}"
            ready, _, _ = select.select([self._ours], [], [], 0.1)
            if ready:
                with contextlib.suppress(OSError):
                    self._seen += os.read(self._ours, 65536).decode()

    def ended(self) -> int:
        return self.process.wait(30)


def _control(terminal: int) -> None:
    """Ctrl-C there is ours."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(node: NodeProcess) -> Iterator[Terminal]:
    one = Terminal(node)
    try:
        one.until(">>> ")
        yield one
    finally:
        one.close()


# -- the documents


@pytest.fixture(params=["sqlite", "redis"])
def hosting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NodeProcess]:
    broker = [] if request.param == "sqlite" else ["--broker", str(request.getfixturevalue("redis_url"))]
    with node_at(tmp_path, "--console", *broker) as one:
        yield one


def test_the_transcripts_of_the_documents_as_they_stand(hosting: NodeProcess) -> None:
    one = Terminal(hosting)
    try:
        one.until(">>> ")
        one.type("debug()\n")
        one.until("debug channel connected\n>>> ")
        one.type('await task("hello", dict(name="amuro"))\n')
        one.until(r"\n\.\.\. ")
        one.type('await task("world", dict(name="amuro"))\n')
        one.until(r"\n\.\.\. ")
        one.type("\n")
        shown = one.until("(Hello, amuro|Bye, amuro)\n[^!]*(Hello, amuro|Bye, amuro)\n")
        assert "Hello, amuro\n" in shown
        assert "Bye, amuro\n" in shown
        one.type('await context.SQSProducer("Hello, SQS!!")\n')
        one.until(r"\n\.\.\. ")
        one.type("\n")
        one.until("message: Hello, SQS!!\n")
        one.type("debug()\n")
        one.until("debug channel disconnected\n>>> ")
        one.type('taskid = await task("hello.job", dict(arg="hello"), expire=30)\n')
        one.until(r"\n\.\.\. ")
        one.type("r = await waitfor(taskid)\n")
        one.until(r"\n\.\.\. ")
        one.type("print(r.yaml_format)\n")
        one.until(r"\n\.\.\. ")
        one.type("\n")
        told = one.until(">>> ")
        assert re.search(rf"^completedAt: '{TIME}'$", told, re.M)
        assert re.search(r"^taskid: \w+$", told, re.M)
        one.type("\x04")
        assert one.ended() == 0
    finally:
        one.close()


# -- lines from a program


def test_lines_from_a_program_are_run_without_prompts(node: NodeProcess) -> None:
    done = shell(node, typed="x = 2\nx + 1\nfor n in range(x):\n    print(n)\n\nprint(await asyncio.sleep(0, 'end'))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n0\n1\nend\n", "")


def test_a_program_of_two_thousand_lines_is_run_in_good_time(node: NodeProcess) -> None:
    block = "".join(f"    x{n} = {n} + len(str({n}))\n" for n in range(2000))
    done = shell(node, typed=f"def f():\n{block}    return x1999\n\nf()\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2003\n", "")


def test_an_input_that_raises_is_told_on_stderr_and_those_after_it_are_run(node: NodeProcess) -> None:
    done = shell(node, typed="1/0\nprint('after')\n")
    assert (done.returncode, done.stdout) == (1, "after\n")
    assert done.stderr.splitlines() == [
        "Traceback (most recent call last):",
        '  File "<console>", line 1, in <module>',
        "ZeroDivisionError: division by zero",
    ]
    assert shell(node, typed="exit(4)\nprint('never')\n").returncode == 4
    assert "SyntaxError" in shell(node, typed="x = (").stderr


# -- one command


def test_a_command_is_run_and_that_is_all(node: NodeProcess) -> None:
    done = shell(node, "--command", "x = await task('hello', {'name': 'x'})\nr = await waitfor(x)\nprint(r.state)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "succeeded\n", "")
    done = shell(node, "--command", "40 + 2")
    assert (done.returncode, done.stdout) == (0, "42\n")
    done = shell(node, "--command", "def f():\n    raise KeyError('x')\nf()")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'File "<console>", line 2, in f\nKeyError' in done.stderr
    done = shell(node, "--json", "--command", "print('x')")
    assert '{"type":"output","text":"x\\n"}' in done.stdout.splitlines()


def test_ctrl_c_cancels_a_command_at_the_node(node: NodeProcess) -> None:
    code = "print('begun')\ntry:\n  await asyncio.sleep(1000)\nfinally: open('ended', 'w').close()"
    command = [*COMMAND, "shell", "--command", code]
    process = subprocess.Popen(
        command, env=environment(node), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    eventually_sync((node.folder / "ended").exists, "it was cancelled")
    assert shell(node, "--command", "1").stdout == "1\n"


# -- at a terminal


def test_ctrl_c_interrupts_what_runs_and_forgets_what_is_typed(terminal: Terminal) -> None:
    terminal.type("print('begun'); await asyncio.sleep(1000)\n\n")
    terminal.until("begun\n")
    terminal.type("\x03")
    terminal.until("KeyboardInterrupt\n>>> ")
    terminal.type("x = (\n")
    terminal.until(r"\.\.\. ")
    terminal.type("\x03")
    terminal.until("KeyboardInterrupt\n>>> ")
    terminal.type("6 * 7\n")
    terminal.until("42\n>>> ")
    terminal.type("\x04")
    assert terminal.ended() == 0


def test_what_is_printed_meanwhile_does_not_swallow_what_is_typed(terminal: Terminal) -> None:
    terminal.type("async def later():\n    await asyncio.sleep(0.5)\n    print('later')\n\n")
    terminal.until(r"\.\.\. \n>>> ")
    terminal.type("running = asyncio.create_task(later())\n")
    terminal.until(">>> ")
    terminal.type("6 *")
    terminal.until(r"later\n>>> 6 \*")
    terminal.type(" 7\n")
    terminal.until("42\n>>> ")


def test_what_other_people_sent_does_not_steer_the_terminal(terminal: Terminal) -> None:
    terminal.type(r"print('\x1b[2Jcleared')" + "\n")
    terminal.until(re.escape(r"\x1b[2Jcleared") + "\n>>> ")


def test_a_node_that_stops_ends_a_shell_where_somebody_types(node: NodeProcess, terminal: Terminal) -> None:
    terminal.type("x =")
    node.terminate()
    terminal.until("error: the node at .* ended the session: the node is stopping\n")
    assert terminal.ended() == 1
    assert node.ended() == 0, node.log


def test_lines_are_remembered_for_this_user_alone(node: NodeProcess, terminal: Terminal) -> None:
    terminal.type("'remembered'\n")
    terminal.until("\n'remembered'\n>>> ")
    terminal.type("exit()\n")
    assert terminal.ended() == 0
    file = Path("state/penstock/shell_history")
    assert "'remembered'" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


# -- where there is none


def test_why_there_is_no_shell_is_one_line(node: NodeProcess, tmp_path: Path) -> None:
    assert "does not take the token of PENSTOCK_TOKEN" in error_of(
        shell(node, "--command", "1", PENSTOCK_TOKEN="wrong")
    )
    assert "wants a token" in error_of(shell(node, "--command", "1", PENSTOCK_TOKEN=""))
    nobody = f"http://127.0.0.1:{refused_port()}"
    assert error_of(shell(node, "--url", nobody, "--command", "1")).startswith(f"no node answers at {nobody}")
    assert (
        "ended the session"
        in shell(node, "--command", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").stderr
    )


def test_a_console_that_is_off_is_one_line(tmp_path: Path) -> None:
    with node_at(tmp_path) as node:
        assert "`penstock serve --console` has one" in error_of(shell(node, typed="1\n"))


def test_a_console_is_switched_on_in_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "penstock.toml").write_text("console = true\n")
    with node_at(tmp_path) as node:
        assert shell(node, "--command", "1").stdout == "1\n"


def test_without_the_driver_it_says_what_to_install(node: NodeProcess) -> None:
    code = (
        "import sys; sys.modules['websockets'] = None\n"
        "from penstock.cli.root import run; sys.exit(run(['shell', '--command', '1']))"
    )
    done = subprocess.run([COMMAND[0], "-c", code], env=environment(node), capture_output=True, text=True, check=False)
    assert "pip install 'penstock[server]'" in error_of(done)
