"""Another process of a broker goes on with its links: no host sees it leave."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_network import Peer, client, error_of
from support.joined_brokers import BrokerHost, JoinedBrokers
from support.mailbox_net import MailboxNet, with_mailbox

from brokerd.config.values import Rule
from brokerd.core.broker import CoreLimits
from brokerd.core.cluster import hand_over
from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.hand_over import capture
from brokerd.core.snapshot_check import BadSnapshot
from brokerd_client.wire.envelope import Kind


def joined(*, limits: CoreLimits | None = None, **pool: object) -> JoinedBrokers:
    """Return two hosts."""
    net = JoinedBrokers(
        client("ann"),
        client("bob"),
        client("cat", queue=300),
        client("pool", connections=4, **{"in_flight": 1, **pool}),
        limits=limits,
    )
    net.up("a", "b")
    return net


def host(net: JoinedBrokers, name: str) -> BrokerHost:
    """Return a host."""
    found = net.hosts[name]
    assert isinstance(found, BrokerHost)
    return found


def connect(net: JoinedBrokers, name: str, at: str) -> Peer:
    """Connect a client."""
    peer = host(net, at).connect_client(name)
    assert peer is not None
    net.settle()
    return peer


def outcomes(peer: Peer) -> list[tuple[int, str]]:
    """Return the id and the kind or code of each frame that has arrived."""
    return [
        (each.id, error_of(each) if each.kind is Kind.ERROR else each.kind.name.lower())
        for each in peer.take()
    ]


def test_upgrade_of_either_host_leaves_requests_under_way() -> None:
    """Each request is answered after upgrades of both, in both directions."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    ann.request("bob", b"?", 1, extension={"ttl": 500})
    bob.request("ann", b"?", 2)
    net.settle()
    ann.take(), bob.take()
    for name in "abab":
        host(net, name).upgrade()
        net.run(1.0)
        assert [each.state_of("b" if each.name == "a" else "a") for each in net.hosts.values()] == [
            "up"
        ] * 2
    bob.reply("ann", b"!", 1)
    ann.reply("bob", b"!", 2)
    net.settle()
    assert outcomes(ann) == [(1, "reply")]
    assert outcomes(bob) == [(2, "reply")]
    assert net.counts["bye"] == 0


def test_upgrade_changes_no_presence() -> None:
    """No host announces that a client went or came, and names stay reachable."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    ann.ask("subscribe", topic="$broker.>")
    bob.ask("subscribe", topic="$broker.>")
    net.run(1.0)
    ann.take(), bob.take()
    host(net, "b").hold()
    assert host(net, "b").cluster.is_held
    ann.message("bob", b"while it is held", 1, receipt=True)
    net.run(1.0)
    assert ann.take() == []
    host(net, "b").hand_over()
    bob.message("ann", b"before NATS is back", 2, receipt=True)
    net.run(1.0)
    host(net, "b").connect()
    net.run(3.0)
    assert sorted(outcomes(ann)) == [(1, "receipt"), (2, "message")]
    assert sorted(outcomes(bob)) == [(1, "message"), (2, "receipt")]


def test_upgrade_keeps_subscriptions_of_both_hosts() -> None:
    """Events pass in both directions, once."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    ann.ask("subscribe", topic="t.*")
    bob.ask("subscribe", topic="t.*", group="g")
    net.settle()
    host(net, "a").upgrade()
    net.run(2.0)
    ann.publish("t.x", b"1")
    bob.publish("t.x", b"2")
    net.settle()
    assert ann.payloads() == [b"1", b"2"]
    assert len(bob.take()) == 2


def test_upgrade_while_a_sender_is_held_delivers_in_order() -> None:
    """Held at the origin, at the owner, and frames that wait for the window."""
    net = joined()
    ann, cat = connect(net, "ann", "a"), connect(net, "cat", "b")
    cat.block(10)
    for number in range(1, 30):
        ann.message("cat", b"x" * 50, number, receipt=True)
    net.settle()
    for name in "ab":
        host(net, name).upgrade()
        net.run(0.3)
    cat.read()
    net.run(3.0)
    assert [number for number, _ in outcomes(cat)] == list(range(1, 30))
    assert outcomes(ann) == [(number, "receipt") for number in range(1, 30)]


def test_upgrade_keeps_requests_that_wait_for_room_in_flight() -> None:
    """In a pool at one host, for requesters at both; the pool's members answer them all."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    worker = connect(net, "pool", "b")
    for number in range(1, 4):
        ann.request("pool", b"?", number)
        bob.request("pool", b"?", 10 + number, extension={"ttl": 300})
    net.settle()
    received = worker.take()
    host(net, "b").upgrade()
    net.run(1.0)
    host(net, "a").upgrade()
    net.run(1.0)
    for _ in range(6):
        (request,) = received or worker.take()
        received = []
        worker.reply(request.name, b"!", request.id)
        net.run(0.1)
    assert outcomes(ann) == [(number, "reply") for number in range(1, 4)]
    assert outcomes(bob) == [(10 + number, "reply") for number in range(1, 4)]


def test_upgrade_keeps_reports_to_senders_of_other_hosts() -> None:
    """What waits for a client that leaves is reported to the sender's host."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    bob.block()
    ann.message("bob", b"x", 1)
    net.settle()
    host(net, "b").upgrade()
    net.run(1.0)
    bob.leave()
    net.run(1.0)
    assert outcomes(ann) == [(1, "offline")]


def test_upgrade_during_which_nats_stays_away_refuses_what_waits() -> None:
    """Frames that another process has left are offline, as are new ones."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    host(net, "a").hold()
    ann.message("bob", b"x", 1, receipt=True)
    net.settle()
    host(net, "a").hand_over()
    net.settle()
    assert ann.take() == []
    host(net, "a").disconnect()
    ann.message("bob", b"x", 2, receipt=True)
    net.settle()
    assert outcomes(ann) == [(1, "offline"), (2, "offline")]
    host(net, "a").upgrade()
    net.run(2.0)
    ann.message("bob", b"x", 3, receipt=True)
    net.settle()
    assert outcomes(ann) == [(3, "receipt")]
    assert bob.payloads() == [b"x"]


def test_upgrade_with_a_host_that_is_lost_meanwhile_reports_what_it_left() -> None:
    """Frames that had left are in doubt, delivered requests abandoned, others offline."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    ann.request("bob", b"?", 1)
    net.run(0.5)
    bob.take()
    net.hosts["b"].is_frozen = True
    ann.message("bob", b"x", 2, receipt=True)
    net.settle()
    host(net, "a").hold()
    ann.message("bob", b"x", 3, receipt=True)
    net.settle()
    host(net, "a").hand_over()
    net.run(8.0)
    host(net, "a").connect()
    net.run(8.0)
    assert sorted(outcomes(ann)) == [(1, "abandoned"), (2, "in_doubt"), (3, "offline")]


def test_upgrade_without_the_other_hosts_client_denies_its_frames() -> None:
    """Its requests have that outcome, whether delivered, waiting or not handled yet."""
    net = joined()
    ann, cat = connect(net, "ann", "a"), connect(net, "cat", "b")
    worker = connect(net, "pool", "b")
    ann.request("cat", b"?", 1)
    for number in (2, 3):
        ann.request("pool", b"?", number)
    net.settle()
    cat.block(10)
    for number in range(4, 20):
        ann.message("cat", b"x" * 60, number)
    net.settle()
    ann.take()
    there = host(net, "b")
    there.hold()
    there.hand_over(
        *(
            each.config
            for each in there.broker_net.broker.exchange.clients.values()
            if each.name != "ann"
        )
    )
    there.connect()
    net.run(3.0)
    assert worker.session.open
    told = outcomes(ann)
    assert [outcome for number, outcome in told if number < 4] == ["denied"] * 3
    assert {outcome for _, outcome in told} == {"denied"}


def test_upgrade_without_a_recipient_abandons_requests_to_it() -> None:
    """Its answer can't come any more."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    ann.request("bob", b"?", 1)
    net.settle()
    bob.take()
    here = host(net, "a")
    here.hold()
    here.hand_over(
        *(
            each.config
            for each in here.broker_net.broker.exchange.clients.values()
            if each.name != "bob"
        )
    )
    assert outcomes(ann) == [(1, "abandoned")]
    assert json.dumps(here.cluster.hosts(net.now))


def test_upgrade_that_fails_goes_on_with_all_that_waited() -> None:
    """The old process connects to NATS again; senders that were held go on, too."""
    net = joined()
    ann, cat = connect(net, "ann", "a"), connect(net, "cat", "b")
    here = host(net, "a")
    here.hold()
    for number in range(1, 20):
        ann.message("cat", b"x" * 60, number, receipt=True)
    net.settle()
    here.cluster.settle_ends(net.now)
    here.broker_net.settle()
    traffic = here.broker_net.broker.traffic
    assert traffic is not None
    for link in here.cluster.links.values():
        link.unsent.extend(traffic.take_all(link.host))
    here.connect()
    net.run(2.0)
    assert [number for number, _ in outcomes(cat)] == list(range(1, 20))
    assert outcomes(ann) == [(number, "receipt") for number in range(1, 20)]


def test_upgrade_of_both_hosts_at_once_is_not_noticed() -> None:
    """Neither answers the other while it is held."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    for name in "ab":
        host(net, name).hold()
    ann.message("bob", b"x", 1, receipt=True)
    for name in "ab":
        host(net, name).hand_over()
    for name in "ab":
        host(net, name).connect()
    net.run(2.0)
    assert outcomes(ann) == [(1, "receipt")]
    assert bob.payloads() == [b"x"]


def test_host_that_is_held_and_not_heard_again_is_lost() -> None:
    """As any silent host is."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    host(net, "b").hold()
    net.hosts["b"].is_frozen = True
    ann.message("bob", b"x", 1, receipt=True)
    net.run(8.0)
    assert outcomes(ann) == [(1, "offline")]
    assert bob.take() == []


def test_upgrade_to_a_broker_without_cluster_abandons_requests_to_other_hosts() -> None:
    """The sessions of other hosts are gone with the links."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    connect(net, "cat", "b")
    ann.request("bob", b"?", 1)
    bob.request("ann", b"?", 2)
    net.settle()
    ann.take()
    here = host(net, "a")
    here.hold()
    for number in range(3, 20):
        ann.message("cat", b"x" * 60, number)
    net.settle()
    here.broker_net.hand_over()
    here.broker_net.settle()
    assert outcomes(ann)[0] == (1, "abandoned")
    assert not ann.held


def test_upgrade_with_a_lost_host_goes_on_with_the_others() -> None:
    """Its link is down there and here; the end of another is finished first."""
    net = joined()
    net.start("c")
    net.run(1.0)
    ann, bob, cat = (connect(net, *each) for each in (("ann", "a"), ("bob", "b"), ("cat", "c")))
    net.hosts["c"].is_frozen = True
    net.run(8.0)
    here = host(net, "a")
    assert here.state_of("c") == "away"
    here.upgrade()
    assert here.state_of("c") == "away"
    ann.message("cat", b"x", 1, receipt=True)
    ann.message("bob", b"x", 2, receipt=True)
    net.run(1.0)
    assert outcomes(ann) == [(1, "offline"), (2, "receipt")]
    net.hosts["b"].is_frozen = True
    for number in range(3, 700):
        ann.message("bob", b"", number, receipt=True)
    net.settle()
    here.cluster.links["b"].lose("the test says so")
    assert here.cluster.has_work
    here.cluster.settle_ends(net.now)
    assert not here.cluster.has_work
    here.hold()
    here.hand_over()
    assert outcomes(ann) == [(number, "in_doubt") for number in range(3, 700)]
    assert cat.take() == []
    assert len(bob.take()) == 1


def test_upgrade_remembers_requests_that_were_revoked() -> None:
    """A late outcome of a revoked request is not passed on: it has one already."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    for number in (1, 2):
        ann.request("bob", b"?", number, extension={"ttl": 1.0})
    net.settle()
    bob.take()
    net.hosts["b"].is_frozen = True
    net.run(2.0)
    assert sorted(outcomes(ann)) == [(1, "expired"), (2, "expired")]
    here = host(net, "a")
    here.upgrade()
    assert len(here.broker_net.broker.traffic.sessions.hosts["b"].targets["bob"].revoked) == 2  # type: ignore[union-attr]
    entries = here.broker_net.broker.exchange.clients.values()
    here.hold()
    here.hand_over(*(each.config for each in entries if each.name != "bob"))
    here.connect()
    net.run(8.0)
    assert ann.take() == []


def test_upgrade_of_a_pool_host_denies_waiting_requests_of_a_removed_client() -> None:
    """They wait at the owner, behind those of its own clients."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    worker = connect(net, "pool", "b")
    bob.request("pool", b"?", 1)
    ann.request("pool", b"?", 2)
    ann.request("pool", b"?", 3, extension={"ttl": 60})
    net.settle()
    there = host(net, "b")
    entries = there.broker_net.broker.exchange.clients.values()
    there.hold()
    there.hand_over(*(each.config for each in entries if each.name != "ann"))
    there.connect()
    net.run(1.0)
    (request,) = worker.take()
    worker.reply(request.name, b"!", request.id)
    net.run(1.0)
    assert outcomes(bob) == [(1, "reply")]
    assert (2, "denied") in outcomes(ann)


def test_upgrade_of_a_host_whose_pool_is_removed_refuses_what_waited() -> None:
    """The requests of other hosts' clients are told."""
    net = joined()
    ann, bob = connect(net, "ann", "a"), connect(net, "bob", "b")
    connect(net, "pool", "b")
    bob.request("pool", b"?", 1)
    ann.request("pool", b"?", 2)
    net.settle()
    there = host(net, "b")
    entries = there.broker_net.broker.exchange.clients.values()
    there.hold()
    there.hand_over(*(each.config for each in entries if each.name != "pool"))
    there.connect()
    net.run(2.0)
    assert outcomes(ann) == [(2, "offline")]


def test_upgrade_while_a_reply_is_held_by_a_full_window() -> None:
    """The answerer is held by the session of the asking connection."""
    net = joined()
    ann, cat = connect(net, "ann", "a"), connect(net, "cat", "b")
    for number in range(1, 20):
        cat.request("ann", b"?", number)
    net.settle()
    here = host(net, "a")
    here.hold()
    for number in range(1, 20):
        ann.reply("cat", b"x" * 60, number)
    net.settle()
    assert ann.held
    here.hand_over()
    here.connect()
    net.run(2.0)
    assert [number for number, _ in outcomes(cat)] == list(range(1, 20))


def test_upgrade_with_facts_of_an_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions of a host need its link."""

    def renamed(*arguments: Any) -> dict[str, Any]:
        facts = capture(*arguments)
        facts["remotes"][0]["name"] = "c"
        return facts

    net = joined()
    host(net, "a").hold()
    monkeypatch.setattr(hand_over, "capture", renamed)
    with pytest.raises(BadSnapshot, match=r"contradict each other: KeyError\('c'\)"):
        host(net, "a").hand_over()


def test_blob_with_fewer_bytes_than_wanted_is_refused() -> None:
    """The snapshot of another version may be wrong."""
    with pytest.raises(ValueError, match="3 bytes are wanted where 2 are left"):
        Blob(b"ab").take(3)


class StoringHost(BrokerHost):
    """A host with a store; bob's mailbox lives at b, and eve's at a."""

    def _make_net(self, net: JoinedBrokers, name: str) -> MailboxNet:
        homes = {"bob": "b", "eve": "a"}
        boxes = [
            with_mailbox(box, subscribe=("t.*", f"{box}.*"), entry={"home": home}, messages=2)
            if home == name
            else client(box, home=home, home_subscribe=(Rule("t.*"), Rule(f"{box}.*")))
            for box, home in homes.items()
        ]
        return MailboxNet(client("ann"), *boxes)


def test_upgrade_keeps_the_outcomes_of_stored_events() -> None:
    """The answer of a mailbox's home comes to the new process, as does what failed before."""
    net = JoinedBrokers()
    net.make = StoringHost
    net.up("a", "b")
    ann = connect(net, "ann", "a")
    store = host(net, "b").broker_net
    assert isinstance(store, MailboxNet)
    for number in (1, 2):
        ann.publish("t.x", b"x", number, receipt=True)
    net.settle()
    assert outcomes(ann) == [(1, "receipt"), (2, "receipt")]
    store.is_prompt = False
    bob = store.connect("bob")
    bob.op("mailbox_purge", 9, name="bob", state="ready")
    store.answer()
    net.settle()
    ann.publish("t.x", b"x", 3, receipt=True)
    net.settle()
    assert ann.take() == []
    host(net, "a").upgrade()
    net.run(1.0)
    assert ann.take() == []
    assert ann.session.uncommitted == 1
    store.answer()
    net.run(1.0)
    assert outcomes(ann) == [(3, "full")]
    assert ann.session.uncommitted == 0


def test_upgrade_keeps_two_stored_events_with_one_id() -> None:
    """Each has its own outcome."""
    net = JoinedBrokers()
    net.make = StoringHost
    net.up("a", "b")
    ann = connect(net, "ann", "a")
    store = host(net, "b").broker_net
    assert isinstance(store, MailboxNet)
    store.is_prompt = False
    for _ in range(2):
        ann.publish("bob.x", b"x", 7, receipt=True)
    net.settle()
    host(net, "a").upgrade()
    net.run(1.0)
    assert ann.session.uncommitted == 2
    store.answer()
    net.run(1.0)
    assert outcomes(ann) == [(7, "receipt"), (7, "receipt")]


@pytest.mark.parametrize("kind", [Kind.EVENT, Kind.MESSAGE])
def test_home_that_loses_the_origin_while_it_stores_leaves_doubt(kind: Kind) -> None:
    """Its answer has no way back, and the origin has not lost it: it was upgraded."""
    net = JoinedBrokers()
    net.make = StoringHost
    net.up("a", "b")
    ann = connect(net, "ann", "a")
    store = host(net, "b").broker_net
    assert isinstance(store, MailboxNet)
    store.is_prompt = False
    if kind is Kind.EVENT:
        ann.publish("bob.x", b"x", 7, receipt=True)
    else:
        ann.message("bob", b"x", 7, receipt=True)
    net.settle()
    assert store.broker.mailboxes.boxes["bob"].uncommitted == 1
    net.drop = lambda origin, to, message: origin == "a"
    net.run(3.0, step=0.5)
    host(net, "a").upgrade()
    while host(net, "b").state_of("a") == "up":
        net.run(0.1)
    store.answer()
    net.drop = lambda origin, to, message: False
    net.run(10.0, step=0.5)
    assert outcomes(ann) == [(7, "in_doubt")]
    assert ann.session.uncommitted == 0


def test_upgrade_while_a_publisher_is_held_by_a_host_with_mailboxes() -> None:
    """It goes on in the new process."""
    net = JoinedBrokers()
    net.make = StoringHost
    net.up("a", "b")
    ann = connect(net, "ann", "a")
    here = host(net, "a")
    traffic = here.broker_net.broker.traffic
    assert traffic is not None
    traffic.sessions.hosts["b"].subscriber.outbox.limit = 100
    here.hold()
    for number in (1, 2):
        ann.publish("bob.x", b"x" * 70, number, receipt=True)
    net.settle()
    assert ann.held
    here.hand_over()
    here.connect()
    net.run(2.0)
    assert outcomes(ann) == [(1, "receipt"), (2, "receipt")]


def test_upgrade_without_the_recipient_that_held_a_sender_refuses_its_frames() -> None:
    """Nothing holds the sender any more."""
    net = joined()
    ann, cat = connect(net, "ann", "a"), connect(net, "cat", "b")
    here = host(net, "a")
    here.hold()
    for number in range(1, 20):
        ann.message("cat", b"x" * 60, number, receipt=True)
    net.settle()
    assert ann.held
    entries = here.broker_net.broker.exchange.clients.values()
    here.hand_over(*(each.config for each in entries if each.name != "cat"))
    here.connect()
    net.run(2.0)
    told = outcomes(ann)
    assert len(told) == 19
    assert {outcome for _, outcome in told} == {"receipt", "no_such_client"}
    assert len(cat.take()) == sum(outcome == "receipt" for _, outcome in told)
