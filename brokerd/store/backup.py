"""Copies of a database that is in use, and checks of one that is not.

The store process writes to the database file only in checkpoints. While a backup keeps
it from them, the file and its write-ahead log are copied: messages are stored meanwhile,
and the backup has those of the moment when the log was copied.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from brokerd.store.check import content_problems_of, problems_of
from brokerd.store.directory import DATABASE, Directory, Refused, no_checkpoints
from brokerd.store.schema import ERRORS, seal

__all__ = ["Checked", "back_up", "check"]

#: Bytes at the start of a write-ahead log that differ when it begins again.
_LOG_HEAD: Final = 32
#: Seqs per mailbox that a restored backup leaves out: those that were used after it was
#: made. A consumer that remembers its last seq must not take new messages for old ones.
_LEFT_OUT: Final = 1 << 32


class Checked(NamedTuple):
    """The result of a check.

    Attributes:
        mailboxes, messages: How many there are.
        problems: What is wrong, a line each.
        damaged: Messages that are kept as dead letters because they are damaged, or will
            be.
    """

    mailboxes: int
    messages: int
    problems: list[str]
    damaged: list[str]


def check(path: Path) -> Checked:
    """Check a database, or the one in a directory; change nothing.

    Raises Refused if there is none, or if a broker uses it, or OSError.
    """
    file = path / DATABASE if path.is_dir() else path
    if not file.is_file():
        raise Refused(f"{file}: no such database")
    with _unused(file) as noted:
        return _check(file, noted)


@contextmanager
def _unused(file: Path) -> Iterator[int | None]:
    """Keep brokers from using a database; yield the transactions that were noted."""
    if file.name != DATABASE or not os.access(file.parent, os.W_OK):
        yield None
        return
    directory = Directory(file.parent, 0.0)
    shared = file.with_name(f"{DATABASE}-shm")
    existed = shared.exists()
    try:
        yield directory.commits
    finally:
        if not existed:
            shared.unlink(missing_ok=True)
        directory.close()


def _check(file: Path, noted: int | None) -> Checked:
    log = file.with_name(f"{file.name}-wal")
    mode = "mode=ro" if log.exists() else "immutable=1"
    uri = f"file:{quote(str(file.absolute()))}?{mode}"
    problems: list[str] = []
    damaged: list[str] = []
    mailboxes = messages = 0
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            problems += problems_of(connection)
            (commits,) = connection.execute(
                "SELECT cast(ifnull(max(commits), 0) AS INTEGER) FROM mailboxes"
            ).fetchone()
            if noted is not None and commits < noted:
                problems.append(f"the last {noted - commits} transactions are missing")
            mailboxes, messages = connection.execute(
                "SELECT count(*), total(ready + delayed + dead) FROM mailboxes"
            ).fetchone()
            damaged += content_problems_of(connection)
    except ERRORS as error:
        problems.append(str(error))
    return Checked(mailboxes, int(messages), problems, damaged)


def back_up(directory: Path, file: Path) -> Checked:
    """Copy the database of a directory, which may be in use, and check the copy.

    The file appears when it is complete and on disk.

    Raises Refused without a database, or if the file exists, or OSError.
    """
    if not (directory / DATABASE).is_file():
        raise Refused(f"{directory / DATABASE}: no such database")
    if file.exists():
        raise Refused(f"{file} exists (backups never overwrite a file)")
    partial = file.with_name(f"{file.name}.partial")
    log = file.with_name(f"{file.name}.partial-wal")
    try:
        with no_checkpoints(directory):
            _copy(directory / DATABASE, partial)
            _copy_log(directory / f"{DATABASE}-wal", log)
        checked = _finish(partial)
        if not checked.problems:
            _sync(partial)
            partial.rename(file)
            _sync(file.absolute().parent)
    finally:
        for left in (partial, log, file.with_name(f"{file.name}.partial-shm")):
            left.unlink(missing_ok=True)
    return checked


def _copy(source: Path, target: Path) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def _copy_log(source: Path, target: Path) -> None:
    """Copy a write-ahead log. It may begin again while it is copied, but only once."""
    while source.exists():
        _copy(source, target)
        with source.open("rb") as reader, target.open("rb") as copied:
            if reader.read(_LOG_HEAD) == copied.read(_LOG_HEAD):
                return


def _finish(partial: Path) -> Checked:
    """Move the log of a copy into it, and leave out the seqs that may be used already."""
    try:
        with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            rows = connection.execute("SELECT * FROM mailboxes").fetchall()
            connection.execute("BEGIN")
            for id_, name, next_seq, *counters, sealed in rows:
                if seal(id_, name, next_seq, *counters) == sealed:
                    later = next_seq + _LEFT_OUT
                    connection.execute(
                        "UPDATE mailboxes SET next_seq = ?, seal = ? WHERE id = ?",
                        (later, seal(id_, name, later, *counters), id_),
                    )
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except ERRORS as error:
        return Checked(0, 0, [str(error)], [])
    return _check(partial, None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
