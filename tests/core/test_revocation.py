"""Subscriptions that new rules forbid: they receive nothing from that moment, and end
a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

from support.fake_network import FakeNet, Peer, client

from brokerd.core.broker import CoreLimits
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame


def reload(net: FakeNet, **subscribe: Iterable[str]) -> None:
    """Give clients other rules, without the deferred work that this leaves."""
    entries = {name: entry.config for name, entry in net.broker.exchange.clients.items()}
    entries |= {name: client(name, subscribe=tuple(rules)) for name, rules in subscribe.items()}
    net.broker.reconfigure(entries, CoreLimits(), net.now)


def pair() -> tuple[FakeNet, Peer, Peer]:
    """Return a network with a publisher and a subscriber."""
    net = FakeNet(client("ann"), client("bob"))
    return net, net.connect("ann"), net.connect("bob")


def test_revocation_forbidden_subscription_receives_nothing_at_once() -> None:
    """This holds with a group and without; an allowed subscription receives every
    event, once.
    """
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


def test_revocation_of_many_subscriptions_ends_in_slices() -> None:
    """Ending ten thousand of them at once would delay all other clients."""
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


def test_revocation_restarts_search_with_forbidden_match() -> None:
    """An event that was being routed when the rules changed does not reach a client
    that they forbid.
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


def test_revocation_unsubscribe_during_search_removes_one_match() -> None:
    """A search that has skipped the forbidden subscription has nothing to remove."""
    net, ann, bob = pair()
    for topic, group in (("a", "g"), ("a", "h"), (">", "g"), (">", "h")):
        bob.ask("subscribe", topic=topic, group=group)
    reload(net, bob=["a"])
    topics = net.broker.topics
    while topics.search("a", ann.session, 1)[0] is None:
        pass
    for ended in ((">", "g"), ("a", "h")):
        topics.forget()
        topics.search("a", ann.session, 1)
        search = topics._searches[ann.session]
        while len(search.matches) < 1 + (ended[0] == ">"):
            topics.search("a", ann.session, 1)
        topics.discard(ended[0], bob.session, ended[1])
        bob.session.subscriptions.discard(ended)
        matches = None
        while matches is None:
            matches, _ = topics.search("a", ann.session, 1)
        assert matches.groups.keys() == ({"g", "h"} if ended[0] == ">" else {"g"})
    net.settle()
    assert bob.session.subscriptions == {("a", "g")}


def test_revocation_session_closed_meanwhile_leaves_nothing() -> None:
    """Subscriptions that were not checked are removed with the connection."""
    net, _, bob = pair()
    for number in range(20):
        bob.ask("subscribe", topic=f"t.{number}")
    reload(net, bob=["t.7"])
    net.broker.run_deferred(5)
    bob.leave()
    assert not net.broker.has_deferred_work
    assert not net.broker.topics._restricted
    assert (len(net.broker.topics), net.broker.topics._root.is_empty) == (0, True)


def test_revocation_subscription_allowed_again_is_not_restored() -> None:
    """There are two reloads in a row: the first one's revocation is finished before the
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


def test_revocation_rules_allowing_more_checks_nothing() -> None:
    """Other changes of an entry, and clients without subscriptions, need no check
    either.
    """
    net, ann, bob = pair()
    bob.ask("subscribe", topic="t")
    reload(net, bob=[">", "$broker.>", "t"], ann=["t"])
    assert not net.broker.revocation
    ann.publish("t", b"x")
    assert bob.payloads() == [b"x"]


def test_revocation_checks_connections_of_pool_one_by_one() -> None:
    """A slice ended among the subscriptions of one connection, or after the last of
    them.
    """
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
