"""What a program learns of its connection: events, lines of the log, and the end of
reconnecting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.dialog_pair import LOST, NONCE, Pair
from support.fake_broker import FakeServer
from support.waiting import until

from brokerd_client.connection_event import ConnectionEvent
from brokerd_client.errors import (
    BrokerdError,
    Disconnected,
    InDoubt,
    KeyRejected,
    KeyRemoved,
    NameTaken,
    TimedOut,
)
from brokerd_client.protocol.state import State
from brokerd_client.settings import resolve
from brokerd_client.wire.envelope import ErrorCode, Kind, error_payload

REJECTED = KeyRejected("wrong")


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """One kind of client; all clients are closed at the end."""
    face: Face = request.param()
    yield face
    face.close()


def ready(**options: Any) -> Pair:
    pair = Pair(**options)
    pair.connect()
    return pair


def attempt(pair: Pair, reason: BrokerdError) -> list[ConnectionEvent]:
    """Dial and fail at the time of the attempt; return the changes."""
    pair.now = max(pair.now, pair.dialog.retry_at)
    pair.dialog.dialing(pair.now)
    return pair.dialog.lost(reason, pair.now, 0.999).changes


# The dialog


def test_dialog_reports_each_change_of_its_connection_once() -> None:
    """An attempt that finds no broker is none, and no refusal is repeated."""
    pair = Pair()
    assert pair.connect().changes == [ConnectionEvent("connected")]
    assert pair.lose().changes == [ConnectionEvent("lost", LOST)]
    taken = Disconnected("name_taken")
    taken.__cause__ = NameTaken("taken")
    assert attempt(pair, Disconnected("can't connect")) == []
    assert attempt(pair, taken) == [ConnectionEvent("refused", taken)]
    assert attempt(pair, taken) == []
    assert attempt(pair, REJECTED) == [ConnectionEvent("refused", REJECTED)]
    pair.now = pair.dialog.retry_at
    assert pair.connect().changes == [ConnectionEvent("connected")]


def test_dialog_reports_that_the_broker_drains() -> None:
    pair = ready()
    assert pair.hear_frame(Kind.EVENT, name="$broker", topic="$broker.draining").changes == [
        ConnectionEvent("draining")
    ]


def test_dialog_reports_no_change_before_its_first_connection_or_after_close() -> None:
    """connect() raises the error of the first; the program knows of the second."""
    pair = Pair(wait_s=30)
    assert attempt(pair, LOST) == []
    pair = ready()
    pair.dialog.close(0.0)
    assert pair.lose().changes == []


def test_dialog_reports_why_the_broker_closed_the_connection() -> None:
    pair = ready()
    payload = error_payload(ErrorCode.KEY_REMOVED, "removed", "$broker")
    broken = pair.hear_frame(Kind.ERROR, name="$broker", payload=payload, codec=2).broken
    assert broken is not None
    [change] = pair.dialog.lost(broken, 0.0, 0.5).changes
    assert (change.state, change.reason) == ("lost", broken)
    assert type(broken.__cause__) is KeyRemoved


@pytest.mark.parametrize("said", [True, False], ids=["said", "not said"])
def test_dialog_errors_of_calls_have_the_cause_that_the_broker_said(said: bool) -> None:
    """A call under way, a call that waits and a later one have the same cause."""
    pair = ready(reconnect=False)
    pair.dialog.request("bob", 0, b"", None, "under way", None)
    pair.dialog.wrote(len(pair.dialog.data_to_send()))
    broken = Disconnected("the broker closed the connection")
    if said:
        broken.__cause__ = KeyRemoved("removed")
    effects = pair.dialog.lost(broken, 0.0, 0.5)
    with pytest.raises(Disconnected) as later:
        pair.dialog.send("bob", 0, b"")
    [(_, under_way)] = effects.outcomes
    errors = (under_way, pair.dialog.gone(), later.value)
    assert [type(error) for error in errors] == [InDoubt, Disconnected, Disconnected]
    assert [error.__cause__ for error in errors] == [broken.__cause__ or broken] * 3


def test_dialog_with_key_that_stays_rejected_gives_up() -> None:
    """Six in a row, with other failures between them, and the last one is final."""
    pair = ready()
    pair.lose()
    changes = []
    for _ in range(5):
        changes += attempt(pair, REJECTED)
        changes += attempt(pair, Disconnected("can't connect"))
    assert changes == [ConnectionEvent("refused", REJECTED)]
    assert attempt(pair, REJECTED) == [ConnectionEvent("refused", REJECTED, final=True)]
    assert pair.dialog.state is State.GONE
    with pytest.raises(Disconnected, match="wrong") as caught:
        pair.dialog.send("bob", 0, b"")
    assert caught.value.__cause__ is REJECTED


def test_dialog_with_key_accepted_again_begins_new_count() -> None:
    pair = ready()
    for _ in range(3):
        pair.lose()
        for _ in range(5):
            attempt(pair, REJECTED)
        pair.now = pair.dialog.retry_at
        pair.connect()
    assert pair.dialog.state is State.READY


def test_dialog_round_of_addresses_counts_as_one_rejection() -> None:
    """It does not matter which of the brokers were there."""
    pair = ready(addresses=2)
    pair.lose()
    for _ in range(5):
        attempt(pair, REJECTED)
        attempt(pair, LOST)
    assert pair.dialog.state is State.WAITING
    attempt(pair, LOST)
    attempt(pair, REJECTED)
    assert pair.dialog.state is State.GONE


@pytest.mark.parametrize("reason", [LOST, REJECTED, TimedOut("silent")])
def test_dialog_give_up_after_ends_attempts_for_any_reason(reason: BrokerdError) -> None:
    pair = ready(give_up_s=60)
    pair.now = 5.0
    pair.lose()
    changes: list[ConnectionEvent] = []
    while pair.dialog.state is State.WAITING:
        assert pair.now < 65
        changes += attempt(pair, reason)
    assert 65 <= pair.now < 76
    assert (changes[-1].reason, changes[-1].final) == (reason, True)


def test_dialog_give_up_after_infinity_outlasts_rejections() -> None:
    pair = ready(give_up_s=1e8)
    pair.lose()
    for _ in range(50):
        attempt(pair, REJECTED)
    assert pair.dialog.state is State.WAITING


def test_dialog_give_up_after_0_makes_first_loss_final() -> None:
    pair = ready(give_up_s=0)
    assert pair.lose().changes == [ConnectionEvent("lost", LOST, final=True)]


def test_dialog_connection_cut_off_in_handshake_is_not_refused() -> None:
    pair = ready()
    pair.lose()
    pair.dialog.dialing(1)
    pair.dialog.opened(NONCE)
    assert pair.dialog.lost(pair.dialog.closed_by_broker(), 1, 0.5).changes == []


# The settings


@pytest.mark.parametrize(
    ("given", "found"), [(None, None), (0, 0.0), (60, 60.0), (float("inf"), 1e8)]
)
def test_settings_give_up_after_infinity_differs_from_none(given: Any, found: Any) -> None:
    options: dict[str, Any] = {"reconnect": True, "allow_pickle_from": (), "inbox": 100}
    settings = resolve("@x", "alice", "k", None, 1.0, give_up_after=given, **options)
    assert settings.give_up_s == found


# Both faces


def test_on_connection_reports_present_state_and_changes(
    face: Face, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has a warning of the loss, and a line of the return."""
    caplog.set_level(logging.INFO, "brokerd_client")
    client = face.connect(server.path, "alice", "alice")
    events: list[ConnectionEvent] = []
    client.on_connection(events.append)
    until(lambda: events == [ConnectionEvent("connected")])
    server.drop("alice")
    until(lambda: [event.state for event in events] == ["connected", "lost", "connected"])
    assert "the broker closed the connection" in str(events[1].reason)
    lines = [(record.levelname, record.message) for record in caplog.records]
    lost = "connection to the broker lost: the broker closed the connection"
    assert lines == [
        ("WARNING", f"{lost}; the client reconnects"),
        ("INFO", "connected to the broker again"),
    ]


def test_client_with_removed_key_ends_and_logs_it(
    face: Face, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Whoever waits gets the reason; the first refusal is logged, and the last."""
    monkeypatch.setattr("brokerd_client.protocol.backoff.CAP_S", 0.01)
    client = face.connect(server.path, "alice", "alice")
    events: list[ConnectionEvent] = []
    client.on_connection(events.append)
    server.act(lambda broker: broker.keys.pop("alice"))
    server.drop("alice")
    with pytest.raises(Disconnected, match="does not accept the key used here") as caught:
        client.recv(PATIENCE)
    assert type(caught.value.__cause__) is KeyRejected
    with pytest.raises(Disconnected, match="does not accept the key used here"):
        client.send("bob", "hello")
    until(lambda: bool(events) and events[-1].final)
    assert [event.state for event in events[-2:]] == ["refused", "refused"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(":")[0] for line in warnings] == [
        "connection to the broker lost",
        "connection to the broker refused",
        "connection to the broker refused",
    ]
    assert warnings[-1].endswith("the client no longer reconnects")
    assert client.closed


def test_on_connection_accepts_coroutine_function(server: FakeServer) -> None:
    face = Asyncio()
    client = face.connect(server.path, "alice", "alice")
    events: list[ConnectionEvent] = []

    async def handle(event: ConnectionEvent) -> None:
        events.append(event)

    client.on_connection(handle)
    until(lambda: len(events) == 1)
    face.close()
