"""Upgrades of a broker with mailboxes: the store process and held messages stay."""

from __future__ import annotations

import signal
import struct
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.broker_process import PROGRAM, BrokerProcess
from support.raw_client import ACK, MESSAGE, RECEIPT, REPLY, WANT_ACK, WANT_RECEIPT, Frame, Raw

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

CLIENTS = {"alice": {}, "bob": {"mailbox": True}, "ops": {"admin": True}}
STORE = {"path": "store", "min_free": 0}


def tag_of(frame: Frame) -> tuple[int, int]:
    """Return the seq and the attempt of a delivery."""
    assert (frame.kind, frame.flags & WANT_ACK) == (MESSAGE, WANT_ACK), frame
    seq, attempt = struct.unpack_from("!QH", frame.body)
    return seq, attempt


def upgrade(ops: Raw) -> None:
    """Upgrade the broker."""
    answer = ops.ask("upgrade").json
    assert answer["upgraded"], answer


def test_upgrade_five_times_keeps_held_messages_and_stores_on(tmp_path: Path) -> None:
    with (
        BrokerProcess(tmp_path, CLIENTS, store=STORE) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        answer = bob.ask("open_mailbox", window=3)
        assert answer.kind == REPLY
        receipts = Counter[int]()
        got: list[tuple[int, int]] = []
        sent = 0
        for _ in range(5):
            for _ in range(20):
                sent += 1
                alice.send(MESSAGE, "bob", b"%d" % sent, message_id=sent, flags=WANT_RECEIPT)
            upgrade(ops)
            while receipts.total() < sent:
                receipt = alice.recv()
                assert receipt.kind == RECEIPT, receipt
                receipts[receipt.id] += 1
        while len(got) < sent:
            got.append(tag_of(bob.recv()))
            bob.send(ACK, "", message_id=got[-1][0])
        assert got == [(seq, 1) for seq in range(1, sent + 1)]
        assert receipts == Counter(range(1, sent + 1))
        bob.ping()
        (entry,) = ops.ask("mailboxes").json["mailboxes"]
        assert (entry["ready"], entry["held"]) == (0, 0)
        assert not broker.events("daemon.bug")
        assert ops.ask("drain").kind == REPLY
        broker.wait("daemon.stopped")
    with BrokerProcess(tmp_path, CLIENTS, store=STORE) as broker, broker.login("bob") as bob:
        assert bob.ask("open_mailbox").json["ready"] == 0
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0


def test_upgrade_returns_a_message_whose_holder_ends_later(tmp_path: Path) -> None:
    with (
        BrokerProcess(tmp_path, CLIENTS, store=STORE) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
    ):
        alice.send(MESSAGE, "bob", b"one", message_id=1, flags=WANT_RECEIPT)
        assert alice.recv().kind == RECEIPT
        with broker.login("bob") as bob:
            assert bob.ask("open_mailbox").kind == REPLY
            assert tag_of(bob.recv()) == (1, 1)
            upgrade(ops)
            bob.ping()
        with broker.login("bob") as bob:
            assert bob.ask("open_mailbox").kind == REPLY
            assert tag_of(bob.recv()) == (1, 2)


#: A broker whose code is newer once there is the file ``newer``.
_NEWER = (
    "from pathlib import Path; from brokerd.store import messages;"
    " messages.VERSION += Path('newer').exists();"
)


def test_upgrade_to_another_version_of_the_store_replaces_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held messages stay held; what is sent meanwhile is stored once, in its order."""
    monkeypatch.chdir(tmp_path)
    with (
        BrokerProcess(tmp_path, CLIENTS, store=STORE, program=_NEWER + PROGRAM) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        assert bob.ask("open_mailbox", window=2).kind == REPLY
        (before,) = children(broker.popen.pid)
        sent = 40
        for number in range(1, sent + 1):
            alice.send(MESSAGE, "bob", b"%d" % number, message_id=number, flags=WANT_RECEIPT)
            if number == sent // 2:
                Path("newer").touch()
                answer = ops.ask("upgrade").json
                assert answer["upgraded"], answer
        receipts = [alice.recv() for _ in range(sent)]
        assert [(each.kind, each.id) for each in receipts] == [
            (RECEIPT, number) for number in range(1, sent + 1)
        ]
        (after,) = children(answer["pid"])
        assert after != before
        got = []
        while len(got) < sent:
            got.append(tag_of(bob.recv()))
            bob.send(ACK, "", message_id=got[-1][0])
        assert got == [(seq, 1) for seq in range(1, sent + 1)]
        assert not broker.events("daemon.bug")
        assert not broker.events("mailbox.store_failed")


def children(pid: int) -> list[int]:
    """Return the processes that a process has started: a broker's store."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
