"""Many messages that are sent together: recipients checked, payloads encoded, before any of them is put out. No I/O.

The usual lot, bytes for a few recipients, costs no line of Python per message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias, cast

from brokerd_client.codec import encode
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import CodecId, check_address

__all__ = ["Bulk", "encode_many"]

#: Recipients, numbers of codecs, bodies; all of the same length.
Bulk: TypeAlias = tuple[Sequence[str], Sequence[int], Sequence[bytes]]

_BYTES_ALONE: Final = {bytes}
_RAW: Final = (int(CodecId.RAW),)

_known_address: Final = lru_cache(4096)(check_address)


def encode_many(messages: Iterable[tuple[str, object]], codec: str | int | None) -> Bulk:
    """Return the (to, payload) pairs as a lot. codec: as codec.encode takes it, for all of them.

    Raises PayloadError or InvalidName for the first that is none.
    """
    pairs = list(messages)
    if not pairs:
        return (), (), ()
    to: tuple[str, ...]
    payloads: tuple[object, ...]
    to, payloads = zip(*pairs, strict=True)
    if codec is None and set(map(type, payloads)) == _BYTES_ALONE:
        try:
            for each in set(to):
                _known_address(each)
        except InvalidName:
            # Which is the first, the set has forgotten.
            for each in to:  # pragma: no branch - one of them raises
                check_address(each)
        return to, _RAW * len(to), cast("tuple[bytes, ...]", payloads)
    numbers: list[int] = []
    bodies: list[bytes] = []
    for each, payload in zip(to, payloads, strict=True):
        _known_address(each)
        number, body = encode(payload, codec)
        numbers.append(number)
        bodies.append(body)
    return to, numbers, bodies
