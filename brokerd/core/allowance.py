"""How long a recipient with a full queue may hold its senders (``when_full: wait``).

At first it may hold them for ``limits.wait_timeout``. A recipient earns back the time
that it has used. It earns a tenth of ``limits.wait_timeout`` for each half of its queue
that it reads. It also earns a tenth of the time in which it holds no sender. So a slow
consumer that reads a little now and then cannot hold its senders for most of the time.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Allowance"]

#: Fraction of ``limits.wait_timeout`` that is earned per half queue read; also the
#: fraction earned of the time without a held sender.
_SHARE: Final = 0.1


class Allowance:
    """The time for which one recipient may hold senders.

    Attributes:
        used: Seconds that are used up.
        at: The time at which ``used`` was computed.
        holding: Whether senders have been held since then.
    """

    __slots__ = ("at", "holding", "used")

    def __init__(self, used: float = 0.0, at: float = 0.0, *, holding: bool = False) -> None:
        self.used = used
        self.at = at
        self.holding = holding

    def begin(self, now: float, limit: float, *, holds: bool) -> float:
        """Return the seconds a sender may be held.

        holds: other senders are held already.
        """
        if self.holding and holds:
            self.used += now - self.at
        else:
            # The time of a held sender that has left does not count.
            self.used = max(0.0, self.used - (now - self.at) * _SHARE)
        self.at = now
        self.holding = True
        return limit - self.used

    def end(self, now: float) -> None:
        """Add the time until now to ``used``: no sender is held any more."""
        if self.holding:
            self.used += now - self.at
            self.at = now
            self.holding = False

    def earn(self, limit: float) -> None:
        """Credit the recipient for half a queue that it has read."""
        self.used = max(0.0, self.used - limit * _SHARE)
