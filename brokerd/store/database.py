"""The mailboxes in the database: one transaction at a time, and reading back.

Everything here is called inside a transaction, which the store process begins, commits
or rolls back. A row that was changed in memory is written by ``flush``.
"""

from __future__ import annotations

import math
import sqlite3
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from brokerd.core.mailboxes.journal import Change, Contents, Revive, State
from brokerd.store.check import problems_of
from brokerd.store.columns import Columns, count_of, is_plain, pack
from brokerd.store.directory import DATABASE, Refused
from brokerd.store.messages import Part
from brokerd.store.runs import (
    RUN_BYTES,
    RUN_MESSAGES,
    SHORT_BYTES,
    Content,
    Run,
    StoredMailbox,
    bits_of,
    parts_without,
    pieces_of,
    ranges_of,
    spread,
)
from brokerd.store.schema import CHECKED_BYTES, PAGE, connect, seal

__all__ = ["Damaged", "Database"]

#: Runs in memory per database.
_RUNS: Final = 512
#: A run with more bytes than this is sparse when less than a quarter of them is of
#: messages that are not removed. The latest sparse runs are left alone, because a
#: consumer probably removes the rest soon; all others are written again.
_COMPACTED_BYTES: Final = 16 << 10
_SPARSE: Final = 32
#: Seqs per mailbox that are never used after the process was killed, or the disk lost
#: transactions that it had confirmed.
_AHEAD: Final = 10_000
#: Keys that are forgotten in one transaction, at most.
_FORGOTTEN: Final = 512

#: The reason of a dead letter whose content does not match its checksum.
DAMAGED: Final = "damaged"


class Damaged(Exception):
    """The database contradicts itself; the text says where."""


class Database:
    """The mailboxes of one database.

    Raises Refused, Damaged or sqlite3.Error.
    """

    def __init__(self, path: Path, noted: int | None) -> None:
        self.path = path / DATABASE
        self.connection = connect(path)
        self._execute = self.connection.execute
        #: When the key was stored that is forgotten next; infinity without a key, and None
        #: if it has to be read.
        self._first_key_at: float | None = None
        self.commits = self._read_progress()
        if noted is not None and self.commits < noted:
            raise Refused(
                f"{self.path}: the last {noted - self.commits} transactions are missing (its"
                " -wal file is lost or damaged). Put both files back, or a backup; to start with"
                " what is there, remove mailboxes.state"
            )
        self._mailboxes: dict[str, StoredMailbox] = {}
        self._by_id: dict[int, StoredMailbox] = {}
        self._runs: dict[tuple[int, int], Run] = {}
        self._changed_mailboxes: set[StoredMailbox] = set()
        self._changed_runs: set[Run] = set()
        #: Sparse runs, by mailbox and first seq.
        self._sparse: dict[tuple[int, int], None] = {}
        #: By mailbox, the number of keys forgotten in this transaction.
        self.forgotten: dict[str, int] = {}
        #: By mailbox, the messages that became dead letters in this transaction, because
        #: they are damaged: seq, due_at and bytes of the frame.
        self.buried: dict[str, list[tuple[int, float | None, int]]] = {}
        #: Bytes of frames that this transaction has written.
        self.written = 0
        if self.path.stat().st_size <= CHECKED_BYTES:
            self._check()
        self._load()

    def _read_progress(self) -> int:
        """Return how many transactions were committed."""
        (commits,) = self._execute("SELECT ifnull(max(commits), 0) FROM mailboxes").fetchone()
        if not isinstance(commits, int):
            raise Damaged("the number of committed transactions is damaged")
        return commits

    def _check(self) -> None:
        for problem in problems_of(self.connection):
            raise Damaged(problem)

    def _load(self) -> None:
        """Read the counters of all mailboxes."""
        self._mailboxes.clear()
        self._by_id.clear()
        self._runs.clear()
        self._changed_mailboxes.clear()
        self._changed_runs.clear()
        self._sparse.clear()
        self._first_key_at = None
        for *values, sealed in self._execute("SELECT * FROM mailboxes"):
            if seal(*values) != sealed:
                raise Damaged(f"the row of mailbox {values[1]!r} is damaged")
            mailbox = StoredMailbox(values[0], values[1])
            mailbox.next_seq = values[2]
            mailbox.counts = dict(zip(mailbox.counts, values[3:9:2], strict=True))
            mailbox.sizes = dict(zip(mailbox.sizes, values[4:9:2], strict=True))
            mailbox.keys = values[9]
            self._add_mailbox(mailbox)

    def _add_mailbox(self, mailbox: StoredMailbox) -> None:
        self._mailboxes[mailbox.name] = mailbox
        self._by_id[mailbox.id] = mailbox

    # Transactions

    def begin(self) -> None:
        """Begin a transaction."""
        self.written = 0
        self.forgotten.clear()
        self.buried.clear()
        self._execute("BEGIN")

    def commit(self) -> None:
        """Write everything to disk. A transaction that only read writes nothing."""
        self.flush()
        commits = self.commits + 1 if self._changed_mailboxes else self.commits
        for mailbox in self._changed_mailboxes:
            self._write_mailbox(mailbox, mailbox.next_seq + _AHEAD, commits)
        self._execute("COMMIT")
        self.commits = commits
        self._changed_mailboxes.clear()
        self._trim()

    def rollback(self) -> None:
        """Forget everything since ``begin``, but the seqs that were used."""
        if self.connection.in_transaction:
            self._execute("ROLLBACK")
        used = {mailbox.name: mailbox.next_seq for mailbox in self._changed_mailboxes}
        self.forgotten.clear()
        self.buried.clear()
        self._load()
        for name, next_seq in used.items():
            mailbox = self._mailboxes.get(name)
            if mailbox is not None:
                mailbox.next_seq = max(mailbox.next_seq, next_seq)

    def flush(self) -> None:
        """Write the changed runs."""
        for run in self._changed_runs:
            self._note_sparse(run)
        while len(self._sparse) > _SPARSE:
            self._compact_first()
        updates = []
        for run in self._changed_runs:
            if run.live:
                values = run.values()
                updates.append((*values, seal(*values), run.short))
            else:
                self._drop(run)
        if updates:
            self.connection.executemany(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", updates
            )
        self._changed_runs.clear()

    def _drop(self, run: Run) -> None:
        """Delete a run of which all messages are removed."""
        self._execute(
            "DELETE FROM runs WHERE mailbox = ? AND first = ?", (run.mailbox.id, run.first)
        )
        if run.content:
            self._execute("DELETE FROM content WHERE id = ?", (run.content,))
        self._forget_run(run)

    def free(self) -> int:
        """Return how many bytes of the file are free for new messages."""
        count: int = self._execute("PRAGMA freelist_count").fetchone()[0]
        return count * PAGE

    def close(self) -> None:
        """Move everything to the database file, and close it."""
        try:
            self._execute("BEGIN")
            for mailbox in self._mailboxes.values():
                self._write_mailbox(mailbox, mailbox.next_seq, self.commits)
            self._execute("COMMIT")
        except sqlite3.OperationalError:
            # Without room, some seqs are left out.
            self.connection.rollback()
        self.connection.close()

    def _write_mailbox(self, mailbox: StoredMailbox, next_seq: int, commits: int) -> None:
        # The name is not set again: a commit would write a page of its index.
        values = mailbox.values(next_seq, commits)
        self._execute(
            "INSERT INTO mailboxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET next_seq = excluded.next_seq,"
            " ready = excluded.ready, ready_bytes = excluded.ready_bytes,"
            " delayed = excluded.delayed, delayed_bytes = excluded.delayed_bytes,"
            " dead = excluded.dead, dead_bytes = excluded.dead_bytes,"
            " keys = excluded.keys, commits = excluded.commits, seal = excluded.seal",
            (*values, seal(*values)),
        )

    # Mailboxes and runs in memory

    def _mailbox(self, name: str) -> StoredMailbox:
        """Return a mailbox, which will be written; make it if there is none."""
        mailbox = self._mailboxes.get(name)
        if mailbox is None:
            mailbox = StoredMailbox(max(self._by_id, default=0) + 1, name)
            self._add_mailbox(mailbox)
        self._changed_mailboxes.add(mailbox)
        return mailbox

    def _keep_run(self, run: Run) -> None:
        self._runs[run.mailbox.id, run.first] = run
        firsts = run.mailbox.runs
        if not firsts or firsts[-1] < run.first:
            firsts.append(run.first)
        else:
            firsts.insert(bisect_right(firsts, run.first), run.first)

    def _forget_run(self, run: Run) -> None:
        if self._runs.pop((run.mailbox.id, run.first), None) is not None:
            firsts = run.mailbox.runs
            del firsts[bisect_right(firsts, run.first) - 1]

    def _trim(self) -> None:
        """Keep only the runs that came to memory last."""
        while len(self._runs) > _RUNS:
            self._forget_run(next(iter(self._runs.values())))

    def _run_at(self, mailbox: StoredMailbox, seq: int) -> Run | None:
        """Return the run that contains a seq, removed or not."""
        position = bisect_right(mailbox.runs, seq) - 1
        if position >= 0:
            run = self._runs[mailbox.id, mailbox.runs[position]]
            if seq < run.first + run.count:
                return run
        row = self._execute(
            "SELECT * FROM runs WHERE mailbox = ? AND first <= ? ORDER BY first DESC LIMIT 1",
            (mailbox.id, seq),
        ).fetchone()
        if row is None or seq >= row[1] + row[2]:
            return None
        return self._run_of(mailbox, row)

    def _run_of(self, mailbox: StoredMailbox, row: Sequence[Any]) -> Run:
        """Return the run of a row; one in memory is newer."""
        run = self._runs.get((mailbox.id, row[1]))
        if run is None:
            *values, sealed, short = row
            if seal(*values) != sealed:
                raise Damaged(f"a row of mailbox {mailbox.name!r} is damaged")
            _, first, count, content, size, gone, live, live_bytes = values
            bits = int.from_bytes(gone, "little")
            run = Run(mailbox, first, count, content, size, bits, live, live_bytes, short)
            self._keep_run(run)
        return run

    def _sizes(self, run: Run) -> Sequence[int]:
        """Return the bytes of each frame of a run.

        If its columns are damaged, return their average.
        """
        if run.sizes is None:
            content = self._read_content(run, "zeroblob(0)")
            columns = None if content is None else _columns(run, content)
            run.sizes = spread(run) if columns is None else columns.sizes
        return run.sizes

    # The records of a batch

    def append(
        self, name: str, first: int, columns: memoryview, frames: memoryview, known_since: float
    ) -> list[int]:
        """Store new messages; return the seqs of the duplicates, which are left out.

        known_since: keys that are older are forgotten.
        """
        count = count_of(columns)
        mailbox = self._mailbox(name)
        mailbox.next_seq = max(mailbox.next_seq, first + count)
        self.written += len(frames)
        if is_plain(columns) and count <= RUN_MESSAGES and len(frames) <= RUN_BYTES:
            self._insert(mailbox, first, count, columns, frames, 0, 0)
            mailbox.add("ready", count, len(frames))
            return []
        unpacked = Columns.unpack(columns)
        duplicates = self._duplicates(mailbox, unpacked, known_since)
        offset = 0
        for start, stop in pieces_of(unpacked.sizes):
            sizes = unpacked.sizes[start:stop]
            size = sum(sizes)
            left_out = [at - start for at in duplicates if start <= at < stop]
            gone = sum(1 << at for at in left_out)
            gone_bytes = sum(sizes[at] for at in left_out)
            if len(left_out) < len(sizes):
                self._insert(
                    mailbox,
                    first + start,
                    len(sizes),
                    # As they came, if the run is not split.
                    columns if len(sizes) == count else pack(unpacked.messages(range(start, stop))),
                    frames[offset : offset + size],
                    gone,
                    gone_bytes,
                )
            mailbox.add("ready", len(sizes) - len(left_out), size - gone_bytes)
            offset += size
        if unpacked.due is not None:
            self._delay(mailbox, first, unpacked, set(duplicates))
        return [first + at for at in duplicates]

    def skip(self, name: str, first: int, columns: memoryview) -> None:
        """Note that the seqs of refused messages are used."""
        if name in self._mailboxes:
            mailbox = self._mailbox(name)
            mailbox.next_seq = max(mailbox.next_seq, first + count_of(columns))

    def _insert(
        self,
        mailbox: StoredMailbox,
        first: int,
        count: int,
        columns: bytes | memoryview,
        frames: bytes | bytearray | memoryview,
        gone: int,
        gone_bytes: int,
    ) -> None:
        content = Content.of(columns, memoryview(frames))
        size = len(frames)
        id_, short = 0, b""
        if len(columns) + size <= SHORT_BYTES:
            short = content.as_short()
        else:
            row = self._execute("INSERT INTO content VALUES (NULL, ?, ?, ?, ?)", content)
            assert row.lastrowid is not None
            id_ = row.lastrowid
        live = count - gone.bit_count()
        run = Run(mailbox, first, count, id_, size, gone, live, size - gone_bytes, short)
        self._keep_run(run)
        self._changed_runs.add(run)

    def _duplicates(
        self, mailbox: StoredMailbox, columns: Columns, known_since: float
    ) -> list[int]:
        """Write the new keys; return the positions of messages whose keys are known."""
        duplicates = []
        for at, (sender, key) in columns.keys.items():
            if self._knows(mailbox, sender, key, known_since):
                duplicates.append(at)
                continue
            values = (mailbox.id, sender, key, columns.stored[at])
            self._execute("INSERT INTO keys VALUES (NULL, ?, ?, ?, ?, ?)", (*values, seal(*values)))
            mailbox.keys += 1
            if self._first_key_at == math.inf:
                self._first_key_at = columns.stored[at]
        return duplicates

    def _knows(self, mailbox: StoredMailbox, sender: str, key: str, known_since: float) -> bool:
        """Return whether a key is known; forget it if it is too old."""
        row = self._execute(
            "SELECT * FROM keys WHERE mailbox = ? AND sender = ? AND key = ?",
            (mailbox.id, sender, key),
        ).fetchone()
        if row is None:
            return False
        id_, *values, sealed = row
        if seal(*values) != sealed or values[:3] != [mailbox.id, sender, key]:
            raise Damaged(f"a key of mailbox {mailbox.name!r} is damaged")
        if values[3] >= known_since:
            return True
        self._forget_keys(mailbox, [id_])
        return False

    def _forget_keys(self, mailbox: StoredMailbox, ids: Iterable[int]) -> None:
        for id_ in ids:
            self._execute("DELETE FROM keys WHERE id = ?", (id_,))
            mailbox.keys -= 1
            self._first_key_at = None
            self.forgotten[mailbox.name] = self.forgotten.get(mailbox.name, 0) + 1
        self._changed_mailboxes.add(mailbox)

    def has_old_keys(self, known_since: float) -> bool:
        """Return whether there are keys to forget."""
        if self._first_key_at is None:
            self._first_key_at = next((at for *_, at in self._first_keys(1)), math.inf)
        return self._first_key_at < known_since

    def forget_keys(self, known_since: float) -> None:
        """Forget some of the keys that are too old."""
        if self.has_old_keys(known_since):
            for id_, mailbox_id, at in [*self._first_keys(_FORGOTTEN)]:
                if at >= known_since:
                    break
                self._forget_keys(self._by_id[mailbox_id], [id_])

    def _first_keys(self, most: int) -> Iterator[tuple[int, int, float]]:
        """Yield the ids of the first keys, and of their mailboxes, and when they were stored."""
        for id_, *values, sealed in self._execute(
            "SELECT * FROM keys ORDER BY id LIMIT ?", (most,)
        ):
            if seal(*values) != sealed:
                raise Damaged("a key is damaged")
            yield id_, values[0], values[3]

    def _delay(
        self, mailbox: StoredMailbox, first: int, columns: Columns, left_out: set[int]
    ) -> None:
        assert columns.due is not None
        rows = []
        for at, due_at in enumerate(columns.due):
            if due_at != math.inf and at not in left_out:
                size = columns.sizes[at]
                mailbox.add("ready", -1, -size)
                mailbox.add("delayed", 1, size)
                values = (mailbox.id, first + at, size, "delayed", 0, due_at, "", "", "", 0.0)
                rows.append((*values, seal(*values)))
        self._write_states(rows)

    def _write_states(self, rows: Sequence[tuple[object, ...]]) -> None:
        self.connection.executemany(
            "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
        )

    def remove(self, name: str, ranges: Iterable[Sequence[int]]) -> None:
        """Remove messages."""
        mailbox = self._mailbox(name)
        for first, last in ranges:
            states = {seq: rest for seq, *rest in self._states_between(mailbox, first, last)}
            seq = first
            while seq <= last:
                run = self._run_at(mailbox, seq) or self._run_after(mailbox, seq)
                if run is None or run.first > last:
                    break
                end = min(last, run.first + run.count - 1)
                self._remove_from(run, max(seq, run.first), end, states)
                seq = end + 1
            if states:
                self._delete_states(mailbox, first, last)

    def _states_between(
        self, mailbox: StoredMailbox, first: int, last: int
    ) -> Iterator[tuple[Any, ...]]:
        """Yield seq, size, state, attempts, due_at, reason, error, consumer and at."""
        for *values, sealed in self._execute(
            "SELECT * FROM states WHERE mailbox = ? AND seq BETWEEN ? AND ?",
            (mailbox.id, first, last),
        ):
            if seal(*values) != sealed:
                raise Damaged(f"the state of a message in mailbox {mailbox.name!r} is damaged")
            yield tuple(values[1:])

    def _run_after(self, mailbox: StoredMailbox, seq: int) -> Run | None:
        """Return the first run whose messages all have a higher seq than this one."""
        self.flush()
        row = self._execute(
            "SELECT * FROM runs WHERE mailbox = ? AND first > ? ORDER BY first LIMIT 1",
            (mailbox.id, seq),
        ).fetchone()
        return None if row is None else self._run_of(mailbox, row)

    def _remove_from(self, run: Run, first: int, last: int, states: dict[int, list[Any]]) -> None:
        """Remove some messages of one run."""
        mask = ((1 << (last - first + 1)) - 1) << (first - run.first)
        now_gone = mask & ~run.gone
        if not now_gone:
            return
        mailbox, count = run.mailbox, now_gone.bit_count()
        if count == run.live:
            size = run.live_bytes
        else:
            sizes = self._sizes(run)
            if now_gone == mask:
                size = sum(sizes[first - run.first : last - run.first + 1])
            else:
                size = sum(sizes[at] for at in bits_of(now_gone))
        run.gone |= now_gone
        run.live -= count
        run.live_bytes -= size
        self._changed_runs.add(run)
        for seq, (state_size, state, *_) in states.items():
            if first <= seq <= last and now_gone >> (seq - run.first) & 1:
                mailbox.add(state, -1, -state_size)
                count -= 1
                size -= state_size
        mailbox.add("ready", -count, -size)

    def change(self, change: Change) -> None:
        """Give a message another state."""
        mailbox = self._mailboxes.get(change.mailbox)
        run = None if mailbox is None else self._run_at(mailbox, change.seq)
        if mailbox is None or run is None or run.gone >> (change.seq - run.first) & 1:
            return
        self._changed_mailboxes.add(mailbox)
        size = self._sizes(run)[change.seq - run.first]
        states = [*self._states_between(mailbox, change.seq, change.seq)]
        mailbox.add(states[0][2] if states else "ready", -1, -size)
        mailbox.add(change.state, 1, size)
        values = (mailbox.id, change.seq, size, *change[2:])
        self._write_states([(*values, seal(*values))])

    def revive(self, revive: Revive) -> None:
        """Store a dead letter as a new message."""
        mailbox = self._mailbox(revive.mailbox)
        mailbox.next_seq = max(mailbox.next_seq, revive.new_seq + 1)
        run = self._run_at(mailbox, revive.old_seq)
        if run is None or run.gone >> (revive.old_seq - run.first) & 1:
            return
        content = self._content(run)
        if content is None:
            return
        columns, frames = content
        at = revive.old_seq - run.first
        start = sum(columns.sizes[:at])
        frame = bytearray(frames[start : start + columns.sizes[at]])
        frame[revive.seq_at : revive.seq_at + 8] = revive.new_seq.to_bytes(8, "big")
        (stored,) = columns.messages([at])
        self.written += len(frame)
        kept = pack([stored._replace(due_at=None)])
        self._insert(mailbox, revive.new_seq, 1, kept, frame, 0, 0)
        mailbox.add("ready", 1, len(frame))
        self.remove(revive.mailbox, [(revive.old_seq, revive.old_seq)])

    def purge(
        self,
        name: str,
        state: State | None,
        from_seq: int,
        before_seq: int,
        without: Iterable[int],
        most_runs: int,
    ) -> tuple[int, int, int]:
        """Remove messages of one state, or of any for None, from a few runs.

        Returns their number, their bytes, and where to go on; 0 when nothing is left.
        """
        mailbox = self._mailbox(name)
        self.flush()
        count = size = 0
        kept = set(without)
        rows = self._execute(
            "SELECT * FROM runs WHERE mailbox = ? AND first >= ? AND first < ?"
            " ORDER BY first LIMIT ?",
            (mailbox.id, from_seq, before_seq, most_runs),
        ).fetchall()
        for row in rows:
            run = self._run_of(mailbox, row)
            last = min(run.first + run.count, before_seq) - 1
            states = {seq: rest for seq, *rest in self._states_between(mailbox, run.first, last)}
            live_before, bytes_before = run.live, run.live_bytes
            for first, end in ranges_of(self._in_state(run, states, state), run.first, last):
                for part in parts_without(first, end, kept):
                    self._remove_from(run, *part, states)
                    self._delete_states(mailbox, *part)
            count += live_before - run.live
            size += bytes_before - run.live_bytes
        return count, size, rows[-1][1] + 1 if len(rows) == most_runs else 0

    def _delete_states(self, mailbox: StoredMailbox, first: int, last: int) -> None:
        self._execute(
            "DELETE FROM states WHERE mailbox = ? AND seq BETWEEN ? AND ?",
            (mailbox.id, first, last),
        )

    def _in_state(self, run: Run, states: dict[int, list[Any]], state: State | None) -> int:
        """Return the messages of a run that have a state, as bits."""
        found = ~run.gone & ((1 << run.count) - 1)
        if state is not None:
            for seq, (_, of_message, *_) in states.items():
                if of_message != state:
                    found &= ~(1 << (seq - run.first))
            if state != "ready":
                found &= sum(1 << (seq - run.first) for seq in states)
        return found

    # Content

    def _content(self, run: Run) -> tuple[Columns, memoryview] | None:
        """Return the columns and frames of a run; None if they are damaged."""
        content = self._read_content(run)
        if content is None or not content.is_whole:
            return None
        columns = _columns(run, content)
        if columns is None or sum(columns.sizes) != len(content.frames):
            return None
        return columns, memoryview(content.frames)

    def _read_content(self, run: Run, frames: str = "frames") -> Content | None:
        """Return the content of a run, which may be damaged; None if it is lost.

        frames: the SQL of its frames.
        """
        if not run.content:
            return Content.from_short(run.short)
        row = self._execute(
            f"SELECT columns_seal, frames_seal, columns, {frames} FROM content WHERE id = ?",  # noqa: S608 - a constant
            (run.content,),
        ).fetchone()
        return None if row is None else Content._make(row)

    def _note_sparse(self, run: Run) -> None:
        """Note whether little of a run is left."""
        key = run.mailbox.id, run.first
        if run.live and run.size >= _COMPACTED_BYTES and run.live_bytes * 4 <= run.size:
            self._sparse[key] = None
        else:
            self._sparse.pop(key, None)

    def _compact_first(self) -> None:
        """Write the content of the first sparse run again, without removed messages."""
        mailbox_id, first = next(iter(self._sparse))
        del self._sparse[mailbox_id, first]
        run = self._run_at(self._by_id[mailbox_id], first)
        content = None if run is None else self._content(run)
        if run is None or content is None:
            return
        self._changed_runs.add(run)
        columns, frames = content
        kept, sizes, offset = [], [0] * run.count, 0
        for at, size in enumerate(columns.sizes):
            if not run.gone >> at & 1:
                kept.append(frames[offset : offset + size])
                sizes[at] = size
            offset += size
        columns.sizes = run.sizes = sizes
        packed = pack(columns.messages(range(run.count)))
        whole = b"".join(kept)
        self._execute(
            "UPDATE content SET columns_seal = ?, frames_seal = ?, columns = ?, frames = ?"
            " WHERE id = ?",
            (*Content.of(packed, whole), run.content),
        )
        run.size = len(whole)

    # Reading

    def contents(self) -> list[Contents]:
        """Return what each mailbox contains."""
        found = []
        for mailbox in self._mailboxes.values():
            due = self._execute(
                "SELECT min(due_at) FROM states WHERE mailbox = ? AND state = 'delayed'",
                (mailbox.id,),
            ).fetchone()[0]
            # It may find damaged messages, which are counted as dead letters then.
            oldest = self._oldest(mailbox)
            numbers = (mailbox.next_seq, *mailbox.counts.values(), *mailbox.sizes.values())
            fields = (mailbox.name, *numbers, oldest, mailbox.keys, due)
            found.append(Contents._make(fields))
        return found

    def _oldest(self, mailbox: StoredMailbox) -> float | None:
        """Return when the first message that is not dead was stored."""
        for state in ("ready", "delayed"):
            for part in self.read(mailbox.name, state, (0.0, 0), 1, 1):
                return Columns.unpack(part.columns).stored[0]
        return None

    def knows(self, name: str, sender: str, key: str, known_since: float) -> bool:
        """Return whether a message with this key was stored."""
        mailbox = self._mailboxes.get(name)
        return mailbox is not None and self._knows(mailbox, sender, key, known_since)

    def read(
        self,
        name: str,
        state: State | None,
        after: tuple[float, int],
        max_messages: int,
        max_bytes: int,
    ) -> list[Part]:
        """Return messages, as ``brokerd.core.mailboxes.journal.Journal.read`` says.

        A message whose content is damaged is made a dead letter, and is returned too.
        """
        mailbox = self._mailboxes.get(name)
        if mailbox is None:
            return []
        self.flush()
        reading = _Reading(max_messages, max_bytes)
        if state in ("ready", None):
            self._read_runs(mailbox, state, after[1], reading)
        else:
            self._read_states(mailbox, state, after, reading)
        return reading.parts

    def _read_runs(
        self, mailbox: StoredMailbox, state: State | None, after_seq: int, reading: _Reading
    ) -> None:
        run = self._run_at(mailbox, after_seq + 1) or self._run_after(mailbox, after_seq + 1)
        while run is not None and reading.wants:
            last = run.first + run.count - 1
            states = {seq: rest for seq, *rest in self._states_between(mailbox, run.first, last)}
            found = self._in_state(run, states, state)
            found &= -1 << max(0, after_seq + 1 - run.first)
            if found:
                if reading.taken and not reading.fits(run, found):
                    # The next read begins with it, and need not read its content again.
                    break
                self._read_run(run, found, states, reading)
            run = self._run_after(mailbox, last)

    def _read_run(
        self, run: Run, found: int, states: dict[int, list[Any]], reading: _Reading
    ) -> None:
        """Read some messages of a run, given as bits."""
        content = self._content(run)
        if content is None:
            states = self._bury(run)
            columns, frames = Columns(self._sizes(run), [0.0] * run.count), memoryview(b"")
        else:
            columns, frames = content
        run.sizes = sizes = columns.sizes
        ranges: list[tuple[int, int]] = []
        positions: list[int] = []
        pieces: list[memoryview] = []
        offset = at = 0
        for first, last in ranges_of(found, 0, run.count - 1):
            offset += sum(sizes[at:first])
            taken, size = reading.take(sizes, first, last + 1)
            if taken:
                ranges.append((run.first + first, run.first + first + taken - 1))
                positions += range(first, first + taken)
                pieces.append(frames[offset : offset + size])
            offset, at = offset + size, first + taken
            if at <= last:
                break
        told = {
            str(seq): tuple(rest[1:])
            for seq, rest in states.items()
            if found >> (seq - run.first) & 1
        }
        if ranges:
            reading.parts.append(Part(ranges, columns.pack(positions), pieces, told))

    def _bury(self, run: Run) -> dict[int, list[Any]]:
        """Make dead letters of all messages of a run whose content is damaged.

        Returns the states of its messages.
        """
        mailbox, sizes = run.mailbox, self._sizes(run)
        last = run.first + run.count - 1
        states = {seq: rest for seq, *rest in self._states_between(mailbox, run.first, last)}
        rows = []
        for at in bits_of(~run.gone & ((1 << run.count) - 1)):
            seq = run.first + at
            size, before, attempts, due_at, reason, *_ = states.get(
                seq, (sizes[at], "ready", 0, None, "", "", "", 0.0)
            )
            if reason == DAMAGED:
                continue
            mailbox.add(before, -1, -size)
            mailbox.add("dead", 1, size)
            if before != "dead":
                self.buried.setdefault(mailbox.name, []).append((seq, due_at, size))
            states[seq] = [size, "dead", attempts, None, DAMAGED, "", "", 0.0]
            values = (mailbox.id, seq, *states[seq])
            rows.append((*values, seal(*values)))
        if rows:
            self._changed_mailboxes.add(mailbox)
            self._write_states(rows)
        return states

    def _read_states(
        self, mailbox: StoredMailbox, state: State, after: tuple[float, int], reading: _Reading
    ) -> None:
        if state == "delayed":
            wanted, order = "(due_at, seq) > (?, ?)", "due_at, seq"
        else:
            wanted, order = "seq > max(?, ?)", "seq"
        seqs = self._execute(
            f"SELECT seq FROM states WHERE mailbox = ? AND state = ? AND {wanted}"  # noqa: S608 - both are constants
            f" ORDER BY {order} LIMIT ?",
            (mailbox.id, state, *after, reading.max_messages),
        ).fetchall()
        at = 0
        while at < len(seqs) and reading.wants:
            run = self._run_at(mailbox, seqs[at][0])
            # The content of a run is read once for all consecutive messages of it.
            found = last = 0
            while run is not None and at < len(seqs) and last < seqs[at][0] < run.first + run.count:
                last = seqs[at][0]
                found |= 1 << (last - run.first)
                at += 1
            if run is None or found & run.gone:
                raise Damaged(f"a message of mailbox {mailbox.name!r} is missing")
            first = run.first + (found & -found).bit_length() - 1
            states = {seq: rest for seq, *rest in self._states_between(mailbox, first, last)}
            self._read_run(run, found, states, reading)


def _columns(run: Run, content: Content) -> Columns | None:
    """Return the columns of a run; None if they are damaged."""
    if not content.has_columns:
        return None
    try:
        columns = Columns.unpack(content.columns)
    except (ValueError, struct.error):
        return None
    return columns if len(columns.sizes) == run.count else None


class _Reading:
    """How much of a read is left, and what it has found."""

    __slots__ = ("max_bytes", "max_messages", "parts", "taken")

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self.max_messages = max_messages
        self.max_bytes = max_bytes
        self.taken = 0
        self.parts: list[Part] = []

    @property
    def wants(self) -> bool:
        """Whether there is room for one more message."""
        return self.max_messages > 0 and (self.max_bytes > 0 or not self.taken)

    def fits(self, run: Run, found: int) -> bool:
        """Return whether some messages of a run, given as bits, are all wanted."""
        return found.bit_count() <= self.max_messages and run.live_bytes <= self.max_bytes

    def take(self, sizes: Sequence[int], first: int, stop: int) -> tuple[int, int]:
        """Return how many of these messages are wanted, and the bytes of their frames."""
        size = sum(sizes[first:stop])
        if stop - first <= self.max_messages and size <= self.max_bytes:
            self.taken += stop - first
            self.max_messages -= stop - first
            self.max_bytes -= size
            return stop - first, size
        ends = [*accumulate(sizes[first:stop])]
        count = min(bisect_right(ends, self.max_bytes), self.max_messages)
        if not (count or self.taken):
            count = 1
        if count < len(ends):
            self.max_messages = count
        size = ends[count - 1] if count else 0
        self.taken += count
        self.max_messages -= count
        self.max_bytes -= size
        return count, size
