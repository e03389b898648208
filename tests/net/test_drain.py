"""The drain of a broker that is stopped: which clients are told, what still arrives,
and how long it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.raw_client import (
    ERROR,
    EVENT,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Raw,
    packed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.core.topics import Topics
from brokerd.net import drain as draining
from brokerd.net.connection import connection, connections

LISTENS = ["127.0.0.1:0", "unix"]


def served(clients: Any = "alice bob carol", listen: Any = "127.0.0.1:0", **more: Any) -> Any:
    return running_daemon(configuration(listen, clients, **more))


@pytest.fixture(params=LISTENS)
def listen(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    return str(socket_dir / "s") if request.param == "unix" else request.param


def queue_for(sender: Raw, to: str, count: int) -> None:
    """Queue `count` messages of 100 kB for a client."""
    for number in range(count):
        sender.send(MESSAGE, to, bytes(100_000), message_id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT


def wait_until_taken(broker: RunningDaemon, name: str, count: int) -> None:
    """Wait until the broker has accepted `count` messages from a client."""
    session = broker.daemon.broker.exchange.clients[name].sessions[name]
    deadline = monotonic() + 30
    while session.messages_in < count:
        assert monotonic() < deadline
        threading.Event().wait(0.005)


def wait_until_arrived(broker: RunningDaemon, name: str) -> None:
    """Wait, in the broker's thread, until the client's connection has bytes to read."""
    connection = broker.daemon.broker.exchange.clients[name].sessions[name].connection
    assert select.select([connection.sock], [], [], 30)[0]


def test_drain_over_reports_each_request_to_its_requester() -> None:
    """When the time is over, a delivered request is abandoned, and one that waited for
    room in flight is offline.
    """
    clients = {"zoe": None, "bob": {"in_flight": 1}}
    with (
        served(clients, limits={"drain_timeout": "200ms"}) as broker,
        # A drain closes connections in no particular order.
        contextlib.ExitStack() as stack,
    ):
        zoe, bob = (stack.enter_context(broker.login(name)) for name in clients)
        for number in (1, 2, 3):
            zoe.send(REQUEST, "bob", b"?", message_id=number, flags=WANT_RECEIPT)
            assert zoe.recv().kind == RECEIPT
        assert bob.recv().id == 1
        broker.stop_soon()
        outcomes = sorted((frame.id, frame.code) for frame in [zoe.recv() for _ in range(3)])
        assert outcomes == [(1, "abandoned"), (2, "offline"), (3, "offline")]
        assert zoe.is_closed("shutting_down")
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert (stopped["reported"], stopped["lost"]) == (2, 0)


def test_drain_idle_clients_are_disconnected_at_once(listen: str) -> None:
    """With nothing queued the broker stops long before the timeout, whether clients
    read or not.
    """
    with served(listen=listen, limits={"drain_timeout": "60s"}) as broker:
        idle = [broker.login(name) for name in ("alice", "bob")]
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["cut_off"] == 0
        for each in idle:
            assert each.is_closed("shutting_down")
            each.close()


@pytest.mark.parametrize("chatty", [False, True], ids=["silent", "chatty"])
def test_drain_queued_messages_are_delivered(listen: str, chatty: bool) -> None:
    """A slow reader gets every accepted byte, even if it has sent frames itself that
    the broker will not read.
    """
    with (
        served(listen=listen) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
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


def test_drain_slow_reader_has_whole_drain_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter time limit of a connection closed for other reasons does not apply."""
    monkeypatch.setattr(connection, "GRACE", 0.0)
    monkeypatch.setattr(connections, "GRACE", 0.0)
    limits = {"drain_timeout": "60s"}
    with (
        served(limits=limits) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        for _ in range(20):
            # Each call takes a turn of the loop, after which the shorter time is over.
            broker.call(lambda: None)
        assert [bob.recv().id for _ in range(60)] == list(range(60))


@pytest.mark.timing
def test_drain_timeout_cuts_off_client_that_does_not_read() -> None:
    """A client that reads nothing is disconnected when the time is over, and counted."""
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
        assert 0.3 <= monotonic() - began < 20


def test_drain_sender_gets_error_for_each_undelivered_message(socket_dir: Path) -> None:
    """A sender stays until its recipient, which does not read, is cut off. It then gets
    an error for every message that the recipient did not take.
    """
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "300ms"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        queue_for(alice, "bob", 60)
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        errors = [alice.recv() for _ in range(stopped["reported"])]
        assert alice.is_closed("shutting_down")
        assert {(frame.kind, frame.code) for frame in errors} == {(ERROR, "offline")}
        # The sender gets one error for each message, in order, from the first that the
        # system did not take whole.
        assert [frame.id for frame in errors] == list(range(60 - len(errors), 60))
        assert len(errors) > 10
        assert (stopped["cut_off"], stopped["flushed"], stopped["lost"]) == (1, 0, 0)
        bob.close()


@pytest.mark.timing
def test_drain_sender_is_closed_when_recipient_has_read_everything(socket_dir: Path) -> None:
    """The sender need not wait for the timeout: both connections are then closed."""
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol") as carol,
    ):
        queue_for(alice, "bob", 60)
        began = monotonic()
        broker.stop_soon()
        assert carol.is_closed("shutting_down")
        assert [bob.recv().id for _ in range(60)] == list(range(60))
        assert bob.is_closed("shutting_down")
        assert alice.is_closed("shutting_down")
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert monotonic() - began < 20
        assert stopped["flushed"] > 10
        assert (stopped["cut_off"], stopped["reported"], stopped["lost"]) == (0, 0, 0)


def test_drain_clients_with_messages_for_each_other_do_not_deadlock(socket_dir: Path) -> None:
    """Both clients have sent to the other and read late. Both are closed in the end."""
    # Not TCP, whose buffers may grow until they take all of it.
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        for sender, to in ((alice, "bob"), (bob, "alice")):
            for number in range(70):
                sender.send(MESSAGE, to, bytes(100_000), message_id=number)
        for name in ("alice", "bob"):
            wait_until_taken(broker, name, 70)
            assert broker.daemon.broker.exchange.clients[name].sessions[name].outbox.waiting
        broker.stop_soon()
        broker.log.wait("daemon.stopping")
        for each in (alice, bob):
            assert [each.recv().id for _ in range(70)] == list(range(70))
        assert alice.is_closed("shutting_down")
        assert bob.is_closed("shutting_down")
        assert broker.log.wait("daemon.stopped")[0].fields["cut_off"] == 0


def test_drain_lost_events_are_counted(socket_dir: Path) -> None:
    """Events are lost when their subscriber does not read, and the log gives their
    number.
    """
    with (
        served(listen=str(socket_dir / "s"), limits={"drain_timeout": "300ms"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        bob.ask("subscribe", topic="t")
        for number in range(60):
            alice.send(EVENT, "", b"\x01t" + bytes(100_000), message_id=number)
        wait_until_taken(broker, "alice", 60)
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        assert stopped["reported"] == 0
        assert 10 < stopped["lost"] < 60


def fill(broker: RunningDaemon, sender: Raw, to: str, size: int) -> None:
    """Queue `size` bytes of messages of 16 bytes for a client, on top of what the
    system takes.
    """
    one = packed(MESSAGE, to, bytes(16))
    run = one * (200_000 // len(one))
    session = broker.daemon.broker.exchange.clients[to].sessions[to]
    deadline = monotonic() + 60
    while session.outbox.waiting < size and monotonic() < deadline:
        sender.write(run)
        sender.ask("ping")


class Clock:
    """The clock of a drain: the real one, plus a millisecond for each message reported
    to its sender.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self.ahead = 0.0

    def time(self) -> float:
        return self._loop.time() + self.ahead

    def slowed(self, run_deferred: Callable[[int], None]) -> Callable[[int], None]:
        def work(count: int) -> None:
            self.ahead += count / 1000
            run_deferred(count)

        return work


def drained(
    queues: int, size: int, timeout_s: float, before: Callable[[RunningDaemon], None]
) -> tuple[dict[str, Any], float]:
    """Return the log fields of a drain in which no client reads, and the seconds that
    it took.
    """
    names = [f"c{number}" for number in range(queues)]
    clients: dict[str, Any] = {name: {"queue": size + 400_000} for name in names} | {"alice": {}}
    with (
        served(clients, limits={"drain_timeout": timeout_s}) as broker,
        contextlib.ExitStack() as crowd,
    ):
        for name in names:
            crowd.enter_context(broker.login(name))
        alice = crowd.enter_context(broker.login("alice"))
        for name in names:
            fill(broker, alice, name, size)
        reader = threading.Thread(target=alice.read_to_end)
        reader.start()
        before(broker)
        began = monotonic()
        broker.stop_soon()
        stopped = broker.log.wait("daemon.stopped")[0].fields
        took = monotonic() - began
        reader.join(30)
        return stopped, took


def test_drain_many_short_messages_do_not_exceed_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker reports as many messages to their senders as time allows. The others
    are counted.
    """
    clocks: list[Clock] = []
    begin = draining.Draining.__init__

    def with_clock(self: draining.Draining, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        monkeypatch.setattr(self, "_loop", clocks[0])

    def slow_down(broker: RunningDaemon) -> None:
        clocks.append(Clock(broker.daemon.server.loop))
        monkeypatch.setattr(
            broker.daemon.broker,
            "run_deferred",
            clocks[0].slowed(broker.daemon.broker.run_deferred),
        )

    monkeypatch.setattr(draining.Draining, "__init__", with_clock)
    # How many reports are still sent during the last writes depends on the machine.
    monkeypatch.setattr(draining, "_WRITE", 0.0)
    stopped, took = drained(5, 2 * 2**20, 0.3, slow_down)
    assert took >= 0.3
    # The sender counts too, if it did not get all reports in time.
    assert stopped["cut_off"] in (5, 6)
    assert 0 < stopped["reported"] < 2 * (1000 * draining._TELL + draining._SLICE)
    assert stopped["reported"] + stopped["lost"] > 5 * 50_000


def test_drain_does_not_wait_for_removal_of_subscriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client is to be told of those, so the broker ends without removing them."""
    monkeypatch.setattr(Topics, "tidy", lambda self, count: None)
    monkeypatch.setattr(draining, "_TELL", 3600.0)
    with served() as broker:
        with broker.login("alice") as alice:
            alice.ask("subscribe", topic="a.b")
        broker.log.wait("client.disconnected")
        broker.stop_soon()
        broker.log.wait("daemon.stopped")


@pytest.mark.slow
def test_drain_fifty_full_queues_end_within_one_second_of_timeout() -> None:
    """Eleven million messages wait for fifty clients that do not read."""
    stopped, took = drained(50, 8 * 2**20, 1.0, lambda broker: None)
    assert 1.0 <= took < 2.0, f"{took:.3f} s"
    assert stopped["cut_off"] == 50
    assert stopped["reported"] > 0
    assert stopped["reported"] + stopped["lost"] > 11_000_000


def test_drain_new_connection_is_refused(listen: str) -> None:
    """From the first moment of the drain no address accepts connections."""
    with (
        served(listen=listen) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol"),
    ):
        queue_for(alice, "bob", 60)
        address = broker.address
        broker.stop_soon()
        broker.log.wait("client.disconnected")
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            Raw(address)
        bob.read_to_end()


def test_drain_frame_received_before_is_answered_shutting_down() -> None:
    """A message that had arrived when the drain began is refused with
    ``shutting_down``, and not silently dropped.
    """
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        # The frames arrive in the same turn of the loop and are not yet read when the
        # drain begins.
        def send() -> None:
            alice.send(MESSAGE, "bob", b"late", message_id=5)
            alice.send(EVENT, "", b"\x01tlate", message_id=6)
            wait_until_arrived(broker, "alice")

        def send_and_stop() -> None:
            asyncio.get_running_loop().call_soon(send)
            broker.daemon.stop_soon("the test")

        broker.call(send_and_stop)
        assert [(frame.id, frame.code) for frame in (alice.recv(), alice.recv())] == [
            (5, "shutting_down"),
            (6, "shutting_down"),
        ]
        assert alice.is_closed("shutting_down")
        assert bob.is_closed("shutting_down")


def test_drain_held_sender_gets_shutting_down_for_each_refused_message() -> None:
    """A sender held by a full queue when the drain begins gets an error for each
    message not accepted.
    """
    with (
        served({"alice": None, "bob": {"queue": "64KiB", "when_full": "wait"}}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        session = broker.daemon.broker.exchange.clients["alice"].sessions["alice"]
        count = 0
        while broker.call(lambda: session.held_by) is None:
            alice.send(MESSAGE, "bob", bytes(50_000), message_id=count, flags=WANT_RECEIPT)
            count += 1
            wait_until_taken(broker, "alice", count)
        assert [alice.recv().kind for _ in range(count - 1)] == [RECEIPT] * (count - 1)
        broker.stop_soon()
        frame = alice.recv()
        assert (frame.id, frame.code) == (count - 1, "shutting_down")
        assert [bob.recv().id for _ in range(count - 1)] == list(range(count - 1))
        assert alice.is_closed("shutting_down")


def test_drain_reply_received_before_is_delivered() -> None:
    """The reply to a request accepted before the drain is delivered if it had arrived."""
    with served() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"?", message_id=9)
        bob.recv()

        def answer() -> None:
            bob.send(REPLY, "alice", b"!", message_id=9)
            wait_until_arrived(broker, "bob")

        def answer_and_stop() -> None:
            asyncio.get_running_loop().call_soon(answer)
            broker.daemon.stop_soon("the test")

        broker.call(answer_and_stop)
        frame = alice.recv()
        assert (frame.kind, frame.id, frame.body) == (REPLY, 9, b"!")


def test_drain_subscriber_of_draining_gets_event() -> None:
    """The event $broker.draining is the last one that a subscriber gets."""
    with served() as broker, broker.login("alice") as alice:
        alice.ask("subscribe", topic="$broker.draining")
        broker.stop_soon()
        frame = alice.recv()
        assert (frame.kind, frame.name) == (EVENT, "$broker")
        assert frame.body.startswith(b"\x10$broker.draining")
        assert alice.is_closed("shutting_down")


def test_drain_operation_is_answered_before_connection_ends() -> None:
    """An administrator may start the drain. The reply is sent before the connection
    ends.
    """
    with served({"root": {"admin": True}}) as broker, broker.login("root") as root:
        assert root.ask("drain").json == {"draining": True}
        assert root.is_closed("shutting_down")
        assert "root" in broker.log.wait("daemon.stopping")[0].fields["reason"]
        broker.log.wait("daemon.stopped")


def test_drain_pending_connection_is_closed() -> None:
    """A handshake under way ends when the broker stops."""
    with served() as broker, broker.raw() as peer:
        peer.read_body()
        broker.stop_soon()
        assert peer.is_closed()
        broker.log.wait("daemon.stopped")
