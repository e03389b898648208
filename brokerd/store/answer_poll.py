"""Keeps the event loop awake while the store process writes a lone batch.

Such a batch takes some tenths of a millisecond, and its sender waits for it. To sleep
that long costs more: the system must wake the broker, on a processor that went idle.
A round trip with a poll takes an eighth less, for as much processor time as the wait.

A disk that takes longer makes polls rare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd.store.poll_policy import PollPolicy, give_way

if TYPE_CHECKING:
    import asyncio

__all__ = ["AnswerPoll"]

#: Longest poll, in seconds.
_POLL_S: Final = 400e-6


class AnswerPoll:
    """The polls for one store's answers.

    may_poll: whether it polls at all.
    clock: returns the time in seconds.
    give_way: lets another process run.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        may_poll: bool,
        clock: Callable[[], float] = time.perf_counter,
        give_way: Callable[[], None] = give_way,
    ) -> None:
        self._loop = loop
        self._give_way = give_way
        self._clock = clock
        self._waits = self._polls = False
        self._end_at = 0.0
        self._policy = PollPolicy(may_poll=may_poll)

    def begin(self) -> None:
        """Note that an answer is waited for, and nothing else of the store."""
        self._waits = True
        now = self._clock()
        if not self._policy.allows(now):
            return
        self._end_at = now + _POLL_S
        if not self._polls:
            self._polls = True
            self._loop.call_soon(self._poll)

    def end(self) -> None:
        """Note that no answer is waited for."""
        self._waits = False

    def _poll(self) -> None:
        """Keep the event loop from sleeping in its next turn, until the answer is there."""
        now = self._clock()
        if self._waits and now < self._end_at:
            self._give_way()
            if self._policy.ends(now, self._clock()):
                self._polls = False
            else:
                self._loop.call_soon(self._poll)
            return
        self._polls = False
        if self._waits:
            self._policy.note_failure(now, self._end_at)
        else:
            self._policy.note_success()
