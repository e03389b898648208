"""The relay of a channel: its bytes, its buffers, and the ends of its directions."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.channels import channel, listening
from support.raw_client import Raw
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

MIB = 1024 * 1024


@pytest.fixture(params=["127.0.0.1:0", "unix"])
def broker(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[RunningDaemon]:
    listen = str(socket_dir / "s") if request.param == "unix" else request.param
    clients = {"alice": {}, "bob": {}, "carol": {}, "ops": {"admin": True}}
    with running_daemon(configuration(listen, clients)) as running:
        yield running


def close(raw: Raw, *, reset: bool = False) -> None:
    if reset:
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def sent_by(raw: Raw, data: bytes, *, ends: bool = False) -> threading.Thread:
    """Write the data in a thread of its own, then close the sending half if asked to."""

    def write() -> None:
        with suppress(OSError):
            raw.write(data)
            if ends:
                raw.sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def fill(raw: Raw) -> int:
    """Write until nothing is taken for half a second; return the number of bytes."""
    sent = 0
    raw.sock.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            sent += raw.sock.send(bytes(65536))
    raw.sock.settimeout(30)
    return sent


def number_open(broker: RunningDaemon) -> int:
    return broker.call(lambda: len(broker.daemon.broker.channels.open))


def listed(broker: RunningDaemon) -> Any:
    with broker.login("ops") as ops:
        return ops.ask("channels").json["channels"]


def test_relay_of_30_mib_in_both_directions_changes_no_byte(broker: RunningDaemon) -> None:
    """As one frame each, at the same time; no limit of messages applies."""
    data = [os.urandom(MIB) * 30, os.urandom(MIB) * 30]
    frames = [struct.pack("!i", len(each)) + each for each in data]
    with channel(broker, "alice", "bob") as ends:
        writers = [sent_by(end, frame) for end, frame in zip(ends, frames, strict=True)]
        received: dict[int, bytes] = {}

        def read(number: int) -> None:
            received[number] = hashlib.sha256(ends[number].read_body()).digest()

        readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in (0, 1)]
        for thread in readers:
            thread.start()
        for thread in (*writers, *readers):
            thread.join(60)
    assert received == {number: hashlib.sha256(data[1 - number]).digest() for number in (0, 1)}


def test_relay_half_close_is_passed_on_behind_the_bytes(broker: RunningDaemon) -> None:
    """The other direction goes on, and its end closes the channel."""
    data = os.urandom(3 * MIB)
    with channel(broker, "alice", "bob") as (alice, bob):
        sent_by(alice, data, ends=True)
        assert bob.read_to_end() == data
        bob.write(b"an answer")
        assert alice.read(9) == b"an answer"
        assert number_open(broker) == 1
        bob.sock.shutdown(socket.SHUT_WR)
        assert alice.read_to_end() == b""
        until(lambda: not number_open(broker))


def test_relay_close_is_passed_on(broker: RunningDaemon) -> None:
    """Bytes that were sent before arrive first."""
    with channel(broker, "alice", "bob") as (alice, bob):
        alice.write(b"last words")
        alice.close()
        assert bob.read_to_end() == b"last words"
        bob.close()
        until(lambda: not number_open(broker))


def test_relay_close_while_the_other_end_sends_is_passed_on(broker: RunningDaemon) -> None:
    """The sender gets what was sent to it, then the end; its own bytes are discarded."""
    with channel(broker, "alice", "bob") as (alice, bob):
        bob.write(b"enough")
        assert alice.read(6) == b"enough"
        sent_by(alice, bytes(20 * MIB))
        bob.read(100_000)
        bob.close()
        with suppress(ConnectionError):
            assert alice.read_to_end() == b""
        until(lambda: not number_open(broker))


def test_relay_reset_is_passed_on(broker: RunningDaemon) -> None:
    """A Unix socket knows no reset: there it is an end."""
    with channel(broker, "alice", "bob") as (alice, bob):
        close(alice, reset=True)
        if bob.sock.family == socket.AF_UNIX:
            assert bob.read_to_end() == b""
        else:
            with pytest.raises(ConnectionResetError):
                bob.sock.recv(1)
        until(lambda: not number_open(broker))


def test_relay_end_that_does_not_read_costs_one_buffer(broker: RunningDaemon) -> None:
    """Its sender is stopped, other clients and channels go on, and no byte is lost."""
    with ExitStack() as stack:
        listener = stack.enter_context(listening(broker, "bob"))
        alice, bob = stack.enter_context(channel(broker, "alice", "bob", listener))
        other = stack.enter_context(channel(broker, "carol", "bob", listener))
        sent = fill(alice)
        (entry,) = [each for each in listed(broker) if each["caller"] == "alice"]
        assert 0 < entry["waiting_bytes"] <= 256 * 1024
        other[0].write(b"not delayed")
        assert other[1].read(11) == b"not delayed"
        alice.sock.shutdown(socket.SHUT_WR)
        assert len(bob.read_to_end()) == sent


def test_relay_both_ends_that_do_not_read_cost_one_buffer_each(broker: RunningDaemon) -> None:
    with channel(broker, "alice", "bob") as ends:
        sent = [fill(end) for end in ends]
        (entry,) = listed(broker)
        assert entry["waiting_bytes"] <= 512 * 1024
        for end, count in zip(ends, reversed(sent), strict=True):
            assert end.read(count) == bytes(count)


def test_relay_end_killed_while_bytes_wait_for_it_ends_channel(broker: RunningDaemon) -> None:
    """Its sender is told, although it was not read from."""
    with channel(broker, "alice", "bob") as (alice, bob):
        writer = sent_by(alice, bytes(50 * MIB))
        until(lambda: listed(broker)[0]["waiting_bytes"] > 0)
        bob.close()
        writer.join(30)
        assert not writer.is_alive()
        until(lambda: not number_open(broker))


def test_relay_operation_channels_lists_both_ends(broker: RunningDaemon) -> None:
    with channel(broker, "alice", "bob") as (alice, bob):
        alice.write(b"12345")
        bob.read(5)
        (entry,) = listed(broker)
        assert (entry["caller"], entry["recipient"]) == ("alice", "bob")
        assert (entry["bytes_to_recipient"], entry["bytes_to_caller"]) == (5, 0)
        assert entry["since"] >= broker.daemon.broker.status.started_at
        assert entry["caller_peer"]
        assert entry["recipient_peer"]
    until(lambda: listed(broker) == [])


@pytest.mark.timing
def test_relay_bytes_count_against_rate_of_their_sender() -> None:
    """Two seconds' worth pass at once, the rest as the rate allows; the other end has a
    rate of its own.
    """
    clients = {"alice": {"rate": {"bytes": "100KiB/s"}}, "bob": {}}
    with (
        running_daemon(configuration("127.0.0.1:0", clients)) as broker,
        channel(broker, "alice", "bob") as (alice, bob),
    ):
        began = time.monotonic()
        sent_by(bob, bytes(2 * MIB))
        alice.read(2 * MIB)
        # At alice's rate it would take eighteen seconds.
        assert time.monotonic() - began < 15
        began = time.monotonic()
        sent_by(alice, bytes(300 * 1024))
        bob.read(300 * 1024)
        assert 0.8 < time.monotonic() - began < 15
