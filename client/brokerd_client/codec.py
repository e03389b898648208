"""Encoding and decoding of payloads: raw, JSON, MessagePack (if installed), pickle (on
request).

The number of a codec is in the header (docs/protocol.md, "The header"). The broker
never decodes a payload. A payload's type selects raw or JSON; any other codec has to be
given by name. Reading a pickle runs code from its sender, so :func:`decode` refuses
pickles unless the caller allows them. ``pickle`` and ``msgpack`` are imported only when
needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from brokerd_client.errors import PayloadError, UndecodablePayload
from brokerd_client.wire.layout import JSON_CODEC, RAW_CODEC, CodecId

if TYPE_CHECKING:
    from brokerd_client.json_codec import JsonCodec

__all__ = ["FIRST_USER_CODEC", "Encoded", "decode", "encode"]

#: Codecs 128 to 255 are for users: their payloads are bytes on both sides.
FIRST_USER_CODEC: Final = 128
_LAST_CODEC: Final = 255

_BY_NAME: Final = {
    "raw": CodecId.RAW,
    "pickle": CodecId.PICKLE,
    "json": CodecId.JSON,
    "msgpack": CodecId.MSGPACK,
}
_JSON_TYPES: Final = (str, dict, list, int, float, bool, type(None))
_TEXT: Final = frozenset({str})
#: Types of values that JSON carries unchanged and that hold no other values.
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_to_json: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False
).encode


class Encoded:
    """A payload that is encoded already: ``encode`` returns its parts.

    Args:
        codec: The codec's number.
        body: The bytes to send.
    """

    __slots__ = ("body", "codec")

    def __init__(self, codec: int, body: bytes) -> None:
        self.codec = codec
        self.body = body


def encode(
    payload: object, codec: str | int | None = None, types: JsonCodec | None = None
) -> tuple[int, bytes]:
    """Encode a payload.

    Args:
        payload: The object to encode.
        codec: One of "raw", "json", "msgpack", "pickle", or a number; 128 to 255 take
            bytes unchanged. With None, the payload's type selects raw (bytes-like) or
            JSON (str, dict, list, int, float, bool, None). JSON is then refused where it
            would change the payload: keys that are not text, and tuples.
        types: The client's own JSON, used where ``codec`` is None.

    Returns:
        The codec's number, and the bytes to send.

    Raises:
        PayloadError: The payload does not fit the codec; the message names a codec that
            does.
    """
    if codec is None:
        if type(payload) is bytes:
            return RAW_CODEC, payload
        if isinstance(payload, (bytes, bytearray, memoryview)):
            return RAW_CODEC, bytes(payload)
        if types is not None and not isinstance(payload, Encoded):
            return JSON_CODEC, types.encode(payload)
        if isinstance(payload, _JSON_TYPES):
            body = _json(payload)
            if isinstance(payload, (dict, list)) and (change := _change(payload)):
                raise PayloadError(
                    f"JSON would change the payload: {change}; give codec='json' to allow that"
                    " (codec='msgpack' and codec='pickle' change less)"
                )
            return JSON_CODEC, body
        if isinstance(payload, Encoded):
            return payload.codec, payload.body
        if isinstance(payload, tuple):
            raise PayloadError(
                "JSON would change the payload: a tuple would become a list; give a list, or"
                " codec='json' to allow that"
            )
        raise PayloadError(
            f"a value of type {type(payload).__name__} is neither bytes nor JSON: convert it,"
            " or give codec='pickle' (the recipient has to allow that)"
        )
    number = _number(codec)
    if number == CodecId.JSON:
        return number, _json(payload)
    if number == CodecId.PICKLE:
        return number, _pickle(payload)
    if number == CodecId.MSGPACK:
        return number, _msgpack(payload)
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise PayloadError(f"codec {codec!r} takes bytes, not {type(payload).__name__}")
    return number, bytes(payload)


def decode(
    codec: int, body: bytes, *, allow_pickle: bool = False, types: JsonCodec | None = None
) -> Any:
    """Decode the body of a message.

    Args:
        codec: The number of the codec.
        body: The bytes of the payload.
        allow_pickle: Whether a pickle may be decoded, which runs its sender's code.
        types: The client's own JSON, if it has one.

    Returns:
        The payload. For raw and users' codecs, it is ``body`` itself.

    Raises:
        UndecodablePayload: The body does not fit the codec, or the codec is not
        available here.
    """
    if codec == CodecId.RAW or codec >= FIRST_USER_CODEC:
        return body
    if codec == CodecId.JSON and types is not None:
        return types.decode(body)
    if codec == CodecId.JSON:
        try:
            return json.loads(body)
        # RecursionError: json raises it for deep nesting.
        except (ValueError, RecursionError) as error:
            raise UndecodablePayload(
                "the payload is not valid JSON, although its codec is JSON"
            ) from error
    if codec == CodecId.PICKLE:
        return _unpickle(body, allow_pickle=allow_pickle)
    if codec == CodecId.MSGPACK:
        return _unmsgpack(body)
    raise UndecodablePayload(
        f"codec {codec} is reserved, so it can't be decoded; .body holds the bytes"
    )


def _number(codec: str | int) -> int:
    if isinstance(codec, str):
        number = _BY_NAME.get(codec)
        if number is None:
            raise PayloadError(
                f"codec {codec!r} is not known: give raw, json, msgpack, pickle or 128 to 255"
            )
        return int(number)
    if codec in _BY_NAME.values() or FIRST_USER_CODEC <= codec <= _LAST_CODEC:
        return int(codec)
    raise PayloadError(
        f"codec {codec} is reserved: give 0 to 3, or 128 to 255 for a codec of your own"
    )


def _json(payload: object) -> bytes:
    try:
        return _to_json(payload).encode()
    # UnicodeEncodeError, a ValueError: a lone surrogate has no UTF-8.
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(
            f"the payload can't be written as JSON ({error}); codec='pickle' could"
        ) from error


def _change(payload: object) -> str:
    """Return what the recipient of a payload's JSON would get changed, or ""."""
    values = [payload]
    while values:
        value = values.pop()
        items: Iterable[object]
        if isinstance(value, dict):
            if not _TEXT.issuperset(map(type, value)):
                for key in value:
                    if not isinstance(key, str):
                        return f"the key {key!r:.40} would become text"
            items = value.values()
        elif isinstance(value, list):
            items = value
        elif isinstance(value, tuple):
            return "a tuple would become a list"
        else:
            continue
        # The usual items are found by one call of C code, not by a loop.
        if not _SCALARS.issuperset(map(type, items)):
            values += [item for item in items if type(item) not in _SCALARS]
    return ""


def _pickle(payload: object) -> bytes:
    import pickle

    try:
        return pickle.dumps(payload, protocol=4)
    except Exception as error:
        # An object's own __reduce__ may raise anything.
        raise PayloadError(f"the payload can't be pickled: {error}") from error


def _unpickle(body: bytes, *, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise UndecodablePayload(
            "the payload is pickled, and reading a pickle runs its sender's code: "
            "name the sender in allow_pickle_from if you trust it that far"
        )
    import pickle

    try:
        return pickle.loads(body)  # noqa: S301 - the caller has named this sender as trusted
    except Exception as error:
        # The code that a pickle runs may raise anything.
        raise UndecodablePayload(
            f"the payload can't be unpickled: {type(error).__name__}"
        ) from error


def _msgpack(payload: object) -> bytes:
    try:
        packed: bytes = _msgpack_module().packb(payload)
    except ImportError as error:
        raise PayloadError(
            "codec='msgpack' needs the msgpack package, which is not installed"
        ) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(f"the payload can't be written as MessagePack: {error}") from error
    return packed


def _unmsgpack(body: bytes) -> Any:
    try:
        return _msgpack_module().unpackb(body)
    except ImportError as error:
        raise UndecodablePayload(
            "the payload is MessagePack, which needs the msgpack package; .body holds the bytes"
        ) from error
    except Exception as error:
        # The package raises errors of its own, which differ between its versions.
        raise UndecodablePayload(
            "the payload is not valid MessagePack, although that is its codec"
        ) from error


def _msgpack_module() -> Any:
    import importlib

    return importlib.import_module("msgpack")
