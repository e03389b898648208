"""What a client is told before the broker closes its connection, and what becomes of
messages in flight.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.raw_client import (
    ERROR,
    EVENT,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Frame,
    Raw,
    packed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

LISTENS = ["127.0.0.1:0", "unix"]
DRAINING = b"\x10$broker.draining{}"


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return running_daemon(configuration(listen, clients, **more))


@pytest.fixture(params=LISTENS)
def listen(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    return str(socket_dir / "s") if request.param == "unix" else request.param


def ask(raw: Raw, op: str, message_id: int) -> None:
    raw.send(REQUEST, "$broker", json.dumps({"op": op}).encode(), message_id=message_id, codec=JSON)


def queue_for(sender: Raw, to: str, count: int) -> None:
    """Queue `count` messages of 100 kB for a client."""
    for number in range(count):
        sender.send(MESSAGE, to, bytes(100_000), message_id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT


def is_draining(frame: Frame) -> bool:
    return (frame.kind, frame.name, frame.body) == (EVENT, "$broker", DRAINING)


def lost(broker: RunningDaemon) -> int:
    return int(broker.log.wait("daemon.stopped")[0].fields["lost"])


def reach(sender: Raw, to: Raw, name: str) -> None:
    """Deliver one message from the sender, so that the broker counts it as a sender."""
    sender.send(MESSAGE, name, b"first")
    assert to.recv().body == b"first"


def test_goaway_client_before_drain_gets_one_event_and_closes_itself(listen: str) -> None:
    with (
        served(listen=listen, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
    ):
        assert alice.ask("goaway").json == {}
        alice.ask("subscribe", topic="$broker.draining")
        broker.stop_soon()
        assert is_draining(alice.recv())
        # The next frame is the reply, not a second event.
        assert alice.ask("finished").json == {}
        alice.close()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert (stopped["cut_off"], stopped["lost"]) == (0, 0)


def test_goaway_during_drain_gets_event_after_reply() -> None:
    with (
        served(limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        # Messages wait for bob, so that alice stays connected for a moment.
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        assert alice.ask("goaway").json == {}
        assert is_draining(alice.recv())
        assert [bob.recv().id for _ in range(60)] == list(range(60))


def test_goaway_message_after_event_is_refused() -> None:
    with served() as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.ask("goaway")
        broker.stop_soon()
        assert is_draining(alice.recv())
        alice.send(MESSAGE, "bob", b"late", message_id=5)
        frame = alice.recv()
        assert (frame.id, frame.code) == (5, "shutting_down")


def test_goaway_finished_is_answered_when_recipient_has_read(socket_dir: Path) -> None:
    # Not TCP, whose buffers may grow until they take all of it.
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.ask("goaway")
        queue_for(alice, "bob", 70)
        broker.stop_soon()
        assert is_draining(alice.recv())
        ask(alice, "finished", 9)
        # Another reply arrives earlier: this one waits for bob.
        assert alice.ask("ping", message_id=8).json == {}
        alice.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            alice.recv()
        alice.sock.settimeout(30)
        assert [bob.recv().id for _ in range(70)] == list(range(70))
        assert alice.recv().id == 9
        alice.close()
        assert lost(broker) == 0


def test_goaway_finished_is_answered_after_errors(socket_dir: Path) -> None:
    """The recipient never reads. When the time is over the sender gets an error for
    each message, and then the reply.
    """
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "2s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        alice.ask("goaway")
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        assert is_draining(alice.recv())
        ask(alice, "finished", 99)
        failed_ids = []
        while (frame := alice.recv()).id != 99:
            assert frame.code == "offline"
            failed_ids.append(frame.id)
        assert frame.kind == REPLY
        assert failed_ids == list(range(60 - len(failed_ids), 60))
        assert broker.log.wait("daemon.stopped")[0].fields["reported"] == len(failed_ids) > 0


@pytest.mark.parametrize("draining", [False, True])
def test_goaway_finished_before_event_or_twice_is_unsupported(
    draining: bool, socket_dir: Path
) -> None:
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "2s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        alice.ask("goaway")
        if not draining:
            assert alice.ask("finished").code == "unsupported"
            return
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        assert is_draining(alice.recv())
        ask(alice, "finished", 98)
        assert alice.ask("finished", message_id=99).code == "unsupported"


def test_goaway_request_in_flight_is_answered_during_drain(listen: str) -> None:
    """The requesting client and the responding one have both sent goaway. Nothing else
    delays the drain.
    """
    with (
        served(listen=listen, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        for each in (alice, bob):
            each.ask("goaway")
        alice.send(REQUEST, "bob", b"?", message_id=9)
        bob.recv()
        broker.stop_soon()
        assert is_draining(bob.recv())
        assert is_draining(alice.recv())
        # bob stays connected while alice waits for its reply.
        ask(bob, "finished", 1)
        assert bob.ask("ping", message_id=2).json == {}
        bob.send(REPLY, "alice", b"!", message_id=9)
        assert alice.recv().body == b"!"
        assert bob.recv().id == 1
        assert alice.ask("finished").json == {}
        alice.close()
        bob.close()
        assert lost(broker) == 0


def test_stock_client_request_in_flight_is_answered_during_drain() -> None:
    with (
        served(limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        alice.send(REQUEST, "bob", b"?", message_id=9)
        bob.recv()
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        # This is longer than the silence after which an idle client is closed.
        threading.Event().wait(0.8)
        bob.send(REPLY, "alice", b"!", message_id=9)
        assert alice.recv().body == b"!"
        assert alice.is_closed("shutting_down")
        assert bob.is_closed("shutting_down")
        assert lost(broker) == 0


def test_stock_client_frame_after_half_close_is_delivered(listen: str) -> None:
    """The recipient has only received, and its connection is half-closed afterwards."""
    with (
        served(listen=listen, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        reach(alice, bob, "bob")
        broker.stop_soon()
        assert alice.is_closed("shutting_down")
        alice.send(MESSAGE, "bob", b"behind")
        alice.send(EVENT, "", b"\x01tnobody")
        assert bob.recv().body == b"behind"
        alice.close()
        assert bob.is_closed("shutting_down")
        assert lost(broker) == 0


def test_stock_client_undeliverable_frame_after_half_close_is_counted(listen: str) -> None:
    with (
        served(listen=listen, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
    ):
        broker.stop_soon()
        assert alice.is_closed("shutting_down")
        for number in range(3):
            alice.send(MESSAGE, "bob", b"behind", message_id=number)
        ask(alice, "ping", 7)
        alice.close()
        assert lost(broker) == 3


@pytest.mark.timing
def test_goaway_client_that_never_finishes_does_not_extend_drain() -> None:
    with served(limits={"drain_timeout": "300ms"}) as broker, broker.login("alice") as alice:
        alice.ask("goaway")
        began = monotonic()
        broker.stop_soon()
        broker.log.wait("daemon.stopped")
        assert 0.3 <= monotonic() - began < 20


@pytest.mark.parametrize("goaway", [False, True])
def test_drain_is_not_extended_by_flooding_client(goaway: bool, listen: str) -> None:
    """Each message that the broker accepts from it is reported, delivered or counted."""
    with (
        served(listen=listen, limits={"drain_timeout": "700ms"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        reach(alice, bob, "bob")
        if goaway:
            alice.ask("goaway")
        stop = threading.Event()

        def flood() -> None:
            run = packed(MESSAGE, "bob", b"x") * 500
            alice.sock.setblocking(True)
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    alice.sock.sendall(run)

        def drink(raw: Raw) -> None:
            with contextlib.suppress(OSError):
                raw.read_to_end()

        threads = [
            threading.Thread(target=flood),
            *(threading.Thread(target=drink, args=(r,)) for r in (alice, bob)),
        ]
        for thread in threads:
            thread.start()
        broker.stop_soon()
        # While the flood goes on.
        broker.log.wait("daemon.stopped")
        stop.set()
        for thread in threads:
            thread.join(30)


def test_stock_client_messages_under_load_are_accounted_for(listen: str) -> None:
    """The number sent equals those delivered, those returned and those that the log
    counts as lost.
    """
    for _ in range(3):
        _account(listen)


@pytest.mark.slow
def test_stock_client_messages_in_many_drains_are_accounted_for(listen: str) -> None:
    for _ in range(100):
        _account(listen)


def _account(listen: str) -> None:
    with (
        served(listen=listen, limits={"drain_timeout": "5s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        reach(alice, bob, "bob")
        sent, got, back = [0], [0], [0]
        ended = threading.Event()

        def send() -> None:
            burst = packed(MESSAGE, "bob", b"x" * 50, message_id=1) * 20
            while not ended.is_set():
                alice.sock.sendall(burst)
                sent[0] += 20
                threading.Event().wait(0.0005)
            alice.sock.shutdown(socket.SHUT_WR)

        def count(raw: Raw, kind: int, into: list[int]) -> None:
            try:
                while True:
                    frame = raw.recv()
                    # The ERROR with the id 0 tells why the connection ends.
                    into[0] += (frame.kind, frame.id) == (kind, 1)
            except (EOFError, OSError):
                return

        def back_until_the_end() -> None:
            count(alice, ERROR, back)
            ended.set()

        threads = [
            threading.Thread(target=send),
            threading.Thread(target=back_until_the_end),
            threading.Thread(target=count, args=(bob, MESSAGE, got)),
        ]
        for thread in threads:
            thread.start()
        threading.Event().wait(0.02)
        broker.stop_soon()
        for thread in threads:
            thread.join(30)
        missing = sent[0] - got[0] - back[0]
        assert lost(broker) == missing, (sent, got, back)


@pytest.mark.timing
def test_drain_long_operations_run_in_turns() -> None:
    """One client has asked 2,000 times for the list of 3,000 clients. The drain ends in
    time, and the other client is served.
    """
    names = {f"c{number}": {"key": f"key {number}"} for number in range(3000)}
    with (
        served(names | {"alice": {}, "bob": {}}, limits={"drain_timeout": "3s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        bob.ask("goaway")
        run = packed(REQUEST, "$broker", b'{"op":"clients"}', codec=JSON) * 2000
        threading.Thread(target=alice.sock.sendall, args=(run,), daemon=True).start()
        began = monotonic()
        broker.stop_soon()
        assert is_draining(bob.recv())
        assert bob.ask("finished").json == {}
        bob.close()
        broker.log.wait("daemon.stopped")
        assert monotonic() - began < 40
