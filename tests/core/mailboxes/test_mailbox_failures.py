"""Failures of the store, damaged messages, and what happens at the same time."""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, receipts, seqs, with_mailbox
from support.memory_store import MemoryStore

from brokerd.config.values import WhenFull
from brokerd.core.mailboxes import commits
from brokerd.core.mailboxes import feeding as feeding_module
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.clock import Clock
from brokerd.core.mailboxes.journal import Buried, FailureKind
from brokerd_client.wire.envelope import Kind

POOL = {"connections": 4}


def pool_with(count: int, **box: object) -> tuple[MailboxNet, Peer, Peer]:
    """Return a network with messages in a pool's mailbox, and two members."""
    net = MailboxNet(client("alice"), with_mailbox(entry=POOL, **box))
    alice = net.connect("alice")
    for number in range(1, count + 1):
        alice.message("bob", b"%d" % number, number)
    return net, net.connect("bob"), net.connect("bob")


def codes(peer: Peer) -> list[str]:
    return [json.loads(each.payload)["code"] for each in peer.take() if each.kind is Kind.ERROR]


def damage(store: MemoryStore, seq: int) -> None:
    """Damage a message on disk: it is read back as a dead letter without a frame."""
    rows = store.disk["bob"].rows
    rows[seq] = rows[seq]._replace(frame=b"", reason="damaged")


def test_failed_store_keeps_what_ends_meanwhile_for_the_next_start() -> None:
    net, one, two = pool_with(4)
    open_mailbox(one, window=2)
    open_mailbox(two, window=2)
    assert (seqs(one), seqs(two)) == ([1, 2], [3, 4])
    net.store.failure = FailureKind.IO
    net.peers[0].message("bob", b"x")
    one.leave()
    two.ask("close_mailbox")
    net = MailboxNet(client("alice"), with_mailbox(entry=POOL), store=net.store.crashed())
    one = net.connect("bob")
    open_mailbox(one)
    assert seqs(one) == [1, 2, 3, 4]


def test_failed_store_refuses_what_was_not_given_to_it() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a")
    net.answer()
    open_mailbox(bob)
    assert seqs(bob) == [1]
    net.store.failure = FailureKind.IO
    alice.message("bob", b"b", 2)
    mailboxes = net.broker.mailboxes
    # These lie in the open batch when the answer comes.
    net._settling = True
    alice.message("bob", b"c", 3)
    ack(bob, 1, receipt=True)
    net._settling = False
    net.store.step()
    net.settle()
    assert codes(alice) == ["in_doubt", "store_failed"]
    assert codes(bob) == ["store_failed"]
    assert mailboxes.commits.failure
    assert len(mailboxes.commits) == 0


def test_ack_in_a_batch_with_an_io_error_is_not_stored() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a")
    open_mailbox(bob)
    assert seqs(bob) == [1]
    net.store.failure = FailureKind.IO
    ack(bob, 1, receipt=True)
    assert codes(bob) == ["store_failed"]


def test_store_that_ended_is_a_failure_and_releases_waiting_senders() -> None:
    net = MailboxNet(client("alice"), with_mailbox(messages=1, when_full=WhenFull.WAIT))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a")
    open_mailbox(bob)
    alice.message("bob", b"b", 2)
    assert alice.held
    net.broker.mailboxes.fail("the store process ended")
    net.settle()
    assert alice.error() == (2, "store_failed")
    net.broker.mailboxes.commits.confirm(bob.session, 9)
    net.settle()
    bob.take()
    bob.leave()
    assert not net.broker.mailboxes.is_quiet or net.box().messages == 1


def test_full_disk_refuses_a_keyed_event_in_doubt_of_nothing() -> None:
    net = MailboxNet(client("alice"), with_mailbox(subscribe=[">"]))
    alice = net.connect("alice")
    net.store.failure = FailureKind.FULL
    alice.publish("a", b"x", 1, receipt=True, extension={"key": "k"})
    (refusal,) = alice.take()
    assert json.loads(refusal.payload)["names"] == ["bob"]
    net.store.failure = None
    alice.publish("a", b"x", 2, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [2]


def test_damaged_messages_become_dead_letters_and_others_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net, one, _ = pool_with(6)
    alice = net.peers[0]
    for _ in range(4):
        alice.message("bob", b"", extension={"delay": 5})
    damage(net.store, 5)
    damage(net.store, 9)
    open_mailbox(one, window=100)
    assert seqs(one) == [1, 2, 3, 4, 6]
    net.advance(6)
    assert sorted(seqs(one)) == [7, 8, 10]
    assert net.box().dead == 2


def test_damaged_row_of_the_database_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts are right although the read did not return all messages of the row."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    monkeypatch.setattr(feeding_module, "_RUN", 1)
    net, one, _ = pool_with(7)
    alice = net.peers[0]
    for _ in range(5):
        alice.message("bob", b"", extension={"delay": 5})
    for seq in (2, 3, 4, 6, 10, 11):
        damage(net.store, seq)
    net.is_prompt = False
    open_mailbox(one, window=2)
    assert seqs(one) == [1, 2]
    net.store.step(1)
    assert net.box().counts() == {"ready": 2, "held": 2, "delayed": 3, "dead": 5}
    dead = [row for row in net.store.disk["bob"].rows.values() if row.state == "dead"]
    # Message 2 is in memory, and delivered all the same.
    assert net.box().dead_size == sum(row.stored.size for row in dead if row.seq != 2)


def test_damaged_message_that_was_acknowledged_is_no_dead_letter() -> None:
    """The store had not removed it yet when it found it damaged."""
    net, one, _ = pool_with(1)
    open_mailbox(one)
    net.is_prompt = False
    ack(one, 1)
    net.broker.mailboxes.buried(Buried("bob", ((1, None, 10),)))
    assert net.box().counts() == {"ready": 0, "held": 0, "delayed": 0, "dead": 0}


def test_damaged_delayed_messages_do_not_hide_those_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    monkeypatch.setattr(feeding_module, "_RUN", 2)
    net, one, _ = pool_with(0)
    for _ in range(6):
        net.peers[0].message("bob", b"", extension={"delay": 5})
    damage(net.store, 3)
    damage(net.store, 4)
    open_mailbox(one, window=100)
    net.advance(6)
    assert sorted(seqs(one)) == [1, 2, 5, 6]
    assert net.box().counts() == {"ready": 0, "held": 4, "delayed": 0, "dead": 2}


def test_messages_that_vanished_from_the_disk_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net, one, _ = pool_with(5)
    for _ in range(4):
        net.peers[0].message("bob", b"", extension={"delay": 5})
    rows = net.store.disk["bob"].rows
    for seq in (3, 4, 5, 8, 9):
        del rows[seq]
    open_mailbox(one, window=100)
    assert seqs(one) == [1, 2]
    net.advance(6)
    assert seqs(one) == [6, 7]
    assert (net.box().unloaded, net.box().unloaded_delayed) == (0, 0)


def test_purge_during_a_read_ignores_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net, one, _ = pool_with(5)
    net.is_prompt = False
    open_mailbox(one, window=100)
    assert seqs(one) == [1, 2]
    assert net.box().reading
    one.op("mailbox_purge", 5)
    net.answer()
    assert [each.id for each in one.take() if each.kind is Kind.REPLY] == [5]
    net.is_prompt = True
    net.settle()
    assert net.box().messages == 2


def test_suspect_waits_for_room_in_the_outbox_of_an_idle_member() -> None:
    net, one, two = pool_with(0)
    alice = net.peers[0]
    alice.message("bob", b"x" * 100)
    open_mailbox(one)
    assert seqs(one) == [1]
    ack(one, 1, "failed")
    assert seqs(one) == [1]
    one.leave()
    two.block()
    two.op("open_mailbox", 5)
    assert not two.take()
    net.advance(2)
    two.read()
    assert seqs(two) == [1]


def test_reservation_ends_when_another_member_takes_the_suspect() -> None:
    net, one, two = pool_with(2)
    open_mailbox(one, window=2)
    assert seqs(one) == [1, 2]
    ack(one, 1, "failed")
    assert net.box().reserved is net.box().consumers[one.session]
    open_mailbox(two, window=2)
    assert seqs(two) == [1]
    net.peers[0].message("bob", b"3")
    assert seqs(one) == [3]
    assert net.box().reserved is None


def test_reserved_member_that_leaves_is_replaced() -> None:
    net, one, two = pool_with(4)
    open_mailbox(one, window=2)
    open_mailbox(two, window=2)
    ack(one, 1, "failed")
    reserved = net.box().reserved
    assert reserved is not None
    reserved.session.connection.leave()
    other = two if reserved.session is one.session else one
    for seq in list(other.session.consumer.held):
        ack(other, seq)
    assert len(other.session.consumer.held) == 1
    assert other.session.consumer.alone


def test_closing_member_gets_nothing_more() -> None:
    net, one, _ = pool_with(0)
    one.block(1)
    one.op("open_mailbox", 5)
    net.broker.replies.close(one.session, "ended")
    net.settle()
    net.peers[0].message("bob", b"1")
    assert not net.box().held


def test_timer_that_is_early_does_no_harm() -> None:
    net, one, _ = pool_with(2, ack_timeout=10.0)
    open_mailbox(one, window=2)
    net.advance(5)
    ack(one, 1)
    net.advance(5.5)
    assert seqs(one) == [1, 2, 2]
    assert net.broker.mailboxes.timers
    assert net.broker.next_deadline is not None


def test_mailbox_without_dead_letters_tries_forever() -> None:
    net, one, _ = pool_with(1, dead=0.0, attempts=1)
    open_mailbox(one)
    ack(one, 1, "failed")
    assert (net.box().dead, net.box().delayed) == (0, 1)
    net.advance(61)
    assert seqs(one) == [1, 1]


def test_patterns_of_a_mailbox_change_with_a_reload() -> None:
    net = MailboxNet(client("alice"), with_mailbox(subscribe=["a"]))
    alice = net.connect("alice")
    configs = {"alice": client("alice"), "bob": with_mailbox(subscribe=["b"])}
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    alice.publish("a")
    alice.publish("b")
    assert net.box().messages == 1


def test_open_mailbox_while_the_broker_closes_the_connection_is_refused() -> None:
    _, one, _ = pool_with(0)
    one.session.parting = True
    one.op("open_mailbox", 5)
    assert one.error() == (5, "shutting_down")


def test_sender_released_for_another_reason_is_forgotten_by_the_mailbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commits, "_UNCOMMITTED", 10)
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"x")
    alice.message("bob", b"y")
    assert alice.held
    alice.leave()
    assert not net.box().waiting
    net.answer()
    assert net.box().messages == 1


def test_forgotten_keys_make_room() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    net.connect("alice").message("bob", b"", extension={"key": "k"})
    net.broker.mailboxes.forgotten((("bob", 1),))
    assert net.box().keys == 0


def test_clock_never_goes_back() -> None:
    clock = Clock(100.0)
    clock.set(5.0, 100.0)
    clock.advance(7.0)
    clock.advance(6.0)
    assert (clock.now, clock.wall, clock.monotonic(110.0)) == (7.0, 102.0, 15.0)
