"""docs/protocol.md is true: the library writes its bytes and agrees with its tables."""

from __future__ import annotations

import hmac
import json
import re
from pathlib import Path

import pytest

from brokerd_client.wire import handshake
from brokerd_client.wire.channel_binding import BROKER, CLIENT, END_POINT, bound_key, offer
from brokerd_client.wire.envelope import (
    CodecId,
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    encode,
    error_payload,
    parse,
)
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import Handshake, Proof, Send

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def example(label: str) -> list[tuple[str, bytes]]:
    """Return (side, bytes) of each message in the page's example of this label."""
    (block,) = re.findall(rf"```hex {label}\n(.*?)```", PAGE, re.DOTALL)
    messages = []
    for message in block.strip().split("\n\n"):
        side = message.partition(">")[0]
        # The bytes stand in columns 9 to 56, the remark behind them.
        messages.append(
            (side, b"".join(bytes.fromhex(line[9:57]) for line in message.splitlines()))
        )
    return messages


def conversation(key: bytes, bindings: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Return (side, bytes) of each message of a handshake with the page's nonces."""
    sides: dict[str, Handshake] = {
        "broker": handshake.as_listener(bytes(range(40)) + offer(bindings), named=True),
        "client": handshake.as_dialer(
            key, bytes(range(100, 140)), name=b"alice", bindings=bindings
        ),
    }
    waiting: dict[str, list[bytes]] = {"broker": [], "client": []}
    steps = {side: next(steps) for side, steps in sides.items()}
    transcript = []
    while steps:
        for side, other in (("broker", "client"), ("client", "broker")):
            while side in steps:
                step = steps[side]
                value = None
                if isinstance(step, Send):
                    transcript.append((side, frame(step.body)))
                    waiting[other].append(step.body)
                elif isinstance(step, Proof):
                    proof_key, value = key, key
                    if step.binding:
                        data = bindings[step.binding]
                        proof_key, value = (
                            bound_key(key, step.binding, data, direction)
                            for direction in (CLIENT, BROKER)
                        )
                    assert step.made_with(proof_key)
                elif waiting[side]:
                    value = waiting[side].pop(0)
                else:
                    break
                try:
                    steps[side] = sides[side].send(value)
                except StopIteration:
                    del steps[side]
    return transcript


def test_protocol_page_handshake_equals_library() -> None:
    """With the page's key and nonces, the library sends exactly the page's bytes, in
    the page's order.
    """
    assert example("handshake") == conversation(b"alice's key", {})


def test_protocol_page_bound_handshake_equals_library() -> None:
    """Over TLS, with the page's binding data: each byte, and both bound keys."""
    data = bytes(range(0xD0, 0xF0))
    assert example("bound handshake") == conversation(b"alice's key", {END_POINT: data})
    for direction in (CLIENT, BROKER):
        key = bound_key(b"alice's key", END_POINT, data, direction)
        assert f"| `{direction}` | `{key.hex()}` |" in PAGE


def test_protocol_page_handshakes_follow_from_its_text() -> None:
    """The page's bytes, computed from its sentences alone, as for a client in another
    language.
    """
    key, data = b"alice's key", bytes(range(0xD0, 0xF0))
    for label, bound in (("handshake", False), ("bound handshake", True)):
        bodies = [message[4:] for _, message in example(label)]
        keys = {}
        for direction in ("client", "broker"):
            text = (
                b"brokerd channel binding 2\0"
                + direction.encode()
                + b"\0tls-server-end-point\0"
                + data
            )
            keys[direction] = hmac.new(key, text, "sha256").digest() if bound else key
        first, second = (bodies[at].removeprefix(b"#CHALLENGE#") for at in (0, 3))
        mark = b"\0tls-server-end-point 2" if bound else b""
        assert first == b"{sha256}" + bytes(range(40)) + mark
        assert second == b"{sha256}" + bytes(range(100, 140)) + b"\0client"
        assert (
            bodies[1]
            == b"{sha256}" + hmac.new(keys["client"], first, "sha256").digest() + b"alice" + mark
        )
        assert bodies[4] == b"{sha256}" + hmac.new(keys["broker"], second, "sha256").digest()


def test_protocol_page_frames_equal_library() -> None:
    """The library encodes each frame of the page to the page's bytes."""
    envelopes = [
        ("client", Envelope(Kind.MESSAGE, 1, "bob", b"hello", flags=Flag.RECEIPT)),
        ("broker", Envelope(Kind.RECEIPT, 1, "$broker")),
        (
            "client",
            Envelope(
                Kind.EVENT, 2, "", b'{"n":7}', CodecId.JSON, topic="jobs.new", extension={"ttl": 60}
            ),
        ),
        (
            "broker",
            Envelope(
                Kind.ERROR,
                3,
                "$broker",
                error_payload(ErrorCode.OFFLINE, "bob is not connected", "bob"),
                CodecId.JSON,
            ),
        ),
    ]

    assert example("frames") == [(side, frame(encode(envelope))) for side, envelope in envelopes]


def test_protocol_page_mailbox_frames_equal_library() -> None:
    """The library encodes and parses the delivery and the ACKs of the page."""
    delivery = Envelope(Kind.MESSAGE, 7, "alice", b"hello", flags=Flag.ACK, seq=0x102, attempt=2)
    envelopes = [
        ("broker", delivery),
        ("client", Envelope(Kind.ACK, 0x102, flags=Flag.RECEIPT)),
        ("broker", Envelope(Kind.RECEIPT, 0x102, "$broker", flags=Flag.ACK)),
        ("client", Envelope(Kind.ACK, 0x103, "", b'{"verb":"failed"}', CodecId.JSON)),
    ]

    frames = example("mailbox")

    assert frames == [(side, frame(encode(envelope))) for side, envelope in envelopes]
    assert parse(frames[0][1][4:]) == delivery


def test_protocol_page_frames_are_parsed() -> None:
    """The library parses the page's bytes and finds what the page's remarks say."""
    reader = FrameReader()
    reader.feed(b"".join(data for _, data in example("frames")))
    bodies = list(iter(lambda: reader.next_frame(1000), None))

    parsed = [parse(body) for body in bodies]

    assert [envelope.kind for envelope in parsed] == [
        Kind.MESSAGE,
        Kind.RECEIPT,
        Kind.EVENT,
        Kind.ERROR,
    ]
    assert json.loads(parsed[-1].payload)["code"] == "offline"


@pytest.mark.parametrize("kind", Kind)
def test_protocol_page_lists_each_kind(kind: Kind) -> None:
    """A kind stands beside its number."""
    assert f"\n| {kind.value} | {kind.name} |" in PAGE


@pytest.mark.parametrize("flag", Flag)
def test_protocol_page_lists_each_flag(flag: Flag) -> None:
    """A flag stands beside its value."""
    assert f"{flag.value} {flag.name}" in PAGE


def test_protocol_page_lists_exactly_the_error_codes() -> None:
    """The page explains every code of an ERROR and no other."""
    tables = [
        PAGE.partition(head)[2].partition("\n\n")[0]
        for head in ("| code | meaning |", "| code | why the connection")
    ]
    codes = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]

    assert codes[0] + [code for code in codes[1] if code not in codes[0]] == [
        str(code) for code in ErrorCode
    ]


def test_protocol_page_lists_each_digest() -> None:
    """The page names every digest that a challenge may ask for."""
    assert all(f"`{digest}`" in PAGE for digest in handshake.DIGESTS)
