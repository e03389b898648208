"""Channels whose ends, or whose broker, are killed: the other end sees an end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.channels import asked, channel, is_open, joining, listening
from support.keys import key_of
from support.raw_client import Raw

CLIENTS = {"ops": {"admin": True}, "alice": {"allow_md5": True}, "bob": {"allow_md5": True}}
#: A client of the standard library that sends a byte when its channel is open, and waits.
STOCK = """
import struct, sys
from multiprocessing.connection import Client
kind, name, number = int(sys.argv[3]), sys.argv[4].encode(), int(sys.argv[5])
conn = Client(sys.argv[1], authkey=sys.argv[2].encode())
conn.send_bytes(struct.pack("!BBBBQ", kind, 0, 0, len(name), number) + name)
assert conn.recv_bytes()[0] == 6
print("open", flush=True)
conn.recv_bytes()
"""


@pytest.fixture
def broker(socket_dir: Path) -> Iterator[BrokerProcess]:
    with BrokerProcess(socket_dir, CLIENTS) as running:
        running.login("ops").close()
        yield running


def stock(
    broker: BrokerProcess, name: str, kind: int, to: str, number: int
) -> subprocess.Popen[str]:
    """Start a process whose connection begins with this frame."""
    key = key_of(name).decode()
    command = [sys.executable, "-c", STOCK, str(broker.socket), key, str(kind), to, str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def is_killed(process: subprocess.Popen[str], survivor: Raw) -> bool:
    """Kill a process with an open channel; return whether the other end sees the end."""
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "open\n"
        process.kill()
        process.wait()
    return survivor.read_to_end() == b""


def test_channel_whose_caller_is_killed_ends(broker: BrokerProcess) -> None:
    with listening(broker, "bob") as bob:
        process = stock(broker, "alice", 8, "bob", 1)
        with joining(broker, "bob", bob.recv().id) as answering:
            assert answering.recv().name == "alice"
            assert is_killed(process, answering)
        broker.wait("channel.closed")


def test_channel_whose_recipient_is_killed_ends(broker: BrokerProcess) -> None:
    with listening(broker, "bob") as bob, asked(broker, "alice", "bob") as alice:
        process = stock(broker, "bob", 9, "", bob.recv().id)
        assert is_open(alice, "bob", 1)
        assert is_killed(process, alice)
        broker.wait("channel.closed")


def test_channel_whose_broker_is_killed_ends(broker: BrokerProcess) -> None:
    """Both ends, and a caller that waits."""
    with (
        listening(broker, "bob") as bob,
        channel(broker, "alice", "bob", bob) as ends,
        asked(broker, "alice", "bob") as pending,
    ):
        broker.signal(signal.SIGKILL)
        broker.popen.wait()
        for raw in (*ends, pending):
            assert raw.read_to_end() == b""


@pytest.mark.slow
def test_thousand_channels_relay_at_once(socket_dir: Path) -> None:
    """Each has its own bytes, and no descriptor is left behind."""
    clients = {
        "ops": {"admin": True},
        "alice": {"channels": 1000},
        "bob": {"channels": 1000},
    }
    with BrokerProcess(socket_dir, clients) as broker, broker.login("ops") as ops:
        descriptors = Path(f"/proc/{broker.popen.pid}/fd")
        with listening(broker, "bob") as bob:
            before = len(list(descriptors.iterdir()))
            ends = []
            for number in range(1000):
                one = asked(broker, "alice", "bob")
                token = bob.recv().id
                other = joining(broker, "bob", token)
                assert is_open(other, "alice", token)
                assert is_open(one, "bob", 1)
                one.write(b"%04d" % number)
                ends.append((one, other))
            assert ops.ask("stats").json["channels"] == 1000
            for number, (_, other) in enumerate(ends):
                assert other.read(4) == b"%04d" % number
                other.write(b"%04d" % -number)
            for number, (one, other) in enumerate(ends):
                assert one.read(4) == b"%04d" % -number
                one.close()
                assert other.read_to_end() == b""
                other.close()
            broker.wait("channel.closed")
            while ops.ask("stats").json["channels"]:
                ops.ping()
            assert len(list(descriptors.iterdir())) <= before
