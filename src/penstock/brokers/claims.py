"""`Claims`: what a consumer holds of what it has asked a system for, and the asking that is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from penstock.brokers.base import OnLost, Settlement
from penstock.message import Delivery

T = TypeVar("T")


class Claimed(NamedTuple):
    """Messages taken, or none and the seconds until a look is worth while (None: when it is told of something)."""

    deliveries: list[Delivery]
    upcoming: float | None


class Claims:
    """One life after another of a consumer from which all that it holds is taken together.

    A claim that was begun for a `receive` goes on when that is cancelled, and what it finds comes with the next one.
    """

    def __init__(self, prefetch: int, on_lost: OnLost) -> None:
        self.held: dict[Any, Delivery] = {}
        """By token; the same dict in every life."""
        self._spare: list[Delivery] = []  # held for a `receive` that was cancelled
        self._prefetch = prefetch
        self._on_lost = on_lost
        self._claiming: asyncio.Future[Claimed | None] | None = None
        self._life = 0

    @property
    def room(self) -> int:
        """For so many messages, with those that are held already and nobody has received."""
        return self._prefetch - len(self.held) + len(self._spare)

    async def take(self, room: int, claim: Callable[[], asyncio.Future[Claimed | None]]) -> Claimed | None:
        """Messages now in hand, at most `room`. None: the consumer has been given up for dead.

        :param claim: begins to ask for `room` messages, if nobody is asking.
        """
        if self._spare:
            taken, self._spare = self._spare[:room], self._spare[room:]
            return Claimed(taken, None)
        if self._claiming is None:
            self._claiming = claim()
        claiming, life = self._claiming, self._life
        try:
            claimed = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            if not claiming.done() or claiming.cancelled():
                raise  # it stays under way: the next call comes back to it
            self._over(claiming)
            if claiming.exception() is None and (late := claiming.result()) is not None and self._life == life:
                self._hold(late.deliveries)  # cancelled at the very moment that it came in
                self._spare += late.deliveries
            raise
        except BaseException:
            self._over(claiming)
            raise
        self._over(claiming)
        if self._life != life:
            return Claimed([], None)  # closed or given up for dead meanwhile: these went back with the rest
        if claimed is None:
            return None
        self._hold(claimed.deliveries)
        self._spare += claimed.deliveries[room:]  # claimed for an earlier call that asked for more
        return Claimed(claimed.deliveries[:room], claimed.upcoming)

    def ours(self, items: Sequence[Settlement]) -> list[Settlement]:
        """Those of what is held."""
        held = self.held
        return [item for item in items if held.get(item.delivery.token) is item.delivery]

    def settled(self, items: Sequence[Settlement]) -> bool:
        """These are held no more; whether there had been no room, so that a `receive` may be waiting for it."""
        held = self.held
        full = len(held) >= self._prefetch
        for item in items:
            if held.get(item.delivery.token) is item.delivery:  # what was given back may be in hand again already
                del held[item.delivery.token]
        return full

    def lose(self) -> None:
        """All of it has gone to others, and what is being asked for is asked for in vain."""
        self._claiming = None
        held = list(self.held.values())
        self.drop()
        for delivery in held:
            delivery.lost = True
        if held:
            self._on_lost(held)

    def drop(self) -> None:
        """The consumer lives no more, and gives it all back."""
        self._life += 1
        self.held.clear()
        self._spare.clear()

    def _hold(self, found: Sequence[Delivery]) -> None:
        self.held.update((delivery.token, delivery) for delivery in found)

    def _over(self, claiming: asyncio.Future[Claimed | None]) -> None:
        if self._claiming is claiming:
            self._claiming = None


def under_way(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task of which nobody may ever ask how it ended."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return task
