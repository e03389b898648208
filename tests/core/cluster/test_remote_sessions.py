"""Clients of other hosts take part as if they were connected here."""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client, error_of
from support.joined_hosts import JoinedHosts

from brokerd.config.values import WhenFull
from brokerd.core.broker import CoreLimits
from brokerd.core.cluster.remote_frames import walk
from brokerd.core.cluster.seam import Name, Run
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind, encode
from brokerd_client.wire.framing import frame


def outcomes(peer: Peer) -> list[tuple[int, str]]:
    """Return the id of each outcome that has arrived, with its code or ``receipt``."""
    found = []
    for each in peer.take():
        assert each.name == "$broker", each
        found.append((each.id, "receipt" if each.kind is Kind.RECEIPT else error_of(each)))
    return found


def joined(*names: str, **changes: object) -> JoinedHosts:
    """Return two hosts with these clients."""
    return JoinedHosts(*(client(name, **changes) for name in names))


def pair(**changes: object) -> tuple[JoinedHosts, Peer, Peer]:
    """Return two hosts, ann at the first and bob at the second."""
    hosts = joined("ann", "bob", **changes)
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    hosts.settle()
    return hosts, ann, bob


def test_message_to_other_host_arrives_with_sender_name() -> None:
    """The recipient sees the plain name; order and flags are those of one host."""
    hosts, ann, bob = pair()
    for number in range(5):
        ann.message("bob", b"%d" % number, number)
    hosts.settle()
    got = bob.take()
    assert [each.payload for each in got] == [b"0", b"1", b"2", b"3", b"4"]
    assert {each.name for each in got} == {"ann"}
    assert ann.take() == []


def test_receipt_from_other_host_comes_after_owner_has_accepted() -> None:
    """The origin alone confirms nothing."""
    hosts, ann, bob = pair()
    for number in (1, 2):
        # The second one stays in the compiled loop.
        ann.message("bob", b"x", number, receipt=True)
        hosts["a"].net.settle()
        assert ann.take() == []
        hosts.settle()
        assert outcomes(ann) == [(number, "receipt")]
        assert [each.flags for each in bob.take()] == [0]


def test_message_to_name_that_left_other_host_is_offline() -> None:
    """Known at once, or from the owner if the news and the message cross."""
    hosts, ann, bob = pair()
    bob.leave()
    ann.message("bob", b"x", 7)
    assert ann.take() == []
    hosts.settle()
    assert outcomes(ann) == [(7, "offline")]
    ann.message("bob", b"x", 8)
    assert outcomes(ann) == [(8, "offline")]


def test_message_that_owner_rules_forbid_is_denied() -> None:
    """The owner decides again, with its own configuration."""
    hosts, ann, _ = pair()
    owner = hosts["b"].net.broker
    configs = {"ann": client("ann", send_to=()), "bob": client("bob")}
    owner.reconfigure(configs, owner.status.limits, 0.0)
    ann.message("bob", b"x", 7, receipt=True)
    hosts.settle()
    assert outcomes(ann) == [(7, "denied")]


def test_sender_that_owner_does_not_know_is_denied() -> None:
    """The configurations of two hosts may differ for a moment."""
    hosts, ann, bob = pair()
    owner = hosts["b"].net.broker
    ann.request("bob", b"x", 6)
    hosts.settle()
    assert bob.payloads() == [b"x"]
    owner.reconfigure({"bob": client("bob")}, owner.status.limits, 0.0)
    ann.message("bob", b"x", 7, receipt=True)
    hosts.settle()
    assert outcomes(ann) == [(7, "denied")]
    owner.reconfigure({"bob": client("bob"), "ann": client("ann")}, owner.status.limits, 0.0)
    bob.message("ann", b"back", 8, receipt=True)
    hosts.settle()
    assert [each.payload for each in ann.take()] == [b"back"]
    assert outcomes(bob) == [(8, "receipt")]


def test_frame_in_name_of_third_host_is_denied() -> None:
    """The end of an instance names the host that may send its frames."""
    hosts, ann, bob = pair()
    ann.session.identity = b"ann/i1c1"
    ann.message("bob", b"x", 7)
    hosts.settle()
    assert bob.take() == []
    assert hosts["b"].net.broker.replies.refused[ErrorCode.DENIED] == 1


def test_queue_at_owner_full_holds_that_remote_sender_only() -> None:
    """``when_full: wait``: further frames of that sender wait; others go on."""
    hosts = JoinedHosts(client("ann"), client("eve"), client("bob", queue=100), client("cat"))
    ann, eve = (hosts["a"].net.connect(name) for name in ("ann", "eve"))
    bob, cat = (hosts["b"].net.connect(name) for name in ("bob", "cat"))
    hosts.settle()
    bob.block()
    for number in range(4):
        ann.message("bob", b"x" * 60, number)
        ann.message("cat", b"%d" % number, number)
        hosts.settle()
    eve.message("cat", b"eve", 9, receipt=True)
    hosts.settle()
    assert [each.name for each in cat.take()] == ["ann", "eve"]
    assert outcomes(eve) == [(9, "receipt")]
    assert ann.take() == []
    bob.read()
    hosts.settle()
    assert [each.id for each in bob.take()] == [0, 1, 2, 3]
    assert [each.id for each in cat.take()] == [1, 2, 3]


def test_queue_at_owner_full_refuses_after_wait_timeout() -> None:
    """The wait is bounded, as on one host."""
    hosts = JoinedHosts(
        client("ann"), client("bob", queue=100), limits=CoreLimits(wait_timeout=5.0)
    )
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    hosts.settle()
    bob.block()
    for number in range(3):
        ann.message("bob", b"x" * 60, number, receipt=True)
    hosts.settle()
    assert outcomes(ann) == [(0, "receipt")]
    hosts["b"].net.advance(5.1)
    hosts.settle()
    assert outcomes(ann) == [(1, "full"), (2, "full")]


def test_queue_at_owner_that_refuses_answers_full() -> None:
    """``when_full: refuse``."""
    hosts = JoinedHosts(client("ann"), client("bob", queue=100, when_full=WhenFull.REFUSE))
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    hosts.settle()
    bob.block()
    for number in range(3):
        ann.message("bob", b"x" * 60, number)
    hosts.settle()
    assert outcomes(ann) == [(1, "full"), (2, "full")]


def test_window_of_host_full_holds_its_senders_and_delays_no_other() -> None:
    """A frozen host fills its own window: its senders wait, then get ``full``."""
    hosts = JoinedHosts(
        client("ann"),
        client("bob", queue=1000),
        client("cat"),
        client("dan"),
        names="abc",
        limits=CoreLimits(wait_timeout=5.0),
    )
    net = hosts["a"].net
    ann, dan = net.connect("ann"), net.connect("dan")
    hosts["b"].net.connect("bob")
    cat = hosts["c"].net.connect("cat")
    hosts.settle()
    hosts["a"].window = 500
    for number in range(20):
        ann.message("bob", b"x" * 100, number)
        # Nothing arrives at host b.
        hosts["a"].flush()
    assert ann.held
    for number in range(20):
        dan.message("cat", b"%d" % number, number)
        while hosts["a"].outbound.get("c"):
            hosts["c"].receive("a", *hosts["a"].outbound["c"].popleft())
    assert len(cat.take()) <= 20
    net.advance(5.1)
    assert not ann.held
    assert {code for _, code in outcomes(ann)} == {"full"}


def test_message_too_large_for_link_is_refused_with_limit() -> None:
    """The limit of NATS is named."""
    hosts, ann, bob = pair()
    assert hosts["a"].net.broker.delivery.remote is not None
    hosts["a"].net.broker.delivery.remote.largest_frame = 1000
    for number in (1, 2):
        ann.message("bob", b"x" * 990, number)
        hosts.settle()
        (refusal,) = ann.take()
        assert error_of(refusal) == "too_large"
        text = json.loads(refusal.payload)["message"]
        assert "1000" in text
        assert "max_payload is 1048576" in text
    ann.request("bob", b"x" * 990, 3)
    assert outcomes(ann) == [(3, "too_large")]
    assert bob.take() == []


def test_request_to_pool_too_large_for_link_is_refused() -> None:
    """One that fits arrives."""
    hosts = joined("ann", "pool", connections=4)
    ann, member = hosts["a"].net.connect("ann"), hosts["b"].net.connect("pool")
    hosts.settle()
    hosts["a"].traffic.sessions.largest_frame = 1000
    ann.request("pool", b"x" * 990, 1)
    assert outcomes(ann) == [(1, "too_large")]
    ann.request("pool", b"x" * 900, 2)
    hosts.settle()
    assert [each.id for each in member.take()] == [2]


def test_answer_that_crosses_a_cancel_is_denied_and_not_delivered() -> None:
    """The requester has had its outcome."""
    hosts, ann, bob = pair()
    ann.request("bob", b"question", 5)
    hosts.settle()
    assert bob.payloads() == [b"question"]
    ann.send(Envelope(Kind.ERROR, 5, "$broker", b'{"code": "cancelled"}', codec=2))
    bob.reply("ann", b"answer", 5)
    hosts.settle()
    assert outcomes(ann) == [(5, "cancelled")]
    assert outcomes(bob) == [(5, "denied")]
    assert not hosts["a"].traffic.sessions.hosts["b"].targets["bob"].revoked


def test_oldest_request_beyond_limit_is_expired_at_both_hosts() -> None:
    hosts = JoinedHosts(client("ann", requests=1), client("bob"), client("cat"))
    ann = hosts["a"].net.connect("ann")
    bob, cat = hosts["a"].net.connect("bob"), hosts["b"].net.connect("cat")
    for holder in (bob, cat):
        holder.ask("cancels")
    hosts.settle()
    for name, number in (("bob", 1), ("cat", 2), ("bob", 3)):
        ann.request(name, b"?", number)
        hosts.settle()
    assert outcomes(ann) == [(1, "expired"), (2, "expired")]
    assert [(each.id, each.kind) for each in bob.take()] == [
        (1, Kind.REQUEST),
        (1, Kind.ERROR),
        (3, Kind.REQUEST),
    ]
    assert [(each.id, each.kind) for each in cat.take()] == [(2, Kind.REQUEST), (2, Kind.ERROR)]


def test_queue_of_client_changed_by_reload_is_that_of_its_remote_session() -> None:
    hosts, ann, _ = pair()
    ann.message("bob", b"x", 1)
    net = hosts["a"].net
    (target,) = net.broker.exchange.clients["bob"].remotes.values()
    entries = {"ann": client("ann"), "bob": client("bob", queue=100)}
    net.broker.reconfigure(entries, net.broker.status.limits, net.now)
    assert target.outbox.limit == 100
    assert net.broker.exchange.identify("nobody/1a1") is None


def test_pool_member_that_reads_is_preferred_among_hosts() -> None:
    """A host whose window is full comes last; a host that returned a request does not come."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4), names="abc")
    for name in "bc":
        hosts[name].net.connect("pool")
    hosts.settle()
    pool = hosts["a"].net.broker.exchange.clients["pool"]
    hosts["a"].traffic.sessions.reach(pool)
    flight = pool.track()
    b, c = pool.remotes["b"], pool.remotes["c"]
    assert (flight.best(), flight.best(without=b), flight.best(without=c)) == (b, c, b)
    b.outbox.blocked = True
    b.outbox.append(b"\0\0\0\0")
    assert (flight.best(), flight.best(without=c)) == (c, b)


def test_message_that_recipient_left_unread_is_offline_at_other_host() -> None:
    """As on one host: a definite ERROR may follow a RECEIPT."""
    hosts, ann, bob = pair()
    bob.block()
    ann.message("bob", b"x", 7, receipt=True)
    ann.message("bob", b"x", 8)
    hosts.settle()
    assert outcomes(ann) == [(7, "receipt")]
    bob.leave()
    hosts.settle()
    assert outcomes(ann) == [(7, "offline"), (8, "offline")]


def test_sender_that_has_left_or_reconnected_leaves_no_session_at_other_host() -> None:
    """Its frames that wait there are delivered first."""
    hosts, ann, bob = pair(queue=100)
    senders = hosts["b"].traffic._sessions.hosts["a"].senders
    bob.block()
    for number in range(3):
        ann.message("bob", b"x" * 60, number)
    hosts.settle()
    ann.leave()
    hosts.settle()
    assert len(senders) == 1
    bob.read()
    hosts.settle()
    assert [each.id for each in bob.take()] == [0, 1, 2]
    assert not senders
    for number in range(3):
        again = hosts["a"].net.connect("ann")
        again.message("bob", b"x", number)
        again.leave()
        hosts.settle()
    hosts["a"].net.connect("ann").message("bob", b"x", 4)
    hosts.settle()
    assert [each.id for each in bob.take()] == [0, 1, 2, 4]
    assert len(senders) == 1


def test_request_to_sender_that_left_has_the_outcome_of_its_host_alone() -> None:
    """The end of its remote session is not the outcome."""
    hosts, ann, bob = pair()
    bob.message("ann", b"x", 1)
    ann.request("bob", b"question", 5)
    hosts.settle()
    assert ann.payloads() == [b"x"]
    bob.leave()
    for kind, content in list(hosts["b"].outbound["a"]):
        if kind == "names":
            hosts["a"].traffic.names_changed("b", content, 0.0)
    hosts["a"].net.settle()
    assert ann.take() == []
    hosts.settle()
    assert outcomes(ann) == [(5, "abandoned")]


def test_outcome_for_earlier_connection_of_same_name_is_not_delivered() -> None:
    """A client that reconnects gets no ERROR of its earlier connection."""
    hosts, ann, bob = pair()
    bob.leave()
    ann.message("bob", b"x", 7)
    ann.leave()
    again = hosts["a"].net.connect("ann")
    hosts.settle()
    assert again.take() == []


# Requests


def test_request_to_other_host_is_answered() -> None:
    """The answer finds the connection that asked."""
    hosts, ann, bob = pair()
    for number in (5, 6):
        ann.request("bob", b"question", number)
        hosts.settle()
        (request,) = bob.take()
        assert (request.kind, request.name, request.id) == (Kind.REQUEST, "ann", number)
        bob.reply("ann", b"answer", number)
        hosts.settle()
        (reply,) = ann.take()
        assert (reply.kind, reply.name, reply.payload) == (Kind.REPLY, "bob", b"answer")
    assert ann.session.outgoing_count == 0
    assert bob.take() == []


def test_request_is_cancelled_at_other_host() -> None:
    """The holder learns it, and the owner's word about it is not a second outcome."""
    hosts, ann, bob = pair()
    bob.ask("cancels")
    ann.request("bob", b"question", 5)
    hosts.settle()
    bob.take()
    cancel = Envelope(Kind.ERROR, 5, "$broker", b'{"code": "cancelled"}', codec=2)
    ann.send(cancel)
    assert outcomes(ann) == [(5, "cancelled")]
    hosts.settle()
    (told,) = bob.take()
    assert (told.id, told.name, error_of(told)) == (5, "ann", "cancelled")
    assert ann.take() == []
    bob.reply("ann", b"late", 5)
    hosts.settle()
    assert ann.take() == []
    assert outcomes(bob) == [(5, "denied")]


def test_request_whose_ttl_is_over_expires_once() -> None:
    """The origin's clock decides; the holder is told."""
    hosts, ann, bob = pair()
    bob.ask("cancels")
    ann.request("bob", b"question", 5, extension={"ttl": 2})
    hosts.settle()
    bob.take()
    for name in "ab":
        hosts[name].net.advance(2.1)
    hosts.settle()
    assert outcomes(ann) == [(5, "expired")]
    assert [error_of(each) for each in bob.take()] == ["expired"]


def test_request_whose_holder_leaves_other_host_is_abandoned() -> None:
    """The owner knows whether it was delivered."""
    hosts, ann, bob = pair()
    ann.request("bob", b"question", 5)
    hosts.settle()
    bob.leave()
    hosts.settle()
    assert outcomes(ann) == [(5, "abandoned")]


def test_request_whose_answer_arrived_has_no_second_outcome() -> None:
    """The answer's host does not know that it arrived, and reports it as lost."""
    hosts, ann, bob = pair()
    ann.request("bob", b"question", 5)
    hosts.settle()
    bob.reply("ann", b"answer", 5)
    hosts["b"].flush()
    batch = next(content for kind, content in hosts["b"].outbound["a"] if kind == "batch")
    hosts.settle()
    assert [each.kind for each in ann.take()] == [Kind.REPLY]
    hosts["b"].unanswered["a"] = dict([batch])
    hosts["b"].fail_unanswered("a", ErrorCode.IN_DOUBT)
    hosts.settle()
    assert ann.take() == []


def test_requester_that_leaves_ends_its_request_at_other_host() -> None:
    """The holder is told."""
    hosts, ann, bob = pair()
    bob.ask("cancels")
    ann.request("bob", b"question", 5)
    hosts.settle()
    bob.take()
    ann.leave()
    hosts.settle()
    assert [(each.id, error_of(each)) for each in bob.take()] == [(5, "cancelled")]


def test_lost_host_abandons_confirmed_request_and_doubts_other_frames() -> None:
    """What had left and has no outcome is in doubt; later frames are ``offline``."""
    hosts, ann, _ = pair()
    ann.request("bob", b"question", 5)
    hosts.settle()
    ann.request("bob", b"question", 6)
    ann.message("bob", b"x", 7, receipt=True)
    hosts["a"].net.settle()
    hosts["a"].flush()
    hosts["a"].lose("b")
    assert sorted(outcomes(ann)) == [(5, "abandoned"), (6, "in_doubt"), (7, "in_doubt")]
    ann.message("bob", b"x", 8)
    assert outcomes(ann) == [(8, "offline")]


def test_lost_host_hears_outcomes_of_frames_that_waited_here() -> None:
    """They are never delivered: the owner knows, and its answer is kept."""
    hosts = JoinedHosts(client("ann"), client("bob", queue=100))
    ann, bob = hosts["a"].net.connect("ann"), hosts["b"].net.connect("bob")
    hosts.settle()
    bob.block()
    for number in range(3):
        ann.message("bob", b"x" * 60, number, receipt=True)
    hosts.settle()
    assert outcomes(ann) == [(0, "receipt")]
    owner = hosts["b"]
    owner.traffic.host_down("a", "silent", 0.0)
    runs = list(owner.traffic.take_outcomes("a"))
    hosts["a"].traffic.conclude("b", runs, 0.0)
    hosts["a"].net.settle()
    assert outcomes(ann) == [(1, "offline"), (2, "offline")]
    assert sorted(content for kind, content in owner.outbound["a"] if kind == "done")


def test_request_left_by_pool_member_goes_to_member_at_other_host() -> None:
    """With the sender's identity, which the other host asks for."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4))
    ann, here = hosts["a"].net.connect("ann"), hosts["a"].net.connect("pool")
    there = hosts["b"].net.connect("pool")
    hosts.settle()
    here.block()
    ann.request("pool", b"x", 7)
    here.leave()
    hosts.settle()
    assert [(each.name, each.payload) for each in there.take()] == [("ann", b"x")]


def test_batch_that_cannot_be_read_is_dropped() -> None:
    """The other host's broker has a bug, or another version."""
    hosts, ann, bob = pair()
    for frames in (b"\0\0\0\5hello", b"\0"):
        hosts["b"].traffic.deliver("a", 99, [Run("bob", frames)], 0.0)
    assert hosts["b"].net.broker.replies.dropped == 2
    ann.message("bob", b"x", 7)
    hosts.settle()
    assert bob.payloads() == [b"x"]


def test_upgrade_of_host_that_has_left_keeps_reports_of_its_requests() -> None:
    """A broker leaves the cluster right before another process takes over."""
    hosts, ann, bob = pair()
    net = hosts["a"].net
    ann.request("bob", b"question", 5)
    bob.request("ann", b"question", 9)
    hosts.settle()
    assert ann.payloads() == [b"question"]
    net.copy()
    hosts["a"].traffic.host_down("b", "this host leaves", net.now)
    net.copy()
    net.take_over()
    net.settle()
    assert outcomes(ann) == [(5, "abandoned")]
    ann.reply("bob", b"answer", 9)
    assert outcomes(ann) == [(9, "denied")]
    ann.message("bob", b"x", 10)
    assert outcomes(ann) == [(10, "offline")]


def test_frames_that_have_not_left_are_offline_when_nats_is_away() -> None:
    """They are never delivered later, and local traffic goes on."""
    hosts, ann, bob = pair()
    hosts["a"].window = 0
    ann.message("bob", b"x", 7)
    hosts["a"].flush()
    hosts["a"].traffic.suspend("NATS is away")
    hosts["a"].net.settle()
    assert outcomes(ann) == [(7, "offline")]
    ann.message("bob", b"x", 8)
    assert outcomes(ann) == [(8, "offline")]
    ann.message("ann", b"local", 9)
    assert ann.payloads() == [b"local"]
    hosts["a"].window = 1 << 20
    hosts["a"].traffic.resume()
    ann.message("bob", b"again", 10)
    hosts.settle()
    assert bob.payloads() == [b"again"]


# Pools


def test_pool_member_at_other_host_is_reached_by_its_address() -> None:
    """The address of a connection names its host."""
    hosts = joined("ann", "pool", connections=4)
    ann = hosts["a"].net.connect("ann")
    members = [hosts["b"].net.connect("pool") for _ in range(2)]
    hosts.settle()
    for member in members:
        ann.message(member.address, b"x", 1, receipt=True)
        hosts.settle()
        assert [each.name for each in member.take()] == [ann.address]
        assert outcomes(ann) == [(1, "receipt")]
        ann.request(member.address, b"x", 2)
        hosts.settle()
        assert member.payloads() == [b"x"]
        member.reply(ann.address, b"y", 2)
        hosts.settle()
        assert [(each.name, each.payload) for each in ann.take()] == [(member.address, b"y")]


def test_pool_prefers_members_here_then_other_hosts_then_waits() -> None:
    """Requests go to a free connection here, then to a host with a free one."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4, in_flight=1), names="abc")
    ann = hosts["a"].net.connect("ann")
    here = hosts["a"].net.connect("pool")
    there = hosts["b"].net.connect("pool")
    hosts.settle()
    ann.request("pool", b"1", 1)
    ann.request("pool", b"2", 2)
    hosts.settle()
    assert [here.payloads(), there.payloads()] == [[b"1"], [b"2"]]
    ann.request("pool", b"3", 3)
    hosts.settle()
    here.reply("ann", b"", 1)
    there.reply("ann", b"", 2)
    hosts.settle()
    assert here.payloads() + there.payloads() == [b"3"]


# Requests that a host returns


def pool_of(hosts: str = "bc", **changes: object) -> tuple[JoinedHosts, Peer, list[Peer]]:
    """Return three hosts, ann at the first, and members that take one request at a time."""
    joined_hosts = JoinedHosts(client("ann"), client("pool", connections=4, **changes), names="abc")
    ann = joined_hosts["a"].net.connect("ann")
    members = [joined_hosts[name].net.connect("pool") for name in hosts]
    for member in members:
        # Host a does not know of it.
        member.ask("in_flight", n=1)
    joined_hosts.settle()
    return joined_hosts, ann, members


def announce_free(hosts: JoinedHosts) -> None:
    """Make each host announce which of its pools are free or busy now."""
    for _ in range(2):
        for name in hosts.hosts:
            hosts[name].net.advance(0.1)
        hosts.settle()


def give_back(member: Peer, request: Envelope) -> None:
    """Return a request as a member that has not begun it."""
    member.send(Envelope(Kind.ERROR, request.id, request.name, b'{"code": "back"}', codec=2))


@pytest.mark.parametrize("first", ["b", "a"])
@pytest.mark.parametrize("receipt", [False, True])
def test_request_that_a_member_returns_goes_to_one_at_another_host(
    first: str, receipt: bool
) -> None:
    """The requester hears of it once; the next member sees it as the first one did."""
    hosts, ann, (one,) = pool_of(first)
    ann.request("pool", b"?", 7, receipt=receipt, extension={"x": 1})
    hosts.settle()
    (request,) = one.take()
    other = hosts["c"].net.connect("pool")
    hosts.settle()
    give_back(one, request)
    hosts.settle()
    (again,) = other.take()
    assert (again.kind, again.id, again.name, again.payload, again.extension, again.flags) == (
        request.kind,
        7,
        "ann",
        b"?",
        {"x": 1},
        request.flags,
    )
    other.reply("ann", b"!", 7)
    hosts.settle()
    kinds = [each.kind for each in ann.take()]
    assert kinds == [Kind.RECEIPT, Kind.REPLY] if receipt else kinds == [Kind.REPLY]
    assert not ann.session.outgoing_requests


def test_request_finds_the_member_of_a_host_that_had_none_for_a_while() -> None:
    """Also behind one that the routing loop delivers here."""
    hosts, ann, (former,) = pool_of("b")
    ann.request("pool", b"?", 1)
    hosts.settle()
    former.leave()
    announce_free(hosts)
    assert outcomes(ann) == [(1, "abandoned")]
    here, there = (hosts[name].net.connect("pool") for name in "ab")
    here.ask("in_flight", n=1)
    hosts.settle()
    sent = [frame(encode(Envelope(Kind.REQUEST, number, "pool", b"?"))) for number in (2, 3)]
    ann.send_bytes(b"".join(sent))
    hosts.settle()
    assert [[each.id for each in member.take()] for member in (here, there)] == [[2], [3]]


def test_request_that_comes_back_goes_to_a_member_at_the_requester_host() -> None:
    hosts, ann, (there,) = pool_of("b")
    ann.request("pool", b"?", 7, receipt=True)
    hosts.settle()
    (request,) = there.take()
    here = hosts["a"].net.connect("pool")
    give_back(there, request)
    hosts.settle()
    (again,) = here.take()
    assert (again.name, again.payload, again.flags) == ("ann", b"?", 0)
    here.reply("ann", b"!", 7)
    hosts.settle()
    assert [each.kind for each in ann.take()] == [Kind.RECEIPT, Kind.REPLY]


def test_request_that_a_member_returns_goes_to_another_one_at_its_host_first() -> None:
    hosts, ann, members = pool_of("bb")
    ann.request("pool", b"?", 7)
    hosts.settle()
    ((one, (request,)),) = [(each, got) for each in members if (got := each.take())]
    (other,) = [each for each in members if each is not one]
    give_back(one, request)
    hosts["b"].net.settle()
    assert [each.id for each in other.take()] == [7]


def test_request_that_the_last_member_of_all_hosts_returns_is_offline() -> None:
    hosts, ann, (one,) = pool_of("b")
    ann.request("pool", b"?", 7)
    hosts.settle()
    give_back(one, *one.take())
    hosts.settle()
    assert outcomes(ann) == [(7, "offline")]
    assert hosts["a"].net.broker.exchange.clients["pool"].track().retained == 0


def test_request_that_is_returned_after_its_cancel_has_no_second_outcome() -> None:
    hosts, ann, (one, other) = pool_of()
    ann.request("pool", b"?", 7)
    hosts.settle()
    (request,) = one.take()
    ann.send(Envelope(Kind.ERROR, 7, "$broker", b'{"code": "cancelled"}', codec=2))
    give_back(one, request)
    hosts.settle()
    assert outcomes(ann) == [(7, "cancelled")]
    assert other.take() == []


def test_request_that_waits_at_a_busy_host_goes_to_one_that_becomes_free() -> None:
    hosts, ann, members = pool_of()
    for number in (1, 2, 3):
        ann.request("pool", b"?", number, receipt=True)
    announce_free(hosts)
    held = {member: member.take() for member in members}
    ((idle, (done,)),) = [(member, got) for member, got in held.items() if got[0].id == 2]
    idle.reply("ann", b"!", done.id)
    announce_free(hosts)
    assert [each.id for each in idle.take()] == [3]
    assert sorted((each.kind, each.id) for each in ann.take()) == [
        (Kind.REPLY, 2),
        (Kind.RECEIPT, 1),
        (Kind.RECEIPT, 2),
        (Kind.RECEIPT, 3),
    ]


def test_requests_that_wait_at_a_host_go_elsewhere_when_its_last_member_leaves() -> None:
    """Each has one outcome."""
    hosts, ann, (one, other) = pool_of()
    for number in range(1, 6):
        ann.request("pool", b"?", number)
    announce_free(hosts)
    one.leave()
    announce_free(hosts)
    answered = []
    for _ in range(5):
        for request in other.take():
            answered.append(request.id)
            other.reply("ann", b"!", request.id)
        announce_free(hosts)
    got = [(each.id, each.kind is Kind.REPLY) for each in ann.take()]
    assert sorted(got) == [(1, False), (2, True), (3, True), (4, True), (5, True)]
    assert sorted(answered) == [2, 3, 4, 5]


@pytest.mark.parametrize("receipt", [False, True])
def test_request_that_arrives_after_the_last_member_left_goes_elsewhere(receipt: bool) -> None:
    """The requester's host did not know it yet; its RECEIPT comes once."""
    hosts, ann, (one, other) = pool_of()
    one.leave()
    for number in (1, 2):
        ann.request("pool", b"?", number, receipt=receipt)
    hosts.settle()
    assert [each.id for each in other.take()] in ([1], [2])
    assert sorted(outcomes(ann)) == ([(1, "receipt"), (2, "receipt")] if receipt else [])


def test_requests_of_clients_here_wait_on_when_the_last_member_leaves() -> None:
    """They go to a member at another host."""
    hosts, ann, (one, other) = pool_of("ab", in_flight=1)
    for number in (1, 2, 3):
        ann.request("pool", b"?", number)
    announce_free(hosts)
    assert [[each.id for each in member.take()] for member in (one, other)] == [[1], [2]]
    one.leave()
    other.reply("ann", b"!", 2)
    announce_free(hosts)
    assert [each.id for each in other.take()] == [3]


def test_name_that_is_announced_again_stays_reachable() -> None:
    hosts, ann, bob = pair()
    ann.message("bob", b"1")
    hosts.settle()
    hosts["a"].traffic.names_changed("b", [Name("bob", 1, 5.0)], 6.0)
    ann.message("bob", b"2")
    hosts.settle()
    assert bob.payloads() == [b"1", b"2"]


def test_requests_sent_before_a_host_says_that_it_is_busy_are_delivered_once() -> None:
    """The request that finds no room waits, and passes through no second host."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4), names="abc")
    ann = hosts["a"].net.connect("ann")
    members = [hosts[name].net.connect("pool") for name in "bc"]
    for member in members:
        # Host a does not know of it.
        member.ask("in_flight", n=1)
    hosts.settle()
    for number in (1, 2, 3):
        ann.request("pool", b"%d" % number, number)
    hosts.settle()
    got = []
    for _ in range(3):
        for member in members:
            for request in member.take():
                got.append(request.id)
                member.reply(request.name, b"", request.id)
        hosts.settle()
    assert sorted(got) == [1, 2, 3]
    assert sorted(each.id for each in ann.take()) == [1, 2, 3]


def test_pool_that_was_busy_elsewhere_announces_a_free_member() -> None:
    """A request that waits here then leaves."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4, in_flight=1))
    ann, there = hosts["a"].net.connect("ann"), hosts["b"].net.connect("pool")
    hosts.settle()
    for number in (1, 2):
        ann.request("pool", b"%d" % number, number)
        hosts["b"].net.advance(1)
        hosts.settle()
    assert there.payloads() == [b"1"]
    assert ann.session.waiting_count == 1
    there.reply("ann", b"", 1)
    hosts["b"].net.advance(1)
    hosts.settle()
    assert there.payloads() == [b"2"]


def test_messages_to_pool_elsewhere_take_turns_among_hosts() -> None:
    """Without a member here, the hosts with members share the messages."""
    hosts = JoinedHosts(client("ann"), client("pool", connections=4), names="abc")
    ann = hosts["a"].net.connect("ann")
    members = [hosts[name].net.connect("pool") for name in "bc"]
    hosts.settle()
    for number in range(6):
        ann.message("pool", b"x", number)
    hosts.settle()
    assert [len(member.take()) for member in members] == [3, 3]


# Events and presence


def test_event_goes_to_subscribers_of_other_host_once() -> None:
    """One copy per host, however many subscribers it has."""
    hosts = joined("ann", "bob", connections=5)
    ann = hosts["a"].net.connect("ann")
    subscribers = [hosts["b"].net.connect("bob") for _ in range(3)]
    for each in subscribers:
        each.ask("subscribe", topic="t.*")
    hosts.settle()
    before = hosts["b"].net.broker.status.totals
    for number in range(2):
        ann.publish("t.x", b"event", number, receipt=number == 1)
    hosts.settle()
    assert [each.payloads() for each in subscribers] == [[b"event"] * 2] * 3
    assert outcomes(ann) == [(1, "receipt")]
    assert before == hosts["b"].net.broker.status.totals
    subscribers[0].take()
    for each in subscribers:
        each.ask("unsubscribe", topic="t.*")
    hosts.settle()
    ann.publish("t.x", b"event")
    assert hosts["a"].touched == {}


def test_event_from_host_is_not_passed_on_to_third_host() -> None:
    """It would come twice."""
    hosts = JoinedHosts(client("ann"), client("bob", connections=3), names="abc")
    ann = hosts["a"].net.connect("ann")
    subscribers = [hosts[name].net.connect("bob") for name in "bc"]
    for each in subscribers:
        each.ask("subscribe", topic="t")
    hosts.settle()
    ann.publish("t", b"event")
    hosts.settle()
    assert [each.payloads() for each in subscribers] == [[b"event"]] * 2


@pytest.mark.parametrize("with_others", [False, True])
def test_group_over_hosts_gives_event_to_one_member(with_others: bool) -> None:
    """A member here comes first; subscribers without a group get their copy, too."""
    hosts = JoinedHosts(client("ann"), client("bob", connections=9), names="abc")
    ann = hosts["a"].net.connect("ann")
    members = [hosts[name].net.connect("bob") for name in "bbcc"]
    for each in members:
        each.ask("subscribe", topic="t", group="g")
    others = [hosts[name].net.connect("bob") for name in "abc"] if with_others else []
    for each in others:
        each.ask("subscribe", topic="t")
    hosts.settle()
    for _ in range(4):
        ann.publish("t", b"event")
    hosts.settle()
    assert sum(len(each.take()) for each in members) == 4
    assert [len(each.take()) for each in others] == [4] * len(others)
    local = hosts["a"].net.connect("bob")
    local.ask("subscribe", topic="t", group="g")
    hosts.settle()
    ann.publish("t", b"event")
    hosts.settle()
    assert local.payloads() == [b"event"]
    assert sum(len(each.take()) for each in members) == 0


def test_presence_of_client_at_other_host_is_published_here() -> None:
    """``clients`` and the events of presence say the same on each host."""
    hosts = joined("ann", "bob")
    ann = hosts["a"].net.connect("ann")
    for change in ("online", "offline"):
        ann.ask("subscribe", topic=f"$broker.{change}.*")
    bob = hosts["b"].net.connect("bob")
    hosts.settle()
    (event,) = ann.take()
    assert event.topic == "$broker.online.bob"
    assert [each["online"] for each in ann.ask("clients")["clients"]] == [True, True]
    bob.leave()
    hosts.settle()
    (event,) = ann.take()
    assert event.topic == "$broker.offline.bob"
    assert [each["online"] for each in ann.ask("clients")["clients"]] == [True, False]


def test_lost_host_takes_its_clients_offline() -> None:
    """All of them, in presence."""
    hosts, ann, _ = pair()
    ann.ask("subscribe", topic="$broker.offline.*")
    hosts["a"].lose("b")
    assert [each.topic for each in ann.take()] == ["$broker.offline.bob"]


def let_pass(hosts: JoinedHosts, seconds: float) -> None:
    """Move the clocks of all hosts forward."""
    for host in hosts.hosts.values():
        host.net.advance(seconds)


@pytest.mark.parametrize("kind", ["message", "request"])
@pytest.mark.parametrize("ttl", [5, 5.25])
def test_ttl_goes_on_at_owner_with_what_is_left(kind: str, ttl: float) -> None:
    """The link has no room for 3 of 5 seconds; the recipient does not read for the others."""
    hosts, ann, bob = pair()
    bob.block()
    hosts["a"].window = 0
    getattr(ann, kind)("bob", b"x", 7, extension={"ttl": ttl})
    let_pass(hosts, 3.0)
    hosts["a"].window = 1 << 20
    hosts["a"].touched["b"] = None
    hosts.settle()
    assert ann.take() == []
    let_pass(hosts, ttl - 3.0 + 0.1)
    hosts["b"].net.settle()
    bob.read()
    hosts.settle()
    assert bob.take() == []
    assert outcomes(ann) == [(7, "expired")]


def test_ttl_of_event_goes_on_at_owner_with_what_is_left() -> None:
    hosts, ann, bob = pair()
    bob.ask("subscribe", topic="news")
    bob.take()
    hosts.settle()
    bob.block()
    hosts["a"].window = 0
    ann.publish("news", b"x", extension={"ttl": 5})
    ann.publish("news", b"y")
    let_pass(hosts, 3.0)
    hosts["a"].window = 1 << 20
    hosts["a"].touched["b"] = None
    hosts.settle()
    let_pass(hosts, 2.5)
    bob.read()
    hosts.settle()
    assert bob.payloads() == [b"y"]


def test_frames_with_one_ttl_leave_in_one_run() -> None:
    hosts, ann, _ = pair()
    for ttl in (5, 5, None, None, 7, 5):
        extension = {} if ttl is None else {"extension": {"ttl": ttl}}
        ann.message("bob", b"x", **extension)
    ann.message("bob", b"x", extension={"ttl": 2**31 - 1})
    runs = list(hosts["a"].traffic.take_frames("b", 1 << 20))
    assert [run.ttl_ms for run in runs] == [5000, 0, 7000, 5000, 0]
    assert sum(len(list(walk(run.frames))) for run in runs) == 7


def test_rest_of_a_ttl_that_a_frame_does_not_have_is_ignored() -> None:
    hosts, _, bob = pair()
    frames = frame(encode(Envelope(Kind.MESSAGE, 7, "ann/i1a1", b"x")))
    hosts["b"].traffic.deliver("a", 99, [Run("bob", frames, 5000)], hosts["b"].net.now)
    hosts["b"].net.settle()
    assert bob.payloads() == [b"x"]


def test_request_that_passed_on_to_a_host_has_an_outcome_if_the_host_is_lost() -> None:
    hosts = joined("ann", "pool", connections=3)
    ann, here = (hosts["a"].net.connect(name) for name in ("ann", "pool"))
    hosts["b"].net.connect("pool")
    hosts.settle()
    here.block()
    hosts["a"].window = 0
    ann.request("pool", b"x", 7, receipt=True)
    assert outcomes(ann) == [(7, "receipt")]
    here.leave()
    hosts["a"].flush()
    assert ann.take() == []
    hosts["a"].traffic.host_down("b", "it is lost", 0.0)
    hosts["a"].net.settle()
    assert outcomes(ann) == [(7, "offline")]


def test_message_with_a_receipt_stays_on_its_host_if_its_pool_member_leaves() -> None:
    """Sent to a member elsewhere, it could be in doubt; its sender knows better."""
    hosts = joined("ann", "pool", connections=3)
    ann, here = (hosts["a"].net.connect(name) for name in ("ann", "pool"))
    there = hosts["b"].net.connect("pool")
    hosts.settle()
    here.block()
    ann.message("pool", b"x", 7, receipt=True)
    assert outcomes(ann) == [(7, "receipt")]
    here.leave()
    hosts.settle()
    assert outcomes(ann) == [(7, "offline")]
    assert there.take() == []
