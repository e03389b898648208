"""Busy senders have their turns; other connections do not wait for all of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from support.raw_client import MESSAGE, RECEIPT, WANT_RECEIPT, Raw, packed
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.waiting import until

from brokerd.net.connection import turns as turns_module
from brokerd.net.connection.connection import Connection
from brokerd.net.connection.state import State
from brokerd.net.connection.turns import Turns

SENT = 2000


class Loop:
    """An event loop whose turns the test takes."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        """See asyncio."""
        self.calls.append(call)

    def turn(self) -> None:
        """Carry out what was called for."""
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Busy:
    """A connection with input for some turns."""

    def __init__(self, name: str, turns: Turns, log: list[str], wanted: int) -> None:
        self.name = name
        self.wanted = wanted
        self._turns = turns
        self._log = log

    def take_turn(self) -> None:
        """See Connection."""
        self._log.append(self.name)
        self.wanted -= 1
        if self.wanted:
            self._turns.add(cast("Any", self))


def waiting(*wanted: int) -> tuple[Loop, list[str]]:
    """Return the loop and the log of connections a, b, c ... that want so many turns."""
    loop, log = Loop(), list[str]()
    turns = Turns(cast("Any", loop))
    for name, count in zip("abcde", wanted, strict=False):
        turns.add(cast("Any", Busy(name, turns, log, count)))
    return loop, log


def test_turns_that_take_long_are_one_per_turn_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns_module, "_SLICE_S", 0.0)
    loop, log = waiting(3, 1, 2)
    counts = []
    while loop.calls:
        loop.turn()
        counts.append(len(log))
    assert log == ["a", "b", "c", "a", "c", "a"]
    assert counts == [1, 2, 3, 4, 5, 6]


def test_turns_that_are_short_are_all_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_SLICE_S", 60.0)
    loop, log = waiting(2, 1, 2)
    loop.turn()
    assert log == ["a", "b", "c"]
    loop.turn()
    assert log == ["a", "b", "c", "a", "c"]
    assert not loop.calls


@pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")
def test_senders_to_a_mailbox_read_in_turns_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two senders send more than a turn takes; each gets its RECEIPTs in order."""
    taken = 0
    add = Turns.add

    def counted(self: Turns, connection: Any) -> None:
        nonlocal taken
        taken += 1
        add(self, connection)

    monkeypatch.setattr(Turns, "add", counted)
    clients: dict[str, Any] = {"alice": None, "carol": None, "bob": {"mailbox": True}}
    store = {"path": str(tmp_path), "min_free": 0}
    config = configuration("127.0.0.1:0", clients, store=store)
    with (
        running_daemon(config) as broker,
        broker.login("alice") as alice,
        broker.login("carol") as carol,
    ):
        threads = [
            threading.Thread(target=_send, args=(raw,), daemon=True) for raw in (alice, carol)
        ]
        for thread in threads:
            thread.start()
        for raw in (alice, carol):
            receipts = [raw.recv() for _ in range(SENT)]
            assert {frame.kind for frame in receipts} == {RECEIPT}
            assert [frame.id for frame in receipts] == list(range(SENT))
        for thread in threads:
            thread.join(30)
        assert (
            broker.call(lambda: broker.daemon.server.broker.mailboxes.boxes["bob"].messages)
            == 2 * SENT
        )
    assert taken > 2


@pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")
def test_sender_to_a_mailbox_waits_for_its_turn_also_after_a_pause(tmp_path: Path) -> None:
    """A bulk of stored messages makes the next one wait for its turn; a live one does not.

    The second bulk is read in a turn, and so is the end of its input.
    """
    clients: dict[str, Any] = {"alice": None, "bob": {"mailbox": True}}
    store = {"path": str(tmp_path), "min_free": 0}
    with (
        running_daemon(configuration("127.0.0.1:0", clients, store=store)) as broker,
        broker.login("alice") as alice,
    ):
        bulk, live = ("bob", 100, True), ("alice", 1, False)
        for recipient, count, is_storing in (bulk, bulk, live):
            frames = [
                packed(MESSAGE, recipient, b"x", message_id=number, flags=WANT_RECEIPT)
                for number in range(count)
            ]
            alice.sock.sendall(b"".join(frames))
            received = [alice.recv() for _ in range(count if is_storing else 2)]
            assert sum(frame.kind == RECEIPT for frame in received) == count
            until(lambda: broker.call(lambda: _only(broker).state) is State.READING)
            assert _only(broker).is_storing == is_storing


def _only(broker: RunningDaemon) -> Connection:
    """Return the only connection."""
    (connection,) = broker.daemon.server.connections
    return connection


def _send(raw: Raw) -> None:
    raw.sock.sendall(
        b"".join(
            packed(MESSAGE, "bob", b"x" * 100, message_id=number, flags=WANT_RECEIPT)
            for number in range(SENT)
        )
    )
