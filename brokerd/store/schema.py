"""The tables of the database, and how it is opened.

Each table has a checksum per row, because SQLite has none:

- ``mailboxes``: counters, so that a start reads one row for each mailbox; and the number
  of the last transaction that changed them.
- ``runs``: consecutive messages of one mailbox, and which of them are removed. One row
  for each Append, so a commit costs the same for one message and for a thousand. A short
  run has its content in its row.
- ``content``: the frames and columns of any other run. Apart from ``runs``, so that
  removing a message writes no content.
- ``states``: messages that are not simply ready: delayed, dead, or failed before.
- ``keys``: deduplication keys, in the order in which they are forgotten.

Measured beside a busy process, with messages of 160 bytes, in processor time of the
store process per message: 2.3 us with a row for each message, 0.4 us with a row for
each batch. Pages of 8 KiB take 0.37 us, and pages of 4 KiB 0.42 us. A commit of one
message writes two pages, 8 KB; with 41 KB instead of 16 KB, its fdatasync took 1.3 times
as long. The incremental vacuum costs nothing that can be measured.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from pathlib import Path
from typing import Final

from brokerd.store.directory import DATABASE, Refused

__all__ = ["ERRORS", "PAGE", "SCHEMA", "connect", "seal"]

#: The version of these tables, SQLite's ``user_version``.
SCHEMA: Final = 2
#: What a database raises that can't be used. SQLite's own message may quote damaged text,
#: which is not UTF-8 then.
ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
#: Identifies the file as a database of brokerd, SQLite's ``application_id``.
_APPLICATION: Final = 0x626B7264
#: Bytes per page of the database.
PAGE: Final = 4096
#: Memory for pages, in KiB.
_CACHE_KIB: Final = 32 << 10
#: Bytes up to which a database is checked as a whole when it is opened; it takes about a
#: second. ``brokerd store check`` checks a larger one.
CHECKED_BYTES: Final = 64 << 20

_TABLES: Final = """
CREATE TABLE mailboxes (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_seq INTEGER NOT NULL,
    ready INTEGER NOT NULL, ready_bytes INTEGER NOT NULL,
    delayed INTEGER NOT NULL, delayed_bytes INTEGER NOT NULL,
    dead INTEGER NOT NULL, dead_bytes INTEGER NOT NULL,
    keys INTEGER NOT NULL, commits INTEGER NOT NULL, seal INTEGER NOT NULL
);
CREATE TABLE runs (
    mailbox INTEGER NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL,
    content INTEGER NOT NULL, size INTEGER NOT NULL, gone BLOB NOT NULL,
    live INTEGER NOT NULL, live_bytes INTEGER NOT NULL, seal INTEGER NOT NULL,
    short BLOB NOT NULL, PRIMARY KEY (mailbox, first)
) WITHOUT ROWID;
CREATE TABLE content (
    id INTEGER PRIMARY KEY, columns_seal INTEGER NOT NULL, frames_seal INTEGER NOT NULL,
    columns BLOB NOT NULL, frames BLOB NOT NULL
);
CREATE TABLE states (
    mailbox INTEGER NOT NULL, seq INTEGER NOT NULL, size INTEGER NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, due_at REAL, reason TEXT NOT NULL,
    error TEXT NOT NULL, consumer TEXT NOT NULL, at REAL NOT NULL, seal INTEGER NOT NULL,
    PRIMARY KEY (mailbox, seq)
) WITHOUT ROWID;
CREATE INDEX states_by_due ON states (mailbox, state, due_at, seq);
CREATE TABLE keys (
    id INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, sender TEXT NOT NULL,
    key TEXT NOT NULL, at REAL NOT NULL, seal INTEGER NOT NULL,
    UNIQUE (mailbox, sender, key)
);
"""


def seal(*values: object) -> int:
    """Return the checksum of a row's values."""
    return zlib.crc32(repr(values).encode())


def connect(directory: Path) -> sqlite3.Connection:
    """Open the database of a directory; create it if there is none.

    Raises Refused, or sqlite3.Error. The caller has the lock of the directory. To close
    the connection is to write to the database: after an error, end the process instead.
    """
    path = directory / DATABASE
    is_new = not path.exists() or path.stat().st_size == 0
    if is_new:
        # For the broker's user alone, whatever the umask is: it will hold messages. SQLite
        # gives its log the mode of the database.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
    _set(connection, is_new)
    _check_version(connection, path)
    return connection


def _set(connection: sqlite3.Connection, is_new: bool) -> None:
    """Set how the database is used, and read back what its promises rest on."""
    if is_new:
        connection.execute(f"PRAGMA page_size = {PAGE}")
        # Lets a large backlog give its disk space back, and frees long rows without
        # reading them.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # No shared memory: a second process can neither read nor keep a checkpoint from
    # ending.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    if mode != "wal" or synchronous != 2:
        raise Refused(
            f"SQLite {sqlite3.sqlite_version} uses journal_mode {mode} and synchronous"
            f" {synchronous} here, not wal and 2 (use a local file system)"
        )


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not (tables or application or version):
        connection.executescript(
            f"BEGIN IMMEDIATE; {_TABLES} PRAGMA application_id = {_APPLICATION};"
            f" PRAGMA user_version = {SCHEMA}; COMMIT;"
        )
    elif application != _APPLICATION:
        raise Refused(f"{path} is not a database of brokerd, or is damaged")
    elif version != SCHEMA:
        raise Refused(
            f"{path} has the tables of version {version}, and this brokerd uses version {SCHEMA}"
            " (run the brokerd that wrote it)"
        )
    elif _tables_of(connection) != _expected_tables():
        raise Refused(f"{path} is damaged: its tables are not those of brokerd")


def _tables_of(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    return connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    ).fetchall()


def _expected_tables() -> list[tuple[str, ...]]:
    """Return the tables as SQLite describes them."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(_TABLES)
    tables = _tables_of(connection)
    connection.close()
    return tables
