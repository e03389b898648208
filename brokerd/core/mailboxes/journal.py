"""The seam between the core of mailboxes and the store that keeps them on disk.

The core collects the changes of one turn of the event loop in a :class:`Batch`. The
store writes all batches that it has received in one transaction, and answers each of
them, in order. The core delivers a message, and sends its RECEIPT, only after that
answer.

The core gives each message of a mailbox a seq, in ascending order. No seq is used
twice, not even after a failed batch or a restart. So the store remembers a number above
all seqs that it has received, kept or not.

A time here is a wall clock's, in seconds since the epoch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

__all__ = [
    "MAX_SEQ",
    "Alike",
    "Append",
    "Batch",
    "Buried",
    "Change",
    "Committed",
    "Contents",
    "Failed",
    "FailureKind",
    "Journal",
    "ReadyRows",
    "Record",
    "Remove",
    "Revive",
    "Row",
    "Rows",
    "State",
    "Stored",
    "is_text",
    "is_time",
]

_SIZE: Final = struct.Struct("<I")

#: The largest seq that a store can look for messages behind: its integers are signed.
MAX_SEQ: Final = 2**63 - 2
#: The latest time that a store keeps: the end of the year 9999.
_LATEST: Final = 253_402_300_799

#: The state of a message on disk. A held message is ``ready`` there.
State: TypeAlias = Literal["ready", "delayed", "dead"]


# Values from clients


def is_text(value: object) -> bool:
    """Return whether a store can keep the value: a text without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_time(value: object) -> bool:
    """Return whether a store can keep the value: a time before the year 10,000."""
    return isinstance(value, (int, float)) and 0 < value <= _LATEST


# From the core to the store


class Stored(NamedTuple):
    """One new message; its seq is ``Append.first_seq`` plus its position.

    Attributes:
        size: Bytes of its frame in ``Append.frames``.
        stored_at: When the broker accepted it.
        expires_at: When its ttl is over; None without a ttl.
        due_at: When its delay is over; None without a delay. A message with a delay is
            stored as ``delayed``.
        key: Its sender's client name and its deduplication key; None without a key.
    """

    size: int
    stored_at: float
    expires_at: float | None
    due_at: float | None
    key: tuple[str, str] | None


#: For messages none of which has a key, or a ttl of its own.
_NONE: Final[Mapping[int, Any]] = {}


class Alike:
    """Messages without delays, which were stored at the same time.

    Attributes:
        sizes: Bytes of each frame, 4 bytes each, little-endian.
        stored_at: The same for all of them.
        expires_at: The same, of messages without a ttl of their own.
        keys: The key of each message that has one, by position, as in Stored.
        own_expires_at: When each message expires that has a ttl of its own, by position.
    """

    __slots__ = ("expires_at", "keys", "own_expires_at", "sizes", "stored_at")

    def __init__(
        self,
        sizes: bytes,
        stored_at: float,
        expires_at: float | None,
        keys: Mapping[int, tuple[str, str]] = _NONE,
        own_expires_at: Mapping[int, float] = _NONE,
    ) -> None:
        self.sizes = sizes
        self.stored_at = stored_at
        self.expires_at = expires_at
        self.keys = keys
        self.own_expires_at = own_expires_at

    def __len__(self) -> int:
        return len(self.sizes) // _SIZE.size

    def __iter__(self) -> Iterator[Stored]:
        for at, (size,) in enumerate(_SIZE.iter_unpack(self.sizes)):
            expires_at = self.own_expires_at.get(at, self.expires_at)
            yield Stored(size, self.stored_at, expires_at, None, self.keys.get(at))


class Append(NamedTuple):
    """New messages of one mailbox, in order, with seqs without gaps.

    The store leaves out each message whose key it knows, and names it in
    ``Committed.duplicates``. It also knows the keys of earlier messages in the same
    transaction.

    Attributes:
        frames: The frames as a client receives them, one behind the other: length,
            header with the flag ACK, sender, topic of an event, seq, attempt 1,
            extension, payload.
    """

    mailbox: str
    first_seq: int
    frames: bytes
    messages: tuple[Stored, ...] | Alike

    def split(self) -> Iterator[bytes]:
        """Yield the frame of each message."""
        position = 0
        for stored in self.messages:
            yield self.frames[position : position + stored.size]
            position += stored.size


class Remove(NamedTuple):
    """Messages that were acknowledged, dropped or have expired.

    seqs: inclusive ranges. Seqs that the store does not have are ignored.
    """

    mailbox: str
    seqs: tuple[tuple[int, int], ...]


class Change(NamedTuple):
    """The new state of a message that stays. It is ignored if the store has no such seq.

    Attributes:
        attempts: Failed attempts that were counted.
        due_at: When a delayed message is ready; else None.
        reason, error, consumer, at: Of a dead letter: why, the last error that a
            consumer gave, that consumer's address, and when. ``reason`` and ``error``
            of other messages are those of the last failed attempt.
    """

    mailbox: str
    seq: int
    state: State
    attempts: int
    due_at: float | None = None
    reason: str = ""
    error: str = ""
    consumer: str = ""
    at: float = 0.0


class Revive(NamedTuple):
    """A dead letter becomes ready under a new seq, with no attempt counted.

    seq_at: where in its frame the seq lies, 8 bytes in network byte order. The store
        writes the new one there.
    """

    mailbox: str
    old_seq: int
    new_seq: int
    seq_at: int


Record: TypeAlias = Append | Remove | Change | Revive


class Batch(NamedTuple):
    """The records of one turn of the event loop, in order.

    number: increases by one with each batch.
    """

    number: int
    records: tuple[Record, ...]


class Journal(Protocol):
    """The store, as the core calls it. Each call returns at once.

    The store carries the calls out in order. It answers each by a method of
    ``Mailboxes``, in the same order, and never from within a call. The answers:
    ``opened(contents)`` at the start, ``committed(Committed)``, ``failed(Failed)``,
    ``rows(request, rows)``, ``key_looked_up(request, known)`` and
    ``purged(request, count, size)``. Before ``rows``, ``buried(Buried)`` may come.
    """

    def commit(self, batch: Batch) -> None:
        """Write a batch to disk; answered by ``committed`` or ``failed``."""

    def read(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        after: tuple[float, int],
        max_messages: int,
        max_bytes: int,
    ) -> None:
        """Read messages of one state, or of any state for None; answered by ``rows``.

        Delayed messages are read in the order of (due_at, seq), all others by seq.
        At least one message is returned, if there is any, however long it is.

        after: The last message that is not wanted, as (due_at, seq); due_at is 0.0
            unless the state is ``delayed``.
        """

    def look_up_key(self, request: int, mailbox: str, sender: str, key: str) -> None:
        """Look up whether a message with a key was stored; answered by ``key_looked_up``."""

    def purge(
        self,
        request: int,
        mailbox: str,
        state: State | None,
        before_seq: int,
        without: tuple[int, ...],
    ) -> None:
        """Remove all messages of one state, or of any for None; answered by ``purged``.

        Args:
            before_seq: Messages with this seq or a higher one stay.
            without: Seqs of messages that stay.
        """


# From the store to the core


class Contents(NamedTuple):
    """One mailbox as the store found it when it was opened.

    Attributes:
        next_seq: The first seq that was never used.
        ready, delayed, dead: Messages of each state.
        ready_bytes, delayed_bytes, dead_bytes: Bytes of their frames.
        oldest: When the oldest message that is not dead was stored; None without one.
        keys: Deduplication keys that are remembered.
        next_due: The soonest ``due_at`` of the delayed messages; None without one.
    """

    mailbox: str
    next_seq: int
    ready: int = 0
    delayed: int = 0
    dead: int = 0
    ready_bytes: int = 0
    delayed_bytes: int = 0
    dead_bytes: int = 0
    oldest: float | None = None
    keys: int = 0
    next_due: float | None = None


class Committed(NamedTuple):
    """A batch that is on disk.

    Attributes:
        duplicates: The messages of the batch that were left out, because their key is
            known: mailbox and seq.
        forgotten_keys: By mailbox, the number of keys that were forgotten since the last
            answer, because the time of deduplication is over for them.
    """

    number: int
    duplicates: tuple[tuple[str, int], ...] = ()
    forgotten_keys: tuple[tuple[str, int], ...] = ()


class FailureKind(Enum):
    """Why a batch was not written."""

    FULL = "full"
    """There is no room on the disk. No Append of the batch was stored; all its other
    records were.
    """
    IO = "io"
    """An I/O error: it is not known what was stored. The store writes nothing more."""


class Failed(NamedTuple):
    """A batch that was not written, or not as a whole.

    text: the system's description of the failure, for people.
    """

    number: int
    kind: FailureKind
    text: str
    forgotten_keys: tuple[tuple[str, int], ...] = ()


class Row(NamedTuple):
    """One message that was read back.

    frame: as it is stored, with its seq and the attempt 1. It is empty for a damaged
        message, which is ``dead`` with the reason ``damaged``.
    """

    seq: int
    frame: bytes
    stored: Stored
    state: State
    attempts: int
    due_at: float | None = None
    reason: str = ""
    error: str = ""
    consumer: str = ""
    at: float = 0.0


class Buried(NamedTuple):
    """Messages that a read has found damaged, and has made dead letters.

    They may be more than the read returns: one damaged row of the database costs all
    messages in it.

    messages: seq, ``due_at`` if the message was ``delayed``, and bytes of the frame.
    """

    mailbox: str
    messages: tuple[tuple[int, float | None, int], ...]


class ReadyRows:
    """Messages that were read back and have no state of their own: they are ready.

    Iterating over them yields their rows.

    Attributes:
        seqs, stored_at, expires_at: Of each message; no message is damaged.
        joined: What contains the frames, one behind the other; where the first one begins;
            and their sizes. Several of these.
        keys: Its sender and key of each message that has one, by position.
    """

    __slots__ = ("_frames", "expires_at", "joined", "keys", "seqs", "stored_at")

    def __init__(
        self,
        seqs: list[int],
        joined: list[tuple[bytes, int, Sequence[int]]],
        stored_at: list[float],
        expires_at: list[float | None],
        keys: dict[int, tuple[str, str]],
    ) -> None:
        self.seqs = seqs
        self.joined = joined
        self._frames: list[bytes] | None = None
        self.stored_at = stored_at
        self.expires_at = expires_at
        self.keys = keys

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def frames(self) -> list[bytes]:
        """The frame of each message."""
        if self._frames is None:
            self._frames = []
            for contained, first, sizes in self.joined:
                at = first
                for size in sizes:
                    self._frames.append(contained[at : at + size])
                    at += size
        return self._frames

    def __getitem__(self, at: int) -> Row:
        frame, key = self.frames[at], self.keys.get(at % len(self))
        stored = Stored(len(frame), self.stored_at[at], self.expires_at[at], None, key)
        return Row(self.seqs[at], frame, stored, "ready", 0)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


Rows: TypeAlias = Sequence[Row] | ReadyRows
