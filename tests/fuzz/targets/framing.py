"""FrameReader, compared with an independent reading of the same bytes in one piece."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from support.fuzz.script import Script

from brokerd_client.errors import BadLength, FrameTooBig
from brokerd_client.wire.framing import FrameReader, frame

LIMITS = (0, 16, 256, 5000)


def target(data: bytes) -> None:
    """Feed the bytes in steps: the frames and the refusal are the same as those of the
    whole.
    """
    script = Script(data)
    limit = LIMITS[script.number() % len(LIMITS)]
    steps = [1 + step for step in script.item()] or [1 << 20]
    stream = script.take(script.left)
    expected, refusal, consumed = read_in_one_piece(stream, limit)

    reader = FrameReader()
    got: list[bytes] = []
    error_name = ""
    fed = turn = 0
    while not error_name:
        try:
            missing = reader.missing(limit)
            body = reader.next_frame(limit)
            assert (body is not None) == (missing == 0)
            if body is not None:
                got.append(body)
                continue
            if fed == len(stream):
                break
            piece = stream[fed : fed + steps[turn % len(steps)]]
            reader.feed(piece)
            fed, turn = fed + len(piece), turn + 1
            # Nothing can be whole before what is missing has come.
            assert len(piece) >= missing or reader.missing(limit) > 0
        except (FrameTooBig, BadLength) as error:
            error_name = type(error).__name__
    assert got == expected
    assert error_name == refusal
    assert reader.take_rest() == stream[consumed:fed]
    assert read_in_one_piece(b"".join(map(frame, got)), limit) == (
        got,
        "",
        sum(4 + len(body) for body in got),
    )


def read_in_one_piece(stream: bytes, limit: int) -> tuple[list[bytes], str, int]:
    """Return the frames' bodies, the error behind them or "", and the offset of the
    first unread byte.
    """
    bodies: list[bytes] = []
    at = 0
    while len(stream) - at >= 4:
        (size,) = struct.unpack("!i", stream[at : at + 4])
        start = at + 4
        if size < -1:
            return bodies, "BadLength", at
        if size == -1:
            if len(stream) - at < 12:
                break
            (size,) = struct.unpack("!Q", stream[at + 4 : at + 12])
            start = at + 12
        if size > limit:
            return bodies, "FrameTooBig", at
        if len(stream) - start < size:
            break
        bodies.append(stream[start : start + size])
        at = start + size
    return bodies, "", at


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield real encodings, and the limits' edges."""
    bodies = [b"", b"x", b"#CHALLENGE#{sha256}" + bytes(40), b"y" * 255, b"z" * 256, b"w" * 257]
    whole = b"".join(map(frame, bodies))
    for limit in range(len(LIMITS)):
        yield f"all-{limit}", bytes([limit, 0]) + whole
        yield f"steps-{limit}", bytes([limit, 3, 0, 2, 50]) + whole
    long = struct.pack("!iQ", -1, 5) + b"12345"
    yield "long", bytes([2, 1, 0]) + long + frame(b"next")
    yield "long-huge", bytes([3, 0]) + struct.pack("!iQ", -1, 2**64 - 1) + b"xxx"
    yield "negative", bytes([3, 0]) + frame(b"one") + struct.pack("!i", -2)
    yield "least", bytes([3, 0]) + struct.pack("!i", -(2**31))
    yield "most", bytes([3, 1, 1]) + struct.pack("!i", 2**31 - 1) + b"abc"
    yield "many", bytes([3, 1, 200]) + frame(b"twenty bytes of text") * 60
    for cut in (1, 3, 4, 5):
        yield f"cut-{cut}", bytes([2, 0]) + frame(b"abcdef")[:cut]
