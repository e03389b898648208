"""The contents of a broker frame: header, error codes, names, topics, extension.

Source of every rule: docs/protocol.md, "The header". The layout is that of wire.layout,
whose names are available here too. The daemon's routing loop reads the same layout from
its own buffer. It leaves frames that are not ordinary to this module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, count
from operator import sub
from typing import TYPE_CHECKING, Any, Final, NoReturn

from brokerd_client._compat import StrEnum, slotted
from brokerd_client.errors import ExtensionTooDeep, InvalidName, MalformedEnvelope, PayloadError
from brokerd_client.wire.layout import (
    ACK_FLAG,
    EXTENSION_FLAG,
    EXTENSION_LENGTH,
    HEADER,
    MAX_EXTENSION,
    MAX_ID,
    MAX_NAME_SIZE,
    MAX_TOPIC,
    SEQ,
    CodecId,
    Flag,
    Kind,
)

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

__all__ = [
    "BROKER",
    "HEADER",
    "MAX_DELAY",
    "MAX_DEPTH",
    "MAX_EXTENSION",
    "MAX_KEY_SIZE",
    "MAX_STORED_TTL",
    "MAX_TOPIC",
    "MAX_TTL",
    "MAX_WINDOW",
    "CodecId",
    "Envelope",
    "ErrorCode",
    "Flag",
    "Kind",
    "LoneTtl",
    "check_address",
    "check_name",
    "check_pattern",
    "check_topic",
    "encode",
    "error_payload",
    "extension_part",
    "head",
    "is_address",
    "is_delay",
    "is_key",
    "is_name",
    "is_stored_ttl",
    "is_ttl",
    "lone_key",
    "lone_ttl",
    "parse",
    "split",
    "split_address",
    "ttl_extension",
]

#: The name of the broker itself.
BROKER: Final = "$broker"
#: Most levels of objects and arrays in an extension; its own object is the first. The
#: limit does not depend on an interpreter's recursion limit: a frame that passes here
#: is readable everywhere.
MAX_DEPTH: Final = 32
#: Longest ``ttl``, in seconds: 68 years.
MAX_TTL: Final = 2**31 - 1
#: Longest ``ttl`` of a message in a mailbox, in seconds: 3,650 days.
MAX_STORED_TTL: Final = 3650 * 86_400
#: Longest ``delay``, in seconds: 30 days.
MAX_DELAY: Final = 30 * 86_400
#: Most messages of a mailbox that one connection may hold.
MAX_WINDOW: Final = 10_000
#: Longest ``key``, in bytes of UTF-8.
MAX_KEY_SIZE: Final = 64

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_ADDRESS: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(/[0-9a-z]{1,16})?")
_SERVICE: Final = re.compile(r"\$[A-Za-z0-9_.-]{1,63}")
#: Digits of the largest 64-bit float; an integer with fewer digits always fits.
_FLOAT_DIGITS: Final = 309
#: A number with fewer digits than this, and fewer than three in its exponent, always
#: fits.
_FEW_DIGITS: Final = 200
_LONG_EXPONENT: Final = re.compile(rb"[eE]\+?[0-9]{3}")
#: A JSON string, also without its closing quote.
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
#: An opening bracket becomes 2, a closing bracket 0. Less 1 each, the sum is the number
#: of open levels.
_LEVELS: Final = bytes.maketrans(b"[{]}", b"\2\2\0\0")
#: The JSON of an extension with a ``ttl`` alone: its integer and its fraction.
_LONE_TTL: Final = re.compile(rb'\{"ttl":((?:0|[1-9][0-9]{0,9})(\.[0-9]{1,20})?)\}')
#: The JSON of an extension with a ``key`` alone, in ASCII that needs no escape.
_LONE_KEY: Final = re.compile(rb'\{"key":"([ !#-\[\]-~]{1,64})"\}')
_NO_DIGITS: Final = bytes(byte if byte in b"0123456789" else 32 for byte in range(256))


class ErrorCode(StrEnum):
    """The codes of an ERROR; each has its exception in :mod:`brokerd_client.errors`."""

    NO_SUCH_CLIENT = "no_such_client"
    OFFLINE = "offline"
    ABANDONED = "abandoned"
    DENIED = "denied"
    FULL = "full"
    TOO_LARGE = "too_large"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    RATE_LIMITED = "rate_limited"
    MALFORMED = "malformed"
    UNSUPPORTED = "unsupported"
    SHUTTING_DOWN = "shutting_down"
    IN_DOUBT = "in_doubt"
    STORE_FAILED = "store_failed"
    ELSEWHERE = "elsewhere"
    # These come with the id 0, as the last frame before the broker closes the
    # connection. shutting_down can come so, too.
    NAME_TAKEN = "name_taken"
    REPLACED = "replaced"
    KEY_REMOVED = "key_removed"
    DISCONNECTED = "disconnected"


_KNOWN_FLAGS: Final = int(Flag.RECEIPT | Flag.EXTENSION | Flag.ACK)
_KINDS: Final = {int(kind): kind for kind in Kind}
#: The kinds of a delivery from a mailbox, which the flag ACK marks.
_DELIVERIES: Final = (Kind.MESSAGE, Kind.EVENT)
#: Largest number of an attempt: it has 16 bits.
_MAX_ATTEMPT: Final = 2**16 - 1


# Not frozen, which would make it take five times as long to create: every frame has one.
@slotted
@dataclass(unsafe_hash=True)
class Envelope:
    """A parsed broker frame, which does not change.

    Attributes:
        name: The recipient on the way to the broker, the authenticated sender on the
            way from it.
        topic: The topic of an EVENT, "" for other kinds.
        extension: The JSON object, or None.
        payload: The bytes as sent; this module never decodes them.
        seq: The number of a delivery in its mailbox: a MESSAGE or EVENT with the flag
            ACK, from the broker. Else 0.
        attempt: Which attempt to process it this is, from 1. Else 0.
    """

    kind: Kind
    id: int = 0
    name: str = ""
    payload: bytes = field(default=b"", repr=False)
    codec: int = 0
    flags: int = 0
    topic: str = ""
    extension: Mapping[str, Any] | None = None
    seq: int = 0
    attempt: int = 0

    def __len__(self) -> int:
        return len(self.payload)


def encode(envelope: Envelope) -> bytes:
    """Return the frame's body, ready for :func:`brokerd_client.wire.framing.frame`.

    The EXTENSION bit is set if the envelope has an extension. The seq and attempt are
    written only with the flag ACK on a MESSAGE or EVENT. Raises InvalidName or
    PayloadError for values that do not fit the header or the wire format.
    """
    name = _utf8(envelope.name, "name")
    if len(name) > MAX_NAME_SIZE:
        raise InvalidName(f"a name has at most {MAX_NAME_SIZE} bytes; this one has {len(name)}")
    if not 0 <= envelope.id <= MAX_ID:
        raise PayloadError(f"an id is an unsigned 64-bit number, not {envelope.id}")
    if not 0 <= envelope.codec <= 255:
        raise PayloadError(f"a codec is a number from 0 to 255, not {envelope.codec}")
    if envelope.flags & ~_KNOWN_FLAGS:
        raise PayloadError(f"flags has unknown bits set: {int(envelope.flags):#04x}")
    # int(): ~ of a Flag keeps only the known bits on some versions of Python, and all
    # on others.
    flags = envelope.flags & ~int(Flag.EXTENSION)
    parts = [name]
    if envelope.kind is Kind.EVENT:
        topic = _utf8(envelope.topic, "topic")
        if not 0 < len(topic) <= MAX_TOPIC:
            raise InvalidName(f"a topic has 1 to {MAX_TOPIC} bytes; this one has {len(topic)}")
        parts += (bytes((len(topic),)), topic)
    if flags & ACK_FLAG and envelope.kind in _DELIVERIES:
        if not (0 <= envelope.seq <= MAX_ID and 0 <= envelope.attempt <= _MAX_ATTEMPT):
            raise PayloadError(
                "a seq is an unsigned 64-bit number and an attempt a 16-bit one, not"
                f" {envelope.seq} and {envelope.attempt}"
            )
        parts.append(SEQ.pack(envelope.seq, envelope.attempt))
    if envelope.extension is not None:
        flags |= Flag.EXTENSION
        parts.append(extension_part(envelope.extension))
    header = HEADER.pack(envelope.kind, flags, envelope.codec, len(name), envelope.id)
    return b"".join((header, *parts, envelope.payload))


def _utf8(text: str, field_name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidName(f"the {field_name} {text!r} can't be written in UTF-8") from error


class LoneTtl(dict[str, Any]):
    """An extension that is a ``ttl`` alone, and is never changed.

    Attributes:
        part: The extension as a frame has it.
    """

    __slots__ = ("part",)

    def __init__(self, ttl: float) -> None:
        super().__init__(ttl=ttl)
        self.part = extension_part({"ttl": ttl})


# A program uses a few timeouts. typed: 1 and 1.0 are equal, and their texts are not.
@lru_cache(maxsize=64, typed=True)
def ttl_extension(ttl: float) -> LoneTtl:
    """Return the extension that is this ``ttl`` alone, for every request with a timeout."""
    return LoneTtl(ttl)


def extension_part(extension: Mapping[str, Any]) -> bytes:
    """Return an extension as a frame has it: its length and its JSON.

    Raises PayloadError for an extension that does not fit the wire format.
    """
    if type(extension) is LoneTtl:
        return extension.part
    # Many messages have a ttl, every post a key, and few have more.
    if type(extension) is dict and len(extension) == 1:
        ttl: Any = extension.get("ttl")
        if type(ttl) in (float, int) and 0 <= ttl <= MAX_TTL:
            return _ttl_part(ttl)
        key: Any = extension.get("key")
        if type(key) is str and key.isalnum() and key.isascii() and len(key) <= MAX_KEY_SIZE:
            return EXTENSION_LENGTH.pack(len(key) + 10) + b'{"key":"%b"}' % key.encode()
    encoded = _json(extension)
    return EXTENSION_LENGTH.pack(len(encoded)) + encoded


# A program uses a few times to live, and writing a float takes long. typed: as above.
@lru_cache(maxsize=64, typed=True)
def _ttl_part(ttl: float) -> bytes:
    encoded = b'{"ttl":%a}' % ttl
    return EXTENSION_LENGTH.pack(len(encoded)) + encoded


def lone_ttl(raw: bytes) -> dict[str, Any] | None:
    """Return the extension if its JSON is a ``ttl`` alone in its usual form, else None.

    It takes a tenth of the time that the JSON of any extension takes.
    """
    match = _LONE_TTL.fullmatch(raw)
    if match is None:
        return None
    number, fraction = match.groups()
    return {"ttl": int(number) if fraction is None else float(number)}


def lone_key(raw: bytes) -> dict[str, Any] | None:
    """Return the extension if its JSON is a ``key`` alone in its usual form, else None."""
    match = _LONE_KEY.fullmatch(raw)
    return None if match is None else {"key": match[1].decode()}


def _json(extension: Mapping[str, Any]) -> bytes:
    if not isinstance(extension, Mapping):
        raise PayloadError(
            f"an extension is a JSON object: give a dict, not {type(extension).__name__}"
        )
    try:
        text = json.dumps(extension, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # RecursionError: nested too deeply. ValueError: NaN, infinity, or a reference
    # cycle.
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"the extension can't be written as JSON: {error}") from error
    # Only a lone surrogate has no UTF-8, and its replacement is JSON's own escape for
    # it.
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) > MAX_EXTENSION:
        raise PayloadError(
            f"an extension has at most {MAX_EXTENSION} bytes of JSON; this one has {len(encoded)}"
        )
    if _is_too_deep(encoded):
        raise PayloadError(f"the extension is nested deeper than {MAX_DEPTH} levels")
    if _longest_number(encoded) >= _FLOAT_DIGITS:
        try:
            _STRICT.decode(text)
        except ValueError as error:
            raise PayloadError(f"the extension can't be written as JSON: {error}") from error
    return encoded


def parse(body: bytes | bytearray | memoryview) -> Envelope:
    """Return the envelope in a frame's body with its payload; :func:`split` lists the
    checks.
    """
    envelope, start = split(body)
    return replace(envelope, payload=bytes(body[start:]))


def split(
    body: bytes | bytearray | memoryview, *, from_client: bool = False
) -> tuple[Envelope, int]:
    """Return (the envelope without its payload, where the payload begins in ``body``).

    Only the layout is checked. The caller has to check whether the name is a valid
    recipient, and whether a client may send this kind. Raises MalformedEnvelope, with
    the id if it is readable. Raises ExtensionTooDeep; :func:`head` can then still read
    the rest.

    from_client: Whether a client sent the frame. No delivery comes from a client: a
        MESSAGE or EVENT with the flag ACK is then read up to its name or topic.
    """
    envelope, position = _head(body, from_client=from_client)
    if from_client and envelope.flags & ACK_FLAG and envelope.kind in _DELIVERIES:
        return envelope, len(body)
    if envelope.flags & EXTENSION_FLAG:
        extension, position = _extension(body, position, envelope.id)
        envelope = replace(envelope, extension=extension)
    return envelope, position


def head(body: bytes | bytearray | memoryview) -> Envelope:
    """Return the envelope without extension and payload, which are not checked."""
    return _head(body)[0]


def _head(
    body: bytes | bytearray | memoryview, *, from_client: bool = False
) -> tuple[Envelope, int]:
    """Return (the envelope without extension and payload, where the extension or the
    payload begins).
    """
    if len(body) < HEADER.size:
        raise MalformedEnvelope(
            f"a broker frame has at least {HEADER.size} bytes; this one has {len(body)}"
        )
    kind_number, flags, codec, name_size, message_id = HEADER.unpack_from(body)
    kind = _KINDS.get(kind_number)
    if kind is None:
        raise MalformedEnvelope(f"kind {kind_number} is not known", message_id)
    if flags & ~_KNOWN_FLAGS:
        raise MalformedEnvelope(f"flags has unknown bits set: {flags:#04x}", message_id)
    position = HEADER.size
    name, position = _text(body, position, name_size, message_id, "name")
    topic = ""
    if kind is Kind.EVENT:
        if position >= len(body):
            raise MalformedEnvelope("the frame ends before the topic's length", message_id)
        topic, position = _text(body, position + 1, body[position], message_id, "topic")
    if not flags & ACK_FLAG or from_client or kind not in _DELIVERIES:
        return Envelope(kind, message_id, name, b"", codec, flags, topic), position
    if position + SEQ.size > len(body):
        raise MalformedEnvelope("the frame ends inside the seq or the attempt", message_id)
    seq, attempt = SEQ.unpack_from(body, position)
    envelope = Envelope(kind, message_id, name, b"", codec, flags, topic, None, seq, attempt)
    return envelope, position + SEQ.size


def _text(
    body: bytes | bytearray | memoryview, start: int, size: int, message_id: int, field_name: str
) -> tuple[str, int]:
    end = start + size
    if end > len(body):
        raise MalformedEnvelope(f"the frame ends inside the {field_name}", message_id)
    try:
        return str(body[start:end], "utf-8"), end
    except UnicodeDecodeError as error:
        raise MalformedEnvelope(f"the {field_name} is not UTF-8", message_id) from error


def _extension(
    body: bytes | bytearray | memoryview, start: int, message_id: int
) -> tuple[dict[str, Any], int]:
    json_start = start + EXTENSION_LENGTH.size
    if json_start > len(body):
        raise MalformedEnvelope("the frame ends before the extension's length", message_id)
    end = json_start + EXTENSION_LENGTH.unpack_from(body, start)[0]
    if end > len(body):
        raise MalformedEnvelope("the frame ends inside the extension", message_id)
    raw = bytes(body[json_start:end])
    if (usual := lone_ttl(raw) or lone_key(raw)) is not None:
        return usual, end
    try:
        text = raw.decode()
        if _is_too_deep(raw):
            raise ExtensionTooDeep(
                f"the extension is nested deeper than {MAX_DEPTH} levels", message_id
            )
        digits = _longest_number(raw)
        extension = (_STRICT if digits >= _FLOAT_DIGITS else _PLAIN).decode(text)
        if digits >= _FEW_DIGITS or _LONG_EXPONENT.search(raw) is not None:
            # Writing fails only for a number that became infinite. Checking each number
            # in Python would take ten times as long.
            _FINITE.encode(extension)
    # RecursionError: the caller's own stack is too deep for the decoder.
    except (ValueError, RecursionError) as error:
        raise MalformedEnvelope("the extension is not JSON", message_id) from error
    if not isinstance(extension, dict):
        raise MalformedEnvelope("the extension is not a JSON object", message_id)
    return extension, end


def _is_too_deep(raw: bytes) -> bool:
    """Return whether more than MAX_DEPTH objects and arrays are nested.

    The rest of the text need not be JSON.
    """
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    levels = _STRING.sub(b"", raw).translate(_LEVELS, _NO_BRACKETS)
    return max(map(sub, accumulate(levels), count(1)), default=0) > MAX_DEPTH


def _longest_number(raw: bytes) -> int:
    """Return the longest run of digits, in numbers and strings.

    Return 0 for a text that is too short for many digits.
    """
    return (
        max(map(len, raw.translate(_NO_DIGITS).split()), default=0)
        if len(raw) >= _FEW_DIGITS
        else 0
    )


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _integer(text: str) -> int:
    # int() raises above a length that the interpreter's settings limit: check before
    # calling it.
    if len(text) >= _FLOAT_DIGITS and (len(text) > _FLOAT_DIGITS + 1 or math.isinf(float(text))):
        raise ValueError("a number is too large")
    return int(text)


#: The second decoder checks the size of every integer, which takes longer.
_PLAIN: Final = json.JSONDecoder(parse_constant=_not_json)
_STRICT: Final = json.JSONDecoder(parse_constant=_not_json, parse_int=_integer)
_FINITE: Final = json.JSONEncoder(allow_nan=False, check_circular=False)


def is_ttl(value: object) -> bool:
    """Return whether the value is a valid ``ttl``: a number of seconds up to MAX_TTL.

    With 0 or less, the message has already expired.
    """
    return _is_number(value) and value <= MAX_TTL


def is_stored_ttl(value: object) -> bool:
    """Return whether the value is a valid ``ttl`` of a message in a mailbox: a number
    of seconds above 0, up to MAX_STORED_TTL.
    """
    return _is_number(value) and 0 < value <= MAX_STORED_TTL


def is_delay(value: object) -> bool:
    """Return whether the value is a valid ``delay``: a number of seconds from 0 to
    MAX_DELAY.
    """
    return _is_number(value) and 0 <= value <= MAX_DELAY


def is_key(value: object) -> bool:
    """Return whether the value is a valid ``key``: a text of 1 to MAX_KEY_SIZE bytes."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_KEY_SIZE:
        return False
    try:
        return len(value.encode()) <= MAX_KEY_SIZE
    except UnicodeEncodeError:
        return False


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def error_payload(
    code: ErrorCode,
    message: str,
    name: str = "",
    *,
    seq: int = 0,
    names: Sequence[str] = (),
    host: str = "",
    addresses: Sequence[str] = (),
) -> bytes:
    """Return the payload of an ERROR.

    Args:
        code: The code of the error.
        message: The text, for people.
        name: The recipient that the error is about.
        seq: The number of the stored message that it is about, or 0.
        names: The mailboxes that it is about, if there may be several.
        host: The host where the recipient is, for the code ``elsewhere``.
        addresses: Where clients can connect to that host.
    """
    fields: dict[str, Any] = {"code": code, "message": message, "name": name}
    if seq:
        fields["seq"] = seq
    if names:
        fields["names"] = list(names)
    if host:
        fields |= {"host": host, "addresses": list(addresses)}
    return json.dumps(fields).encode()


def is_name(text: str) -> bool:
    """Return whether the text can name a client."""
    return _NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    """Return whether the text can be a recipient: ``name``, ``name/instance`` or the
    broker's ``$...``.
    """
    return _ADDRESS.fullmatch(text) is not None or _SERVICE.fullmatch(text) is not None


def check_name(text: str, what: str = "client") -> str:
    """Return the text. Raises InvalidName if it can't name a client, or a group."""
    if not is_name(text):
        raise InvalidName(
            f"{text!r} is not a valid {what} name: 1 to 64 letters, digits, '_', '.' and '-',"
            " not beginning with '.' or '-'"
        )
    return text


def check_address(text: str) -> str:
    """Return the text. Raises InvalidName if it can't be a recipient."""
    if not is_address(text):
        raise InvalidName(
            f"{text!r} is not a valid recipient: give a client's name, NAME/INSTANCE or $broker"
        )
    return text


def split_address(text: str) -> tuple[str, str]:
    """Return (name, instance) of an address; a missing instance is ""."""
    name, _, instance = text.partition("/")
    return name, instance


def check_topic(text: str) -> str:
    """Return the text. Raises InvalidName if it is not a topic to publish on."""
    _check_tokens(text, "topic")
    if any(token in ("*", ">") for token in text.split(".")):
        raise InvalidName(f"{text!r} is not a valid topic: '*' and '>' are for subscriptions")
    return text


def check_pattern(text: str) -> str:
    """Return the text. Raises InvalidName if it is not a pattern to subscribe to.

    ``*`` stands for one token, a final ``>`` for one or more.
    """
    _check_tokens(text, "topic pattern")
    if ">" in text[:-1] and ">" in text.split(".")[:-1]:
        raise InvalidName(f"{text!r} is not a valid topic pattern: '>' may only be its last token")
    return text


def _check_tokens(text: str, field_name: str) -> None:
    size = len(_utf8(text, field_name))
    if not 0 < size <= MAX_TOPIC:
        raise InvalidName(f"a {field_name} has 1 to {MAX_TOPIC} bytes; this one has {size}")
    if ".." in text or text[0] == "." or text[-1] == ".":
        raise InvalidName(
            f"{text!r} is not a valid {field_name}: its tokens are joined by single dots"
        )
