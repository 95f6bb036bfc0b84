"""`penstock shell`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from penstock.cli import remote
from penstock.cli.command import Call
from penstock.cli.output import clean, note
from penstock.cli.remote import ANSWER, NodeError, Remote
from penstock.control.console import (
    Asked,
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

if TYPE_CHECKING:
    from websockets.sync.connection import Connection

PROMPTS = {False: ">>> ", True: "... "}
PATIENCE = 2
"""Interrupts that a node may leave unheard; with the next one the shell ends."""
MOST_HISTORY = 1000  # lines
AGAIN = 0.5  # seconds until somebody who did not wait for a key just then is interrupted again


def shell(
    call: Call,
    command: Annotated[
        str | None, typer.Option("--command", metavar="CODE", help="Run this, of one line or several, and exit.")
    ] = None,
) -> None:
    """Run Python in a live node, among the names that its scripts see. It has to be served with --console.

    Without --command lines are read from stdin, with prompts and a history where that is a terminal. One with
    `await`, or an open block, goes on until an empty line. Except at a terminal the exit status is 1 if an
    input raised.
    """
    node = remote.required(call)
    with node.connected("/console") as connection:
        talk = _Talk(node, connection, as_json=call.json)
        if command is not None:
            status = _one(talk, command)
        elif sys.stdin.isatty():
            with _history():
                status = _typed(talk)
        else:
            status = _piped(talk)
    raise typer.Exit(status)


class _Ended(Exception):
    """An input has ended the session."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__()


class _Talk:
    """A console at the other end: what it says is printed as it comes, but for prompts, which are waited for."""

    def __init__(self, node: Remote, connection: Connection, *, as_json: bool) -> None:
        self._node = node
        self._connection = connection
        self._json = as_json
        self._said: SimpleQueue[Prompt | Exception] = SimpleQueue()
        self._over: Exception | None = None
        self._reading: str | None = None
        """The prompt, while somebody types behind it."""
        self._main = threading.get_ident()
        threading.Thread(target=self._listen, name="penstock-shell", daemon=True).start()
        try:
            self._next(self._said.get(timeout=ANSWER))
        except Empty:
            raise NodeError(f"the console of {node.url} says nothing") from None

    def ask(self, asked: Asked) -> Prompt:
        """Have something carried out; what is asked next."""
        self.say(asked)
        return self._next(self._said.get())

    def again(self) -> Prompt:
        """Wait on, after an interrupt."""
        return self._next(self._said.get())

    def say(self, asked: Asked) -> None:
        """:raises NodeError: it has gone."""
        from websockets.exceptions import ConnectionClosed

        try:
            self._connection.send(msgspec.json.encode(asked).decode())
        except (ConnectionClosed, OSError):
            raise self._over or self._gone() from None

    def read(self, prompt: str | None) -> str | None:
        """A line of stdin; None: there are no more. `prompt`: at a terminal.

        :raises Exception: why the session is over, if it is meanwhile.
        """
        self._reading = prompt or ""
        try:
            if self._over is not None:
                raise self._over
            if prompt is not None:
                return input(prompt)
            text = sys.stdin.readline()
            return text.removesuffix("\n") if text else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            if self._over is not None:
                raise self._over from None
            raise
        finally:
            self._reading = None

    def _next(self, said: Prompt | Exception) -> Prompt:
        if isinstance(said, Exception):
            raise said
        return said

    def _listen(self) -> None:
        """What it says, until it has gone."""
        from websockets.exceptions import ConnectionClosed

        over: Exception | None = None
        decoder = msgspec.json.Decoder(Told)
        try:
            while True:
                message = decoder.decode(self._connection.recv())
                if isinstance(message, Left):
                    over = _Ended(message.status)
                elif isinstance(message, Prompt):
                    self._said.put(message)
                else:
                    self._print(message)
        except (msgspec.DecodeError, UnicodeError):
            over = NodeError(f"{self._node.url} does not say what a console says: is it of another version?")
        except ConnectionClosed:
            over = over or self._gone()
        except Exception as error:  # stdout is closed, say
            over = error
        self._over = over or self._gone()
        self._said.put(self._over)
        while self._reading is not None:
            signal.pthread_kill(self._main, signal.SIGINT)  # nothing else ends its waiting for a key
            time.sleep(AGAIN)

    def _gone(self) -> NodeError:
        protocol = self._connection.protocol
        why = clean(protocol.close_reason or "")
        return NodeError(f"the node at {self._node.url} ended the session{f': {why}' if why else ''}")

    def _print(self, message: Hello | Output | Problem | Shown) -> None:
        if self._json:
            print(msgspec.json.encode(message).decode(), flush=True)
            return
        if isinstance(message, Hello):
            if sys.stdin.isatty() and sys.stderr.isatty():
                note(f"node {message.node} at {self._node.url}, Penstock {message.version}; Ctrl-D leaves")
            return
        stream = sys.stderr if isinstance(message, Problem) else sys.stdout
        text = f"{message.text}\n" if isinstance(message, Shown) else message.text
        if stream.isatty():
            text = clean(text, lines=True)
            if self._reading:  # above the line that is being typed
                end = "" if text.endswith("\n") else "\n"
                text = f"\r\x1b[K{text}{end}{self._reading}{_typed_so_far()}"
        stream.write(text)
        stream.flush()


def _one(talk: _Talk, code: str) -> int:
    try:
        return _status(talk.ask(Run(code)))
    except _Ended as ended:
        return ended.status
    except KeyboardInterrupt:
        talk.say(Interrupt())
        raise


def _piped(talk: _Talk) -> int:
    """Each line as if it were typed; 1 if an input raised."""
    worst, prompt = 0, Prompt()
    try:
        while (text := talk.read(None)) is not None:
            prompt = talk.ask(Line(text))
            worst = max(worst, _status(prompt))
        return max(worst, _status(talk.ask(End()))) if prompt.more else worst
    except _Ended as ended:
        return max(worst, ended.status)
    except KeyboardInterrupt:
        talk.say(Interrupt())
        raise


def _typed(talk: _Talk) -> int:
    """Until Ctrl-D. Ctrl-C interrupts what runs, or forgets what was typed."""
    prompt = Prompt()
    try:
        while True:
            try:
                text = talk.read(PROMPTS[prompt.more])
            except KeyboardInterrupt:
                print("\nKeyboardInterrupt", file=sys.stderr)
                talk.say(Interrupt())
                prompt = Prompt()
                continue
            if text is None:
                print()
                return 0
            prompt = _run(talk, text)
    except _Ended as ended:
        return ended.status


def _run(talk: _Talk, text: str) -> Prompt:
    heard = 0
    asked = False
    while True:
        try:
            if asked:
                return talk.again()
            asked = True
            return talk.ask(Line(text))
        except KeyboardInterrupt:
            if heard == PATIENCE:
                note("the node does not answer")
                raise
            heard += 1
            talk.say(Interrupt())


def _status(prompt: Prompt) -> int:
    return int(prompt.outcome not in ("ok", "none"))


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and the lines of earlier sessions, in a file of this user alone."""
    try:
        import readline
    except ImportError:  # Python can be built without
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "penstock"
    file = folder / "shell_history"
    readline.parse_and_bind("tab: self-insert")
    readline.set_history_length(MOST_HISTORY)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _typed_so_far() -> str:
    module = sys.modules.get("readline")
    return str(module.get_line_buffer()) if module is not None else ""
