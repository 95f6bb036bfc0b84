"""Functions that are run in processes of their own."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from penstock import context
from penstock.delivery.stopping import child
from penstock.errors import Unavailable


class Custom(Exception): ...


def add(x: int, y: int) -> int:
    return x + y


async def later(text: str) -> str:
    return f"later {text}"


def pid() -> int:
    return os.getpid()


def spin(forever: bool) -> int:
    while forever:
        pass
    return os.getpid()


def sleep(long: bool) -> int:
    if long:
        time.sleep(600)
    return os.getpid()


def fail(text: str) -> None:
    raise Custom(text)


def fail_at_length() -> None:
    raise Custom("\udc80" * 1_000_000)


def unsayable() -> object:
    return object()


def die(how: str) -> str:
    if how == "exit":
        os._exit(9)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return how


def talk() -> str:
    context.headers["from"] = "child"
    context.progress(1, 3)
    context.progress(2, 3)
    return "said"


def echo(value: Any) -> Any:
    return value


def note_and_spin(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}\n")
    while True:
        pass


def note_and_hold_the_interpreter(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}\n")
    re.match(r"(a+)+$", "a" * 60 + "b")


unstoppable = [note_and_hold_the_interpreter] if sys.platform == "linux" else []
"""Whose process nothing but the system can end."""


def fork_and_forget(n: int) -> int:
    """Its copy leaves as it does: by an exception, or by returning."""
    pid = os.fork()
    if not pid:
        if n % 2:
            raise Custom(f"copy of {n}")
        return -n
    os.waitpid(pid, 0)
    return n


def forge(number: int | None) -> int:
    if number is not None:
        line = next(one for one in gc.get_objects() if isinstance(one, child.Child))
        line._write(child.Result(number, b"666", {}, {}))
    return os.getpid()


def tell_for_ever(n: int) -> None:
    surroundings = contextvars.copy_context()

    def tell() -> None:
        while True:
            surroundings.run(context.progress, n, 10)
            time.sleep(0.001)

    threading.Thread(target=tell, daemon=True).start()
    time.sleep(0.05)


def misreport() -> list[str]:
    kinds = []
    values: list[Any] = ["some", None, float("nan"), float("inf")]
    for value in values:
        try:
            context.progress(1, value)
        except Exception as error:
            kinds.append(type(error).__name__)
    return kinds


def run_tool(path: str) -> None:
    subprocess.run(["sh", "-c", 'echo $$ > "$0"; exec sleep 600', path], check=True)


def fork_and_die(how: str, path: str) -> None:
    if how == "multiprocessing":
        multiprocessing.get_context("fork").Process(target=_note_and_sleep, args=(path,)).start()
    elif not os.fork():
        _note_and_sleep(path)
        os._exit(0)
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def fork_in_c_and_die(path: str) -> None:
    if not ctypes.PyDLL(None).fork():
        os.setsid()
        _note_and_sleep(path)
        os._exit(0)
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _note_and_sleep(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}\n")
    time.sleep(60)


def be_away(really: bool) -> int:
    if really:
        raise Unavailable("the sink is away")
    return os.getpid()


def arguments() -> tuple[list[str], list[str]]:
    argv = [one if one.isascii() else repr(one) for one in sys.argv]
    return argv, [name for name in os.environ if name.startswith("PENSTOCK_")]
