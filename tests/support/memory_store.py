"""A store of mailboxes in memory, which fails and crashes when a test says so.

It keeps what is on disk (``disk``) apart from what it was asked for (``queue``). A
request is carried out by :meth:`MemoryStore.step`. After :meth:`MemoryStore.crashed`,
another store continues with what was on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from brokerd.core.mailboxes.journal import (
    MAX_SEQ,
    Append,
    Batch,
    Buried,
    Change,
    Committed,
    Contents,
    Failed,
    FailureKind,
    ReadyRows,
    Record,
    Remove,
    Revive,
    Row,
    State,
)
from brokerd.core.mailboxes.mailboxes import Mailboxes

__all__ = ["MemoryStore"]


@dataclass
class Box:
    """One mailbox on disk."""

    next_seq: int = 1
    rows: dict[int, Row] = field(default_factory=dict)
    keys: dict[tuple[str, str], float] = field(default_factory=dict)

    def copy(self) -> Box:
        """Return a copy that changes on its own."""
        return Box(self.next_seq, dict(self.rows), dict(self.keys))


class MemoryStore:
    """A journal in memory.

    Attributes:
        mailboxes: The core, which gets the answers.
        disk: The mailboxes by name.
        queue: Requests that were not carried out, in order.
        failure: What becomes of the batches from now on, or None. With an I/O error, nothing
            is read, either.
        batches: Batches that were written.
    """

    def __init__(self, disk: dict[str, Box] | None = None, dedup: float = 3600.0) -> None:
        self.mailboxes: Mailboxes
        self.disk = {} if disk is None else disk
        self.dedup = dedup
        self.queue: deque[Callable[[], None]] = deque()
        self.failure: FailureKind | None = None
        self.batches: list[Batch] = []

    def open(self, mailboxes: Mailboxes) -> MemoryStore:
        """Give the core what is on disk."""
        self.mailboxes = mailboxes
        mailboxes.opened(self, [self._contents(name) for name in self.disk], self.dedup)
        return self

    def crashed(self) -> MemoryStore:
        """Return the store of the next process: unanswered requests are forgotten."""
        self.queue.clear()
        return MemoryStore({name: box.copy() for name, box in self.disk.items()}, self.dedup)

    def step(self, count: int | None = None) -> int:
        """Carry out the first ``count`` requests, or all; return how many there were."""
        steps = 0
        while self.queue and (count is None or steps < count):
            self.queue.popleft()()
            steps += 1
        return steps

    def write(self, batch: Batch) -> None:
        """Write a batch without an answer, as before a crash."""
        self._write(batch, with_appends=True)

    # Journal

    def commit(self, batch: Batch) -> None:
        """See Journal.commit."""
        self.queue.append(lambda: self._commit(batch))

    def read(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        after: tuple[float, int],
        max_messages: int,
        max_bytes: int,
    ) -> None:
        """See Journal.read."""
        assert after[1] <= MAX_SEQ, "the database has no such integer"

        def carry_out() -> None:
            if self.failure is FailureKind.IO:
                self.mailboxes.rows(request, [])
                return
            rows = [
                row
                for row in self._box(mailbox).rows.values()
                if state in (None, row.state) and _place(row, state) > after
            ]
            rows.sort(key=lambda row: _place(row, state))
            rows = self._bury(mailbox, rows, max_messages)
            found: list[Row] = []
            size = 0
            for row in rows[:max_messages]:
                size += len(row.frame)
                if found and size > max_bytes:
                    break
                found.append(row)
            self.mailboxes.rows(request, _ready_rows(found) or found)

        self.queue.append(carry_out)

    def look_up_key(self, request: int, mailbox: str, sender: str, key: str) -> None:
        """See Journal.look_up_key."""

        def carry_out() -> None:
            is_known = (sender, key) in self._box(mailbox).keys
            known = is_known and self.failure is not FailureKind.IO
            self.mailboxes.key_looked_up(request, known)

        self.queue.append(carry_out)

    def purge(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        before_seq: int,
        without: tuple[int, ...],
    ) -> None:
        """See Journal.purge."""

        def carry_out() -> None:
            if self.failure is FailureKind.IO:
                self.mailboxes.purged(request, 0, 0)
                return
            rows = self._box(mailbox).rows
            gone = [
                row
                for row in rows.values()
                if state in (None, row.state) and row.seq < before_seq and row.seq not in without
            ]
            for row in gone:
                del rows[row.seq]
            self.mailboxes.purged(request, len(gone), sum(row.stored.size for row in gone))

        self.queue.append(carry_out)

    def _bury(self, mailbox: str, wanted: list[Row], max_messages: int) -> list[Row]:
        """Make dead letters of all damaged messages if one is read; return the rows now."""
        if all(row.frame for row in wanted[:max_messages]):
            return wanted
        rows = self._box(mailbox).rows
        buried = [row for row in rows.values() if not row.frame and row.state != "dead"]
        for row in buried:
            rows[row.seq] = row._replace(state="dead", due_at=None)
        facts = tuple((row.seq, row.due_at, row.stored.size) for row in buried)
        self.mailboxes.buried(Buried(mailbox, facts))
        return [rows[row.seq] for row in wanted]

    # What is on disk

    def _box(self, name: str) -> Box:
        return self.disk.setdefault(name, Box())

    def _contents(self, name: str) -> Contents:
        box = self.disk[name]
        facts: dict[str, Any] = {}
        for state in ("ready", "delayed", "dead"):
            rows = [row for row in box.rows.values() if row.state == state]
            facts[state] = len(rows)
            facts[f"{state}_bytes"] = sum(row.stored.size for row in rows)
        living = [row.stored.stored_at for row in box.rows.values() if row.state != "dead"]
        due = [row.due_at or 0.0 for row in box.rows.values() if row.state == "delayed"]
        return Contents(
            name,
            box.next_seq,
            **facts,
            oldest=min(living, default=None),
            keys=len(box.keys),
            next_due=min(due, default=None),
        )

    def _commit(self, batch: Batch) -> None:
        if self.failure is FailureKind.IO:
            self.mailboxes.failed(Failed(batch.number, FailureKind.IO, "I/O error"))
            return
        is_full = self.failure is FailureKind.FULL
        duplicates, forgotten = self._write(batch, with_appends=not is_full)
        if is_full and any(isinstance(record, Append) for record in batch.records):
            self.mailboxes.failed(
                Failed(batch.number, FailureKind.FULL, "no space left", forgotten)
            )
        else:
            self.mailboxes.committed(Committed(batch.number, duplicates, forgotten))

    def _write(
        self, batch: Batch, *, with_appends: bool
    ) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
        self.batches.append(batch)
        forgotten = self._forget_keys()
        duplicates: list[tuple[str, int]] = []
        for record in batch.records:
            if isinstance(record, Append):
                duplicates += self._append(record, kept=with_appends)
            else:
                self._change(record)
        return tuple(duplicates), forgotten

    def _append(self, record: Append, *, kept: bool) -> list[tuple[str, int]]:
        box = self._box(record.mailbox)
        box.next_seq = max(box.next_seq, record.first_seq + len(record.messages))
        duplicates, position = [], 0
        for seq, stored in enumerate(record.messages, record.first_seq):
            frame = record.frames[position : position + stored.size]
            position += stored.size
            if not kept:
                continue
            if stored.key is not None and stored.key in box.keys:
                duplicates.append((record.mailbox, seq))
                continue
            if stored.key is not None:
                box.keys[stored.key] = stored.stored_at
            state: State = "ready" if stored.due_at is None else "delayed"
            assert seq not in box.rows
            box.rows[seq] = Row(seq, frame, stored, state, 0, stored.due_at)
        assert position == len(record.frames)
        return duplicates

    def _change(self, record: Record) -> None:
        box = self._box(record.mailbox)
        if isinstance(record, Remove):
            for first, last in record.seqs:
                for seq in range(first, last + 1):
                    box.rows.pop(seq, None)
        elif isinstance(record, Change) and record.seq in box.rows:
            box.rows[record.seq] = box.rows[record.seq]._replace(
                state=record.state,
                attempts=record.attempts,
                due_at=record.due_at,
                reason=record.reason,
                error=record.error,
                consumer=record.consumer,
                at=record.at,
            )
        elif isinstance(record, Revive):
            box.next_seq = max(box.next_seq, record.new_seq + 1)
            row = box.rows.pop(record.old_seq, None)
            if row is not None:
                at = record.seq_at
                frame = row.frame[:at] + record.new_seq.to_bytes(8, "big") + row.frame[at + 8 :]
                box.rows[record.new_seq] = Row(record.new_seq, frame, row.stored, "ready", 0)

    def _forget_keys(self) -> tuple[tuple[str, int], ...]:
        now = self.mailboxes.clock.wall
        forgotten = []
        for name, box in self.disk.items():
            old = [key for key, at in box.keys.items() if at + self.dedup <= now]
            for key in old:
                del box.keys[key]
            if old:
                forgotten.append((name, len(old)))
        return tuple(forgotten)


def _ready_rows(rows: list[Row]) -> ReadyRows | None:
    """Return the same rows in short, as a store process does if none has a state."""
    if any(row != Row(*row[:3], "ready", 0) or row.stored.due_at or not row.frame for row in rows):
        return None
    keys = {at: row.stored.key for at, row in enumerate(rows) if row.stored.key is not None}
    frames = [row.frame for row in rows]
    return ReadyRows(
        [row.seq for row in rows],
        [(b"".join(frames), 0, [*map(len, frames)])],
        [row.stored.stored_at for row in rows],
        [row.stored.expires_at for row in rows],
        keys,
    )


def _place(row: Row, state: State | None) -> tuple[float, int]:
    return (row.due_at or 0.0 if state == "delayed" else 0.0), row.seq
