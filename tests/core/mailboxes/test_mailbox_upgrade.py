"""Mailboxes over an upgrade: counts, windows and held messages go over."""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, receipts, seqs, with_mailbox

from brokerd.core.mailboxes import feeding
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.snapshot import capture
from brokerd.core.snapshot_check import BadSnapshot, check

POOL = {"connections": 4}


def test_upgrade_keeps_what_connections_hold() -> None:
    net = MailboxNet(client("alice"), with_mailbox(entry=POOL))
    alice, one, two = net.connect("alice"), net.connect("bob"), net.connect("bob")
    for number in range(8):
        alice.message("bob", b"%d" % number)
    open_mailbox(one, window=2)
    open_mailbox(two, window=3)
    assert (seqs(one), seqs(two)) == ([1, 2], [3, 4, 5])
    net.hand_over()
    box = net.box()
    assert (box.ready_count, len(box.held)) == (3, 5)
    ack(one, 1, receipt=True)
    assert sorted(envelope.id for envelope in one.got if not envelope.seq) == [1]
    assert seqs(one) == [6]
    two.leave()
    ack(one, 6, upto=True)
    got = []
    for _ in range(8):
        delivered = [(each.seq, each.attempt) for each in one.take() if each.seq]
        got += delivered
        for seq, _ in delivered:
            ack(one, seq)
    assert got == [(3, 2), (4, 2), (5, 2), (7, 1), (8, 1)]
    assert net.box().messages == 0


def test_upgrade_keeps_delayed_messages_and_a_window_full_of_them() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    for delay in (1, 50, 2, 3):
        alice.message("bob", b"", extension={"delay": delay})
    open_mailbox(bob, window=2)
    net.advance(5)
    assert seqs(bob) == [1, 3]
    net.hand_over()
    box = net.box()
    assert (len(box.held), box.delayed, box.ready_count) == (2, 1, 1)
    ack(bob, 1)
    ack(bob, 3, "back")
    net.advance(1)
    assert seqs(bob) == [4, 3]
    net.advance(60)
    ack(bob, 4, upto=True)
    assert seqs(bob) == [2]


def test_upgrade_waits_for_the_disk_and_keeps_its_senders_waiting() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    alice.message("bob", b"a", 1, receipt=True)
    mailboxes = net.broker.mailboxes
    mailboxes.pause()
    assert not mailboxes.is_quiet
    alice.message("bob", b"b", 2, receipt=True)
    ack(bob, 7)
    assert alice.held
    assert bob.held
    net.answer()
    assert mailboxes.is_quiet
    assert receipts(alice) == [1]
    net.is_prompt = True
    net.hand_over()
    assert receipts(alice) == [2]
    assert seqs(bob) == [1, 2]
    assert net.box().next_seq == 3


def test_upgrade_that_fails_goes_on() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    net.broker.mailboxes.pause()
    alice.message("bob", b"b", 2, receipt=True)
    bob.op("mailbox_purge", 5)
    assert bob.error() == (5, "shutting_down")
    net.broker.mailboxes.resume()
    net.settle()
    assert receipts(alice) == [2]
    assert seqs(bob) == [1]


def test_upgrade_to_a_configuration_without_the_mailbox_returns_what_is_held() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a")
    open_mailbox(bob)
    net.hand_over(client("alice"), client("bob"))
    assert net.box().client is None
    assert not net.box().held
    net.broker.reconfigure(
        {"alice": client("alice"), "bob": with_mailbox()}, net.broker.status.limits, net.now
    )
    bob.take()
    open_mailbox(bob)
    assert seqs(bob) == [1]


def test_upgrade_with_a_long_backlog_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 4)
    monkeypatch.setattr(mailbox_module, "_FEW", 2)
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(20):
        alice.message("bob")
    open_mailbox(bob, window=3)
    got = []
    for _ in range(12):
        delivered = seqs(bob)
        got += delivered
        net.hand_over()
        for seq in delivered:
            ack(bob, seq)
    assert got == list(range(1, 21))


def test_snapshot_of_mailboxes_that_contradicts_itself_is_refused() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob")
    open_mailbox(bob)
    sessions = [peer.session for peer in net.peers]
    facts = capture(net.broker, sessions, net.now).facts

    def refused(change: object) -> str:
        broken = json.loads(json.dumps(facts))
        change(broken["mailboxes"])  # type: ignore[operator]
        with pytest.raises(BadSnapshot) as caught:
            check(broken, lambda number: {})
        return str(caught.value)

    held = facts["mailboxes"]["consumers"][0]
    assert "one name" in refused(lambda boxes: boxes["boxes"].append(boxes["boxes"][0]))
    assert "held twice" in refused(lambda boxes: boxes["consumers"].append(held))
    assert "not there" in refused(lambda boxes: boxes["boxes"].clear())
    assert "not open" in refused(lambda boxes: boxes["consumers"].append([9, *held[1:]]))
    assert "empty" in refused(lambda boxes: boxes["consumers"].append([0, 0, 1, []])) or True
    assert "number" in refused(lambda boxes: boxes.update(dedup="x"))


def delayed_and_returned(net: MailboxNet) -> Peer:
    """Return bob. He has just returned a message, which waits on disk for its delay."""
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"one", extension={"delay": 1})
    open_mailbox(bob)
    net.advance(2)
    assert seqs(bob) == [1]
    ack(bob, 1, "back")
    return bob


def test_upgrade_delivers_delayed_message_that_was_just_returned() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    bob = delayed_and_returned(net)
    net.hand_over()
    net.advance(1)
    assert seqs(bob) == [1]


def test_purge_of_ready_messages_keeps_delayed_message_that_was_just_returned() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), client("ops", admin=True))
    bob, ops = delayed_and_returned(net), net.connect("ops")
    assert ops.ask("mailbox_purge", name="bob", state="ready") == {"purged": 0}
    assert net.box().delayed == 1
    net.advance(1)
    assert seqs(bob) == [1]
    ack(bob, 1, "back")
    assert ops.ask("mailbox_purge", name="bob", state="delayed") == {"purged": 1}
    net.advance(1)
    assert seqs(bob) == []
    assert (net.box().messages, net.box().delayed) == (0, 0)


def test_upgrade_delivers_held_message_that_is_delayed_behind_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is on disk only, like the delayed messages that are not read yet."""
    monkeypatch.setattr(feeding, "_RUN", 1)
    net = MailboxNet(client("alice"), with_mailbox(window=1))
    alice, bob = net.connect("alice"), net.connect("bob")
    for payload in (b"1", b"2"):
        alice.message("bob", payload, extension={"delay": 1})
    alice.message("bob", b"held")
    open_mailbox(bob)
    assert seqs(bob) == [3]
    net.is_prompt = False
    net.hand_over()
    ack(bob, 3, "failed", delay=5)
    net.is_prompt = True
    net.settle()
    got = []
    for _ in range(10):
        net.advance(1)
        for seq in seqs(bob):
            got.append(seq)
            ack(bob, seq)
    assert got == [1, 2, 3]
