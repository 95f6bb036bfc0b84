"""What is left to chance in the engine's followers of a store and lookouts, decided by the seed here."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

from penstock.stores import following
from penstock.tasks import lookout

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
    """Inside, followers take their jitter from `rng`; they ring their bells, and lookouts begin to watch runs, in the
    same order each time.
    """
    with contextlib.ExitStack() as undoing:
        for module, names in (
            (following, {"set": InOrder, "random": SimpleNamespace(Random=lambda: rng)}),
            (lookout, {"set": InOrder}),
        ):
            here = vars(module)
            undoing.callback(_restore, here, {name: here[name] for name in names if name in here}, list(names))
            here.update(names)
        yield


def _restore(here: dict[str, Any], before: dict[str, Any], names: list[str]) -> None:
    for name in names:
        del here[name]
    here.update(before)
