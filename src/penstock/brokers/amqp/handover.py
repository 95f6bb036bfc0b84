"""Handing messages over without a task for each: the driver makes one a message, a sixth of what a message costs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel

log = logging.getLogger("penstock.amqp")


class _HandedOver:
    """What stands where the driver expects the consumer's coroutine, and then its task: all is done."""

    def add_done_callback(self, callback: Any) -> None:
        """There is no outcome to look at."""


_HANDED_OVER = _HandedOver()


def hand_over(channel: Channel, tag: str, arrive: Callable[[DeliveredMessage], None]) -> None:
    """Have `arrive` called for each message of a consumer, from the driver's reader itself."""
    consumers: dict[str, Any] = channel.consumers
    if tag not in consumers:
        return  # cancelled meanwhile

    def consume(message: DeliveredMessage) -> _HandedOver:
        try:
            arrive(message)
        except Exception:  # in the reader it would cost the channel
            log.exception("a message from %r could not be taken", message.routing_key)
        return _HANDED_OVER

    consumers[tag] = consume
    if "create_task" not in vars(channel):
        create_task = channel.create_task

        def create(coroutine: Any) -> Any:
            return coroutine if coroutine is _HANDED_OVER else create_task(coroutine)

        vars(channel)["create_task"] = create
