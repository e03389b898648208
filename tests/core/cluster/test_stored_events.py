"""An event that mailboxes at other hosts store has one outcome, when all have answered."""

from __future__ import annotations

import json

import pytest
from support.fake_network import FakeNet, Peer, client, error_of
from support.joined_hosts import JoinedHosts
from support.mailbox_net import MailboxNet, with_mailbox

from brokerd.config.values import ClientConfig, Rule
from brokerd.core.mailboxes.journal import FailureKind
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import Envelope, ErrorCode, Flag, Kind, encode


def elsewhere(name: str, home: str, *patterns: str) -> ClientConfig:
    """Return a client whose mailbox stores events at another host."""
    return client(name, home=home, home_subscribe=tuple(map(Rule, patterns)), connections=3)


class World:
    """Three hosts: ann publishes at a; eve's mailbox is there, bob's at b, cat's at c."""

    def __init__(self, *, is_prompt: bool = True, **cat: object) -> None:
        self.here = MailboxNet(
            client("ann"),
            with_mailbox("eve", subscribe=("all.*",), entry={"home": "a"}),
            elsewhere("bob", "b", "t.*", "all.*"),
            elsewhere("cat", "c", "t.two", "all.*"),
        )
        self.b = MailboxNet(
            client("ann"),
            client("dan"),
            with_mailbox("bob", subscribe=("t.*", "all.*"), entry={"home": "b"}),
            is_prompt=is_prompt,
        )
        self.c = MailboxNet(
            client("ann"),
            with_mailbox("cat", subscribe=("t.two", "all.*"), entry={"home": "c"}, **cat),
            is_prompt=is_prompt,
        )
        self.hosts = JoinedHosts(names="abc", a=self.here, b=self.b, c=self.c)
        self.hosts.settle()
        self.ann = self.here.connect("ann")

    def publish(self, topic: str, number: int, *, receipt: bool = True, **more: object) -> None:
        """Publish an event, and let everything arrive."""
        self.ann.publish(topic, b"event", number, receipt=receipt, **more)  # type: ignore[arg-type]
        self.hosts.settle()

    def store(self, net: MailboxNet) -> None:
        """Make the store of a host confirm its waiting messages."""
        net.is_prompt = True
        net.settle()
        self.hosts.settle()


def outcomes(peer: Peer) -> list[tuple[int, str, list[str]]]:
    """Return id, code or ``receipt``, and mailboxes of each outcome that has arrived."""
    return [
        (each.id, "receipt", [])
        if each.kind is Kind.RECEIPT
        else (each.id, error_of(each), json.loads(each.payload).get("names", []))
        for each in peer.take()
    ]


def messages(net: FakeNet, name: str) -> int:
    """Return the number of messages in a mailbox."""
    mailbox = net.broker.exchange.clients[name].mailbox
    assert mailbox is not None
    return mailbox.messages


def test_event_receipt_waits_for_the_mailboxes_of_all_hosts() -> None:
    """One store after the other answers; the RECEIPT comes with the last answer."""
    world = World(is_prompt=False)
    world.publish("all.x", 1)
    assert messages(world.here, "eve") == 1
    assert world.ann.take() == []
    assert world.ann.session.uncommitted == 1
    world.store(world.b)
    assert world.ann.take() == []
    world.store(world.c)
    assert outcomes(world.ann) == [(1, "receipt", [])]
    assert world.ann.session.uncommitted == 0
    assert (messages(world.b, "bob"), messages(world.c, "cat")) == (1, 1)


def test_event_for_one_home_does_not_concern_the_others() -> None:
    """An event that no mailbox stores has its RECEIPT at once."""
    world = World(is_prompt=False)
    world.publish("t.one", 1)
    world.publish("other", 2)
    assert outcomes(world.ann) == [(2, "receipt", [])]
    world.store(world.b)
    assert outcomes(world.ann) == [(1, "receipt", [])]


def test_event_for_full_mailboxes_elsewhere_names_them() -> None:
    """It is stored in the others; a resend with the same key fills the gap only."""
    world = World(messages=1)
    world.publish("t.two", 1)
    world.publish("all.x", 2, extension={"key": "k"})
    assert outcomes(world.ann) == [(1, "receipt", []), (2, "full", ["cat"])]
    assert (messages(world.here, "eve"), messages(world.b, "bob")) == (1, 2)
    cat = world.c.connect("cat")
    cat.op("mailbox_purge", 9, name="cat", state="ready")
    world.hosts.settle()
    world.publish("all.x", 3, extension={"key": "k"})
    assert outcomes(world.ann) == [(3, "receipt", [])]
    assert (messages(world.here, "eve"), messages(world.b, "bob")) == (1, 2)
    assert messages(world.c, "cat") == 1


def test_event_without_receipt_has_only_its_failure_reported() -> None:
    """There is one ERROR for all hosts."""
    world = World(messages=1)
    world.publish("t.two", 0, receipt=False)
    world.publish("t.two", 0, receipt=False)
    assert outcomes(world.ann) == [(0, "full", ["cat"])]


def test_event_while_a_home_is_away_is_offline_and_stored_in_the_others() -> None:
    """That is definite; the mailboxes without it are named."""
    world = World()
    world.hosts["a"].lose("c")
    world.publish("all.x", 1)
    assert outcomes(world.ann) == [(1, "offline", ["cat"])]
    assert messages(world.b, "bob") == 1
    world.hosts["a"].lose("b")
    world.publish("t.two", 2)
    assert outcomes(world.ann) == [(2, "offline", ["bob", "cat"])]
    assert world.ann.session.uncommitted == 0


def test_event_while_nats_is_away_is_offline() -> None:
    """Also one that waits for the link."""
    world = World()
    world.ann.publish("t.one", b"", 1, receipt=True)
    traffic = world.hosts["a"].traffic
    traffic.suspend("NATS is away")
    world.here.settle()
    world.publish("t.one", 2)
    assert outcomes(world.ann) == [(1, "offline", ["bob"]), (2, "offline", ["bob"])]
    traffic.resume()
    world.publish("t.one", 3)
    assert outcomes(world.ann) == [(3, "receipt", [])]


def test_event_whose_home_is_lost_before_it_answers_is_in_doubt() -> None:
    """Doubt outweighs what the other hosts have answered."""
    world = World(is_prompt=False)
    world.publish("t.two", 1)
    world.hosts["a"].lose("b")
    assert world.ann.take() == []
    world.store(world.c)
    assert outcomes(world.ann) == [(1, "in_doubt", [])]


def test_event_that_a_home_refuses_has_that_outcome() -> None:
    """The owner decides: here its mailbox takes no such message."""
    world = World(max_message=3)
    world.publish("t.two", 1)
    assert outcomes(world.ann) == [(1, "too_large", ["cat"])]
    assert messages(world.b, "bob") == 1


def test_event_that_the_own_store_refuses_is_stored_elsewhere() -> None:
    """All answers are one outcome."""
    world = World()
    world.here.broker.mailboxes.fail("disk error")
    world.publish("all.x", 1)
    assert outcomes(world.ann) == [(1, "store_failed", ["eve"])]
    assert (messages(world.b, "bob"), messages(world.c, "cat")) == (1, 1)


def test_event_too_large_for_the_link_is_refused_before_it_leaves() -> None:
    """The others have it."""
    world = World()
    world.hosts["a"].traffic.resume()
    world.hosts["a"].traffic._sessions.largest_frame = 20
    world.publish("all.x", 1)
    assert outcomes(world.ann) == [(1, "too_large", ["bob", "cat"])]
    assert messages(world.here, "eve") == 1


def test_event_of_a_busy_link_waits_and_is_full_in_the_end() -> None:
    """The window is full: the publisher is held as for a full queue."""
    world = World()
    world.hosts["a"].window = 0
    remote = world.hosts["a"].traffic._sessions.hosts["b"].subscriber
    remote.outbox.limit = 100
    world.ann.publish("t.one", b"x" * 60, 1, receipt=True)
    world.ann.publish("t.one", b"x" * 60, 2, receipt=True)
    world.hosts.settle()
    assert world.ann.session.held_by is remote
    world.here.advance(60.0)
    world.hosts.settle()
    assert outcomes(world.ann) == [(2, "full", ["bob"])]
    world.hosts["a"].window = 1 << 20
    world.hosts["a"].touched["b"] = None
    world.hosts.settle()
    assert outcomes(world.ann) == [(1, "receipt", [])]
    assert messages(world.b, "bob") == 1


def test_event_has_the_same_id_as_a_message_and_both_have_their_outcome() -> None:
    """Answers to events are told from answers to messages."""
    world = World(is_prompt=False)
    world.publish("t.one", 5)
    world.ann.message("ann", b"x", 5, receipt=True)
    world.ann.take()
    world.ann.message("bob", b"x", 5, receipt=True)
    world.hosts.settle()
    assert world.ann.take() == []
    world.store(world.b)
    assert outcomes(world.ann) == [(5, "receipt", []), (5, "receipt", [])]


def test_client_with_a_stored_copy_elsewhere_gets_no_live_one() -> None:
    """Neither from its own host nor from the publisher's."""
    world = World()
    for net in (world.here, world.c):
        net.broker.reconfigure(
            {
                **{name: each.config for name, each in net.broker.exchange.clients.items()},
                "bob": elsewhere("bob", "b", "t.*", "all.*"),
            },
            net.broker.status.limits,
            0.0,
        )
    bobs = [net.connect("bob") for net in (world.here, world.c)]
    for bob in bobs:
        bob.ask("subscribe", topic="t.one")
        bob.take()
    world.hosts.settle()
    world.publish("t.one", 1)
    assert outcomes(world.ann) == [(1, "receipt", [])]
    assert [bob.take() for bob in bobs] == [[], []]


def test_patterns_of_mailboxes_elsewhere_change_with_the_configuration() -> None:
    """Events that are not stored any more wait for no host."""
    world = World(is_prompt=False)
    clients = {name: each.config for name, each in world.here.broker.exchange.clients.items()}
    limits = world.here.broker.status.limits
    world.here.broker.reconfigure({**clients, "bob": client("bob", home="b")}, limits, 0.0)
    world.publish("t.one", 1)
    assert outcomes(world.ann) == [(1, "receipt", [])]
    del clients["bob"], clients["cat"]
    world.here.broker.reconfigure(clients, limits, 0.0)
    world.publish("all.x", 2)
    assert outcomes(world.ann) == [(2, "receipt", [])]


def test_refusal_of_an_event_by_another_configuration_is_counted() -> None:
    """The home stores what this host does not know: the RECEIPT does not wait for it."""
    world = World(messages=0)
    world.hosts["a"].traffic.interests_changed("c", list(world.hosts["c"].traffic.own_interests()))
    clients = {name: each.config for name, each in world.here.broker.exchange.clients.items()}
    limits = world.here.broker.status.limits
    world.here.broker.reconfigure({**clients, "cat": client("cat", home="c")}, limits, 0.0)
    world.publish("t.two", 1)
    assert outcomes(world.ann) == [(1, "receipt", [])]
    assert world.here.broker.reports.unheard == {"full": 1}


@pytest.mark.parametrize("is_known", [False, True])
def test_publisher_that_leaves_is_forgotten_with_the_answer(is_known: bool) -> None:
    """Its event is stored all the same. is_known: whether the home has heard of it."""
    world = World(is_prompt=False)
    world.publish("t.one", 1)
    world.ann.leave()
    if is_known:
        world.hosts.settle()
    world.store(world.b)
    assert messages(world.b, "bob") == 1
    assert not world.hosts["a"].traffic.stored_events._expected
    assert not world.hosts["b"].traffic.sessions.hosts["a"].senders


def test_event_of_a_client_that_its_home_does_not_know_is_denied() -> None:
    """The other host's answer says so."""
    world = World()
    world.b.broker.reconfigure(
        {"bob": world.b.broker.exchange.clients["bob"].config}, world.b.broker.status.limits, 0.0
    )
    world.publish("t.one", 1)
    assert outcomes(world.ann) == [(1, "denied", ["bob"])]


def test_event_that_waits_at_a_home_that_loses_the_origin_is_refused_for_its_inquiry() -> None:
    """The owner keeps a definite answer."""
    world = World(messages=1)
    config = world.c.broker.exchange.clients["cat"].config
    assert config.mailbox is not None
    world.publish("t.two", 1)
    world.ann.take()
    world.c.broker.mailboxes.pause()
    world.publish("t.two", 2)
    world.publish("t.two", 3, receipt=False)
    traffic = world.hosts["c"].traffic
    traffic.host_down("a", "silent", 0.0)
    runs = list(traffic.take_outcomes("a"))
    world.hosts["a"].traffic.conclude("c", runs, 0.0)
    world.hosts["a"].net.settle()
    assert outcomes(world.ann) == [(2, "offline", ["cat"]), (3, "offline", ["cat"])]


def test_failed_event_without_a_record_is_ignored() -> None:
    """An unexpected answer is ignored, too."""
    world = World()
    events = world.hosts["a"].traffic.stored_events
    events.fail("b", "ann/x", 7, ErrorCode.IN_DOUBT, "lost")
    assert not events.answer("b", "ann/x", 7, None)


def test_event_for_a_group_and_a_mailbox_of_one_host_is_one_copy() -> None:
    """It is stored, and one member of the group there gets it."""
    world = World()
    dan = world.b.connect("dan")
    dan.ask("subscribe", topic="t.*", group="g")
    world.hosts.settle()
    world.publish("t.one", 1)
    assert outcomes(world.ann) == [(1, "receipt", [])]
    assert messages(world.b, "bob") == 1
    assert dan.payloads() == [b"event"]


def test_event_whose_home_is_lost_during_its_fan_out_is_offline() -> None:
    """The publisher's turn ended before the copy for the host was made."""
    world = World()
    broker = world.here.broker
    listeners = [world.here.connect("eve")]
    listeners[0].ask("subscribe", topic="t.*")
    world.hosts.settle()
    source = world.ann.session
    event = Envelope(Kind.EVENT, 1, "", b"x", topic="t.one", flags=Flag.RECEIPT)
    real = broker.events.go_on_publishing
    broker.events.go_on_publishing = lambda *_: RoutingResult.YIELD  # type: ignore[method-assign]
    broker.handle(source, memoryview(encode(event)), world.here.now)
    broker.events.go_on_publishing = real  # type: ignore[method-assign]
    world.hosts["a"].lose("b")
    broker.handle(source, memoryview(encode(event)), world.here.now)
    world.here.settle()
    assert outcomes(world.ann) == [(1, "offline", ["bob"])]


def test_event_whose_store_fails_is_in_doubt_and_the_next_ones_are_refused() -> None:
    """The batch that was being written, and what waited behind it."""
    world = World()
    world.here.is_prompt = False
    world.here.store.failure = FailureKind.IO
    for number in (1, 2, 3):
        world.publish("all.x", number)
    world.here.is_prompt = True
    world.here.settle()
    world.hosts.settle()
    told = outcomes(world.ann)
    assert sorted(number for number, _, _ in told) == [1, 2, 3]
    assert {code for _, code, _ in told} == {"in_doubt", "store_failed"}
