"""Subscriptions that new rules forbid: they receive nothing from that moment, and are
ended little by little.
"""

from __future__ import annotations

from collections.abc import Iterable

from support.fake_network import FakeNet, Peer, client

from brokerd.core.broker import CoreLimits
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame


def reload(net: FakeNet, **subscribe: Iterable[str]) -> None:
    """Give clients other rules; nothing of what that leaves to do is done."""
    entries = {name: known.config for name, known in net.broker.exchange.clients.items()}
    entries |= {name: client(name, subscribe=tuple(rules)) for name, rules in subscribe.items()}
    net.broker.reconfigure(entries, CoreLimits(), net.now)


def pair() -> tuple[FakeNet, Peer, Peer]:
    """Return a network with one who publishes and one who subscribes."""
    net = FakeNet(client("ann"), client("bob"))
    return net, net.connect("ann"), net.connect("bob")


def test_what_is_forbidden_receives_nothing_before_it_has_ended() -> None:
    """Neither with a group nor without; what is allowed receives everything, once."""
    net, ann, bob = pair()
    for topic in (">", "a.*", "x"):
        bob.ask("subscribe", topic=topic)
        bob.ask("subscribe", topic=topic, group=f"g{len(topic)}")
    ann.publish("x", b"before")
    reload(net, bob=["a.*"])
    event = [
        frame(encode(Envelope(Kind.EVENT, 0, "", topic.encode(), topic=topic)))
        for topic in ("x", "a.b", "a", "a.c")
    ]
    data = memoryview(b"".join(event))
    assert net.feed(net.broker, ann.session, data, 0, len(data), 0.0) == (
        len(data),
        RoutingResult.CONSUMED,
    )
    assert net.broker.revocation
    assert net.broker.topics.find("a.b").groups.keys() == {"g3"}
    net.settle()
    assert bob.payloads() == [b"before", b"a.b", b"a.c"]
    assert bob.session.subscriptions == {("a.*", None), ("a.*", "g3")}
    assert len(net.broker.topics) == 2
    assert not net.broker.revocation
    ann.publish("a.d", b"after")
    ann.publish("x")
    assert bob.payloads() == [b"after"]


def test_forbidden_subscriptions_end_in_slices() -> None:
    """Ten thousand of them at once would hold up everybody else."""
    net, _, bob = pair()
    for number in range(50):
        bob.ask("subscribe", topic=f"t.{number}")
    reload(net, bob=["t.7", "t.8"])
    assert len(bob.session.subscriptions) == 50
    left = 50
    while net.broker.has_deferred_work:
        net.broker.run_deferred(7)
        assert left - len(bob.session.subscriptions) <= 7
        left = len(bob.session.subscriptions)
    assert bob.session.subscriptions == {("t.7", None), ("t.8", None)}
    assert {each.event for each in net.broker.replies.log_events.take()} == {"client.unsubscribed"}


def test_a_search_that_had_found_what_is_now_forbidden_begins_anew() -> None:
    """An event that was on its way when the rules changed does not reach who may not
    hear it.
    """
    net, ann, bob = pair()
    for number in range(500):
        bob.ask("subscribe", topic="a", group=f"g{number}")
    bob.ask("subscribe", topic="b.>")
    data = memoryview(frame(encode(Envelope(Kind.EVENT, 0, "", topic="a"))))
    net.broker.turn.budget = 1
    while (
        not net.broker.topics._searches
        or not net.broker.topics._searches[ann.session].matches.groups
    ):
        assert net.feed(net.broker, ann.session, data, 0, len(data), 0.0) == (
            0,
            RoutingResult.YIELD,
        )
        net.broker.turn.budget = 1
    reload(net, bob=["b.>"])
    net.broker.turn.budget = -1
    assert net.feed(net.broker, ann.session, data, 0, len(data), 0.0) == (
        len(data),
        RoutingResult.CONSUMED,
    )
    net.settle()
    assert bob.payloads() == []


def test_what_is_under_review_can_be_ended_by_its_client_while_somebody_searches() -> None:
    """A search that has passed over it has nothing to forget."""
    net, ann, bob = pair()
    for topic, group in (("a", "g"), ("a", "h"), (">", "g"), (">", "h")):
        bob.ask("subscribe", topic=topic, group=group)
    reload(net, bob=["a"])
    topics = net.broker.topics
    while topics.search("a", ann.session, 1)[0] is None:
        pass
    for ends in ((">", "g"), ("a", "h")):
        topics.forget()
        topics.search("a", ann.session, 1)
        search = topics._searches[ann.session]
        while len(search.matches) < 1 + (ends[0] == ">"):
            topics.search("a", ann.session, 1)
        topics.discard(ends[0], bob.session, ends[1])
        bob.session.subscriptions.discard(ends)
        found = None
        while found is None:
            found, _ = topics.search("a", ann.session, 1)
        assert found.groups.keys() == ({"g", "h"} if ends[0] == ">" else {"g"})
    net.settle()
    assert bob.session.subscriptions == {("a", "g")}


def test_who_leaves_under_review_leaves_nothing_behind() -> None:
    """What was not looked at goes with the connection."""
    net, _, bob = pair()
    for number in range(20):
        bob.ask("subscribe", topic=f"t.{number}")
    reload(net, bob=["t.7"])
    net.broker.run_deferred(5)
    bob.leave()
    assert not net.broker.has_deferred_work
    assert not net.broker.topics._restricted
    assert (len(net.broker.topics), net.broker.topics._root.is_empty) == (0, True)


def test_what_was_forbidden_once_is_not_there_again_when_it_is_allowed_again() -> None:
    """Two reloads, one behind the other: the first one's work is done before the
    second's rules hold.
    """
    net, ann, bob = pair()
    for number in range(20):
        bob.ask("subscribe", topic=f"t.{number}")
    reload(net, bob=["t.7"])
    net.broker.run_deferred(5)
    reload(net, bob=["t.>", "u"])
    assert bob.session.subscriptions == {("t.7", None)}
    bob.ask("subscribe", topic="u")
    ann.publish("t.7", b"7")
    ann.publish("t.8", b"8")
    ann.publish("u", b"u")
    assert bob.payloads() == [b"7", b"u"]


def test_rules_that_allow_more_are_a_reason_to_look_through_nothing() -> None:
    """As is everything else in an entry; and so is having no subscription."""
    net, ann, bob = pair()
    bob.ask("subscribe", topic="t")
    reload(net, bob=[">", "$broker.>", "t"], ann=["t"])
    assert not net.broker.revocation
    ann.publish("t", b"x")
    assert bob.payloads() == [b"x"]


def test_many_connections_are_looked_through_one_after_the_other() -> None:
    """Each with what it has; a slice ends in the middle of one, or behind it."""
    net = FakeNet(client("pool", connections=4))
    members = [net.connect("pool") for _ in range(4)]
    for number, member in enumerate(members):
        for each in range(number + 3):
            member.ask("subscribe", topic=f"t.{each}")
    net.broker.reconfigure(
        {"pool": client("pool", connections=4, subscribe=("t.0",))}, CoreLimits(), net.now
    )
    assert len(net.broker.revocation) == 4
    before = 18
    while net.broker.revocation:
        net.broker.run_deferred(4)
        now = sum(len(member.session.subscriptions) for member in members)
        assert before - now <= 4
        before = now
    assert all(member.session.subscriptions == {("t.0", None)} for member in members)
