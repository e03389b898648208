"""Receiving from a mailbox: opening it, deliveries, ACKs, and what becomes of messages.

The dialog is tested with a fake broker's session, and the faces with a fake server.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client_faces import Asyncio, Blocking, Face
from support.dialog_pair import OWNER, Pair
from support.fake_broker import FakeServer
from support.fake_mailbox import FakeMailbox
from support.waiting import until

import brokerd_client
from brokerd_client.errors import (
    AlreadyAnswered,
    Closed,
    Disconnected,
    StoreFailed,
    TimedOut,
    WrongUse,
)
from brokerd_client.message import Message
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.mailbox import ack_body
from brokerd_client.protocol.state import State
from brokerd_client.wire.envelope import Envelope, ErrorCode, Flag, Kind, encode
from brokerd_client.wire.framing import frame

DONE: dict[str, object] = {"verb": "done"}


class Box(Pair):
    """A dialog whose client has a mailbox."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mailbox = FakeMailbox(self.broker, "alice")

    def opened(self) -> Box:
        """Connect, and open the mailbox."""
        self.connect()
        self.dialog.open_mailbox()
        self.talk()
        return self

    def settle(self, message: Message, verb: str = "done", **fields: Any) -> Effects[Message]:
        """Acknowledge a message, and exchange what follows."""
        self.dialog.settle(message.unsettled_delivery(), ack_body(verb, **fields))
        return self.talk()


# The dialog


def test_mailbox_is_opened_when_program_receives_and_on_each_connection() -> None:
    box = Box(window=5, window_bytes=1000)
    box.connect()
    box.mailbox.store(b"a")
    assert (box.talk().stored, box.mailbox.ends) == ([], [])
    box.dialog.open_mailbox()
    box.dialog.open_mailbox()
    [message] = box.talk().stored
    assert (message.payload, message.seq, message.attempt, message.id) == (b"a", 1, 1, 101)
    opening = {"op": "open_mailbox", "window": 5, "window_bytes": 1000}
    assert box.mailbox.ends == [opening]
    box.lose()

    [again] = box.connect().stored

    assert (again.seq, again.attempt) == (1, 2)
    assert box.mailbox.ends == [opening] * 2


def test_mailbox_wanted_before_connection_is_opened_with_it() -> None:
    box = Box()
    box.dialog.open_mailbox()
    box.mailbox.store(b"a")
    assert len(box.connect().stored) == 1
    assert box.mailbox.ends == [{"op": "open_mailbox"}]


def test_mailbox_of_broker_without_store_is_not_opened() -> None:
    box = Box()
    box.broker.limits = {}
    assert box.opened().mailbox.ends == []


@pytest.mark.parametrize("window", [None, 64])
def test_mailbox_is_not_opened_if_broker_tells_that_there_is_none(window: int | None) -> None:
    """It tells a client's window with its limits, if the client has a mailbox."""
    box = Box()
    box.broker.features = ["mailboxes"]
    box.broker.limits = {"dedup": 3600} | ({} if window is None else {"window": window})
    ends = [{"op": "open_mailbox"}] * (window is not None)
    assert box.opened().mailbox.ends == ends


@pytest.mark.parametrize("name", ["bob", "alice"])
def test_mailbox_that_client_lacks_is_no_error(name: str) -> None:
    """Unless the program has given a window: then it expects one."""
    box = Box(name=name, key=name.encode(), **({"window": 3} if name == "bob" else {}))
    box.mailbox.owner = "carol"
    box.connect()
    box.dialog.open_mailbox()
    effects = box.talk()
    assert len(effects.warnings) == (name == "bob")
    assert not box.dialog.mailbox.is_open
    assert box.dialog.state is State.READY


def test_mailbox_refused_for_another_reason_is_a_warning() -> None:
    box = Box()
    box.connect()
    box.broker.intercept = lambda session, envelope: (
        box.broker.refuse(session, envelope, ErrorCode.STORE_FAILED) or True
    )
    box.dialog.open_mailbox()
    [warning] = box.talk().warnings
    assert "the mailbox can't be opened" in warning


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_deliveries_are_read_with_all_their_fields(step: int) -> None:
    """In one piece or in many, with an extension, as events, and large ones."""
    box = Box()
    box.dialog.open_mailbox()
    box.mailbox.store(b"plain", "bob", codec=7)
    box.mailbox.store(b"", "bob/1", extension={"key": "k"})
    box.mailbox.store(b"more", "bob", extension={"key": "k", "x": 1})
    box.mailbox.store(b"event", "bob", topic="a.b")
    box.mailbox.store(b"event", "bob", topic="a.b", extension={"x": [1]})
    box.mailbox.store(b"L" * 150_000, "bob")
    stored = box.connect(step).stored

    assert [(each.seq, each.id, each.kind, each.sender) for each in stored] == [
        (1, 101, Kind.MESSAGE, "bob"),
        (2, 102, Kind.MESSAGE, "bob/1"),
        (3, 103, Kind.MESSAGE, "bob"),
        (4, 104, Kind.EVENT, "bob"),
        (5, 105, Kind.EVENT, "bob"),
        (6, 106, Kind.MESSAGE, "bob"),
    ]
    assert [each.body[:5] for each in stored] == [b"plain", b"", b"more", *[b"event"] * 2, b"LLLLL"]
    assert len(stored[-1].body) == 150_000
    assert [each.topic for each in stored] == ["", "", "", "a.b", "a.b", ""]
    assert [each.extension for each in stored] == [
        None,
        {"key": "k"},
        {"key": "k", "x": 1},
        None,
        {"x": [1]},
        None,
    ]
    assert stored[0].codec == 7
    assert not any(each.settled for each in stored)


def test_delivery_with_invalid_fields_is_skipped() -> None:
    box = Box().opened()
    frames = [
        Envelope(Kind.MESSAGE, 1, "b b", b"", flags=Flag.ACK),
        Envelope(Kind.REPLY, 1, "bob", b"", flags=Flag.ACK),
        Envelope(Kind.RECEIPT, 1, "$broker", flags=Flag.ACK),
    ]
    effects = box.hear(b"".join(frame(encode(each)) for each in frames))
    assert (effects.stored, effects.broken) == ([], None)
    assert (len(effects.unreadable), box.dialog.counters["late"]) == (1, 2)
    for rest in (b"", b"\0", b"\0\x09", b"\xff\xff{}", b"\0\x01{"):
        delivery = Envelope(Kind.MESSAGE, 1, "bob", rest, flags=Flag.ACK)
        data = frame(encode(delivery))
        effects = box.hear(data[:5] + bytes((Flag.ACK | Flag.EXTENSION,)) + data[6:])
        assert (effects.stored, len(effects.unreadable), effects.broken) == ([], 1, None)
    short = frame(encode(Envelope(Kind.MESSAGE, 1, "bob", b"123456789")))
    effects = box.hear(short[:5] + b"\4" + short[6:])
    assert (len(effects.unreadable), effects.broken) == (1, None)


@pytest.mark.parametrize(
    ("verb", "fields", "expected"),
    [
        ("done", {}, {"verb": "done"}),
        ("back", {}, {"verb": "back"}),
        ("back", {"delay": 2.5}, {"verb": "back", "delay": 2.5}),
        ("failed", {"reason": "why"}, {"verb": "failed", "reason": "why"}),
        ("dead", {"reason": "x" * 1001}, {"verb": "dead", "reason": "x" * 1000}),
    ],
)
def test_ack_has_verb_and_fields(
    verb: str, fields: dict[str, Any], expected: dict[str, object]
) -> None:
    box = Box().opened()
    box.mailbox.store(b"a")
    [message] = box.talk().stored
    box.settle(message, verb, **fields)
    assert box.mailbox.acks == [(1, expected)]
    assert message.settled
    with pytest.raises(AlreadyAnswered, match="has been acknowledged"):
        message.unsettled_delivery()


@pytest.mark.parametrize("delay", [-1, 2_592_001, "5", True, float("nan")])
def test_ack_with_invalid_delay_raises(delay: Any) -> None:
    with pytest.raises(ValueError, match="is not a valid delay"):
        ack_body("back", delay)


def test_live_message_can_not_be_acknowledged() -> None:
    message = Message(1, 7, "bob", 0, b"", OWNER)
    assert (message.seq, message.attempt, message.settled) == (0, 0, True)
    with pytest.raises(WrongUse, match="only messages from the mailbox"):
        message.unsettled_delivery()


def test_ack_of_lost_connection_is_dropped_and_counted() -> None:
    """On the next connection the same seq is another delivery."""
    box = Box().opened()
    box.mailbox.store(b"a")
    [old] = box.talk().stored
    box.lose()
    [new] = box.connect().stored
    box.settle(old)
    assert (box.mailbox.acks, box.dialog.counters["late"]) == ([], 1)
    box.settle(new)
    assert box.mailbox.acks == [(1, DONE)]


def test_ack_of_message_not_held_is_counted() -> None:
    box = Box().opened()
    box.mailbox.store(b"a")
    [message] = box.talk().stored
    box.mailbox.messages.clear()
    effects = box.settle(message)
    assert (effects.undelivered, box.dialog.counters["late"]) == ([], 1)


def test_ack_refused_for_another_reason_is_reported() -> None:
    box = Box().opened()
    box.mailbox.store(b"a")
    [message] = box.talk().stored
    box.mailbox.ack_error = "store_failed"
    [error] = box.settle(message).undelivered
    assert isinstance(error, StoreFailed)
    assert (error.seq, error.message_id) == (1, 0)
    assert "message 1 of the mailbox was not acknowledged" in str(error)


def test_ack_is_sent_while_draining() -> None:
    box = Box().opened()
    box.mailbox.store(b"a")
    [message] = box.talk().stored
    box.hear_frame(Kind.EVENT, 0, "$broker", topic="$broker.draining")
    assert box.dialog.state is State.DRAINING
    box.settle(message)
    assert box.mailbox.acks == [(1, DONE)]


@pytest.mark.parametrize("ahead", [False, True])
def test_draining_finished_waits_for_acknowledgements(ahead: bool) -> None:
    """The program may finish the messages that it works on."""
    box = Box().opened()
    box.mailbox.store(b"a")
    box.mailbox.store(b"b")
    if ahead:
        assert box.session is not None
        effects = box.dialog.look_ahead(bytes(box.session.out), OWNER)
        assert effects is not None
        box.dialog.pass_over(effects, 0.0)
        box.session.out.clear()
    else:
        effects = box.talk()
    first, second = effects.stored
    box.settle(first)
    box.hear_frame(Kind.EVENT, 0, "$broker", topic="$broker.draining")
    assert box.talk().broken is None
    effects = box.settle(second)
    assert isinstance(effects.broken, Disconnected)
    assert box.mailbox.acks == [(1, DONE), (2, DONE)]


def test_draining_finished_does_not_wait_for_lost_messages() -> None:
    box = Box().opened()
    box.mailbox.store(b"a")
    [old] = box.talk().stored
    box.lose()
    box.mailbox.messages.clear()
    box.connect()
    box.settle(old)
    box.hear_frame(Kind.EVENT, 0, "$broker", topic="$broker.draining")
    assert isinstance(box.talk().broken, Disconnected)


@pytest.mark.parametrize("opened", [True, False])
def test_close_closes_open_mailbox_behind_acks(opened: bool) -> None:
    """What the client holds returns without a failed attempt."""
    box = Box().opened() if opened else Box()
    if not opened:
        box.connect()
    box.mailbox.store(b"a")
    box.mailbox.store(b"b")
    for message in box.talk().stored[:1]:
        box.dialog.settle(message.unsettled_delivery(), b"")
    box.dialog.close(0.0)
    data = box.dialog.data_to_send()
    assert box.session is not None
    box.session.receive(data)
    assert bool(data) is opened
    assert [end["op"] for end in box.mailbox.ends] == ["open_mailbox", "close_mailbox"] * opened
    assert [(seq, each.attempt) for seq, each in box.mailbox.messages.items()][-1:] == [(2, 1)]


def test_mailbox_is_narrowed_before_drain_if_it_is_open() -> None:
    """What no handler has begun goes back, for another member of the pool."""
    box = Box()
    box.dialog.narrow_mailbox()
    box.opened()
    box.mailbox.store(b"a")
    [message] = box.talk().stored
    box.dialog.narrow_mailbox()
    box.dialog.return_delivery(message)
    box.talk()
    assert box.mailbox.ends == [{"op": "open_mailbox"}, {"op": "open_mailbox", "window": 1}]
    assert box.mailbox.acks == [(1, {"verb": "back"})]


def test_look_ahead_tells_deliveries() -> None:
    """The leader of the blocking face may handle them."""
    box = Box().opened()
    box.mailbox.store(b"a")
    assert box.session is not None
    data = bytes(box.session.out)
    effects = box.dialog.look_ahead(data, OWNER)
    assert effects is not None
    assert [message.seq for message in effects.stored] == [1]
    box.dialog.pass_over(effects, 0.0)
    box.session.out.clear()
    box.settle(effects.stored[0])
    assert box.mailbox.acks == [(1, DONE)]


# The faces


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """Each face of the library."""
    face: Face = request.param()
    yield face
    face.close()


class Office:
    """A fake server where bob has a mailbox."""

    def __init__(self, path: Path) -> None:
        self.server = FakeServer(
            str(path / "s.sock"), {each: each.encode() for each in ("alice", "bob")}
        )
        self.mailbox = FakeMailbox(self.server.broker, "bob")
        self.server.start()

    def store(self, *payloads: bytes, **fields: Any) -> None:
        """Store messages."""
        self.server.act(
            lambda broker: [self.mailbox.store(payload, **fields) for payload in payloads]
        )

    def acked(self, *acks: tuple[int, dict[str, object]]) -> None:
        """Wait for these ACKs, and no others."""
        until(lambda: len(self.mailbox.acks) >= len(acks))
        assert self.mailbox.acks == list(acks)

    def connect(self, face: Face, **options: Any) -> Any:
        """Return bob's client."""
        return face.connect(self.server.path, "bob", b"bob", **options)

    def restart(self) -> None:
        """Stop the server, and start it again with its mailbox."""
        self.server.stop()
        for stored in self.mailbox.messages.values():
            stored.holder = None
        self.mailbox.windows.clear()
        self.server.start()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    """A server with bob's mailbox."""
    office = Office(tmp_path)
    yield office
    office.server.stop()


def collect(client: Any, count: int) -> list[Any]:
    """Return the next messages, taken with recv."""
    return [client.recv(20) for _ in range(count)]


def test_face_opens_mailbox_at_first_recv(face: Face, office: Office) -> None:
    """And not when it connects. A message that recv returns is acknowledged by done()."""
    office.store(b"a", b"b")
    client = office.connect(face, window=1)
    client.ping()
    assert office.mailbox.ends == []
    first = client.recv(20)
    assert (first.payload, first.seq, first.attempt) == (b"a", 1, 1)
    with pytest.raises(TimedOut):
        client.recv(0.05)
    client.ping()
    assert office.mailbox.acks == []
    first.done()
    second = client.recv(20)
    assert second.payload == b"b"
    with pytest.raises(AlreadyAnswered):
        first.done()
    second.dead("bad")
    office.acked((1, DONE), (2, {"verb": "dead", "reason": "bad"}))
    assert office.mailbox.ends == [{"op": "open_mailbox", "window": 1}]


def test_face_returns_and_fails_messages(face: Face, office: Office) -> None:
    client = office.connect(face)
    office.store(b"a")
    client.recv(20).retry()
    client.recv(20).retry(delay=5)
    again = client.recv(20)
    assert again.attempt == 1
    again.failed("no paper")
    last = client.recv(20)
    assert (last.seq, last.attempt) == (1, 2)
    with pytest.raises(ValueError, match="is not a valid delay"):
        last.retry(-1)
    last.failed()
    office.acked(
        (1, {"verb": "back", "delay": 0.0}),
        (1, {"verb": "back", "delay": 5}),
        (1, {"verb": "failed", "reason": "no paper"}),
        (1, {"verb": "failed"}),
    )


def test_face_refuses_to_acknowledge_live_message(face: Face, office: Office) -> None:
    client = office.connect(face)
    office.server.act(
        lambda broker: broker.online["bob"].deliver(Envelope(Kind.MESSAGE, 1, "alice", b"x"))
    )
    message = client.recv(20)
    assert message.seq == 0
    for call in (message.done, message.retry, message.failed, message.dead):
        with pytest.raises(WrongUse):
            call()
    assert office.mailbox.acks == []


def test_face_handler_acknowledges_when_it_returns(face: Face, office: Office) -> None:
    """Live messages come between; the handler may acknowledge by itself, once."""
    client = office.connect(face)
    handled: list[tuple[bytes, int, str]] = []

    def handle(message: Any) -> Any:
        handled.append((message.body, message.seq, message.topic))
        if message.body == b"later":
            return message.retry(7)
        return None

    client.on_message(handle)
    office.store(b"a")
    office.server.act(
        lambda broker: broker.online["bob"].deliver(Envelope(Kind.MESSAGE, 1, "alice", b"live"))
    )
    office.store(b"event", topic="t")
    until(lambda: len(handled) == 3)
    assert sorted(handled) == [(b"a", 1, ""), (b"event", 2, "t"), (b"live", 0, "")]
    office.acked((1, DONE), (2, DONE))
    assert office.mailbox.ends == [{"op": "open_mailbox"}]
    assert not office.mailbox.messages


def test_face_handler_may_settle_message_itself(face: Face, office: Office) -> None:
    client = office.connect(face)
    attempts: list[int] = []

    def handle(message: Any) -> Any:
        attempts.append(message.attempt)
        return message.failed("again") if len(attempts) < 3 else message.dead()

    client.on_message(handle)
    office.store(b"a")
    office.acked(
        (1, {"verb": "failed", "reason": "again"}),
        (1, {"verb": "failed", "reason": "again"}),
        (1, {"verb": "dead"}),
    )
    assert attempts == [1, 2, 3]


def test_face_handler_that_raises_means_failed(
    face: Face, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    client = office.connect(face)
    attempts: list[int] = []

    def handle(message: Any) -> None:
        attempts.append(message.attempt)
        if message.attempt < 3:
            raise LookupError("no such order")

    with caplog.at_level(logging.ERROR):
        client.on_message(handle)
        office.store(b"a")
        failed = (1, {"verb": "failed", "reason": "LookupError: no such order"})
        office.acked(failed, failed, (1, DONE))
    assert attempts == [1, 2, 3]
    assert "the handler of message 1 of the mailbox failed" in caplog.text


def test_face_handler_set_later_gets_messages_that_wait(face: Face, office: Office) -> None:
    client = office.connect(face)
    office.store(b"a", b"b", b"c")
    client.recv(20).done()
    until(lambda: len(office.mailbox.windows) == 1)
    handled: list[bytes] = []
    client.on_message(lambda message: handled.append(message.body))
    office.acked((1, DONE), (2, DONE), (3, DONE))
    assert handled == [b"b", b"c"]


def test_face_reopens_mailbox_and_drops_what_waited(face: Face, office: Office) -> None:
    """A message that waited in the client comes once more, not twice."""
    client = office.connect(face)
    office.store(b"a", b"b")
    first = client.recv(20)
    assert first.payload == b"a"
    office.restart()
    until(lambda: client.counters["losses"] == 1)
    first.done()
    again = collect(client, 2)
    assert [message.payload for message in again] == [b"a", b"b"]
    for message in again:
        message.done()
    office.acked((1, DONE), (2, DONE))
    assert client.counters["late"] == 1
    with pytest.raises(TimedOut):
        client.recv(0.05)


def test_face_close_returns_held_messages_without_attempt(face: Face, office: Office) -> None:
    client = office.connect(face)
    office.store(b"a", b"b")
    collect(client, 1)[0].done()
    client.close()
    until(lambda: "bob" not in office.server.broker.online)
    assert [end["op"] for end in office.mailbox.ends] == ["open_mailbox", "close_mailbox"]
    assert office.mailbox.acks == [(1, DONE)]
    assert [each.attempt for each in office.mailbox.messages.values()] == [1]


class Work:
    """A handler that works on each message until it may finish."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._finish = threading.Event()
        self.begun = threading.Event()
        self.handled: list[bytes] = []
        self.finish = self._finish.set

    def __call__(self, message: Any) -> Any:
        self.handled.append(message.body)
        self.begun.set()
        if isinstance(self._face, Blocking):
            self._finish.wait(20)
            return None
        return asyncio.get_running_loop().run_in_executor(None, self._finish.wait, 20)


def test_face_of_draining_broker_acknowledges_what_it_works_on(face: Face, office: Office) -> None:
    """It returns what no handler has begun, and sends ``finished`` behind the last ACK."""
    client = office.connect(face, window=10)
    work = Work(face)
    client.on_message(work)
    office.store(b"a", b"b", b"c")
    assert work.begun.wait(20)

    def drain(broker: Any) -> None:
        office.mailbox.windows.clear()
        payload = Envelope(Kind.EVENT, 0, "$broker", b"{}", topic="$broker.draining")
        broker.online["bob"].deliver(payload)

    office.server.act(drain)
    back = (2, {"verb": "back"}), (3, {"verb": "back"})
    office.acked(*back)
    assert client.counters["losses"] == 0
    work.finish()
    until(lambda: client.counters["losses"] == 1)
    # On its next connection it gets the others again, and acknowledges them too.
    assert office.mailbox.acks[:3] == [*back, (1, DONE)]
    assert work.handled[0] == b"a"


def test_face_drain_returns_messages_not_begun(face: Face, office: Office) -> None:
    """The message whose handler runs is finished, and acknowledged."""
    client = office.connect(face, window=10)
    work = Work(face)
    client.on_message(work)
    office.store(b"a", b"b", b"c")
    assert work.begun.wait(20)
    thread = threading.Thread(target=client.drain, daemon=True)
    thread.start()
    back = (2, {"verb": "back"}), (3, {"verb": "back"})
    until(lambda: [ack for ack in office.mailbox.acks if ack in back][:2] == list(back))
    office.server.act(lambda broker: office.mailbox.windows.clear())
    work.finish()
    thread.join(20)
    assert client.closed
    assert work.handled == [b"a"]
    assert (1, DONE) in office.mailbox.acks
    assert [each.attempt for each in office.mailbox.messages.values()] == [1, 1]
    assert {"op": "open_mailbox", "window": 1} in office.mailbox.ends


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 0}, "window is a number of messages from 1 to 10000"),
        ({"window": 10_001}, "window is a number of messages from 1 to 10000"),
        ({"window_bytes": 0}, "window_bytes is a number of bytes"),
    ],
)
def test_face_with_invalid_window_raises(
    face: Face, office: Office, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        office.connect(face, **options)


def test_blocking_loop_acknowledges_when_it_asks_for_next(office: Office) -> None:
    """What the loop holds when it is left is not acknowledged."""
    office.store(b"a", b"b", b"c")
    with brokerd_client.connect(office.server.path, "bob", b"bob") as client:
        for message in client:
            client.ping()
            office.acked(*[(seq, DONE) for seq in range(1, message.seq)])
            if message.seq == 3:
                break
        gc.collect()
    until(lambda: "bob" not in office.server.broker.online)
    office.acked((1, DONE), (2, DONE))
    assert [each.attempt for each in office.mailbox.messages.values()] == [1]


@pytest.mark.parametrize("way", ["loop", "handler"])
def test_blocking_client_acknowledges_many_messages_together(office: Office, way: str) -> None:
    """In order, with the last one behind all others."""
    count = 500
    office.store(*[b"x"] * count)
    with brokerd_client.connect(office.server.path, "bob", b"bob", window=100) as client:
        if way == "handler":
            client.on_message(lambda message: None)
            until(lambda: not office.mailbox.messages)
        else:
            for message in client:
                if message.seq == count:
                    message.done()
                    break
    until(lambda: not office.mailbox.messages)
    office.acked(*[(seq, DONE) for seq in range(1, count + 1)])


def test_blocking_loop_skips_what_was_acknowledged(office: Office) -> None:
    office.store(b"a", b"b")
    with brokerd_client.connect(office.server.path, "bob", b"bob") as client:
        for message in client:
            if message.seq == 2:
                message.done()
                break
            message.retry(9)
    office.acked((1, {"verb": "back", "delay": 9}), (2, DONE))


def test_asyncio_loop_acknowledges_when_it_asks_for_next(office: Office) -> None:
    """Each of two loops acknowledges its own messages; anext() alone does not."""
    face = Asyncio()
    try:
        client = office.connect(face)._inner
        office.store(b"a", b"b", b"c", b"d")

        async def work() -> None:
            one, two = aiter(client), aiter(client)
            assert (await anext(one)).seq == 1
            assert (await anext(two)).seq == 2
            await client.ping()
            assert office.mailbox.acks == []
            assert (await anext(one)).seq == 3
            assert (await anext(client)).seq == 4
            await client.ping()

        face.run(work)
        assert office.mailbox.acks == [(1, DONE)]
    finally:
        face.close()


def test_asyncio_loop_ends_when_client_is_closed(office: Office) -> None:
    face = Asyncio()
    try:
        client = office.connect(face)._inner
        office.store(b"a")

        async def work() -> list[int]:
            seqs = []
            async for message in client:
                seqs.append(message.seq)
                asyncio.get_running_loop().call_later(0.01, asyncio.ensure_future, client.close())
            return seqs

        assert face.run(work) == [1]
        assert office.mailbox.acks == [(1, DONE)]
    finally:
        face.close()


def test_asyncio_handler_cancelled_by_close_does_not_fail_message(office: Office) -> None:
    face = Asyncio()
    try:
        client = office.connect(face)
        begun = threading.Event()

        async def handle(message: Any) -> None:
            begun.set()
            await asyncio.sleep(60)

        client.on_message(handle)
        office.store(b"a")
        assert begun.wait(20)
        client.close()
        until(lambda: "bob" not in office.server.broker.online)
        assert office.mailbox.acks == []
        assert [each.attempt for each in office.mailbox.messages.values()] == [1]
    finally:
        face.close()


def test_handler_that_finds_client_closed_does_not_fail_message(
    face: Face, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """Another client's Closed is an exception as any other."""
    client = office.connect(face)

    async def close_and_raise() -> None:
        await client._inner.close()
        raise Closed("the client is closed")

    def handle(message: Any) -> Any:
        if message.seq == 1 and message.attempt == 1:
            raise Closed("the other client is closed")
        if message.seq == 2:
            if isinstance(face, Asyncio):
                return close_and_raise()
            client.close()
            raise Closed("the client is closed")
        return None

    with caplog.at_level(logging.INFO):
        client.on_message(handle)
        office.store(b"a")
        office.acked(
            (1, {"verb": "failed", "reason": "Closed: the other client is closed"}), (1, DONE)
        )
        office.store(b"b")
        until(lambda: "client closed" in caplog.text)
    assert len(office.mailbox.acks) == 2
    assert "a message of alice was not processed: client closed" in caplog.text


def test_session_of_lost_client_counts_attempt(face: Face, office: Office) -> None:
    """As a broker does after a connection that ended without a close_mailbox."""
    client = office.connect(face)
    office.store(b"a")
    assert client.recv(20).attempt == 1
    office.server.drop("bob")
    assert client.recv(20).attempt == 2
