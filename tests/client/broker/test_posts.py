"""Posts: sent until they are stored or refused, once, in the order of their calls.

The dialog is tested with a fake broker's session, and the faces with a fake server.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.client_faces import Asyncio, Blocking, Face
from support.dialog_pair import Pair
from support.fake_broker import FakeServer, Session
from support.waiting import until

from brokerd_client.errors import (
    BrokerdError,
    Closed,
    Disconnected,
    Full,
    InDoubt,
    InvalidName,
    OutcomeUnknown,
    PayloadError,
    TimedOut,
    Unsupported,
)
from brokerd_client.message import Message, Receipt
from brokerd_client.protocol.dialog import Effects
from brokerd_client.protocol.state import State
from brokerd_client.wire.envelope import Envelope, Flag, Kind, error_payload

REPEATED = ["in_doubt", "store_failed", "shutting_down"]


class Mailroom(Pair):
    """A dialog whose broker keeps the messages to bob, and answers as the test says.

    Attributes:
        arrived: The payload and key of each message, as they arrived.
        answer: What the broker does with a message: "" for a receipt, an error code, or
            None for no answer.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.broker.limits = {"dedup": 100}
        self.broker.intercept = self._store
        self.arrived: list[tuple[bytes, object]] = []
        self.answer: str | None = ""

    def _store(self, session: Session, envelope: Envelope) -> bool:
        if envelope.kind is not Kind.MESSAGE:
            return False
        assert envelope.flags & Flag.RECEIPT
        assert envelope.extension is not None
        self.arrived.append((envelope.payload, envelope.extension["key"]))
        if self.answer == "":
            session.deliver(Envelope(Kind.RECEIPT, envelope.id, "$broker"))
        elif self.answer is not None:
            payload = error_payload(self.answer, "why", "bob")  # type: ignore[arg-type]
            session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", payload, 2))
        return True

    def post(self, payload: bytes, **options: Any) -> int:
        """Post a message to bob, whose key and waiter are its payload."""
        extension = {"key": payload.decode(), **options}
        return self.dialog.post(
            "bob", 0, payload, extension, sys.intern(payload.decode()), self.now
        )

    def tick(self) -> Effects[Message]:
        """Make the dialog do what is due now."""
        effects = self.dialog.tick(self.now)
        if self.session is not None and self.dialog.state is State.READY:
            effects.outcomes += self.talk().outcomes
        return effects

    @property
    def payloads(self) -> list[bytes]:
        """The payloads that have arrived."""
        return [payload for payload, _ in self.arrived]


@pytest.fixture
def room() -> Mailroom:
    """A connected dialog, whose broker keeps messages."""
    room = Mailroom()
    room.connect()
    return room


def test_post_stored_gets_receipt(room: Mailroom) -> None:
    message_id = room.post(b"a", delay=5)
    assert room.talk().outcomes == [("a", Receipt(message_id, "bob"))]
    assert room.arrived == [(b"a", "a")]
    assert not room.dialog.pending_calls
    assert not room.dialog.posts


def test_post_definitely_refused_gets_refusal(room: Mailroom) -> None:
    room.answer = "full"
    room.post(b"a")
    [(waiter, error)] = room.talk().outcomes
    assert (waiter, type(error)) == ("a", Full)
    assert not room.dialog.posts


def test_post_under_way_at_loss_is_sent_again_with_its_key_and_id(room: Mailroom) -> None:
    """The broker's receipt may be lost with the connection."""
    room.answer = None
    message_id = room.post(b"a")
    assert room.talk().outcomes == []
    assert room.lose().outcomes == []
    room.answer = ""
    assert room.connect().outcomes == [("a", Receipt(message_id, "bob"))]
    assert room.arrived == [(b"a", "a")] * 2


def test_post_without_connection_waits_for_one(room: Mailroom) -> None:
    room.lose()
    message_id = room.post(b"a")
    assert room.connect().outcomes == [("a", Receipt(message_id, "bob"))]


def test_posts_are_sent_in_order_of_their_calls_on_every_connection(room: Mailroom) -> None:
    """Those under way at a loss come before those that were called later."""
    room.answer = None
    for payload in (b"1", b"2", b"3"):
        room.post(payload)
    room.talk()
    room.lose()
    room.post(b"4")
    room.connect()
    room.post(b"5")
    room.talk()
    room.lose()
    room.answer = ""

    outcomes = room.connect().outcomes

    assert b" ".join(room.payloads) == b"1 2 3 1 2 3 4 5 1 2 3 4 5"
    assert [waiter for waiter, _ in outcomes] == list("12345")


@pytest.mark.parametrize("code", REPEATED)
def test_post_not_stored_is_sent_again_and_later_ones_wait(room: Mailroom, code: str) -> None:
    """The refused post keeps its place before those that are called meanwhile."""
    room.answer = code
    room.post(b"a")
    room.post(b"b")
    assert room.talk().outcomes == []
    room.post(b"c")
    assert room.tick().outcomes == []
    assert room.payloads == [b"a", b"b"]
    room.answer = ""
    room.now = room.dialog.next_deadline() or 0.0
    assert 0 < room.now <= 0.1

    outcomes = room.tick().outcomes

    assert room.payloads == [b"a", b"b", b"a", b"b", b"c"]
    assert [waiter for waiter, _ in outcomes] == ["a", "b", "c"]
    assert room.dialog.next_deadline() is None


def test_post_waits_double_up_to_ten_seconds(room: Mailroom) -> None:
    """On a new connection they begin again."""
    room.answer = "store_failed"
    waits = []
    room.post(b"a")
    room.talk()
    for _ in range(9):
        due = room.dialog.next_deadline()
        assert due is not None
        waits.append(round(due - room.now, 3))
        room.now = due
        room.tick()
    room.lose()
    room.connect()
    due = room.dialog.next_deadline()
    assert due is not None

    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert round(due - room.now, 3) == 0.1


def test_post_refused_by_draining_broker_is_sent_on_next_connection(room: Mailroom) -> None:
    room.answer = None
    message_id = room.post(b"a")
    room.talk()
    room.hear_frame(Kind.EVENT, 0, "$broker", topic="$broker.draining")
    assert room.dialog.state is State.DRAINING
    payload = error_payload("shutting_down", "why", "bob")  # type: ignore[arg-type]
    assert room.hear_frame(Kind.ERROR, message_id, "$broker", payload=payload).outcomes == []
    room.post(b"b")
    room.now = 50.0
    room.tick()
    assert room.payloads == [b"a"]
    room.lose()
    room.answer = ""

    assert [waiter for waiter, _ in room.connect().outcomes] == ["a", "b"]


@pytest.mark.parametrize("ended_by", ["loss", "in_doubt"])
def test_post_in_doubt_for_longer_than_dedup_is_in_doubt(room: Mailroom, ended_by: str) -> None:
    """The broker may have stored it, and not know its key any more."""
    room.answer = None if ended_by == "loss" else ended_by
    room.post(b"a")
    room.talk()
    room.now += 1
    room.lose()
    room.post(b"b")
    room.now += 98.5
    room.answer = None
    room.connect()
    assert room.payloads == [b"a", b"a", b"b"]
    room.now += 1
    [(first, error)] = room.lose().outcomes
    room.answer = ""

    [(second, receipt)] = room.connect().outcomes

    assert (first, type(error), isinstance(error, OutcomeUnknown)) == ("a", InDoubt, True)
    assert "could be stored twice" in str(error)
    assert (second, type(receipt)) == ("b", Receipt)


def test_post_in_doubt_without_connection_ends_after_dedup(room: Mailroom) -> None:
    """At the next attempt to connect, also if that fails."""
    room.answer = None
    room.post(b"a")
    room.talk()
    room.lose()
    room.post(b"b")
    room.session = None
    for room.now in (99.0, 100.0):
        room.dialog.dialing(room.now)
        effects = room.lose()
        assert [type(error) for _, error in effects.outcomes] == [InDoubt] * (room.now == 100.0)
    room.answer = ""
    assert [waiter for waiter, _ in room.connect().outcomes] == ["b"]


def test_post_refused_for_longer_than_dedup_is_sent_again(room: Mailroom) -> None:
    """It was never in doubt: the broker has said that it is not stored."""
    room.answer = "store_failed"
    room.post(b"a")
    room.talk()
    room.now += 200
    room.answer = ""
    assert [type(outcome) for _, outcome in room.tick().outcomes] == [Receipt]


def test_post_to_broker_without_mailboxes_is_unsupported() -> None:
    """Such a broker would take the message for a live one."""
    room = Mailroom()
    room.broker.limits = {}
    room.connect()
    with pytest.raises(Unsupported, match="no mailboxes"):
        room.post(b"a")
    assert not room.dialog.pending_calls
    room.lose()
    room.post(b"a")

    [(_, error)] = room.connect().outcomes

    assert type(error) is Unsupported
    assert room.arrived == []


def test_post_in_doubt_at_broker_without_mailboxes_stays_in_doubt(room: Mailroom) -> None:
    room.answer = None
    room.post(b"a")
    room.talk()
    room.lose()
    room.broker.limits = {}

    [(_, error)] = room.connect().outcomes

    assert type(error) is InDoubt


@pytest.mark.parametrize(("sent", "expected"), [(True, InDoubt), (False, Disconnected)])
def test_post_without_another_connection_ends(sent: bool, expected: type) -> None:
    room = Mailroom(reconnect=False)
    room.connect()
    room.answer = None
    room.post(b"a")
    if sent:
        room.talk()

    [(waiter, error)] = room.lose().outcomes

    assert (waiter, type(error)) == ("a", expected)
    assert not room.dialog.posts
    with pytest.raises(Disconnected):
        room.post(b"b")


def test_post_at_close_gets_closed(room: Mailroom) -> None:
    """Under way or waiting."""
    room.answer = "store_failed"
    room.post(b"a")
    room.talk()
    room.post(b"b")
    room.answer = None
    room.now = 1.0
    room.tick()
    room.lose()
    room.connect()
    outcomes = room.dialog.close(room.now).outcomes
    assert [(waiter, type(error)) for waiter, error in outcomes] == [("a", Closed), ("b", Closed)]
    with pytest.raises(Closed):
        room.post(b"c")


def test_post_abandoned_is_not_sent_again(room: Mailroom) -> None:
    room.answer = "store_failed"
    first = room.post(b"a")
    room.talk()
    room.post(b"b")
    room.dialog.abandon(first)
    room.dialog.abandon_all(sys.intern("b"))
    room.answer = ""
    room.now = 1.0
    assert room.tick().outcomes == []
    assert room.payloads == [b"a"]


@pytest.mark.parametrize("connected", [True, False])
def test_post_with_wrong_arguments_raises_at_once(room: Mailroom, connected: bool) -> None:
    if not connected:
        room.lose()
    with pytest.raises(InvalidName):
        room.dialog.post("b b", 0, b"", {"key": "a"}, None, 0.0)
    with pytest.raises(PayloadError):
        room.dialog.post("bob", 0, b"", {"key": "a", "x": object()}, None, 0.0)
    assert not room.dialog.posts
    assert not room.dialog.pending_calls


# The faces


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    """Each face of the library."""
    face: Face = request.param()
    yield face
    face.close()


class Keeper:
    """A fake server with a store: messages to bob, by their keys.

    Attributes:
        stored: Payload by key, in the order of storing.
        answers: Whether receipts are sent.
        refusal: The code with which every message is refused, or "".
    """

    def __init__(self, path: Path) -> None:
        self.server = FakeServer(
            str(path / "s.sock"), {each: each.encode() for each in ("alice", "bob")}
        )
        self.server.broker.limits = {"dedup": 3600}
        self.server.broker.intercept = self._store
        self.stored: dict[str, bytes] = {}
        self.arrivals = 0
        self.answers = True
        self.refusal = ""

    def _store(self, session: Session, envelope: Envelope) -> bool:
        if envelope.kind is not Kind.MESSAGE:
            return False
        assert envelope.extension is not None
        if self.refusal:
            payload = error_payload(self.refusal, "why", "bob")  # type: ignore[arg-type]
            session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", payload, 2))
        else:
            self.stored.setdefault(envelope.extension["key"], envelope.payload)
            if self.answers:
                session.deliver(Envelope(Kind.RECEIPT, envelope.id, "$broker"))
        self.arrivals += 1
        return True

    def restart(self) -> None:
        """Stop the server, and start it again with its store."""
        self.server.stop()
        self.server.start()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """A server that keeps messages."""
    keeper = Keeper(tmp_path)
    keeper.server.start()
    yield keeper
    keeper.server.stop()


def connect(face: Face, keeper: Keeper, **options: Any) -> Any:
    """Return a client of the keeper."""
    return face.connect(keeper.server.path, "alice", b"alice", **options)


def in_thread(function: Any, *args: Any, **options: Any) -> tuple[threading.Thread, list[Any]]:
    """Call a function in a thread; return the thread, and the list that gets the result."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function(*args, **options))
        except BrokerdError as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, results


def test_post_of_face_is_stored_once_over_restart(face: Face, keeper: Keeper) -> None:
    """The receipts of the first sending are lost."""
    client = connect(face, keeper)
    assert client.post("bob", {"n": 0}).to == "bob"
    keeper.answers = False
    thread, results = in_thread(client.post, "bob", {"n": 1})
    until(lambda: keeper.arrivals == 2)
    keeper.answers = True
    keeper.restart()
    thread.join(20)

    assert isinstance(results[0], Receipt)
    assert keeper.arrivals == 3
    assert list(keeper.stored.values()) == [b'{"n":0}', b'{"n":1}']
    assert all(len(key) == 32 for key in keeper.stored)


def test_post_of_face_waits_for_broker_that_is_down(face: Face, keeper: Keeper) -> None:
    client = connect(face, keeper)
    keeper.server.stop()
    until(lambda: not client.connected)
    thread, results = in_thread(client.post, "bob", b"x", dedup_key="k", ttl=5, delay=1)
    keeper.server.start()
    thread.join(20)

    assert isinstance(results[0], Receipt)
    assert keeper.stored == {"k": b"x"}
    [envelope] = [each for each in keeper.server.broker.seen if each.kind is Kind.MESSAGE]
    assert envelope.extension == {"ttl": 5, "key": "k", "delay": 1}


@pytest.mark.parametrize("state", ["down", "silent", "refusing"])
def test_post_of_face_past_its_timeout_raises_with_key(
    face: Face, keeper: Keeper, state: str
) -> None:
    """Another post with the key of the error continues it."""
    client = connect(face, keeper)
    if state == "down":
        keeper.server.stop()
        until(lambda: not client.connected)
    keeper.answers = state != "silent"
    keeper.refusal = "store_failed" if state == "refusing" else ""

    with pytest.raises(TimedOut, match=r"within 0\.05 s") as caught:
        client.post("bob", b"x", timeout=0.05)

    keeper.answers, keeper.refusal = True, ""
    if state == "down":
        keeper.server.start()
    client.post("bob", b"x", dedup_key=caught.value.dedup_key)
    assert keeper.stored == {caught.value.dedup_key: b"x"}


def test_post_of_face_closed_meanwhile_raises_with_key(face: Face, keeper: Keeper) -> None:
    client = connect(face, keeper)
    keeper.answers = False
    thread, results = in_thread(client.post, "bob", b"x")
    until(lambda: keeper.arrivals == 1)
    client.close()
    thread.join(20)

    assert isinstance(results[0], Closed)
    assert list(keeper.stored) == [results[0].dedup_key]
    with pytest.raises(Closed):
        client.post("bob", b"y")


def test_post_of_face_refused_raises(face: Face, keeper: Keeper) -> None:
    client = connect(face, keeper)
    keeper.refusal = "full"
    with pytest.raises(Full) as caught:
        client.post("bob", b"x", dedup_key="k")
    assert caught.value.dedup_key == "k"
    with pytest.raises(ValueError, match="dedup_key"):
        client.post("bob", b"x", dedup_key="")
    with pytest.raises(ValueError, match="timeout"):
        client.post("bob", b"x", timeout=-1)


def test_post_of_face_is_sent_again_on_same_connection(face: Face, keeper: Keeper) -> None:
    client = connect(face, keeper)
    keeper.refusal = "in_doubt"
    thread, results = in_thread(client.post, "bob", b"x")
    until(lambda: keeper.arrivals == 1)
    keeper.refusal = ""
    thread.join(20)

    assert isinstance(results[0], Receipt)
    assert client.counters["losses"] == 0


def test_posts_of_threads_survive_restarts_in_order(face: Face, keeper: Keeper) -> None:
    """Each of four senders posts one after the other; receipts are lost at random."""
    client = connect(face, keeper)
    client.post("bob", b"0 0")

    def work(sender: int) -> None:
        for number in range(1, 25):
            client.post("bob", f"{sender} {number}".encode())

    threads = [in_thread(work, sender) for sender in range(1, 5)]
    for _ in range(3):
        keeper.restart()
        count = len(keeper.stored)
        until(lambda count=count: len(keeper.stored) > count or count == 97)  # type: ignore[misc]
    for thread, results in threads:
        thread.join(20)
        assert results == [None]

    stored = [payload.decode().split() for payload in keeper.stored.values()]
    for sender in range(1, 5):
        numbers = [int(number) for each, number in stored if int(each) == sender]
        assert numbers == list(range(1, 25))


def test_post_of_cancelled_task_leaves_nothing_behind(keeper: Keeper) -> None:
    face = Asyncio()
    try:
        client = connect(face, keeper)
        keeper.answers = False

        async def cancel() -> None:
            task = asyncio.ensure_future(client._inner.post("bob", b"x", timeout=60))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        face.run(cancel)
        dialog = client._inner._dialog
        assert not dialog.pending_calls
        assert not dialog.posts
    finally:
        face.close()


def test_posts_of_tasks_are_stored_in_order_of_calls(keeper: Keeper) -> None:
    face = Asyncio()
    try:
        client = connect(face, keeper)

        async def post_all() -> None:
            await asyncio.gather(*(client._inner.post("bob", bytes([n])) for n in range(100)))

        face.run(post_all)
        assert list(keeper.stored.values()) == [bytes([n]) for n in range(100)]
    finally:
        face.close()
