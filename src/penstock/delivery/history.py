"""What a message carries of its own past, in one reserved header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from penstock.message import RESERVED, Delivery, Outgoing

HEADER = RESERVED + "history"

MOST = 2**31 - 1
"""No count goes higher: a number that a foreign publisher made up must fit wherever it is written."""


class History(NamedTuple):
    """How often a message has been tried."""

    failures: int = 0
    """Handler calls that ended without success. `max_attempts` counts these."""
    redelivered: int = 0
    """Times that a consumer went away while holding it."""
    crashes: int = 0
    """Solitary runs that ended with the process, since the last one that did not."""

    @property
    def attempts(self) -> int:
        return self.failures + self.redelivered

    def __str__(self) -> str:
        return f"{self.failures},{self.redelivered},{self.crashes}"


NEW = History()


def read(headers: Mapping[str, Any]) -> History:
    """The history in some headers; a header that is not ours counts for nothing."""
    text = headers.get(HEADER)
    if text is None:
        return NEW
    try:
        failures, redelivered, crashes = map(int, str(text).split(","))
    except ValueError:
        return NEW
    return History(*(min(max(count, 0), MOST) for count in (failures, redelivered, crashes)))


def again(
    delivery: Delivery, history: History, *, delay: float = 0.0, headers: Mapping[str, Any] | None = None
) -> Outgoing:
    """The same message once more, with another history. Having been taken once, it expires no more."""
    carried = dict(delivery.headers if headers is None else headers)
    carried.pop(HEADER, None)
    if history != NEW:
        carried[HEADER] = str(history)
    message = delivery.outgoing()
    message.headers = carried
    message.expires_at = None
    message.delay = delay
    return message
