"""Keeps a waiting thread awake for input that is near.

A part of the blocking face. A request's answer, or a service's next request, often comes
within some tenths of a millisecond. To sleep that long costs more: the system must wake
the thread, on a processor that went idle and lost what its caches had. With a poll at both
ends, a request takes a third less time, where the processors are idle otherwise.

Between two looks, a poll gives its processor to any process that waits for it: it may be
the very peer whose input is polled for. A poll in vain doubles the number of waits before
the next one. Where another program or thread keeps the processor, the poll ends, and for
some time none begins. There is none with one processor, or with a quota.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, Final

from brokerd_client._common.processors import has_spare_processor

__all__ = ["InputPoll"]

#: Longest poll, in seconds.
_POLL_S: Final = 400e-6
#: Most waits without a poll, after many polls in vain. Where both ends sleep, a wait may
#: take longer than a poll. The next poll of one end makes those of the other succeed.
_MOST: Final = 64
#: Seconds between two looks after which another program or thread has kept the processor.
_KEPT_S: Final = 150e-6
#: Fewest and most seconds without a poll after that. They double each time; a poll that
#: was not in vain takes a hundredth off.
_SHORT_REST_S: Final = 0.05
_REST_S: Final = 2.0
_RELIEF: Final = 0.99

_give_way: Final[Callable[[], None]] = getattr(os, "sched_yield", lambda: None)


@functools.lru_cache(maxsize=1)
def _may_poll() -> bool:
    return has_spare_processor()


class InputPoll:
    """The polls of one client.

    Args:
        may_poll: Whether it polls at all; by default, if there is a spare processor.
        clock: Returns the time in seconds.
        give_way: Lets another process run.
    """

    __slots__ = (
        "_clock",
        "_give_way",
        "_left_out",
        "_next_left_out",
        "_next_rest_s",
        "_rests_until",
    )

    def __init__(
        self,
        *,
        may_poll: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
        give_way: Callable[[], None] = _give_way,
    ) -> None:
        if may_poll is None:
            may_poll = _may_poll()
        self._clock = clock
        self._give_way = give_way
        #: Waits that follow without a poll, and how many it will be after the next poll
        #: in vain.
        self._left_out = 0
        self._next_left_out = 1
        self._next_rest_s = _SHORT_REST_S
        self._rests_until = 0.0 if may_poll else float("inf")

    def run(self, poll: Any) -> bool:
        """Return whether input has come, after a moment at most.

        poll: what is polled, as ``select.poll`` returns it.
        """
        if self._left_out:
            self._left_out -= 1
            return False
        clock, look, give_way = self._clock, poll.poll, self._give_way
        began = now = clock()
        if now < self._rests_until:
            return False
        while not look(0):
            give_way()
            before, now = now, clock()
            if now - before >= _KEPT_S:
                self._rests_until = now + self._next_rest_s
                self._next_rest_s = min(2 * self._next_rest_s, _REST_S)
                return False
            if now - began >= _POLL_S:
                self._left_out = self._next_left_out
                self._next_left_out = min(2 * self._next_left_out, _MOST)
                return False
        self._next_left_out = 1
        self._next_rest_s = max(_SHORT_REST_S, _RELIEF * self._next_rest_s)
        return True
