"""A message on its way in (`Outgoing`), in our hands (`Delivery`), and before a handler (`Message`)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec

from penstock.clock import is_seconds

RESERVED = "penstock-"
"""Prefix of the headers in which the engine carries its own state. Users never see them."""


class Outgoing(msgspec.Struct, kw_only=True):
    """A message on its way into the system. Adapters carry `headers` whole and never read them."""

    id: str
    topic: str
    """The name it is published to; a `Move` keeps it."""
    body: bytes
    headers: Mapping[str, Any] = {}
    """Names to text, numbers, booleans or None."""
    key: str | None = None
    priority: int = 0
    """0 to 255; higher first."""
    enqueued_at: float = 0.0
    """Unix seconds."""
    expires_at: float | None = None
    """Unix seconds; dropped, and counted, when nobody has taken it by then."""
    delay: float = 0.0
    """Seconds before it can be received."""
    persistent: bool = True
    reply_to: str | None = None
    """Where an answer goes: an inbox's address, as its broker understands it."""


class Delivery(msgspec.Struct):
    """A message in our hands: received, not yet settled."""

    queue: str
    id: str
    topic: str
    raw: bytes
    headers: Mapping[str, Any]
    key: str | None
    priority: int
    enqueued_at: float
    expires_at: float | None
    redelivered: int
    """How often a consumer lost this message while holding it, since it was published or moved here.
    A `Release` does not count."""
    token: Any
    """The adapter's own handle."""
    lost: bool = False
    """Set by the adapter once it knows that the message is no longer ours."""
    reply_to: str | None = None
    """Where an answer goes: an inbox's address, as its broker understands it."""

    def outgoing(self) -> Outgoing:
        """The same message, to be put somewhere once more."""
        return Outgoing(
            id=self.id,
            topic=self.topic,
            body=self.raw,
            headers=self.headers,
            key=self.key,
            priority=self.priority,
            enqueued_at=self.enqueued_at,
            expires_at=self.expires_at,
            reply_to=self.reply_to,
        )


class Decision(Enum):
    """The verdicts a handler can record on a message."""

    ACCEPT = "accept"
    REJECT = "reject"
    RETRY = "retry"


class Message:
    """One message, as a handler sees it. `source` is the engine's.

    `body` is the decoded value and `raw` the bytes as received. `attempt` counts deliveries to a
    handler, 1 for the first. `enqueued_at` and `expires_at` are Unix times in seconds (`expires_at`
    None: never). `accept()`, `reject()` and `retry()` record a verdict; the last one stands, also when
    the handler raises afterwards. Without a verdict the route's policy decides.
    """

    __slots__ = ("_delay", "attempt", "body", "decision", "queue", "source", "taken")

    def __init__(self, source: Delivery, body: Any, attempt: int, queue: str) -> None:
        self.source = source
        self._delay: float | None = None
        self.body = body
        self.attempt = attempt
        self.queue = queue
        self.decision: Decision | None = None
        self.taken = True
        """What is done with it has begun: it expires no more."""

    @property
    def id(self) -> str:
        """The identity given at publishing; the same on every attempt and in the dead letters."""
        return self.source.id

    @property
    def topic(self) -> str:
        """The name it was published to."""
        return self.source.topic

    @property
    def raw(self) -> bytes:
        """The body as it came over the wire."""
        return self.source.raw

    @property
    def headers(self) -> dict[str, Any]:
        """The publisher's headers; a copy."""
        return {name: value for name, value in self.source.headers.items() if not name.startswith(RESERVED)}

    @property
    def key(self) -> str | None:
        """The ordering key, if the publisher gave one."""
        return self.source.key

    @property
    def priority(self) -> int:
        """0 to 255; higher goes first."""
        return self.source.priority

    @property
    def enqueued_at(self) -> float:
        """When it was published, in Unix seconds."""
        return self.source.enqueued_at

    @property
    def expires_at(self) -> float | None:
        """When it would have been dropped untaken, in Unix seconds; None: never."""
        return self.source.expires_at

    @property
    def name(self) -> str:
        """The event's name where the source has named events, else the topic."""
        return str(self.source.headers.get("event", self.source.topic))

    @property
    def delay(self) -> float | None:
        """The seconds asked for by `retry(delay=…)`."""
        return self._delay

    def accept(self) -> None:
        """Done with it: acknowledge."""
        self.decision, self._delay = Decision.ACCEPT, None

    def reject(self, requeue: bool = True) -> None:
        """Give it back for another attempt, or with `requeue=False` send it to the dead letters."""
        self.decision, self._delay = (Decision.RETRY if requeue else Decision.REJECT), None

    def retry(self, delay: float | None = None) -> None:
        """Another attempt after `delay` seconds (None: the route's backoff).

        :raises ValueError: a delay that is negative, or no number of seconds.
        """
        if delay is not None and not is_seconds(delay):
            raise ValueError(f"delay must be 0 or more seconds, not {delay}")
        self.decision, self._delay = Decision.RETRY, delay

    def __repr__(self) -> str:
        return f"<Message {self.id} from {self.queue!r}, attempt {self.attempt}>"
