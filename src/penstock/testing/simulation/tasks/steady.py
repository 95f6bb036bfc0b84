"""What is left to chance in the engine's followers of a store, decided by the seed here."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import TypeVar

from penstock.stores import following

T = TypeVar("T")


class InOrder(set[T]):
    """A set that is walked in the order in which it was filled, whatever the hashes are."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._order = dict.fromkeys(items)
        super().__init__(self._order)

    def add(self, item: T) -> None:
        super().add(item)
        self._order[item] = None

    def discard(self, item: object) -> None:
        super().discard(item)
        self._order.pop(item, None)  # type: ignore[arg-type]  # what is no T is not in it

    def __iter__(self) -> Iterator[T]:
        return iter(self._order)


@contextlib.contextmanager
def steady(rng: random.Random) -> Iterator[None]:
    """Inside, followers take their jitter from `rng`, and ring their bells in the same order each time."""
    names = {"set": InOrder, "random": SimpleNamespace(Random=lambda: rng)}
    before = {name: vars(following)[name] for name in names if name in vars(following)}
    vars(following).update(names)
    try:
        yield
    finally:
        for name in names:
            del vars(following)[name]
        vars(following).update(before)
