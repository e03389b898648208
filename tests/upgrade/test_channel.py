"""What two processes say to each other during an upgrade, with both ends here."""

from __future__ import annotations

import errno
import os
import random
import socket
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from brokerd.upgrade.channel import UpgradeChannel, UpgradeChannelError, UpgradeMessage

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "send_fds"), reason="no descriptors can be sent here"
)


@pytest.fixture
def ends() -> Iterator[tuple[UpgradeChannel, UpgradeChannel]]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with first, second:
        yield UpgradeChannel(first), UpgradeChannel(second)


def receiving(channel: UpgradeChannel, within_s: float = 10.0) -> Future[UpgradeMessage]:
    """Receive in a thread: nobody can take what is larger than the system's buffers
    before it is received.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(channel.receive, within_s=within_s)
    pool.shutdown(wait=False)
    return future


def test_facts_bytes_and_descriptors_arrive_together(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """More of each than goes at once; and the descriptors are those of the same files,
    in order.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    pieces = [chance.randbytes(chance.choice([0, 1, 100, 70_000])) for _ in range(1500)]
    files = [os.memfd_create(f"{number}") for number in range(600)]
    future = receiving(ends[1])
    try:
        ends[0].send("state", {"a": [1, None, "ü"]}, pieces, files, within_s=10)
        message = future.result(10)
        assert (message.say, message.facts) == ("state", {"a": [1, None, "ü"]})
        assert message.body == b"".join(pieces)
        assert [os.fstat(each).st_ino for each in message.descriptors] == [
            os.fstat(each).st_ino for each in files
        ]
        for each in message.descriptors:
            os.close(each)
    finally:
        for each in files:
            os.close(each)


def test_descriptors_that_the_system_will_not_take_yet_are_sent_again(
    ends: tuple[UpgradeChannel, UpgradeChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts those that are on their way, and whoever is not root may not have more
    than may be open.
    """
    send_fds = socket.send_fds
    refusals = [OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")] * 3

    def reluctant(*given: Any) -> int:
        if refusals:
            raise refusals.pop()
        return send_fds(*given)

    monkeypatch.setattr(socket, "send_fds", reluctant)
    ends[0].send("state", {}, (), [ends[0].fileno()], within_s=10)
    (descriptor,) = ends[1].receive(within_s=10).descriptors
    os.close(descriptor)


def test_a_descriptor_that_can_not_be_sent_is_an_error(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """Whatever else the system says is the end of it."""
    with pytest.raises(UpgradeChannelError, match="Bad file descriptor"):
        ends[0].send("state", {}, (), [987_654], within_s=10)


def test_messages_keep_their_order(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """One behind the other, nothing of one in the next."""
    ends[0].send("hello", {"n": 1}, [b"abc"], within_s=5)
    ends[0].send("ready", within_s=5)
    assert ends[1].expect("hello", within_s=5).body == b"abc"
    assert ends[1].expect("ready", within_s=5).facts == {}


def test_a_reason_ends_what_was_expected(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """The other one says why it failed."""
    ends[0].send("failed", {"reason": "because"}, within_s=5)
    with pytest.raises(UpgradeChannelError, match=r"^because$"):
        ends[1].expect("hello", within_s=5)


def test_another_word_than_expected_is_an_error(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """It is not taken for the one."""
    ends[0].send("commit", within_s=5)
    with pytest.raises(
        UpgradeChannelError, match="the other process sent 'commit' where 'ready' was expected"
    ):
        ends[1].expect("ready", within_s=5)


def test_silence_ends_in_time(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """In both directions."""
    with pytest.raises(UpgradeChannelError, match=r"the other process sent nothing for 0\.05 s"):
        ends[1].receive(within_s=0.05)
    with pytest.raises(
        UpgradeChannelError, match=r"the other process did not read 'state' within 0\.05 s"
    ):
        ends[0].send("state", {}, [bytes(10_000_000)], within_s=0.05)


def test_an_end_is_seen(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """Whether it is waited for, or said something to."""
    ends[0].close()
    with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
        ends[1].receive(within_s=5)
    with pytest.raises(UpgradeChannelError, match="the other process ended before it read 'hello'"):
        ends[1].send("hello", within_s=5)


def test_who_waits_can_be_woken(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """From another thread, when the daemon is to stop; waking twice does no harm."""
    future = receiving(ends[1], 30)
    ends[1].wake()
    with pytest.raises(UpgradeChannelError):
        future.result(10)
    ends[1].wake()
    ends[1].close()
    ends[1].wake()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad",
        b"bkUP\xff\xff\xff\xff",
        b"bkUP\x00\x00\x00\x02[]",
        b"bkUP\x00\x00\x00\x02{}",
        b"bkUP\x00\x00\x00\x05abcde",
        b'bkUP\x00\x00\x00\x2b{"say": "x", "bytes": "", "descriptors": 0}',
        b'bkUP\x00\x00\x00\x2b{"say": "x", "bytes": -1, "descriptors": 0}',
        b'bkUP\x00\x00\x00\x2b{"say": "x", "bytes": 0, "descriptors": -1}',
    ],
)
def test_what_makes_no_sense_is_refused(
    ends: tuple[UpgradeChannel, UpgradeChannel], data: bytes
) -> None:
    """Another language, a length that can't be, no object, an object that lacks
    something.
    """
    sock = ends[0]._sock
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(UpgradeChannelError):
        ends[1].receive(within_s=5)


def test_missing_descriptors_are_an_error(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """Announced, and a byte without them comes: what belongs together is not guessed."""
    sock: Any = ends[0]._sock
    text = b'{"say": "state", "bytes": 0, "descriptors": 2}'
    sock.sendall(b"bkUP" + len(text).to_bytes(4) + text + b"D")
    with pytest.raises(UpgradeChannelError):
        ends[1].receive(within_s=5)


def pipe_that_goes_over(sender: UpgradeChannel, text: bytes) -> int:
    """Send a message and beside it one descriptor, of a pipe nobody else writes to;
    return the end to read from.
    """
    waker_out, mouth = os.pipe()
    os.set_blocking(waker_out, False)
    sock: Any = sender._sock
    sock.sendall(b"bkUP" + len(text).to_bytes(4) + text)
    socket.send_fds(sock, [b"D"], [mouth])
    os.close(mouth)
    return waker_out


def test_descriptors_of_a_message_that_breaks_off_are_closed(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """Nobody else knows of those that had come: the pipe ends, because nobody holds its
    other end any more.
    """
    waker_out = pipe_that_goes_over(ends[0], b'{"say": "state", "bytes": 0, "descriptors": 2}')
    try:
        ends[0].close()
        with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
            ends[1].receive(within_s=5)
        assert os.read(waker_out, 1) == b""
    finally:
        os.close(waker_out)


def test_descriptors_beside_another_word_are_closed(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """What comes with a message that nobody wants belongs to nobody."""
    waker_out = pipe_that_goes_over(ends[0], b'{"say": "state", "bytes": 0, "descriptors": 1}')
    try:
        with pytest.raises(
            UpgradeChannelError, match="the other process sent 'state' where 'ready' was expected"
        ):
            ends[1].expect("ready", within_s=5)
        assert os.read(waker_out, 1) == b""
    finally:
        os.close(waker_out)


@pytest.mark.parametrize("length", [1 << 50, 1 << 80])
def test_room_is_made_for_what_comes_not_for_what_is_announced(
    ends: tuple[UpgradeChannel, UpgradeChannel], length: int
) -> None:
    """More bytes than any machine has: those that came take their room, and the end is
    seen as any other.
    """
    text = b'{"say": "state", "bytes": %d, "descriptors": 0}' % length
    ends[0]._sock.sendall(b"bkUP" + len(text).to_bytes(4) + text + b"few")
    ends[0].close()
    tracemalloc.start()
    try:
        with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
            ends[1].receive(within_s=5)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_message_cut_anywhere_is_no_message() -> None:
    """Whatever the byte after which the other process dies."""
    text = b'{"say": "state", "bytes": 4, "descriptors": 0}'
    whole = b"bkUP" + len(text).to_bytes(4) + text + b"body"
    for end in range(len(whole)):
        first, second = socket.socketpair()
        with first, second:
            first.sendall(whole[:end])
            first.close()
            with pytest.raises(UpgradeChannelError):
                UpgradeChannel(second).receive(within_s=5)
