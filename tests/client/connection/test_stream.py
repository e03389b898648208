"""Connection: messages, limits, threads, and what happens when a frame is cut off.

Pipe and wait.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from brokerd_client.connection import (
    BadMessageLength,
    BufferTooShort,
    Closed,
    Connection,
    MessageTooBig,
    Pipe,
    wait,
)
from brokerd_client.errors import BadLength, FrameTooBig

TIMEOUT_S = 30


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    one, other = Pipe()
    with one, other:
        yield one, other


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare socket and the connection that hears it; messages above 1000 bytes are
    refused.
    """
    sock, peer = socket.socketpair()
    with sock, Connection(peer.detach(), max_message=1000) as connection:
        yield sock, connection


# Messages.


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 256 * 1024, 256 * 1024 + 1, 5_000_000])
def test_connection_message_arrives_whole(pair: tuple[Connection, Connection], size: int) -> None:
    """A message of any size, around every size at which the way of sending or receiving
    changes, arrives unchanged.
    """
    one, other = pair
    body = os.urandom(size)
    sender = threading.Thread(target=lambda: (one.send_bytes(body), one.send(body)))
    sender.start()
    assert other.recv_bytes() == body
    assert other.recv() == body
    sender.join()


def test_connection_frames_are_those_of_the_standard_library(
    raw: tuple[socket.socket, Connection],
) -> None:
    """A message is its length, four bytes in network order, and its bytes; nothing
    more.
    """
    sock, connection = raw
    connection.send_bytes(b"hello")
    assert sock.recv(100) == b"\0\0\0\5hello"
    sock.sendall(b"\0\0\0\2hi")
    assert connection.recv_bytes() == b"hi"


def test_recv_bytes_long_form_of_the_length_is_read(raw: tuple[socket.socket, Connection]) -> None:
    """A length of -1 is followed by a 64-bit one, even where the short form would have
    done.
    """
    sock, connection = raw
    sock.sendall(struct.pack("!iQ", -1, 5) + b"hello")
    assert connection.recv_bytes() == b"hello"


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [((), b"abcdef"), ((2,), b"cdef"), ((2, 3), b"cde"), ((6,), b""), ((6, 0), b""), ((0, 0), b"")],
)
def test_send_bytes_part_of_a_buffer_is_sent(
    pair: tuple[Connection, Connection], arguments: tuple[int, ...], sent: bytes
) -> None:
    """send_bytes(buf, offset, size) sends that part of the buffer."""
    one, other = pair
    one.send_bytes(b"abcdef", *arguments)
    assert other.recv_bytes() == sent


@pytest.mark.parametrize("arguments", [(7,), (2, 5), (6, 1), (-1,), (2, -1)])
def test_send_bytes_part_outside_the_buffer_is_refused(
    pair: tuple[Connection, Connection], arguments: tuple[int, ...]
) -> None:
    """A part that is not wholly inside the buffer is a ValueError, and nothing is sent."""
    one, other = pair
    with pytest.raises(ValueError, match=r"offset|size"):
        one.send_bytes(b"abcdef", *arguments)
    assert not other.poll()


def test_recv_bytes_into_array_is_filled(pair: tuple[Connection, Connection]) -> None:
    """recv_bytes_into fills any writable buffer, offset counted in bytes, and returns
    the size in bytes.
    """
    one, other = pair
    numbers = array("i", [1, 2, 3, 4, 5])
    one.send_bytes(array("i", [42, 1729]))
    assert other.recv_bytes_into(numbers, 2 * numbers.itemsize) == 2 * numbers.itemsize
    assert numbers.tolist() == [1, 2, 42, 1729, 5]


def test_recv_bytes_into_large_message_is_read_in_place(
    pair: tuple[Connection, Connection],
) -> None:
    """A message that comes in many pieces fills the buffer from front to back."""
    one, other = pair
    body = os.urandom(3_000_000)
    buffer = bytearray(3_000_010)
    sender = threading.Thread(target=one.send_bytes, args=(body,))
    sender.start()
    assert other.recv_bytes_into(buffer, 7) == len(body)
    sender.join()
    assert buffer == bytes(7) + body + bytes(3)


def test_recv_bytes_into_short_buffer_keeps_the_message(
    pair: tuple[Connection, Connection],
) -> None:
    """BufferTooShort, the standard library's too, carries the whole message, and the
    next one can be received.
    """
    one, other = pair
    one.send_bytes(b"x" * 50)
    one.send_bytes(b"next")
    with pytest.raises(multiprocessing.BufferTooShort) as caught:
        other.recv_bytes_into(bytearray(60), 11)
    assert isinstance(caught.value, BufferTooShort)
    assert caught.value.args == (b"x" * 50,)
    assert other.recv_bytes() == b"next"


def test_recv_bytes_into_unfit_buffer_is_refused_before_a_read(
    pair: tuple[Connection, Connection],
) -> None:
    """A read-only buffer or an offset outside it costs no message."""
    one, other = pair
    one.send_bytes(b"kept")
    with pytest.raises(TypeError, match="writable"):
        other.recv_bytes_into(b"read-only")
    for offset in (-1, 11):
        with pytest.raises(ValueError, match="offset"):
            other.recv_bytes_into(bytearray(10), offset)
    with pytest.raises(ValueError, match="maxlength"):
        other.recv_bytes(-1)
    assert other.recv_bytes() == b"kept"


def test_connection_old_names_do_the_same(pair: tuple[Connection, Connection]) -> None:
    """sendBytes, recvBytes and recvBytesInto are the forerunner's names."""
    one, other = pair
    one.sendBytes(b"hello", 1, 3)
    assert other.recvBytes() == b"ell"
    one.sendBytes(b"hello")
    buffer = bytearray(5)
    assert other.recvBytesInto(buffer) == 5
    assert buffer == b"hello"


# Limits.


@pytest.mark.parametrize(
    "announced",
    [struct.pack("!i", 1001), struct.pack("!iQ", -1, 1001), struct.pack("!iQ", -1, 2**64 - 1)],
)
def test_max_message_larger_message_is_refused_unread(
    raw: tuple[socket.socket, Connection], announced: bytes
) -> None:
    """More than max_message is refused on its announcement alone, with an OSError that
    tells both sizes.
    """
    sock, connection = raw
    sock.sendall(announced)
    with pytest.raises(MessageTooBig, match="at most 1000") as caught:
        connection.recv_bytes()
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, FrameTooBig)
    assert caught.value.limit == 1000
    assert not connection.readable
    with pytest.raises(OSError, match="can't receive"):
        connection.recv_bytes()
    connection.send_bytes(b"still")
    assert sock.recv(100) == b"\0\0\0\5still"


def test_max_message_largest_message_is_accepted(raw: tuple[socket.socket, Connection]) -> None:
    """max_message itself is not too large."""
    sock, connection = raw
    sock.sendall(struct.pack("!i", 1000) + bytes(1000))
    assert len(connection.recv_bytes()) == 1000


@pytest.mark.parametrize(
    "receive",
    [Connection.recv, lambda c: c.recv_bytes(2000), lambda c: c.recv_bytes_into(bytearray(4000))],
)
def test_max_message_holds_for_every_way_to_receive(
    raw: tuple[socket.socket, Connection], receive: Any
) -> None:
    """recv, recv_bytes with a larger limit of its own, and recv_bytes_into all refuse
    what is above max_message.
    """
    sock, connection = raw
    sock.sendall(struct.pack("!i", 1500))
    with pytest.raises(MessageTooBig):
        receive(connection)


def test_recv_bytes_maxlength_is_obeyed(raw: tuple[socket.socket, Connection]) -> None:
    """recv_bytes(maxlength) refuses more, and accepts just that."""
    sock, connection = raw
    sock.sendall(b"\0\0\0\4fine\0\0\0\5short")
    assert connection.recv_bytes(4) == b"fine"
    with pytest.raises(OSError, match="at most 4"):
        connection.recv_bytes(4)


def test_recv_bytes_huge_announcement_takes_no_memory() -> None:
    """With no limit, an announced exabyte is waited for, not allocated."""
    sock, peer = socket.socketpair()
    with sock, Connection(peer.detach()) as connection:
        sock.sendall(struct.pack("!iQ", -1, 2**60) + b"only this")
        sock.close()
        with pytest.raises(OSError, match="end of file during message"):
            connection.recv_bytes()


@pytest.mark.parametrize("length", [-2, -1000, -(2**31)])
def test_recv_bytes_impossible_length_is_refused(
    raw: tuple[socket.socket, Connection], length: int
) -> None:
    """A length below -1 is an error, where the standard library takes it for an empty
    message.
    """
    sock, connection = raw
    sock.sendall(struct.pack("!i", length) + b"whatever")
    with pytest.raises(BadMessageLength, match=str(length)) as caught:
        connection.recv_bytes()
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, BadLength)
    assert not connection.readable


def test_max_message_negative_is_refused() -> None:
    """A max_message below 0 is a ValueError."""
    sock, peer = socket.socketpair()
    with sock, peer, pytest.raises(ValueError, match="max_message"):
        Connection(peer.fileno(), max_message=-1)


# Ends.


def test_recv_closed_peer_raises_eoferror(raw: tuple[socket.socket, Connection]) -> None:
    """After its last message a closed peer is EOFError; poll() tells that there is
    something to learn.
    """
    sock, connection = raw
    sock.sendall(b"\0\0\0\4last")
    sock.close()
    assert connection.recv_bytes() == b"last"
    assert connection.poll()
    with pytest.raises(EOFError):
        connection.recv_bytes()
    with pytest.raises(EOFError):
        connection.recv()
    with pytest.raises(EOFError):
        connection.recv_bytes_into(bytearray(10))


@pytest.mark.parametrize("part", [b"\0", b"\0\0\0\5", b"\0\0\0\5half", b"\xff\xff\xff\xff\0"])
def test_recv_peer_closed_within_a_message_raises_oserror(
    raw: tuple[socket.socket, Connection], part: bytes
) -> None:
    """A peer that goes in the middle of a message is an OSError, not the end of it."""
    sock, connection = raw
    sock.sendall(part)
    sock.close()
    with pytest.raises(OSError, match="end of file during message"):
        connection.recv_bytes()


def test_recv_bytes_into_peer_closed_within_a_message_raises_oserror(
    raw: tuple[socket.socket, Connection],
) -> None:
    """The same for a message that is received into a buffer."""
    sock, connection = raw
    sock.sendall(b"\0\0\0\5half")
    sock.close()
    with pytest.raises(OSError, match="end of file during message"):
        connection.recv_bytes_into(bytearray(10))


def test_connection_closed_raises_closed(pair: tuple[Connection, Connection]) -> None:
    """Everything on a closed connection raises Closed, an OSError; closing again does
    nothing.
    """
    one, _ = pair
    one.close()
    one.close()
    assert one.closed
    for use in (
        one.recv,
        one.recv_bytes,
        one.poll,
        one.fileno,
        lambda: one.send(1),
        lambda: one.send_bytes(b"x"),
    ):
        with pytest.raises(Closed, match="closed"):
            use()
    with pytest.raises(Closed):
        one.recv_bytes_into(bytearray(5))


def test_connection_garbage_collected_is_closed() -> None:
    """The descriptor of a connection without references is closed, without a warning,
    and the peer sees the end.
    """
    one, other = Pipe()
    del one
    with other, pytest.raises(EOFError):
        other.recv()


def test_pipe_one_way_sends_and_receives() -> None:
    """Pipe(duplex=False) gives a reader and a writer, and each refuses the other's
    work.
    """
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        assert (reader.readable, reader.writable) == (True, False)
        assert (writer.readable, writer.writable) == (False, True)
        writer.send(["x"])
        assert reader.recv() == ["x"]
        with pytest.raises(OSError, match="can't send"):
            reader.send(1)
        with pytest.raises(OSError, match="can't receive"):
            writer.poll()


def test_connection_read_only_refused_message_closes_it() -> None:
    """A connection that can only receive is of no more use after a bad message, so it
    closes.
    """
    read, write = os.pipe()
    os.write(write, struct.pack("!i", 5000))
    os.close(write)
    connection = Connection(read, writable=False, max_message=10)
    with pytest.raises(MessageTooBig):
        connection.recv()
    assert connection.closed


@pytest.mark.parametrize("arguments", [(-1,), (0, False, False)])
def test_connection_impossible_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    """A negative handle, or one for nothing, is a ValueError."""
    with pytest.raises(ValueError, match=r"handle|readable"):
        Connection(*arguments)


# Threads and signals.


def test_send_in_many_threads_mixes_no_frames(pair: tuple[Connection, Connection]) -> None:
    """Messages of all sizes sent by several threads at once arrive whole, each thread's
    in its order.
    """
    one, other = pair
    sizes = [10, 5000, 20_000, 300_000]

    def send(number: int) -> None:
        for count in range(40):
            one.send_bytes(bytes([number, count]) * sizes[(number + count) % len(sizes)])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {number: [] for number in range(4)}
    for _ in range(160):
        message = other.recv_bytes()
        number, count = message[:2]
        assert message == bytes([number, count]) * sizes[(number + count) % len(sizes)]
        seen[number].append(count)
    for thread in threads:
        thread.join()
    assert all(counts == list(range(40)) for counts in seen.values())


def test_recv_in_many_threads_receives_every_message(
    pair: tuple[Connection, Connection], aside: Any
) -> None:
    """Several threads receiving at once get every message once, each of them whole."""
    one, other = pair

    def receive() -> list[bytes]:
        received = []
        while message := other.recv_bytes():
            received.append(message)
        return received

    receivers = [aside(receive) for _ in range(4)]
    sent = [bytes([number]) * (number * 500 + 1) for number in range(200)]
    for message in sent:
        one.send_bytes(message)
    for _ in receivers:
        one.send_bytes(b"")
    received = [message for receiver in receivers for message in receiver.result(TIMEOUT_S)]
    assert sorted(received) == sorted(sent)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no signals")
def test_send_interrupted_message_is_not_continued_by_another(
    pair: tuple[Connection, Connection],
) -> None:
    """After an exception in the middle of a large message no other can be sent: the
    peer would take it for the rest.
    """
    one, other = pair

    class Interrupted(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupted

    def signal_when_begun() -> None:
        select.select([other.fileno()], [], [], TIMEOUT_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    body = bytes(50_000_000)
    signaller = threading.Thread(target=signal_when_begun)
    try:
        signaller.start()
        with pytest.raises(Interrupted):
            one.send_bytes(body)
    finally:
        signaller.join(TIMEOUT_S)
        signal.signal(signal.SIGALRM, previous)
    assert not one.writable
    with pytest.raises(OSError, match="can't send"):
        one.send_bytes(b"the rest?")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_connection_in_a_fork_can_send(pair: tuple[Connection, Connection]) -> None:
    """A child forked while another thread of the parent was sending can send: it has no
    lock of that thread's.
    """
    one, other = pair
    with one._send_lock:
        child = multiprocessing.get_context("fork").Process(
            target=one.send, args=("from the child",)
        )
        child.start()
    assert other.poll(TIMEOUT_S)
    assert other.recv() == "from the child"
    child.join(TIMEOUT_S)


# Handing over.


def test_connection_plain_pickle_is_refused(pair: tuple[Connection, Connection]) -> None:
    """A connection that is pickled in any other way than for a process says what the
    right way is.
    """
    with pytest.raises(TypeError, match="Process"):
        pickle.dumps(pair[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start_method", multiprocessing.get_all_start_methods())
def test_connection_is_handed_to_a_child(start_method: str) -> None:
    """A child process of every kind can use a connection given to it. When the child
    ends, no other process holds the connection.
    """
    context = multiprocessing.get_context(start_method)
    one, other = Pipe()
    with one:
        with other:
            # The connection's own method is what the child runs: it needs no module but
            # the connection's.
            child = context.Process(target=other.send, args=("from the child",))
            child.start()
        assert one.poll(TIMEOUT_S)
        assert one.recv() == "from the child"
        with pytest.raises(EOFError):
            one.recv()
        child.join(TIMEOUT_S)
        assert child.exitcode == 0


def test_connection_handed_to_a_child_keeps_max_message() -> None:
    """A connection sent over a connection keeps what it is for and its largest message."""
    one, other = Pipe()
    reader, writer = Pipe(duplex=False)
    with (
        one,
        other,
        reader,
        writer,
        Connection(os.dup(reader.fileno()), writable=False, max_message=7) as limited,
    ):
        one.send(limited)
        with other.recv() as received:
            assert (received.readable, received.writable, received.max_message) == (True, False, 7)
            writer.send_bytes(b"12345678")
            with pytest.raises(MessageTooBig):
                received.recv_bytes()


# Waiting.


def test_poll_timeout_waits_as_long(pair: tuple[Connection, Connection]) -> None:
    """poll() returns at once, poll(t) after t at the latest and no earlier, poll(None)
    when something has come.
    """
    one, other = pair
    assert one.poll() is False
    assert one.poll(-1) is False
    start = time.monotonic()
    assert one.poll(0.02) is False
    assert time.monotonic() - start >= 0.02
    other.send(None)
    assert one.poll() is True
    assert one.poll(None) is True
    assert one.poll(1e12) is True


def test_wait_returns_the_ready_objects(pair: tuple[Connection, Connection]) -> None:
    """wait() takes connections, sockets and descriptors, and returns those that are
    ready, in the order given.
    """
    one, other = pair
    idle_socket, its_peer = socket.socketpair()
    read, write = os.pipe()
    with idle_socket, its_peer:
        assert wait([one, idle_socket, read], 0) == []
        assert wait([], 0) == []
        os.write(write, b"x")
        assert wait([one, idle_socket, read], TIMEOUT_S) == [read]
        its_peer.send(b"x")
        other.send(1)
        assert wait([read, idle_socket, one, other]) == [read, idle_socket, one]
    os.close(read)
    os.close(write)


# Buffers of all shapes.


@pytest.mark.parametrize("shape", [(3, 4), (300, 400), (2, 3, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("code", ["B", "i"])
def test_send_bytes_of_several_dimensions_sends_all(
    pair: tuple[Connection, Connection], shape: tuple[int, ...], code: str
) -> None:
    """A contiguous buffer of several dimensions is sent byte for byte, whatever its
    items.
    """
    one, other = pair
    data = os.urandom(math.prod(shape) * struct.calcsize(code))
    view = memoryview(data).cast(code, shape) if data else memoryview(empty_rows())  # type: ignore[call-overload]
    sender = threading.Thread(target=lambda: (one.send_bytes(view), one.send_bytes(b"behind")))
    sender.start()
    assert other.recv_bytes() == data
    assert other.recv_bytes() == b"behind"
    sender.join()


def empty_rows() -> Any:
    """A buffer of shape (0, 3): no item, several dimensions."""
    return ((ctypes.c_ubyte * 3) * 0)()


def test_send_bytes_of_several_dimensions_counts_offset_in_bytes(
    pair: tuple[Connection, Connection],
) -> None:
    """Offset and size are bytes of the whole buffer, not rows."""
    one, other = pair
    view = memoryview(bytes(range(12))).cast("B", (3, 4))
    one.send_bytes(view, 3, 6)
    assert other.recv_bytes() == bytes(range(3, 9))
    with pytest.raises(ValueError, match="buffer length"):
        one.send_bytes(view, 3, 10)


@pytest.mark.parametrize(
    ("view", "error"),
    [
        (memoryview(bytes(200))[::2], TypeError),
        (memoryview(bytes(40_000))[::2], BufferError),
        (memoryview(array("i", range(100)))[::2], TypeError),
        (memoryview(bytes(40_000)).cast("B", (200, 200))[::2], TypeError),
    ],
    ids=["short", "long", "integers", "rows"],
)
def test_send_bytes_of_a_buffer_with_gaps_raises_and_sends_nothing(
    pair: tuple[Connection, Connection], view: memoryview, error: type[Exception]
) -> None:
    """A buffer that is not contiguous is refused as by the standard library, but before
    the length is sent.
    """
    one, other = pair
    with pytest.raises(error):
        one.send_bytes(view)
    assert one.writable
    one.send_bytes(b"behind")
    assert other.recv_bytes() == b"behind"


def test_recv_bytes_into_several_dimensions_fills_all(pair: tuple[Connection, Connection]) -> None:
    """The offset counts bytes; a buffer with gaps is refused before anything is read."""
    one, other = pair
    buffer = bytearray(12)
    one.send_bytes(b"abcdefgh")
    with pytest.raises(TypeError):
        other.recv_bytes_into(memoryview(bytearray(40))[::2])
    assert other.recv_bytes_into(memoryview(buffer).cast("B", (3, 4)), 3) == 8
    assert buffer == b"\0\0\0abcdefgh\0"
    one.send_bytes(b"")
    assert other.recv_bytes_into(empty_rows()) == 0


# Time.


def test_wait_infinite_timeout_returns_ready_objects(
    pair: tuple[Connection, Connection],
) -> None:
    """Infinity and other times beyond what the system can count are times like any
    other.
    """
    one, other = pair
    for timeout in (math.inf, 1e10, 1e300):
        one.send_bytes(b"here")
        assert other.poll(timeout)
        assert wait([other], timeout) == [other]
        assert other.recv_bytes() == b"here"
        threading.Timer(0.02, one.send_bytes, [b"later"]).start()
        assert other.poll(timeout)
        assert other.recv_bytes() == b"later"
    assert not other.poll(-1)
    assert wait([other], -math.inf) == []


def test_wait_timeout_not_a_number_is_refused(
    pair: tuple[Connection, Connection],
) -> None:
    """NaN is a mistake of the caller."""
    with pytest.raises(ValueError, match="not a number"):
        pair[1].poll(math.nan)
    with pytest.raises(ValueError, match="not a number"):
        wait([pair[1]], math.nan)


# Calls from a signal handler that interrupts a call of the same connection.


def in_signal_handler(call: Any, act: Any) -> tuple[Any, BaseException | None]:
    """Call ``call``, ``act`` from a signal handler meanwhile; return what act raised,
    and what call did.
    """
    raised: list[BaseException | None] = []

    def handle(number: int, frame: Any) -> None:
        try:
            act()
            raised.append(None)
        except (OSError, RuntimeError) as error:
            raised.append(error)

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        call()
    except (OSError, RuntimeError) as error:
        return raised[0], error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return raised[0], None


def test_recv_inside_a_recv_raises(pair: tuple[Connection, Connection]) -> None:
    """A signal handler's recv can't wait for the recv that it interrupts; that one goes
    on.
    """
    one, other = pair

    def nested() -> None:
        try:
            other.recv()
        finally:
            one.send("for the first")

    received: list[object] = []
    raised, error = in_signal_handler(lambda: received.append(other.recv()), nested)
    assert isinstance(raised, RuntimeError)
    assert error is None
    assert received == ["for the first"]


def test_send_inside_a_send_raises(pair: tuple[Connection, Connection]) -> None:
    """A signal handler's send can't wait for the send that it interrupts; that one goes
    on.
    """
    one, other = pair
    reader = threading.Timer(0.2, lambda: received.append(len(other.recv_bytes())))
    received: list[int] = []
    reader.start()
    raised, error = in_signal_handler(
        lambda: one.send_bytes(bytes(5_000_000)), lambda: one.send_bytes(b"nested")
    )
    reader.join()
    assert isinstance(raised, RuntimeError)
    assert error is None
    assert received == [5_000_000]


def test_send_inside_a_recv_sends(pair: tuple[Connection, Connection]) -> None:
    """The two directions have nothing to do with each other."""
    one, other = pair

    def act() -> None:
        other.send_bytes(b"nested")
        one.send_bytes(one.recv_bytes())

    received: list[bytes] = []
    assert in_signal_handler(lambda: received.append(other.recv_bytes()), act) == (None, None)
    assert received == [b"nested"]


def test_close_inside_a_call_ends_it(pair: tuple[Connection, Connection]) -> None:
    """A signal handler's close() has the interrupted call raise Closed."""
    one, other = pair
    raised, error = in_signal_handler(other.recv_bytes, other.close)
    assert raised is None
    assert isinstance(error, Closed)
    one, other = Pipe()
    with other:
        raised, error = in_signal_handler(lambda: one.send_bytes(bytes(50_000_000)), one.close)
        assert raised is None
        assert isinstance(error, Closed)
