"""The columns of an Append: size, times and key of each message, without its frame.

They are packed once, by the broker, and lie on disk in this form: the store process
looks into them only for messages with a key or a delay, and when it removes some of
the messages. All numbers are little-endian::

    count    4 bytes
    flags    1 byte: which of the columns below have a value for each message
    sizes    4 bytes for each message
    stored   8 bytes for each message; without _STORED_EACH, 8 bytes for all of them
    expires  8 bytes for each message, infinity for none; only with _EXPIRES
    due      8 bytes for each message, infinity for none; only with _DUE
    keys     JSON, a list of [position, sender, key]; only with _KEYS
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Final, Self

from brokerd.core.mailboxes.journal import Alike, Stored

__all__ = ["Columns", "pack"]

_HEAD: Final = struct.Struct("<IB")
_TIME: Final = struct.Struct("<d")
_STORED_EACH: Final = 1
_EXPIRES: Final = 2
_DUE: Final = 4
_KEYS: Final = 8


def pack(messages: Sequence[Stored] | Alike) -> bytes:
    """Return the columns of at least one message."""
    if isinstance(messages, Alike):
        return _pack_alike(messages)
    sizes, stored, expires, due, keys = zip(*messages, strict=True)
    listed = [[position, *key] for position, key in enumerate(keys) if key is not None]
    return _pack(sizes, stored, _column(expires), _column(due), listed)


def _column(times: Sequence[float | None]) -> Sequence[float] | None:
    if times.count(None) == len(times):
        return None
    return [math.inf if at is None else at for at in times]


def _pack(
    sizes: Sequence[int],
    stored: Sequence[float],
    expires: Sequence[float] | None,
    due: Sequence[float] | None,
    keys: Sequence[object],
) -> bytes:
    count = len(sizes)
    flags = 0
    parts = [b"", struct.pack(f"<{count}I", *sizes)]
    if stored.count(stored[0]) == count:
        parts.append(_TIME.pack(stored[0]))
    else:
        flags |= _STORED_EACH
        parts.append(struct.pack(f"<{count}d", *stored))
    for flag, times in ((_EXPIRES, expires), (_DUE, due)):
        if times is not None:
            flags |= flag
            parts.append(struct.pack(f"<{count}d", *times))
    if keys:
        flags |= _KEYS
        parts.append(_pack_keys(keys))
    parts[0] = _HEAD.pack(count, flags)
    return b"".join(parts)


def _pack_alike(messages: Alike) -> bytes:
    count, own = len(messages), messages.own_expires_at
    flags = 0
    parts = [b"", messages.sizes, _TIME.pack(messages.stored_at)]
    if own or messages.expires_at is not None:
        flags |= _EXPIRES
        expires = [math.inf if messages.expires_at is None else messages.expires_at] * count
        for at, expires_at in own.items():
            expires[at] = expires_at
        parts.append(struct.pack(f"<{count}d", *expires))
    if messages.keys:
        flags |= _KEYS
        parts.append(_pack_keys([[at, *key] for at, key in messages.keys.items()]))
    parts[0] = _HEAD.pack(count, flags)
    return b"".join(parts)


def _pack_keys(listed: Sequence[object]) -> bytes:
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()


class Columns:
    """Unpacked columns.

    Attributes:
        sizes: Bytes of each frame.
        stored: When each message was stored.
        expires, due: When each message expires, and is due; infinity for never, and for
            at once. None if that is so for all of them.
        keys: The sender and the key of each message that has one, by position.
        packed: The bytes that they were unpacked from, or None.
    """

    __slots__ = ("due", "expires", "keys", "packed", "sizes", "stored")

    def __init__(
        self,
        sizes: Sequence[int],
        stored: Sequence[float],
        expires: Sequence[float] | None = None,
        due: Sequence[float] | None = None,
        keys: dict[int, tuple[str, str]] | None = None,
    ) -> None:
        self.sizes = sizes
        self.stored = stored
        self.expires = expires
        self.due = due
        self.keys = keys or {}
        self.packed: bytes | memoryview | None = None

    @classmethod
    def unpack(cls, packed: bytes | memoryview) -> Self:
        """Return the columns. Raises ValueError or struct.error for damaged ones."""
        count, flags = _HEAD.unpack_from(packed)
        offset = _HEAD.size

        def column(form: str, width: int, length: int = count) -> tuple[float, ...]:
            nonlocal offset
            values = struct.unpack_from(f"<{length}{form}", packed, offset)
            offset += width * length
            return values

        sizes: tuple[int, ...] = column("I", 4)  # type: ignore[assignment]  # the form says so
        stored = column("d", 8) if flags & _STORED_EACH else column("d", 8, 1) * count
        expires = column("d", 8) if flags & _EXPIRES else None
        due = column("d", 8) if flags & _DUE else None
        keys = {}
        if flags & _KEYS:
            listed = json.loads(bytes(packed[offset:]))
            keys = {position: (sender, key) for position, sender, key in listed}
        columns = cls(sizes, stored, expires, due, keys)
        columns.packed = packed
        return columns

    def pack(self, positions: Sequence[int] | range) -> bytes | memoryview:
        """Return the columns of the messages at these positions, packed again."""
        if self.packed is not None and len(positions) == len(self.sizes):
            return self.packed
        places = {at: place for place, at in enumerate(positions)} if self.keys else {}
        keys = [[places[at], *key] for at, key in self.keys.items() if at in places]
        sizes, stored, expires, due = self.sizes, self.stored, self.expires, self.due
        return _pack(
            [sizes[at] for at in positions],
            [stored[at] for at in positions],
            None if expires is None else [expires[at] for at in positions],
            None if due is None else [due[at] for at in positions],
            keys,
        )

    def expiries(self) -> Sequence[float | None]:
        """Return when each message expires; None for never."""
        if self.expires is None:
            return [None] * len(self.sizes)
        return [_or_none(at) for at in self.expires]

    def messages(self, positions: Sequence[int] | range) -> list[Stored]:
        """Return the messages at these positions."""
        sizes, stored, expires, due, keys = (
            self.sizes,
            self.stored,
            self.expires,
            self.due,
            self.keys,
        )
        if expires is None and due is None and not keys:
            plain = ((sizes[at], stored[at], None, None, None) for at in positions)
            return list(map(Stored._make, plain))
        return [
            Stored(
                sizes[at],
                stored[at],
                None if expires is None else _or_none(expires[at]),
                None if due is None else _or_none(due[at]),
                keys.get(at),
            )
            for at in positions
        ]


def is_plain(packed: bytes | memoryview) -> bool:
    """Return whether no message has a key or a delay."""
    return not packed[4] & (_DUE | _KEYS)


def count_of(packed: bytes | memoryview) -> int:
    """Return the number of messages."""
    count: int = _HEAD.unpack_from(packed)[0]
    return count


def _or_none(time: float) -> float | None:
    return None if time == math.inf else time
