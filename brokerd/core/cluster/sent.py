"""Batches that were sent to one host and have no whole answer yet.

Their size is the window: while it is full, no more frames are taken from the outboxes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.messages import Answer, Inquiry, Outcomes, bytes_of, frames_of, key_of
from brokerd.core.cluster.seam import Run

__all__ = ["SentBatch", "SentBatches", "Unanswered"]

#: Inquiries about one batch within remote_timeout.
_INQUIRIES: Final = 4
#: Most batches without an answer: an inquiry names all of them.
_BATCHES: Final = 10_000
#: Frames that are looked at in one turn to forget outcomes, at least: some milliseconds'
#: work. With one more for each few bytes received, the memory stays within bounds.
_STEPS: Final = 1024
_BYTES_PER_STEP: Final = 8

#: A frame without an outcome, and its target.
Unanswered = tuple[str, memoryview]


class SentBatch:
    """One batch.

    Attributes:
        size: Bytes of its frames.
        due: Until when the owner must have said something about it.
    """

    __slots__ = ("due", "number", "runs", "size")

    def __init__(self, number: int, runs: Sequence[Run], due: float) -> None:
        self.number = number
        self.runs = runs
        self.size = bytes_of(runs)
        self.due = due


class SentBatches:
    """The batches of one generation of a link, at the origin.

    Attributes:
        timeout: Seconds until a silent owner is given up.
        last_outcomes: The last outcomes that were received.
        unconfirmed: Bytes of outcomes that the owner keeps, as it does not know that
            they were received.
        in_flight: Bytes of all batches.
    """

    __slots__ = (
        "_answered",
        "_answered_size",
        "_asked",
        "_compaction",
        "_inquiries",
        "_newer",
        "_next_number",
        "_wait_until",
        "batches",
        "in_flight",
        "last_outcomes",
        "timeout",
        "unconfirmed",
    )

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.batches: dict[int, SentBatch] = {}
        self.in_flight = 0
        self.last_outcomes = 0
        self.unconfirmed = 0
        self._next_number = 1
        self._inquiries = 0
        #: The batches of the inquiry that has no answer yet.
        self._asked: Sequence[int] = ()
        self._wait_until = 0.0
        #: Outcomes that came while batches were kept: some frames of these may have
        #: theirs. Each has the number of the last batch that was sent before. Their bytes,
        #: too.
        self._answered: deque[tuple[int, Sequence[Run]]] = deque()
        self._answered_size = 0
        #: Forgets those that are not needed, in turns; None while there are few. And how
        #: many came since it began.
        self._compaction: Iterator[None] | None = None
        self._newer = 0

    def capture(self, blob: Blob) -> dict[str, Any]:
        """Return the facts for a new process; the frames are added to ``blob``."""
        return {
            "next": self._next_number,
            "inquiries": self._inquiries,
            "last_outcomes": self.last_outcomes,
            "batches": [
                [batch.number, blob.put_runs(batch.runs)] for batch in self.batches.values()
            ],
            "answered": [[number, blob.put_runs(runs)] for number, runs in self._answered],
        }

    def restore(self, facts: dict[str, Any], blob: Blob, now: float) -> None:
        """Go on with the batches of another process. The owner has all its time again."""
        self.last_outcomes = int(facts["last_outcomes"])
        self._inquiries = int(facts["inquiries"])
        for number, rows in facts["batches"]:
            self._next_number = int(number)
            self.add(blob.take_runs(rows), now)
        self._next_number = int(facts["next"])
        for number, rows in facts["answered"]:
            runs = blob.take_runs(rows)
            self._answered.append((int(number), runs))
            self._answered_size += bytes_of(runs)

    def room(self, unanswered: int) -> int:
        """Return how many more bytes may leave. unanswered: the size of the window."""
        return unanswered - self.in_flight if len(self.batches) < _BATCHES else 0

    def add(self, runs: Sequence[Run], now: float) -> SentBatch:
        """Return a new batch of these runs."""
        batch = SentBatch(self._next_number, runs, now + self.timeout)
        if not self.batches:
            self._wait_until = now + self.timeout / _INQUIRIES
        self._next_number += 1
        self.batches[batch.number] = batch
        self.in_flight += batch.size
        return batch

    # Inquiries

    def is_lost(self, now: float) -> bool:
        """Return whether the owner has said nothing about a batch for too long."""
        return any(batch.due <= now for batch in self.batches.values())

    def excuse(self, seconds: float) -> None:
        """Give the owner more time: this process did not run."""
        for batch in self.batches.values():
            batch.due += seconds

    def ask_now(self) -> None:
        """Make an inquiry due."""
        self._wait_until = 0.0

    def inquiry(self, generation: int, now: float, *, is_missing: bool = False) -> Inquiry | None:
        """Return an inquiry that is due, or None.

        is_missing: outcomes are known to be missing.
        """
        if now < self._wait_until or not (self.batches or is_missing):
            return None
        self._wait_until = now + self.timeout / _INQUIRIES
        self._inquiries += 1
        self._asked = list(self.batches)
        return Inquiry(generation, self._inquiries, self.last_outcomes, self._asked)

    # Answers of the owner

    def misses(self, number: int) -> bool:
        """Return whether outcomes before this number have not been received."""
        return number > self.last_outcomes + 1

    def receive(self, outcomes: Outcomes, size: int) -> list[SentBatch]:
        """Take outcomes that follow the last ones; return batches that were never seen.

        size: bytes of their message.
        """
        self.last_outcomes = outcomes.number
        self.unconfirmed += size
        self._remove(outcomes.done)
        never = self._remove(outcomes.never)
        if self.batches:
            self._remember(outcomes.runs)
        else:
            self._forget()
        return never

    def answered(self, answer: Answer, now: float) -> list[SentBatch]:
        """Take an answer to an inquiry; return the batches that the owner does not know.

        If outcomes are still missing, nothing can be concluded.
        """
        if answer.number != self._inquiries or self.misses(answer.last_outcomes + 1):
            return []
        asked, self._asked = self._asked, ()
        pending = set(answer.pending)
        unknown = []
        for number in asked:
            batch = self.batches.get(number)
            if batch is None:
                continue
            if number in pending:
                batch.due = now + self.timeout
            else:
                unknown.append(batch)
                self._drop(batch)
        return unknown

    def frames_without_outcome(self, batches: Iterable[SentBatch]) -> Iterator[Unanswered | None]:
        """Yield the frames of removed batches that have no outcome yet, oldest first.

        There may be hundreds of thousands, and as many outcomes. None is yielded for each
        outcome that is looked at, so that a caller can pause.
        """
        answered: Counter[tuple[bytes, int, bool]] = Counter()
        for _, runs in list(self._answered):
            for run in runs:
                address = run.target.encode()
                for frame in frames_of(run):
                    answered[key_of(frame, address)] += 1
                    yield None
        for batch in batches:
            for run in batch.runs:
                for frame in frames_of(run):
                    key = key_of(frame)
                    if answered[key]:
                        answered[key] -= 1
                    else:
                        yield run.target, frame

    def _remove(self, ranges: Iterable[tuple[int, int]]) -> list[SentBatch]:
        removed = []
        for first, last in ranges:
            # A range of another host may be longer than the batches that there are.
            oldest = next(iter(self.batches), self._next_number)
            for number in range(max(first, oldest), min(last, self._next_number - 1) + 1):
                batch = self.batches.get(number)
                if batch is not None:
                    removed.append(batch)
                    self._drop(batch)
        return removed

    def _drop(self, batch: SentBatch) -> None:
        del self.batches[batch.number]
        self.in_flight -= batch.size

    def _remember(self, runs: Sequence[Run]) -> None:
        """Remember outcomes, as some frames of kept batches may have theirs."""
        self._answered.append((self._next_number - 1, runs))
        self._answered_size += bytes_of(runs)
        oldest = next(iter(self.batches))
        while self._answered[0][0] < oldest:
            # These came before the oldest batch was sent.
            _, old_runs = self._answered.popleft()
            self._answered_size -= bytes_of(old_runs)
        self._newer += 1
        if self._compaction is None and self._answered_size > 2 * self.in_flight + 65536:
            self._compaction = self._compact()
        if self._compaction is not None:
            steps = _STEPS + bytes_of(runs) // _BYTES_PER_STEP
            deque(islice(self._compaction, steps), maxlen=0)

    def _compact(self) -> Iterator[None]:
        """Forget remembered outcomes of frames that are in no kept batch.

        There may be hundreds of thousands. None is yielded for each frame that is looked
        at. Batches and outcomes may come and go meanwhile: the outcomes remembered now are
        about batches sent before.
        """
        self._newer = 0
        before = list(self._answered)
        kept = set()
        for batch in list(self.batches.values()):
            for run in batch.runs:
                for frame in frames_of(run):
                    kept.add(key_of(frame))
                    yield
        still: deque[tuple[int, Sequence[Run]]] = deque()
        for number, runs in before:
            needed = []
            for run in runs:
                address = run.target.encode()
                for frame in frames_of(run):
                    if key_of(frame, address) in kept:
                        needed.append(Run(run.target, bytes(frame)))
                    yield
            if needed:
                still.append((number, needed))
        # Those that came before the oldest batch may have been removed meanwhile.
        newer = min(self._newer, len(self._answered))
        still.extend(islice(self._answered, len(self._answered) - newer, None))
        self._answered = still
        self._answered_size = sum(bytes_of(runs) for _, runs in still)
        self._compaction = None

    def _forget(self) -> None:
        self._answered.clear()
        self._answered_size = 0
        self._compaction = None
