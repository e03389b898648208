"""Runs: consecutive messages of one mailbox, which lie in one row; and its counters."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

__all__ = [
    "RUN_BYTES",
    "RUN_MESSAGES",
    "SHORT_BYTES",
    "Content",
    "Run",
    "StoredMailbox",
    "bits_of",
    "parts_without",
    "pieces_of",
    "ranges_of",
    "spread",
]

#: Most messages, and most bytes of frames, per run. A damaged run costs all of them.
RUN_MESSAGES: Final = 1024
RUN_BYTES: Final = 256 << 10
#: Most bytes of a content that lies in the row of its run: four rows fit in a page.
SHORT_BYTES: Final = 768

#: What precedes a content in the row of its run: both seals, and the bytes of the columns.
_SHORT: Final = struct.Struct("<III")


class Content(NamedTuple):
    """The columns and frames of a run, and their checksums.

    They are as they came from the disk, and may be damaged.
    """

    columns_seal: int
    frames_seal: int
    columns: bytes | memoryview
    frames: bytes | memoryview

    @classmethod
    def of(cls, columns: bytes | memoryview, frames: bytes | memoryview) -> Content:
        """Return a content with the right checksums."""
        return cls(zlib.crc32(columns), zlib.crc32(frames), columns, frames)

    @classmethod
    def from_short(cls, short: bytes) -> Content | None:
        """Return the content in the row of a run; None if its head is damaged."""
        if not isinstance(short, bytes) or len(short) < _SHORT.size:
            return None
        columns_seal, frames_seal, size = _SHORT.unpack_from(short)
        middle = _SHORT.size + size
        return cls(columns_seal, frames_seal, short[_SHORT.size : middle], short[middle:])

    def as_short(self) -> bytes:
        """Return this content as it lies in the row of its run."""
        head = _SHORT.pack(self.columns_seal, self.frames_seal, len(self.columns))
        return b"".join((head, self.columns, self.frames))

    @property
    def has_columns(self) -> bool:
        """Whether the columns match their checksum."""
        return _matches(self.columns, self.columns_seal)

    @property
    def is_whole(self) -> bool:
        """Whether columns and frames match their checksums."""
        return self.has_columns and _matches(self.frames, self.frames_seal)


def _matches(data: object, sealed: int) -> bool:
    """Return whether bytes match their checksum. Damage may have made a text of them."""
    return isinstance(data, bytes | memoryview) and zlib.crc32(data) == sealed


class StoredMailbox:
    """The counters of one mailbox."""

    __slots__ = ("counts", "id", "keys", "name", "next_seq", "runs", "sizes")

    def __init__(self, id_: int, name: str) -> None:
        self.id = id_
        self.name = name
        self.next_seq = 1
        #: Messages, and bytes of their frames, by state.
        self.counts: dict[str, int] = {"ready": 0, "delayed": 0, "dead": 0}
        self.sizes: dict[str, int] = {"ready": 0, "delayed": 0, "dead": 0}
        self.keys = 0
        #: First seqs of its runs in memory, sorted.
        self.runs: list[int] = []

    def values(self, next_seq: int, commits: int) -> tuple[object, ...]:
        """Return the row without its seal."""
        counts, sizes = self.counts, self.sizes
        return (
            self.id,
            self.name,
            next_seq,
            counts["ready"],
            sizes["ready"],
            counts["delayed"],
            sizes["delayed"],
            counts["dead"],
            sizes["dead"],
            self.keys,
            commits,
        )

    def add(self, state: str, count: int, size: int) -> None:
        """Count messages in; negative numbers count them out."""
        self.counts[state] += count
        self.sizes[state] += size


class Run:
    """Consecutive messages of one mailbox, and which of them are removed.

    Attributes:
        content: The id of its content; 0 if that lies in its row.
        short: Its content, if that lies in its row; else empty.
        size: Bytes of the frames in it.
        gone: Its removed messages, as bits; the first message is the lowest bit.
        live, live_bytes: Messages that are not removed, and bytes of their frames.
        sizes: Bytes of each frame; None until asked for.
    """

    __slots__ = (
        "content",
        "count",
        "first",
        "gone",
        "live",
        "live_bytes",
        "mailbox",
        "short",
        "size",
        "sizes",
    )

    def __init__(
        self,
        mailbox: StoredMailbox,
        first: int,
        count: int,
        content: int,
        size: int,
        gone: int,
        live: int,
        live_bytes: int,
        short: bytes,
    ) -> None:
        self.mailbox = mailbox
        self.first = first
        self.count = count
        self.content = content
        self.size = size
        self.gone = gone
        self.live = live
        self.live_bytes = live_bytes
        self.short = short
        self.sizes: Sequence[int] | None = None

    def values(self) -> tuple[object, ...]:
        """Return the row without its seal and its content."""
        return (
            self.mailbox.id,
            self.first,
            self.count,
            self.content,
            self.size,
            self.gone.to_bytes((self.gone.bit_length() + 7) // 8, "little"),
            self.live,
            self.live_bytes,
        )


def bits_of(number: int) -> Iterator[int]:
    """Yield the positions of the bits that are set."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def ranges_of(bits: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the bits that are set, as seqs from first to last."""
    bits &= (1 << (last - first + 1)) - 1
    at = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        length = (~bits & bits + 1).bit_length() - 1
        yield first + at + skipped, first + at + skipped + length - 1
        bits >>= length
        at += skipped + length


def parts_without(first: int, last: int, kept: set[int]) -> Iterator[tuple[int, int]]:
    """Yield a range without some seqs, as ranges."""
    for seq in sorted(seq for seq in kept if first <= seq <= last):
        if first < seq:
            yield first, seq - 1
        first = seq + 1
    if first <= last:
        yield first, last


def pieces_of(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the positions, from and to, of messages that make one run each."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and (at - start == RUN_MESSAGES or total + size > RUN_BYTES):
            yield start, at
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def spread(run: Run) -> list[int]:
    """Return sizes that add up to those of a run whose columns are damaged."""
    sizes = [0] * run.count
    live = [*bits_of(~run.gone & ((1 << run.count) - 1))]
    for at in live:
        sizes[at] = run.live_bytes // len(live)
    if live:
        sizes[live[-1]] += run.live_bytes % len(live)
    return sizes
