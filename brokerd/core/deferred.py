"""Deferred work: long jobs, run one after the other and a few steps at a time.

The jobs are the broker's own events, and requests to the broker with a long answer.
They run strictly in order. So an answer agrees with the events before it, and the
events after it are news.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

__all__ = ["Deferred", "Job"]

#: Most steps of a new job that run at once if no other job waits. Most jobs have fewer.
_AT_ONCE: Final = 16


class Job(Protocol):
    """A piece of work that takes several steps."""

    def begin(self) -> Iterator[None]:
        """Return the steps, each of which takes some tens of microseconds."""


class Deferred:
    """The queue of jobs, in order; the first one may be in progress."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self._steps: Iterator[None] | None = None

    def __len__(self) -> int:
        return len(self.jobs)

    def add(self, job: Job) -> int:
        """Queue a job; run its first steps at once if no other job waits.

        Returns the number of steps taken.
        """
        self.jobs.append(job)
        return self.run_deferred(_AT_ONCE) if len(self.jobs) == 1 else 0

    def run_deferred(self, count: int) -> int:
        """Run up to ``count`` steps; return how many were run."""
        steps = 0
        while self.jobs and steps < count:
            steps += 1
            if self._steps is None:
                self._steps = self.jobs[0].begin()
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
                self.jobs.popleft()
        return steps
