"""Keeps the store process awake for the next lone message.

A client may wait for each receipt before it sends its next message. The message then
comes some tenths of a millisecond later. To sleep that long costs more: the system must
wake the store process, on a processor that went idle and lost what its caches had. With
the poll, the receipt comes a sixth sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from brokerd.store.poll_policy import PollPolicy, give_way

__all__ = ["RequestPoll"]

#: Longest poll, in seconds.
_POLL_S: Final = 400e-6


class Waiting(Protocol):
    """Waits for requests, as ``select.poll`` does."""

    def poll(self, timeout: float, /) -> list[tuple[int, int]]:
        """Return what is there within so many milliseconds."""


class RequestPoll:
    """The polls for one broker's requests.

    Args:
        waiting: Waits for them.
        may_poll: Whether it polls at all.
        clock: Returns the time in seconds.
        give_way: Lets another process run.
    """

    def __init__(
        self,
        waiting: Waiting,
        *,
        may_poll: bool,
        clock: Callable[[], float] = time.perf_counter,
        give_way: Callable[[], None] = give_way,
    ) -> None:
        self._waiting = waiting
        self._give_way = give_way
        self._policy = PollPolicy(may_poll=may_poll)
        self._clock = clock

    def run(self) -> None:
        """Return when a request is there, or after a moment."""
        now = self._clock()
        if not self._policy.allows(now):
            return
        end_at = now + _POLL_S
        while not self._waiting.poll(0):
            now = self._clock()
            if now >= end_at:
                self._policy.note_failure(now, end_at)
                return
            self._give_way()
            if self._policy.ends(now, self._clock()):
                return
        self._policy.note_success()
