"""The store of mailboxes in the test's own process, and records for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from brokerd.core.mailboxes.journal import Append, Batch, Contents, Record, Row, State, Stored
from brokerd.store.database import Database
from brokerd.store.directory import DATABASE, Directory
from brokerd.store.messages import (
    VERSION,
    Message,
    Piece,
    Received,
    commit_message,
    message,
    rows_of,
)
from brokerd.store.process import Store

#: What a store in tests remembers a key for, in seconds.
DEDUP_S = 50.0


def append(
    mailbox: str,
    first_seq: int,
    *frames: bytes,
    at: float = 1000.0,
    key: str = "",
    due_at: float | None = None,
    expires_at: float | None = None,
) -> Append:
    """Return new messages. Each has the key, followed by its position, if one is given."""
    messages = tuple(
        Stored(len(frame), at, expires_at, due_at, ("alice", f"{key}{position}") if key else None)
        for position, frame in enumerate(frames)
    )
    return Append(mailbox, first_seq, b"".join(frames), messages)


class LocalStore:
    """A store that carries requests out at once.

    Attributes:
        path: The directory of the database.
        now: Its wall clock.
        contents: What the database contained when it was opened, by mailbox.
    """

    def __init__(self, path: Path, min_free: int = 0) -> None:
        self.path = path
        self.now = 1000.0
        self.min_free = min_free
        self._numbers = 0
        self._written = Received()
        self.open()

    def open(self) -> None:
        """Open the database."""
        self.directory = Directory(self.path, 0.0)
        try:
            self.database = Database(self.path, self.directory.commits)
            self.store = Store(self.directory, self.database, self._write, lambda: self.now)
            self.store.open(VERSION, DEDUP_S, self.min_free)
        except BaseException:
            self.directory.close()
            raise
        (opened,) = self._written.take()
        self.contents = {each[0]: Contents(*each) for each in opened.arguments[2]}

    def _write(self, pieces: list[Piece]) -> None:
        self._written.add(b"".join(pieces))

    def close(self) -> None:
        """Close the database as the process does at its end."""
        self.store.close()
        self.directory.close()

    def crash(self, copy: Path) -> None:
        """Leave the files as a killed process would: use a copy of them from now on."""
        shutil.copytree(self.path, copy)
        self.database.connection.close()
        self.directory.close()
        self.path = copy

    def run(self, *requests: list[Piece]) -> list[Message]:
        """Carry out requests that lie in the socket together; return the answers."""
        received = Received(b"".join(b"".join(request) for request in requests))
        self.store.run(received.take())
        return self._written.take()

    def commit(self, *records: Record) -> Message:
        """Carry out one batch; return its answer."""
        self._numbers += 1
        answers = self.run(commit_message(Batch(self._numbers, records)))
        assert answers[0].arguments[0] == self._numbers
        return answers[0]

    def rows(
        self,
        mailbox: str = "bob",
        state: State | None = "ready",
        after: tuple[float, int] = (0.0, 0),
        max_messages: int = 10_000,
        max_bytes: int = 1 << 20,
    ) -> list[Row]:
        """Return the messages of a read."""
        answers = self.run(message("read", 1, mailbox, state, after, max_messages, max_bytes))
        return list(rows_of(answers[-1]))

    def purge(
        self, mailbox: str, state: State | None, before_seq: int, without: Sequence[int] = ()
    ) -> tuple[int, int]:
        """Purge; return how many messages and bytes that were."""
        (answer,) = self.run(message("purge", 1, mailbox, state, before_seq, without))
        count, size = answer.arguments[1:]
        return count, size


def overwrite(file: Path, offset: int, change: int = 0xFF) -> None:
    """Change one byte of a file."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        before = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([before ^ change]))


def database_file(path: Path) -> Path:
    """Return the database of a directory."""
    return path / DATABASE
