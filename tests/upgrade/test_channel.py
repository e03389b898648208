"""The messages of two processes during an upgrade, with both ends in the test."""

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
    """Receive in a thread, because a message larger than the socket's buffers blocks
    its sender until it is read.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(channel.receive, within_s=within_s)
    pool.shutdown(wait=False)
    return future


def test_upgrade_channel_facts_bytes_and_descriptors_arrive(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """There are more of each than one call sends. The descriptors are those of the same
    files, in order.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pieces = [rng.randbytes(rng.choice([0, 1, 100, 70_000])) for _ in range(1500)]
    files = [os.memfd_create(f"{number}") for number in range(600)]
    future = receiving(ends[1])
    try:
        ends[0].send("state", {"a": [1, None, "ü"]}, pieces, files, within_s=30)
        message = future.result(30)
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


def test_upgrade_channel_descriptors_over_limit_are_sent_again(
    ends: tuple[UpgradeChannel, UpgradeChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts descriptors in transit. Without root, they may not exceed the
    limit of open files.
    """
    send_fds = socket.send_fds
    refusals = [OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")] * 3

    def reluctant(*given: Any) -> int:
        if refusals:
            raise refusals.pop()
        return send_fds(*given)

    monkeypatch.setattr(socket, "send_fds", reluctant)
    ends[0].send("state", {}, (), [ends[0].fileno()], within_s=30)
    (descriptor,) = ends[1].receive(within_s=30).descriptors
    os.close(descriptor)


def test_upgrade_channel_descriptor_not_sendable_raises(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """Any other error of the system ends the upgrade."""
    with pytest.raises(UpgradeChannelError, match="Bad file descriptor"):
        ends[0].send("state", {}, (), [987_654], within_s=30)


def test_upgrade_channel_messages_keep_their_order(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """One message follows the other, and their parts do not mix."""
    ends[0].send("hello", {"n": 1}, [b"abc"], within_s=30)
    ends[0].send("ready", within_s=30)
    assert ends[1].expect("hello", within_s=30).body == b"abc"
    assert ends[1].expect("ready", within_s=30).facts == {}


def test_upgrade_channel_failure_of_peer_raises_its_reason(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """The other process says why it failed."""
    ends[0].send("failed", {"reason": "because"}, within_s=30)
    with pytest.raises(UpgradeChannelError, match=r"^because$"):
        ends[1].expect("hello", within_s=30)


def test_upgrade_channel_unexpected_message_raises(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """It is not taken for the expected message."""
    ends[0].send("commit", within_s=30)
    with pytest.raises(
        UpgradeChannelError, match="the other process sent 'commit' where 'ready' was expected"
    ):
        ends[1].expect("ready", within_s=30)


def test_upgrade_channel_silent_peer_times_out(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """In both directions."""
    with pytest.raises(UpgradeChannelError, match=r"the other process sent nothing for 0\.05 s"):
        ends[1].receive(within_s=0.05)
    with pytest.raises(
        UpgradeChannelError, match=r"the other process did not read 'state' within 0\.05 s"
    ):
        ends[0].send("state", {}, [bytes(10_000_000)], within_s=0.05)


def test_upgrade_channel_closed_by_peer_raises(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """Both while receiving and while sending."""
    ends[0].close()
    with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
        ends[1].receive(within_s=30)
    with pytest.raises(UpgradeChannelError, match="the other process ended before it read 'hello'"):
        ends[1].send("hello", within_s=30)


def test_upgrade_channel_wake_ends_receive(ends: tuple[UpgradeChannel, UpgradeChannel]) -> None:
    """Another thread wakes it when the daemon is to stop; waking it twice does no harm."""
    future = receiving(ends[1], 30)
    ends[1].wake()
    with pytest.raises(UpgradeChannelError):
        future.result(30)
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
def test_upgrade_channel_malformed_message_is_refused(
    ends: tuple[UpgradeChannel, UpgradeChannel], data: bytes
) -> None:
    """Another language, an impossible length, not an object, or an object that lacks
    something.
    """
    sock = ends[0]._sock
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(UpgradeChannelError):
        ends[1].receive(within_s=30)


def test_upgrade_channel_missing_descriptors_raise(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """The message announces descriptors, and a byte without them arrives. The channel
    does not guess what belongs together.
    """
    sock: Any = ends[0]._sock
    text = b'{"say": "state", "bytes": 0, "descriptors": 2}'
    sock.sendall(b"bkUP" + len(text).to_bytes(4) + text + b"D")
    with pytest.raises(UpgradeChannelError):
        ends[1].receive(within_s=30)


def send_pipe_beside(sender: UpgradeChannel, text: bytes) -> int:
    """Send a message, and beside it the only write end of a pipe; return the read end."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    sock: Any = sender._sock
    sock.sendall(b"bkUP" + len(text).to_bytes(4) + text)
    socket.send_fds(sock, [b"D"], [write_end])
    os.close(write_end)
    return read_end


def test_upgrade_channel_incomplete_message_closes_descriptors(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """Only the channel knows the descriptors that arrived. The pipe ends, because no
    process holds its other end any more.
    """
    read_end = send_pipe_beside(ends[0], b'{"say": "state", "bytes": 0, "descriptors": 2}')
    try:
        ends[0].close()
        with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
            ends[1].receive(within_s=30)
        assert os.read(read_end, 1) == b""
    finally:
        os.close(read_end)


def test_upgrade_channel_unexpected_message_closes_descriptors(
    ends: tuple[UpgradeChannel, UpgradeChannel],
) -> None:
    """The descriptors of a message that was not expected are closed."""
    read_end = send_pipe_beside(ends[0], b'{"say": "state", "bytes": 0, "descriptors": 1}')
    try:
        with pytest.raises(
            UpgradeChannelError, match="the other process sent 'state' where 'ready' was expected"
        ):
            ends[1].expect("ready", within_s=30)
        assert os.read(read_end, 1) == b""
    finally:
        os.close(read_end)


@pytest.mark.parametrize("length", [1 << 50, 1 << 80])
def test_upgrade_channel_huge_announced_length_allocates_nothing(
    ends: tuple[UpgradeChannel, UpgradeChannel], length: int
) -> None:
    """The message announces more bytes than any machine has. Only the bytes that
    arrived take room, and the end raises as usual.
    """
    text = b'{"say": "state", "bytes": %d, "descriptors": 0}' % length
    ends[0]._sock.sendall(b"bkUP" + len(text).to_bytes(4) + text + b"few")
    ends[0].close()
    tracemalloc.start()
    try:
        with pytest.raises(UpgradeChannelError, match="the other process closed the connection"):
            ends[1].receive(within_s=30)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_upgrade_channel_message_cut_at_each_byte_raises() -> None:
    """Whatever the byte after which the other process dies."""
    text = b'{"say": "state", "bytes": 4, "descriptors": 0}'
    whole = b"bkUP" + len(text).to_bytes(4) + text + b"body"
    for end in range(len(whole)):
        first, second = socket.socketpair()
        with first, second:
            first.sendall(whole[:end])
            first.close()
            with pytest.raises(UpgradeChannelError):
                UpgradeChannel(second).receive(within_s=30)
