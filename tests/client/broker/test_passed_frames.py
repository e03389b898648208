"""Every rule that broker and library check separately: what the broker passes on, the
library accepts.

A frame goes from ann through a broker's core to bob, and the bytes that bob gets go to
the library's dialog.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dialog_pair import OWNER, Pair
from support.fake_network import FakeNet, client, error_of

from brokerd.core.broker import CoreLimits
from brokerd_client.errors import BrokerdError, Denied, InvalidName, PayloadError
from brokerd_client.message import Message
from brokerd_client.protocol.dialog import Effects
from brokerd_client.wire.envelope import HEADER, Envelope, Kind
from brokerd_client.wire.framing import frame

#: Payload bytes that this broker passes: an extension, which is a part of them, may
#: have any size.
MAX = 70_000


class Way:
    """The path of frames from ann to bob.

    Attributes:
        request_id: Id of bob's unanswered request to ann.
    """

    def __init__(self) -> None:
        self.net = FakeNet(client("ann"), client("bob"), limits=CoreLimits(max_message=MAX))
        self.ann, self.bob = self.net.connect("ann"), self.net.connect("bob")
        pair = Pair(name="bob", key=b"bob")
        pair.connect()
        self.dialog = pair.dialog
        self.dialog.subscribe(">", None, "sink", "subscription", None)
        self.request_id = self.dialog.request("ann", 0, b"?", None, "request", None)
        assert self.tell().broken is None
        self.ann.take()
        self.bob.take()

    def tell(self) -> Effects[Message]:
        """Pass on what bob's dialog has put out, and let it have the answers."""
        data = self.dialog.data_to_send()
        self.dialog.wrote(len(data))
        self.bob.send_bytes(data)
        return self.hear()

    def hear(self) -> Effects[Message]:
        """Let the dialog have what the system has taken for bob."""
        data = bytes(self.bob.stream)
        self.bob.stream.clear()
        return self.dialog.receive(data, OWNER, 0.0)

    def send(self, *bodies: bytes) -> list[Envelope]:
        """Send frames of ann's; return those that came out, after the library has
        accepted all of it.
        """
        for body in bodies:
            self.ann.send_bytes(frame(body))
        passed = self.bob.take()
        effects = self.hear()
        assert (effects.broken, effects.unreadable) == (None, [])
        messages = [
            (m.kind, m.id, m.sender, m.codec, m.body, m.topic, m.extension)
            for m in effects.messages
        ]
        events = [
            (m.kind, m.id, m.sender, m.codec, m.body, m.topic, m.extension)
            for _, m in effects.events
        ]
        outcomes = [value for _, value in effects.outcomes]
        for each in passed:
            fields = (
                each.kind,
                each.id,
                each.name,
                each.codec,
                each.payload,
                each.topic,
                each.extension,
            )
            if each.kind in (Kind.MESSAGE, Kind.REQUEST):
                assert messages.pop(0) == fields
            elif each.kind is Kind.EVENT:
                assert events.pop(0) == fields
            else:
                value = outcomes.pop(0)
                assert isinstance(value, Message if each.kind is Kind.REPLY else BrokerdError)
                got = value.id if isinstance(value, Message) else value.message_id
                assert got == each.id
        assert (messages, events, outcomes) == ([], [], [])
        # When ann is disconnected, the broker says that bob's request was abandoned.
        return [each for each in passed if each.name == "ann"]


def body(
    kind: int = 1,
    name: bytes = b"bob",
    *,
    flags: int = 0,
    codec: int = 0,
    message_id: int = 7,
    topic: bytes | None = None,
    extension: bytes | None = None,
    payload: bytes = b"payload",
) -> bytes:
    """Return a frame's body of any fields."""
    parts = [
        HEADER.pack(kind, flags | (0 if extension is None else 2), codec, len(name), message_id),
        name,
    ]
    if topic is not None:
        parts += (bytes([len(topic)]), topic)
    if extension is not None:
        parts += (len(extension).to_bytes(2, "big"), extension)
    return b"".join((*parts, payload))


def event(topic: bytes, **fields: Any) -> bytes:
    """Return an EVENT."""
    return body(5, b"", topic=topic, **fields)


def nested(levels: int) -> bytes:
    """Return an extension of so many levels."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


#: By rule: frames on the right side of it, which pass; and on the wrong one, with the
#: answer.
RULES: dict[str, tuple[list[bytes], list[tuple[bytes, str]]]] = {
    "kind": (
        [body(1), body(2), event(b"t")],
        [
            (body(6), "unsupported"),
            (body(7), "unsupported"),
            *((body(kind), "malformed") for kind in (0, 10, 11, 255)),
        ],
    ),
    "kind of an answer": ([], [(body(3, message_id=99), "denied")]),
    "flags": (
        [body(flags=1), body(flags=3, payload=b"\0\2{}")],
        [
            (body(flags=4), "unsupported"),
            *((body(flags=bit), "malformed") for bit in (8, 16, 32, 64, 128)),
        ],
    ),
    "codec": ([body(codec=codec) for codec in range(256)], []),
    "id": ([body(message_id=0), body(message_id=2**64 - 1)], []),
    "recipient": (
        [body(name=b"bob")],
        [
            (body(name=b"a" * 64), "no_such_client"),
            (body(name=b"bob/1"), "offline"),
            (body(name=b"$other"), "no_such_client"),
            *(
                (body(name=name), "malformed")
                for name in (b"", b"a" * 65, b"-a", b"a b", b"bob/", b"bob/A", b"\xff")
            ),
        ],
    ),
    "name of an event": ([], [(body(5, b"bob", topic=b"t"), "malformed")]),
    "topic": (
        [
            event(topic)
            for topic in (b"t", b"a.b", b"a" * 255, "é.ü".encode(), b" ", b"a\0b\n", b"-")
        ],
        [
            (event(b"$broker.x"), "denied"),
            *(
                (event(topic), "malformed")
                for topic in (
                    b"",
                    b".",
                    b"a.",
                    b".a",
                    b"a..b",
                    b"*",
                    b"a.>",
                    b"\xff",
                    b"\xed\xa0\x80",
                )
            ),
        ],
    ),
    "layout": (
        [body(payload=b""), body(extension=b"{}", payload=b"")],
        [
            (b"", "malformed"),
            (body()[:11], "malformed"),
            (body()[:13], "malformed"),
            (body(5, b"")[:12], "malformed"),
            (event(b"topic")[:15], "malformed"),
            (body(flags=2, payload=b"\0"), "malformed"),
            (body(flags=2, payload=b"\0\3{}"), "malformed"),
        ],
    ),
    "size": (
        [body(payload=b"x" * MAX), event(b"t", payload=b"x" * MAX)],
        [
            (body(payload=b"x" * (MAX + 1)), "too_large"),
            (event(b"t", payload=b"x" * (MAX + 256)), "too_large"),
        ],
    ),
    "extension's size": ([body(extension=b'{"a":"' + b"x" * 65527 + b'"}')], []),
    "extension's form": (
        [
            body(extension=text)
            for text in (
                b"{}",
                b' {"a" : null }\n',
                b'{"":""}',
                b'{"a":1,"a":2}',
                b'{"a":[{},[],{}]}',
            )
        ],
        [
            (body(extension=text), "malformed")
            for text in (
                b"",
                b"[]",
                b"1",
                b"null",
                b'"a"',
                b"{",
                b"{}{}",
                b"{'a':1}",
                b'{"a":01}',
                b'{"a":1,}',
                b"{}\0",
            )
        ],
    ),
    "extension's text": (
        [
            body(extension=text)
            for text in ('{"é":"\U0001f600"}'.encode(), b'{"\\ud800":"\\udc00\\u0000"}')
        ],
        [
            (body(extension=text), "malformed")
            for text in (
                b'{"a":"\xff"}',
                b'{"a":"\xed\xa0\x80"}',
                b"\xef\xbb\xbf{}",
                "{}".encode("utf-16"),
                b'{"a":"\n"}',
            )
        ],
    ),
    "extension's numbers": (
        [
            body(extension=b'{"a":' + number + b"}")
            for number in (
                b"-0",
                b"0.0",
                b"1e308",
                b"9" * 308,
                b"1" + b"0" * 308,
                b"1e-9999",
                b"0." + b"1" * 5000,
            )
        ],
        [
            (body(extension=b'{"a":' + number + b"}"), "malformed")
            for number in (
                b"NaN",
                b"Infinity",
                b"-Infinity",
                b"1e309",
                b"-1e400",
                b"9" * 309,
                b"-" + b"1" * 4000,
            )
        ],
    ),
    "extension's depth": (
        [
            body(extension=nested(32)),
            event(b"t", extension=nested(32)),
            body(2, extension=nested(32)),
        ],
        [(body(extension=nested(levels)), "unsupported") for levels in (33, 976, 30_000)],
    ),
    "ttl": (
        [body(extension=b'{"ttl":' + ttl + b"}") for ttl in (b"1", b"0.5", b"1e9", b"2147483647")],
        [
            (body(extension=b'{"ttl":0}'), "expired"),
            (body(extension=b'{"ttl":-1}'), "expired"),
            (body(extension=b'{"ttl":1' + b"0" * 3999 + b"}"), "malformed"),
            *(
                (body(extension=b'{"ttl":' + ttl + b"}"), "unsupported")
                for ttl in (b"2147483648", b"1e300", b'"5"', b"true", b"null", b"[5]", b"{}")
            ),
        ],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_frame_limit_is_equal_in_broker_and_library(rule: str) -> None:
    """Up to its limit a frame arrives in the library; beyond it the sender gets an
    answer, the recipient nothing.
    """
    right, wrong = RULES[rule]
    way = Way()
    passed = way.send(*right)
    assert len(passed) == len(right)
    for frame_body, code in wrong:
        way = Way()
        assert way.send(frame_body) == []
        assert [error_of(each) for each in way.ann.take()] == [code]
        assert bool(way.ann.gone) is (code == "malformed")


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("codec", [0, 1, 2, 3, 4, 255])
@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[" * 900 + b"]" * 900, b'{"code":' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_answer_with_any_payload_is_passed(kind: int, codec: int, payload: bytes) -> None:
    """The broker does not read a payload, and no payload ends a connection in the
    library.
    """
    way = Way()
    extension = nested(32)
    assert (
        len(
            way.send(
                body(
                    kind,
                    message_id=way.request_id,
                    codec=codec,
                    payload=payload,
                    extension=extension,
                )
            )
        )
        == 1
    )


JSON_TEXT = st.recursive(
    st.sampled_from(
        [
            "null",
            "true",
            '"a"',
            '"\\ud800"',
            '"[{"',
            "NaN",
            "-0",
            "1e308",
            "1e309",
            "00",
            "\ufeff",
            "",
        ]
    )
    | st.integers(0, 700).map(lambda digits: "9" * (digits + 1))
    | st.floats().map(repr)
    | st.text(max_size=4).map(json.dumps),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{','.join(each)}]")
        | st.lists(inner, max_size=3).map(
            lambda each: "{" + ",".join(f'"{n % 2}":{it}' for n, it in enumerate(each)) + "}"
        )
        | st.tuples(inner, st.integers(1, 35)).map(
            lambda pair: "[" * pair[1] + pair[0] + "]" * pair[1]
        )
    ),
    max_leaves=6,
)
EXTENSIONS = (
    st.none()
    | JSON_TEXT.map(lambda text: f'{{"a":{text}}}'.encode(errors="surrogatepass"))
    | JSON_TEXT.map(lambda text: f'{{"ttl":{text}}}'.encode(errors="surrogatepass"))
    | st.integers(1, 65535).map(lambda size: b'{"a":"' + b"x" * max(0, size - 8) + b'"}')
    | st.binary(max_size=8)
)
BODIES = st.builds(
    body,
    st.sampled_from([1, 2, 5]) | st.integers(0, 9),
    st.sampled_from([b"bob", b""]) | st.binary(max_size=6) | st.text(max_size=3).map(str.encode),
    flags=st.sampled_from([0, 1]) | st.integers(0, 15),
    codec=st.integers(0, 255),
    message_id=st.integers(0, 2**64 - 1),
    topic=st.none() | st.text(max_size=4).map(str.encode) | st.binary(max_size=3),
    extension=EXTENSIONS,
    payload=st.binary(max_size=8) | st.integers(MAX - 400, MAX + 400).map(bytes),
)


@given(st.lists(BODIES, min_size=1, max_size=3))
def test_frame_passed_by_broker_is_accepted_by_library(bodies: list[bytes]) -> None:
    """Whatever ann sends, and though the recipient's interpreter allows less than the
    broker's does.
    """
    way = Way()
    allowed = sys.get_int_max_str_digits()
    hear = way.hear

    def hear_with_less() -> Effects[Message]:
        sys.set_int_max_str_digits(640)
        return hear()

    way.hear = hear_with_less  # type: ignore[method-assign]
    sys.set_int_max_str_digits(0)
    try:
        way.send(*bodies)
    finally:
        sys.set_int_max_str_digits(allowed)


def test_extension_of_greatest_depth_needs_little_stack() -> None:
    """A recipient that allows no deep recursion still reads it."""
    way = Way()
    limit = sys.getrecursionlimit()
    way.ann.send_bytes(
        frame(body(extension=nested(32))) + frame(body(extension=nested(32).replace(b"[]", b"{}")))
    )
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        effects = way.hear()
    finally:
        sys.setrecursionlimit(limit)
    assert (len(effects.messages), effects.unreadable) == (2, [])


TOKENS = st.text(max_size=3) | st.sampled_from(["a", "*", ">", "$broker", "\ud800", "é" * 130])


@given(st.lists(TOKENS, min_size=1, max_size=4).map(".".join), st.none() | TOKENS)
def test_subscription_pattern_sent_by_library_is_accepted(pattern: str, group: str | None) -> None:
    """Patterns and groups are checked on both sides, by the same rules."""
    way = Way()
    try:
        message_id, _ = way.dialog.subscribe(pattern, group, "more", "w", None)
    except InvalidName:
        assert not way.dialog.data_to_send()
        return
    [(waiter, answer)] = way.tell().outcomes
    assert message_id
    assert waiter == "w"
    assert answer == {"topic": pattern, "group": group} or isinstance(answer, Denied)


@given(
    st.sampled_from(["send", "publish"]),
    st.lists(TOKENS, min_size=1, max_size=3).map(".".join),
    st.none()
    | st.dictionaries(
        st.text(max_size=2),
        st.recursive(st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4),
    ),
    st.binary(max_size=4),
)
def test_frame_sent_by_library_is_not_malformed(
    how: str, to: str, extension: dict[str, Any] | None, payload: bytes
) -> None:
    """A frame that the library does not refuse itself never ends its connection at the
    broker.
    """
    way = Way()
    try:
        getattr(way.dialog, how)(to, 0, payload, extension)
    except (InvalidName, PayloadError):
        assert not way.dialog.data_to_send()
        return
    effects = way.tell()
    assert {error.code for error in effects.undelivered if hasattr(error, "code")} <= {
        "no_such_client",
        "denied",
        "offline",
        "unsupported",
    }
    assert not way.bob.gone
