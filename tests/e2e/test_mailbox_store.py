"""A broker whose disk is slow, full or broken: what its clients hear."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.crash_states import build_shim
from support.raw_client import ACK, ERROR, MESSAGE, RECEIPT, REQUEST, WANT_RECEIPT, Raw
from support.scraping import get

from brokerd_client.address import Address

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")


@contextlib.contextmanager
def broker_in(directory: Path) -> Iterator[BrokerProcess]:
    """Run a broker whose bob has a mailbox."""
    clients = {"alice": {}, "bob": {"mailbox": True}, "carol": {}}
    store = {"path": "store", "min_free": 0}
    with BrokerProcess(directory, clients, store=store, monitor="./monitor.sock") as broker:
        yield broker


def readiness(directory: Path) -> tuple[int, str]:
    """Return the answer of /readyz."""
    page = get(Address("AF_UNIX", path=str(directory / "monitor.sock")), "/readyz")
    return page.status, page.body


def store_of(broker: BrokerProcess) -> int:
    """Return the process id of a broker's store."""
    children = Path(f"/proc/{broker.popen.pid}/task/{broker.popen.pid}/children")
    (pid,) = children.read_text().split()
    return int(pid)


def outcome(alice: Raw, number: int) -> str:
    """Send a message to the mailbox; return "" for a RECEIPT, or the code of the ERROR."""
    alice.send(MESSAGE, "bob", b"x" * 5000, message_id=number, flags=WANT_RECEIPT)
    answer = alice.recv()
    assert answer.id == number
    return "" if answer.kind == RECEIPT else answer.code


def test_store_slow_disk_holds_up_no_live_message(tmp_path: Path) -> None:
    """While the disk does not answer, live messages pass; the RECEIPT comes after it."""
    with (
        broker_in(tmp_path) as broker,
        broker.login("alice") as alice,
        broker.login("carol") as carol,
    ):
        assert outcome(alice, 1) == ""
        pid = store_of(broker)
        os.kill(pid, signal.SIGSTOP)
        for number in range(2, 200):
            alice.send(MESSAGE, "bob", b"x" * 5000, message_id=number, flags=WANT_RECEIPT)
        for number in range(200, 210):
            alice.send(REQUEST, "carol", b"live", message_id=number)
            assert carol.recv().body == b"live"
        os.kill(pid, signal.SIGCONT)

        answers = [alice.recv() for _ in range(2, 200)]

        assert [(answer.kind, answer.id) for answer in answers] == [
            (RECEIPT, number) for number in range(2, 200)
        ]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_store_io_error_is_told_once_and_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message under way is in doubt; later ones and ACKs are refused; live ones pass."""
    library = build_shim(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("DISK_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("DISK_FAIL", "sync")
    monkeypatch.setenv("DISK_FAIL_AT", "20")
    monkeypatch.setenv("DISK_FAIL_FOR", "1")
    monkeypatch.setenv("DISK_ERRNO", str(errno.EIO))
    with (
        broker_in(tmp_path) as broker,
        broker.login("alice") as alice,
        broker.login("carol") as carol,
    ):
        outcomes = [outcome(alice, number) for number in range(1, 20)]

        first = outcomes.index("in_doubt")
        assert set(outcomes[:first]) <= {""}
        assert set(outcomes[first + 1 :]) == {"store_failed"}
        broker.wait("mailbox.store_failed")
        status, reason = readiness(tmp_path)
        assert status == 503
        assert reason.startswith("not ready: the store of the mailboxes has failed: ")
        assert "I/O error" in reason
        alice.send(REQUEST, "carol", b"live", message_id=50)
        assert carol.recv().body == b"live"
    monkeypatch.delenv("DISK_FAIL")
    with broker_in(tmp_path) as broker, broker.login("bob") as bob:
        assert readiness(tmp_path) == (200, "ready\n")
        ready = bob.ask("open_mailbox").json["ready"]
        assert ready in (first, first + 1)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_store_full_disk_refuses_messages_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that finds no room is refused as full, and the next one is stored."""
    library = build_shim(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("DISK_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("DISK_FAIL", "write")
    monkeypatch.setenv("DISK_FAIL_AT", "70")
    monkeypatch.setenv("DISK_FAIL_FOR", "2")
    monkeypatch.setenv("DISK_ERRNO", str(errno.ENOSPC))
    with broker_in(tmp_path) as broker, broker.login("alice") as alice:
        outcomes = [outcome(alice, number) for number in range(1, 20)]
        assert set(outcomes) == {"", "full"}
        # Live traffic and acknowledgements go on: the broker is ready.
        assert readiness(tmp_path) == (200, "ready\n")
        with broker.login("bob") as bob:
            assert bob.ask("open_mailbox").json["ready"] == outcomes.count("")
            seq = int.from_bytes(bob.recv().body[:8])
            bob.send(ACK, "", message_id=seq, flags=WANT_RECEIPT)
            answer = bob.recv()
            while answer.kind == MESSAGE:
                answer = bob.recv()
            assert answer.kind != ERROR
