"""Encoding of messages that are sent together. No I/O.

All recipients are checked and all payloads encoded before any message is queued. For
the usual bulk, bytes for a few recipients, no line of Python runs per message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast

from brokerd_client._compat import strict_zip
from brokerd_client.codec import encode
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import check_address
from brokerd_client.wire.layout import RAW_CODEC

if TYPE_CHECKING:
    from brokerd_client.json_codec import JsonCodec

__all__ = ["Bulk", "encode_many"]

#: Recipients, codec numbers, bodies: three sequences of the same length.
Bulk = tuple[Sequence[str], Sequence[int], Sequence[bytes]]

_BYTES_ALONE: Final = {bytes}
_RAW: Final = (RAW_CODEC,)

_check_address: Final = lru_cache(4096)(check_address)


def encode_many(
    messages: Iterable[tuple[str, object]],
    codec: str | int | None,
    types: JsonCodec | None = None,
) -> Bulk:
    """Return the (to, payload) pairs as a bulk.

    codec, types: for all of them, as in codec.encode.

    Raises PayloadError or InvalidName for the first pair that is not valid.
    """
    pairs = list(messages)
    if not pairs:
        return (), (), ()
    to: tuple[str, ...]
    payloads: tuple[object, ...]
    to, payloads = strict_zip(*pairs)
    if codec is None and set(map(type, payloads)) == _BYTES_ALONE:
        try:
            for recipient in set(to):
                _check_address(recipient)
        except InvalidName:
            # The set has no order: find the first invalid recipient.
            for recipient in to:  # pragma: no branch - one of them raises
                check_address(recipient)
        return to, _RAW * len(to), cast("tuple[bytes, ...]", payloads)
    numbers: list[int] = []
    bodies: list[bytes] = []
    for recipient, payload in zip(to, payloads):
        _check_address(recipient)
        number, body = encode(payload, codec, types)
        numbers.append(number)
        bodies.append(body)
    return to, numbers, bodies
