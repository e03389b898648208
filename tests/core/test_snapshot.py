"""The state of the broker, captured and restored in another broker: no client can tell
the difference.
"""

from __future__ import annotations

import json

import pytest
from support.fake_network import FakeNet, client
from support.session_fields import CAPTURED, MADE_ANEW, PARTING

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core.broker import Broker, CoreLimits
from brokerd.core.exchange import Client
from brokerd.core.operations import _LONG
from brokerd.core.outbox import FrameOutbox, StreamOutbox
from brokerd.core.session import Session
from brokerd.core.snapshot import Pieces, capture, restore
from brokerd.core.write_buffer import RouteEntry
from brokerd_client.wire.envelope import Kind


def test_snapshot_waiting_frames_arrive_once_and_in_order() -> None:
    """The frames wait in chunks, and the first one is partly written; the client reads
    on without noticing the upgrade.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block(25)
    sent = [b"%d" % number * 70_000 for number in range(5)] + [
        b"%d" % number for number in range(5)
    ]
    for payload in sent:
        alice.message("bob", payload)

    net.hand_over()
    alice.message("bob", b"and one more")
    bob.read()

    assert bob.payloads() == [*sent, b"and one more"]
    assert bob.session.messages_out == len(sent) + 1


def test_snapshot_pool_queue_keeps_facts_of_each_frame() -> None:
    """Frames of a member that leaves go to another member, or are reported to their
    sender, after the upgrade too.
    """
    net = FakeNet(client("alice"), client("pool", connections=2))
    alice, first, second = net.connect("alice"), net.connect("pool"), net.connect("pool")
    first.block(5)
    second.block(5)
    alice.message("pool", b"for anybody", 1)
    alice.message("pool", b"for anybody too", 2)
    alice.message(first.address, b"for this one", 3, receipt=True)
    alice.take()

    net.hand_over()
    first.leave()
    second.read()

    assert alice.error() == (3, "offline")
    assert sorted(second.payloads()) == [b"for anybody", b"for anybody too"]


def test_snapshot_drop_oldest_still_keeps_answers() -> None:
    """An answer to the client's own request is not dropped for a newer message."""
    net = FakeNet(client("alice"), client("bob", queue=120, when_full=WhenFull.DROP_OLDEST))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block(1)
    bob.op("ping", 7)
    alice.message("bob", b"a" * 30, 1, receipt=True)

    net.hand_over()
    alice.message("bob", b"b" * 40, 2, receipt=True)
    alice.message("bob", b"c" * 40, 3, receipt=True)
    bob.read()

    kinds = [(each.kind, each.payload[:1]) for each in bob.take()]
    assert kinds == [(Kind.REPLY, b"{"), (Kind.MESSAGE, b"c")]


def test_snapshot_held_sender_stays_held_until_there_is_room() -> None:
    """Its frame keeps its place, and is delivered when the recipient reads."""
    net = FakeNet(client("alice"), client("bob", queue=60))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for number in range(3):
        alice.message("bob", b"%d" % number * 30)
    assert alice.held

    net.hand_over()
    assert alice.held
    assert bob.session.waiters == {alice.session: None}
    bob.read()

    assert not alice.held
    assert [payload[:1] for payload in bob.payloads()] == [b"0", b"1", b"2"]
    # The frame that waited was counted once.
    assert alice.session.messages_in == 3


def test_snapshot_held_sender_keeps_its_deadline() -> None:
    """The time it had waited before counts."""
    net = FakeNet(client("alice"), client("bob", queue=60), limits=CoreLimits(wait_timeout=30.0))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for number in range(2):
        alice.message("bob", b"x" * 30, number)
    net.advance(20)

    net.hand_over()
    net.advance(9)
    assert alice.held
    net.advance(1.5)

    assert alice.error() == (1, "full")


def test_snapshot_sender_not_reading_answers_stays_held() -> None:
    """It is held until it reads, without a timeout."""
    net = FakeNet(client("alice", queue=40))
    alice = net.connect("alice")
    alice.block()
    for number in range(4000):
        alice.message("nobody", b"", number)
    assert alice.session.held_by is alice.session

    net.hand_over()
    net.advance(10_000)
    assert alice.session.held_by is alice.session
    alice.read()

    assert len(alice.take()) == 4000


def test_snapshot_pending_request_is_answered_afterwards() -> None:
    """The answer reaches the requester, whatever the rules are. A responder that leaves
    without an answer causes an ERROR.
    """
    net = FakeNet(client("alice"), client("bob", send_to=()))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.request("bob", b"?", 1)
    alice.request("bob", b"?", 2)

    net.hand_over()
    bob.reply("alice", b"!", 1)
    bob.leave()

    answer, error = alice.take()
    assert (answer.kind, answer.id, answer.payload) == (Kind.REPLY, 1, b"!")
    assert (error.kind, error.id) == (Kind.ERROR, 2)


def test_snapshot_subscriptions_continue() -> None:
    """Every subscriber gets the event, and one member of each group."""
    net = FakeNet(client("alice"), client("bob"), client("carol"), client("dave"))
    alice, bob, carol, dave = (net.connect(name) for name in ("alice", "bob", "carol", "dave"))
    bob.ask("subscribe", topic="jobs.>")
    carol.ask("subscribe", topic="jobs.*", group="g")
    dave.ask("subscribe", topic="jobs.*", group="g")

    net.hand_over()
    alice.publish("jobs.new", b"one")
    alice.publish("jobs.new", b"two")

    assert bob.payloads() == [b"one", b"two"]
    assert sorted(carol.payloads() + dave.payloads()) == [b"one", b"two"]
    assert bob.ask("unsubscribe", topic="jobs.>") == {"topic": "jobs.>", "group": None}
    assert len(net.broker.topics) == 2


def test_snapshot_frames_of_closed_session_are_reported_afterwards() -> None:
    """A session has closed and its messages are not reported yet: they are reported
    after the upgrade.
    """
    net = FakeNet(client("alice"), client("bob"), client("eve"))
    alice, bob, eve = net.connect("alice"), net.connect("bob"), net.connect("eve")
    alice.request("bob", b"?", 1)
    bob.take()
    bob.block()
    alice.message("bob", b"waits", 2)
    eve.message("bob", b"of one that goes too", 3)
    eve.leave()
    net.peers.remove(bob)
    net.broker.detach(bob.session, net.now)

    net.hand_over()
    assert net.broker.has_deferred_work
    net.settle()

    assert sorted((each.id, each.kind) for each in alice.take()) == [
        (1, Kind.ERROR),
        (2, Kind.ERROR),
    ]
    assert net.broker.replies.dropped == 1


@pytest.mark.parametrize("connections", [1, 2])
def test_snapshot_successor_gets_no_errors_of_sender_left_before(
    connections: int,
) -> None:
    """The sender leaves before the upgrade, its successor comes after it: the message
    has no sender any more.
    """
    net = FakeNet(client("alice"), client("bob", connections=connections))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", b"waits", 1, receipt=True)
    alice.leave()

    net.hand_over()
    successor = net.connect("alice")
    bob.leave()

    assert successor.take() == []
    assert net.broker.replies.dropped == 1


def test_snapshot_successor_gets_no_errors_of_sender_left_after() -> None:
    """The recipients of a sender are captured too."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", b"waits", 1, receipt=True)
    alice.take()

    net.hand_over()
    alice.leave()
    successor = net.connect("alice")
    bob.leave()

    assert successor.take() == []


def test_snapshot_oversized_frame_is_skipped_to_its_end() -> None:
    """Half of it arrived before the upgrade, and half of it arrives after."""
    net = FakeNet(client("alice"), client("bob"), limits=CoreLimits(max_message=100))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.send_bytes(b"\x00\x00\x01\x00" + b"\x01\x00\x00\x03" + bytes(8) + b"bob" + b"x" * 100)
    assert alice.error() == (0, "too_large")

    net.hand_over()
    alice.send_bytes(b"x" * (256 - 115))
    alice.message("bob", b"fits")

    assert bob.payloads() == [b"fits"]


def test_snapshot_partly_received_frame_is_completed() -> None:
    """The network layer keeps the part; the core handles the whole frame."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    whole = b"\x00\x00\x00\x12" + b"\x01\x00\x00\x03" + bytes(8) + b"bob" + b"abc"
    alice.send_bytes(whole[:20])

    net.hand_over()
    alice.send_bytes(whole[20:])

    assert bob.payloads() == [b"abc"]


def test_snapshot_counters_continue() -> None:
    """This holds for the broker and each connection; the upgrades are counted too."""
    net = FakeNet(client("alice", admin=True), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"one")
    alice.message("nobody", b"two")
    bob.leave()
    alice.take()
    before = alice.ask("stats")
    (peer_before,) = alice.ask("connections")["connections"]

    net.hand_over()
    after = alice.ask("stats")
    (peer_after,) = alice.ask("connections")["connections"]

    changes = {key for key in before if before[key] != after[key]}
    assert changes == {"messages_in", "bytes_in", "messages_out", "bytes_out", "upgrades"}
    assert (after["messages_in"], after["upgrades"]) == (before["messages_in"] + 2, 1)
    assert peer_after["messages_in"] == peer_before["messages_in"] + 2
    assert peer_after["since"] == peer_before["since"]


def test_snapshot_presence_is_unchanged() -> None:
    """No client came or left: nothing is announced, and every client is online since
    the same time.
    """
    net = FakeNet(client("alice"), client("bob"), client("carol"))
    alice = net.connect("alice")
    net.advance(5)
    net.connect("bob")
    alice.ask("subscribe", topic="$broker.>")
    before = alice.ask("clients")
    net.advance(5)

    net.hand_over()

    assert alice.take() == []
    assert alice.ask("clients") == before


def test_snapshot_rate_is_not_refilled() -> None:
    """A client that has used up its rate for this second does not get it again."""
    net = FakeNet(client("alice", rate=RateConfig(3.0, None)), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(3):
        alice.message("bob", b"", number)

    net.hand_over()
    alice.message("bob", b"", 3)
    net.advance(1)
    alice.message("bob", b"", 4)

    assert alice.error() == (3, "rate_limited")
    assert len(bob.take()) == 4


def test_snapshot_changed_rate_starts_full() -> None:
    """A changed rate starts full after a reload as well."""
    net = FakeNet(client("alice", rate=RateConfig(1.0, None)), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob")

    net.hand_over(client("alice", rate=RateConfig(None, 500.0)), client("bob"))
    alice.message("bob")

    assert len(bob.take()) == 2


def test_snapshot_removed_client_gets_its_queue_and_is_unlisted() -> None:
    """A configuration without the client removes it from every list, and no frame
    reaches it; its queue is still written.
    """
    net = FakeNet(client("alice"), client("bob"), client("carol"))
    alice, bob, carol = net.connect("alice"), net.connect("bob"), net.connect("carol")
    bob.ask("subscribe", topic="a")
    bob.block(3)
    alice.message("bob", b"waits")
    bob.message("carol", b"x")
    carol.take()
    carol.block()
    bob.message("carol", b"is still to be written")

    net.hand_over(client("alice"), client("carol"))
    alice.message("bob", b"too late", 2)

    assert alice.error() == (2, "no_such_client")
    assert net.broker.exchange.resolve("bob") is not bob.session.client
    assert len(net.broker.topics) == 0
    assert bob.session.outbox.limit == client("bob").queue
    bob.read()
    assert bob.payloads() == [b"waits"]
    for peer in (bob, carol, alice):
        peer.leave()
    assert not net.leftovers()


def test_snapshot_session_removed_by_reload_stays_out() -> None:
    """The client was removed by a reload and configured again: its old connection does
    not belong to the new client.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice, former = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"first")
    limits = CoreLimits()
    net.broker.reconfigure({"alice": client("alice")}, limits, net.now)
    net.broker.reconfigure({"alice": client("alice"), "bob": client("bob")}, limits, net.now)
    successor = net.connect("bob")
    net.settle()

    net.hand_over()
    alice.message("bob", b"second")

    assert former.payloads() == [b"first"]
    assert successor.payloads() == [b"second"]
    former.leave()
    assert net.broker.exchange.find("bob") is successor.session


def test_snapshot_released_name_stays_with_its_new_connection() -> None:
    """The output of a closed connection is still written after an upgrade, and its
    client is not announced as offline.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice, former = net.connect("alice"), net.connect("bob")
    former.block(3)
    alice.message("bob", b"first")
    net.broker.replies.close(former.session, "the test", code=None)
    net.broker.release_name(former.session, net.now)
    net.broker.release_name(former.session, net.now)
    successor = net.connect("bob")
    alice.ask("subscribe", topic="$broker.offline.bob")
    net.settle()

    net.hand_over()
    alice.message("bob", b"second")

    assert successor.payloads() == [b"second"]
    former.read()
    assert former.payloads() == [b"first"]
    former.leave()
    net.settle()
    assert net.broker.exchange.find("bob") is successor.session
    assert alice.take() == []


def test_snapshot_subscription_forbidden_by_new_rules_ends() -> None:
    """It ends after a reload as well."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("subscribe", topic="a")
    bob.ask("subscribe", topic="b")

    net.hand_over(client("alice"), client("bob", subscribe=("b",)))
    alice.publish("a", b"a")
    alice.publish("b", b"b")

    assert bob.payloads() == [b"b"]
    assert bob.session.subscriptions == {("b", None)}


def test_snapshot_empty_outbox_becomes_configured_kind() -> None:
    """An outbox that holds frames keeps its kind, with the new limit."""
    net = FakeNet(client("alice"), client("bob"), client("carol"))
    alice, bob, carol = net.connect("alice"), net.connect("bob"), net.connect("carol")
    carol.block()
    alice.message("carol", b"x")
    alice.message("bob", b"x")

    changed = {"when_full": WhenFull.DROP_OLDEST, "queue": 5000}
    net.hand_over(client("alice"), client("bob", **changed), client("carol", **changed))

    assert isinstance(bob.session.outbox, FrameOutbox)
    assert isinstance(carol.session.outbox, StreamOutbox)
    assert carol.session.outbox.limit == 5000
    assert bob.session.messages_out == 1
    alice.message("bob", b"y")
    assert bob.payloads() == [b"x", b"y"]


def test_snapshot_client_turned_pool_keeps_address() -> None:
    """The connection of a client that is a pool now keeps the address it had."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")

    net.hand_over(client("alice"), client("bob", connections=3))
    second = net.connect("bob")
    bob.message("alice", b"x")

    assert bob.address == "bob"
    assert second.address.startswith("bob/")
    (got,) = alice.take()
    assert got.name == "bob"


def test_snapshot_capture_changes_nothing() -> None:
    """If the new process does not take over, everything continues; and a second capture
    has the same result.
    """
    net = FakeNet(
        client("alice", rate=RateConfig(100.0, 1e6)),
        client("bob", queue=60),
        client("pool", connections=2),
    )
    alice, bob, pool = net.connect("alice"), net.connect("bob"), net.connect("pool")
    bob.block(3)
    pool.block(3)
    alice.message("pool", b"p")
    for number in range(3):
        alice.message("bob", b"%d" % number * 30, number)
    sessions = [alice.session, bob.session, pool.session]

    first, second = (capture(net.broker, sessions, net.now) for _ in range(2))
    assert first.facts | {"next_number": 0} == second.facts | {"next_number": 0}
    assert b"".join(first.pieces) == b"".join(second.pieces)
    bob.read()
    pool.read()

    assert [payload[:1] for payload in bob.payloads()] == [b"0", b"1", b"2"]
    assert pool.payloads() == [b"p"]


def test_snapshot_session_numbers_continue() -> None:
    """A session that begins after the upgrade has a higher number than every one before
    it.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice = net.connect("alice")
    net.hand_over()
    assert net.connect("bob").session.number > alice.session.number


def test_snapshot_with_missing_bytes_is_refused() -> None:
    """A truncated snapshot is not valid."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", b"waits")
    snapshot = capture(net.broker, [alice.session, bob.session], net.now)
    new_broker = FakeNet(client("alice"), client("bob")).broker

    with pytest.raises(ValueError, match="are wanted where"):
        restore(
            new_broker,
            json.loads(json.dumps(snapshot.facts)),
            Pieces(b"".join(snapshot.pieces)[:-1]),
            net.now,
        )


def test_snapshot_covers_every_session_attribute() -> None:
    """A new attribute of a session has to be listed here, with what an upgrade does
    with it.
    """
    assert set(Session.__slots__) == CAPTURED | MADE_ANEW | PARTING


def test_snapshot_covers_every_broker_attribute() -> None:
    """This holds for the broker, its clients and both kinds of outbox."""
    broker = FakeNet().broker
    parts = {
        name: part
        for name, part in vars(broker).items()
        if type(part).__module__.startswith("brokerd.core.")
    }
    #: The parts that are captured as a whole, or rebuilt as a whole.
    whole_parts = {"exchange", "topics", "deferred", "revocation", "mailboxes"}
    state = {name for name in vars(broker) if name not in parts or name in whole_parts}
    for name, part in parts.items():
        if name not in whole_parts:
            attributes = getattr(type(part), "__slots__", None) or vars(part)
            # A part that is also an attribute of another part is counted there.
            state |= {
                attribute
                for attribute in attributes
                if not any(getattr(part, attribute) is other for other in parts.values())
            }
    captured = {
        "exchange",
        "topics",
        "started_at",
        "upgrades",
        "refused",
        # Captured as requests that wait; what freed a place is found again.
        "_undeliverable",
        "freed",
        "dropped",
        "totals",
        "returned",
    }
    # Held senders are in HeldSenders.deadlines, deadlines of requests in Requests, and
    # closed sessions in Reports.
    captured |= {"deadlines", "_order", "_closed", "deferred", "asking", "mailboxes"}
    settled = {"touched", "released", "admin_commands", "log_events"}
    # Subscriptions under revocation are checked against the rules when restored.
    of_this_process = {
        "limits",
        "version",
        "routing",
        "generation",
        "draining",
        "budget",
        "revocation",
        "_releasing",
        "_release_again",
    }
    # These belong to connections that are about to end; none of them is captured.
    of_this_process |= {"finishing", "unheard", "changes", "_released"}
    # The holders of these requests learn that they are over when they answer. Requests with
    # an id in use get new keys.
    of_this_process |= {"_orphaned", "repeats"}
    # Incidents; clients that are waited for after a restart; taps.
    captured |= {"_kept", "_count", "last_change", "_names", "until", "active", "all"}
    # Senders that wait for a client to return try again, and are noted again.
    of_this_process |= {"_senders", "presence_changes"}
    # The state of other hosts is captured by brokerd.core.cluster.hand_over.
    of_this_process |= {"instance_suffix", "remote", "traffic", "elsewhere"}
    # What a tap has seen of the frames that are being routed.
    of_this_process |= {
        "_source",
        "_position",
        "_head",
        "_second",
        "_on_mailboxes",
        "_left",
        "_refused",
    }
    # Captured with their sockets, by brokerd.net.relay.handover.
    of_this_process |= {"open", "opened", "relayed", "refusals", "closing"}
    of_this_process |= {"_openings", "_held", "_load"}
    assert state == captured | settled | of_this_process
    assert {*Client.__slots__, *RouteEntry.__slots__} == {
        "changed_at",
        "config",
        "mailbox",
        "meter",
        "name",
        "policy",
        "sessions",
        "turn",
    } | {
        # Made again from the sessions, and filled with the requests that wait.
        "direct",
        "flight",
        "is_pinned",
        "is_pool",
        # Announced again by the other hosts.
        "hosts",
        "remotes",
        "request_limit",
        "ring",
        "sink",
        "publish_rules",
        "_numbered",
        "_ranks",
        "shown_online",
        "shown_since",
    }
    both = {"_as_of", "_head", "limit", "stalled"}
    stream = {"_ends", "_left", "_older", "_older_bytes"}
    assert set(StreamOutbox.__slots__) == both | stream
    apart = {"_begun", "_kept", "_plain", "_plain_bytes", "_plain_gone", "_waiting", "timed"}
    assert set(FrameOutbox.__slots__) == both | apart


def test_snapshot_omits_clients_without_history() -> None:
    """Of ten thousand clients these are most. In the new process they are offline since
    the first process started.
    """
    configs = [client(f"c{number}") for number in range(100)]
    broker = Broker(configs, now_wall=1000.0)
    facts = capture(broker, [], 0.0).facts
    assert facts["clients"] == {}
    new_broker = Broker(configs, now_wall=2000.0)
    restore(new_broker, facts, Pieces(b""), 0.0)
    assert {
        (each.changed_at, each.shown_since) for each in new_broker.exchange.clients.values()
    } == {(1000.0, 1000.0)}


def test_snapshot_asker_has_the_position_of_its_session() -> None:
    """A session that is not captured has none."""
    net = FakeNet(client("alice"), client("bob"), client("carol"))
    alice, bob, carol = (net.connect(name) for name in ("alice", "bob", "carol"))
    sessions = [alice.session, bob.session]
    assert capture(net.broker, sessions, net.now, asker=bob.session).position == 1
    assert capture(net.broker, sessions, net.now).position is None
    with pytest.raises(KeyError):
        capture(net.broker, sessions, net.now, asker=carol.session)


def test_snapshot_members_of_removed_pool_share_a_client() -> None:
    """They are written to their ends, and no name finds them."""
    net = FakeNet(client("alice"), client("pool", connections=2))
    alice, one, two = (net.connect(name) for name in ("alice", "pool", "pool"))
    for peer in (one, two):
        peer.block()
        alice.message(peer.address, b"waits")
    net.hand_over(client("alice"))
    assert one.session.client is two.session.client
    alice.message("pool", b"", 1)
    assert alice.error() == (1, "no_such_client")
    for peer in (one, two):
        peer.read()
        assert peer.payloads() == [b"waits"]


def test_snapshot_without_copies_keeps_only_allowed_subscriptions() -> None:
    net = FakeNet(client("bob"))
    bob = net.connect("bob")
    for topic in ("a", "b"):
        bob.ask("subscribe", topic=topic)
    facts = capture(net.broker, [bob.session], net.now).facts
    new_broker = Broker([client("bob", subscribe=("b",))])
    (session,) = restore(new_broker, facts, Pieces(b""), net.now).sessions
    assert session.subscriptions == {("b", None)}
    assert len(new_broker.topics) == 1


def test_snapshot_event_of_broker_without_presence_is_still_published() -> None:
    net = FakeNet(client("bob"))
    bob = net.connect("bob")
    bob.ask("subscribe", topic="$broker.>")
    facts = capture(net.broker, [bob.session], net.now).facts
    facts["deferred"] = [{"question": None, "news": ["$broker.news", "{}", None, None, []]}]
    new_broker = Broker([client("bob")])
    (session,) = restore(new_broker, facts, Pieces(b""), net.now).sessions
    assert not session.outbox.waiting
    while new_broker.has_deferred_work:
        new_broker.run_deferred(8)
    assert b"$broker.news{}" in b"".join(session.outbox.pieces())


@pytest.mark.parametrize("op", sorted(_LONG))
def test_snapshot_question_with_long_answer_is_answered_afterwards(op: str) -> None:
    """An operation that is added must be known to the check of the facts too."""
    net = FakeNet(client("ops", admin=True))
    ops = net.connect("ops")
    facts = capture(net.broker, [ops.session], net.now).facts
    facts["deferred"] = [{"question": [0, 5, op], "news": None}]
    new_broker = Broker([client("ops", admin=True)])
    (session,) = restore(new_broker, facts, Pieces(b""), net.now).sessions
    while new_broker.has_deferred_work:
        new_broker.run_deferred(8)
    assert b"$broker{" in b"".join(session.outbox.pieces())


def test_snapshot_of_format_4_places_frames_with_ttl_by_chunks() -> None:
    """There, each of them is a chunk by itself."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block(0)
    ann.message("bob", b"first", 1)
    ann.message("bob", b"second", 2, extension={"ttl": 5})
    sessions = [ann.session, bob.session]
    snapshot = capture(net.broker, sessions, net.now)
    outbox = snapshot.facts["outboxes"][1]
    ((start, end, left, _),) = outbox.pop("marks")
    outbox["chunks"], outbox["timed"] = [start, end - start, 0], [[1, left, 0, 0]]
    new_broker = Broker([client("ann"), client("bob")])
    body = b"".join(snapshot.pieces)
    restored = restore(new_broker, snapshot.facts, Pieces(body), net.now)
    assert restored.sessions[1].outbox.marked_frames() == [(start, end, net.now + left, False)]


def test_snapshot_request_that_only_its_holder_names_is_answered_as_before() -> None:
    """The session that asked it had its address together with another one for a moment."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 7)
    facts = capture(net.broker, [ann.session, bob.session], net.now).facts
    facts["sessions"][0]["asked"] = []
    new_broker = Broker([client("ann"), client("bob")])
    asker, holder = restore(new_broker, facts, Pieces(b""), net.now).sessions
    ((key, request),) = holder.incoming_requests.items()
    assert (key, request.requester, request.responder) == (("ann", 7), asker, holder)


def test_snapshot_requests_with_one_id_that_only_their_holder_names_are_kept() -> None:
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 7)
    ann.request("bob", b"?", 7)
    facts = capture(net.broker, [ann.session, bob.session], net.now).facts
    facts["sessions"][0]["asked"] = []
    new_broker = Broker([client("ann"), client("bob")])
    asker, holder = restore(new_broker, facts, Pieces(b""), net.now).sessions
    assert [key[:2] for key in holder.incoming_requests] == [("ann", 7)] * 2
    assert {request.requester for request in holder.incoming_requests.values()} == {asker}
