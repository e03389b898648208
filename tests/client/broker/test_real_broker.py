"""Both client faces through a real daemon: the same scenarios, whatever the face."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.tls.authority import Authority, Issued
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client._common import rate_limit
from brokerd_client.errors import (
    AlreadyAnswered,
    Closed,
    Denied,
    Disconnected,
    InvalidKey,
    KeyRejected,
    NameTaken,
    NoSuchClient,
    Offline,
    PayloadError,
    RequestFailed,
    TimedOut,
    TooLarge,
    UndecodablePayload,
    Unsupported,
)
from brokerd_client.message import Receipt
from brokerd_client.presence import Presence


def uvloop_face() -> Face:
    """The asyncio face on uvloop."""
    uvloop = pytest.importorskip("uvloop")
    return Asyncio(uvloop.new_event_loop)


#: Three plain clients, a pool, an administrator and one with rules.
ENTRIES: dict[str, dict[str, Any]] = {
    "alice": {},
    "bob": {},
    "carol": {},
    "worker": {"connections": 4},
    "ops": {"admin": True},
    "ruled": {"send_to": ["bob"], "publish": ["ok.>"], "subscribe": ["ok.>"]},
}
#: A stop waits for clients that do not read, for less than by default.
LIMITS = {"max_message": 1_000_000, "drain_timeout": "2s", "handshake_timeout": "60s"}
FACES: list[Callable[[], Face]] = [Blocking, Asyncio, uvloop_face]


@pytest.fixture(params=["plain", "tls"])
def tls(request: pytest.FixtureRequest, authority: Authority) -> Issued | None:
    """The listener's certificate, or None for a listener without TLS."""
    return authority.issue("server") if request.param == "tls" else None


@pytest.fixture(params=FACES, ids=["blocking", "asyncio", "uvloop"])
def face(
    request: pytest.FixtureRequest, tls: Issued | None, authority: Authority
) -> Iterator[Face]:
    """One kind of client, which trusts the CA; all clients are closed at the end."""
    face: Face = request.param()
    if tls is not None:
        connect = face.connect
        context = authority.context()

        def connect_over_tls(address: Any = None, *args: Any, **options: Any) -> Any:
            if str(address).startswith("tls://"):
                options.setdefault("ssl", context)
            return connect(address, *args, **options)

        face.connect = connect_over_tls  # type: ignore[method-assign]
    yield face
    face.close()


@pytest.fixture
def broker(tls: Issued | None) -> Iterator[RunningBroker]:
    """A real broker with three plain clients, a pool, an administrator and one with
    rules.
    """
    with running(ENTRIES, limits=LIMITS, tls=None if tls is None else tls.entry()) as broker:
        assert broker.address.startswith("tls://") == (tls is not None)
        yield broker


@pytest.fixture
def connect(face: Face, broker: RunningBroker) -> Callable[..., Any]:
    """Connects a client by name."""
    return lambda name, **options: face.connect(broker.address, name, broker.key(name), **options)


Connect = Callable[..., Any]


def test_send_payload_of_every_kind_arrives_equal(connect: Connect) -> None:
    """Bytes, text and JSON arrive equal, with the sender's authenticated name."""
    alice, bob = connect("alice"), connect("bob")
    for payload in (
        b"bytes",
        bytearray(b"array"),
        "text",
        {"a": [1, None]},
        [1.5],
        7,
        True,
        None,
        b"",
        "",
    ):
        alice.send("bob", payload)
        message = bob.recv(PATIENCE)
        assert message.payload == payload
        assert message.sender == "alice"


def test_connect_without_name_is_identified_by_key(face: Face, broker: RunningBroker) -> None:
    """Without a name the broker finds the client by its key, and answers with its name."""
    client = face.connect(broker.address, key=broker.key("carol"))
    assert (client.name, client.address, client.whoami()["protocol"]) == ("carol", "carol", 1)


def test_connect_with_wrong_key_raises_at_once(face: Face, broker: RunningBroker) -> None:
    """The error says that the key was rejected, and no second try follows without the
    caller's knowledge.
    """
    with pytest.raises(KeyRejected, match="does not accept the key used here for the name alice"):
        face.connect(broker.address, "alice", "not the key")


def test_connect_without_key_says_that_none_was_given(
    face: Face, broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not speak of a wrong key, although the name stands for the key at a
    Unix socket.
    """
    monkeypatch.delenv("BROKERD_KEY_FILE", raising=False)
    with pytest.raises((KeyRejected, InvalidKey), match=r"no key.*give key,? ?(key_file)?"):
        face.connect(broker.address, "alice")


def test_connect_with_name_taken_raises_at_once(
    face: Face, broker: RunningBroker, connect: Connect
) -> None:
    """The error is not that of a wrong key; the first connection stays."""
    alice = connect("alice")
    with pytest.raises(Disconnected, match="name_taken") as caught:
        connect("alice")
    assert type(caught.value.__cause__) is NameTaken
    assert alice.ping() > 0


def test_client_disconnected_by_broker_has_reason(connect: Connect) -> None:
    ops, alice = connect("ops"), connect("alice", reconnect=False)
    undelivered: list[Any] = []
    alice.on_undelivered(undelivered.append)
    assert ops.control("disconnect", timeout=PATIENCE, address="alice") == {
        "disconnected": ["alice"],
        "channels": 0,
    }
    until(lambda: not alice.connected)
    with pytest.raises(Disconnected, match=r"\(disconnected\)"):
        alice.ping()
    assert undelivered == []


def test_connect_without_listener_raises_at_once(face: Face, tmp_path: Any) -> None:
    """Without a listener, connecting fails at once with the address in the message."""
    with pytest.raises(Disconnected, match="no-such-socket"):
        face.connect(str(tmp_path / "no-such-socket"), "alice", "k")


def test_messages_arrive_once_and_in_order(connect: Connect) -> None:
    """Thousands of messages, one by one and in batches, arrive once each and in order."""
    alice, bob = connect("alice"), connect("bob")
    for number in range(500):
        alice.send("bob", number)
    for start in range(500, 5000, 1500):
        ids = alice.send_many([("bob", number) for number in range(start, start + 1500)])
        assert len(set(ids)) == 1500
    assert [bob.recv(PATIENCE).payload for _ in range(5000)] == list(range(5000))


def test_message_larger_than_socket_buffers_arrives_unchanged(connect: Connect) -> None:
    """Nothing gets between the parts of a message far larger than any socket's buffer."""
    alice, bob = connect("alice"), connect("bob")
    bodies = [bytes([number]) * 900_000 for number in range(8)]
    for body in bodies:
        alice.send("bob", body)
        alice.send("bob", b"small")
    got = [bob.recv(PATIENCE).body for _ in range(16)]
    assert got[::2] == bodies
    assert set(got[1::2]) == {b"small"}


def test_request_received_without_handler_is_replied_to(connect: Connect) -> None:
    """A request is received like a message where no handler is set, and answered by
    hand.
    """
    alice, bob = connect("alice"), connect("bob")
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(alice.request("bob", {"n": 20}, timeout=PATIENCE).payload)
    )
    asking.start()
    request = bob.recv(PATIENCE)
    request.reply({"n": request.payload["n"] + 1})
    asking.join(PATIENCE)
    assert answers == [{"n": 21}]


def test_request_handler_answers_requests_only(connect: Connect) -> None:
    """Handlers get the requests, also those that waited already; messages still go to
    recv.
    """
    alice, bob = connect("alice"), connect("bob")
    first: list[Any] = []
    early = threading.Thread(
        target=lambda: first.append(alice.request("bob", 1, timeout=PATIENCE).payload)
    )
    early.start()
    alice.send("bob", "message")
    until(lambda: len(bob._inbox.inbox.items) == 2)
    bob.on_request(lambda message: message.payload * 2)
    early.join(PATIENCE)
    assert first == [2]
    assert alice.request("bob", 21, timeout=PATIENCE).payload == 42
    assert bob.recv(PATIENCE).payload == "message"


def test_request_handler_failed_sends_type_only(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The requester gets the exception's type, the log here has the rest; the handler
    goes on.
    """
    alice, bob = connect("alice"), connect("bob")

    def handler(message: Any) -> object:
        raise ZeroDivisionError("secret detail")

    bob.on_request(handler)
    for _ in range(2):
        with pytest.raises(RequestFailed) as caught:
            alice.request("bob", 1, timeout=PATIENCE)
        assert (caught.value.code, caught.value.name) == ("failed", "bob")
        assert "ZeroDivisionError" in str(caught.value)
        assert "secret" not in str(caught.value)
    assert "secret detail" in caplog.text


def test_request_failed_by_hand_has_given_code(connect: Connect) -> None:
    """message.fail answers with a code and a text of the caller's own."""
    alice, bob = connect("alice"), connect("bob")
    caught: list[RequestFailed] = []

    def ask() -> None:
        try:
            alice.request("bob", 1, timeout=PATIENCE)
        except RequestFailed as error:
            caught.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    bob.recv(PATIENCE).fail("too late for that", code="closed_shop")
    asking.join(PATIENCE)
    assert [(error.code, str(error)) for error in caught] == [("closed_shop", "too late for that")]


def test_request_answered_twice_raises(connect: Connect) -> None:
    """A second reply, or a refusal behind a reply, raises AlreadyAnswered; the first
    answer counts.
    """
    alice, bob = connect("alice"), connect("bob")
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(alice.request("bob", 1, timeout=PATIENCE).payload)
    )
    asking.start()
    request = bob.recv(PATIENCE)
    request.reply("first")
    for again in (lambda: request.reply("second"), lambda: request.fail("no")):
        with pytest.raises(AlreadyAnswered, match="of alice has been answered"):
            again()
    asking.join(PATIENCE)
    assert answers == ["first"]


@pytest.mark.parametrize("then", ["return", "raise"])
def test_request_handler_after_own_answer_sends_none(
    connect: Connect, caplog: pytest.LogCaptureFixture, then: str
) -> None:
    """A result or exception after the handler's own answer goes into the log here, and
    the handler goes on.
    """
    alice, bob = connect("alice"), connect("bob")

    def handle(message: Any) -> object:
        if then == "raise":
            raise ZeroDivisionError("after the answer")
        return "second"

    async def late(message: Any) -> object:
        await message.reply("first")
        return handle(message)

    def at_once(message: Any) -> object:
        message.reply("first")
        return handle(message)

    bob.on_request(at_once if isinstance(bob, brokerd_client.Client) else late)
    for _ in range(2):
        assert alice.request("bob", 1, timeout=PATIENCE).payload == "first"
    until(lambda: "had answered" in caplog.text or "after the answer" in caplog.text)


def test_message_handler_is_called_in_order(connect: Connect) -> None:
    """on_message gets the messages that waited and those that come, one after the
    other.
    """
    alice, bob = connect("alice"), connect("bob")
    got: list[int] = []
    alice.send("bob", 0)
    until(lambda: len(bob._inbox.inbox.items) == 1)
    bob.on_message(lambda message: got.append(message.payload))
    alice.send_many([("bob", number) for number in range(1, 2000)])
    until(lambda: len(got) == 2000)
    assert got == list(range(2000))


def test_refusal_has_class_of_its_code(connect: Connect) -> None:
    """Each error code of the broker has its exception, with the recipient's name."""
    ops, ruled = connect("ops"), connect("ruled")
    cases: list[tuple[type[Exception], Callable[[], object]]] = [
        (Offline, lambda: ops.send_confirmed("carol", 1)),
        (NoSuchClient, lambda: ops.request("nobody", 1, timeout=PATIENCE)),
        (Denied, lambda: ruled.send_confirmed("carol", 1)),
        (Denied, lambda: ruled.publish_confirmed("bad.x", 1)),
        (Denied, lambda: ruled.subscribe("bad.x")),
        (Denied, lambda: ruled.control("stats")),
        (Unsupported, lambda: ops.control("no such operation")),
        (TooLarge, lambda: ops.send_confirmed("ops", b"x" * 1_000_001)),
    ]
    for error, act in cases:
        with pytest.raises(error):
            act()
    assert ops.send_confirmed("ops", 1).to == "ops"
    assert ops.counters == {
        "late": 0,
        "dropped": 0,
        "undelivered": 0,
        "unreadable": 0,
        "unrouted": 0,
        "losses": 0,
        "failed_attempts": 0,
    }


def test_bulk_with_receipts_returns_each_outcome(connect: Connect) -> None:
    """send_many_confirmed hides no failure behind another, and raises none."""
    alice = connect("alice")
    connect("bob")
    outcomes = alice.send_many_confirmed([("bob", 1), ("carol", 2), ("bob", 3), ("nobody", 4)])
    assert [type(outcome) for outcome in outcomes] == [Receipt, Offline, Receipt, NoSuchClient]


def test_undelivered_send_calls_handler_with_its_id(connect: Connect) -> None:
    """A send without a receipt that fails comes to the handler, with the id that send
    returned.
    """
    alice = connect("alice")
    told: list[Any] = []
    alice.on_undelivered(told.append)
    message_id = alice.send("carol", "x")
    until(lambda: bool(told))
    assert [(type(error), error.message_id, error.name) for error in told] == [
        (Offline, message_id, "carol")
    ]
    assert alice.counters["undelivered"] == 1


def test_undelivered_send_without_handler_is_logged(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """No send fails without a trace."""
    alice = connect("alice")
    alice.send("carol", "x")
    until(lambda: "carol" in caplog.text)


def lines_and_counts(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Return how many undelivered messages have a line of their own, and how many are
    counted.
    """
    texts = [record.getMessage() for record in caplog.records if "delivered" in record.getMessage()]
    counts = [int(text.partition(" ")[0]) for text in texts if " more messages " in text]
    return len(texts) - len(counts), sum(counts)


def test_undelivered_sends_beyond_first_are_counted_in_log(
    connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few have their lines and one line counts the rest, a while later and even if
    nothing else happens.
    """
    monkeypatch.setattr(rate_limit, "_PERIOD_S", 0.1)
    alice = connect("alice")
    alice.send_many([("carol", number) for number in range(100)])
    until(lambda: sum(lines_and_counts(caplog)) == 100)
    assert lines_and_counts(caplog)[0] < 20
    assert "carol" in caplog.records[-1].getMessage()


def test_undelivered_count_is_logged_at_close(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """close() does not swallow the count."""
    alice = connect("alice")
    alice.send_many([("carol", number) for number in range(100)])
    until(lambda: alice.counters["undelivered"] == 100)
    alice.close()
    lines, counted = lines_and_counts(caplog)
    assert lines + counted == 100
    assert lines < 20


def test_close_reports_refusals_that_arrive_after_it(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A script's last send before close() does not fail without a trace."""
    alice = connect("alice")
    alice.send("carol", "x")
    alice.close()
    assert "carol" in caplog.text


def test_send_payload_without_codec_raises_with_remedy(connect: Connect) -> None:
    """A payload without a codec is refused before anything is sent; the error names the
    remedy.
    """
    alice = connect("alice")
    connect("bob")
    with pytest.raises(PayloadError, match="pickle"):
        alice.send("bob", object())
    with pytest.raises(PayloadError):
        alice.send_many([("bob", 1), ("bob", {1, 2})])
    assert alice.counters["undelivered"] == 0


def test_pickle_is_decoded_for_trusted_sender_only(connect: Connect) -> None:
    """A pickled payload is decoded only if its sender is named in allow_pickle_from."""
    alice, carol = connect("alice"), connect("carol")
    bob = connect("bob", allow_pickle_from=["alice"])
    for sender in (alice, carol):
        sender.send("bob", {1, 2}, codec="pickle")
    first, second = sorted(
        (bob.recv(PATIENCE) for _ in range(2)), key=lambda message: str(message.sender)
    )
    assert first.payload == {1, 2}
    with pytest.raises(UndecodablePayload, match="allow_pickle_from"):
        _ = second.payload
    assert second.body


def test_own_codec_and_extension_arrive_unchanged(connect: Connect) -> None:
    """A codec of 128 or more and the keys of an extension arrive as given."""
    alice, bob = connect("alice"), connect("bob")
    alice.send("bob", b"\x01\x02", codec=200, ttl=9, extension={"traceparent": "00-1"})
    message = bob.recv(PATIENCE)
    assert (message.codec, message.payload) == (200, b"\x01\x02")
    assert message.extension == {"traceparent": "00-1", "ttl": 9}


def test_request_timed_out_leaves_nothing(connect: Connect) -> None:
    """After a request timed out its late reply is dropped and counted, and the table is
    empty.
    """
    alice, bob = connect("alice"), connect("bob")
    with pytest.raises(TimedOut):
        alice.recv(0.01)
    with ThreadPoolExecutor(1) as caller:
        # With a ttl of its own, the request does not expire at the broker meanwhile.
        call = caller.submit(alice.request, "bob", 1, timeout=2, ttl=PATIENCE)
        request = bob.recv(PATIENCE)
        assert isinstance(call.exception(PATIENCE), TimedOut)
    request.reply("late")
    until(lambda: alice.counters["late"] == 1)
    assert len(alice._dialog.pending_calls) == 0


def test_subscription_gets_matching_events_until_end(connect: Connect) -> None:
    """Each subscription gets the matching events, in order, until it is ended."""
    alice, bob = connect("alice"), connect("bob")
    called: list[Any] = []
    wide, narrow = bob.subscribe("a.>"), bob.subscribe("a.*.c")
    bob.subscribe("a.b.c", callback=lambda event: called.append(event.payload))
    for topic in ("a.b.c", "a.b", "b", "a.x.c"):
        alice.publish_confirmed(topic, topic)
    assert [wide.recv(PATIENCE).topic for _ in range(3)] == ["a.b.c", "a.b", "a.x.c"]
    assert [narrow.recv(PATIENCE).payload for _ in range(2)] == ["a.b.c", "a.x.c"]
    until(lambda: called == ["a.b.c"])
    wide.unsubscribe()
    narrow.close()
    alice.publish_confirmed("a.b", 1)
    with pytest.raises(Closed):
        wide.recv(PATIENCE)
    assert bob.ping() > 0
    assert bob.counters["unrouted"] == 0


def test_group_members_share_events(connect: Connect) -> None:
    """Each event goes to one member of the group, and both get some."""
    alice = connect("alice")
    members = [connect("worker"), connect("worker")]
    feeds = [member.subscribe("jobs.>", group="g") for member in members]
    for number in range(100):
        alice.publish_confirmed("jobs.x", number)
    got: list[list[int]] = [[], []]
    ends_at = time.monotonic() + PATIENCE
    while len(got[0]) + len(got[1]) < 100 and time.monotonic() < ends_at:
        for feed, numbers in zip(feeds, got, strict=True):
            with contextlib.suppress(TimedOut):
                while True:
                    numbers.append(feed.recv(0.01).payload)
    assert sorted(got[0] + got[1]) == list(range(100))
    assert got[0]
    assert got[1]


def test_pool_reply_reaches_requesting_member(connect: Connect) -> None:
    """A pool's connections share the name; a reply reaches the connection that asked."""
    first, second, bob = connect("worker"), connect("worker"), connect("bob")
    assert first.name == second.name == "worker"
    assert first.address != second.address
    bob.on_request(lambda message: message.sender)
    for member in (first, second):
        assert member.request("bob", 1, timeout=PATIENCE).payload == member.address


def test_presence_watch_yields_list_then_changes(connect: Connect) -> None:
    """A watch yields every client once, then the changes; clients() agrees."""
    alice = connect("alice")
    watch = alice.watch_presence()
    told = [watch.recv(PATIENCE) for _ in range(6)]
    assert {item.name for item in told} == {"alice", "bob", "carol", "worker", "ops", "ruled"}
    assert [item.name for item in told if item.online] == ["alice"]
    bob = connect("bob")
    assert watch.recv(PATIENCE) == Presence("bob", online=True)
    assert {client.name for client in alice.clients() if client.online} == {"alice", "bob"}
    bob.close()
    assert watch.recv(PATIENCE) == Presence("bob", online=False)
    watch.close()
    with pytest.raises(Closed):
        watch.recv(PATIENCE)


def test_reconnect_restores_subscriptions_handlers_and_watch(
    connect: Connect, broker: RunningBroker
) -> None:
    """After the broker was killed and started again: same client, same subscriptions,
    same handlers, and a watch that has missed no client.
    """
    alice, bob = connect("alice"), connect("bob")
    feed, watch = bob.subscribe("a.>"), bob.watch_presence()
    for _ in range(6):
        watch.recv(PATIENCE)
    bob.on_request(lambda message: "still here")
    broker.kill()
    broker.start()
    until(lambda: alice.counters["losses"] >= 1 and bob.counters["losses"] >= 1)
    until(lambda: alice.connected and bob.connected)
    assert alice.request("bob", 1, timeout=PATIENCE).payload == "still here"
    alice.publish_confirmed("a.b", "again")
    assert feed.recv(PATIENCE).payload == "again"


def test_send_without_connection_waits_for_reconnect(
    connect: Connect, broker: RunningBroker
) -> None:
    """A send without a connection waits for one; it is sent once."""
    alice = connect("alice")
    broker.kill()
    until(lambda: not alice.connected)
    sending = threading.Thread(target=lambda: alice.send("alice", "patience", timeout=PATIENCE))
    sending.start()
    broker.start()
    sending.join(PATIENCE)
    assert alice.recv(PATIENCE).payload == "patience"
    with pytest.raises(TimedOut):
        alice.recv(0.1)


def test_send_without_broker_is_disconnected_not_in_doubt(
    connect: Connect, broker: RunningBroker
) -> None:
    """When the broker does not come back in time the send is Disconnected, and not in
    doubt.
    """
    alice = connect("alice")
    broker.kill()
    until(lambda: not alice.connected)
    for act in (
        lambda: alice.send("bob", 1, timeout=0.05),
        lambda: alice.request("bob", 1, timeout=0.05),
    ):
        with pytest.raises(Disconnected) as caught:
            act()
        assert type(caught.value) is Disconnected


def test_messages_received_before_loss_are_kept(connect: Connect, broker: RunningBroker) -> None:
    """Messages that were delivered and not yet taken are not lost with the connection,
    though a write notices its end.

    The broker has reported them as delivered, so their loss would go unnoticed.
    """
    alice, bob = connect("alice"), connect("bob", inbox=1)
    for number in range(20):
        alice.send_confirmed("bob", [number, "x" * 2000])
    broker.stop()
    # The first may still be taken by the system, and the next finds out.
    for _ in range(3):
        with contextlib.suppress(Disconnected):
            bob.send("alice", b"y" * 200_000, timeout=0.05)
    assert [bob.recv(PATIENCE).payload[0] for _ in range(20)] == list(range(20))
    broker.start()


def test_reconnect_disabled_first_loss_is_final(connect: Connect, broker: RunningBroker) -> None:
    """With reconnect=False every later call is Disconnected; messages that had arrived
    can still be taken.
    """
    alice = connect("alice", reconnect=False)
    alice.send_confirmed("alice", "kept")
    broker.kill()
    until(lambda: alice.closed)
    assert alice.recv(PATIENCE).payload == "kept"
    for act in (lambda: alice.recv(PATIENCE), lambda: alice.send("bob", 1), lambda: alice.ping()):
        with pytest.raises(Disconnected):
            act()


@pytest.mark.timing
def test_client_closed_raises_closed(connect: Connect) -> None:
    """close() twice is harmless; every other call is Closed; waiting calls get Closed
    at once.
    """
    alice = connect("alice")
    heard: list[Exception] = []

    def wait() -> None:
        try:
            alice.recv(PATIENCE)
        except Closed as error:
            heard.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    started = time.monotonic()
    alice.close()
    waiting.join(PATIENCE)
    assert time.monotonic() - started < PATIENCE / 2
    assert len(heard) == 1
    alice.close()
    assert alice.closed
    for act in (
        lambda: alice.recv(1),
        lambda: alice.send("bob", 1),
        lambda: alice.request("bob", 1),
    ):
        with pytest.raises(Closed):
            act()


def test_slow_recipient_holds_sender_and_bounds_memory(connect: Connect) -> None:
    """Messages that are not taken wait in the broker and then in the sender, and all
    arrive once they are taken.
    """
    alice, bob = connect("alice"), connect("bob", inbox=100_000)
    body = b"x" * 50_000
    sent: list[int] = []

    def send() -> None:
        sent.extend(alice.send("bob", body) for _ in range(600))

    sending = threading.Thread(target=send)
    sending.start()
    until(lambda: bob._meter.full)
    assert bob._meter.held < 1_000_000
    assert sum(len(bob.recv(PATIENCE).body) for _ in range(600)) == 600 * 50_000
    sending.join(PATIENCE)
    assert len(sent) == 600


def test_request_with_full_inbox_gets_its_reply(connect: Connect) -> None:
    """A request made while the inbox is full gets its reply, although that is behind
    the messages.
    """
    alice, bob, carol = connect("alice"), connect("bob", inbox=1000), connect("carol")
    carol.on_request(lambda message: "reply")
    alice.send_many([("bob", b"x" * 300)] * 5)
    until(lambda: bob._meter.full)
    assert bob.request("carol", 1, timeout=PATIENCE).payload == "reply"
    assert [len(bob.recv(PATIENCE).body) for _ in range(5)] == [300] * 5


def test_client_shared_by_threads_gives_each_its_reply(connect: Connect) -> None:
    """Requests from many threads over one connection each get their own reply."""
    alice, bob = connect("alice"), connect("bob")
    bob.on_request(lambda message: message.payload + 1)
    wrong: list[int] = []

    def ask(start: int) -> None:
        wrong.extend(
            n
            for n in range(start, start + 50)
            if alice.request("bob", n, timeout=PATIENCE).payload != n + 1
        )

    threads = [threading.Thread(target=ask, args=(start * 1000,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
