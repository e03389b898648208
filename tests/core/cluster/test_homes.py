"""A mailbox lives at its home; the other hosts pass its messages on to there."""

from __future__ import annotations

import json

from support.fake_network import FakeNet, Peer, client, error_of
from support.joined_hosts import JoinedHosts
from support.mailbox_net import MailboxNet, with_mailbox

from brokerd_client.wire.envelope import Kind


def joined(*, is_prompt: bool = True, **box: object) -> tuple[JoinedHosts, MailboxNet, Peer]:
    """Return two hosts, the net of the second, which is bob's home, and ann at the first."""
    here = FakeNet(client("ann"), client("bob", home="b"))
    home = MailboxNet(
        client("ann"), with_mailbox("bob", entry={"home": "b"}, **box), is_prompt=is_prompt
    )
    hosts = JoinedHosts(a=here, b=home)
    ann = here.connect("ann")
    hosts.settle()
    return hosts, home, ann


def stored(home: MailboxNet) -> int:
    """Return the number of messages in bob's mailbox."""
    mailbox = home.broker.exchange.clients["bob"].mailbox
    assert mailbox is not None
    return mailbox.messages


def outcomes(peer: Peer) -> list[tuple[int, str]]:
    """Return the id of each outcome that has arrived, with its code or ``receipt``."""
    return [
        (each.id, "receipt" if each.kind is Kind.RECEIPT else error_of(each))
        for each in peer.take()
    ]


def test_message_for_home_is_stored_there_though_its_client_is_offline() -> None:
    """The RECEIPT comes after the commit; so does the answer to the batch."""
    hosts, home, ann = joined(is_prompt=False)
    for number in (1, 2):
        ann.message("bob", b"x", number, receipt=True)
    hosts.settle()
    assert ann.take() == []
    assert hosts["a"].unanswered["b"]
    home.is_prompt = True
    home.settle()
    hosts.settle()
    assert outcomes(ann) == [(1, "receipt"), (2, "receipt")]
    assert not hosts["a"].unanswered["b"]
    ann.message("bob", b"x", 3, receipt=True)
    ann.message("bob", b"x", 4, extension={"key": "k", "delay": 5})
    hosts.settle()
    assert outcomes(ann) == [(3, "receipt")]
    assert stored(home) == 4


def test_message_for_client_connected_here_goes_to_its_home_all_the_same() -> None:
    """A live request goes to the connection."""
    hosts, home, ann = joined()
    bob = hosts["a"].net.connect("bob")
    hosts.settle()
    for number in (1, 2, 3):
        ann.request("bob", b"live", number)
        ann.message("bob", b"stored", 10 + number)
        hosts.settle()
    assert bob.payloads() == [b"live"] * 3
    assert stored(home) == 3


def test_message_for_home_that_is_away_is_offline_and_names_it() -> None:
    """The refusal is definite: nothing is kept here."""
    hosts, home, ann = joined()
    ann.message("bob", b"x", 5)
    ann.message("bob", b"x", 6)
    hosts.settle()
    traffic = hosts["a"].traffic
    traffic.suspend("NATS is away")
    ann.message("bob", b"x", 7)
    traffic.resume()
    ann.message("bob", b"x", 8)
    hosts.settle()
    hosts["a"].lose("b")
    ann.message("bob", b"x", 9)
    refusals = ann.take()
    assert [(each.id, error_of(each)) for each in refusals] == [(7, "offline"), (9, "offline")]
    for each in refusals:
        assert "host b" in json.loads(each.payload)["message"]
    assert stored(home) == 3


def test_operation_on_mailbox_elsewhere_names_its_host() -> None:
    """That host is to be asked: only it keeps the mailbox."""
    here = FakeNet(client("ops", admin=True), client("bob", home="b"))
    ops = here.connect("ops")
    for name, reason in (("bob", "is at host b: ask there"), ("ops", "ops has no mailbox")):
        ops.op("mailbox_show", 5, name=name)
        (refusal,) = ops.take()
        assert error_of(refusal) == "unsupported"
        assert reason in json.loads(refusal.payload)["message"]


def test_event_is_stored_at_the_home_of_a_mailbox_that_subscribes() -> None:
    """Its patterns are announced as the subscriptions of clients are."""
    hosts, home, ann = joined(subscribe=("t.*",))
    hosts["a"].traffic.interests_changed("b", list(hosts["b"].traffic.own_interests()))
    ann.publish("t.x", b"event")
    ann.publish("u.x", b"event")
    hosts.settle()
    assert stored(home) == 1
    configs = {"ann": client("ann"), "bob": with_mailbox("bob", entry={"home": "b"})}
    home.broker.reconfigure(configs, home.broker.status.limits, 0.0)
    hosts.settle()
    ann.publish("t.x", b"event")
    hosts.settle()
    assert stored(home) == 1
