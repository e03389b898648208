"""Work that takes long, done in turns: one job after the other, a few steps at a time.

The jobs are the broker's own events and the questions whose answer is long. They are done strictly in order, so that an
answer says what the events before it have told, and the events behind it are news.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from brokerd.core.broker import Broker

__all__ = ["Deferred", "Job"]

#: Steps of a job that are taken at once where no other job waits: most jobs have fewer.
_AT_ONCE: Final = 16


class Job(Protocol):
    """Something that takes several steps."""

    def begin(self, broker: Broker) -> Iterator[None]:
        """Return the steps, each some tens of microseconds' work."""


class Deferred:
    """The jobs that wait, in order; the first one is under way."""

    def __init__(self, broker: Broker) -> None:
        self.jobs: deque[Job] = deque()
        self._broker = broker
        self._steps: Iterator[None] | None = None

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: Job) -> int:
        """Do a job when all that came before it are done: at once, where it is short and no other waits.

        Returns how many steps were taken.
        """
        self.jobs.append(job)
        return self.run_deferred(_AT_ONCE) if len(self.jobs) == 1 else 0

    def run_deferred(self, count: int) -> int:
        """Take up to ``count`` steps; return how many were taken."""
        steps = 0
        while self.jobs and steps < count:
            steps += 1
            if self._steps is None:
                self._steps = self.jobs[0].begin(self._broker)
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
                self.jobs.popleft()
        return steps
