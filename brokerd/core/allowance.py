"""How long a recipient with a full queue may hold its senders (``when_full: wait``).

At first for ``limits.wait_timeout``. What a recipient has used of that it earns back: a tenth of
``limits.wait_timeout`` for each half of its queue that it reads, and a tenth of the time in which it holds no sender.
So a recipient that takes a little now and then cannot hold its senders for most of the time.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Allowance"]

#: The share of the longest time that half a queue earns, and of the time without a held sender.
_SHARE: Final = 0.1


class Allowance:
    """One recipient's time for holding senders.

    used: seconds of it that are used up. at: when that was true. holding: whether senders are held since then.
    """

    __slots__ = ("at", "holding", "used")

    def __init__(self, used: float = 0.0, at: float = 0.0, *, holding: bool = False) -> None:
        self.used = used
        self.at = at
        self.holding = holding

    def begin(self, now: float, most: float, *, holds: bool) -> float:
        """Return for how many seconds a sender may be held from now on. holds: others are held already."""
        if self.holding and holds:
            self.used += now - self.at
        else:
            # A sender that was held and has left does not count.
            self.used = max(0.0, self.used - (now - self.at) * _SHARE)
        self.at = now
        self.holding = True
        return most - self.used

    def end(self, now: float) -> None:
        """Count the time until now: no sender is held any more."""
        if self.holding:
            self.used += now - self.at
            self.at = now
            self.holding = False

    def earn(self, most: float) -> None:
        """Count half a queue that was read."""
        self.used = max(0.0, self.used - most * _SHARE)
