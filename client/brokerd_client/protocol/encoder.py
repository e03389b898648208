"""Encoding of frames for one connection, and the count of their written bytes. No I/O.

Rules of the frames: docs/protocol.md, "The header". The frames are packed here, without
an envelope for each: a send takes half of the time. A bulk of messages needs no object
for each message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, repeat
from typing import Any, Final, TypeVar

from brokerd_client.wire.envelope import LoneTtl, check_address, check_topic, extension_part
from brokerd_client.wire.framing import frame_prefix
from brokerd_client.wire.layout import (
    ACK_KIND,
    EVENT_KIND,
    EXTENSION_FLAG,
    FRAME_HEAD,
    FRAME_START,
    HEADER,
    ID,
    JSON_CODEC,
    MAX_HEAD_SIZE,
    MESSAGE_KIND,
    RAW_CODEC,
    RECEIPT_FLAG,
)

__all__ = ["FrameEncoder", "remember"]

K = TypeVar("K")
V = TypeVar("V")

_HEADER_SIZE: Final = HEADER.size
#: Bound here, because the lookup of the method takes a tenth of a send.
_pack_head: Final = FRAME_HEAD.pack
#: Bytes. Shorter frames are joined into one piece; the bodies of longer frames are not
#: copied.
_COPIED: Final = 1024
#: Bytes of a body up to which messages that are alike are written column by column.
_MAX_COLUMNS: Final = 32
#: Bytes. A frame with a shorter body fits the short length, with any header, name,
#: topic and extension.
_MAX_SHORT_BODY: Final = 2**31 - 1 - MAX_HEAD_SIZE
#: Most entries per table of encoded names and topics; a full table is cleared.
_REMEMBERED: Final = 4096
#: Most refusals remembered until all queued bytes are written. Beyond that limit, a
#: lost connection reports refused sends a second time.
_MAX_REFUSED: Final = 2**18


class FrameEncoder:
    """The encoder for a client's successive connections; each counts its bytes from 0."""

    __slots__ = (
        "_parts",
        "_recipients",
        "_refused",
        "_starts",
        "_topics",
        "_unwritten",
        "queued",
        "taken",
        "written",
    )

    def __init__(self) -> None:
        #: Bytes queued on this connection so far, and how many of them the face has
        #: written.
        self.queued = 0
        self.written = 0
        #: How many of the queued bytes the face has got.
        self.taken = 0
        self._parts: list[bytes] = []
        #: Sends without a receipt that the face has not written yet.
        self._unwritten: list[Iterable[tuple[int, int, str]]] = []
        #: Ids of sends that the broker refused before the face had written everything.
        #: Their failure is reported already.
        self._refused: set[int] = set()
        self._recipients = _Recipients()
        self._starts = _Starts(self._recipients)
        self._topics: dict[str, bytes] = {}

    def reset(self) -> None:
        """Forget the queued bytes and their counts, for a new connection."""
        self._parts.clear()
        self.queued = self.taken = self.written = 0

    def data(self) -> bytes:
        """Return the bytes to be written, and forget them."""
        data = b"".join(self._parts)
        self._parts.clear()
        self.taken = self.queued
        return data

    def peek(self) -> bytes:
        """Return the bytes to be written; the face then reports them to :meth:`took`."""
        return b"".join(self._parts)

    def took(self, size: int) -> None:
        """Forget the bytes that :meth:`peek` returned.

        ``size`` of them have been written; the face has the rest.
        """
        self._parts.clear()
        self.taken = self.queued
        # As in wrote(), without the call.
        self.written += size
        if self.written == self.queued and self._unwritten:
            self._unwritten.clear()
            if self._refused:
                self._refused.clear()

    def recover(self, face_bytes: int, waiting_bytes: int) -> None:
        """Recount the bytes after an interrupted call.

        face_bytes: bytes of this connection that the face got so far. waiting_bytes:
        how many of these it has still to write.
        """
        if face_bytes > self.taken:
            # The call was interrupted after the face got the bytes, before took().
            self._parts.clear()
            self.taken = face_bytes
        self.queued = self.taken + sum(map(len, self._parts))
        self.written = self.taken - waiting_bytes
        self.wrote(0)

    def drop(self) -> None:
        """Forget the bytes to be written."""
        self._parts.clear()
        self.taken = self.queued

    @property
    def untaken(self) -> int:
        """Bytes that wait for :meth:`data`."""
        return self.queued - self.taken

    def in_order(self, waiting_bytes: int) -> bool:
        """Return whether the counts of queued and written bytes agree.

        Each queued byte must be written, or be one of the ``waiting_bytes`` of the
        face. The counts differ after a call that was interrupted while it queued or
        wrote a frame.
        """
        return not self._parts and self.taken == self.queued == self.written + waiting_bytes

    def wrote(self, size: int) -> None:
        """Record that ``size`` more bytes were handed to the operating system."""
        self.written += size
        if self.written == self.queued and self._unwritten:
            self._unwritten.clear()
            if self._refused:
                self._refused.clear()

    def refused(self, message_id: int) -> None:
        """Record that the broker refused this send.

        It has therefore left, and a lost connection does not report it again.
        """
        if self._unwritten and len(self._refused) < _MAX_REFUSED:
            self._refused.add(message_id)

    def without_receipt(self, message_id: int, to: str) -> None:
        """Record that the frame queued last was sent without a receipt."""
        self._unwritten.append(((self.queued, message_id, to),))

    def take_unwritten(self) -> Iterator[tuple[int, int, str]]:
        """Yield, and forget, the sends without a receipt that are not written yet.

        Each is (where its frame ends, id, to).
        """
        unwritten, self._unwritten = self._unwritten, []
        refused, self._refused = self._refused, set()
        for end, message_id, to in chain.from_iterable(unwritten):
            if end > self.written and message_id not in refused:
                yield end, message_id, to

    def put(
        self,
        kind: int,
        flags: int,
        message_id: int,
        to: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> None:
        """Queue a frame to a recipient. Raises InvalidName, PayloadError."""
        fields = name = self._recipients[to]
        if extension is not None:
            flags |= EXTENSION_FLAG
            # Of extension_part, without the call.
            fields += extension.part if type(extension) is LoneTtl else extension_part(extension)
        size = _HEADER_SIZE + len(fields) + len(body)
        if size < _COPIED:
            self._parts.append(
                _pack_head(size, kind, flags, codec, len(name), message_id) + fields + body
            )
            self.queued += 4 + size
        else:
            self._put_large(size, (kind, flags, codec, len(name), message_id), fields, body)

    def put_ack(self, seq: int, body: bytes) -> None:
        """Queue the ACK of a delivery; without a body the message is done."""
        size = _HEADER_SIZE + len(body)
        codec = JSON_CODEC if body else RAW_CODEC
        self._parts.append(_pack_head(size, ACK_KIND, 0, codec, 0, seq) + body)
        self.queued += 4 + size

    def check(self, to: str, extension: Mapping[str, Any]) -> None:
        """Raise InvalidName or PayloadError if :meth:`put` would."""
        self._recipients[to]
        extension_part(extension)

    def put_event(
        self,
        flags: int,
        message_id: int,
        topic: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> None:
        """Queue a publication. Raises InvalidName, PayloadError."""
        fields = self._topics.get(topic)
        if fields is None:
            encoded = check_topic(topic).encode()
            fields = bytes((len(encoded),)) + encoded
            remember(self._topics, topic, fields)
        if extension is not None:
            flags |= EXTENSION_FLAG
            fields += extension_part(extension)
        size = _HEADER_SIZE + len(fields) + len(body)
        if size < _COPIED:
            self._parts.append(
                _pack_head(size, EVENT_KIND, flags, codec, 0, message_id) + fields + body
            )
            self.queued += 4 + size
        else:
            self._put_large(size, (EVENT_KIND, flags, codec, 0, message_id), fields, body)

    def _put_large(
        self, size: int, header: tuple[int, int, int, int, int], fields: bytes, body: bytes
    ) -> None:
        """Queue a frame of ``size`` bytes whose body is not copied."""
        start = frame_prefix(size) + HEADER.pack(*header) + fields
        self._parts += (start, body)
        self.queued += len(start) + len(body)

    def put_messages(
        self,
        flags: int,
        ids: Sequence[int],
        to: Sequence[str],
        codecs: Sequence[int],
        bodies: Sequence[bytes],
        extension: Mapping[str, Any] | None,
    ) -> Iterable[tuple[int, int, str]]:
        """Queue several MESSAGE frames in order, each with the flags and the extension.

        Return (where its frame ends, id, to) of each. Raises InvalidName before any frame
        is queued.
        """
        names: Sequence[bytes] = list(map(self._recipients.__getitem__, to))
        sizes = list(map(len, bodies))
        queued: Iterable[tuple[int, int, str]]
        if extension is not None or (sizes and max(sizes) >= _MAX_SHORT_BODY):
            queued = []
            for message_id, recipient, codec, body in zip(ids, to, codecs, bodies):
                self.put(MESSAGE_KIND, flags, message_id, recipient, codec, body, extension)
                queued.append((self.queued, message_id, recipient))
        else:
            # No step below runs a line of Python per message.
            if sizes and sizes[0] <= _MAX_COLUMNS and _are_alike(to, codecs, sizes):
                start = self._starts[flags, to[0], codecs[0], sizes[0]]
                data = _alike_frames(start, ids, names[0], bodies)
            else:
                starts = map(self._starts.__getitem__, zip(repeat(flags), to, codecs, sizes))
                data = b"".join(chain.from_iterable(zip(starts, map(ID.pack, ids), names, bodies)))
            queued = _Bulk(self.queued, ids, to, names, sizes)
            self._parts.append(data)
            self.queued += len(data)
        if not flags & RECEIPT_FLAG:
            self._unwritten.append(queued)
        return queued

    def put_frame(self, data: bytes) -> None:
        """Queue bytes that are already a frame."""
        self._parts.append(data)
        self.queued += len(data)


class _Bulk:
    """Messages that were queued together.

    The iterator computes (where its frame ends, id, to) of each.
    """

    __slots__ = ("_ids", "_names", "_sizes", "_start_position", "_to")

    def __init__(
        self,
        start_position: int,
        ids: Sequence[int],
        to: Sequence[str],
        names: Sequence[bytes],
        sizes: Sequence[int],
    ) -> None:
        self._start_position = start_position
        self._ids = ids
        self._to = to
        self._names = names
        self._sizes = sizes

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        lengths = (
            FRAME_HEAD.size + len(name) + size for name, size in zip(self._names, self._sizes)
        )
        ends = accumulate(lengths, initial=self._start_position)
        next(ends)
        return zip(ends, self._ids, self._to)


class _Recipients(dict[str, bytes]):
    """Checked recipients as bytes on the wire.

    Raises InvalidName for an invalid one.
    """

    def __missing__(self, to: str) -> bytes:
        name = check_address(to).encode()
        remember(self, to, name)
        return name


class _Starts(dict[tuple[int, str, int, int], bytes]):
    """The bytes before the id in a MESSAGE's frame, by flags, recipient, codec and body
    size.
    """

    def __init__(self, recipients: Mapping[str, bytes]) -> None:
        super().__init__()
        self._recipients = recipients

    def __missing__(self, key: tuple[int, str, int, int]) -> bytes:
        flags, to, codec, size = key
        name_size = len(self._recipients[to])
        frame_size = _HEADER_SIZE + name_size + size
        start = FRAME_START.pack(frame_size, MESSAGE_KIND, flags, codec, name_size)
        remember(self, key, start)
        return start


def _are_alike(*columns: Sequence[object]) -> bool:
    """Return whether each of the sequences has the same value everywhere."""
    return all(column.count(column[0]) == len(column) for column in columns)


def _alike_frames(start: bytes, ids: Sequence[int], name: bytes, bodies: Sequence[bytes]) -> bytes:
    """Return the frames of messages that differ in ids and bodies of one size alone.

    Each byte of a frame is copied for all frames at once, which takes half of the time.
    """
    size = len(bodies[0])
    step = len(start) + ID.size + len(name) + size
    frames = bytearray((start + bytes(ID.size) + name + bytes(size)) * len(ids))
    _fill_columns(frames, len(start), step, ID.size, struct.pack(f"!{len(ids)}Q", *ids))
    _fill_columns(frames, step - size, step, size, b"".join(bodies))
    return bytes(frames)


def _fill_columns(frames: bytearray, first: int, step: int, size: int, values: bytes) -> None:
    """Put values of ``size`` bytes at ``first`` in every ``step`` bytes of the frames."""
    for offset in range(size):
        frames[first + offset :: step] = values[offset::size]


def remember(table: dict[K, V], key: K, value: V) -> None:
    """Put an entry into the table, which is cleared when it has _REMEMBERED entries."""
    if len(table) >= _REMEMBERED:
        table.clear()
    table[key] = value
