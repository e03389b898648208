"""The last steps of a session: the goaway notice, ``finished``, retired, mute."""

from __future__ import annotations

import json

import pytest
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import WhenFull
from brokerd.core.goaway import add_reason
from brokerd.core.precopy import Copier
from brokerd.core.snapshot import capture_idle
from brokerd_client.wire.envelope import ErrorCode, Kind


def net_of(*names: str, **changes: object) -> tuple[FakeNet, list[Peer]]:
    net = FakeNet(*(client(name, **changes) for name in names))
    return net, [net.connect(name) for name in names]


def topics(peer: Peer) -> list[str]:
    return [each.topic for each in peer.take() if each.kind is Kind.EVENT]


def test_goaway_drain_in_steps_notifies_each_requester_once() -> None:
    net, (ann, bob, cid) = net_of("ann", "bob", "cid")
    ann.ask("goaway")
    ann.ask("subscribe", topic="$broker.draining")
    bob.ask("goaway")
    steps = net.broker.goaway.drain_in_steps()
    for _ in range(2):
        next(steps)
    net.broker.detach(bob.session, net.now)
    net.peers.remove(bob)
    list(steps)
    assert not list(net.broker.goaway.drain_in_steps())
    net.settle()
    assert (topics(ann), topics(cid)) == (["$broker.draining"], [])


def test_goaway_requested_during_drain_is_sent_at_once() -> None:
    net, (ann,) = net_of("ann")
    net.broker.drain()
    ann.op("goaway", 1)
    assert [each.kind for each in ann.take()] == [Kind.REPLY, Kind.EVENT]


def test_goaway_parting_session_is_refused_and_others_are_not() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    ann.message("bob", b"known")
    ann.ask("goaway")
    net.broker.goaway.part(ann.session)
    net.broker.goaway.part(bob.session)
    net.settle()
    ann.take()
    ann.message("bob", b"late", 1)
    assert ann.error() == (1, "shutting_down")
    ann.publish("t", b"", 2)
    assert ann.error() == (2, "shutting_down")
    bob.message("ann", b"goes on")
    assert ann.payloads() == [b"goes on"]


def test_goaway_finished_waits_until_messages_are_reported() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    broker = net.broker
    ann.ask("goaway")
    bob.block()
    ann.message("bob", b"waits", 1)
    broker.drain()
    ann.op("finished", 9)
    assert not broker.goaway.answer_finished(ann.session)
    net.peers.remove(bob)
    broker.detach(bob.session, net.now)
    assert not broker.goaway.answer_finished(ann.session)
    net.settle()
    assert broker.goaway.answer_finished(ann.session)
    net.settle()
    outcomes = [each for each in ann.take() if each.kind is not Kind.EVENT]
    assert [(each.kind, each.id) for each in outcomes] == [(Kind.ERROR, 1), (Kind.REPLY, 9)]
    assert not broker.goaway.finishing


def test_goaway_finished_waits_while_requester_awaits_reply() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    broker = net.broker
    for each in (ann, bob):
        each.ask("goaway")
    ann.request("bob", b"?", 1)
    broker.drain()
    bob.op("finished", 9)
    assert not broker.goaway.answer_finished(bob.session)
    ann.op("finished", 8)
    assert broker.goaway.answer_finished(bob.session)
    assert broker.goaway.answer_finished(ann.session)


def test_goaway_finished_waits_for_reply_sent_after_it() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    broker = net.broker
    bob.ask("goaway")
    ann.request("bob", b"?", 1)
    ann.block()
    broker.drain()
    bob.op("finished", 9)
    assert not broker.goaway.answer_finished(bob.session)
    bob.reply("ann", b"!", 1)
    assert not broker.goaway.answer_finished(bob.session)
    ann.read()
    assert broker.goaway.answer_finished(bob.session)


@pytest.mark.parametrize("twice", [False, True])
def test_goaway_finished_without_notice_or_twice_is_unsupported(twice: bool) -> None:
    net, (ann,) = net_of("ann")
    if twice:
        ann.ask("goaway")
        net.broker.drain()
        net.settle()
        ann.op("finished", 1)
        ann.take()
    ann.op("finished", 2)
    assert ann.error() == (2, "unsupported")


def test_goaway_retired_session_receives_nothing() -> None:
    net, (ann, bob, cid) = net_of("ann", "bob", "cid")
    bob.ask("subscribe", topic="t")
    bob.request("cid", b"?", 5)
    net.broker.goaway.retire(bob.session)
    net.broker.goaway.retire(bob.session)
    ann.message("bob", b"", 1)
    ann.publish("t")
    assert ann.error() == (1, "offline")
    cid.reply("bob", b"!", 5)
    assert [error_of(each) for each in cid.take() if each.kind is Kind.ERROR] == ["denied"]
    bob.op("subscribe", 3, topic="t")
    assert bob.error() == (3, "shutting_down")
    bob.leave()
    net.settle()
    assert not net.broker.topics.find("t").everyone


def test_goaway_mute_session_frames_are_delivered_or_counted() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    net.broker.drain()
    net.broker.goaway.mute(ann.session)
    ann.message("bob", b"delivered", 1, receipt=True)
    ann.request("bob", b"delivered too", 2)
    ann.publish("t", b"to nobody", 3)
    ann.message("nobody", b"lost", 4)
    ann.op("ping", 5)
    ann.op("nothing", 6)
    assert bob.payloads() == [b"delivered", b"delivered too"]
    bob.reply("ann", b"!", 2)
    assert bob.error()[1] == "denied"
    assert ann.take() == []
    assert net.broker.replies.returned["lost"] == 1


def test_goaway_mute_session_undelivered_frame_is_counted() -> None:
    net = FakeNet(client("ann"), client("bob", when_full=WhenFull.DROP_OLDEST))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x", 1)
    net.broker.goaway.mute(ann.session)
    bob.leave()
    net.settle()
    assert (net.broker.replies.returned["lost"], ann.take()) == (1, [])


def test_reports_refusal_not_read_is_counted() -> None:
    net, (ann,) = net_of("ann")
    ann.block()
    ann.message("nobody", b"", 1)
    ann.op("nothing", 2)
    ann.op("ping", 3)
    ann.leave()
    net.settle()
    assert dict(net.broker.reports.unheard) == {"no_such_client": 1}


def test_goaway_every_member_of_pool_and_group_is_notified() -> None:
    net = FakeNet(client("pool", connections=3))
    members = [net.connect("pool") for _ in range(3)]
    for member in members:
        member.ask("goaway")
        member.ask("subscribe", topic="$broker.draining", group="g")
    net.broker.drain()
    net.settle()
    assert [topics(member) for member in members] == [["$broker.draining"]] * 3
    members[0].op("finished", 1)
    assert net.broker.goaway.answer_finished(members[0].session)
    net.settle()
    assert json.loads(members[0].take()[-1].payload) == {}


def test_goaway_reason_is_error_with_id_0() -> None:
    net, (ann,) = net_of("ann")
    add_reason(ann.session, ErrorCode.REPLACED, "a newer one")
    net.broker.replies.touch(ann.session)
    net.settle()
    (error,) = ann.take()
    assert (error.kind, error.id, error.name) == (Kind.ERROR, 0, "$broker")
    assert json.loads(error.payload) == {
        "code": "replaced",
        "message": "a newer one",
        "name": "$broker",
    }


def test_goaway_reason_not_read_is_not_counted_as_lost() -> None:
    net, (ann,) = net_of("ann")
    add_reason(ann.session, ErrorCode.DISCONNECTED, "why")
    net.broker.detach(ann.session, net.now)
    net.peers.remove(ann)
    net.broker.run_deferred(10)
    assert (net.broker.reports.unheard, net.broker.replies.returned) == ({}, {})


def test_goaway_reason_is_omitted_for_finished_mute_or_closed_session() -> None:
    net, (ann, bob, cid) = net_of("ann", "bob", "cid")
    ann.session.finished = True
    net.broker.goaway.mute(bob.session)
    net.broker.detach(cid.session, net.now)
    net.peers.remove(cid)
    for peer in (ann, bob, cid):
        add_reason(peer.session, ErrorCode.SHUTTING_DOWN, "why")
        assert not peer.session.outbox.waiting


def test_session_closed_twice_keeps_first_reason_and_code() -> None:
    net, (ann,) = net_of("ann")
    net.broker.replies.close(ann.session, "first", code=ErrorCode.KEY_REMOVED)
    net.broker.replies.close(ann.session, "second", code=ErrorCode.DISCONNECTED)
    assert (ann.session.closing, ann.session.closing_code) == ("first", ErrorCode.KEY_REMOVED)


def test_goaway_drain_in_steps_notifies_many_subscribers_in_turns() -> None:
    """A turn notifies a limited number of subscribers; each gets one notice."""
    names = [f"c{number}" for number in range(600)]
    net, peers = net_of(*names)
    for peer in peers:
        peer.ask("subscribe", topic="$broker.draining")
    notified = [
        sum(peer.session.goaway_sent for peer in peers) for _ in net.broker.goaway.drain_in_steps()
    ]
    net.settle()
    assert notified == sorted(notified)
    assert len(set(notified)) < len(notified)
    assert [topics(peer) for peer in peers] == [["$broker.draining"]] * 600


def test_goaway_session_retired_after_its_copy_is_noted_as_changed() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    copier = Copier(net.broker)
    copier.watch()
    for peer in (ann, bob):
        assert capture_idle(net.broker, peer.session, net.now, copier) is not None
    net.broker.goaway.retire(bob.session)
    assert copier.changed_sessions() == [bob.session]


def test_requests_without_outcome_are_reported_when_the_broker_stops() -> None:
    """The request that waits counts as reported, unless its requester can no longer be told."""
    net = FakeNet(client("ann"), client("bob", in_flight=1), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    for requester in (ann, cid):
        requester.request("bob", b"?", 1)
        requester.request("bob", b"?", 2)
    bob.take()
    net.broker.goaway.mute(cid.session)
    before = net.broker.replies.returned["reported"]
    net.broker.goaway.end_requests(ann.session)
    net.broker.goaway.end_requests(cid.session)
    net.write_touched()
    assert {each.id: error_of(each) for each in ann.take()} == {1: "abandoned", 2: "offline"}
    assert cid.take() == []
    assert net.broker.replies.returned["reported"] - before == 1
    assert not bob.session.incoming_requests


def test_released_name_is_announced_once_and_its_connection_leaves_later() -> None:
    net, (ann, bob) = net_of("ann", "bob")
    ann.ask("subscribe", topic="$broker.offline.bob")
    net.broker.release_name(bob.session, net.now)
    net.settle()
    assert topics(ann) == ["$broker.offline.bob"]
    bob.leave()
    net.settle()
    assert topics(ann) == []
    ann.message("bob", b"", 1)
    assert ann.error() == (1, "offline")
