"""What a route declares, checked whole before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from penstock.clock import is_backoff, is_seconds
from penstock.delivery.arguments import Binding, Shape
from penstock.delivery.settlement import Announce
from penstock.errors import ConfigError, near
from penstock.options import Actions, Events, Options

MAX_CRASHES = 3
"""Solitary runs that may kill the process before a message goes to the dead letters."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a route: the keywords of `App.route`, with its defaults."""

    bulk_size: int = 1
    bulk_timeout: float | None = 1.0
    concurrency: int = 1
    prefetch: int | None = None
    on_success: Actions = Actions.ACK
    on_exception: Actions = Actions.REQUEUE
    max_attempts: int | None = 10
    backoff: tuple[float, float] = (1, 300)
    priorities: int = 0
    ordered: bool = False


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Some queues and the handler that owns them."""

    name: str
    queues: tuple[str, ...]
    topics: tuple[str, ...]
    handler: Callable[..., Any]
    binding: Binding
    policy: Policy
    broker: str | None
    vhost: str | None
    prefetch: int
    max_length: int | None = None
    """Messages that each queue may hold; None: no ceiling."""
    announce: Announce | None = None
    """Is told of each message that is about to be buried; None: nobody need be."""

    @property
    def bulk_size(self) -> int:
        """Messages in a batch, so bounded that every concurrent batch can fill up."""
        return max(1, min(self.policy.bulk_size, self.prefetch // self.policy.concurrency))

    @property
    def one_by_one(self) -> bool:
        return self.binding.shape in (Shape.MESSAGE, Shape.BODY)


def make_policy(given: Mapping[str, Any], options: Mapping[Any, Any]) -> Policy:
    """Keywords and `options=` as one policy.

    :raises ConfigError: an unknown option (the near one is suggested), one given twice, a bad value.
    """
    values = dict(given)
    known = {one.value: one for one in (*Options, *Events)}
    for key, value in options.items():
        name = key.value if isinstance(key, Options | Events) else key
        if name not in known:
            raise ConfigError(f"unknown option {key!r}{near(str(name), known)}")
        if name in values and values[name] != value:
            raise ConfigError(f"{name} is given twice, as a keyword and in options")
        values[name] = value
    _check(values)
    return Policy(**values)


def _check(values: Mapping[str, Any]) -> None:
    def whole(name: str, least: int, most: int | None = None) -> None:
        value = values.get(name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
            upper = f" to {most}" if most else " or more"
            raise ConfigError(f"{name} must be a whole number, {least}{upper}, not {value!r}")

    for name in ("bulk_size", "concurrency", "prefetch", "max_attempts"):
        whole(name, 1)
    whole("priorities", 0, 10)
    for name in ("bulk_size", "concurrency", "priorities"):
        if name in values and values[name] is None:
            raise ConfigError(f"{name} must be a whole number, not None")
    for name in ("on_success", "on_exception"):
        if name in values and not isinstance(values[name], Actions):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, Actions))}, not {values[name]!r}")
    timeout = values.get("bulk_timeout")
    if timeout is not None and not is_seconds(timeout, above_zero=True):
        raise ConfigError(f"bulk_timeout must be a number of seconds above 0 or None, not {timeout!r}")
    backoff = values.get("backoff", (1, 300))
    if not is_backoff(backoff):
        raise ConfigError(f"backoff must be (first, longest) in seconds, not {backoff!r}")
