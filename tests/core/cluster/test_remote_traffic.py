"""What remote sessions do when hosts and clients come and go meanwhile."""

from __future__ import annotations

import pytest
from support.fake_network import Peer, client, error_of
from support.joined_hosts import JoinedHosts

from brokerd.core.changes import Changes
from brokerd.core.cluster import remote_traffic
from brokerd.core.cluster.remote_outbox import RemoteOutbox
from brokerd.core.cluster.seam import Interest, Name, Run
from brokerd.core.undelivered import Queued
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind, encode
from brokerd_client.wire.framing import frame
from brokerd_client.wire.layout import Flag


def pair(**changes: object) -> tuple[JoinedHosts, Peer, Peer]:
    """Return two hosts, ann at the first and bob at the second."""
    hosts = JoinedHosts(client("ann", **changes), client("bob", **changes))
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    hosts.settle()
    return hosts, ann, bob


def framed(kind: Kind, number: int, sender: str, **fields: object) -> bytes:
    """Return a frame as another host sends it."""
    return frame(encode(Envelope(kind, number, sender, b"x", **fields)))  # type: ignore[arg-type]


def test_news_of_a_host_that_is_gone_changes_nothing() -> None:
    """They may cross with its loss."""
    hosts, ann, bob = pair()
    traffic = hosts["a"].traffic
    ann.message("bob", b"x", 1)
    hosts.settle()
    assert bob.payloads() == [b"x"]
    target = traffic._sessions.hosts["b"].targets["bob"]
    connection = target.connection
    hosts["a"].lose("b")
    traffic.host_down("b", "again", 0.0)
    traffic.names_changed("b", [Name("bob", 1, 0.0)], 0.0)
    traffic.interests_changed("b", [Interest("news", "")])
    traffic.deliver("b", 1, [Run("ann", framed(Kind.MESSAGE, 5, "bob/i1b1"))], 0.0)
    connection.write()
    assert list(traffic.take_frames("b", 1000)) == []
    assert list(traffic.take_outcomes("b")) == []
    assert ann.take() == []
    ann.message("bob", b"x", 7)
    assert [error_of(each) for each in ann.take()] == ["offline"]
    assert bob.take() == []


def test_host_that_is_up_already_has_new_addresses_only() -> None:
    hosts, _, _ = pair()
    traffic = hosts["a"].traffic
    before = traffic._sessions.hosts["b"]
    facts = remote_traffic.HostFacts("b", "0" * 16, 0.0, "test", "", ("elsewhere:1",))
    traffic.host_up(facts, 0.0)
    assert traffic._sessions.hosts["b"] is before
    assert traffic.addresses_of("b") == ("elsewhere:1",)
    assert traffic.addresses_of("z") == ()


def test_names_that_are_not_configured_here_are_only_kept() -> None:
    hosts, _, _ = pair()
    traffic = hosts["a"].traffic
    traffic.names_changed("b", [Name("stranger", 1, 0.0), Name("unknown", 0, 0.0)], 0.0)
    assert "stranger" in traffic._sessions.hosts["b"].names
    assert "unknown" not in traffic._sessions.hosts["b"].names
    broker = hosts["a"].net.broker
    configs = {name: client(name) for name in ("ann", "bob", "stranger", "dan")}
    broker.reconfigure(configs, broker.status.limits, 0.0)
    assert broker.exchange.clients["stranger"].online
    assert not broker.exchange.clients["dan"].online
    hosts["a"].lose("b")
    assert not broker.exchange.clients["stranger"].online


def test_interest_of_the_broker_own_events_stays_at_home() -> None:
    hosts, _, _ = pair()
    traffic = hosts["a"].traffic
    subscriber = traffic._sessions.hosts["b"].subscriber
    gone = Interest("never", "", on=False)
    traffic.interests_changed("b", [Interest("$presence.>", ""), gone])
    assert not subscriber.subscriptions
    traffic.unsubscribed("never", None)
    traffic.unsubscribed("$presence.>", None)


def test_connection_of_a_remote_session_is_ended_by_its_host_alone() -> None:
    hosts, ann, bob = pair()
    ann.message("bob", b"x", 1)
    hosts.settle()
    (sender,) = hosts["b"].traffic._sessions.hosts["a"].senders.values()
    assert sender.connection.is_gone() is None
    for session in (sender, hosts["a"].traffic._sessions.hosts["b"].targets["bob"]):
        session.closing = "for a reason"
        session.connection.close_soon()
        assert session.closing == ""
        session.connection.lost("a fault")
    ann.message("bob", b"x", 2, receipt=True)
    hosts.settle()
    assert len(bob.take()) == 2
    assert [each.kind for each in ann.take()] == [Kind.RECEIPT]


def test_sender_of_very_many_frames_gives_others_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames are handled in order in later turns; one that has left loses them."""
    monkeypatch.setattr(remote_traffic, "_TURN", 2)
    hosts, _, bob = pair()
    traffic = hosts["b"].traffic
    frames = b"".join(framed(Kind.REQUEST, number, "ann/i1a1") for number in range(1, 9))
    for batch in (1, 2):
        traffic.deliver("a", batch, [Run("bob", frames)], 0.0)
    hosts["b"].net.settle()
    assert len(bob.take()) >= 8
    (sender,) = traffic._sessions.hosts["a"].senders.values()
    traffic._yielding.append(sender)
    sender.connection.yields = True
    traffic.go_on(sender)
    hosts["b"].lose("a")
    traffic.go_on(sender)
    traffic._yielding.append(sender)
    traffic.run()
    assert not traffic.has_work


def test_event_of_an_unknown_sender_is_denied() -> None:
    hosts, _, bob = pair()
    bob.op("subscribe", 3, pattern="news")
    hosts.settle()
    bob.take()
    event = framed(Kind.EVENT, 9, "unknown/x1a1", topic="news")
    hosts["b"].traffic.deliver("a", 1, [Run(">", event)], 0.0)
    assert bob.take() == []
    assert hosts["b"].net.broker.replies.refused[ErrorCode.DENIED] == 1


def test_failed_answer_tells_the_requester_and_the_one_who_answered() -> None:
    """An ERROR as an answer that fails is dropped, unless its sender wants to know."""
    hosts, ann, bob = pair()
    ann.request("bob", b"question", 5)
    hosts.settle()
    assert bob.payloads() == [b"question"]
    traffic, identity = hosts["b"].traffic, ann.session.identity.decode()
    answer = memoryview(framed(Kind.ERROR, 5, bob.session.identity.decode()))
    dropped = hosts["b"].net.broker.replies.dropped
    traffic.fail("a", identity, answer, ErrorCode.OFFLINE, "lost", 0.0)
    traffic.fail("a", "ann/other1a1", answer, ErrorCode.OFFLINE, "lost", 0.0)
    assert hosts["b"].net.broker.replies.dropped == dropped + 2
    hosts.settle()
    assert [error_of(each) for each in ann.take()] == ["abandoned"]
    assert bob.take() == []


def test_failed_frame_of_a_sender_that_has_left_is_counted() -> None:
    hosts, ann, _ = pair()
    request = memoryview(framed(Kind.REQUEST, 5, "ann/gone1a1"))
    traffic = hosts["a"].traffic
    traffic.fail("b", "bob", request, ErrorCode.OFFLINE, "lost", 0.0)
    own = memoryview(framed(Kind.REQUEST, 77, ann.session.identity.decode()))
    traffic.fail("b", "bob", own, ErrorCode.OFFLINE, "lost", 0.0)
    cancel = memoryview(framed(Kind.ERROR, 5, "ann/gone1a1", flags=Flag.ACK))
    traffic.fail("b", "bob", cancel, ErrorCode.OFFLINE, "lost", 0.0)
    message = memoryview(framed(Kind.MESSAGE, 6, "ann/gone1a1"))
    traffic.fail("b", "bob", message, ErrorCode.OFFLINE, "lost", 0.0)
    assert hosts["a"].net.broker.replies.returned["lost"] == 1
    assert ann.take() == []


def test_same_id_for_two_recipients_ends_the_request_that_failed() -> None:
    """A client may use an id again for another recipient."""
    hosts = JoinedHosts(client("ann"), client("bob"), client("cat"))
    ann = hosts["a"].net.connect("ann")
    bob, cat = (hosts["b"].net.connect(name) for name in ("bob", "cat"))
    hosts.settle()
    for name in ("bob", "cat"):
        ann.request(name, b"question", 5)
    hosts.settle()
    assert bob.payloads() == cat.payloads() == [b"question"]
    cat.leave()
    hosts.settle()
    assert [error_of(each) for each in ann.take()] == ["abandoned"]
    bob.reply("ann", b"answer", 5)
    hosts.settle()
    assert ann.payloads() == [b"answer"]
    ann.request("bob", b"question", 6)
    ann.request("cat", b"question", 6)
    hosts["a"].flush()
    request = memoryview(framed(Kind.REQUEST, 6, ann.session.identity.decode()))
    hosts["a"].traffic.fail("b", "cat", request, ErrorCode.OFFLINE, "lost", 0.0)


def test_pools_are_announced_when_that_is_due() -> None:
    hosts, _, _ = pair(connections=3, in_flight=1)
    traffic = hosts["b"].traffic
    traffic.tick(0.0)
    first, second = list(hosts["b"].net.broker.exchange.clients.values())[:2]
    traffic._note_free_or_busy(first)
    traffic._note_free_or_busy(second)
    due = traffic.next_deadline
    assert due is not None
    traffic.tick(due - 0.001)
    assert traffic.next_deadline == due
    traffic.tick(due)
    assert traffic.next_deadline is None


def test_client_that_is_removed_with_waiting_frames_is_denied() -> None:
    hosts, ann, bob = pair(queue=100)
    bob.block()
    for number in range(1, 4):
        ann.message("bob", b"x" * 60, number)
    hosts.settle()
    owner = hosts["b"].net.broker
    owner.reconfigure({"bob": client("bob")}, owner.status.limits, 0.0)
    hosts.settle()
    assert {error_of(each) for each in ann.take()} == {"denied"}


def test_client_that_is_removed_where_it_sends_loses_what_has_not_left() -> None:
    hosts, ann, _ = pair()
    hosts["a"].window = 0
    ann.message("bob", b"x", 1)
    origin = hosts["a"].net.broker
    origin.reconfigure({"ann": client("ann")}, origin.status.limits, 0.0)
    hosts["a"].net.settle()
    assert not hosts["a"].traffic._sessions.hosts["b"].touched


def test_unknown_address_is_found_at_no_host() -> None:
    hosts, ann, _ = pair()
    ann.message("bob", b"x", 1)
    hosts.settle()
    sessions = hosts["b"].traffic._sessions
    assert sessions.find("ann") is not None
    assert sessions.find("ann/other") is None


def test_own_names_are_those_with_connections_here() -> None:
    hosts, _, _ = pair()
    assert [name.name for name in hosts["a"].traffic.own_names()] == ["ann"]


def test_patterns_of_a_mailbox_are_announced_as_they_change() -> None:
    hosts, _, _ = pair()
    traffic = hosts["a"].traffic
    traffic.note_patterns(["old"])
    traffic.change_patterns(("old",), ("new",))
    assert [each.pattern for each in traffic.own_interests()] == ["new"]


def test_message_past_its_ttl_leaves_no_more() -> None:
    """It waits for room in the window of its host meanwhile."""
    hosts, ann, bob = pair()
    hosts["a"].window = 0
    ann.message("bob", b"late", 1, extension={"ttl": 1.0})
    ann.message("bob", b"kept", 2)
    hosts["a"].flush()
    hosts["a"].net.advance(2.0)
    hosts["a"].window = 1 << 20
    hosts["a"].touched["b"] = None
    hosts.settle()
    assert bob.payloads() == [b"kept"]


def test_sender_that_is_held_goes_on_as_the_host_takes_frames() -> None:
    hosts, ann, bob = pair(queue=200)
    hosts["a"].window = 0
    for number in range(1, 9):
        ann.message("bob", b"x" * 60, number)
        hosts["a"].flush()
    assert ann.held
    hosts["a"].window = 1 << 20
    hosts["a"].touched["b"] = None
    hosts.settle()
    assert [each.id for each in bob.take()] == list(range(1, 9))
    assert not ann.held


def test_answer_to_a_request_that_was_revoked_ends_its_memory() -> None:
    """The requester has had its outcome; the owner's last word is not a second one."""
    hosts, ann, bob = pair()
    sessions = hosts["a"].traffic._sessions
    ann.request("bob", b"question", 5)
    hosts.settle()
    target = sessions.hosts["b"].targets["bob"]
    assert not sessions.forget_revoked(target, "unknown/x", 5)
    assert not sessions.forget_revoked(target, ann.address, 5)
    target.revoked.add((ann.session.identity.decode(), 5))
    assert sessions.forget_revoked(target, ann.address, 5)
    assert not target.revoked
    assert bob.payloads() == [b"question"]


def test_frames_that_wait_for_a_host_that_is_lost_are_offline() -> None:
    hosts, ann, bob = pair()
    hosts["a"].window = 0
    ann.message("bob", b"x", 1)
    hosts["a"].flush()
    hosts["a"].lose("b")
    assert [error_of(each) for each in ann.take()] == ["offline"]
    assert bob.take() == []


def test_receipt_for_a_sender_that_has_left_is_dropped() -> None:
    hosts, ann, bob = pair()
    ann.message("bob", b"x", 1, receipt=True)
    hosts["a"].flush()
    ann.leave()
    hosts.settle()
    assert bob.payloads() == [b"x"]


def test_frame_for_a_connection_that_has_left_is_offline() -> None:
    hosts, ann, bob = pair(connections=2)
    address = bob.session.identity.decode()
    bob.leave()
    frames = framed(Kind.MESSAGE, 5, ann.session.identity.decode())
    hosts["b"].traffic.deliver("a", 1, [Run(address, frames)], 0.0)
    hosts["b"].net.settle()
    (refusal,) = hosts["b"].traffic.take_outcomes("a")
    assert b"offline" in bytes(refusal.frames)


def test_event_while_nats_is_away_is_not_kept_until_it_is_back() -> None:
    """Also for patterns that a host has announced shortly before, or takes back."""
    hosts = JoinedHosts(client("ann"), client("bob"))
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    bob.ask("subscribe", topic="t.*")
    hosts.settle()
    traffic = hosts["a"].traffic
    traffic.suspend("NATS is away")
    traffic.interests_changed("b", [Interest("u", "")])
    for topic in ("t.x", "u"):
        ann.publish(topic, b"never", 1, receipt=True)
    traffic.resume()
    hosts.settle()
    assert bob.payloads() == []
    ann.publish("t.x", b"event")
    hosts.settle()
    assert bob.payloads() == [b"event"]
    traffic.suspend("NATS is away")
    hosts["a"].lose("b")
    assert len(hosts["a"].net.broker.topics) == 0


def test_more_messages_past_their_ttl_than_one_turn_reports_leave_no_more() -> None:
    """The rest is reported in further turns."""
    hosts, ann, bob = pair(queue=1 << 20)
    hosts["a"].window = 0
    for number in range(300):
        ann.message("bob", b"late", number, extension={"ttl": 1.0})
    hosts["a"].flush()
    hosts["a"].net.advance(2.0)
    hosts["a"].window = 1 << 20
    for _ in range(3):
        hosts["a"].touched["b"] = None
        hosts.settle()
    assert [error_of(each) for each in ann.take()] == ["expired"] * 300
    assert bob.take() == []


def test_message_with_ttl_behind_a_chunk_without_is_in_a_run_of_its_own() -> None:
    """A ttl that begins behind a run does not count for it."""
    outbox = RemoteOutbox(1 << 20)
    for _ in range(2):
        large = Envelope(Kind.MESSAGE, 1, "ann/x1a1", b"x" * 90_000)
        outbox.put(Queued(frame(encode(large))))
    outbox.put(Queued(framed(Kind.MESSAGE, 2, "ann/x1a1"), deadline=5.0))
    runs = list(outbox.take(1 << 20, "bob", 1.0))
    assert [run.ttl_ms for run in runs] == [0, 0, 4000]


def test_message_for_a_pool_that_has_left_its_host_passes_to_no_third_host() -> None:
    """A frame passes from one host to another once."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=3), names="abc")
    ann = hosts["a"].net.connect("ann")
    members = {name: hosts[name].net.connect("pool") for name in "bc"}
    hosts.settle()
    ann.message("pool", b"x", 1)
    hosts["a"].net.settle()
    hosts["a"].flush()
    (there,) = [name for name in "bc" if hosts["a"].outbound.get(name)]
    members[there].leave()
    hosts.settle()
    assert [error_of(each) for each in ann.take()] == ["offline"]
    assert members["c" if there == "b" else "b"].take() == []


def test_event_too_large_for_a_host_is_counted_and_logged() -> None:
    """Its publisher learns nothing of it, as of a subscriber whose queue is full."""
    hosts, ann, _ = pair()
    event = memoryview(framed(Kind.EVENT, 7, "ann", topic="t"))
    hosts["a"].traffic.fail("b", ">", event, ErrorCode.TOO_LARGE, "too long", 0.0)
    replies = hosts["a"].net.broker.replies
    assert (replies.dropped, ann.take()) == (1, [])
    (noted,) = replies.log_events.take()
    assert (noted.event, noted.code) == ("message.dropped", "too_large")


def test_event_that_nobody_answers_for_needs_no_report() -> None:
    """It was for subscribers of a host that is lost."""
    hosts, ann, bob = pair()
    bob.ask("subscribe", topic="t")
    hosts.settle()
    ann.publish("t", b"x", 1)
    hosts["a"].net.settle()
    hosts["a"].flush()
    hosts["a"].lose("b")
    assert ann.take() == []


def test_host_that_is_lost_with_a_name_that_is_not_configured_here() -> None:
    """Its clients here are offline; the name means nothing here."""
    hosts, ann, bob = pair()
    traffic = hosts["a"].traffic
    traffic.names_changed("b", [Name("unknown", 1, 0.0, True, False)], 0.0)
    hosts["a"].lose("b")
    ann.message(bob.name, b"x", 1)
    assert [error_of(each) for each in ann.take()] == ["offline"]


def test_sender_whose_connection_and_host_are_gone_ends_with_its_frames() -> None:
    """The frames that were left are refused when the host is lost."""
    hosts, ann, bob = pair(queue=100)
    bob.block()
    for number in range(1, 5):
        ann.message("bob", b"x" * 60, number)
    hosts.settle()
    remote = hosts["b"].traffic._sessions.hosts["a"]
    (sender,) = remote.senders.values()
    ann.leave()
    hosts.settle()
    assert sender.connection.is_over
    hosts["b"].lose("a")
    assert not sender.open


def test_frames_left_at_a_lost_host_are_refused_but_for_plain_events() -> None:
    """An event without the flag RECEIPT has no outcome across hosts."""
    hosts, ann, bob = pair(queue=100)
    bob.ask("subscribe", topic="t")
    hosts.settle()
    bob.block()
    for number in range(1, 4):
        ann.message("bob", b"x" * 60, number)
    hosts.settle()
    (sender,) = hosts["b"].traffic._sessions.hosts["a"].senders.values()
    event = framed(Kind.EVENT, 9, sender.identity.decode(), topic="t")
    hosts["b"].traffic.deliver("a", 99, [Run(">", event)], 0.0)
    assert len(sender.connection.portions) >= 2
    hosts["b"].traffic.host_down("a", "silent", 0.0)
    told = [run for run in hosts["b"].traffic.take_outcomes("a") if b"offline" in run.frames]
    assert told


@pytest.mark.parametrize("leaves", [False, True])
def test_end_of_a_subscription_by_client_or_rules_is_announced(leaves: bool) -> None:
    """Its client leaves, or new rules forbid it."""
    hosts, ann, bob = pair()
    bob.ask("subscribe", topic="t")
    hosts.settle()
    if leaves:
        bob.leave()
    else:
        owner = hosts["b"].net.broker
        clients = {"ann": client("ann"), "bob": client("bob", subscribe=["u"])}
        owner.reconfigure(clients, owner.status.limits, 0.0)
        hosts["b"].net.settle()
    hosts.settle()
    ann.publish("t", b"x")
    assert hosts["a"].touched == {}


def test_session_of_another_host_has_no_copy_that_could_change() -> None:
    """An upgrade copies sessions with a connection alone."""
    hosts, ann, bob = pair()
    ann.message("bob", b"x", 1)
    hosts.settle()
    (sender,) = hosts["b"].traffic.sessions.hosts["a"].senders.values()
    changes = Changes((), ())
    for session in (sender, bob.session):
        changes.note(session)
    assert list(changes.sessions) == [bob.session]


@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST])
@pytest.mark.parametrize("is_passed_on", [False, True])
def test_connection_hears_nothing_about_frames_of_its_name_at_another_host(
    kind: Kind, is_passed_on: bool
) -> None:
    """The other host has ended, and its link not yet."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=2))
    ann, member = hosts["a"].net.connect("ann"), hosts["b"].net.connect("pool")
    hosts.settle()
    member.block()
    ann.send(Envelope(kind, 7, "pool", b"x"))
    hosts.settle()
    later = hosts["b"].net.connect("ann")
    other = hosts["b"].net.connect("pool") if is_passed_on else None
    member.leave()
    if other is not None:
        (envelope,) = other.take()
        other.reply(envelope.name, b"", envelope.id)
        assert error_of(other.take()[0]) == "denied"
        other.leave()
    hosts["b"].net.settle()
    assert later.take() == []
    assert not later.session.outgoing_requests


def test_released_name_gets_no_more_events_of_other_hosts() -> None:
    hosts, ann, bob = pair()
    bob.ask("subscribe", topic="news")
    hosts.settle()
    hosts["b"].net.broker.release_name(bob.session, 0.0)
    hosts.settle()
    assert not hosts["a"].traffic._sessions.hosts["b"].subscriber.subscriptions
    ann.message("bob", b"x", 7)
    hosts.settle()
    assert [error_of(each) for each in ann.take()] == ["offline"]
