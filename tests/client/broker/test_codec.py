"""Payloads to bytes and back."""

from __future__ import annotations

import enum
import json
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client._compat import StrEnum
from brokerd_client.codec import Encoded, decode, encode
from brokerd_client.errors import PayloadError, UndecodablePayload
from brokerd_client.json_codec import JsonCodec
from brokerd_client.message import Message, with_options
from brokerd_client.topics import has_wildcard, matches
from brokerd_client.wire.layout import CodecId


class TextKey(StrEnum):
    A = "a"


class Number(enum.IntEnum):
    ONE = 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_codec_json_round_trip_is_equal(payload: object) -> None:
    """Whatever JSON can say comes back as it was."""
    number, body = encode(payload)
    assert number == 2
    assert decode(number, body) == payload


@pytest.mark.parametrize("payload", [b"x", bytearray(b"x"), memoryview(b"x")])
def test_codec_raw_returns_bytes(payload: object) -> None:
    """Bytes-like payloads are raw, without a codec and by its name, and come back as
    bytes.
    """
    assert encode(payload) == encode(payload, "raw") == encode(payload, 0) == (0, b"x")
    assert decode(0, b"x") == decode(255, b"x") == b"x"
    assert encode(payload, 128) == (128, b"x")


@pytest.mark.parametrize(
    "payload", [{1, 2}, object(), 1j, [object()], {"a": b"bytes"}, float("nan"), "\ud800"]
)
def test_codec_missing_for_payload_names_pickle(payload: object) -> None:
    """Nothing is converted implicitly: the error names the codec that could carry the
    payload.
    """
    with pytest.raises(PayloadError, match="pickle"):
        encode(payload)


def test_codec_missing_for_tuple_names_list_and_json() -> None:
    """A tuple alone is refused for the same reason, and with the same remedy, as one in a
    list.
    """
    for payload in ((1, 2), [(1, 2)]):
        with pytest.raises(PayloadError, match=r"a tuple would become a list.*codec='json'"):
            encode(payload)
    assert encode((1, 2), "json") == (CodecId.JSON, b"[1,2]")


@pytest.mark.parametrize("codec", ["yaml", 4, 127, 256, -1])
def test_codec_reserved_or_unknown_raises(codec: str | int) -> None:
    """Reserved numbers and unknown names are refused, and the error lists the known
    ones.
    """
    with pytest.raises(PayloadError, match="128 to 255"):
        encode(b"", codec)


@pytest.mark.parametrize("codec", ["raw", 200])
def test_codec_of_bytes_refuses_text(codec: str | int) -> None:
    """A text is not turned into bytes by guessing."""
    with pytest.raises(PayloadError, match="takes bytes, not str"):
        encode("text", codec)


def test_codec_encoded_payload_is_sent_as_it_is() -> None:
    """A payload that is encoded already keeps its codec, whatever the client's own is."""
    for own in (None, JsonCodec()):
        assert encode(Encoded(200, b"body"), None, own) == (200, b"body")


def test_codec_pickle_needs_name_and_permission() -> None:
    """A pickle is written by name and read by permission."""
    number, body = encode({1, 2}, "pickle")
    assert decode(number, body, allow_pickle=True) == {1, 2}
    with pytest.raises(UndecodablePayload, match="allow_pickle_from"):
        decode(number, body)
    with pytest.raises(UndecodablePayload):
        decode(number, b"no pickle", allow_pickle=True)
    with pytest.raises(PayloadError):
        encode(lambda: None, "pickle")


@pytest.mark.parametrize(
    ("codec", "body"), [(2, b"{"), (2, b"\xff"), (2, b"[" * 100_000), (4, b""), (127, b"")]
)
def test_codec_undecodable_body_raises(codec: int, body: bytes) -> None:
    """The error is UndecodablePayload, whatever the reason."""
    with pytest.raises(UndecodablePayload):
        decode(codec, body)


def test_codec_msgpack_missing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package both directions say what is missing."""
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(PayloadError, match="msgpack package"):
        encode({}, "msgpack")
    with pytest.raises(UndecodablePayload, match="msgpack package"):
        decode(3, b"")


def test_codec_msgpack_installed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package both directions use it, and its errors become the library's."""

    def fail(payload: object) -> bytes:
        raise TypeError("no")

    module = types.SimpleNamespace(
        packb=lambda payload: b"packed", unpackb=lambda body: ["unpacked"]
    )
    monkeypatch.setitem(sys.modules, "msgpack", module)
    assert encode({}, "msgpack") == (3, b"packed")
    assert decode(3, b"packed") == ["unpacked"]
    module.packb = module.unpackb = fail
    with pytest.raises(PayloadError):
        encode({}, "msgpack")
    with pytest.raises(UndecodablePayload):
        decode(3, b"")


class Owner:
    """A client that trusts bob."""

    allow_pickle_from = frozenset({"bob"})
    json_codec = None


def test_message_payload_is_decoded_once_and_lazily() -> None:
    """A broken payload raises only when it is read; a good one is decoded at the first
    access.
    """
    broken = Message(1, 7, "bob", 2, b"{", Owner())
    assert (broken.id, broken.body, len(broken), bool(Message(1, 0, "bob", 0, b"", Owner()))) == (
        7,
        b"{",
        1,
        True,
    )
    with pytest.raises(UndecodablePayload):
        _ = broken.payload
    good = Message(1, 7, "bob", 2, b"[1]", Owner())
    assert good.payload is good.payload


@pytest.mark.parametrize(
    ("sender", "trusted"), [("bob", True), ("bob/x1", True), ("bobby", False), ("alice", False)]
)
def test_message_pickle_trust_is_by_client_name(sender: str, trusted: bool) -> None:
    """Every connection of a trusted name is trusted, and no other name."""
    number, body = encode((1, 2), "pickle")
    message = Message(1, 0, sender, number, body, Owner())
    if trusted:
        assert message.payload == (1, 2)
    else:
        with pytest.raises(UndecodablePayload):
            _ = message.payload


def test_message_text_reads_utf8_and_json_strings() -> None:
    """text() reads raw UTF-8 and JSON strings, and refuses other payloads."""
    assert Message(1, 0, "bob", 0, "ä".encode(), Owner()).text() == "ä"
    assert Message(1, 0, "bob", 2, b'"\\u00e4"', Owner()).text() == "ä"
    assert Message(1, 0, "bob", 2, b"[1]", Owner()).text() == "[1]"
    with pytest.raises(UndecodablePayload):
        Message(1, 0, "bob", 0, b"\xff", Owner()).text()


def test_message_repr_shows_no_body() -> None:
    """A message in a log shows sender and size, not its content."""
    shown = repr(Message(5, 7, "bob", 0, b"secret", Owner(), "a.b"))
    assert "secret" not in shown
    assert all(word in shown for word in ("EVENT", "7", "bob", "a.b", "6 bytes"))


def test_send_ttl_is_added_to_extension() -> None:
    """The caller's own keys stay."""
    given_extension = {"k": 1}
    assert with_options(given_extension, 2.5) == {"k": 1, "ttl": 2.5}
    assert given_extension == {"k": 1}
    assert (with_options(None, None), with_options(None, 0)) == (None, {"ttl": 0})
    with pytest.raises(ValueError, match="seconds"):
        with_options(None, -1)


def test_send_options_of_mailbox_are_added_to_extension() -> None:
    """A key and a delay that the broker would refuse are refused here."""
    assert with_options({"a": 1}, 2, "k", 0.5) == {"a": 1, "ttl": 2, "key": "k", "delay": 0.5}
    assert with_options(None, None, "k") == {"key": "k"}
    assert with_options(None, None, None, 0) == {"delay": 0}
    for key in ("", "k" * 65, b"k", 7):
        with pytest.raises(ValueError, match="1 to 64 bytes"):
            with_options(None, None, key)  # type: ignore[arg-type]
    for delay in (-1, 2_592_001, "5", True):
        with pytest.raises(ValueError, match="from 0 to 2592000"):
            with_options(None, None, None, delay)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        (">", "a", True),
        (">", "a.b.c", True),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("a.*.>", "a.b", False),
        ("a.*.>", "a.b.c", True),
        ("a*", "ab", False),
    ],
)
def test_topic_pattern_matches_tokens(pattern: str, topic: str, fits: bool) -> None:
    """``*`` is one token, a final ``>`` one or more; anything else is itself."""
    assert matches(pattern, topic) is fits
    assert has_wildcard(pattern) is (pattern not in ("a.b", "a*"))


@pytest.mark.parametrize("codec", [None, "raw", 200])
@pytest.mark.parametrize(
    "view",
    [
        memoryview(bytes(range(12))).cast("B", (3, 4)),
        memoryview(bytes(range(96))).cast("d", (3, 4)),
        memoryview(bytes(range(24)))[::2],
    ],
    ids=["rows of bytes", "rows of numbers", "gaps"],
)
def test_codec_buffer_of_any_shape_is_encoded_whole(
    view: memoryview, codec: str | int | None
) -> None:
    """A payload may have several dimensions, longer items, and gaps, which are left
    out.
    """
    assert encode(view, codec)[1] == view.tobytes()


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({1: "a"}, "the key 1 would become text"),
        ({None: "a"}, "the key None would become text"),
        ([1, (2, 3)], "a tuple would become a list"),
        ({"a": [{"b": [{"c": (1,)}]}]}, "a tuple would become a list"),
        ({"a": {"b": {2.5: 1}}}, "the key 2.5 would become text"),
    ],
)
def test_encode_payload_that_json_would_change_raises_unless_asked_for(
    payload: Any, says: str
) -> None:
    with pytest.raises(PayloadError, match=says):
        encode(payload)
    number, body = encode(payload, "json")
    assert number == CodecId.JSON
    assert json.loads(body) != payload


@pytest.mark.parametrize(
    "payload",
    [
        {},
        [],
        {"a": [1, 2.5, None, True, {"b": ["c", []]}]},
        {TextKey.A: 1},
        OrderedDict(a=[Number.ONE]),
    ],
)
def test_encode_payload_that_json_keeps_returns_json(payload: Any) -> None:
    """Subclasses arrive as the plain values that they are equal to."""
    assert json.loads(encode(payload)[1]) == payload
