"""The end of a broker that is told to stop: who hears of it, what still arrives, and how long it takes."""

from __future__ import annotations

import asyncio
import select
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from net.house import House, configuration, house
from net.raw import EVENT, MESSAGE, RECEIPT, REPLY, REQUEST, WANT_RECEIPT, Raw, packed

from brokerd.net import link

LISTENS = ["127.0.0.1:0", "unix"]


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return house(configuration(listen, clients, **more))


@pytest.fixture(params=LISTENS)
def listen(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    return str(socket_dir / "s") if request.param == "unix" else request.param


def queue_for(sender: Raw, to: str, count: int) -> None:
    """Have the broker take that many messages of 100 kB for a client."""
    for number in range(count):
        sender.send(MESSAGE, to, bytes(100_000), id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT


def wait_until_arrived(broker: House, name: str) -> None:
    """Wait, in the broker's thread, until the client's connection has something to read."""
    link = broker.daemon.broker.exchange.clients[name].sessions[name].link
    assert select.select([link.sock], [], [], 30)[0]


def test_idle_clients_are_let_go_at_once(listen: str) -> None:
    """Nobody waits for anything: the broker is gone long before the timeout, whether clients read or not."""
    with served(listen=listen, limits={"drain_timeout": "60s"}) as broker:
        idle = [broker.login(name) for name in ("alice", "bob")]
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["cut_off"] == 0
        for each in idle:
            assert each.is_closed()
            each.close()


@pytest.mark.parametrize("chatty", [False, True], ids=["silent", "chatty"])
def test_what_is_queued_arrives(listen: str, chatty: bool) -> None:
    """A slow reader gets every byte that was taken for it, also when it has sent what nobody will read."""
    with served(listen=listen) as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        queue_for(alice, "bob", 60)
        if chatty:
            bob.sock.setblocking(False)
            data = packed(MESSAGE, "carol", bytes(100_000)) * 100
            try:
                while True:
                    data = data[bob.sock.send(data) :] or packed(MESSAGE, "carol", b"more") * 1000
            except BlockingIOError:
                bob.sock.settimeout(30)
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        ids = []
        while len(ids) < 60:
            frame = bob.recv()
            if frame.kind == MESSAGE:
                ids.append(frame.id)
        assert ids == list(range(60))
        bob.read_to_end()
        assert broker.log.wait("daemon.stopped")[0].fields["cut_off"] == 0


def test_a_slow_reader_has_the_whole_drain_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for a connection that is being closed for other reasons does not shorten it."""
    monkeypatch.setattr(link, "GRACE", 0.05)
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        threading.Event().wait(0.3)  # longer than the other time
        assert [bob.recv().id for _ in range(60)] == list(range(60))


def test_the_drain_timeout_cuts_off() -> None:
    """Who reads nothing is cut off when the time is over, and counted."""
    with (
        served(limits={"drain_timeout": "300ms"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        queue_for(alice, "bob", 60)
        began = monotonic()
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["cut_off"] == 1
        assert 0.3 <= monotonic() - began < 10


def test_nobody_is_accepted_any_more(listen: str) -> None:
    """From the first moment of the drain there is nothing to connect to."""
    with served(listen=listen) as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        queue_for(alice, "bob", 60)
        address = broker.address
        broker.stop_soon()
        broker.log.wait("client.disconnected")
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            Raw(address)
        bob.read_to_end()


def test_what_was_sent_before_the_end_is_answered() -> None:
    """A message that had arrived when the drain began is refused with ``shutting_down``, not forgotten."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        # In the same turn of the loop: sent, arrived, and not yet read when the drain begins.
        def send() -> None:
            alice.send(MESSAGE, "bob", b"late", id=5)
            alice.send(EVENT, "", b"\x01tlate", id=6)
            wait_until_arrived(broker, "alice")

        def send_and_stop() -> None:
            asyncio.get_running_loop().call_soon(send)
            broker.daemon.stop_soon("the test")

        broker.call(send_and_stop)
        assert [(frame.id, frame.code) for frame in (alice.recv(), alice.recv())] == [
            (5, "shutting_down"),
            (6, "shutting_down"),
        ]
        assert alice.is_closed()
        assert bob.is_closed()


def test_a_held_sender_hears_that_it_is_too_late() -> None:
    """Who was held for a full queue when the drain begins is told, message by message, what was not taken."""
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        count = 0
        alice.sock.settimeout(0.5)
        outcomes: dict[int, str] = {}
        try:
            while True:
                alice.send(MESSAGE, "bob", bytes(50_000), id=count, flags=WANT_RECEIPT)
                count += 1
                outcomes[alice.recv().id] = "taken"
        except TimeoutError:
            alice.sock.settimeout(30)
        broker.stop_soon()
        frame = alice.recv()
        assert (frame.id, frame.code) == (count - 1, "shutting_down")
        assert alice.is_closed()
        assert [bob.recv().id for _ in range(count - 1)] == list(range(count - 1))


def test_a_reply_still_gets_through() -> None:
    """The answer to a request taken before the drain is delivered if it had arrived."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"?", id=9)
        bob.recv()

        def answer() -> None:
            bob.send(REPLY, "alice", b"!", id=9)
            wait_until_arrived(broker, "bob")

        def answer_and_stop() -> None:
            asyncio.get_running_loop().call_soon(answer)
            broker.daemon.stop_soon("the test")

        broker.call(answer_and_stop)
        frame = alice.recv()
        assert (frame.kind, frame.id, frame.body) == (REPLY, 9, b"!")


def test_those_who_listen_are_told() -> None:
    """$broker.draining is the last event a subscriber hears."""
    with served() as broker, broker.login("alice") as alice:
        alice.ask("subscribe", topic="$broker.draining")
        broker.stop_soon()
        frame = alice.recv()
        assert (frame.kind, frame.name) == (EVENT, "$broker")
        assert frame.body.startswith(b"\x10$broker.draining")
        assert alice.is_closed()


def test_an_administrator_may_ask_for_it() -> None:
    """The operation is answered before the connection ends."""
    with served({"root": {"admin": True}}) as broker, broker.login("root") as root:
        assert root.ask("drain").json == {"draining": True}
        assert root.is_closed()
        assert "root" in broker.log.wait("daemon.stopping")[0].fields["reason"]
        broker.log.wait("daemon.stopped")


def test_who_is_at_the_door_is_turned_away() -> None:
    """A handshake under way ends when the broker stops."""
    with served() as broker, broker.raw() as peer:
        peer.read_body()
        broker.stop_soon()
        assert peer.is_closed()
        broker.log.wait("daemon.stopped")
