"""Both routing loops, fed the steps that the bytes describe: they agree on every byte,
call and counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from support.fuzz.script import Script, item
from support.loop_twins import HEADER, MAX_MESSAGE, agree, frame

ENTRIES = 8
TOPICS = ("t.>", "t.*", ">", "t", "$broker.>")
SEND, RAW, REPEAT, BLOCK, READ, ADVANCE, RECONNECT, SUBSCRIBE, STORE = range(9)
#: What one run may hold: more takes longer, and tells no more.
MOST_STEPS = 40


def target(data: bytes) -> None:
    """Play the script to both loops."""
    agree(steps(Script(data)))


def steps(script: Script) -> Iterator[tuple[Any, ...]]:
    """Yield the steps for ``Recorded.play``."""
    for _ in range(MOST_STEPS):
        if not script.left:
            return
        act, entry = divmod(script.number(), ENTRIES)
        match act % 9:
            case 0:
                bodies = [script.item() for _ in range(1 + script.number() % 8)]
                yield "send", entry, [frame(body) for body in bodies], 5000
            case 1:
                size = (1, 3, 100, 5000)[script.number() % 4]
                yield "send", entry, [script.item(2)], size
            case 2:
                yield "repeat", entry, frame(script.item()), 2 + script.number() % 60
            case 3:
                yield "block", entry, script.number()
            case 4:
                size = script.number()
                yield "read", entry, None if size == 255 else 2 * size
            case 5:
                yield "advance", (0.1, 5.0, 40.0)[script.number() % 3]
            case 6:
                yield "reconnect", entry
            case 7:
                group = ("", "", "g", "h")[script.number() % 4]
                yield "subscribe", entry, TOPICS[script.number() % len(TOPICS)], group
            case 8:
                yield "store", (1, 2, None)[entry % 3], None


def step(act: int, entry: int = 0, rest: bytes = b"") -> bytes:
    """Return the bytes of one step."""
    return bytes([act * ENTRIES + entry]) + rest


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield runs of ordinary frames, each followed by a step that ends the run."""
    message = HEADER.pack(1, 0, 9, 1, 7) + b"b" + b"x" * 30
    event = HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.x" + b"y" * 30
    whole = frame(message) * 5 + frame(event) * 5
    for size in range(4):
        yield f"ordinary-{size}", step(RAW, 0, bytes([size]) + item(whole, 2))
    odd = {
        "request": HEADER.pack(2, 0, 2, 1, 1) + b"b?",
        "reply": HEADER.pack(3, 0, 2, 1, 1) + b"a!",
        "error": HEADER.pack(4, 0, 2, 1, 1) + b"a{}",
        "receipt": HEADER.pack(1, 1, 0, 1, 2) + b"b",
        "ack": HEADER.pack(7, 0, 0, 0, 3),
        "extension": HEADER.pack(1, 2, 0, 1, 4) + b"b" + item(b'{"ttl":5}', 2) + b"x",
        "flags": HEADER.pack(1, 8, 0, 1, 5) + b"b",
        "kind": HEADER.pack(255, 0, 0, 0, 6),
        "nobody": HEADER.pack(1, 0, 0, 6, 7) + b"nobody",
        "pool": HEADER.pack(1, 0, 0, 4, 8) + b"pool" + b"p" * 40,
        "drops": HEADER.pack(1, 0, 0, 5, 8) + b"drops" + b"p" * 90,
        "slow": HEADER.pack(1, 0, 0, 4, 8) + b"slow" + b"p" * 90,
        "stored": HEADER.pack(1, 1, 0, 3, 8) + b"box" + b"p" * 90,
        "broker": HEADER.pack(2, 0, 2, 7, 8) + b'$broker{"op":"whoami"}',
        "name-beyond": HEADER.pack(1, 0, 0, 255, 9) + b"b",
        "topic-beyond": HEADER.pack(5, 0, 0, 0, 9) + b"\xfft.x",
        "topic-none": HEADER.pack(5, 0, 0, 0, 9),
        "topic-empty": HEADER.pack(5, 0, 0, 0, 9) + b"\0",
        "topic-named": HEADER.pack(5, 0, 0, 1, 9) + b"b\x03t.x",
        "exact": HEADER.pack(1, 0, 0, 1, 9) + b"b" + b"x" * MAX_MESSAGE,
        "short": b"\1\0\0\0",
        "empty": b"",
    }
    for name, body in odd.items():
        yield (
            f"odd-{name}",
            step(SEND, 0, bytes([2]) + item(message) + item(body) + item(message))
            + step(REPEAT, 1, item(body) + bytes([20])),
        )
    for name, stream in {
        "too-large": frame(HEADER.pack(1, 0, 0, 1, 9) + b"b" + b"x" * (MAX_MESSAGE + 1)),
        "announced": frame(message, length=2**31 - 1),
        "negative": frame(message, length=-5),
        "long": frame(message, long=True),
        "long-huge": frame(message, long=True, length=2**64 - 1),
        "cut": frame(message)[:20],
    }.items():
        yield (
            f"stream-{name}",
            step(RAW, 0, b"\3" + item(frame(message) + stream + frame(message), 2)),
        )
    full = (
        step(BLOCK, 1, b"\x05")
        + step(REPEAT, 0, item(message) + b"\x3b") * 2
        + step(ADVANCE, 0, b"\2")
    )
    yield "full", full + step(READ, 1, b"\x40") + step(READ, 1, b"\xff")
    yield "full-gone", full + step(RECONNECT, 1) + step(RECONNECT, 0)
    stored = step(REPEAT, 0, item(odd["stored"]) + b"\x05") + step(REPEAT, 1, item(message) + b"\5")
    yield "stored", stored + step(STORE, 0) + stored + step(STORE, 2)
    fanout = step(SUBSCRIBE, 2, b"\0") + step(SUBSCRIBE, 3, b"\2") + step(BLOCK, 2, b"\x01")
    yield (
        "fan",
        fanout
        + step(REPEAT, 0, item(event) + b"\x30")
        + step(READ, 2, b"\xff")
        + step(REPEAT, 6, item(event) + b"\x09"),
    )
