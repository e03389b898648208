"""The messages between the broker and its store process, over a pair of sockets.

A message is a head of 12 bytes, a list, and bytes. The head is the length of the list,
4 bytes, and of the bytes, 8 bytes, in network byte order. The list's first item is the
word, the rest its arguments. The sizes of the parts of those bytes stand in the list,
which is written by ``marshal``: JSON takes 20 us longer for a message and its answer, on
cold caches, while its sender waits.

    broker  open       version of this format; dedup and min_free of the configuration
            configure  dedup and min_free, after a reload
            commit     number, and the records of a Batch, one array for each
            read, look_up_key, purge      as in brokerd.core.mailboxes.journal
    store   opened     version, process id, and the fields of each Contents; the store
                       answers ``open`` with it
            refused    the reason why the database can't be used; the store ends
            committed, failed, rows, key_looked_up, purged      the answers
            forgotten  keys that were forgotten while nothing was committed
            buried     the fields of a Buried, before the ``rows`` of the read

The store answers in the order of the requests. It ends when the broker closes its end,
after it has committed what it has received.
"""

from __future__ import annotations

import marshal
import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

from brokerd.core.mailboxes.journal import (
    Append,
    Batch,
    Change,
    ReadyRows,
    Remove,
    Revive,
    Row,
    Rows,
)
from brokerd.store.columns import Columns, pack

__all__ = ["VERSION", "Message", "Received", "commit_message", "message", "rows_of"]

#: The version of this format and of the store process's behaviour. A broker that has
#: been upgraded restarts a store process of another version. What ``marshal`` writes may
#: depend on Python's version.
VERSION: Final = 4 << 16 | sys.hexversion >> 16

_HEAD: Final = struct.Struct("!IQ")
#: Largest list, and largest number of bytes behind it, that are accepted.
_LARGEST_LIST: Final = 1 << 28
_LARGEST_BODY: Final = 1 << 32

#: The fields of a Row from ``state`` on, of a message without a state of its own.
_READY: Final = ("ready", 0, None, "", "", "", 0.0)

Piece = bytes | bytearray | memoryview


class Message:
    """One received message.

    Attributes:
        word: What it says.
        arguments: The rest of the list.
        body: The bytes behind the list.
    """

    __slots__ = ("arguments", "body", "word")

    def __init__(self, word: str, arguments: list[Any], body: bytes | memoryview) -> None:
        self.word = word
        self.arguments = arguments
        self.body = body


def message(word: str, *arguments: object, body: Sequence[Piece] = ()) -> list[Piece]:
    """Return the pieces of a message."""
    listed = marshal.dumps([word, *arguments])
    return [_HEAD.pack(len(listed), sum(map(len, body))) + listed, *body]


def commit_message(batch: Batch) -> list[Piece]:
    """Return the pieces of a ``commit``.

    The records are ``("a", mailbox, first_seq, size of columns, size of frames)``,
    ``("r", mailbox, ranges)``, ``("c", ...fields of Change)`` and
    ``("v", ...fields of Revive)``.
    """
    records: list[object] = []
    body: list[Piece] = []
    for record in batch.records:
        if isinstance(record, Append):
            columns = pack(record.messages)
            records.append(
                ("a", record.mailbox, record.first_seq, len(columns), len(record.frames))
            )
            body += (columns, record.frames)
        elif isinstance(record, Remove):
            records.append(("r", *record))
        elif isinstance(record, Change):
            records.append(("c", *record))
        else:
            records.append(("v", *record))
    return message("commit", batch.number, records, body=body)


def records_of(received: Message) -> Iterator[tuple[Any, ...]]:
    """Yield the records of a ``commit``.

    An Append is yielded as ``("a", mailbox, first_seq, columns, frames)``.
    """
    offset = 0
    body = received.body
    for kind, *fields in received.arguments[1]:
        if kind == "a":
            mailbox, first_seq, columns, frames = fields
            middle = offset + columns
            yield "a", mailbox, first_seq, body[offset:middle], body[middle : middle + frames]
            offset = middle + frames
        elif kind == "c":
            yield "c", Change(*fields)
        elif kind == "v":
            yield "v", Revive(*fields)
        else:
            yield kind, *fields


class Part:
    """Some messages of one row of the database, for the answer to ``read``.

    Attributes:
        ranges: Their seqs, as inclusive ranges.
        columns: What is known of each, packed.
        frames: Their frames, in this order.
        states: For messages with a state of their own, by seq as text: state, attempts,
            due_at, reason, error, consumer, at.
    """

    __slots__ = ("columns", "frames", "ranges", "states")

    def __init__(
        self,
        ranges: list[tuple[int, int]],
        columns: bytes | memoryview,
        frames: list[memoryview],
        states: dict[str, tuple[Any, ...]],
    ) -> None:
        self.ranges = ranges
        self.columns = columns
        self.frames = frames
        self.states = states


def rows_message(request: int, parts: Sequence[Part]) -> list[Piece]:
    """Return the pieces of the answer to a ``read``."""
    listed: list[object] = []
    body: list[Piece] = []
    for part in parts:
        frames_size = sum(map(len, part.frames))
        listed.append((part.ranges, part.states, len(part.columns), frames_size))
        body.append(part.columns)
        body += part.frames
    return message("rows", request, listed, body=body)


def rows_of(received: Message) -> Rows:
    """Return the rows of the answer to a ``read``."""
    parts = []
    offset = 0
    body = bytes(received.body)
    for ranges, states, columns_size, frames_size in received.arguments[1]:
        middle = offset + columns_size
        columns = Columns.unpack(body[offset:middle])
        offset = middle + frames_size
        seqs: list[int] = []
        for first, last in ranges:
            seqs += range(first, last + 1)
        # The content of damaged rows is not sent.
        parts.append((seqs, middle if frames_size else None, columns, states))
    ready = [
        (seqs, start, columns)
        for seqs, start, columns, states in parts
        if start is not None and not states and columns.due is None
    ]
    if len(ready) == len(parts):
        return _ready_rows(body, ready)
    return [
        Row(seq, frame, stored, *states.get(str(seq), _READY))
        for seqs, start, columns, states in parts
        for seq, frame, stored in zip(
            seqs,
            [b""] * len(seqs) if start is None else _frames(body, start, columns.sizes),
            columns.messages(range(len(seqs))),
            strict=True,
        )
    ]


def _frames(body: bytes, start: int, sizes: Sequence[int]) -> list[bytes]:
    return [body[first:end] for first, end in pairwise(accumulate(sizes, initial=start))]


def _ready_rows(body: bytes, parts: Sequence[tuple[list[int], int, Columns]]) -> ReadyRows:
    rows = ReadyRows([], [], [], [], {})
    for seqs, start, columns in parts:
        rows.keys.update((len(rows) + at, key) for at, key in columns.keys.items())
        rows.seqs += seqs
        rows.joined.append((body, start, columns.sizes))
        rows.stored_at += columns.stored
        rows.expires_at += columns.expiries()
    return rows


class Received:
    """Received bytes, as messages."""

    __slots__ = ("_at", "_bytes")

    def __init__(self, received: bytes = b"") -> None:
        self._bytes = bytearray(received)
        #: Where the bytes begin that were not returned.
        self._at = 0

    def __bool__(self) -> bool:
        """Return whether bytes were not returned."""
        return self._at < len(self._bytes)

    def add(self, received: bytes | memoryview) -> None:
        """Add bytes."""
        if self._at:
            del self._bytes[: self._at]
            self._at = 0
        self._bytes += received

    def next(self) -> Message | None:
        """Return the next message if it is whole. Raises ValueError for other bytes."""
        sizes = self._sizes(self._bytes, self._at)
        if sizes is None:
            return None
        start, body, end = sizes
        word, *arguments = marshal.loads(self._bytes[start:body])  # noqa: S302 - of a process of ours
        self._at = end
        return Message(word, arguments, bytes(memoryview(self._bytes)[body:end]))

    @staticmethod
    def _sizes(received: bytearray | memoryview, at: int) -> tuple[int, int, int] | None:
        """Return where the list, the body and the next message of a whole message begin."""
        if len(received) - at < _HEAD.size:
            return None
        list_size, body_size = _HEAD.unpack_from(received, at)
        if list_size > _LARGEST_LIST or body_size > _LARGEST_BODY:
            raise ValueError("the other process sent a malformed message")
        start = at + _HEAD.size
        end = start + list_size + body_size
        return None if end > len(received) else (start, start + list_size, end)

    def take(self) -> list[Message]:
        """Return all whole messages. Raises ValueError if the bytes are not messages."""
        taken = []
        offset = self._at
        whole = memoryview(self._bytes)
        while sizes := self._sizes(whole, offset):
            start, body, offset = sizes
            word, *arguments = marshal.loads(whole[start:body])  # noqa: S302 - of a process of ours
            taken.append(Message(word, arguments, whole[body:offset]))
        self._at = 0
        if offset:
            # The messages keep this buffer; the rest moves to another.
            self._bytes = bytearray(whole[offset:])
        whole.release()
        return taken
