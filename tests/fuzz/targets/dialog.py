"""The library's receiving side: whatever a broker sends, every call has one outcome,
and the pieces make no difference.

The bytes describe the pending calls, and the broker's data: frames built from parts, or
arbitrary bytes. The same data is received twice, whole and in pieces; the results must
be the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from support.fuzz.script import Script, item

from brokerd_client.errors import (
    AuthenticationError,
    BrokerdError,
    Disconnected,
    ProtocolError,
    Refused,
)
from brokerd_client.message import Message, Receipt
from brokerd_client.protocol.dialog import Dialog, Effects
from brokerd_client.protocol.state import Event, State
from brokerd_client.wire.envelope import HEADER, Kind, split
from brokerd_client.wire.framing import FrameReader, frame

NONCE = bytes(range(40))
WHOAMI = b'{"name":"alice","address":"alice","limits":{"max_message":1000}}'
CALLS = 8
#: What one run may hold: more takes longer, and tells no more.
MOST_PIECES = 30
HANDSHAKE, INTRODUCTION, READY, RECONNECTED = range(4)
RAW, BUILT, ANNOUNCED = range(3)
NAMES = (b"$broker", b"bob", b"bob/1", b"carol", b"", b"\xff", b"x" * 64, b"a b")
TOPICS = (
    b"a.b",
    b"",
    b"$broker.online.bob",
    b"$broker.offline.carol",
    b"$broker.draining",
    b"\xff",
    b"x" * 255,
)
PAYLOADS = (
    b"",
    b"{}",
    WHOAMI,
    b'{"clients":[{"name":"bob","online":true,"since":1.5}]}',
    b'{"code":"denied","message":"no","name":"bob"}',
    b'{"code":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"name":"\\ud800","address":7}',
    b"[1]",
)
EXTENSIONS = (
    b"{}",
    b'{"ttl":5}',
    b"{",
    b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
    b'{"a":' + b"9" * 400 + b"}",
    b"[]",
)
#: What may end a connection.
ENDS = (AuthenticationError, ProtocolError, Disconnected)
GONE = Disconnected("cut")


class Owner:
    """A client that accepts no pickles."""

    allow_pickle_from: frozenset[str] = frozenset()
    json_codec = None


def target(data: bytes) -> None:
    """Play the script twice, and compare."""
    script = Script(data)
    stage, calls, step = script.number() % 4, script.take(script.number() % 6), 1 + script.number()
    pieces = [piece(script) for _ in range(MOST_PIECES) if script.left]
    whole = run(stage, calls, pieces, 10**9)
    cut = run(stage, calls, pieces, step)
    # What comes in one read with the broker's goodbye is taken in, and what comes later
    # is not.
    assert cut == whole or ("broken", Disconnected) in cut


def piece(script: Script) -> tuple[Any, ...]:
    """Return one piece of the broker's data, whose id is not known yet."""
    match script.number() % 3:
        case 0:
            return RAW, script.item()
        case 1:
            kind, flags, codec, which = script.take(4).ljust(4, b"\0")
            name, topic, extension, payload = script.take(4).ljust(4, b"\0")
            own = script.item() if payload >= 128 else PAYLOADS[payload % len(PAYLOADS)]
            inside = EXTENSIONS[extension % len(EXTENSIONS)]
            about = TOPICS[topic % len(TOPICS)]
            rest = bytes([len(about)]) + about if kind == Kind.EVENT else b""
            rest += len(inside).to_bytes(2, "big") + inside if flags & 2 else b""
            return BUILT, kind, flags, codec, which, NAMES[name % len(NAMES)], rest + own
        case _:
            return ANNOUNCED, script.number(4), script.item()


def data_of(pieces: list[tuple[Any, ...]], ids: list[int]) -> bytes:
    """Return the bytes of the pieces.

    Args:
        ids: Ids of the pending calls.
    """
    parts = []
    for kind, *fields in pieces:
        if kind == RAW:
            parts.append(fields[0])
        elif kind == ANNOUNCED:
            parts.append(fields[0].to_bytes(4, "big") + fields[1])
        else:
            number, flags, codec, which, name, rest = fields
            message_id = ids[which % len(ids)] if which < 200 else which
            parts.append(
                frame(HEADER.pack(number, flags, codec, len(name), message_id), name, rest)
            )
    return b"".join(parts)


def ready_dialog() -> Dialog[Message]:
    """Return an authenticated dialog."""
    dialog: Dialog[Message] = Dialog(b"key", "alice", 1000, Message)
    dialog.dialing(0.0)
    dialog.opened(NONCE)
    authenticated(dialog)
    return dialog


def authenticated(dialog: Dialog[Message]) -> None:
    """Do the last step of a handshake."""
    dialog._handshake = None
    dialog._step(Event.AUTHENTICATE)
    dialog._introduce()


def introduced(dialog: Dialog[Message]) -> None:
    """Let the broker answer with the client's name."""
    (message_id,) = (
        each.id for each in dialog.pending_calls.values() if each.purpose.name == "WHOAMI"
    )
    effects = dialog.receive(
        frame(HEADER.pack(3, 0, 2, 7, message_id), b"$broker", WHOAMI), Owner(), 0.0
    )
    assert effects.broken is None
    assert dialog.state is State.READY


def call(dialog: Dialog[Message], which: int, waiter: str) -> None:
    """Start a call, which is pending then."""
    match which % CALLS:
        case 0:
            dialog.request("bob", 0, b"", None, waiter, 5.0)
        case 1:
            dialog.send_for_receipt("bob", 0, b"", None, waiter, None)
        case 2:
            dialog.publish_for_receipt("a.b", 0, b"", None, waiter, None)
        case 3:
            dialog.control("ping", {}, waiter, None)
        case 4:
            dialog.control("clients", {}, waiter, 5.0)
        case 5:
            dialog.subscribe("a.>", None, waiter, waiter, None)
        case 6:
            dialog.subscribe(">", "g", waiter, waiter, None)
        case 7:
            dialog.watch(waiter, waiter, None)


def run(stage: int, calls: bytes, pieces: list[tuple[Any, ...]], step: int) -> list[Any]:
    """Return the results, in an order that does not depend on the pieces."""
    waiters = [f"{number} {which}" for number, which in enumerate(calls)] if stage >= READY else []
    if stage == HANDSHAKE:
        dialog: Dialog[Message] = Dialog(b"key", "alice", 1000, Message)
        dialog.dialing(0.0)
        dialog.opened(NONCE)
    else:
        dialog = ready_dialog()
    told: list[tuple[str, Any]] = []
    if stage >= READY:
        introduced(dialog)
        for which, waiter in zip(calls, waiters, strict=True):
            call(dialog, which, waiter)
    if stage == RECONNECTED:
        note(dialog.lost(GONE, 0.0, 0.5), told)
        dialog.dialing(0.0)
        dialog.opened(NONCE)
        authenticated(dialog)
    data = data_of(pieces, list(dialog.pending_calls) or [0])
    broken = None
    for start in range(0, len(data), step):
        effects = dialog.receive(data[start : start + step], Owner(), 1.0)
        note(effects, told)
        broken = effects.broken
        if broken is not None:
            assert isinstance(broken, ENDS)
            str(broken).encode()
            told.append(("broken", type(broken)))
            break
    assert dialog.name == "alice"
    written(dialog, stage)
    note(dialog.tick(10.0), told)
    assert all(each.deadline is None for each in dialog.pending_calls.values())
    note(dialog.lost(broken or GONE, 10.0, 0.5), told)
    assert len(dialog.pending_calls) == 0
    outcomes = Counter(waiter for what, waiter in told if what == "outcome")
    assert outcomes == Counter(waiters)
    # An answer of ours may be lost that has the id of something that was refused; when
    # that was heard of decides.
    counters = {name: count for name, count in dialog.counters.items() if name != "undelivered"}
    return [each for each in told if each[0] != "outcome"] + [counters]


def note(effects: Effects[Message], told: list[tuple[str, Any]]) -> None:
    """Note the parts of one call's effects, each of a kind that a face can pass on."""
    for waiter, value in effects.outcomes:
        assert isinstance(value, (Message, Receipt, dict, BrokerdError))
        told.append(("outcome", waiter))
    told.extend(
        ("message", (m.kind, m.id, m.sender, m.body, str(m.extension))) for m in effects.messages
    )
    for sink, found in effects.events:
        told.append((f"event {sink}", found.body if isinstance(found, Message) else found))
    for error in (*effects.undelivered, *effects.unreadable, *(why for _, why in effects.ended)):
        str(error).encode()
        if isinstance(error, Refused):
            error.name.encode()
    told.extend(("unreadable", str(error)) for error in effects.unreadable)
    # Those of one read come in an order of their own.
    told.sort(key=lambda each: each[0])


def written(dialog: Dialog[Message], stage: int) -> None:
    """Check that the dialog's output is frames that a broker accepts."""
    reader = FrameReader()
    reader.feed(dialog.data_to_send())
    while (body := reader.next_frame(2**20)) is not None:
        if stage != HANDSHAKE:
            split(body)
    assert not reader.buffered


def built(
    kind: int,
    which: int = 0,
    *,
    flags: int = 0,
    name: int = 0,
    rest: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """Return a piece of a script.

    Args:
        rest: Numbers of topic, extension and payload.
    """
    return bytes([BUILT, kind, flags, 2, which, name, *rest])


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield right and wrong answers to every kind of pending call, and frames that no
    broker sends.
    """
    every = bytes(range(CALLS))
    for payload in range(len(PAYLOADS)):
        pieces = b"".join(
            built(3, which, name=which % 2, rest=(0, 0, payload)) for which in range(8)
        )
        yield f"replies-{payload}", bytes([READY, 5]) + every[:5] + b"\x06" + pieces
        yield f"operations-{payload}", bytes([READY, 5]) + every[3:] + b"\x06" + pieces
        yield f"again-{payload}", bytes([RECONNECTED, 5]) + every[3:] + b"\x06" + pieces
        yield (
            f"introduction-{payload}",
            bytes([INTRODUCTION, 0, 3]) + built(3, 0, rest=(0, 0, payload)) * 2,
        )
        errors = b"".join(
            built(4, which, name=which % 2, rest=(0, 0, payload)) for which in range(8)
        )
        yield f"errors-{payload}", bytes([READY, 5]) + every[:5] + b"\x06" + errors
    yield (
        "receipts",
        bytes([READY, 3])
        + every[:3]
        + b"\x00"
        + b"".join(built(6, which) for which in range(3)) * 2,
    )
    for kind in range(10):
        extended = b"".join(
            built(kind, 0, flags=2, name=1, rest=(0, number, 1))
            for number in range(len(EXTENSIONS))
        )
        yield f"extensions-{kind}", bytes([READY, 3]) + every[:3] + b"\x0a" + extended
        named = b"".join(
            built(kind, 0, name=number, rest=(0, 0, 1)) for number in range(len(NAMES))
        )
        yield f"names-{kind}", bytes([READY, 3]) + every[:3] + b"\x0a" + named
    topics = b"".join(
        built(5, 0, name=number % 2, rest=(number, 0, 1)) for number in range(2 * len(TOPICS))
    )
    yield "topics", bytes([READY, 3]) + every[5:] + b"\x0a" + topics
    for name, length in {
        "negative": -2,
        "long": -1,
        "huge": 2**31 - 1,
        "short": 3,
        "none": 0,
    }.items():
        announced = (
            bytes([ANNOUNCED])
            + (length % 2**32).to_bytes(4, "big")
            + item(b"\x01\0\0\x03" + bytes(60))
        )
        yield (
            f"length-{name}",
            bytes([READY, 2]) + every[:2] + b"\x04" + built(1, 0, name=1) + announced * 2,
        )
    challenge = frame(b"#CHALLENGE#{sha256}" + bytes(40))
    for name, words in {
        "wrong": frame(b"#FAILURE#"),
        "http": b"HTTP/1.1 400",
        "welcome": frame(b"#WELCOME#"),
    }.items():
        yield f"handshake-{name}", bytes([HANDSHAKE, 0, 3, RAW]) + item(challenge + words)
    plain = frame(HEADER.pack(1, 0, 0, 3, 1) + b"bob" + b"x" * 10)
    yield (
        "run",
        bytes([READY, 0, 30, RAW]) + item(plain * 7) + bytes([RAW]) + item(plain * 3 + b"\0\0\0"),
    )
