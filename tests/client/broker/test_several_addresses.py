"""Connecting to a broker that is not up yet, or to one of several addresses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.dialog_pair import NONCE, Pair
from support.fake_broker import FakeServer
from support.waiting import until

from brokerd_client.errors import (
    AddressError,
    AuthenticationError,
    BrokerdError,
    Disconnected,
    KeyRejected,
    NameTaken,
    ProtocolError,
    ShuttingDown,
    TimedOut,
)
from brokerd_client.protocol.dialog import Dialog
from brokerd_client.protocol.state import State
from brokerd_client.settings import Settings, resolve

NOBODY = Disconnected("can't connect")


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """One kind of client; all clients are closed at the end."""
    face: Face = request.param()
    yield face
    face.close()


def caused_by(cause: Exception) -> Disconnected:
    error = Disconnected(str(cause))
    error.__cause__ = cause
    return error


def fail(dialog: Dialog[Any], now: float, reason: BrokerdError = NOBODY) -> int:
    """Dial, fail, and return which address that was."""
    dialog.dialing(now)
    turn = dialog.turn
    dialog.lost(reason, now, 0.5)
    return turn


# The dialog


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (NOBODY, State.WAITING),
        (TimedOut("no answer"), State.WAITING),
        (caused_by(ShuttingDown("drains")), State.WAITING),
        (caused_by(NameTaken("taken")), State.GONE),
        (KeyRejected("wrong"), State.GONE),
        (ProtocolError("not a broker"), State.GONE),
        (AddressError("no such family"), State.GONE),
        (caused_by(RuntimeError("a bug")), State.GONE),
    ],
)
def test_dialog_with_wait_retries_where_that_can_help(reason: BrokerdError, state: State) -> None:
    """A broker that is not up yet may come up; a wrong key stays wrong."""
    pair = Pair(wait_s=30)
    fail(pair.dialog, 0.0, reason)
    assert pair.dialog.state is state


def test_dialog_with_wait_ends_with_last_reason() -> None:
    """Attempts follow each other within a second, until the time is over."""
    pair = Pair(wait_s=30, timeout_s=5)
    now = 0.0
    while pair.dialog.state in (State.IDLE, State.WAITING):
        pair.dialog.dialing(now)
        assert pair.dialog.next_deadline() == pytest.approx(min(now + 5, 30))
        pair.dialog.lost(NOBODY, now, 0.999)
        assert pair.dialog.state is State.GONE or pair.dialog.retry_at - now <= 1.0
        now = max(now, pair.dialog.retry_at)
    assert 28 < now <= 30
    assert (pair.dialog.reason, pair.dialog.losses) == (NOBODY, 0)


def test_dialog_with_wait_shorter_than_timeout_ends_after_wait() -> None:
    """The timeout limits an attempt; it does not make the wait longer."""
    pair = Pair(wait_s=2, timeout_s=10)
    now = 0.0
    while pair.dialog.state in (State.IDLE, State.WAITING):
        fail(pair.dialog, now)
        now = max(now, pair.dialog.retry_at)
    assert 0 < now <= 2
    assert (pair.dialog.state, pair.dialog.reason) == (State.GONE, NOBODY)


def test_dialog_with_addresses_tries_each_once() -> None:
    """No address waits for another, and none takes all the time."""
    pair = Pair(addresses=3, timeout_s=9)
    pair.dialog.dialing(0.0)
    assert pair.dialog.next_deadline() == 3
    pair.dialog.opened(NONCE)
    assert "within 3 s" in str(pair.dialog.tick(3).broken)
    pair.dialog.lost(NOBODY, 3.0, 0.5)
    assert (pair.dialog.state, pair.dialog.retry_at) == (State.WAITING, 3.0)
    assert fail(pair.dialog, 3.0) == 1
    assert fail(pair.dialog, 3.0) == 2
    assert pair.dialog.state is State.GONE


def test_dialog_with_addresses_fails_with_refusal_if_there_is_one() -> None:
    """That a second broker is not there says less than that the first rejects the key."""
    pair = Pair(addresses=2)
    rejected = KeyRejected("wrong")
    fail(pair.dialog, 0.0, rejected)
    fail(pair.dialog, 0.0)
    assert (pair.dialog.state, pair.dialog.reason) == (State.GONE, rejected)


def test_dialog_with_addresses_fails_with_errors_of_all() -> None:
    """Each round has its own errors; those that are not alike are named too."""
    pair = Pair(addresses=2, wait_s=30)
    for now in (0.0, 1.0):
        fail(pair.dialog, now, Disconnected("can't connect to a: refused"))
        fail(pair.dialog, now, TimedOut("no connection to b within 1 s"))
    expected = (
        "none of the 2 addresses can be used: can't connect to a: refused; no connection to b"
        " within 1 s"
    )
    assert (str(pair.dialog.reason), type(pair.dialog.reason)) == (expected, TimedOut)


def test_dialog_with_addresses_gives_hint_of_all_errors_once() -> None:
    """A list of many addresses stays readable."""
    pair = Pair(addresses=2)
    for name in "ab":
        fail(pair.dialog, 0.0, Disconnected(f"no {name} (is it there?)"))
    expected = "none of the 2 addresses can be used: no a; no b (is it there?)"
    assert str(pair.dialog.reason) == expected


def test_dialog_with_addresses_begins_with_one_that_worked_last() -> None:
    """The round goes on behind it, and the wait follows the whole round."""
    pair = Pair(addresses=3)
    assert fail(pair.dialog, 0.0) == 0
    pair.connect()
    assert (pair.dialog.state, pair.dialog.turn) == (State.READY, 1)
    pair.lose()
    waits = []
    tried = []
    for _ in range(6):
        tried.append(fail(pair.dialog, pair.now))
        waits.append(pair.dialog.retry_at - pair.now)
    assert tried == [1, 2, 0, 1, 2, 0]
    assert [wait > 0 for wait in waits] == [False, False, True] * 2
    assert (pair.dialog.losses, pair.dialog.failed_attempts) == (1, 7)


def test_dialog_without_reconnect_tries_no_other_address_after_loss() -> None:
    """Its first loss is final; its first connection may be to any address."""
    pair = Pair(addresses=2, reconnect=False)
    assert fail(pair.dialog, 0.0) == 0
    pair.connect()
    pair.lose()
    assert pair.dialog.state is State.GONE


# The settings


def settle(address: Any = None, **given: Any) -> Settings:
    options = {"reconnect": True, "allow_pickle_from": (), "inbox": 100}
    return resolve(address, "alice", "k", None, 1.0, **{**options, **given})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("localhost", 6000), ["localhost:6000"]),
        (["localhost", 6000], ["localhost:6000"]),
        (["a:1", "b:2"], ["a:1", "b:2"]),
        ((("a", 1), "./s.sock"), ["a:1", "./s.sock"]),
        (["a:1"], ["a:1"]),
        (["tls://a:1", "tls://b:2"], ["tls://a:1", "tls://b:2"]),
    ],
)
def test_settings_list_of_addresses_differs_from_pair(given: Any, found: list[str]) -> None:
    assert [str(each) for each in settle(given).addresses] == found


def test_settings_variable_holds_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKERD_ADDRESS", "a:1, @b")
    assert [str(each) for each in settle().addresses] == ["a:1", "@b"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "at least one"),
        (["a:1", "b"], "no port"),
        (["tls://a:1", "b:2"], "all addresses or to none"),
        (["tls://a:1", "@b"], "not a TCP address"),
    ],
)
def test_settings_mistake_in_addresses_is_named(given: Any, says: str) -> None:
    with pytest.raises(AddressError, match=says):
        settle(given)


def test_settings_wait_is_number_of_seconds() -> None:
    with pytest.raises(ValueError, match="wait is a number of seconds of at least 0, not -1"):
        settle("a:1", wait=-1)
    with pytest.raises(TypeError, match="give_up_after is a number of seconds or None, not str"):
        settle("a:1", give_up_after="1s")
    assert settle("a:1", wait=None).wait_s == settle("a:1", wait=float("inf")).wait_s >= 1e8


# Both faces


def test_connect_with_wait_returns_when_broker_is_up(face: Face, tmp_path: Path) -> None:
    """The socket does not exist when the call begins."""
    server = FakeServer(str(tmp_path / "b.sock"), {"alice": b"alice"})
    starting = threading.Timer(0.3, server.start)
    starting.start()
    try:
        client = face.connect(server.path, "alice", "alice", wait=PATIENCE)
        assert client.connected
    finally:
        starting.join()
        server.stop()


def test_connect_with_wait_and_wrong_key_raises_at_once(face: Face, server: FakeServer) -> None:
    with pytest.raises(AuthenticationError):
        face.connect(server.path, "alice", "wrong", wait=None)


def test_connect_with_wait_without_broker_raises(face: Face, tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with pytest.raises(Disconnected, match="is the broker running there"):
        face.connect(path, "alice", "alice", timeout=0.1, wait=0.2)


def test_connect_with_addresses_follows_broker(
    face: Face, server: FakeServer, tmp_path: Path
) -> None:
    """It connects to the second address, and to the third when the broker moves there."""
    other = FakeServer(str(tmp_path / "other.sock"), {"alice": b"alice"})
    client = face.connect([str(tmp_path / "none.sock"), server.path, other.path], "alice", "alice")
    assert server.path in repr(getattr(client, "_inner", client))
    server.stop()
    other.start()
    try:
        until(lambda: client.connected and "alice" in other.broker.online)
        assert other.path in repr(getattr(client, "_inner", client))
    finally:
        other.stop()


def test_connect_with_address_of_missing_family_tries_others(
    face: Face, server: FakeServer
) -> None:
    """It fails as any other address that does not work."""
    client = face.connect([server.path, r"\\.\pipe\none"], "alice", "alice")
    server.drop("alice")
    until(lambda: client.counters["losses"] > 0 and client.connected)
    with pytest.raises(AddressError, match="Windows only"):
        face.connect([server.path + "x", r"\\.\pipe\none"], "bob", "bob")
