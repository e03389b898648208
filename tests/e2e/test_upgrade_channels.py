"""Channels over an upgrade: those of plain connections go on, with every byte."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from support.channels import OPEN, asked, channel, is_open, joining, listening
from support.raw_client import ERROR, Raw
from support.upgradable_process import Upgradable

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

CLIENTS = {"ops": {"admin": True}, "alice": None, "bob": None, "carol": None}
MIB = 1024 * 1024


class Saturated:
    """Both directions of a channel, in which random bytes go as fast as they can."""

    def __init__(self, ends: tuple[Raw, Raw]) -> None:
        self._stop = threading.Event()
        self._sent: dict[Raw, str] = {}
        self._received: dict[Raw, str] = {}
        self._ends = ends
        self._threads = [
            threading.Thread(target=run, args=(end,), daemon=True)
            for end in ends
            for run in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, end: Raw) -> None:
        digest, block = hashlib.sha256(), os.urandom(MIB)
        while not self._stop.is_set():
            for start in range(0, MIB, 65536):
                end.write(block[start : start + 65536])
            digest.update(block)
        end.sock.shutdown(socket.SHUT_WR)
        self._sent[end] = digest.hexdigest()

    def _receive(self, end: Raw) -> None:
        digest = hashlib.sha256()
        while data := end.sock.recv(MIB):
            digest.update(data)
        self._received[end] = digest.hexdigest()

    def finish(self) -> None:
        """Stop, and compare what was received with what was sent."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        one, other = self._ends
        assert self._received == {one: self._sent[other], other: self._sent[one]}


class OverTcp:
    """A broker that is reached over TCP."""

    def __init__(self, broker: Upgradable) -> None:
        self._broker = broker
        self.address = broker.addresses()[1]

    def login(self, name: str) -> Raw:
        return self._broker.login(name, self.address)


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_upgrade_five_times_under_saturated_channels_changes_no_byte(
    family: str, socket_dir: Path
) -> None:
    with (
        Upgradable(socket_dir, CLIENTS, listen=["127.0.0.1:0"]) as broker,
        ExitStack() as stack,
    ):
        ops = stack.enter_context(broker.login("ops"))
        reached = broker if family == "unix" else OverTcp(broker)
        bob = stack.enter_context(listening(reached, "bob"))
        loads = [
            Saturated(stack.enter_context(channel(reached, name, "bob", bob)))
            for name in ("alice", "carol")
        ]
        for _ in range(5):
            assert broker.upgrade(ops)["upgraded"]
        shown = ops.ask("channels").json["channels"]
        assert {each["caller"] for each in shown} == {"alice", "carol"}
        assert all(each["bytes_to_recipient"] > MIB for each in shown)
        for load in loads:
            load.finish()
        assert not broker.events("daemon.bug")


def test_upgrade_keeps_bytes_that_wait_for_an_end(socket_dir: Path) -> None:
    """The end did not read; its peer has closed its sending half meanwhile."""
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        channel(broker, "alice", "bob") as (alice, bob),
    ):
        sent = 0
        alice.sock.settimeout(0.2)
        try:
            while True:
                sent += alice.sock.send(bytes(65536))
        except TimeoutError:
            alice.sock.shutdown(socket.SHUT_WR)
        assert broker.upgrade(ops)["upgraded"]
        assert bob.read_to_end() == bytes(sent)
        bob.write(b"the other way")
        alice.sock.settimeout(30)
        assert alice.read(13) == b"the other way"
        assert broker.upgrade(ops)["upgraded"]
        bob.close()
        assert alice.read_to_end() == b""
        broker.wait("channel.closed")


def test_upgrade_keeps_listening_and_opens_that_wait(socket_dir: Path) -> None:
    """One OPEN has been read by its recipient, and its caller sent bytes behind it; the
    other waits in the recipient's queue.
    """
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        listening(broker, "bob") as bob,
        asked(broker, "alice", "bob") as alice,
        asked(broker, "carol", "bob") as carol,
    ):
        alice.write(b"early")
        tokens = {each.name: each.id for each in (bob.recv(), bob.recv())}
        assert broker.upgrade(ops)["upgraded"]
        with joining(broker, "bob", tokens["alice"]) as answering:
            assert is_open(answering, "alice", tokens["alice"])
            assert answering.read(5) == b"early"
            assert is_open(alice, "bob", 1)
        bob.send(ERROR, "", b"busy", message_id=tokens["carol"])
        assert carol.recv().body == b"busy"
        with asked(broker, "carol", "bob"):
            assert bob.recv().kind == OPEN


@pytest.mark.parametrize(
    "change",
    [
        {"alice": {"key": "another key"}},
        {"bob": {"open_from": ["carol"]}},
        {"alice": {"send_to": ["carol"]}},
    ],
    ids=["key", "open_from", "send_to"],
)
def test_upgrade_ends_channels_that_new_configuration_does_not_allow(
    change: dict[str, dict[str, object]], socket_dir: Path
) -> None:
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        listening(broker, "bob") as bob,
        channel(broker, "alice", "bob", bob) as ends,
        asked(broker, "alice", "bob") as pending,
    ):
        bob.recv()
        config = yaml.safe_load(broker.config.read_text())
        for name, entry in change.items():
            if "key" in entry:
                config["clients"][name].pop("key_file", None)
            config["clients"][name].update(entry)
        broker.config.write_text(yaml.safe_dump(config))
        assert broker.upgrade(ops)["upgraded"]
        for end in (*ends, pending):
            end.sock.settimeout(30)
            end.read_to_end()


def test_upgrade_ends_channels_of_removed_client(socket_dir: Path) -> None:
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        listening(broker, "bob") as bob,
        channel(broker, "alice", "bob", bob) as ends,
        channel(broker, "carol", "bob", bob) as kept,
        asked(broker, "alice", "bob") as pending,
    ):
        bob.recv()
        config = yaml.safe_load(broker.config.read_text())
        del config["clients"]["alice"]
        broker.config.write_text(yaml.safe_dump(config))
        assert broker.upgrade(ops)["upgraded"]
        for end in (*ends, pending):
            assert end.read_to_end() == b""
        kept[0].write(b"x")
        assert kept[1].read(1) == b"x"


def test_upgrade_that_fails_keeps_channels(socket_dir: Path) -> None:
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        channel(broker, "alice", "bob") as ends,
    ):
        broker.before_new_process("raise SystemExit(3)")
        load = Saturated(ends)
        assert not broker.upgrade(ops)["upgraded"]
        load.finish()
