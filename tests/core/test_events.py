"""Events with many subscribers: sent in turns, in order, to each subscriber once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import FakeNet, Peer, client
from support.joined_hosts import JoinedHosts

from brokerd.config.values import WhenFull
from brokerd.core import broker as broker_module
from brokerd.core import deferred as deferred_module
from brokerd.core import delivery as delivery_module
from brokerd.core import events as events_module
from brokerd.core import groups
from brokerd.core.topic_search import Matches
from brokerd_client.wire.envelope import Kind


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every step so small that a few subscribers take several."""
    monkeypatch.setattr(deferred_module, "_AT_ONCE", 1)
    monkeypatch.setattr(broker_module, "_STEPS", 2)
    monkeypatch.setattr(events_module, "_STEP", 2)
    monkeypatch.setattr(events_module, "_MATCHES", 2)


def watchers(count: int, *, groups: int = 0) -> tuple[FakeNet, list[Peer]]:
    """Return a net with connections that subscribe to presence, each in ``groups``
    groups as well.
    """
    names = [f"w{number}" for number in range(count)]
    net = FakeNet(client("ann"), client("bob"), *map(client, names))
    peers = [net.connect(name) for name in names]
    for number, peer in enumerate(peers):
        peer.ask("subscribe", topic="$broker.online.bob")
        peer.ask("subscribe", topic="$broker.offline.bob")
        for group in range(groups):
            peer.ask("subscribe", topic="$broker.*.bob", group=f"g{number}-{group}")
    return net, peers


def in_turns(net: FakeNet) -> list[int]:
    """Do the deferred work; return how many sessions each turn wrote to."""
    counts = []
    while net.broker.deferred:
        net.broker.run_deferred(0)
        counts.append(len(net.broker.touched))
        net.write_touched()
    return counts


def test_presence_without_subscriptions_caches_no_topics() -> None:
    """Each client has presence topics of its own. While nothing is subscribed to, they
    take neither time nor memory, and the list of clients is right all the same.
    """
    net = FakeNet(*map(client, (names := [f"c{number}" for number in range(50)])))
    peers = [net.connect(name) for name in names]
    for peer in peers[10:]:
        peer.leave()

    assert not net.broker.topics.cache.topics
    clients = peers[0].ask("clients")["clients"]
    assert [entry["online"] for entry in clients] == [True] * 10 + [False] * 40


@pytest.mark.parametrize("groups", [0, 5])
def test_presence_with_many_subscribers_is_published_in_turns_and_in_order(groups: int) -> None:
    """Waiting presence events are published one after the other, to every subscriber."""
    net, peers = watchers(20, groups=groups)
    net._settling = True
    for _ in range(3):
        net.connect("bob").leave()
    assert len(net.broker.deferred) == 6
    counts = in_turns(net)
    assert max(counts) <= 4 * 2
    assert len(counts) > 20
    net._settling = False
    net.settle()
    for peer in peers:
        assert [each.topic for each in peer.take()] == [
            "$broker.online.bob",
            "$broker.offline.bob",
        ] * 3


def test_presence_list_agrees_with_events_before_and_after() -> None:
    """A list that is requested while presence events wait agrees with the events its
    connection has received.
    """
    net, peers = watchers(20)
    net._settling = True
    first = net.connect("bob")
    for peer in peers[::3]:
        peer.op("clients", 7)
    first.leave()
    peers[1].op("clients", 7)
    net.connect("bob")
    in_turns(net)
    net._settling = False
    net.settle()
    for number, peer in enumerate(peers):
        online: bool | None = None
        for envelope in peer.take():
            if envelope.kind is Kind.EVENT:
                assert online is not envelope.topic.startswith("$broker.online"), (
                    "an event without a change"
                )
                online = envelope.topic.startswith("$broker.online")
            else:
                listed = {each["name"]: each for each in json.loads(envelope.payload)["clients"]}
                assert listed["bob"]["online"] is online
                assert number % 3 == 0 or number == 1
        assert online is True


def test_presence_being_published_continues_after_upgrade() -> None:
    """Each subscriber receives each event once, whichever process sent it."""
    net, peers = watchers(20, groups=2)
    net._settling = True
    net.connect("bob").leave()
    for _ in range(5):
        net.broker.run_deferred(0)
        net.write_touched()
        net.hand_over()
    in_turns(net)
    net._settling = False
    net.settle()
    for peer in peers:
        assert [each.topic for each in peer.take()] == ["$broker.online.bob", "$broker.offline.bob"]
    assert not net.broker.exchange.clients["bob"].shown_online


def test_presence_subscriber_disconnected_meanwhile_is_skipped() -> None:
    """The remaining subscribers still receive the event."""
    net, peers = watchers(10)
    net._settling = True
    net.connect("bob")
    net.broker.run_deferred(0)
    for peer in peers[::2]:
        peer.leave()
    in_turns(net)
    net._settling = False
    net.settle()
    for peer in peers[1::2]:
        assert [each.topic for each in peer.take()] == ["$broker.online.bob"]


def test_reload_with_many_subscribers_is_published_in_turns() -> None:
    """Every other event of the broker's own is published in turns as well."""
    names = [f"w{number}" for number in range(30)]
    net = FakeNet(*map(client, names))
    peers = [net.connect(name) for name in names]
    for peer in peers:
        peer.ask("subscribe", topic="$broker.reloaded")
    net._settling = True
    net.broker.reconfigure(
        {name: client(name) for name in names}, net.broker.status.limits, net.now
    )
    assert len(in_turns(net)) > 5
    net._settling = False
    net.settle()
    assert [[each.topic for each in peer.take()] for peer in peers] == [["$broker.reloaded"]] * 30


def limited(net: FakeNet, turn_budget: int) -> list[int]:
    """Limit the turn budget of each call of ``feed``; return the list to which each call
    adds the number of sessions it wrote to.
    """
    feed, counts = net.feed, []

    def counted(broker: Any, *arguments: Any) -> Any:
        broker.turn.budget = turn_budget
        before = len(broker.touched)
        result = feed(broker, *arguments)
        counts.append(len(broker.touched) - before)
        return result

    net.feed = counted
    return counts


@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("size", [10, 200_000])
def test_event_to_many_subscribers_is_sent_in_turns(groups: int, size: int) -> None:
    """A publisher's event reaches each subscriber once; other clients have their turns
    in between.
    """
    names = [f"w{number}" for number in range(70)]
    # One queue is edited: the routing loop leaves events for so many to the broker.
    watching = [client(name) for name in names[1:]]
    watching.append(client(names[0], when_full=WhenFull.DROP_OLDEST))
    net = FakeNet(client("ann"), client("bob"), *watching)
    ann, bob = net.connect("ann"), net.connect("bob")
    peers = [net.connect(name) for name in names]
    for number, peer in enumerate(peers):
        peer.ask("subscribe", topic="t")
        for group in range(groups):
            peer.ask("subscribe", topic="t", group=f"g{number}-{group}")
    counts = limited(net, 1)
    ann.publish("t", b"x" * size, 1, receipt=True)
    bob.publish("t", b"y" * size, 2)
    assert max(counts) <= 6
    assert len(counts) > 10
    for peer in peers:
        assert [each.id for each in peer.take()] == [1, 2]
    assert [(each.kind, each.id) for each in ann.take()] == [(Kind.RECEIPT, 1)]
    assert ann.session.spread is None
    assert ann.session.reached_by_event is None


def test_event_to_many_subscribers_continues_after_upgrade() -> None:
    """No subscriber gets the event twice, and none misses it."""
    names = [f"w{number}" for number in range(70)]
    net = FakeNet(client("ann"), *map(client, names))
    ann = net.connect("ann")
    peers = [net.connect(name) for name in names]
    for number, peer in enumerate(peers):
        peer.ask("subscribe", topic="t")
        peer.ask("subscribe", topic="t", group=f"g{number % 5}")
    limited(net, 1)
    net._settling = True
    ann.publish("t", b"x", 1)
    upgrades = recipients = 0
    while ann.content:
        net.write_touched()
        if len(ann.session.reached_by_event or ()) > recipients:
            # The search begins again in the new process.
            recipients = len(ann.session.reached_by_event or ())
            net.hand_over()
            upgrades += 1
        net._yielded.clear()
        ann.reading = True
        net._route(ann)
    assert upgrades > 3
    net._settling = False
    net.settle()
    for peer in peers:
        assert [each.id for each in peer.take()] == [1]


@pytest.mark.parametrize("when_full", list(WhenFull))
def test_event_full_subscriber_does_not_hold_publisher(when_full: WhenFull) -> None:
    """The full subscriber misses the event, unless its queue drops older ones. The
    publisher and other subscribers go on at once.
    """
    net = FakeNet(client("ann"), client("bob", queue=100, when_full=when_full), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    for each in (bob, cid):
        each.ask("subscribe", topic="t")
    bob.block()
    for number in range(10):
        ann.publish("t", b"%d" % number * 20, number, receipt=True)
    assert not ann.held
    assert len(cid.take()) == 10
    assert [each.kind for each in ann.take()] == [Kind.RECEIPT] * 10
    assert net.broker.replies.dropped == (1 if when_full is WhenFull.DISCONNECT else 8)
    assert bool(bob.gone) is (when_full is WhenFull.DISCONNECT)
    if not bob.gone:
        bob.read()
        expected = [8, 9] if when_full is WhenFull.DROP_OLDEST else [0, 1]
        assert [each.id for each in bob.take()] == expected


def test_event_to_large_group_examines_few_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a member has room, the search for the least loaded ends after a fixed number
    of members.
    """
    monkeypatch.setattr(groups, "_LOOKED_AT", 3)
    names = [f"w{number}" for number in range(20)]
    net = FakeNet(client("ann"), *map(client, names))
    ann = net.connect("ann")
    peers = [net.connect(name) for name in names]
    for peer in peers:
        peer.ask("subscribe", topic="t", group="g")
        peer.block(1)
        ann.message(peer.name, b"x")
    matches = net.broker.topics.find("t")
    chosen, examined = groups.choose_member(matches, "g", 5, 10)
    assert chosen is not None
    assert examined == 3
    peers[6].read()
    assert groups.choose_member(matches, "g", 5, 10) == (peers[6].session, 2)


def test_groups_choose_one_member_of_each() -> None:
    """Members take turns. A group of which a member gets the event anyway gets nothing
    more, and a group without an open member is left to the events.
    """
    names = ["both", "one", "two"]
    net = FakeNet(*map(client, names))
    both, one, two = (net.connect(name) for name in names)
    both.ask("subscribe", topic="t.*", group="g")
    both.ask("subscribe", topic="t.*", group="h")
    one.ask("subscribe", topic="t.*", group="h")
    matches = net.broker.topics.find("t.x")
    assert groups.choose_members(matches, 10) == [both.session]
    for peer in (one, two):
        peer.ask("subscribe", topic="t.y")
        peer.ask("subscribe", topic="t.y", group="i")
    two.ask("subscribe", topic="t.z", group="j")
    assert groups.choose_members(net.broker.topics.find("t.y"), 10) == [both.session]
    matches = net.broker.topics.find("t.z")
    assert groups.choose_members(matches, 10) == [both.session, two.session]
    two.leave()
    assert groups.choose_members(matches, 10) is None


def test_event_dropping_oldest_in_turns_reaches_each_subscriber_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long event that replaces many messages of one subscriber reaches other
    subscribers too, once each.
    """
    monkeypatch.setattr(delivery_module, "_DROPPED", 3)
    net = FakeNet(
        client("ann"),
        client("bob", queue=2000, when_full=WhenFull.DROP_OLDEST),
        client("cid"),
        client("dan"),
    )
    ann, bob, cid, dan = (net.connect(name) for name in ("ann", "bob", "cid", "dan"))
    for each in (cid, bob, dan):
        each.ask("subscribe", topic="t")
    bob.block()
    for number in range(40):
        ann.message("bob", b"x" * 31, number)
    ann.publish("t", b"y" * 1900, 99)
    bob.read()
    assert [each.id for each in bob.take()] == [39, 99]
    assert [each.id for each in cid.take()] == [each.id for each in dan.take()] == [99]


def test_event_to_large_busy_group_takes_several_steps() -> None:
    """Looking for the least loaded of many members takes several steps."""
    names = [f"w{number}" for number in range(20)]
    net = FakeNet(client("ann"), *map(client, names))
    ann = net.connect("ann")
    for name in names:
        peer = net.connect(name)
        peer.ask("subscribe", topic="$broker.reloaded", group="g")
        peer.block(1)
        ann.message(name, b"x")
    steps = list(events_module.recipients(net.broker.topics, "$broker.reloaded", 50))
    assert len([each for each in steps if each is not None]) == 1
    assert len(steps) > 5


def test_group_member_that_has_left_meanwhile_is_passed_over() -> None:
    """It has unsubscribed during the search, and may still be found in the tree."""
    net = FakeNet(client("one"), client("two"))
    one, two = (net.connect(name).session for name in ("one", "two"))
    matches = Matches((), {"g": {one: 1, two: 1}}, {one}, 2)
    for turn in (1, 2):
        assert groups.choose_member(matches, "g", turn, 10)[0] is two


def test_groups_with_members_at_other_hosts_are_left_to_the_events() -> None:
    hosts = JoinedHosts(client("ann"), client("bob"))
    hosts["b"].net.connect("bob").ask("subscribe", topic="t", group="g")
    hosts.settle()
    matches = hosts["a"].net.broker.topics.find("t")
    assert groups.choose_members(matches, 10) is None


def test_group_whose_members_have_no_room_stays_here_without_another_host() -> None:
    """A host with members of another group gets only its own copy."""
    hosts = JoinedHosts(client("ann"), client("bob", queue=100), client("cat"))
    ann, bob = hosts["a"].net.connect("ann"), hosts["a"].net.connect("bob")
    cat = hosts["b"].net.connect("cat")
    bob.ask("subscribe", topic="t", group="g")
    cat.ask("subscribe", topic="t", group="h")
    hosts.settle()
    bob.block()
    for _ in range(3):
        ann.publish("t", b"x" * 50)
    hosts.settle()
    assert len(cat.take()) == 3
    bob.read()
    assert len(bob.take()) == 1
