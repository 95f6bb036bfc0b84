"""`Worker`: what is declared of a resident function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from penstock.clock import is_backoff, is_seconds
from penstock.errors import ConfigError, DeclarationError, near

Mode = Literal["single", "multi"]
MODES: tuple[Mode, ...] = ("single", "multi")

WATCH_INTERVAL = 10.0
"""Seconds between the end of a run and the next one."""
BACKOFF = (1.0, 300.0)
"""Seconds after a failure, first and longest: exponential, with full jitter."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A function without parameters, and how it is to be resident."""

    name: str
    function: Callable[[], Any]
    mode: Mode = "single"
    """`single`: one run in the cluster; `multi`: one in each process."""
    watch_interval: float = WATCH_INTERVAL
    backoff: tuple[float, float] = BACKOFF
    category: str | None = None
    """A free label."""


def make_worker(
    function: Callable[[], Any],
    name: str,
    mode: str,
    watch_interval: float,
    backoff: tuple[float, float],
    category: str | None = None,
) -> Worker:
    """:raises ConfigError: a value that cannot be.
    :raises DeclarationError: a function that cannot be called without arguments.
    """
    if mode not in MODES:
        raise ConfigError(f"worker {name!r}: mode is 'single' or 'multi', not {mode!r}{near(str(mode), MODES)}")
    if not is_seconds(watch_interval):
        raise ConfigError(f"worker {name!r}: watch_interval must be seconds, 0 or more, not {watch_interval!r}")
    if not is_backoff(backoff):
        raise ConfigError(f"worker {name!r}: backoff must be (first, longest) in seconds, not {backoff!r}")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise DeclarationError(f"worker {name!r} is a generator: nobody would take what it yields")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise DeclarationError(f"worker {name!r} is called without arguments: {error}") from None
    first, longest = backoff
    return Worker(
        name=name,
        function=function,
        mode=mode,
        watch_interval=float(watch_interval),
        backoff=(float(first), float(longest)),
        category=category,
    )
