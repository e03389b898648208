"""What has been put out on one connection: frames, and how far their bytes have gone. No I/O.

Rules of the frames: docs/protocol.md, "The header". The ordinary frame is packed here; one with an extension, or too
long for the short length, is written by wire.envelope and wire.framing. Many messages at once cost no object each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Final, TypeVar

from brokerd_client.wire.envelope import Envelope, Kind, check_address, check_topic, encode
from brokerd_client.wire.framing import frame_prefix

__all__ = ["Outgoing", "remember"]

K = TypeVar("K")
V = TypeVar("V")

#: Length and header of a frame, at once; the same without the id; the id.
_PREFIX: Final = struct.Struct("!iBBBBQ")
_START: Final = struct.Struct("!iBBBB")
_ID: Final = struct.Struct("!Q")
_HEADER_SIZE: Final = 12
#: Frames below this are built at once; the bodies of others are not copied for it.
_COPIED: Final = 1024
#: Bodies up to here have room, with any name, topic and header, in a frame with the short length.
_MAX_SHORT_BODY: Final = 2**31 - 1 - 1024
#: Names and topics remembered in their other form; all are forgotten when there are more.
_REMEMBERED: Final = 4096
#: Refusals remembered until all is seen off. Beyond that a loss tells again of what was refused.
_MOST_REFUSED: Final = 2**18

_MESSAGE_KIND: Final = int(Kind.MESSAGE)
_EVENT_KIND: Final = int(Kind.EVENT)


class Outgoing:
    """The bytes of one connection after the other, counted from each connection's first."""

    __slots__ = ("_parts", "_recipients", "_refused", "_starts", "_taken", "_topics", "_unwritten", "queued", "written")

    def __init__(self) -> None:
        #: Bytes put out on this connection so far, and how many of them the face has seen off.
        self.queued = 0
        self.written = 0
        self._taken = 0
        self._parts: list[bytes] = []
        #: Sends without a receipt that the face has not seen off yet.
        self._unwritten: list[Iterable[tuple[int, int, str]]] = []
        #: Ids of which the broker has said no before the face had seen all off: of these somebody has heard.
        self._refused: set[int] = set()
        self._recipients = _Recipients()
        self._starts = _Starts(self._recipients)
        self._topics: dict[str, bytes] = {}

    def reset(self) -> None:
        """Begin a connection."""
        self._parts.clear()
        self.queued = self._taken = self.written = 0

    def data(self) -> bytes:
        """Return what is to be written, and forget it."""
        data = b"".join(self._parts)
        self._parts.clear()
        self._taken = self.queued
        return data

    def peek(self) -> bytes:
        """Return what is to be written; ``took`` says what has become of it."""
        return b"".join(self._parts)

    def took(self, size: int) -> None:
        """Forget what :meth:`peek` has returned: ``size`` bytes of it have been written, and the face has the rest."""
        self._parts.clear()
        self._taken = self.queued
        # As in wrote(), without the call.
        self.written += size
        if self.written == self.queued and self._unwritten:
            self._unwritten.clear()
            if self._refused:
                self._refused.clear()

    def recover(self, given: int, waiting: int) -> None:
        """Count again, after a call that was interrupted.

        given: bytes of this connection that the face has, or has had. waiting: how many of these it has still to write.
        """
        if given > self._taken:
            # It was interrupted between giving them to the face and forgetting them here.
            self._parts.clear()
            self._taken = given
        self.queued = self._taken + sum(map(len, self._parts))
        self.written = self._taken - waiting
        self.wrote(0)

    def drop(self) -> None:
        """Forget what is to be written."""
        self._parts.clear()
        self._taken = self.queued

    @property
    def untaken(self) -> int:
        """Bytes that wait for :meth:`data`."""
        return self.queued - self._taken

    def in_order(self, waiting: int) -> bool:
        """Return whether every byte put out is the operating system's, or among the ``waiting`` bytes of the face.

        It is not after a call that was interrupted while it put out or wrote a frame.
        """
        return not self._parts and self._taken == self.queued == self.written + waiting

    def wrote(self, size: int) -> None:
        """So many more bytes are the operating system's now."""
        self.written += size
        if self.written == self.queued and self._unwritten:
            self._unwritten.clear()
            if self._refused:
                self._refused.clear()

    def refused(self, message_id: int) -> None:
        """The broker has said no to this one, so that it has left: a loss says nothing about it."""
        if self._unwritten and len(self._refused) < _MOST_REFUSED:
            self._refused.add(message_id)

    def without_receipt(self, message_id: int, to: str) -> None:
        """Nobody waits for what becomes of the frame that was put out last."""
        self._unwritten.append(((self.queued, message_id, to),))

    def take_unwritten(self) -> Iterator[tuple[int, int, str]]:
        """Yield, and forget, (where its frame ends, id, to) of every send nobody waits for that is not seen off yet."""
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
        """Put out a frame to a recipient. Raises InvalidName."""
        name = self._recipients[to]
        if extension is None and len(body) < _MAX_SHORT_BODY:
            size = _HEADER_SIZE + len(name) + len(body)
            start = _PREFIX.pack(size, kind, flags, codec, len(name), message_id) + name
            if size < _COPIED:
                self._parts.append(start + body)
            else:
                self._parts += (start, body)
            self.queued += 4 + size
        else:
            self._put_body(encode(Envelope(Kind(kind), message_id, to, body, codec, flags, extension=extension)))

    def put_event(
        self, flags: int, message_id: int, topic: str, codec: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> None:
        """Put out a publication. Raises InvalidName."""
        name = self._topics.get(topic)
        if name is None:
            encoded = check_topic(topic).encode()
            name = bytes((len(encoded),)) + encoded
            remember(self._topics, topic, name)
        if extension is None and len(body) < _MAX_SHORT_BODY:
            size = _HEADER_SIZE + len(name) + len(body)
            self._parts += (_PREFIX.pack(size, _EVENT_KIND, flags, codec, 0, message_id) + name, body)
            self.queued += 4 + size
        else:
            self._put_body(encode(Envelope(Kind.EVENT, message_id, "", body, codec, flags, topic, extension)))

    def put_messages(
        self, ids: Sequence[int], to: Sequence[str], codecs: Sequence[int], bodies: Sequence[bytes]
    ) -> None:
        """Put out a MESSAGE each, in order; nobody waits for what becomes of them.

        Raises InvalidName before anything is put out.
        """
        names = list(map(self._recipients.__getitem__, to))
        sizes = list(map(len, bodies))
        if sizes and max(sizes) >= _MAX_SHORT_BODY:
            for message_id, each, codec, body in zip(ids, to, codecs, bodies, strict=True):
                self.put(_MESSAGE_KIND, 0, message_id, each, codec, body, None)
                self.without_receipt(message_id, each)
            return
        # No step of this is a line of Python per message.
        starts = map(self._starts.__getitem__, zip(to, codecs, sizes, strict=True))
        data = b"".join(chain.from_iterable(zip(starts, map(_ID.pack, ids), names, bodies, strict=True)))
        self._unwritten.append(_Bulk(self.queued, ids, to, names, sizes))
        self._parts.append(data)
        self.queued += len(data)

    def put_frame(self, data: bytes) -> None:
        """Put out bytes that are a frame already."""
        self._parts.append(data)
        self.queued += len(data)

    def _put_body(self, body: bytes) -> None:
        prefix = frame_prefix(len(body))
        self._parts += (prefix, body)
        self.queued += len(prefix) + len(body)


class _Bulk:
    """Messages that were put out together: (where its frame ends, id, to) of each, when somebody asks."""

    __slots__ = ("_begin", "_ids", "_names", "_sizes", "_to")

    def __init__(
        self, begin: int, ids: Sequence[int], to: Sequence[str], names: Sequence[bytes], sizes: Sequence[int]
    ) -> None:
        self._begin = begin
        self._ids = ids
        self._to = to
        self._names = names
        self._sizes = sizes

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        lengths = (_PREFIX.size + len(name) + size for name, size in zip(self._names, self._sizes, strict=True))
        ends = accumulate(lengths, initial=self._begin)
        next(ends)
        return zip(ends, self._ids, self._to, strict=True)


class _Recipients(dict[str, bytes]):
    """Recipients, checked, as they are on the wire. Raises InvalidName for what is none."""

    def __missing__(self, to: str) -> bytes:
        name = check_address(to).encode()
        remember(self, to, name)
        return name


class _Starts(dict[tuple[str, int, int], bytes]):
    """What is before the id in a MESSAGE's frame, by recipient, codec and the body's size."""

    def __init__(self, recipients: Mapping[str, bytes]) -> None:
        super().__init__()
        self._recipients = recipients

    def __missing__(self, key: tuple[str, int, int]) -> bytes:
        to, codec, size = key
        name_size = len(self._recipients[to])
        start = _START.pack(_HEADER_SIZE + name_size + size, _MESSAGE_KIND, 0, codec, name_size)
        remember(self, key, start)
        return start


def remember(table: dict[K, V], key: K, value: V) -> None:
    """Put it into the table, which never has more than some thousand entries."""
    if len(table) >= _REMEMBERED:
        table.clear()
    table[key] = value
