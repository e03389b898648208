"""Frames: written as the standard library writes them, and read one at a time under a
limit that each call gives.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.errors import BadLength, FrameError, FrameTooBig
from brokerd_client.wire.framing import MAX_SHORT, FrameReader, frame, frame_prefix, frame_span

LIMIT = 1 << 20


def long_frame(body: bytes) -> bytes:
    """Return the body in the form of a frame above 2 GiB, which any frame may take."""
    return struct.pack("!iQ", -1, len(body)) + body


def pull_all(reader: FrameReader, limit: int = LIMIT) -> list[bytes]:
    """Return every frame that is whole."""
    return list(iter(lambda: reader.next_frame(limit), None))


def fed_in_steps(data: bytes, step: int) -> list[bytes]:
    """Return the frames pulled while the bytes arrive ``step`` at a time."""
    reader = FrameReader()
    bodies = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        bodies += pull_all(reader)
    assert reader.buffered == 0
    return bodies


@pytest.fixture
def stock() -> Iterator[tuple[multiprocessing.connection.Connection, socket.socket]]:
    """A Connection of the standard library, and the raw other end of its stream."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    connection = multiprocessing.connection.Connection(theirs.detach())
    with ours, connection:
        yield connection, ours


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Return ``size`` bytes of the stream."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the stream ended early"
        data += piece
    return bytes(data)


@pytest.mark.parametrize("size", [0, 1, 255, 16384, 16385, 300_000])
def test_frame_equals_that_of_standard_library(
    stock: tuple[multiprocessing.connection.Connection, socket.socket], size: int
) -> None:
    """frame() and Connection.send_bytes write the same bytes."""
    connection, raw = stock
    body = os.urandom(size)
    sender = threading.Thread(target=connection.send_bytes, args=(body,))
    sender.start()

    written = receive_exactly(raw, size + 4)
    sender.join(30)

    assert frame(body) == written
    assert fed_in_steps(written, 4096) == [body]


@pytest.mark.parametrize("write", [frame, long_frame], ids=["short", "long"])
def test_frame_in_both_forms_is_read_by_standard_library(
    stock: tuple[multiprocessing.connection.Connection, socket.socket], write: type
) -> None:
    """Connection.recv_bytes reads our frames, in the short and in the long form."""
    connection, raw = stock

    raw.sendall(write(b"some bytes"))

    assert connection.recv_bytes() == b"some bytes"


def test_frame_long_form_begins_at_two_gib() -> None:
    """2 GiB - 1 is the last length of the short form."""
    assert frame_prefix(MAX_SHORT) == b"\x7f\xff\xff\xff"
    assert frame_prefix(MAX_SHORT + 1) == b"\xff\xff\xff\xff" + b"\x00\x00\x00\x00\x80\x00\x00\x00"


def test_frame_joins_its_parts() -> None:
    """The caller need not join the parts of a body, whatever bytes-like objects they
    are.
    """
    assert frame(b"ab", bytearray(b"cd"), memoryview(b"ef")) == b"\x00\x00\x00\x06abcdef"
    assert frame() == b"\x00\x00\x00\x00"


def test_frame_of_view_with_wider_items_counts_bytes() -> None:
    """The length of a memoryview of numbers is its size in bytes, not its count of
    numbers.
    """
    numbers = memoryview(struct.pack("4I", 1, 2, 3, 4)).cast("I")

    assert frame(numbers) == b"\x00\x00\x00\x10" + numbers.tobytes()


@pytest.mark.parametrize("step", [1, 3, 4096, 1 << 20])
@pytest.mark.parametrize("write", [frame, long_frame], ids=["short", "long"])
def test_frame_reader_in_pieces_returns_whole_frames(step: int, write: type) -> None:
    """Bytes may arrive in any pieces; the bodies come out the same, in order."""
    bodies = [b"", b"a", bytes(255), b"z" * 5000, b""]

    assert fed_in_steps(b"".join(map(write, bodies)), step) == bodies


@given(st.lists(st.tuples(st.binary(max_size=300), st.booleans())), st.integers(1, 400))
def test_frame_reader_any_frames_in_any_pieces_are_returned(
    bodies: list[tuple[bytes, bool]], step: int
) -> None:
    """Whatever the bodies and the pieces, nothing is lost, joined or invented."""
    data = b"".join(long_frame(body) if is_long else frame(body) for body, is_long in bodies)

    assert fed_in_steps(data, step) == [body for body, _ in bodies]


@given(st.lists(st.binary(max_size=64)), st.integers(0, 512))
def test_frame_reader_random_bytes_raise_only_frame_errors(pieces: list[bytes], limit: int) -> None:
    """Garbage gives frames within the limit, or a FrameError; nothing else."""
    reader = FrameReader()
    for piece in pieces:
        reader.feed(piece)
        try:
            assert reader.missing(limit) >= 0
            for body in pull_all(reader, limit):
                assert len(body) <= limit
        except FrameError:
            return


@given(st.binary(min_size=4, max_size=14).map(lambda tail: b"\xff\xff\xff" + tail))
def test_frame_reader_lengths_near_minus_1_raise_only_frame_errors(data: bytes) -> None:
    """Random bytes rarely give a length near -1, so this test does."""
    reader = FrameReader()
    reader.feed(data)
    try:
        body = reader.next_frame(LIMIT)
    except FrameError:
        return
    assert body is None or len(body) <= LIMIT


@pytest.mark.parametrize("length", [-2, -3, -256, -(2**31)])
def test_frame_reader_negative_length_is_refused(length: int) -> None:
    """No frame has a length below -1, though the standard library reads it as an empty
    message.
    """
    reader = FrameReader()
    reader.feed(struct.pack("!i", length))

    with pytest.raises(BadLength, match=str(length)):
        reader.next_frame(LIMIT)


@pytest.mark.parametrize("size", [101, MAX_SHORT, MAX_SHORT + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_frame_reader_above_limit_is_refused_by_length_alone(size: int) -> None:
    """The refusal waits for none of the body. It gives the announced length and the
    limit.
    """
    reader = FrameReader()
    reader.feed(frame_prefix(size))

    with pytest.raises(FrameTooBig) as caught:
        reader.next_frame(100)

    assert (caught.value.size, caught.value.limit) == (size, 100)
    with pytest.raises(FrameTooBig):
        reader.missing(100)


def test_frame_reader_applies_limit_of_each_call() -> None:
    """A large frame may lie behind a small one in the buffer while the limit is still
    small.
    """
    reader = FrameReader()
    reader.feed(frame(b"#WELCOME#") + frame(b"A" * 1000))

    assert reader.next_frame(256) == b"#WELCOME#"
    assert reader.next_frame(1000) == b"A" * 1000


@pytest.mark.parametrize("write", [frame, long_frame], ids=["short", "long"])
def test_frame_reader_missing_counts_down_to_whole_frame(write: type) -> None:
    """While a frame is incomplete, missing() is above 0 and at most the number of
    missing bytes.
    """
    data = write(b"0123456789")
    reader = FrameReader()
    for position in range(len(data)):
        assert 0 < reader.missing(LIMIT) <= len(data) - position
        assert reader.next_frame(LIMIT) is None
        reader.feed(data[position : position + 1])

    assert reader.missing(LIMIT) == 0
    assert reader.next_frame(LIMIT) == b"0123456789"
    assert reader.missing(LIMIT) == 4


def test_frame_reader_take_rest_returns_all_remaining_bytes() -> None:
    """take_rest() returns every byte behind the last frame, and keeps none."""
    reader = FrameReader()
    reader.feed(frame(b"mine") + b"\x00\x00\x00\x09not")
    assert reader.next_frame(LIMIT) == b"mine"

    assert reader.take_rest() == b"\x00\x00\x00\x09not"

    assert reader.buffered == 0
    reader.feed(frame(b"next"))
    assert reader.next_frame(LIMIT) == b"next"


def test_frame_reader_consumed_bytes_are_freed() -> None:
    """A reader that is never quite empty does not keep the frames that it has returned."""
    reader = FrameReader()
    one = frame(b"x" * 1000)
    reader.feed(one[:10])
    for _ in range(1000):
        reader.feed(one[10:] + one[:10])
        assert reader.next_frame(LIMIT) == b"x" * 1000

    assert reader.buffered == 10
    assert len(reader._buffer) <= FrameReader.COMPACT_ABOVE + 2 * len(one)


def test_frame_reader_body_is_copy_of_buffer() -> None:
    """A returned body does not change while the reader goes on."""
    reader = FrameReader()
    reader.feed(frame(b"first"))
    body = reader.next_frame(LIMIT)

    reader.feed(frame(b"SECOND"))

    assert body == b"first"


def test_frame_span_reads_within_its_bounds() -> None:
    """frame_span() reads between its bounds only, and returns the place and length of
    the body.
    """
    buffer = b"????" + frame(b"ab") + long_frame(b"cde")

    assert frame_span(buffer, 4, len(buffer)) == (8, 2)
    assert frame_span(buffer, 10, len(buffer)) == (22, 3)
    assert frame_span(buffer, 4, 7) is None
    assert frame_span(buffer, 10, 21) is None
