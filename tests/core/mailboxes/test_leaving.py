"""Connections that end while they hold very many messages: these return in turns."""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, seqs, with_mailbox

from brokerd.core.mailboxes import acknowledging

COUNT = 10


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> MailboxNet:
    """A network whose broker returns two messages in each turn."""
    monkeypatch.setattr(acknowledging.Acknowledging.return_some, "__defaults__", (2,))
    return MailboxNet(
        client("alice"),
        client("ops", admin=True),
        with_mailbox(entry={"connections": 3}, ack_timeout=5, window=COUNT),
    )


def holder(net: MailboxNet) -> Peer:
    """Return a member of bob's that holds ten messages; two more are ready."""
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(COUNT + 2):
        alice.message("bob", b"%d" % number, number)
    open_mailbox(bob)
    assert seqs(bob) == list(range(1, COUNT + 1))
    return bob


def without_turns(net: MailboxNet, peer: Peer) -> None:
    """End a connection; what it held, but the first two, has not returned yet."""
    net.broker.mailboxes.close(peer.session)
    assert len(net.box().held) == COUNT - 2


def test_leaving_connection_returns_all_messages_in_their_order(net: MailboxNet) -> None:
    """A later message is not delivered before those that are about to return."""
    bob, second = holder(net), net.connect("bob")
    without_turns(net, bob)
    net.broker.mailboxes.open(second.session, 3, 1 << 20)
    net.broker.mailboxes.feeding.feed(100)
    assert list(net.box().consumers[second.session].held) == [1, 2]
    for _ in range(COUNT):
        net.settle()
    assert seqs(second) == [1, 2, 3]
    ack(second, 3, upto=True)
    assert seqs(second) == [4, 5, 6]
    assert net.box().stop == float("inf")


def test_leaving_connection_counts_attempts_of_all_messages(net: MailboxNet) -> None:
    bob = holder(net)
    bob.leave()
    for _ in range(COUNT):
        net.settle()
    assert not net.box().held
    assert {row.attempts for row in net.store.disk["bob"].rows.values()} == {0, 1}
    second = net.connect("bob")
    open_mailbox(second, window=1)
    got = []
    for _ in range(COUNT + 2):
        (delivery,) = second.take()
        got.append((delivery.seq, delivery.attempt))
        ack(second, delivery.seq)
    assert got == [(seq, 2) for seq in range(1, COUNT + 1)] + [(11, 1), (12, 1)]


def test_leaving_connection_can_be_looked_at_and_its_messages_dropped(net: MailboxNet) -> None:
    bob, ops = holder(net), net.connect("ops")
    without_turns(net, bob)
    box = net.box()
    assert box.oldest() is not None
    assert box.next_timeout(net.now) is None
    dropped: list[dict[str, object]] = []
    net.broker.mailboxes.inspection.drop(box, 7, dropped.append)
    for _ in range(COUNT):
        net.settle()
    assert dropped == [{"dropped": 1}]
    ops.op("mailbox_show", 5, name="bob", state="held")
    assert json.loads(ops.got[-1].payload) == {"messages": []}
    assert box.messages == COUNT + 1


def test_leaving_connection_has_returned_all_at_an_upgrade(net: MailboxNet) -> None:
    bob = holder(net)
    without_turns(net, bob)
    assert not net.broker.mailboxes.is_quiet
    net.hand_over()
    assert net.box().ready_count == COUNT + 2
    second = net.connect("bob")
    open_mailbox(second, window=1)
    assert seqs(second) == [1]


def test_consumer_without_collected_acks_stays_alone(net: MailboxNet) -> None:
    """Only an acknowledgement ends the time in which a message is delivered by itself."""
    holder(net)
    (consumer,) = net.box().consumers.values()
    consumer.alone = True
    assert consumer.take_acknowledged() == ([], [], 0)
    assert consumer.alone
