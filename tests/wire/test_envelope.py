"""Broker frames: every layout round-trips, every malformed one is refused with the id
that was readable.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.errors import ExtensionTooDeep, InvalidName, MalformedEnvelope, PayloadError
from brokerd_client.wire.envelope import (
    BROKER,
    HEADER,
    MAX_DELAY,
    MAX_STORED_TTL,
    MAX_TTL,
    CodecId,
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    check_address,
    check_name,
    check_pattern,
    check_topic,
    encode,
    error_payload,
    extension_part,
    head,
    is_address,
    is_delay,
    is_key,
    is_name,
    is_stored_ttl,
    is_ttl,
    lone_key,
    lone_ttl,
    parse,
    split,
    split_address,
    ttl_extension,
)

ID = 0x0102030405060708

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
#: Text that UTF-8 can hold, short enough for a length of one byte.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ENVELOPES = st.builds(
    Envelope,
    kind=st.sampled_from([kind for kind in Kind if kind is not Kind.EVENT]),
    id=st.integers(0, 2**64 - 1),
    name=NAMES,
    payload=st.binary(max_size=200),
    codec=st.integers(0, 255),
    flags=st.sampled_from([0, Flag.RECEIPT, Flag.ACK, Flag.RECEIPT | Flag.ACK]),
    extension=st.none() | st.dictionaries(st.text(), JSON_VALUES, max_size=4),
)
EVENTS = st.builds(
    Envelope,
    kind=st.just(Kind.EVENT),
    id=st.integers(0, 2**64 - 1),
    topic=NAMES.filter(bool),
    payload=st.binary(max_size=200),
    extension=st.none() | st.dictionaries(st.text(), JSON_VALUES, max_size=4),
)


DELIVERIES = st.builds(
    lambda envelope, flags, seq, attempt: replace(envelope, flags=flags, seq=seq, attempt=attempt),
    st.one_of(ENVELOPES.filter(lambda envelope: envelope.kind is Kind.MESSAGE), EVENTS),
    flags=st.sampled_from([Flag.ACK, Flag.RECEIPT | Flag.ACK]),
    seq=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**16 - 1),
)


def header(
    kind: int = 1, flags: int = 0, codec: int = 0, name_size: int = 0, message_id: int = ID
) -> bytes:
    """Return a header with the given numbers, valid or not."""
    return HEADER.pack(kind, flags, codec, name_size, message_id)


def parsed_or_refused(body: bytes) -> Envelope | MalformedEnvelope:
    """Return the parsed body, or the error; either has an id."""
    try:
        return parse(body)
    except MalformedEnvelope as error:
        return error


def id_of(outcome: Envelope | MalformedEnvelope) -> int:
    """Return the message id of an envelope, or of the error about one."""
    return outcome.id if isinstance(outcome, Envelope) else outcome.message_id


# -- The layout


def test_envelope_message_is_encoded_as_documented() -> None:
    """The header's fields stand where docs/protocol.md puts them, in network byte
    order.
    """
    envelope = Envelope(
        Kind.MESSAGE, id=ID, name="bob", payload=b"hello", codec=CodecId.JSON, flags=Flag.RECEIPT
    )

    assert (
        encode(envelope) == b"\x01\x01\x02\x03\x01\x02\x03\x04\x05\x06\x07\x08" + b"bob" + b"hello"
    )


def test_envelope_event_with_extension_is_encoded_as_documented() -> None:
    """Behind the name come the topic and its length, the extension and its length, and
    the payload.
    """
    envelope = Envelope(Kind.EVENT, topic="a.b", extension={"ttl": 5}, payload=b"!")

    assert (
        encode(envelope)
        == b"\x05\x02\x00\x00" + bytes(8) + b"\x03a.b" + b'\x00\x09{"ttl":5}' + b"!"
    )


def test_envelope_delivery_is_encoded_as_documented() -> None:
    """The seq and the attempt of a delivery stand behind the name, or the topic."""
    message = Envelope(
        Kind.MESSAGE, ID, "bob", b"!", flags=Flag.ACK, extension={}, seq=258, attempt=3
    )
    event = Envelope(Kind.EVENT, 1, "a", b"!", flags=Flag.ACK, topic="t", seq=1, attempt=1)

    assert (
        encode(message)
        == header(1, 6, 0, 3) + b"bob" + b"\0\0\0\0\0\0\1\2" + b"\0\3" + b"\0\2{}" + b"!"
    )
    assert (
        encode(event)
        == header(5, 4, 0, 1, 1) + b"a" + b"\1t" + b"\0\0\0\0\0\0\0\1" + b"\0\1" + b"!"
    )
    assert split(encode(event)) == (replace(event, payload=b""), 25)


@pytest.mark.parametrize("kind", [Kind.REQUEST, Kind.REPLY, Kind.ERROR, Kind.RECEIPT, Kind.ACK])
def test_envelope_of_other_kind_with_ack_has_no_seq(kind: Kind) -> None:
    """Only a MESSAGE and an EVENT can be deliveries."""
    body = encode(Envelope(kind, ID, "bob", b"x", flags=Flag.ACK, seq=1, attempt=1))

    assert body == header(kind, 4, 0, 3) + b"bob" + b"x"
    assert parse(body) == Envelope(kind, ID, "bob", b"x", flags=Flag.ACK)


@pytest.mark.parametrize(("seq", "attempt"), [(-1, 1), (2**64, 1), (1, -1), (1, 2**16)])
def test_envelope_with_seq_or_attempt_out_of_range_raises(seq: int, attempt: int) -> None:
    with pytest.raises(PayloadError, match="a seq is an unsigned 64-bit number"):
        encode(Envelope(Kind.MESSAGE, flags=Flag.ACK, seq=seq, attempt=attempt))


@pytest.mark.parametrize("flags", [Flag.ACK, Flag.ACK | Flag.EXTENSION])
@pytest.mark.parametrize("rest", [b"", b"x", b"\xff" * 9, b"\xff" * 30])
def test_envelope_delivery_from_client_is_read_up_to_name(flags: int, rest: bytes) -> None:
    """The broker refuses it, whatever follows the name or the topic."""
    message = header(1, flags, 0, 3) + b"bob" + rest
    event = header(5, flags) + b"\1t" + rest

    assert split(message, from_client=True) == (
        Envelope(Kind.MESSAGE, ID, "bob", flags=flags),
        len(message),
    )
    assert split(event, from_client=True) == (
        Envelope(Kind.EVENT, ID, flags=flags, topic="t"),
        len(event),
    )


def test_envelope_ack_from_client_is_read() -> None:
    body = encode(Envelope(Kind.ACK, ID, payload=b"{}", flags=Flag.ACK, extension={"a": 1}))

    envelope, start = split(body, from_client=True)

    assert (envelope.extension, body[start:]) == ({"a": 1}, b"{}")


def test_envelope_numbers_and_codes_are_fixed() -> None:
    """Clients in other languages hold copies of these numbers and words."""
    assert {kind.name: kind.value for kind in Kind} == {
        "MESSAGE": 1,
        "REQUEST": 2,
        "REPLY": 3,
        "ERROR": 4,
        "EVENT": 5,
        "RECEIPT": 6,
        "ACK": 7,
        "OPEN": 8,
        "JOIN": 9,
    }
    assert {flag.name: flag.value for flag in Flag} == {"RECEIPT": 1, "EXTENSION": 2, "ACK": 4}
    assert {codec.name: codec.value for codec in CodecId} == {
        "RAW": 0,
        "PICKLE": 1,
        "JSON": 2,
        "MSGPACK": 3,
    }
    assert {str(code) for code in ErrorCode} == {
        "no_such_client",
        "offline",
        "abandoned",
        "cancelled",
        "denied",
        "full",
        "too_large",
        "expired",
        "rate_limited",
        "malformed",
        "unsupported",
        "shutting_down",
        "in_doubt",
        "store_failed",
        "elsewhere",
        "name_taken",
        "replaced",
        "key_removed",
        "disconnected",
    }
    assert HEADER.size == 12


@given(st.one_of(ENVELOPES, EVENTS, DELIVERIES))
def test_envelope_encoded_is_parsed_back(envelope: Envelope) -> None:
    """Every field survives. The EXTENSION bit is set if and only if there is an
    extension.
    """
    parsed = parse(encode(envelope))

    flags = envelope.flags | (Flag.EXTENSION if envelope.extension is not None else 0)
    assert parsed == Envelope(
        envelope.kind,
        envelope.id,
        envelope.name,
        envelope.payload,
        envelope.codec,
        flags,
        envelope.topic,
        envelope.extension,
        envelope.seq,
        envelope.attempt,
    )
    assert len(parsed) == len(envelope.payload)


@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview])
def test_envelope_parse_takes_any_bytes_like_object(convert: Callable[[bytes], Any]) -> None:
    """A frame may lie in a buffer; the returned payload is a copy, not a view of the
    buffer.
    """
    body = encode(Envelope(Kind.EVENT, id=ID, topic="a", extension={}, payload=b"payload"))

    parsed = parse(convert(body))

    assert parsed == Envelope(Kind.EVENT, ID, "", b"payload", 0, Flag.EXTENSION, "a", {})
    assert type(parsed.payload) is bytes


def test_envelope_split_copies_no_payload() -> None:
    """split() returns the offset of the payload and copies none of it."""
    body = encode(Envelope(Kind.MESSAGE, id=ID, name="bob", payload=b"payload"))

    assert split(body) == (Envelope(Kind.MESSAGE, ID, "bob"), 15)
    assert body[15:] == b"payload"


@pytest.mark.parametrize("codec", [4, 127, 128, 255])
def test_envelope_unknown_codec_is_carried(codec: int) -> None:
    """The broker decodes no payload, so no codec number is malformed."""
    assert parse(header(codec=codec)).codec == codec


def test_envelope_repr_shows_no_payload() -> None:
    """An envelope in a log line or a traceback does not reveal the message."""
    assert "secret" not in repr(Envelope(Kind.MESSAGE, payload=b"secret"))


# -- What is malformed


@pytest.mark.parametrize("size", range(12))
def test_envelope_shorter_than_header_is_malformed(size: int) -> None:
    """No id was readable, so the error carries 0."""
    with pytest.raises(MalformedEnvelope, match="at least 12 bytes") as caught:
        parse(header()[:size])

    assert caught.value.message_id == 0


@pytest.mark.parametrize("kind", [0, 10, 11, 127, 128, 255])
def test_envelope_unknown_kind_is_malformed(kind: int) -> None:
    """There are nine kinds."""
    with pytest.raises(MalformedEnvelope, match=f"kind {kind} is not known") as caught:
        parse(header(kind=kind))

    assert caught.value.message_id == ID


@pytest.mark.parametrize("bit", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("known", [0, 1, 7])
def test_envelope_unknown_flag_is_malformed(bit: int, known: int) -> None:
    """A flag of a later version changes the meaning of the frame, so it can't be
    ignored.
    """
    with pytest.raises(MalformedEnvelope, match="unknown bits") as caught:
        parse(header(flags=bit | known) + b"\x00\x02{}")

    assert caught.value.message_id == ID


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (header(name_size=3) + b"bo", "ends inside the name"),
        (header(name_size=255), "ends inside the name"),
        (header(name_size=2) + b"\xff\xfe", "the name is not UTF-8"),
        (header(name_size=3) + b"\xed\xa0\x80", "the name is not UTF-8"),
        (header(kind=5), "ends before the topic's length"),
        (header(kind=5, name_size=1) + b"a", "ends before the topic's length"),
        (header(kind=5) + b"\x03ab", "ends inside the topic"),
        (header(kind=5) + b"\x01\x80", "the topic is not UTF-8"),
        (header(flags=2), "ends before the extension's length"),
        (header(flags=2) + b"\x00", "ends before the extension's length"),
        (header(flags=2) + b"\x00\x03{}", "ends inside the extension"),
        (header(flags=2) + b"\xff\xff" + b"{}" * 9, "ends inside the extension"),
        (header(flags=2) + b"\x00\x00", "the extension is not JSON"),
        (header(flags=2) + b"\x00\x01{", "the extension is not JSON"),
        (header(flags=2) + b"\x00\x02{}"[:-1] + b"x", "the extension is not JSON"),
        (header(flags=2) + b"\x00\x04\xff\xfe{}", "the extension is not JSON"),
        (header(flags=2) + b"\x00\x04" + "{}".encode("utf-16-le"), "the extension is not JSON"),
        (header(flags=2) + b"\x00\x09" + b'{"a":NaN}', "the extension is not JSON"),
        (header(flags=2) + b"\x00\x0e" + b'{"a":Infinity}', "the extension is not JSON"),
        (header(flags=2) + b"\x00\x0b" + b'{"a":1e400}', "the extension is not JSON"),
        (header(flags=2) + b"\x00\x02[]", "not a JSON object"),
        (header(flags=2) + b"\x00\x04null", "not a JSON object"),
        (header(flags=2) + b'\x00\x04"{}"', "not a JSON object"),
        (
            header(flags=2) + struct.pack("!H", 6005) + b'{"a":' + b"9" * 5999 + b"}",
            "the extension is not JSON",
        ),
        (header(kind=5, flags=2) + b"\x01a\x00\x05{}", "ends inside the extension"),
        (header(flags=4), "ends inside the seq or the attempt"),
        (header(flags=4, name_size=1) + b"a" + b"1" * 9, "ends inside the seq or the attempt"),
        (header(kind=5, flags=6) + b"\x01a" + b"1" * 9, "ends inside the seq or the attempt"),
        (header(flags=6) + b"1" * 10, "ends before the extension's length"),
    ],
)
def test_envelope_with_wrong_lengths_or_text_is_malformed(body: bytes, reason: str) -> None:
    """Each way to be cut short, or to hold invalid text, has its reason. The error
    carries the id that was readable.
    """
    with pytest.raises(MalformedEnvelope, match=reason) as caught:
        parse(body)

    assert caught.value.message_id == ID


@given(st.binary(max_size=80))
def test_envelope_random_bytes_are_parsed_or_malformed(body: bytes) -> None:
    """Garbage raises MalformedEnvelope and nothing else."""
    outcome = parsed_or_refused(body)

    assert 0 <= id_of(outcome) < 2**64


@given(
    kind=st.sampled_from(list(Kind)),
    flags=st.integers(0, 7),
    name_size=st.integers(0, 12),
    rest=st.binary(max_size=40)
    | st.builds(bytes.__add__, st.just(b"\x01a\x00\x0b"), st.text().map(str.encode)),
)
def test_envelope_garbage_behind_header_is_parsed_or_malformed(
    kind: Kind, flags: int, name_size: int, rest: bytes
) -> None:
    """Behind a correct header, garbage raises only MalformedEnvelope, with the header's
    id.
    """
    outcome = parsed_or_refused(header(kind, flags, 0, name_size) + rest)

    assert id_of(outcome) == ID


@given(st.one_of(ENVELOPES, EVENTS), st.data())
def test_envelope_cut_short_is_malformed_or_loses_payload_only(
    envelope: Envelope, data: st.DataObject
) -> None:
    """Cut anywhere, a frame is malformed, or only some of its payload is missing."""
    body = encode(envelope)
    cut = data.draw(st.integers(0, len(body)))
    try:
        parsed = parse(body[:cut])
    except MalformedEnvelope:
        assert cut < len(body) - len(envelope.payload)
    else:
        assert (parsed.kind, parsed.id, parsed.name, parsed.topic) == (
            envelope.kind,
            envelope.id,
            envelope.name,
            envelope.topic,
        )
        assert envelope.payload.startswith(parsed.payload)


# -- What can't be encoded


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (Envelope(Kind.MESSAGE, name="n" * 256), "at most 255 bytes"),
        (Envelope(Kind.MESSAGE, name="é" * 128), "at most 255 bytes"),
        (Envelope(Kind.MESSAGE, name="\ud800"), "can't be written in UTF-8"),
        (Envelope(Kind.EVENT), "1 to 255 bytes"),
        (Envelope(Kind.EVENT, topic="t" * 256), "1 to 255 bytes"),
        (Envelope(Kind.EVENT, topic="a.\udfff"), "can't be written in UTF-8"),
    ],
)
def test_envelope_name_or_topic_too_long_is_refused(envelope: Envelope, reason: str) -> None:
    """Their lengths are one byte, counted in UTF-8."""
    with pytest.raises(InvalidName, match=reason):
        encode(envelope)


def holding_itself() -> dict[str, Any]:
    """Return an object that contains itself."""
    endless: dict[str, Any] = {}
    endless["self"] = endless
    return endless


def deeply_nested() -> list[Any]:
    """Return a list so deep that no recursive function reaches its bottom."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (Envelope(Kind.MESSAGE, id=-1), "unsigned 64-bit"),
        (Envelope(Kind.MESSAGE, id=2**64), "unsigned 64-bit"),
        (Envelope(Kind.MESSAGE, codec=-1), "0 to 255"),
        (Envelope(Kind.MESSAGE, codec=256), "0 to 255"),
        (Envelope(Kind.MESSAGE, flags=8), "unknown bits"),
        (Envelope(Kind.MESSAGE, flags=256), "unknown bits"),
        (Envelope(Kind.MESSAGE, extension={"a": "b" * 65535}), "at most 65535 bytes"),
        (Envelope(Kind.MESSAGE, extension={"a": float("nan")}), "can't be written as JSON"),
        (Envelope(Kind.MESSAGE, extension={"a": b"bytes"}), "can't be written as JSON"),
        (Envelope(Kind.MESSAGE, extension={"a": 10**309}), "a number is too large"),
        (Envelope(Kind.MESSAGE, extension={"a": [-2 * 10**308]}), "a number is too large"),
        (Envelope(Kind.MESSAGE, extension=holding_itself()), "can't be written as JSON"),
        (Envelope(Kind.MESSAGE, extension=["a"]), "give a dict, not list"),  # type: ignore[arg-type]
        (Envelope(Kind.MESSAGE, extension="a"), "give a dict, not str"),  # type: ignore[arg-type]
        (Envelope(Kind.MESSAGE, extension=False), "give a dict, not bool"),  # type: ignore[arg-type]
    ],
)
def test_envelope_field_out_of_range_is_refused(envelope: Envelope, reason: str) -> None:
    """No field is cut, wrapped round or left out to make it fit."""
    with pytest.raises(PayloadError, match=reason):
        encode(envelope)


def test_extension_nested_too_deeply_is_refused() -> None:
    """The caller gets the same error as for any other extension that can't be written."""
    with pytest.raises(PayloadError, match="can't be written as JSON"):
        encode(Envelope(Kind.MESSAGE, extension={"a": deeply_nested()}))
    with pytest.raises(PayloadError, match="deeper than 32 levels"):
        encode(Envelope(Kind.MESSAGE, extension=json.loads(nested(33))))


def nested(levels: int, inner: str = "") -> bytes:
    """Return an extension of ``levels`` levels as JSON, objects and lists by turns."""
    opened = ['{"a":' if level % 2 == 0 else "[" for level in range(levels - 1)] + [
        "{" if levels % 2 else "["
    ]
    closed = ["}" if level % 2 == 0 else "]" for level in reversed(range(levels))]
    return "".join([*opened, inner, *closed]).encode()


def extended(raw: bytes) -> bytes:
    """Return a MESSAGE with ``raw`` as its extension."""
    return header(name_size=3, flags=2) + b"bob" + struct.pack("!H", len(raw)) + raw + b"payload"


@pytest.mark.parametrize(
    "raw", [nested(1), nested(32), b'{"a":[' + b",".join([b"[{}]"] * 5000) + b"]}"]
)
def test_extension_with_32_levels_passes(raw: bytes) -> None:
    """Only levels count, not how many objects and lists there are, nor where."""
    parsed = parse(extended(raw))

    assert parsed.extension == json.loads(raw)
    assert parse(encode(parsed)) == parsed


@pytest.mark.parametrize(
    "raw",
    [
        nested(33),
        nested(34),
        nested(976),
        nested(15_000),
        b'{"a":' + b"[" * 32 + b"]" * 32 + b"}",
        b'{"a":{},"b":' + nested(33)[5:-1] + b',"c":' + nested(32) + b"}",
        b"[" * 60_000,
        nested(33, '"]]}}": 1'),
    ],
)
def test_extension_with_33_levels_raises(raw: bytes) -> None:
    """The id, and all of the frame before the extension, can still be read."""
    with pytest.raises(ExtensionTooDeep, match="deeper than 32 levels") as caught:
        parse(extended(raw))

    assert caught.value.message_id == ID
    assert head(extended(raw)) == Envelope(Kind.MESSAGE, ID, "bob", flags=Flag.EXTENSION)


@pytest.mark.parametrize(
    "text", ["[" * 50, "\\[" * 40, '\\"[[[[{{' * 10, '\\\\"' + ',"b":"' + "{" * 50, "é[" * 40]
)
def test_extension_with_brackets_in_string_passes(text: str) -> None:
    """Brackets in a string are not levels."""
    raw = ('{"a":"' + text.replace("\\[", "[") + '"}').encode()

    assert parse(extended(raw)).extension == json.loads(raw)


@given(
    st.recursive(
        st.text('[]{}"\\a', max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text('[]{}"\\', max_size=3), inner, max_size=3)
        ),
        max_leaves=30,
    ),
    st.integers(0, 31),
)
def test_extension_depth_is_that_of_its_values(value: Any, around: int) -> None:
    """The depth is counted alike in the JSON and in the objects that it stands for."""

    def depth(value: Any) -> int:
        inner = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else None
        )
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    for _ in range(around):
        value = [value]
    extension = {"a": value}
    raw = json.dumps(extension).encode()
    if depth(extension) > 32:
        with pytest.raises(ExtensionTooDeep):
            parse(extended(raw))
        with pytest.raises(PayloadError, match="deeper than 32 levels"):
            encode(Envelope(Kind.MESSAGE, extension=extension))
    else:
        assert parse(extended(raw)).extension == extension
        assert parse(encode(Envelope(Kind.MESSAGE, extension=extension))).extension == extension


@pytest.mark.parametrize("limit", [640, 4300, 0])
@pytest.mark.parametrize(
    ("number", "passes"),
    [
        ("9" * 308, True),
        ("1" + "0" * 308, True),
        ("-1" + "0" * 308, True),
        ("9" * 309, False),
        ("-" + "9" * 309, False),
        ("1" + "0" * 309, False),
        ("9" * 4000, False),
        ("9" * 60_000, False),
        ("0." + "9" * 4000, True),
        ("1" + "0" * 4000 + "e-4000", True),
        ("1" + "0" * 309 + ".0", False),
        ("1e308", True),
        ("1e309", False),
        ("1E+0309", False),
        ("-1e400", False),
        ("1e99999999999", False),
        ("9" * 250 + "e57", True),
        ("9" * 250 + "e59", False),
        ("9" * 199 + "e99", True),
        ("9" * 200 + ".5e99", True),
        ("9" * 210 + ".5e99", False),
        ("0.0e999", True),
        ("1e-999", True),
    ],
)
def test_extension_number_within_float_range_passes(number: str, passes: bool, limit: int) -> None:
    """The interpreter's limit on the digits of an int plays no part."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(limit)
    try:
        outcome = parsed_or_refused(
            extended(f'{{"ttl":{number},"digits":"{"8" * 5000}"}}'.encode())
        )
        if isinstance(outcome, Envelope):
            assert parse(encode(outcome)) == outcome
    finally:
        sys.set_int_max_str_digits(before)

    assert isinstance(outcome, Envelope) is passes


def test_extension_of_65535_bytes_passes() -> None:
    """65535 bytes of JSON are the most, and they arrive."""
    extension = {"a": "b" * (65535 - len('{"a":""}'))}

    assert parse(encode(Envelope(Kind.MESSAGE, extension=extension))).extension == extension


def test_extension_with_lone_surrogate_passes() -> None:
    """JSON can escape what UTF-8 can't hold, and the frame stays UTF-8."""
    body = encode(Envelope(Kind.MESSAGE, extension={"é": "\ud800"}))

    assert body.endswith('{"é":"\\ud800"}'.encode())
    assert parse(body).extension == {"é": "\ud800"}


@pytest.mark.parametrize("ttl", [0, 1, 30, 30.0, 0.1, 0.1 + 0.2, 1e-7, 12345678.25, MAX_TTL])
def test_extension_with_ttl_alone_is_written_and_read_as_any_json(ttl: float) -> None:
    body = encode(Envelope(Kind.REQUEST, 1, "bob", b"x", extension={"ttl": ttl}))
    written = body[HEADER.size + len("bob") + 2 : -1]
    read = parse(body).extension

    assert written == json.dumps({"ttl": ttl}, separators=(",", ":")).encode()
    assert read is not None
    assert (type(read["ttl"]), read) == (type(ttl), {"ttl": ttl})


@pytest.mark.parametrize(
    "text",
    [
        '{"ttl":30.0}',
        '{"ttl":0}',
        '{"ttl":30.}',
        '{"ttl":030}',
        '{"ttl":-1}',
        '{"ttl":1e3}',
        '{"ttl":12345678901}',
        '{"ttl": 30}',
        '{"ttl":30,"a":1}',
        '{"ttl":"30"}',
        '{"ttl":30}\n',
    ],
)
def test_lone_ttl_returns_what_json_has_or_none(text: str) -> None:
    extension = lone_ttl(text.encode())

    assert extension is None or extension == json.loads(text)


@pytest.mark.parametrize("key", ["a", "0" * 64, "k-1.x y", "é", '"', "\\", "\n", "\x7f"])
def test_extension_with_key_alone_is_written_and_read_as_any_json(key: str) -> None:
    body = encode(Envelope(Kind.MESSAGE, 1, "bob", b"x", extension={"key": key}))

    assert json.loads(body[HEADER.size + len("bob") + 2 : -1]) == {"key": key}
    assert parse(body).extension == {"key": key}


@pytest.mark.parametrize(
    "text",
    [
        '{"key":"a b"}',
        '{"key":"~"}',
        '{"key":""}',
        '{"key": "a"}',
        '{"key":"a","b":1}',
        '{"key":"\\u0061"}',
        '{"key":"a\\"}',
        '{"key":"é"}',
        '{"key":1}',
        '{"key":"' + "k" * 65 + '"}',
        '{"key":"a"}\n',
    ],
)
def test_lone_key_returns_what_json_has_or_none(text: str) -> None:
    extension = lone_key(text.encode())

    assert extension is None or extension == json.loads(text)


def test_extension_flag_without_extension_is_cleared() -> None:
    """A caller that sets the bit without an extension does not make a malformed frame."""
    assert parse(encode(Envelope(Kind.MESSAGE, flags=Flag.EXTENSION | Flag.ACK))).flags == Flag.ACK


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("a", True),
        ("k" * 64, True),
        ("é" * 32, True),
        (" \0\n", True),
        ("", False),
        ("k" * 65, False),
        ("é" * 33, False),
        ("\ud800", False),
        (b"a", False),
        (1, False),
        (None, False),
    ],
)
def test_key_of_1_to_64_bytes_of_text_is_valid(key: object, valid: bool) -> None:
    assert is_key(key) is valid


@pytest.mark.parametrize(
    ("seconds", "as_delay", "as_stored_ttl", "as_ttl"),
    [
        (0, True, False, True),
        (-1, False, False, True),
        (0.001, True, True, True),
        (MAX_DELAY, True, True, True),
        (MAX_DELAY + 0.5, False, True, True),
        (MAX_STORED_TTL, False, True, True),
        (MAX_STORED_TTL + 1, False, False, True),
        (MAX_TTL + 1, False, False, False),
        (float("inf"), False, False, False),
        (float("nan"), False, False, False),
        (True, False, False, False),
        ("1", False, False, False),
        (None, False, False, False),
    ],
)
def test_delay_and_ttl_within_their_ranges_are_valid(
    seconds: object, as_delay: bool, as_stored_ttl: bool, as_ttl: bool
) -> None:
    """A delay takes 30 days at most, a ttl in a mailbox 3,650 days."""
    assert (MAX_DELAY, MAX_STORED_TTL) == (2_592_000, 315_360_000)
    assert (is_delay(seconds), is_stored_ttl(seconds), is_ttl(seconds)) == (
        as_delay,
        as_stored_ttl,
        as_ttl,
    )


def test_error_payload_about_stored_message_holds_seq_and_names() -> None:
    payload = error_payload(ErrorCode.FULL, "no room", "bob", seq=7, names=["bob", "carol"])

    assert json.loads(payload) == {
        "code": "full",
        "message": "no room",
        "name": "bob",
        "seq": 7,
        "names": ["bob", "carol"],
    }


def test_error_payload_holds_code_message_and_name() -> None:
    """The payload of an ERROR is a JSON object of three texts."""
    assert json.loads(error_payload(ErrorCode.OFFLINE, "bob is not connected", "bob")) == {
        "code": "offline",
        "message": "bob is not connected",
        "name": "bob",
    }


# -- Names, addresses and topics

GOOD_NAMES = ["a", "_", "0", "alice", "Alice-1", "a.b", "a_b", "_private", "n" * 64, "a-", "a."]
BAD_NAMES = [
    "",
    "-a",
    ".a",
    "n" * 65,
    "a b",
    "a/b",
    "é",
    "a\n",
    "\na",
    "a\0",
    "$a",
    BROKER,
    "a*",
    "a@b",
    "ａ",
    "٣",
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_name_valid_is_accepted(name: str) -> None:
    """A name has 1 to 64 letters, digits, '_', '.' and '-', and begins with a letter, a
    digit or '_'.
    """
    assert is_name(name)
    assert check_name(name) == name
    assert is_address(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_invalid_is_refused(name: str) -> None:
    """The error says what a valid name is."""
    assert not is_name(name)
    with pytest.raises(InvalidName, match="1 to 64 letters"):
        check_name(name)


@pytest.mark.parametrize(
    "address", ["bob/1", "bob/abcdefghijklmnop", "b.o-b/0", BROKER, "$broker.online.bob", "$x"]
)
def test_address_valid_is_accepted(address: str) -> None:
    """A recipient is a name, one connection of a name, or a name of the broker's own."""
    assert is_address(address)
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "bob/",
        "/1",
        "bob/A",
        "bob/1/2",
        "bob/" + "a" * 17,
        "bob/é",
        "bob/1\n",
        "$",
        "$a/1",
        "$$a",
        "$a b",
    ],
)
def test_address_invalid_is_refused(address: str) -> None:
    """The error says what a valid address is."""
    assert not is_address(address)
    with pytest.raises(InvalidName, match="NAME/INSTANCE"):
        check_address(address)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("bob", ("bob", "")), ("bob/1", ("bob", "1")), (BROKER, (BROKER, "")), ("", ("", ""))],
)
def test_address_is_split_in_name_and_instance(address: str, parts: tuple[str, str]) -> None:
    """An address without an instance has an empty one."""
    assert split_address(address) == parts


GOOD_TOPICS = [
    "a",
    "a.b.c",
    "jobs.new",
    "t" * 255,
    "é.ü",
    "a*",
    "*a",
    ">>",
    "a.>b",
    "$broker.online.bob",
    "a b",
]


@pytest.mark.parametrize("topic", GOOD_TOPICS)
def test_topic_valid_is_accepted(topic: str) -> None:
    """A topic is tokens joined by single dots; '*' and '>' are special only as whole
    tokens.
    """
    assert check_topic(topic) == topic
    assert check_pattern(topic) == topic


@pytest.mark.parametrize("topic", ["", ".", "a.", ".a", "a..b", "t" * 256, "é" * 128, "a.\ud800"])
def test_topic_invalid_is_refused_as_topic_and_pattern(topic: str) -> None:
    """Empty tokens, more than 255 bytes and text outside UTF-8 can be neither published
    on nor subscribed to.
    """
    with pytest.raises(InvalidName):
        check_topic(topic)
    with pytest.raises(InvalidName):
        check_pattern(topic)


@pytest.mark.parametrize(
    "pattern", ["*", ">", "a.*", "*.b", "a.*.c", "a.>", "*.>", "*.*", "$broker.>"]
)
def test_pattern_as_topic_is_refused(pattern: str) -> None:
    """A pattern can be subscribed to, but not published on."""
    assert check_pattern(pattern) == pattern
    with pytest.raises(InvalidName, match="for subscriptions"):
        check_topic(pattern)


@pytest.mark.parametrize("pattern", [">.a", "a.>.b", ">.>", "*.>.*"])
def test_pattern_with_rest_before_last_token_is_refused(pattern: str) -> None:
    """'>' stands for everything that follows, so it is the last token."""
    with pytest.raises(InvalidName, match="only be its last token"):
        check_pattern(pattern)


@given(st.text())
def test_checks_with_any_text_raise_at_most_invalid_name(text: str) -> None:
    """Whatever the text, a check returns it or raises InvalidName."""
    for check in (check_name, check_address, check_topic, check_pattern):
        try:
            assert check(text) == text
        except InvalidName:
            continue


@pytest.mark.parametrize("ttl", [30.0, 30, 0.1, 1e-9, 1.0, 1])
def test_ttl_extension_is_written_as_any_other(ttl: float) -> None:
    extension = ttl_extension(ttl)

    assert extension == {"ttl": ttl}
    assert extension_part(extension) == extension_part({"ttl": ttl})
    assert extension_part({**extension, "a": 1}) == extension_part({"ttl": ttl, "a": 1})
