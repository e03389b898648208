"""Frames on their way between two hosts.

They have the form in which a client receives them, with the sender's identity as their
name. The broker reads the form in which a client sends them, with the recipient as their
name. Only the name differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from brokerd_client.wire.framing import frame_prefix, frame_span
from brokerd_client.wire.layout import HEADER, RECEIPT_FLAG

__all__ = ["as_received", "as_sent", "walk"]

_LENGTH: Final = 4


def walk(frames: bytes | bytearray | memoryview) -> Iterator[tuple[int, int, int, int, bytes, int]]:
    """Yield (start, end, kind, flags, name, id) of each frame; start: of its body.

    Raises:
        ValueError: The bytes are not whole frames.
    """
    position, end = 0, len(frames)
    while position < end:
        span = frame_span(frames, position, end)
        if span is None:
            raise ValueError("the last frame is not whole")
        start, size = span
        if size < HEADER.size or start + size > end:
            raise ValueError("a frame is not whole")
        kind, flags, _, name_size, message_id = HEADER.unpack_from(frames, start)
        name_end = start + HEADER.size + name_size
        if name_end > start + size:
            raise ValueError("a frame is shorter than its name")
        yield (
            start,
            start + size,
            kind,
            flags,
            bytes(frames[start + HEADER.size : name_end]),
            message_id,
        )
        position = start + size


def as_sent(
    frames: bytes | bytearray | memoryview, start: int, end: int, recipient: bytes
) -> bytes:
    """Return one frame in the form in which its sender has sent it."""
    kind, flags, codec, name_size, message_id = HEADER.unpack_from(frames, start)
    rest = frames[start + HEADER.size + name_size : end]
    size = HEADER.size + len(recipient) + len(rest)
    header = HEADER.pack(kind, flags, codec, len(recipient), message_id)
    return b"".join((frame_prefix(size), header, recipient, rest))


def as_received(frame: bytes | bytearray | memoryview, sender: bytes) -> bytes:
    """Return a frame for another host in the form in which a client here receives it.

    sender: its sender's address. The flag RECEIPT has been answered.
    """
    kind, flags, codec, name_size, message_id = HEADER.unpack_from(frame, _LENGTH)
    rest = frame[_LENGTH + HEADER.size + name_size :]
    size = HEADER.size + len(sender) + len(rest)
    header = HEADER.pack(kind, flags & ~RECEIPT_FLAG, codec, len(sender), message_id)
    return b"".join((frame_prefix(size), header, sender, rest))
