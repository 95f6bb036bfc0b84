"""`Cable`: a line to a network namespace that can be pulled out, as from a machine of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
from types import TracebackType
from typing import Self

WITHIN = 10.0  # seconds for a command
NOBODY = "02:00:00:00:00:01"  # the address of a card that there is not: what is sent to it is lost

_numbers = itertools.count(os.getpid() % 4096)


class Cable:
    """A network namespace, and a pair of virtual cards that joins it to this machine. For root, with iproute2.

    A program started within (`Cable.within`) reaches this machine at `here` and is reached at `there`, and
    nothing else. Pulled out, what is sent is lost and nobody is told.
    """

    def __init__(self) -> None:
        number = next(_numbers) % 16384
        self._name = f"penstock-{number:x}"
        self._card = f"pen{number:x}"
        net = f"10.213.{number // 64}.{number % 64 * 4}".rsplit(".", 1)
        self.here, self.there = (f"{net[0]}.{int(net[1]) + host}" for host in (1, 2))

    @staticmethod
    def possible() -> bool:
        """Whether this user can make one here."""
        try:
            with Cable():
                return True
        except (OSError, subprocess.SubprocessError):
            return False

    @property
    def within(self) -> list[str]:
        """What starts a command in the namespace; its process is the command's."""
        return ["ip", "netns", "exec", self._name]

    def __enter__(self) -> Self:
        _ip("netns", "add", self._name)
        try:
            _ip("link", "add", self._card, "type", "veth", "peer", "name", "eth0", "netns", self._name)
            _ip("addr", "add", f"{self.here}/30", "dev", self._card)
            _ip("-n", self._name, "addr", "add", f"{self.there}/30", "dev", "eth0")
            _ip("link", "set", self._card, "up")
            for card in ("lo", "eth0"):
                _ip("-n", self._name, "link", "set", card, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def pull(self) -> None:
        """From now on nothing passes."""
        for way in self._ways():
            _ip(*way[0], "neigh", "replace", *way[1], "lladdr", NOBODY, "nud", "permanent")

    def plug(self) -> None:
        """It passes again."""
        for way in self._ways():
            _ip(*way[0], "neigh", "del", *way[1])

    def _ways(self) -> list[tuple[list[str], list[str]]]:
        """Where each end is set, and whom it knows at the other one."""
        there = [self.there, "dev", self._card]
        here = [self.here, "dev", "eth0"]
        return [([], there), (["-n", self._name], here)]

    def _remove(self) -> None:
        _ip("netns", "del", self._name)  # with the cards in it, and so with the other ends


def _ip(*words: str) -> None:
    """:raises OSError: there is no `ip`.
    :raises subprocess.SubprocessError: it would not.
    """
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=WITHIN)
