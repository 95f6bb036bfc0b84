"""`Client`: the verbs of whoever sends and does not consume."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from penstock import codec, config
from penstock.brokers.base import Broker
from penstock.brokers.pool import Pool
from penstock.client.listening import Listener, Listening
from penstock.errors import BodyTooLarge, BrokerUnavailable, PublishError, PublishTimeout, Unencodable
from penstock.message import RESERVED, Outgoing

T = TypeVar("T")

MAX_BODY = 8 * 2**20
FIRST_RETRY, LONGEST_RETRY = 0.05, 2.0  # seconds between tries to reach the broker

_HEADER_VALUES = (str, int, float, bool, type(None))


class Client:
    """Publishes. Connects on first use and never consumes.

    `url`: given, else `$PENSTOCK_BROKER`, else `penstock.toml`, else `sqlite:///penstock.db`. With
    `async with Client() as client:` the connection ends with the block; else call `close()`.

    :raises ConfigError: a URL that no adapter serves.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        brokers: Mapping[str, str] | None = None,
        max_body: int = MAX_BODY,
        pool: Pool | None = None,
    ) -> None:
        self._pool = pool or Pool(resolve_broker(url), brokers)
        self._max_body = max_body
        self._listening = Listening(self._pool.get, max_body)

    async def __aenter__(self) -> Self:
        self._listening.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Idempotent; the next verb connects again."""
        await self._listening.close()
        await self._pool.close()

    async def connect(self) -> None:
        """Connect now rather than on first use, and begin to hear what was subscribed to before.

        :raises BrokerUnavailable, BrokerRefused: it cannot be done.
        """
        await self._pool.get()
        self._listening.start()

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
    ) -> str:
        """Give one copy of a message to every queue bound to `name`; returns its id once it is durable.

        `body`: bytes, text, or anything that JSON can say (dataclasses, Structs, pydantic models, …).
        `key` orders within `ordered` queues; `priority` is 0 to 255, higher first; `expires`, `delay`
        and `timeout` are seconds.

        :raises Unroutable: no queue is bound to the name.
        :raises BodyTooLarge, Unencodable, QueueFull, StorageFull: as they say; nothing was stored.
        :raises PublishTimeout: not confirmed in time; it may have been stored.
        :raises ValueError: a number or header that cannot be.
        """
        message = self._message(name, body, id, key, headers, priority, expires, delay, persistent)
        (refusal,) = await self._send([message], timeout, broker)
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
    ) -> list[str]:
        """Publish a list of bodies in one round trip; returns their ids in order.

        The keywords are those of `publish`, for all of them.

        :raises TypeError: not a list.
        :raises PublishError: some were refused: `failed` maps their indexes to errors, the others are
            stored. With a body that cannot be sent at all, nothing is published.
        """
        if not isinstance(bodies, list):
            raise TypeError(f"publish_many takes a list of bodies, not {type(bodies).__name__}")
        if ids is not None:
            if len(ids) != len(bodies):
                raise ValueError(f"{len(ids)} ids for {len(bodies)} bodies")
            for one in ids:
                check_text("an id", one)
        if not bodies:
            return []
        if ids is None:
            ids = new_ids(len(bodies))
        first = self._message(name, bodies[0], ids[0], key, headers, priority, expires, delay, persistent)
        messages = [first]
        for index in range(1, len(bodies)):
            data, described = self._encode(bodies[index], headers, index)
            messages.append(
                Outgoing(
                    id=ids[index],
                    topic=name,
                    body=data,
                    headers=described,
                    key=key,
                    priority=priority,
                    enqueued_at=first.enqueued_at,
                    expires_at=first.expires_at,
                    delay=first.delay,
                    persistent=persistent,
                )
            )
        refusals = await self._send(messages, timeout, broker)
        failed = {index: refusal for index, refusal in enumerate(refusals) if refusal is not None}
        if failed:
            example = next(iter(failed.values()))
            if len(failed) == len(messages):
                example.failed = failed
                raise example
            raise PublishError(f"{len(failed)} of {len(messages)} messages were refused: {example}", failed)
        return [message.id for message in messages]

    async def broadcast(self, topic: str, data: Any, *, timeout: float | None = 30) -> None:
        """Say something to whoever is subscribed to `topic` now, in whatever process. Nothing is stored, and
        nobody listening is no error.

        :raises BodyTooLarge, Unencodable: as they say.
        :raises PublishTimeout: the broker could not be reached in time.
        """
        message = self._message(topic, data, None, None, None, 0, None, None, persistent=False)
        await self._reach(lambda broker: broker.broadcast(message), timeout, None)

    def subscribe(self, topic: str, callback: Callable[[Any], Any]) -> Listener:
        """Call `callback(data)`, plain or async, with what is broadcast to `topic` from now on.

        Allowed before there is an event loop or a connection: it comes to life with the first verb,
        `connect()` or `async with`. Awaiting the result waits until it hears; its `close()` ends it. A
        plain callback runs in the event loop and must not block it.
        """
        if not isinstance(topic, str) or not topic:
            raise ValueError(f"a topic is text and not empty, not {topic!r}")
        if not callable(callback):
            raise TypeError(f"a callback can be called, and {callback!r} cannot")
        return self._listening.add(topic, callback)

    async def unsubscribe(self, topic: str, callback: Callable[[Any], Any] | None = None) -> None:
        """End the subscriptions of a callback to a topic, or all to that topic. None is no error."""
        for listener in self._listening.find(topic, callback):
            await listener.close()

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
        if delay is not None and not delay >= 0:
            raise ValueError(f"delay must be 0 or more seconds, not {delay}")
        if expires is not None and not expires >= 0:
            raise ValueError(f"expires must be 0 or more seconds, not {expires}")
        if headers:
            check_headers(headers)
        data, described = self._encode(body, headers)
        now = time.time()
        return Outgoing(
            id=id or new_ids(1)[0],
            topic=name,
            body=data,
            headers=described,
            key=key,
            priority=priority,
            enqueued_at=now,
            expires_at=None if expires is None else now + expires,
            delay=delay or 0.0,
            persistent=persistent,
        )

    def _encode(
        self, body: Any, headers: Mapping[str, Any] | None, index: int | None = None
    ) -> tuple[bytes, Mapping[str, Any]]:
        try:
            data, described = codec.encode(body, headers)
            if len(data) > self._max_body:
                raise BodyTooLarge(len(data), self._max_body)
        except (Unencodable, BodyTooLarge) as error:
            if index is not None:
                error.failed = {index: error}
            raise
        return data, described

    async def _send(
        self, messages: Sequence[Outgoing], timeout: float | None, name: str | None
    ) -> Sequence[PublishError | None]:
        return await self._reach(lambda broker: broker.publish(messages), timeout, name)

    async def _reach(
        self, work: Callable[[Broker], Coroutine[Any, Any, T]], timeout: float | None, name: str | None
    ) -> T:
        """Have a broker do something, trying again while it cannot be reached."""
        self._pool.check(name)
        self._listening.start()
        complaint: BrokerUnavailable | None = None
        delay = FIRST_RETRY
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await work(await self._pool.get(name))
                    except BrokerUnavailable as error:
                        complaint = error
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, LONGEST_RETRY)
        except TimeoutError:
            why = f": {complaint}" if complaint else ""
            raise PublishTimeout(f"not confirmed within {timeout:g} s{why}") from complaint


def new_ids(count: int) -> list[str]:
    """As many random ids of 128 bits."""
    digits = os.urandom(16 * count).hex()
    return [digits[at : at + 32] for at in range(0, 32 * count, 32)]


def check_text(what: str, value: Any) -> None:
    """:raises ValueError: not text, or text that cannot be encoded: no consumer could read it back."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is text, not {value!r}")
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
