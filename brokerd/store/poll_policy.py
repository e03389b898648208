"""Decides whether a poll is worth the processor time that it takes.

Between two looks, a poll gives its processor to any process that waits for it. That may be
the very client whose next message is polled for: the receipt has woken it on this
processor. Without this, a round trip with two polls takes a sixth longer.

A program that keeps the processor would make that round trip half as long again. So the
poll ends. The time without polls doubles each time, because the program may go on.

A poll in vain doubles the number of waits before the next one. Where other programs need
the processors, the system takes this process's away in the middle of a poll: no poll
begins for a second after that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

__all__ = ["PollPolicy", "give_way"]

#: Lets another process run that waits for this processor; returns at once if none does.
give_way: Final[Callable[[], None]] = getattr(os, "sched_yield", lambda: None)

#: Most waits without a poll, after many polls in vain.
_MOST: Final = 4096
#: Seconds by which the end of a poll is late if the processor was taken away.
_LATE_S: Final = 0.001
#: Seconds after which a processor that was given away comes back, if a client only sends
#: its next message.
_GIVEN_S: Final = 0.0001
#: Seconds without a poll where other programs need the processors; and the fewest, where a
#: program has kept one once. They double each time; a poll that was not in vain takes a
#: twentieth off.
_REST_S: Final = 1.0
_SHORT_REST_S: Final = 0.01
_RELIEF: Final = 0.95


class PollPolicy:
    """Counts what the polls of one process have achieved.

    may_poll: whether it polls at all.
    """

    __slots__ = ("_left_out", "_next_left_out", "_next_rest_s", "_rests_until")

    def __init__(self, *, may_poll: bool) -> None:
        #: Waits that follow without a poll, and how many it will be after the next poll
        #: in vain.
        self._left_out = 0
        self._next_left_out = 1
        self._next_rest_s = _SHORT_REST_S
        self._rests_until = 0.0 if may_poll else float("inf")

    def allows(self, now: float) -> bool:
        """Return whether the wait that begins now is polled for."""
        if self._left_out:
            self._left_out -= 1
            return False
        return now >= self._rests_until

    def ends(self, gave_at: float, now: float) -> bool:
        """Return whether the poll ends, as another program has kept the processor.

        gave_at: when the processor was given away. It came back now.
        """
        if now < gave_at + _GIVEN_S:
            return False
        self._rests_until = now + self._next_rest_s
        self._next_rest_s = min(2 * self._next_rest_s, _REST_S)
        return True

    def note_success(self) -> None:
        """Note that what a poll waited for has come."""
        self._next_left_out = 1
        self._next_rest_s = max(_SHORT_REST_S, _RELIEF * self._next_rest_s)

    def note_failure(self, now: float, end_at: float) -> None:
        """Note that a poll was in vain. end_at: when it was to end."""
        self._left_out = self._next_left_out
        self._next_left_out = min(2 * self._next_left_out, _MOST)
        if now >= end_at + _LATE_S:
            self._rests_until = now + _REST_S
