"""Bundles: short messages of one turn for one host, in one NATS message.

A host's answer to a request leaves with the outcome of the request. What a NATS message
costs hardly depends on its size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from brokerd.core.cluster.hub import Outgoing
from brokerd.core.cluster.messages import HEADER_SIZE, Malformed

__all__ = ["BUNDLE", "bundled", "unbundled"]

#: The kind of a bundle.
BUNDLE: Final = "bundle"
#: The kinds that may be parts, and their numbers.
_KINDS: Final = {"data": 0, "outcomes": 1}
_NAMES: Final = tuple(_KINDS)
#: Most bytes of a bundle; to copy more costs more than it saves.
_LONGEST: Final = 8192
_PART: Final = struct.Struct("!BI")


def bundled(messages: Iterable[Outgoing], max_payload: int) -> list[Outgoing]:
    """Return messages in the same order, with short ones that follow each other in bundles.

    Args:
        messages: At least one.
        max_payload: Most bytes of one message.
    """
    longest = min(_LONGEST, max_payload)
    found: list[Outgoing] = []
    parts: list[Outgoing] = []
    size = 0
    for message in messages:
        size += _PART.size + len(message.payload)
        if parts and not (size <= longest and _is_alike(parts[0], message)):
            found.append(_joined(parts))
            parts, size = [], _PART.size + len(message.payload)
        parts.append(message)
    found.append(_joined(parts))
    return found


def _is_alike(first: Outgoing, other: Outgoing) -> bool:
    """Return whether two messages can be parts of one bundle for a broker."""
    return (
        first.to == other.to
        and first.kind in _KINDS
        and other.kind in _KINDS
        and first.payload[:HEADER_SIZE] == other.payload[:HEADER_SIZE]
    )


def _joined(parts: list[Outgoing]) -> Outgoing:
    """Return a bundle, or the only part."""
    first = parts[0]
    if len(parts) == 1:
        return first
    pieces: list[bytes | memoryview] = [first.payload[:HEADER_SIZE]]
    for _, kind, payload in parts:
        size = len(payload) - HEADER_SIZE
        pieces += (_PART.pack(_KINDS[kind], size), memoryview(payload)[HEADER_SIZE:])
    return Outgoing(first.to, BUNDLE, b"".join(pieces))


def unbundled(body: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Yield the kind and the body of each part. Raises Malformed."""
    start = 0
    while start < len(body):
        if len(body) < start + _PART.size:
            raise Malformed("a bundle ends inside a part")
        number, size = _PART.unpack_from(body, start)
        start += _PART.size
        end = start + size
        if number >= len(_NAMES) or end > len(body):
            raise Malformed("a bundle has an unknown part, or ends inside one")
        yield _NAMES[number], body[start:end]
        start = end
