"""Requests in flight: how many a connection gets, which wait, and how they end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client

from brokerd.config.values import WhenFull
from brokerd.core.broker import CoreLimits
from brokerd_client.wire.envelope import CodecId, Envelope, Kind
from brokerd_client.wire.layout import ACK_FLAG, RECEIPT_FLAG


def payload_of(code: str) -> bytes:
    return json.dumps({"code": code, "message": "", "name": ""}).encode()


def pool(members: int = 2, **options: Any) -> tuple[FakeNet, Peer, list[Peer]]:
    """Return a network, a requester, and the members of a pool, one request each."""
    values = {"connections": 4, "in_flight": 1} | options
    net = FakeNet(client("alice"), client("bob"), client("pool", **values))
    return net, net.connect("alice"), [net.connect("pool") for _ in range(members)]


def ask(peer: Peer, message_id: int, to: str = "pool", **options: Any) -> None:
    peer.send(Envelope(Kind.REQUEST, message_id, to, b"work", **options))


def answer(member: Peer, request: Envelope, payload: bytes = b"done") -> None:
    member.send(Envelope(Kind.REPLY, request.id, request.name, payload))


def fail(member: Peer, request: Envelope, code: str) -> None:
    member.send(
        Envelope(Kind.ERROR, request.id, request.name, payload_of(code), codec=CodecId.JSON)
    )


def cancel(peer: Peer, message_id: int) -> None:
    peer.send(
        Envelope(Kind.ERROR, message_id, "$broker", payload_of("cancelled"), codec=CodecId.JSON)
    )


def codes(peer: Peer) -> list[tuple[int, str]]:
    """Return the ids and codes of the errors that a peer has received."""
    return [
        (envelope.id, json.loads(envelope.payload)["code"])
        for envelope in peer.take()
        if envelope.kind is Kind.ERROR
    ]


def requests_of(peer: Peer) -> list[Envelope]:
    return [envelope for envelope in peer.take() if envelope.kind is Kind.REQUEST]


def test_pool_with_all_members_busy_keeps_requests_for_the_first_free_member() -> None:
    _net, alice, (one, two) = pool()
    for number in range(1, 6):
        ask(alice, number)
    (first,), (second,) = requests_of(one), requests_of(two)
    assert (first.id, second.id) == (1, 2)
    answer(two, second)
    assert [request.id for request in requests_of(two)] == [3]
    assert not one.take()
    answer(one, first)
    assert [request.id for request in requests_of(one)] == [4]


def test_pool_member_that_dies_loses_only_the_request_delivered_to_it() -> None:
    _net, alice, (one, two) = pool()
    for number in range(1, 6):
        ask(alice, number)
    (begun,) = requests_of(two)
    one.leave()
    assert codes(alice) == [(1, "abandoned")]
    served = [begun.id]
    while begun.id != 5:
        answer(two, begun)
        (begun,) = requests_of(two)
        served.append(begun.id)
    assert served == [2, 3, 4, 5]


def test_requests_that_wait_come_back_offline_when_the_last_member_leaves() -> None:
    _net, alice, (one,) = pool(1)
    for number in range(1, 4):
        ask(alice, number)
    one.leave()
    assert sorted(codes(alice)) == [(1, "abandoned"), (2, "offline"), (3, "offline")]


def test_member_that_joins_gets_requests_that_wait() -> None:
    net, alice, (_one,) = pool(1)
    for number in range(1, 4):
        ask(alice, number)
    assert [request.id for request in requests_of(net.connect("pool"))] == [2]


def test_in_flight_operation_sets_a_lower_limit_and_zero_stops_requests() -> None:
    _net, alice, (one,) = pool(1, in_flight=3)
    assert one.ask("in_flight", n=0) == {"in_flight": 0}
    ask(alice, 1)
    ask(alice, 2)
    assert not one.take()
    alice.message("pool", b"a message overtakes them")
    assert [envelope.kind for envelope in one.take()] == [Kind.MESSAGE]
    one.op("in_flight", n=1)
    assert [request.id for request in requests_of(one)] == [1]
    one.op("in_flight", n=100)
    answers = one.take()
    assert json.loads(answers[0].payload) == {"in_flight": 3}
    assert [request.id for request in answers[1:]] == [2]


@pytest.mark.parametrize("limit", [-1, 1.0, True, None, "1", 10**9])
def test_in_flight_operation_with_another_value_is_unsupported(limit: object) -> None:
    _, _, (one,) = pool(1)
    one.op("in_flight", message_id=7, n=limit)
    assert one.error() == (7, "unsupported")


def test_client_with_one_connection_has_no_limit_until_it_sets_one() -> None:
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(100):
        ask(alice, number + 1, "bob")
    requests = requests_of(bob)
    assert len(requests) == 100
    bob.ask("in_flight", n=2)
    ask(alice, 101, "bob")
    for request in requests[:99]:
        answer(bob, request)
    assert [request.id for request in requests_of(bob)] == [101]


def test_request_to_one_member_waits_for_that_member() -> None:
    _net, alice, (one, two) = pool()
    ask(alice, 1, one.address)
    ask(alice, 2, one.address)
    ask(alice, 3)
    (first,), (third,) = requests_of(one), requests_of(two)
    assert (first.id, third.id) == (1, 3)
    answer(one, first)
    assert [request.id for request in requests_of(one)] == [2]
    ask(alice, 4, one.address)
    one.leave()
    assert sorted(codes(alice)) == [(2, "abandoned"), (4, "offline")]


def test_requests_beyond_the_queue_come_back_full() -> None:
    _net, alice, _ = pool(1, queue=60, when_full=WhenFull.REFUSE)
    for number in range(1, 6):
        ask(alice, number)
    assert codes(alice) == [(4, "full"), (5, "full")]


def test_sender_of_requests_beyond_the_queue_is_held_until_there_is_room() -> None:
    _net, alice, (one,) = pool(1, queue=60)
    for number in range(1, 6):
        ask(alice, number)
    assert alice.held
    served = []
    while requests := requests_of(one):
        served += [request.id for request in requests]
        answer(one, requests[0])
    assert served == [1, 2, 3, 4, 5]
    assert not alice.held


def test_sender_held_too_long_gets_full() -> None:
    net, alice, _ = pool(1, queue=60)
    for number in range(1, 6):
        ask(alice, number)
    net.advance(31)
    assert codes(alice) == [(4, "full"), (5, "full")]


def test_drop_oldest_drops_the_request_that_has_waited_longest() -> None:
    _net, alice, _ = pool(1, queue=60, when_full=WhenFull.DROP_OLDEST)
    for number in range(1, 6):
        ask(alice, number)
    assert codes(alice) == [(2, "full"), (3, "full")]


def test_request_past_its_ttl_is_not_delivered() -> None:
    net, alice, (one,) = pool(1)
    ask(alice, 1)
    ask(alice, 2, extension={"ttl": 1})
    ask(alice, 3)
    (first,) = requests_of(one)
    net.advance(1.1)
    assert codes(alice) == [(2, "expired")]
    answer(one, first)
    assert [request.id for request in requests_of(one)] == [3]


def test_holder_that_asked_for_cancels_hears_of_an_expired_request() -> None:
    net, alice, (one,) = pool(1)
    assert one.ask("cancels") == {}
    ask(alice, 1, extension={"ttl": 1})
    ask(alice, 2)
    (request,) = requests_of(one)
    net.advance(1.1)
    told, following = one.take()
    assert (told.kind, told.flags, told.id, told.name) == (Kind.ERROR, ACK_FLAG, 1, "alice")
    assert json.loads(told.payload)["code"] == "expired"
    assert following.id == 2
    answer(one, request)
    assert codes(one) == [(1, "denied")]
    assert codes(alice) == [(1, "expired")]


def test_cancel_ends_a_request_that_waits() -> None:
    _net, alice, (one,) = pool(1)
    ask(alice, 1)
    ask(alice, 2)
    (first,) = requests_of(one)
    cancel(alice, 2)
    assert codes(alice) == [(2, "cancelled")]
    answer(one, first)
    assert not one.take()


def test_cancel_of_a_delivered_request_reaches_its_holder_and_frees_its_place() -> None:
    _net, alice, (one,) = pool(1)
    one.ask("cancels")
    ask(alice, 1)
    ask(alice, 2)
    one.take()
    cancel(alice, 1)
    told, following = one.take()
    assert (told.kind, told.flags, told.id, told.name) == (Kind.ERROR, ACK_FLAG, 1, "alice")
    assert json.loads(told.payload)["code"] == "cancelled"
    assert following.id == 2
    assert codes(alice) == [(1, "cancelled")]
    cancel(alice, 1)
    assert not alice.take()


def test_holder_that_did_not_ask_for_cancels_is_not_told() -> None:
    _net, alice, (one,) = pool(1)
    ask(alice, 1)
    (request,) = requests_of(one)
    cancel(alice, 1)
    assert not one.take()
    answer(one, request)
    assert codes(one) == [(1, "denied")]
    assert codes(alice) == [(1, "cancelled")]


def test_cancel_ends_all_requests_with_its_id() -> None:
    net, alice, (_one, _two) = pool()
    bob = net.connect("bob")
    ask(alice, 7, "bob")
    for _ in range(3):
        ask(alice, 7)
    ask(alice, 8)
    cancel(alice, 7)
    assert [code for code in codes(alice) if code == (7, "cancelled")] == [(7, "cancelled")] * 4
    assert [request.id for request in requests_of(bob)] == [7]


def test_other_error_to_the_broker_ends_nothing() -> None:
    _net, alice, (one,) = pool(1)
    ask(alice, 1)
    for payload in (b"", b"[]", b"{}", payload_of("failed"), b"x" * 5000):
        alice.send(Envelope(Kind.ERROR, 1, "$broker", payload))
    assert not alice.take()
    answer(one, requests_of(one)[0])
    assert [envelope.kind for envelope in alice.take()] == [Kind.REPLY]


def test_returned_request_goes_to_another_member_before_those_that_wait() -> None:
    _net, alice, (one, two) = pool()
    for number in range(1, 5):
        ask(alice, number, extension={"traceparent": "t"})
    (first,), (second,) = requests_of(one), requests_of(two)
    fail(one, first, "back")
    assert [request.id for request in requests_of(one)] == [3]
    answer(two, second)
    (again,) = requests_of(two)
    assert (again.id, again.payload, again.extension) == (1, b"work", {"traceparent": "t"})
    answer(two, again, b"at last")
    received = [(envelope.id, envelope.payload) for envelope in alice.take()]
    assert received == [(2, b"done"), (1, b"at last")]


def test_returned_request_with_receipt_is_confirmed_to_its_member() -> None:
    _net, alice, (one, two) = pool()
    ask(alice, 1)
    (request,) = requests_of(one)
    payload = payload_of("back")
    one.send(Envelope(Kind.ERROR, 1, request.name, payload, codec=CodecId.JSON, flags=RECEIPT_FLAG))
    assert [(each.kind, each.id) for each in one.take()] == [(Kind.RECEIPT, 1)]
    assert [each.id for each in requests_of(two)] == [1]


@pytest.mark.parametrize("to", ["pool", "bob", "own address"])
def test_returned_request_that_can_go_nowhere_else_comes_back_offline(to: str) -> None:
    net, alice, (one,) = pool(1)
    bob = net.connect("bob")
    if to == "own address":
        net.connect("pool")
    ask(alice, 1, one.address if to == "own address" else to)
    holder = bob if to == "bob" else one
    fail(holder, requests_of(holder)[0], "back")
    assert codes(alice) == [(1, "offline")]


def test_requests_that_a_member_did_not_read_go_to_another_member_in_order() -> None:
    net, alice, (one,) = pool(1, in_flight=3)
    one.block()
    for number in range(1, 6):
        ask(alice, number)
    two = net.connect("pool")
    assert [request.id for request in requests_of(two)] == [4, 5]
    one.leave()
    assert [request.id for request in requests_of(two)] == [1]
    assert not codes(alice)


def test_cancelled_request_that_a_member_did_not_read_is_not_passed_on() -> None:
    net, alice, (one,) = pool(1)
    one.block()
    ask(alice, 1)
    cancel(alice, 1)
    two = net.connect("pool")
    one.leave()
    assert not two.take()
    assert codes(alice) == [(1, "cancelled")]


def test_requests_of_a_requester_that_leaves_are_not_delivered() -> None:
    _net, alice, (one,) = pool(1)
    for number in range(1, 4):
        ask(alice, number)
    (first,) = requests_of(one)
    alice.leave()
    assert not one.take()
    answer(one, first)
    assert codes(one) == [(1, "denied")]


def test_holder_of_a_request_whose_requester_leaves_is_told_as_of_a_cancel() -> None:
    net, alice, (one, two) = pool()
    one.ask("cancels")
    for number in range(1, 4):
        ask(alice, number)
    (first,), _ = requests_of(one), requests_of(two)
    alice.leave()
    (told,) = one.take()
    assert (told.kind, told.flags, told.id, told.name) == (Kind.ERROR, ACK_FLAG, 1, "alice")
    assert json.loads(told.payload)["code"] == "cancelled"
    assert not two.take()
    answer(one, first)
    assert codes(one) == [(1, "denied")]
    ask(net.connect("bob"), 4)
    assert [request.id for request in requests_of(one) + requests_of(two)] == [4]


def test_holder_of_a_request_whose_requester_is_retired_is_told() -> None:
    net, alice, (one,) = pool(1)
    one.ask("cancels")
    ask(alice, 1)
    one.take()
    net.broker.goaway.retire(alice.session)
    net.settle()
    assert [(told.id, told.flags) for told in one.take()] == [(1, ACK_FLAG)]


def test_holder_keeps_a_request_with_the_id_of_one_whose_requester_has_left() -> None:
    net, alice, (one,) = pool(1, in_flight=2)
    one.ask("cancels")
    for number in range(1, 3):
        ask(alice, number)
    one.take()
    net.broker.detach(alice.session, net.now)
    net.peers.remove(alice)
    again = net.broker.attach("alice", "again", peer="test", now_wall=net.now)
    net.broker.requests.expect(again, one.session, 1, None)
    net.settle()
    assert [(told.id, told.flags) for told in one.take()] == [(2, ACK_FLAG)]


def test_holder_that_leaves_with_its_requester_is_not_told() -> None:
    net, alice, (one,) = pool(1)
    one.ask("cancels")
    ask(alice, 1)
    for peer in (alice, one):
        net.broker.detach(peer.session, net.now)
        net.peers.remove(peer)
    net.settle()
    assert not net.broker.has_deferred_work


def test_reload_with_a_higher_limit_delivers_requests_that_wait() -> None:
    net, alice, (one,) = pool(1)
    for number in range(1, 4):
        ask(alice, number)
    one.take()
    entries = {name: net.broker.exchange.clients[name].config for name in ("alice", "bob")}
    entries["pool"] = client("pool", connections=4, in_flight=2)
    net.broker.reconfigure(entries, CoreLimits(), net.now)
    net.settle()
    assert [request.id for request in requests_of(one)] == [2]


def test_oldest_of_too_many_requests_that_wait_is_ended() -> None:
    net = FakeNet(client("alice", requests=2), client("pool", connections=2, in_flight=1))
    alice, one = net.connect("alice"), net.connect("pool")
    one.ask("in_flight", n=0)
    for number in range(1, 4):
        ask(alice, number)
    assert codes(alice) == [(1, "expired")]


def test_receipt_of_a_request_that_waits_comes_at_once() -> None:
    _net, alice, _ = pool(1)
    ask(alice, 1)
    alice.request("pool", b"", 2, receipt=True)
    assert [(envelope.kind, envelope.id) for envelope in alice.take()] == [(Kind.RECEIPT, 2)]


def test_member_that_does_not_read_gets_requests_last() -> None:
    _net, alice, (one, two) = pool(in_flight=10)
    one.block()
    one.session.outbox.blocked = False
    alice.message(one.address, b"x" * 100)
    for number in range(1, 9):
        ask(alice, number)
    assert [request.id for request in requests_of(two)] == list(range(1, 9))


def test_upgrade_carries_requests_that_wait_and_limits() -> None:
    net, alice, (one, two) = pool()
    one.ask("cancels")
    two.ask("in_flight", n=0)
    ask(alice, 1)
    ask(alice, 2, extension={"ttl": 5})
    ask(alice, 3)
    ask(alice, 4, two.address)
    (first,) = requests_of(one)
    net.hand_over()
    assert not one.take()
    fail(one, first, "back")
    assert [request.id for request in requests_of(one)] == [2]
    net.advance(5.1)
    told, following = one.take()
    assert (told.id, json.loads(told.payload)["code"], following.id) == (2, "expired", 3)
    two.op("in_flight", n=1)
    assert [request.id for request in requests_of(two)] == [4]
    assert codes(alice) == [(2, "expired")]


def test_upgrade_under_other_entries_reports_requests_whose_recipient_is_gone() -> None:
    net, alice, (one,) = pool(1)
    ask(alice, 1)
    ask(alice, 2)
    net.hand_over(client("alice"), client("bob"))
    one.leave()
    net.broker.run_deferred(100)
    net.settle()
    assert sorted(codes(alice)) == [(1, "abandoned"), (2, "offline")]


def test_idle_member_keeps_its_own_limit_over_an_upgrade() -> None:
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("in_flight", n=1)
    net.hand_over()
    ask(alice, 1, "bob")
    ask(alice, 2, "bob")
    assert [request.id for request in requests_of(bob)] == [1]


def test_cancelled_request_stays_cancelled_over_an_upgrade() -> None:
    net, alice, (one,) = pool(1)
    one.block()
    ask(alice, 1)
    cancel(alice, 1)
    net.hand_over()
    two = net.connect("pool")
    one.leave()
    assert not two.take()
    assert codes(alice) == [(1, "cancelled")]


def test_returned_request_waits_for_another_member_than_the_one_that_returned_it() -> None:
    net, alice, (one, two) = pool()
    ask(alice, 1)
    ask(alice, 2)
    (first,), (second,) = requests_of(one), requests_of(two)
    fail(one, first, "back")
    assert not one.take()
    answer(two, second)
    assert [request.id for request in requests_of(two)] == [1]
    assert [envelope.id for envelope in alice.take()] == [2]
    net.advance(1)


def test_member_that_does_not_read_gets_waiting_requests_as_far_as_its_queue_has_room() -> None:
    _, alice, (one,) = pool(1, queue=60, in_flight=10)
    one.ask("in_flight", n=0)
    for number in range(1, 3):
        ask(alice, number)
    one.op("in_flight", n=10)
    one.take()
    one.block()
    alice.message(one.address, b"x" * 40)
    ask(alice, 3)
    assert alice.held or not one.take()
    one.read()
    assert 3 in [request.id for request in requests_of(one)]


def test_many_requests_that_wait_are_delivered_in_several_turns() -> None:
    _, alice, (one,) = pool(1, in_flight=500)
    one.ask("in_flight", n=0)
    for number in range(200):
        ask(alice, number)
    one.op("in_flight", n=500)
    assert [request.id for request in requests_of(one)] == list(range(200))


def test_waiting_requests_go_on_when_a_member_that_did_not_read_reads() -> None:
    _, alice, (one,) = pool(1, queue=60, in_flight=2)
    one.ask("in_flight", n=0)
    ask(alice, 1)
    ask(alice, 2)
    one.block()
    alice.message(one.address, b"y" * 40)
    one.op("in_flight", n=2)
    one.read()
    assert [request.id for request in requests_of(one)] == [1, 2]


def test_pinned_requests_that_wait_are_the_last_to_be_dropped() -> None:
    _, alice, (one,) = pool(1, queue=60, when_full=WhenFull.DROP_OLDEST)
    for number in range(1, 5):
        ask(alice, number, one.address)
    assert codes(alice) == [(2, "full")]


def test_drain_waits_for_requests_that_wait_for_a_member() -> None:
    net, alice, (one,) = pool(1)
    for peer in (alice, one):
        peer.ask("goaway")
    ask(alice, 1)
    ask(alice, 2)
    (first,) = requests_of(one)
    net.broker.drain()
    net.settle()
    assert not net.broker.goaway.has_finished(alice.session)
    assert not net.broker.goaway.has_finished(one.session)
    answer(one, first)
    (second,) = requests_of(one)
    answer(one, second)
    assert net.broker.goaway.has_finished(alice.session)
    assert net.broker.goaway.has_finished(one.session)


def test_cancel_of_many_requests_with_one_id_takes_several_turns() -> None:
    net, alice, (one,) = pool(1)
    for _ in range(201):
        ask(alice, 7)
    cancel(alice, 7)
    ask(alice, 8)
    for _ in range(10):
        net.settle()
    assert codes(alice) == [(7, "cancelled")] * 201
    assert [request.id for request in requests_of(one)] == [7, 8]


def test_oldest_of_too_many_requests_with_one_id_is_ended() -> None:
    net = FakeNet(client("alice", requests=2), client("pool", connections=2, in_flight=1))
    alice, one = net.connect("alice"), net.connect("pool")
    one.ask("in_flight", n=0)
    for _ in range(4):
        ask(alice, 7)
    assert codes(alice) == [(7, "expired"), (7, "expired")]


def test_cancel_with_a_receipt_is_confirmed() -> None:
    _, alice, _ = pool(1)
    alice.send(Envelope(Kind.ERROR, 3, "$broker", payload_of("cancelled"), flags=1))
    assert [(envelope.kind, envelope.id) for envelope in alice.take()] == [(Kind.RECEIPT, 3)]


def test_waiting_requests_reach_a_client_with_one_connection() -> None:
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.ask("in_flight", n=0)
    ask(alice, 1, "bob")
    ask(alice, 2, "bob", extension={"ttl": 9})
    bob.op("in_flight", n=2)
    assert [(request.id, request.extension) for request in requests_of(bob)] == [
        (1, None),
        (2, {"ttl": 9}),
    ]


def test_client_counts_its_waiting_requests() -> None:
    net, alice, (one, _) = pool()
    for number in range(1, 6):
        ask(alice, number)
    ask(alice, 6, one.address)
    flight = net.broker.exchange.clients["pool"].flight
    assert flight is not None
    assert (len(flight), flight.size > 0, alice.session.waiting_count) == (4, True, 4)
    assert net.broker.operations.stats()["requests_waiting"] == 4
    assert net.broker.operations.stats()["requests_in_flight"] == 2


def test_pinned_requests_stay_with_their_member_over_an_upgrade_until_it_leaves() -> None:
    net, alice, (one, two) = pool()
    ask(alice, 1, one.address)
    ask(alice, 2, one.address)
    net.hand_over()
    one.take()
    one.leave()
    assert sorted(codes(alice)) == [(1, "abandoned"), (2, "offline")]
    assert not two.take()


def test_requests_whose_recipients_have_left_are_reported_after_an_upgrade() -> None:
    net, alice, (one,) = pool(1)
    alice.block()
    for number in range(1, 200):
        ask(alice, number)
    net.broker.detach(one.session, net.now)
    net.peers.remove(one)
    assert list(net.broker.in_flight.waiting())
    net.hand_over()
    alice.read()
    net.settle()
    while net.broker.has_deferred_work:
        net.broker.run_deferred(64)
    net.settle()
    assert sorted(codes(alice)) == [(1, "abandoned")] + [(n, "offline") for n in range(2, 200)]


def test_request_of_a_requester_that_has_just_left_is_dropped() -> None:
    net, alice, (one,) = pool(1)
    ask(alice, 1)
    ask(alice, 2)
    one.take()
    net.broker.detach(alice.session, net.now)
    net.peers.remove(alice)
    net.broker.in_flight.dispatch(net.broker.exchange.clients["pool"])
    net.settle()
    assert not one.take()
    assert net.broker.replies.dropped == 1


def test_request_of_a_retired_requester_is_delivered_without_an_answer() -> None:
    net, alice, (one,) = pool(1)
    ask(alice, 1)
    ask(alice, 2)
    (first,) = requests_of(one)
    net.broker.goaway.retire(alice.session)
    net.settle()
    (second,) = requests_of(one)
    answer(one, second)
    assert codes(one) == [(2, "denied")]
    assert first.id == 1


def test_pinned_requests_wait_while_their_member_does_not_read() -> None:
    _, alice, (one,) = pool(1, queue=60, in_flight=3)
    one.ask("in_flight", n=0)
    ask(alice, 1, one.address)
    ask(alice, 2, one.address)
    one.block()
    alice.message(one.address, b"x" * 40)
    one.op("in_flight", n=3)
    assert not one.take()
    one.read()
    assert [request.id for request in requests_of(one)] == [1, 2]


def test_retired_member_that_raises_its_limit_gets_no_request() -> None:
    net, alice, (one, two) = pool()
    net.broker.goaway.retire(one.session)
    one.op("in_flight", n=1)
    ask(alice, 1)
    assert not requests_of(one)
    assert len(requests_of(two)) == 1


def test_drop_oldest_request_longer_than_the_queue_replaces_all_that_wait() -> None:
    _, alice, (one,) = pool(1, queue=60, when_full=WhenFull.DROP_OLDEST)
    for number in range(1, 4):
        ask(alice, number)
    alice.request("pool", b"x" * 100, 4)
    assert codes(alice) == [(2, "full"), (3, "full")]
    answer(one, requests_of(one)[0])
    assert [(request.id, len(request.payload)) for request in requests_of(one)] == [(4, 100)]


def test_last_member_with_waiting_requests_has_not_finished() -> None:
    """Its requester waits for none of the delivered requests, but for one that waits."""
    net, alice, (one,) = pool(1)
    for peer in (alice, one):
        peer.ask("goaway")
    bob = net.connect("bob")
    bob.ask("goaway")
    ask(bob, 1)
    ask(alice, 2)
    (first,) = requests_of(one)
    net.broker.drain()
    bob.op("finished", 8)
    assert not net.broker.goaway.has_finished(one.session)
    answer(one, first)
    answer(one, requests_of(one)[0])
    assert net.broker.goaway.has_finished(one.session)


def test_cancelled_request_that_expires_unread_is_reported_once() -> None:
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    ask(alice, 1, "bob", extension={"ttl": 5})
    cancel(alice, 1)
    net.advance(6)
    bob.read()
    net.settle()
    assert not bob.take()
    assert codes(alice) == [(1, "cancelled")]


def test_answered_request_that_expires_is_not_reported() -> None:
    net, alice, (one,) = pool(1)
    ask(alice, 1, extension={"ttl": 5})
    answer(one, requests_of(one)[0])
    alice.take()
    net.advance(6)
    assert not alice.take()
    assert not one.take()


def test_cancelled_request_that_is_dropped_for_a_newer_one_is_reported_once() -> None:
    net = FakeNet(client("alice"), client("bob", when_full=WhenFull.DROP_OLDEST, queue=60))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    ask(alice, 1, "bob")
    cancel(alice, 1)
    for number in range(2, 9):
        ask(alice, number, "bob")
    outcomes = codes(alice)
    assert (2, "full") in outcomes
    assert [code for message_id, code in outcomes if message_id == 1] == ["cancelled"]


def test_request_that_a_member_did_not_read_waits_over_an_upgrade() -> None:
    net, alice, (one, two) = pool()
    one.block()
    ask(alice, 1)
    ask(alice, 2)
    one.leave()
    net.hand_over()
    (second,) = requests_of(two)
    answer(two, second)
    assert [request.id for request in requests_of(two)] == [1]


def test_request_with_an_id_in_use_has_an_outcome_of_its_own() -> None:
    """Each answer ends the oldest of them, and one more is denied."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(3):
        alice.send(Envelope(Kind.REQUEST, 7, "bob", b"%d" % number))
    assert [request.payload for request in requests_of(bob)] == [b"0", b"1", b"2"]
    for payload in (b"a", b"b", b"c"):
        bob.reply("alice", payload, 7)
    assert [reply.payload for reply in alice.take()] == [b"a", b"b", b"c"]
    assert not bob.session.incoming_requests
    assert not alice.session.outgoing_requests
    bob.reply("alice", b"d", 7)
    assert codes(bob) == [(7, "denied")]


def test_in_flight_counts_requests_with_one_id() -> None:
    """A member gets no more of them than its limit, and the rest as it answers."""
    _, alice, (member,) = pool(1, in_flight=2)
    for _ in range(4):
        ask(alice, 0)
    first, _ = requests_of(member)
    answer(member, first)
    (third,) = requests_of(member)
    assert (third.name, third.id) == (first.name, 0)


def test_cancel_ends_requests_with_one_id_at_one_holder() -> None:
    """Those that were delivered and those that wait; each holder is told of each."""
    _, alice, members = pool(2, in_flight=2)
    for member in members:
        member.ask("cancels")
    for _ in range(5):
        ask(alice, 7)
    assert [len(requests_of(member)) for member in members] == [2, 2]
    cancel(alice, 7)
    assert codes(alice) == [(7, "cancelled")] * 5
    assert [codes(member) for member in members] == [[(7, "cancelled")] * 2] * 2


def test_member_that_leaves_ends_all_requests_with_one_id() -> None:
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(3):
        alice.request("bob", b"?", 7)
    bob.take()
    bob.reply("alice", b"!", 7)
    bob.leave()
    replies = alice.take()
    assert [envelope.kind for envelope in replies] == [Kind.REPLY, Kind.ERROR, Kind.ERROR]
    assert {json.loads(envelope.payload)["code"] for envelope in replies[1:]} == {"abandoned"}


def test_upgrade_keeps_requests_with_one_id_apart() -> None:
    """Their order, which of them has a ttl, and their frames for another member."""
    net, alice, (member,) = pool(1, in_flight=4)
    frames = [b"0", b"1", b"2", b"3"]
    for number, frame in enumerate(frames):
        extension = {"ttl": 50} if number == 2 else None
        alice.send(Envelope(Kind.REQUEST, 7, "pool", frame, extension=extension))
    requests = requests_of(member)
    answer(member, requests[0], b"a")
    net.copy()
    net.hand_over()
    assert [reply.payload for reply in alice.take()] == [b"a"]
    assert len(member.session.incoming_requests) == 3
    answer(member, requests[1], b"b")
    assert [reply.payload for reply in alice.take()] == [b"b"]
    net.advance(51)
    assert codes(alice) == [(7, "expired")]
    other = net.connect("pool")
    fail(member, requests[3], "back")
    assert [request.payload for request in requests_of(other)] == [b"3"]


@pytest.mark.parametrize("ttls", [(None, None), (9, 9), (None, 9), (9, None)])
def test_unread_request_passes_on_though_its_id_is_in_use(
    ttls: tuple[float | None, float | None],
) -> None:
    """The one that the member has read is reported, and the other is not."""
    net, alice, (member,) = pool(1, in_flight=4)
    bob = net.connect("bob")
    extensions = [None if ttl is None else {"ttl": ttl} for ttl in ttls]
    ask(alice, 7, "bob")
    ask(alice, 7, extension=extensions[0])
    assert len(requests_of(member)) == 1
    member.block()
    ask(alice, 7, extension=extensions[1])
    other = net.connect("pool")
    member.leave()
    (passed_on,) = requests_of(other)
    assert codes(alice) == [(7, "abandoned")]
    answer(other, passed_on, b"done")
    assert [reply.payload for reply in alice.take()] == [b"done"]
    assert len(requests_of(bob)) == 1
    assert len(bob.session.incoming_requests) == 1


def test_cancelled_requests_with_one_id_pass_to_no_other_member() -> None:
    net, alice, (member,) = pool(1, in_flight=4)
    member.block()
    for _ in range(3):
        ask(alice, 7)
    cancel(alice, 7)
    other = net.connect("pool")
    member.leave()
    assert codes(alice) == [(7, "cancelled")] * 3
    assert requests_of(other) == []
