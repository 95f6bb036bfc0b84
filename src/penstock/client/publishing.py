"""`Publishing`: the part of `Client` that gives messages to queues."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from penstock import codec, config
from penstock.brokers.base import Broker, Transactional
from penstock.brokers.pool import Pool
from penstock.client.listening import Listening
from penstock.clock import is_seconds
from penstock.errors import BodyTooLarge, BrokerUnavailable, PublishError, PublishTimeout, Unencodable, Unsupported
from penstock.message import RESERVED, Outgoing
from penstock.stores import registry as stores
from penstock.stores.keeper import Keeper
from penstock.waiting import Gathering

T = TypeVar("T")

Fits = Callable[[str, bytes, Mapping[str, Any]], None]
"""`fits(name, body, headers)` raises `InvalidMessage` where a task that is known could not be run with that."""

MAX_BODY = 8 * 2**20
FIRST_RETRY, LONGEST_RETRY = 0.05, 2.0  # seconds between tries to reach the broker

_HEADER_VALUES = (str, int, float, bool, type(None))


class Publishing:
    """Publishes. See `Client`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        brokers: Mapping[str, str] | None = None,
        store: str | None = None,
        max_body: int = MAX_BODY,
        pool: Pool | None = None,
        keeper: Keeper | None = None,
        fits: Fits | None = None,
    ) -> None:
        self._pool = pool or Pool(resolve_broker(url), brokers)
        self._keeper = keeper or Keeper(resolve_store(store, str(self._pool.urls[None])))
        self._outboxes: dict[Broker, Gathering[Outgoing, PublishError | None]] = {}
        self._outboxes_loop: asyncio.AbstractEventLoop | None = None
        self._max_body = max_body
        self._fits = fits
        self._listening = Listening(self._get_broker, max_body)

    async def publish(
        self,
        name: str,
        body: Any,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, Any] | None = None,
        priority: int = 0,
        expires: float | None = None,
        delay: float | None = None,
        persistent: bool = True,
        timeout: float | None = 30,
        broker: str | None = None,
        transaction: Any = None,
    ) -> str:
        """Give one copy of a message to every queue bound to `name`; returns its id once it is durable.

        `body`: bytes, text, or anything that JSON can say (dataclasses, Structs, pydantic models, …).
        `key` orders within `ordered` queues; `priority` is 0 to 255, higher first; `expires`, `delay`
        and `timeout` are seconds.

        `transaction` is a connection of yours to the broker's own database, in a transaction (PostgreSQL: of asyncpg
        or psycopg 3): the message is part of that, durable and received once you commit, and never was if you roll
        back.

        :raises Unroutable: no queue is bound to the name.
        :raises BodyTooLarge, Unencodable, QueueFull, StorageFull: as they say; nothing was stored.
        :raises PublishTimeout: not confirmed in time; it may have been stored.
        :raises ValueError: a number or header that cannot be.
        :raises Unsupported: `transaction`, where the broker is no database with transactions of yours.
        """
        message = self._message(name, body, id, key, headers, priority, expires, delay, persistent)
        (refusal,) = await self._send([message], timeout, broker, transaction)
        if refusal is not None:
            raise refusal
        return message.id

    async def publish_many(
        self,
        name: str,
        bodies: list[Any],
        *,
        ids: Sequence[str] | None = None,
        key: str | None = None,
        headers: Mapping[str, Any] | None = None,
        priority: int = 0,
        expires: float | None = None,
        delay: float | None = None,
        persistent: bool = True,
        timeout: float | None = 30,
        broker: str | None = None,
        transaction: Any = None,
    ) -> list[str]:
        """Publish a list of bodies in one round trip; returns their ids in order.

        The keywords are those of `publish`, for all of them.

        :raises TypeError: not a list.
        :raises PublishError: some were refused, by the broker or because they cannot be sent (`BodyTooLarge`,
            `Unencodable`): `failed` maps their indexes to errors, the others are stored.
        :raises PublishTimeout: not confirmed in time; those in `failed` may have been stored.
        """
        if not isinstance(bodies, list):
            raise TypeError(f"publish_many takes a list of bodies, not {type(bodies).__name__}")
        if ids is not None:
            if len(ids) != len(bodies):
                raise ValueError(f"{len(ids)} ids for {len(bodies)} bodies")
            for one in ids:
                check_text("an id", one)
            ids = [str.__str__(one) for one in ids]
        if not bodies:
            return []
        if ids is None:
            ids = new_ids(len(bodies))
        like = self._message(name, b"", ids[0], key, headers, priority, expires, delay, persistent)
        failed: dict[int, PublishError] = {}
        messages: dict[int, Outgoing] = {}
        for index, body in enumerate(bodies):
            try:
                data, described = self._encode(body, headers)
            except (Unencodable, BodyTooLarge) as error:
                failed[index] = error
                continue
            messages[index] = Outgoing(
                id=ids[index],
                topic=like.topic,
                body=data,
                headers=described,
                key=like.key,
                priority=priority,
                enqueued_at=like.enqueued_at,
                expires_at=like.expires_at,
                delay=like.delay,
                persistent=persistent,
            )
        if messages:
            try:
                refusals = await self._send(list(messages.values()), timeout, broker, transaction)
            except PublishTimeout as error:
                error.failed = dict.fromkeys(messages, error) | failed
                raise
            failed |= {index: one for index, one in zip(messages, refusals, strict=True) if one is not None}
        if failed:
            example = failed[min(failed)]
            if len(failed) == len(bodies):
                example.failed = failed
                raise example
            raise PublishError(f"{len(failed)} of {len(bodies)} messages were refused: {example}", failed)
        return list(ids)

    def _message(
        self,
        name: str,
        body: Any,
        id: str | None,
        key: str | None,
        headers: Mapping[str, Any] | None,
        priority: int,
        expires: float | None,
        delay: float | None,
        persistent: bool,
    ) -> Outgoing:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a name to publish to is text and not empty, not {name!r}")
        for what, text in (("a name to publish to", name), ("an id", id), ("a key", key)):
            if text is not None:
                check_text(what, text)
        if type(priority) is not int or not 0 <= priority <= 255:
            raise ValueError(f"priority must be a whole number, 0 to 255, not {priority!r}")
        check_seconds("delay", delay)
        check_seconds("expires", expires)
        if headers:
            check_headers(headers)
        data, described = self._encode(body, headers)
        now = time.time()
        return Outgoing(
            id=str.__str__(id) if id else new_ids(1)[0],
            topic=str.__str__(name),
            body=data,
            headers=described,
            key=None if key is None else str.__str__(key),
            priority=priority,
            enqueued_at=now,
            expires_at=None if expires is None else now + expires,
            delay=delay or 0.0,
            persistent=persistent,
        )

    def _encode(self, body: Any, headers: Mapping[str, Any] | None) -> tuple[bytes, Mapping[str, Any]]:
        """:raises Unencodable, BodyTooLarge: it cannot be sent."""
        data, described = codec.encode(body, headers)
        if len(data) > self._max_body:
            raise BodyTooLarge(len(data), self._max_body)
        return data, described

    async def _send(
        self, messages: Sequence[Outgoing], timeout: float | None, name: str | None, transaction: Any = None
    ) -> Sequence[PublishError | None]:
        if transaction is not None:
            return await self._send_within(messages, timeout, name, transaction)
        if len(messages) == 1:
            return [await self._reach(lambda broker: self._outbox(broker).do(messages[0]), timeout, name)]
        return await self._reach(lambda broker: broker.publish(messages), timeout, name)

    async def _send_within(
        self, messages: Sequence[Outgoing], timeout: float | None, name: str | None, transaction: Any
    ) -> Sequence[PublishError | None]:
        """Once: what failed inside a transaction can only be tried again with all of it."""
        broker = await self._reach(_itself, timeout, name)
        if not isinstance(broker, Transactional):
            raise Unsupported("transaction= needs a broker in your own database: postgresql://…")
        try:
            async with asyncio.timeout(timeout):
                return await broker.publish_within(messages, transaction)
        except TimeoutError:
            raise PublishTimeout(f"not published within {timeout:g} s: roll the transaction back") from None

    def _outbox(self, broker: Broker) -> Gathering[Outgoing, PublishError | None]:
        """Where messages that are published one by one at the same time come together."""
        outbox = self._outboxes.get(broker)
        if outbox is None:
            loop = asyncio.get_running_loop()
            if loop is not self._outboxes_loop:  # those of brokers that ended with another
                self._outboxes_loop, self._outboxes = loop, {}
            outbox = self._outboxes[broker] = Gathering(broker.publish)
        return outbox

    async def _get_broker(self, name: str | None = None) -> Broker:
        """Connected; see `Pool.get`."""
        return await self._pool.get(name)

    async def _reach(self, work: Callable[[Broker], Awaitable[T]], timeout: float | None, name: str | None) -> T:
        """Have a broker do something, trying again while it cannot be reached.

        :raises PublishTimeout: not done in time; `reached` is False where it was not even begun.
        """
        check_seconds("timeout", timeout)
        self._pool.check(name)
        self._listening.start()
        complaint: BrokerUnavailable | None = None
        delay = FIRST_RETRY
        reached = False
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        broker = await self._get_broker(name)
                        reached = True
                        return await work(broker)
                    except BrokerUnavailable as error:
                        complaint = error
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, LONGEST_RETRY)
        except TimeoutError:
            why = f": {complaint}" if complaint else ""
            raise PublishTimeout(f"not confirmed within {timeout:g} s{why}", reached=reached) from complaint


async def _itself(broker: Broker) -> Broker:
    return broker


def new_ids(count: int) -> list[str]:
    """As many random ids of 128 bits."""
    digits = os.urandom(16 * count).hex()
    return [digits[at : at + 32] for at in range(0, 32 * count, 32)]


def check_seconds(what: str, value: Any) -> None:
    """:raises ValueError: neither None nor a number of seconds that can be waited for."""
    if value is not None and not is_seconds(value):
        raise ValueError(f"{what} must be 0 or more seconds, not {value!r}")


def check_text(what: str, value: Any) -> None:
    """:raises ValueError: not text, or text that not every system could give back."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is text, not {value!r}")
    if "\0" in value:
        raise ValueError(f"{what} must hold no null character: {value!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} must be valid Unicode, not {value!r}") from None


def check_headers(headers: Mapping[str, Any]) -> None:
    """:raises ValueError: a name or value that not every message system can carry."""
    if not isinstance(headers, Mapping):
        raise ValueError(f"headers are a mapping of names to values, not {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"a header's name is text and not empty, not {name!r}")
        check_text("a header's name", name)
        if name.startswith(RESERVED):
            raise ValueError(f"header {name!r}: names that begin with {RESERVED!r} are Penstock's own")
        if not isinstance(value, _HEADER_VALUES):
            raise ValueError(f"header {name!r} must be text, a number, a boolean or None, not {type(value).__name__}")
        if isinstance(value, str):
            check_text(f"header {name!r}", value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"header {name!r} must be a number of 64 bits, not {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"header {name!r} must be a finite number, not {value!r}")


def resolve_broker(url: str | None) -> str:
    """The broker's URL: given, else from the environment, else from `penstock.toml`, else the default file."""
    return url or config.load().broker or config.default_broker()


def resolve_store(url: str | None, broker: str) -> str | None:
    """The store's URL: given, else from the environment or `penstock.toml`, else the broker's own where that can
    be a store too, else None.

    :raises ConfigError: a URL that no adapter serves.
    """
    found = url or config.load().store
    if found is not None:
        stores.check(found)
        return found
    return broker if stores.serves(broker) else None
