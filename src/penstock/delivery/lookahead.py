"""How far ahead a consumer takes messages: enough to be busy for about a second."""

from __future__ import annotations

LEAST = 8
"""Messages in hand, or twice what is handled at once if that is more; `prefetch` bounds both."""
LONGEST_WAIT = 1.0
"""Seconds that a message should wait in our hands at most before it is started."""


class LookAhead:
    """The size of a consumer's hand, between a few messages and `prefetch`.

    What we hold unstarted helps nobody else: another process may be idle, a higher priority may come in,
    and if we die each of them is suspected. So the hand grows only while the handler is waiting for
    more, and shrinks when messages wait in it.
    """

    def __init__(self, prefetch: int, at_once: int) -> None:
        self._most = prefetch
        self._least = min(prefetch, max(LEAST, 2 * at_once))
        self.size = self._least

    @property
    def enough(self) -> int:
        """Room for so many is worth a request while others wait to be started."""
        return max(self.size // 4, 1)

    def ran_dry(self) -> None:
        """All that was in hand has been started, and there was more to be had."""
        self.size = min(self.size * 2, self._most)

    def waited(self, seconds: float) -> None:
        """A message has been waiting in our hands for so long, and is not started yet."""
        if seconds > LONGEST_WAIT:
            self.size = max(self.size // 2, self._least)
