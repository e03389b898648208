"""The checks of a database: SQLite's own, the checksum of each row, and the counters."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

from brokerd.store.runs import Content
from brokerd.store.schema import seal

__all__ = ["content_problems_of", "problems_of"]

#: Most problems that SQLite reports.
_PROBLEMS: Final = 20
#: The tables whose rows have a checksum, and the columns that it is of. The id of a key only
#: orders it, and the content of a run has checksums of its own.
_SEALED: Final = {
    "mailboxes": slice(0, -1),
    "runs": slice(0, -2),
    "states": slice(0, -1),
    "keys": slice(1, -1),
}


def problems_of(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield what is wrong with the tables, but for the content of messages."""
    for (problem,) in connection.execute(f"PRAGMA quick_check({_PROBLEMS})"):
        if problem != "ok":
            yield str(problem)
            return
    for table, sealed in _SEALED.items():
        for row in connection.execute(f"SELECT * FROM {table}"):  # noqa: S608 - a constant
            if seal(*row[sealed]) != row[sealed.stop]:
                yield f"a row of the table {table} does not match its checksum: {row[:3]}"
    yield from _wrong_counters(connection)


def _wrong_counters(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield the mailboxes whose counters differ from their messages."""
    live = {
        mailbox: (count, size)
        for mailbox, count, size in connection.execute(
            "SELECT mailbox, sum(live), sum(live_bytes) FROM runs GROUP BY mailbox"
        )
    }
    states = {
        (mailbox, state): (count, size)
        for mailbox, state, count, size in connection.execute(
            "SELECT mailbox, state, count(*), sum(size) FROM states GROUP BY mailbox, state"
        )
    }
    keys = dict(connection.execute("SELECT mailbox, count(*) FROM keys GROUP BY mailbox"))
    known = set()
    for id_, name, _, *counters, key_count, _, _ in connection.execute("SELECT * FROM mailboxes"):
        known.add(id_)
        ready, ready_bytes, delayed, delayed_bytes, dead, dead_bytes = counters
        found = (
            live.get(id_, (0, 0)),
            states.get((id_, "delayed"), (0, 0)),
            states.get((id_, "dead"), (0, 0)),
            keys.get(id_, 0),
        )
        counted = (
            (ready + delayed + dead, ready_bytes + delayed_bytes + dead_bytes),
            (delayed, delayed_bytes),
            (dead, dead_bytes),
            key_count,
        )
        if found != counted:
            yield (
                f"mailbox {name!r} has other counters than messages: (messages, bytes), delayed,"
                f" dead and keys are {found}, and the counters say {counted}"
            )
    for mailbox in live.keys() - known:
        yield f"messages belong to mailbox {mailbox}, which does not exist"


def content_problems_of(connection: sqlite3.Connection) -> Iterator[str]:
    """Yield the messages whose content is damaged, as mailbox and seqs."""
    for name, first, count, short, *long in connection.execute(
        "SELECT name, first, count, short, columns_seal, frames_seal, columns, frames FROM runs"
        " JOIN mailboxes ON mailboxes.id = runs.mailbox"
        " LEFT JOIN content ON content.id = runs.content"
    ):
        content = Content.from_short(short) if None in long else Content._make(long)
        if content is None or not content.is_whole:
            yield f"mailbox {name!r}: messages {first} to {first + count - 1} are damaged"
