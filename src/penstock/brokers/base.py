"""The broker contract: all that an adapter promises and all that the engine relies on.

It is built around two facts: settlement is a batch, and *move* is the one primitive behind retry,
delay, dead letter and replay. An adapter stores and hands over; every state transition is decided in
`penstock.delivery`. `penstock.testing.conformance` holds an adapter to each sentence below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from penstock.errors import BrokerError, PublishError
from penstock.message import Delivery, Outgoing


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a message system can do. Read by the engine, asserted by the conformance suite."""

    durable: bool
    """A confirmed message survives the death of every process, and a power cut, `durable_with` what that takes."""
    durable_with: str = ""
    """What has to be said to the server for that, if by default a power cut may cost what it has just confirmed."""
    atomic_move: bool
    """`Move` happens whole or not at all; else it may leave the message twice, with the same id."""
    atomic_publish: bool
    """A `publish()` of many is stored whole or not at all (but for refusals it reports)."""
    fenced: bool
    """A late settlement of a delivery that was given to another is refused by the system itself."""
    max_lease: float | None
    """Seconds for which a live consumer may hold a message at most; None: as long as it lives."""
    priorities: int
    """How many priority levels are told apart; 0: none."""
    delay: bool
    """`Outgoing.delay` and `Release.delay` wait in the system."""
    expiry: bool
    """The system itself drops what nobody took by `Outgoing.expires_at`."""
    ordered: bool
    """`Queue.ordered`: messages of one key are handed out one after another, in publishing order."""
    topics: bool
    """A queue can be bound to names beside its own."""
    browse: bool
    """`Admin.browse` shows messages without taking them."""
    pause: bool
    """`Admin.pause` stops a queue for every consumer of the system."""
    lists: bool
    """`Admin.inspect` knows every queue; else those declared on the same connection, or asked for by name."""
    sees_delayed: bool
    """`Admin.inspect` counts and `Admin.purge` removes what is under a delay; else that waits elsewhere, unseen."""
    exact_length: bool
    """`Queue.max_length` is never exceeded, what consumers hold counts, and what one queue refuses reaches none.
    Else it is a brake: publishing far beyond it answers `QueueFull`."""
    releases_in_place: bool = True
    """What is released, or lost with its consumer, is what the system has of it; else a `Release` stores the delivery's
    own `raw` anew, which has to stay until then."""
    transactions: bool = False
    """It is a `Transactional`: messages can be published inside a transaction of the caller's."""


class Queue(msgspec.Struct, frozen=True):
    """A named durable subscription, bound to its own name and to its `topics`."""

    name: str
    topics: tuple[str, ...] = ()
    priorities: int = 0
    """Levels asked for; systems that order by priority anyway ignore it."""
    ordered: bool = False
    lane_of: str | None = None
    """The queue beside which this one runs: its messages keep the key order of that queue. Declared after it."""
    max_length: int | None = None
    """Messages it may hold, beyond which `publish` answers `QueueFull`; None: no ceiling."""


class Ack(msgspec.Struct, frozen=True, gc=False):
    """Done: remove it."""

    delivery: Delivery


class Release(msgspec.Struct, frozen=True, gc=False):
    """Give it back unchanged, to be received again after `delay` seconds."""

    delivery: Delivery
    delay: float = 0.0


class Move(msgspec.Struct, frozen=True, gc=False):
    """Take it out of its queue and put `message` into exactly the queue `to`, which is declared.

    Moving within a queue keeps the message's place among those of its key.
    """

    delivery: Delivery
    to: str
    message: Outgoing


Settlement: TypeAlias = Ack | Release | Move

OnLost: TypeAlias = Callable[[Sequence[Delivery]], None]
OnRefused: TypeAlias = Callable[[BrokerError], None]


class Subscription(Protocol):
    """One consumer of some queues. Not shared between event loops."""

    @property
    def consuming(self) -> bool:
        """Whether messages would arrive now if there were any."""
        ...

    async def receive(self, limit: int, wait: float) -> list[Delivery]:
        """Up to `limit` messages, as soon as there is one; an empty list after `wait` seconds.

        At most `prefetch` are ever held unsettled. Cancelling loses nothing: what was taken for a
        cancelled call comes with the next one, or is released on close.

        :raises BrokerUnavailable: call again later; re-subscribing is the adapter's business.
        :raises BrokerRefused: it is no use to call again.
        """
        ...

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Delivery]:
        """Carry out all of `items`; returns the deliveries that were no longer ours (nothing was done
        to those). When it returns, the outcome is as durable as the system is. May be called with other
        items while a call is under way: acknowledgements wait for no `Move`.

        :raises BrokerUnavailable: what was done is not known; settling the same items again is safe.
        """
        ...

    async def close(self) -> None:
        """Stop consuming and release what is held, uncounted. Idempotent; wakes a blocked `receive`."""
        ...


class Inbox(Protocol):
    """What reaches only those who live: broadcasts, and replies to the requests that were made here. Nothing
    in it is stored, settled or sent again."""

    @property
    def life(self) -> int:
        """Grows when requests made before can no longer be answered here: the connection was lost, say."""
        ...

    async def listen(self, topics: frozenset[str]) -> None:
        """Hear what is broadcast to these topics from now on, and to no others. When it returns, it is so.

        :raises BrokerUnavailable: call again later.
        """
        ...

    async def receive(self, wait: float) -> list[Delivery]:
        """What has come in, as soon as there is something; an empty list after `wait` seconds, or once `life`
        has grown. Cancel-safe.

        A reply has the inbox's own address for its topic, and the id that the replier gave it. What is sent
        while the system cannot be reached, or past `INBOX_SIZE` that nobody fetches, is not heard.

        :raises BrokerUnavailable: call again later; listening again is the adapter's business.
        """
        ...

    async def request(self, message: Outgoing, refused: OnRefused) -> None:
        """Publish a message (to every queue bound to its topic) whose receiver finds this inbox in
        `Delivery.reply_to`. It needs no `listen` before. Returns when the message is on its way; a priority, an
        expiry or a delay means what it means to `publish`. Who is asked twice may answer twice.

        `refused` is called in the event loop, at most once, if it turns out that no queue took it
        (`Unroutable`, `QueueFull`, …) or that the line broke before that was known (`BrokerUnavailable`).
        It may be called before this returns, and not after `close`.

        :raises BrokerUnavailable: it was not sent.
        """
        ...

    async def close(self) -> None:
        """Hear nothing more: `life` has grown, and `receive` returns an empty list at once. Idempotent; wakes a
        blocked `receive`."""
        ...


INBOX_SIZE = 10_000
"""Messages an inbox keeps for whoever is slow to fetch them; the oldest are dropped first."""


class QueueInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as the system sees it; None: it cannot say."""

    name: str
    ready: int | None
    """Waiting; with those under a delay where `capabilities.sees_delayed`."""
    unsettled: int | None
    """In the hands of consumers."""
    consumers: int | None
    oldest: float | None
    """`enqueued_at` of the oldest waiting message, in Unix seconds."""
    paused: bool = False
    expired: int | None = 0
    """Messages dropped by expiry so far."""
    discarded: int | None = 0
    """Messages removed by `purge` so far."""
    bindings: tuple[str, ...] | None = ()


class Admin(Protocol):
    """Optional: what an operator may look at and do. Nothing here takes part in delivery.

    What a system cannot do (`capabilities.browse`, `capabilities.pause`; `unbind` without `capabilities.topics`)
    raises `Unsupported`.
    """

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        """Queues in the order of their names: those of `names` that exist; None: every one where
        `capabilities.lists`, else those declared on this connection."""
        ...

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        """Up to `limit` messages of a queue in order, without taking them, and the position to go on from
        (None at the end).

        :raises BrokerError: no such queue.
        """
        ...

    async def purge(self, queue: str) -> int:
        """Remove every message that no consumer holds; how many that were.

        :raises BrokerError: no such queue.
        """
        ...

    async def pause(self, queue: str, paused: bool) -> None:
        """Stop or resume handing out a queue's messages, to every consumer of the system.

        :raises BrokerError: no such queue.
        """
        ...

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        """Have a queue get no more of what is published to these topics from now on. What waits in it stays; its
        own name stays bound. Idempotent; a topic that it is not bound to is no error.

        :raises BrokerError: no such queue.
        :raises ValueError: one of them is the queue's own name; then nothing is done.
        """
        ...


def to_unbind(queue: str, topics: Sequence[str]) -> list[str]:
    """What `Admin.unbind` is asked for, each topic once.

    :raises ValueError: one of them is the queue's own name.
    """
    if queue in topics:
        raise ValueError(f"queue {queue!r} stays bound to its own name")
    return list(dict.fromkeys(topics))


class Broker(Protocol):
    """An adapter: one message system at one URL."""

    capabilities: Capabilities

    @property
    def admin(self) -> Admin | None:
        """The operator's side, where the system has one."""
        ...

    async def open(self) -> None:
        """Connect. Idempotent.

        :raises BrokerUnavailable: not reachable now.
        :raises BrokerRefused: never going to work (credentials, not a file of ours).
        """
        ...

    async def close(self) -> None:
        """Close every subscription and the connection. Idempotent. Cancelled, it cuts the connection: nothing more is
        said, and nothing waited for."""
        ...

    async def declare(self, queue: Queue) -> None:
        """Make sure that a queue and its bindings exist. Idempotent; adds bindings, never alters or deletes.

        :raises QueueMismatch: it exists and contradicts `queue`.
        """
        ...

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        """One copy of each message to every queue bound to its topic; None for each that is stored (durable
        where `capabilities.durable` and `persistent`), else why not: `Unroutable`, `QueueFull`, ….

        :raises BrokerUnavailable: nothing is known to be stored.
        """
        ...

    async def broadcast(self, message: Outgoing) -> None:
        """One copy to every inbox that listens to the message's topic now, in whatever process; to nobody
        else, and to nobody later.

        :raises BrokerUnavailable: it may not have been sent.
        """
        ...

    async def reply(self, messages: Sequence[Outgoing]) -> None:
        """Send each to the inbox that its topic names, the `reply_to` of a request. Not stored, not confirmed;
        an inbox that has gone, or an address that never was one, is no error, and costs the others nothing.

        :raises BrokerUnavailable: they may not have been sent.
        """
        ...

    def inbox(self) -> Inbox:
        """A new inbox, which listens to nothing yet. Not shared between event loops."""
        ...

    def subscribe(
        self, queues: Sequence[Queue], *, prefetch: int, lease: float, on_lost: OnLost, ahead: bool = True
    ) -> Subscription:
        """A consumer of declared queues holding at most `prefetch` messages.

        With `ahead=False` it holds nothing but what `receive` has returned: no message is taken, or
        pushed to it, that nobody has asked for yet.

        It keeps its messages for as long as its event loop turns. Once it has been silent for `lease`
        seconds they are handed to others, counted as redelivered. `on_lost` is called in the event
        loop with the deliveries that are known to have gone, after marking each `lost`.
        """
        ...


@runtime_checkable
class Transactional(Protocol):
    """What a broker with `capabilities.transactions` does beside: its queues are where the caller's own data is."""

    async def publish_within(self, messages: Sequence[Outgoing], transaction: Any) -> Sequence[PublishError | None]:
        """As `Broker.publish`, inside a transaction that the caller has begun, and ends: what is committed is as
        durable as that, and heard of then; what is rolled back was never there. A refusal leaves the transaction
        as it is.

        :param transaction: what the caller's driver has for it; the adapter says which.
        :raises TypeError: it is nothing of that kind.
        :raises ValueError: no transaction has begun, or one above the isolation that the queue needs.
        :raises BrokerError: the system raised an error, and with it the transaction is as good as rolled back.
        """
        ...


class Adapter(Protocol):
    """How the registry makes a broker of a URL."""

    def __call__(self, url: str, *, vhost: str | None = None) -> Broker:
        """:raises ConfigError: a URL that can never work."""
        ...
