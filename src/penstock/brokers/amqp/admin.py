"""The operator's side: what AMQP itself can tell of a queue whose name is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity

from penstock.brokers.amqp import topology
from penstock.brokers.base import QueueInfo, to_unbind
from penstock.errors import BrokerError, Unsupported
from penstock.message import Delivery

if TYPE_CHECKING:
    from penstock.brokers.amqp.broker import AmqpBroker


class AmqpAdmin:
    """Counts what waits and who consumes; AMQP tells nothing of what consumers hold, nor of bindings."""

    def __init__(self, broker: AmqpBroker) -> None:
        self._broker = broker
        self._link = broker.publishing

    async def inspect(self, names: Sequence[str] | None = None) -> Sequence[QueueInfo]:
        wanted = self._broker.queues if names is None else names
        found: list[QueueInfo] = []
        channel: Channel | None = None
        try:
            for name in sorted({name for name in wanted if name and topology.can_be_named(name)}):
                if channel is None or channel.is_closed:
                    channel = await self._link.channel(confirms=False)
                info = await self._look(channel, name)
                if info is not None:
                    found.append(info)
        finally:
            await self._link.close_channel(channel)
        return found

    async def _look(self, channel: Channel, name: str) -> QueueInfo | None:
        """None: there is none; that costs the channel."""
        with self._link.guard():
            try:
                seen = await channel.queue_declare(name, passive=True)
            except ChannelNotFoundEntity:
                return None
        return QueueInfo(
            name=name,
            ready=seen.message_count,
            unsettled=None,
            consumers=seen.consumer_count,
            oldest=None,
            expired=None,
            discarded=None,
            bindings=None,
        )

    async def purge(self, queue: str) -> int:
        channel = await self._link.channel(confirms=False)
        try:
            with self._link.guard():
                try:
                    purged = await channel.queue_purge(queue)
                except ChannelNotFoundEntity:
                    raise BrokerError(f"there is no queue {queue!r}") from None
        finally:
            await self._link.close_channel(channel)
        return int(purged.message_count or 0)

    async def unbind(self, queue: str, topics: Sequence[str]) -> None:
        unbound = [topic for topic in to_unbind(queue, topics) if topology.can_be_named(topic)]
        if not (queue and topology.can_be_named(queue) and await topology.unbind(self._link, queue, unbound)):
            raise BrokerError(f"there is no queue {queue!r}")
        self._broker.forget_topics(queue, unbound)

    async def browse(self, queue: str, limit: int, after: Any = None) -> tuple[list[Delivery], Any]:
        raise Unsupported("RabbitMQ cannot show messages without taking them")

    async def pause(self, queue: str, paused: bool) -> None:
        raise Unsupported("RabbitMQ cannot pause a queue: stop its consumers instead")
