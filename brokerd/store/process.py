"""The store process: one transaction after the other, and the answers.

All batches that lie in the socket become one transaction. No timer delays them: while
one transaction is written to disk, the batches of the next one arrive.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from brokerd.core.mailboxes.journal import Contents, FailureKind
from brokerd.store.database import Damaged, Database
from brokerd.store.directory import DATABASE, Directory, Refused
from brokerd.store.messages import (
    VERSION,
    Message,
    Piece,
    Received,
    message,
    records_of,
    rows_message,
)
from brokerd.store.request_poll import RequestPoll
from brokerd.store.schema import ERRORS

__all__ = ["main"]

#: Bytes read from the broker at once, and most bytes of requests per transaction.
_READ: Final = 1 << 20
_TRANSACTION: Final = 8 << 20
#: Bytes written to the write-ahead log after which it is moved to the database file: half
#: of the reserve, between these two.
_CHECKPOINT_BYTES: Final = 16 << 20
_SMALLEST_CHECKPOINT: Final = 256 << 10
#: Bytes that a transaction writes beside frames, about.
_OVERHEAD: Final = 64 << 10
#: Free pages of the database file that are kept for new messages, and how many of the
#: others are given back to the file system at once.
_KEPT_PAGES: Final = 16384
_VACUUMED_PAGES: Final = 4096
#: Seconds between two looks at what is to be tidied while no request comes.
_LOOK_S: Final = 1.0
#: Runs of a mailbox that are purged in one transaction.
_PURGED_RUNS: Final = 256

_Answer = list[Piece]


class _Full(Exception):
    """New messages find no room; the text says why."""


class Store:
    """Carries out the requests of one broker.

    Attributes:
        broken: Why nothing is read or written any more; "" while all is well. The first
            I/O error decides: what the disk confirms later may be wrong.

    Args:
        directory: The locked directory of the database.
        database: The open database.
        write: Sends pieces to the broker.
        wall: The wall clock, in seconds since the epoch.
    """

    def __init__(
        self,
        directory: Directory,
        database: Database,
        write: Callable[[list[Piece]], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._database = database
        self._write = write
        self._wall = wall
        self._dedup = 0.0
        self._min_free = 0
        self.broken = ""
        self._since_checkpoint = 0

    def open(self, version: int, dedup: float, min_free: int) -> None:
        """Answer ``open``. Raises Damaged, OSError or sqlite3.Error."""
        self.configure(dedup, min_free)
        try:
            contents = self._contents()
        except sqlite3.Error as error:
            if not _is_full(error):
                raise
            self._database.rollback()
            self._use_reserve()
            contents = self._contents()
        self._directory.sync()
        self._directory.make_reserve()
        self._write(message("opened", VERSION, os.getpid(), [tuple(each) for each in contents]))

    def _contents(self) -> list[Contents]:
        """Return what the database contains. What is damaged is noted in it."""
        self._database.begin()
        contents = self._database.contents()
        self._commit()
        return contents

    def configure(self, dedup: float, min_free: int) -> None:
        """Take over the configuration.

        Args:
            dedup: Seconds for which a key is known.
            min_free: Bytes of the file system that new messages leave free.
        """
        self._dedup = dedup
        self._min_free = min_free

    def run(self, requests: list[Message]) -> None:
        """Carry out requests and answer them; all of them in one transaction, if possible."""
        while requests:
            if requests[0].word in ("purge", "configure"):
                self._alone(requests.pop(0))
                continue
            size = count = 0
            writes = requests[0].word == "commit"
            for request in requests:
                if request.word in ("purge", "configure") or size > _TRANSACTION:
                    break
                if request.word == "commit" and not writes:
                    # What is read before that does not wait for the disk.
                    break
                size += len(request.body)
                count += 1
            self._together(requests[:count], size)
            del requests[:count]

    def _alone(self, request: Message) -> None:
        if request.word == "configure":
            self.configure(*request.arguments)
            return
        number, mailbox, state, before_seq, without = request.arguments
        count = size = from_seq = 0
        while not self.broken:
            try:
                self._database.begin()
                purged = self._database.purge(
                    mailbox, state, from_seq, before_seq, without, _PURGED_RUNS
                )
                self._commit()
            except (*ERRORS, Damaged, OSError) as error:
                self._break(error)
                break
            count, size, from_seq = count + purged[0], size + purged[1], purged[2]
            self._since_checkpoint += _PURGED_RUNS * _OVERHEAD // 4
            self.tidy()
            if not from_seq:
                break
        self._write(message("purged", number, count, size))

    def _together(self, requests: list[Message], size: int) -> None:
        """Carry out requests in one transaction, and answer them."""
        answers = None
        if not self.broken:
            try:
                answers = self._write_to_disk(requests, size)
            except (*ERRORS, Damaged, OSError, _Full) as error:
                self._break(error)
        if answers is None:
            answers = [self._failure(request) for request in requests]
        for answer in answers:
            self._write(answer)
        self._since_checkpoint += self._database.written + _OVERHEAD
        self.tidy()

    def _write_to_disk(self, requests: list[Message], size: int) -> list[_Answer]:
        """Return the answers; without room for all, leave new messages out."""
        refusal = self._refusal(size)
        if not refusal:
            try:
                return self._attempt(requests, "")
            except _Full as error:
                refusal = str(error)
        try:
            return self._attempt(requests, refusal)
        except _Full:
            self._use_reserve()
            return self._attempt(requests, refusal)

    def _refusal(self, size: int) -> str:
        """Return why messages of this size can't be stored now; "" if they can."""
        if not size:
            return ""
        free = self._directory.free()
        # They are written to the write-ahead log and to the database.
        wanted = self._min_free + 2 * size + _OVERHEAD
        if free >= wanted or free + self._database.free() >= wanted:
            return ""
        return (
            f"the disk is full: {self._directory.path} has {free} bytes free,"
            f" and store.min_free is {self._min_free}"
        )

    def _attempt(self, requests: list[Message], refusal: str) -> list[_Answer]:
        """Return the answers, when everything is on disk.

        Raises _Full when nothing of it is, or what SQLite and the system raise.

        refusal: why new messages are not stored; "" if they are.
        """
        database = self._database
        try:
            database.begin()
            made = [self._carry_out(request, refusal) for request in requests]
            database.forget_keys(self._known_since)
            self._commit()
        except sqlite3.Error as error:
            if not _is_full(error):
                raise
            database.rollback()
            raise _Full(f"the disk is full: {self._directory.path}") from error
        forgotten = [*database.forgotten.items()]
        answers = [message("buried", *each) for each in database.buried.items()]
        for answer in made:
            if answer[0] in ("committed", "failed"):
                answers.append(message(*answer, forgotten))
                forgotten = []
            else:
                word, number, result = answer
                answers.append(
                    rows_message(number, result)
                    if word == "rows"
                    else message(word, number, result)
                )
        if forgotten:
            answers.append(message("forgotten", forgotten))
        return answers

    def _commit(self) -> None:
        self._database.commit()
        self._directory.note(self._database.commits)

    @property
    def _known_since(self) -> float:
        return self._wall() - self._dedup

    def _carry_out(self, request: Message, refusal: str) -> tuple[Any, ...]:
        """Return the answer to a request, without forgotten keys and not yet packed."""
        database = self._database
        if request.word == "commit":
            return self._write_batch(request, refusal)
        number, *arguments = request.arguments
        if request.word == "read":
            return "rows", number, database.read(*arguments)
        if request.word == "look_up_key":
            mailbox, sender, key = arguments
            return "key_looked_up", number, database.knows(mailbox, sender, key, self._known_since)
        raise ValueError(f"the broker sent {request.word!r}, which this store does not know")

    def _write_batch(self, request: Message, refusal: str) -> tuple[Any, ...]:
        database, known_since = self._database, self._known_since
        duplicates: list[tuple[str, int]] = []
        refused = False
        for kind, *fields in records_of(request):
            if kind == "a" and refusal:
                refused = True
                database.skip(*fields[:3])
            elif kind == "a":
                mailbox, first, columns, frames = fields
                seqs = database.append(mailbox, first, columns, frames, known_since)
                duplicates += [(mailbox, seq) for seq in seqs]
            elif kind == "r":
                database.remove(*fields)
            elif kind == "c":
                database.change(*fields)
            else:
                database.revive(*fields)
        number = request.arguments[0]
        if refused:
            return "failed", number, FailureKind.FULL.value, refusal
        return "committed", number, duplicates

    def _failure(self, request: Message) -> _Answer:
        """Return the answer to a request that is not carried out any more."""
        number = request.arguments[0]
        if request.word == "commit":
            return message("failed", number, FailureKind.IO.value, self.broken, ())
        if request.word == "read":
            return rows_message(number, ())
        return message("key_looked_up", number, False)

    def _break(self, error: Exception) -> None:
        self.broken = _in_words(error)

    # Tidying

    @property
    def has_to_look(self) -> bool:
        """Whether ``tidy`` may find something to do while no request comes."""
        return not self.broken

    def tidy(self, *, is_idle: bool = False) -> None:
        """Move the write-ahead log to the database, and give disk space back.

        is_idle: no request waits, so keys are forgotten, and space is given back, too.
        """
        if self.broken:
            return
        try:
            if is_idle:
                self._directory.make_reserve()
                if self._database.has_old_keys(self._known_since):
                    for answer in self._attempt([], "no message is written"):
                        self._write(answer)
                if self._vacuum():
                    self._since_checkpoint += _CHECKPOINT_BYTES
            limit = max(_SMALLEST_CHECKPOINT, self._directory.reserved // 2)
            if self._since_checkpoint >= min(_CHECKPOINT_BYTES, limit):
                self._vacuum()
                self._checkpoint()
        except (*ERRORS, Damaged, OSError) as error:
            # A log that finds no room in the database file stays where it is.
            if not _is_full(error):
                self._break(error)

    def _vacuum(self) -> bool:
        """Give some free pages back; return whether there were any to give."""
        execute = self._database.connection.execute
        free = execute("PRAGMA freelist_count").fetchone()[0]
        if free <= _KEPT_PAGES:
            return False
        execute(f"PRAGMA incremental_vacuum({min(free - _KEPT_PAGES, _VACUUMED_PAGES)})").fetchall()
        return True

    def _checkpoint(self) -> None:
        if not self._directory.hold_checkpoint():
            return
        try:
            self._directory.sync()
            self._database.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._since_checkpoint = 0
        finally:
            self._directory.release_checkpoint()

    def _use_reserve(self) -> None:
        """Free the reserve: a full disk must not keep messages from being removed.

        The write-ahead log is moved to the database, so that its space is used again.
        """
        self._directory.release_reserve()
        try:
            self._checkpoint()
        except sqlite3.Error as error:
            if not _is_full(error):
                raise

    def close(self) -> None:
        """Move everything to the database file."""
        if self.broken:
            return
        try:
            self._database.close()
            self._directory.sync()
        except (*ERRORS, OSError) as error:
            # Everything is in the write-ahead log.
            self._break(error)


def _is_full(error: Exception) -> bool:
    return getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"


def _in_words(error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", "")
    return f"{error} ({name})" if name else str(error)


def serve(sock: socket.socket, store: Store, *, may_poll: bool) -> None:
    """Carry out the broker's requests until it closes its end."""
    received = Received()
    buffer = memoryview(bytearray(_READ))
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    poll = RequestPoll(waiting, may_poll=may_poll)
    open_ = True
    while open_:
        if not waiting.poll(_LOOK_S * 1000 if store.has_to_look else None):
            store.tidy(is_idle=True)
            continue
        size = 0
        while size < _TRANSACTION:
            try:
                count = sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if not count:
                open_ = False
                break
            received.add(buffer[:count])
            size += count
            if count < _READ:
                # Nothing more lay there.
                break
        requests = received.take()
        # Its sender waits for the receipt of a lone message, and may send the next one then.
        is_lone = len(requests) == 1 and len(requests[0].body) > 0
        store.run(requests)
        if is_lone:
            poll.run()


def _open(path: Path, opening: Message, write: Callable[[list[Piece]], None]) -> Store | str:
    """Return the store, or the reason why the database can't be used."""
    try:
        directory = Directory(path)
        database = Database(path, directory.commits)
        store = Store(directory, database, write)
        store.open(*opening.arguments)
    except Refused as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    except (*ERRORS, Damaged) as error:
        return f"{path / DATABASE} {_advice(error)}"
    return store


def _advice(error: Exception) -> str:
    """Return what is wrong with a database that can't be opened, and what to do."""
    name, words = getattr(error, "sqlite_errorname", ""), _in_words(error)
    if name == "SQLITE_FULL":
        return "finds no room on its file system: free some space"
    if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return f"can't be used: {words}"
    return (
        f"is damaged: {words}. Nothing was changed. Put a backup in its place, or copy the"
        " directory and run `brokerd store check` to see what is left"
    )


def main(directory: str, descriptor: str, may_poll: str) -> NoReturn:
    """Serve the broker at the other end of a socket; end the process.

    Args:
        directory: Of the database.
        descriptor: The number of the socket's descriptor.
        may_poll: Whether a spare processor may poll for requests: ``1`` or ``0``.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2"):
        # A stop of the service reaches all its processes; this one ends after the broker.
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sock = socket.socket(fileno=int(descriptor))
    sock.set_inheritable(False)
    sock.setblocking(True)

    def write(pieces: list[Piece]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"".join(pieces))

    received = Received()
    requests: list[Message] = []
    while not requests:
        some = sock.recv(_READ)
        if not some:
            os._exit(0)
        received.add(some)
        requests = received.take()
    opened = _open(Path(directory), requests[0], write)
    if isinstance(opened, str):
        write(message("refused", opened))
        # To close the database would be to write to it.
        os._exit(1)
    serve(sock, opened, may_poll=may_poll == "1")
    opened.close()
    os._exit(1 if opened.broken else 0)
