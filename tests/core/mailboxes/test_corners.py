"""What happens at the same time: answers of the store that come late, full outboxes,
and senders that leave.
"""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, seqs, with_mailbox

from brokerd.core.mailboxes import commits, feeding, inspection, storing
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.journal import FailureKind
from brokerd.core.mailboxes.store_calls import StoreCalls
from brokerd.core.stored_message import tagged
from brokerd_client.wire.envelope import Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame

POOL = {"connections": 4}


def network(count: int = 0, **box: object) -> tuple[MailboxNet, Peer, Peer]:
    """Return a network, alice and bob; bob's mailbox has ``count`` messages."""
    net = MailboxNet(
        client("alice"), client("ops", admin=True, admin_payload=True), with_mailbox(**box)
    )
    alice = net.connect("alice")
    for number in range(1, count + 1):
        alice.message("bob", b"%d" % number, number)
    return net, alice, net.connect("bob")


def errors(peer: Peer) -> list[tuple[int, str]]:
    """Remove what a peer got; return id and code of each ERROR."""
    return [
        (each.id, json.loads(each.payload)["code"])
        for each in peer.take()
        if each.kind is Kind.ERROR
    ]


def test_mailbox_that_nothing_is_held_of_is_closed_at_once() -> None:
    _, _, bob = network()
    open_mailbox(bob)
    assert bob.ask("close_mailbox") == {}


def test_ack_timeout_returns_only_what_is_held_long_enough() -> None:
    net, alice, bob = network(1, ack_timeout=5.0)
    open_mailbox(bob)
    net.advance(3)
    alice.message("bob", b"2")
    assert seqs(bob) == [1, 2]
    net.advance(3)
    assert seqs(bob) == [1]
    assert sorted(net.box().held) == [1, 2]


def test_keyed_messages_at_an_io_error_are_in_doubt_or_refused() -> None:
    """Those in the open batch are refused, those under way are in doubt."""
    net, alice, _ = network()
    net.is_prompt = False
    for number in range(1, 4):
        alice.message("bob", b"x", number, extension={"key": f"k{number}"})
    net.store.failure = FailureKind.IO
    net.answer()
    assert sorted(errors(alice)) == [(1, "in_doubt"), (2, "in_doubt"), (3, "store_failed")]
    assert (net.box().messages, net.box().keys) == (0, 0)


def test_keyed_message_of_a_sender_that_left_has_no_outcome() -> None:
    net, alice, _ = network()
    net.is_prompt = False
    alice.message("bob", b"x", 1, extension={"key": "k"})
    alice.leave()
    net.answer()
    assert net.box().messages == 1
    assert not errors(alice)


def crowded_outbox(bob: Peer) -> None:
    """Put live frames into an outbox that the system has not been offered yet."""
    live = frame(encode(Envelope(Kind.MESSAGE, 1, "alice", b"y" * 900)))
    bob.net.broker.replies.pass_on(bob.session, live)


def test_deliveries_that_the_outbox_has_no_room_for_follow() -> None:
    net, alice, bob = network(entry={"queue": 1000})
    for number in range(3):
        alice.message("bob", b"x" * 200, number)
    mailboxes = net.broker.mailboxes
    mailboxes.open(bob.session, None, 1 << 20)
    crowded_outbox(bob)
    mailboxes.feeding.feed(100)
    assert not net.box().held
    assert mailboxes.feeding.has_work
    net.settle()
    net.settle()
    assert seqs(bob) == [1, 2, 3]


def test_consumer_without_room_that_closes_its_mailbox_is_forgotten() -> None:
    net, alice, bob = network(entry={"queue": 1000})
    alice.message("bob", b"x" * 200, 1)
    mailboxes = net.broker.mailboxes
    mailboxes.open(bob.session, None, 1 << 20)
    crowded_outbox(bob)
    mailboxes.feeding.feed(100)
    mailboxes.close(bob.session)
    net.settle()
    net.settle()
    assert seqs(bob) == []
    assert not mailboxes.feeding.has_work


def test_feeding_goes_on_where_it_was_cut_off() -> None:
    net, _, bob = network(3)
    mailboxes = net.broker.mailboxes
    mailboxes.open(bob.session, None, 1 << 20)
    mailboxes.feeding.feed(1)
    assert list(net.box().held) == [1]
    assert mailboxes.feeding.has_work
    net.settle()
    assert seqs(bob) == [1, 2, 3]


def test_suspect_behind_a_message_that_is_about_to_return_waits() -> None:
    net, _, one = network(3, entry=POOL)
    two = net.connect("bob")
    open_mailbox(one, window=1)
    open_mailbox(two, window=2)
    assert (seqs(one), seqs(two)) == ([1], [2, 3])
    ack(two, 2, "failed")
    net.is_prompt = False
    ack(one, 1, "failed")
    net.settle()
    assert (net.box().stop, seqs(one)) == (1, [])
    net.is_prompt = True
    net.settle()
    assert seqs(one) == [1]


def test_second_idle_member_gets_a_suspect_if_the_first_does_not_read() -> None:
    net, alice, one = network(entry={**POOL, "queue": 500})
    two, three = net.connect("bob"), net.connect("bob")
    alice.message("bob", b"x" * 300, 1)
    open_mailbox(one)
    ack(one, 1, "failed")
    one.leave()
    open_mailbox(two)
    two.block()
    alice.message(two.address, b"y" * 400, 2)
    open_mailbox(three)
    net.advance(2)
    assert seqs(three) == [1]


def test_due_messages_after_an_io_error_are_not_read() -> None:
    net, alice, bob = network()
    alice.message("bob", b"x", 1, extension={"delay": 5})
    open_mailbox(bob)
    net.store.failure = FailureKind.IO
    alice.message("bob", b"y", 2)
    net.advance(6)
    assert seqs(bob) == []


def test_purge_during_a_read_of_delayed_messages_ignores_the_run() -> None:
    net, alice, _ = network()
    alice.message("bob", b"x", 1, extension={"delay": 5})
    net = MailboxNet(with_mailbox(), store=net.store.crashed(), is_prompt=False)
    bob = net.connect("bob")
    net.advance(10)
    bob.op("open_mailbox", 5)
    assert net.box().reading_delayed
    bob.op("mailbox_purge", 6)
    net.answer()
    assert (net.box().messages, net.box().delayed) == (0, 0)
    assert seqs(bob) == []


def test_delayed_message_that_arrives_during_a_read_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is due before those that are being read."""
    monkeypatch.setattr(feeding, "_RUN", 1)
    net, alice, _ = network()
    for delay in (1, 2, 3):
        alice.message("bob", b"x", extension={"delay": delay})
    configs = client("ops", admin=True), with_mailbox()
    net = MailboxNet(*configs, store=net.store.crashed(), is_prompt=False)
    bob, ops = net.connect("bob"), net.connect("ops")
    net.advance(10)
    bob.op("open_mailbox", 5)
    net.answer(1)
    line = {"sender": "alice", "payload": "y", "state": "delayed", "due_at": 0.5}
    ops.op("mailbox_import", 9, name="bob", messages=[line])
    net.answer()
    assert sorted(seqs(bob))[:3] == [1, 2, 3]
    assert len(net.box().held) == 4


def test_disk_that_is_still_behind_after_a_commit_releases_no_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commits, "_UNCOMMITTED", 200)
    net, alice, _ = network()
    net.is_prompt = False
    for number, size in enumerate((1, 500, 1), 1):
        alice.message("bob", b"x" * size, number, extension={"key": str(number)})
    assert alice.held
    net.answer(1)
    assert alice.held
    net.answer()
    assert not alice.held
    assert net.box().messages == 3


def test_keyed_messages_beyond_the_memory_arrive_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    _, alice, bob = network()
    for number in range(1, 6):
        alice.message("bob", b"x", number, extension={"key": str(number)})
    open_mailbox(bob)
    assert seqs(bob) == [1, 2, 3, 4, 5]


def test_imported_messages_that_were_due_long_ago_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are due before one that was made ready already."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 1)
    net, alice, bob = network()
    ops = net.connect("ops")
    alice.message("bob", b"x", 1, extension={"delay": 1})
    net.advance(5)
    line = {"sender": "alice", "payload": "y", "state": "delayed", "due_at": net.now - 5}
    ops.op("mailbox_import", 9, name="bob", messages=[line, line, line])
    open_mailbox(bob)
    net.advance(1)
    assert sorted(seqs(bob)) == [1, 2, 3, 4]


def test_drop_finds_a_message_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk only, ready or delayed; resting; or with a new state on its way."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net, alice, bob = network(6)
    for delay in (50, 51, 52):
        alice.message("bob", b"x", extension={"delay": delay})
    ops, box = net.connect("ops"), net.box()
    assert (box.unloaded, box.unloaded_delayed) == (4, 1)
    for seq in (6, 9):
        assert ops.ask("mailbox_drop", name="bob", seq=seq) == {"dropped": 1}
    assert (box.messages, box.unloaded, box.unloaded_delayed, box.delayed) == (7, 3, 0, 2)
    open_mailbox(bob, window=2)
    ack(bob, 1, "back")
    assert ops.ask("mailbox_drop", name="bob", seq=1) == {"dropped": 1}
    net.is_prompt = False
    ops.op("mailbox_drop", 5, name="bob", seq=2)
    ack(bob, 2, "failed")
    assert 2 in box.parked
    net.answer()
    net.is_prompt = True
    net.settle()
    assert not box.parked
    bob.take()
    net.advance(100)
    for seq in list(box.held):
        ack(bob, seq)
    assert set(seqs(bob)) <= {3, 4, 5, 7, 8}


def test_senders_that_wait_for_the_disk_are_released_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commits, "_UNCOMMITTED", 10)
    monkeypatch.setattr(storing, "_RELEASED", 1)
    net = MailboxNet(
        *[client(f"a{number}") for number in range(4)], with_mailbox(), is_prompt=False
    )
    senders = [net.connect(f"a{number}") for number in range(4)]
    for sender in senders:
        sender.message("bob", b"x" * 100, 1)
    assert [sender.held for sender in senders] == [False, True, True, True]
    # It is released for another reason, and its mailbox does not know that.
    senders[1].session.held_by = None
    for _ in range(6):
        net.answer()
        net.settle()
    assert net.box().messages == 3
    assert not any(sender.held for sender in senders)


def test_resume_leaves_senders_alone_that_were_released_meanwhile() -> None:
    net, alice, _ = network()
    net.broker.mailboxes.pause()
    alice.message("bob", b"x", 1)
    assert alice.held
    alice.session.held_by = None
    net.broker.mailboxes.resume()
    assert net.box().messages == 0


def test_timer_of_a_dropped_message_is_forgotten() -> None:
    net, alice, bob = network()
    ops = net.connect("ops")
    alice.message("bob", b"x", extension={"delay": 10})
    alice.message("bob", b"x", extension={"delay": 5})
    ops.ask("mailbox_drop", name="bob", seq=1)
    open_mailbox(bob)
    net.advance(6)
    assert seqs(bob) == [2]
    assert net.broker.next_deadline is None


def test_whole_payloads_are_limited_per_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one message is shown; the next page has the rest."""
    monkeypatch.setattr(inspection, "_ANSWER", 1000)
    net, alice, _ = network()
    for number in range(3):
        alice.message("bob", b"x" * 600, number)
    ops = net.connect("ops")
    for after, found in ((0, [1]), (1, [2]), (2, [3])):
        shown = ops.ask("mailbox_show", name="bob", full=True, after=after)["messages"]
        assert [message["seq"] for message in shown] == found
    assert len(ops.ask("mailbox_show", name="bob")["messages"]) == 3


def test_damaged_dead_letter_is_shown_without_content() -> None:
    net, _, bob = network(1)
    rows = net.store.disk["bob"].rows
    rows[1] = rows[1]._replace(frame=b"", state="dead", reason="damaged")
    (shown,) = bob.ask("mailbox_show", state="dead")["messages"]
    assert (shown["reason"], shown["sender"], shown["payload"]) == ("damaged", "", "")


def test_tap_tells_of_expired_messages_whose_senders_have_left() -> None:
    net, alice, bob = network()
    ops = net.connect("ops")
    ops.ask("tap", pattern="bob")
    alice.message("bob", b"x", 1, extension={"ttl": 5})
    alice.leave()
    net.advance(6)
    ops.take()
    open_mailbox(bob)
    copies = [copy for event in ops.take() for copy in json.loads(event.payload)["copies"]]
    assert [copy["outcome"] for copy in copies if copy["kind"] == "outcome"] == ["expired"]


def test_flush_before_the_store_is_open_does_nothing() -> None:
    net, _, _ = network()
    calls = StoreCalls(net.broker.mailboxes.commits)
    calls.flush()
    assert len(calls) == 0


def test_mailbox_that_is_orphaned_already_is_removed_again_without_harm() -> None:
    net, _, bob = network()
    net.broker.mailboxes.remove("bob")
    net.broker.mailboxes.remove("bob")
    net.broker.mailboxes.on_writable(bob.session)
    assert net.box().client is None


def test_failed_messages_that_are_read_back_keep_their_attempts() -> None:
    """Also if they return among others."""
    net, _, bob = network(3)
    open_mailbox(bob)
    ack(bob, 2, "failed")
    net = MailboxNet(client("alice"), with_mailbox(), store=net.store.crashed())
    bob = net.connect("bob")
    open_mailbox(bob, window=1)
    got = []
    for _ in range(3):
        (delivery,) = [each for each in bob.take() if each.seq]
        got.append((delivery.seq, delivery.attempt))
        ack(bob, delivery.seq)
    assert got == [(1, 1), (2, 2), (3, 1)]


def test_tap_tells_of_acks_that_arrive_together() -> None:
    net, alice, bob = network()
    ops = net.connect("ops")
    for number in range(3):
        alice.message("bob", b"x", number)
    open_mailbox(bob)
    bob.take()
    ops.ask("tap", pattern="bob")
    acks = [frame(encode(Envelope(Kind.ACK, seq, ""))) for seq in (1, 2, 3)]
    bob.send_bytes(b"".join(acks))
    net.settle()
    copies = [copy for event in ops.take() for copy in json.loads(event.payload)["copies"]]
    outcomes = [copy["seq"] for copy in copies if copy["outcome"] == "acknowledged"]
    assert outcomes == [1, 2, 3]


def test_delivery_is_made_again_only_for_another_seq_or_attempt() -> None:
    envelope = Envelope(Kind.MESSAGE, 1, "alice", b"x", flags=Flag.ACK, seq=5, attempt=1)
    delivery = frame(encode(envelope))
    assert tagged(delivery, 5, 1) is delivery
    assert tagged(delivery, 6, 1) != delivery


def test_seqs_are_written_as_ranges() -> None:
    assert commits.ranges_of([4, 1, 3]) == ((1, 1), (3, 4))


def test_delayed_message_that_failed_once_is_not_read_with_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in memory, where the later one finds no room."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 1)
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"delayed", extension={"delay": 1})
    open_mailbox(bob)
    net.advance(1)
    bob.leave()
    alice.message("bob", b"later")
    bob = net.connect("bob")
    open_mailbox(bob)
    got = []
    for _ in range(5):
        for seq in seqs(bob):
            got.append(seq)
            ack(bob, seq)
        net.advance(1)
    assert got == [1, 2]
    assert (net.box().messages, net.box().unloaded) == (0, 0)


def test_kicked_dead_letter_behind_newer_message_of_its_batch_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newer message has the last place in memory; the older seq is in memory, too."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 1)
    monkeypatch.setattr(mailbox_module, "_FEW", 1)
    net = MailboxNet(client("alice"), client("ops", admin=True), with_mailbox())
    alice, ops, bob = net.connect("alice"), net.connect("ops"), net.connect("bob")
    open_mailbox(bob)
    alice.message("bob", b"dead")
    ack(bob, 1, "dead")
    bob.op("close_mailbox")
    bob.take()
    net.is_prompt = False
    ops.op("mailbox_kick", 1, name="bob", seq=1)
    net.store.step()
    alice.message("bob", b"newer")
    net.answer()
    net.is_prompt = True
    open_mailbox(bob)
    assert seqs(bob) == [2, 3]
