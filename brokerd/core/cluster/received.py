"""Batches that were received from one host, and the outcomes that it may not know yet.

A batch is accepted only in ascending order. The numbers that a later batch or an inquiry
has passed were never seen, and are refused from then on. So "never seen" is definite.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from brokerd.core.cluster.blob import Blob

__all__ = ["ReceivedBatches", "as_ranges"]

#: Seconds that news wait for a message to go with. Requests that follow each other need
#: none of their own, and rarely a timer.
_WAIT_S: Final = 0.01
#: Seconds that news wait before they go with frames: those of several batches go together.
_GATHER_S: Final = 0.005


class ReceivedBatches:
    """The batches of one generation of a link, at the owner.

    Attributes:
        generation: Of the origin.
        pending: Batches with frames that still wait, and their bytes.
        done: Numbers that the next outcomes report.
        never: Inclusive ranges of numbers never seen, for the same outcomes.
        wait_until: Until when these news can wait for a message to go with.
        done_size: Bytes of the batches that are done.
        last_outcomes: The number of the last outcomes that were made.
        kept: Bytes of the outcomes that the origin has not confirmed.
    """

    __slots__ = (
        "_kept",
        "_next_number",
        "done",
        "done_size",
        "generation",
        "kept",
        "last_outcomes",
        "never",
        "pending",
        "wait_until",
    )

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.pending: dict[int, int] = {}
        self.done: list[int] = []
        self.done_size = 0
        self.never: list[tuple[int, int]] = []
        self.last_outcomes = 0
        self.kept = 0
        self._next_number = 1
        self.wait_until = 0.0
        #: Outcomes that are not confirmed: their numbers and their messages.
        self._kept: deque[tuple[int, bytes]] = deque()

    def capture(self, blob: Blob) -> dict[str, Any]:
        """Return the facts for a new process; the outcomes are added to ``blob``."""
        return {
            "generation": self.generation,
            "next": self._next_number,
            "pending": list(self.pending.items()),
            "last_outcomes": self.last_outcomes,
            "kept": [[number, blob.put(message)] for number, message in self._kept],
        }

    def restore(self, facts: dict[str, Any], blob: Blob) -> None:
        """Go on with the batches of another process."""
        self._next_number = int(facts["next"])
        self.pending = {int(number): int(size) for number, size in facts["pending"]}
        for number, size in facts["kept"]:
            self.last_outcomes = int(number)
            self.keep(blob.take(size), sys.maxsize)
        self.last_outcomes = int(facts["last_outcomes"])

    @property
    def has_news(self) -> bool:
        """Whether there are numbers to report."""
        return bool(self.done or self.never)

    def accept(self, number: int, size: int) -> bool:
        """Return whether a batch is to be delivered; note those that are missing.

        size: bytes of the batch.
        """
        if number < self._next_number:
            return False
        self.skip_to(number)
        self._next_number = number + 1
        self.pending[number] = size
        return True

    def skip_to(self, number: int) -> None:
        """Refuse from now on all batches before this number that were not received."""
        if number > self._next_number:
            # A range, however far a number of another host is from the last one.
            self.never.append((self._next_number, number - 1))
            self._next_number = number

    def finish(self, number: int, now: float) -> bool:
        """Note that no frame of a batch waits any more; return False if it is not known."""
        size = self.pending.pop(number, None)
        if size is None:
            return False
        if not self.done:
            self.wait_until = now + _WAIT_S
        self.done.append(number)
        self.done_size += size
        return True

    def forget(self, number: int) -> None:
        """Forget a batch: some of its frames will have no outcome."""
        self.pending.pop(number, None)

    def can_wait(self, now: float, most: int) -> bool:
        """Return whether nothing is new, or the news can wait for a message to go with.

        The origin gets room in its window a little later, and has one message less to read.

        most: bytes of batches that are done; more do not wait.
        """
        if self.never:
            return False
        return not self.done or (now < self.wait_until and self.done_size < most)

    def is_gathered(self, now: float) -> bool:
        """Return whether there are news that have waited long enough to go with frames."""
        return bool(self.done) and self.wait_until - now <= _WAIT_S - _GATHER_S

    def take_news(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Remove and return the ranges of batches (done, never seen) to report."""
        done, never = as_ranges(self.done), self.never
        self.done, self.never = [], []
        self.done_size = 0
        return done, never

    def keep(self, message: bytes, limit: int) -> None:
        """Keep the message of the last outcomes until the origin confirms it.

        limit: bytes kept; beyond it the oldest outcomes are forgotten.
        """
        self._kept.append((self.last_outcomes, message))
        self.kept += len(message)
        while self.kept > limit and len(self._kept) > 1:
            self._forget_first()

    def confirm(self, number: int) -> None:
        """Forget the outcomes up to this number: the origin has received them."""
        while self._kept and self._kept[0][0] <= number:
            self._forget_first()

    def _forget_first(self) -> None:
        _, message = self._kept.popleft()
        self.kept -= len(message)

    @property
    def first_outcomes(self) -> int:
        """The number of the first outcomes that are still kept, or of the next ones."""
        return self._kept[0][0] if self._kept else self.last_outcomes + 1

    def messages(self) -> list[bytes]:
        """Return the messages of all outcomes that are kept."""
        return [message for _, message in self._kept]


def as_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return numbers as inclusive ranges, in ascending order."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
