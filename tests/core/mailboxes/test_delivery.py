"""Delivery: order, window, attempts, isolation, delay and ttl."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from support.fake_network import Peer, client, error_of
from support.mailbox_net import MailboxNet, ack, open_mailbox, receipts, seqs, with_mailbox
from support.memory_store import MemoryStore

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd_client.wire.envelope import CodecId, Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame


def net_with(count: int, *, entry: dict[str, Any] | None = None, **box: Any) -> MailboxNet:
    """Return a network whose bob has ``count`` messages from alice."""
    net = MailboxNet(client("alice"), with_mailbox(entry=entry, **box))
    alice = net.connect("alice")
    for number in range(1, count + 1):
        alice.message("bob", b"%d" % number, number)
    return net


def attempts(peer: Peer) -> list[tuple[int, int]]:
    """Remove what a peer got; return (seq, attempt) of each delivery."""
    return [(envelope.seq, envelope.attempt) for envelope in peer.take() if envelope.seq]


POOL = {"connections": 8}


def test_window_limits_messages_that_a_connection_holds() -> None:
    net = net_with(5)
    bob = net.connect("bob")
    open_mailbox(bob, window=2)
    assert seqs(bob) == [1, 2]
    ack(bob, 2)
    assert seqs(bob) == [3]
    ack(bob, 3, upto=True)
    assert seqs(bob) == [4, 5]
    open_mailbox(bob, window=10)
    assert not seqs(bob)


def test_window_bytes_limits_them_and_lets_one_message_pass() -> None:
    net = net_with(0)
    alice = net.connect("alice") if not net.peers else net.peers[0]
    for _ in range(4):
        alice.message("bob", b"x" * 100)
    bob = net.connect("bob")
    reply = open_mailbox(bob, window_bytes=10)
    assert reply["window_bytes"] == 10
    assert seqs(bob) == [1]
    open_mailbox(bob, window_bytes=300)
    assert seqs(bob) == [2]
    ack(bob, 1)
    assert seqs(bob) == [3]


def test_window_bytes_is_at_most_the_queue() -> None:
    net = net_with(1, entry={"queue": 1000})
    assert open_mailbox(net.connect("bob"), window_bytes=10_000)["window_bytes"] == 1000


@pytest.mark.parametrize(
    "arguments",
    [{"window": 0}, {"window": 10_001}, {"window": "2"}, {"window": True}, {"window_bytes": 0}],
)
def test_open_mailbox_with_limits_out_of_range_is_unsupported(arguments: dict[str, Any]) -> None:
    net = net_with(1)
    bob = net.connect("bob")
    bob.op("open_mailbox", 5, **arguments)
    assert bob.error() == (5, "unsupported")


def test_open_mailbox_without_a_mailbox_is_unsupported() -> None:
    net = net_with(0)
    alice = net.peers[0]
    for op in ("open_mailbox", "close_mailbox"):
        alice.op(op, 5)
        assert alice.error() == (5, "unsupported")


def test_close_mailbox_returns_messages_without_counting() -> None:
    net = net_with(3)
    bob = net.connect("bob")
    open_mailbox(bob, window=2)
    assert attempts(bob) == [(1, 1), (2, 1)]
    assert bob.ask("close_mailbox") == {}
    ack(bob, 1)
    assert bob.error() == (1, "expired")
    open_mailbox(bob)
    assert attempts(bob) == [(1, 1), (2, 1), (3, 1)]


def test_end_of_connection_counts_an_attempt_and_keeps_the_order() -> None:
    net = net_with(3)
    bob = net.connect("bob")
    open_mailbox(bob, window=2)
    bob.leave()
    bob = net.connect("bob")
    open_mailbox(bob)
    # Each message with a failed attempt is delivered alone.
    assert attempts(bob) == [(1, 2)]
    ack(bob, 1)
    assert attempts(bob) == [(2, 2)]
    ack(bob, 2)
    assert attempts(bob) == [(3, 1)]


@pytest.mark.parametrize("code", ["disconnected", "replaced"])
def test_end_that_the_broker_causes_counts_no_attempt(code: str) -> None:
    net = net_with(2)
    bob = net.connect("bob")
    open_mailbox(bob)
    net.broker.replies.close(bob.session, code)
    net.settle()
    assert bob.gone
    bob = net.connect("bob")
    open_mailbox(bob)
    assert attempts(bob) == [(1, 1), (2, 1)]


def test_attempt_is_counted_only_once_it_is_on_disk() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    net.is_prompt = False
    bob.leave()
    bob = net.connect("bob")
    open_mailbox(bob)
    assert not bob.take()
    net.answer()
    assert attempts(bob) == [(1, 2)]


def test_done_with_receipt_is_answered_when_it_is_on_disk() -> None:
    net = net_with(2)
    bob = net.connect("bob")
    open_mailbox(bob)
    bob.take()
    net.is_prompt = False
    ack(bob, 2, upto=True, receipt=True)
    assert not bob.take()
    assert net.store.disk["bob"].rows
    net.answer()
    (receipt,) = bob.take()
    assert (receipt.kind, receipt.id, receipt.flags) == (Kind.RECEIPT, 2, Flag.ACK)
    assert not net.store.disk["bob"].rows
    assert net.box().messages == net.box().size == 0


@pytest.mark.parametrize(
    ("payload", "codec", "flags"),
    [
        (b"x", 0, 0),
        (b'{"verb": "done"}', 0, 0),
        (b'{"verb": "gone"}', 2, 0),
        (b"[]", 2, 0),
        (b"{}", 2, 0),
        (b'{"verb": ["done"]}', 2, 0),
        (b'{"verb": "back", "delay": -1}', 2, 0),
        (b'{"verb": "back", "delay": 3000000}', 2, 0),
        (b'{"verb": "dead", "reason": 5}', 2, 0),
        (b'{"verb": "dead", "reason": "\\ud800"}', 2, 0),
        (b'{"verb": "done", "more": 1}', 2, 0),
        (b'{"verb": "failed"}', 2, Flag.ACK),
        (b"\xff", 2, 0),
        (b'"' + b"x" * 70_000 + b'"', 2, 0),
    ],
)
def test_ack_with_another_payload_is_unsupported_and_the_message_stays_held(
    payload: bytes, codec: int, flags: int
) -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    bob.take()
    bob.send(Envelope(Kind.ACK, 1, "", payload, codec=codec, flags=flags))
    (refusal,) = bob.take()
    assert error_of(refusal) == "unsupported"
    assert refusal.flags == Flag.ACK
    assert list(net.box().held) == [1]


def test_ack_for_a_message_that_is_not_held_is_expired() -> None:
    net = net_with(2)
    bob = net.connect("bob")
    ack(bob, 1)
    assert bob.error() == (1, "expired")
    open_mailbox(bob, window=1)
    bob.take()
    ack(bob, 2)
    assert bob.error() == (2, "expired")
    ack(bob, 5, upto=True)
    assert seqs(bob) == [2]
    ack(bob, 1, upto=True)
    assert bob.error() == (1, "expired")


def test_ack_of_a_client_without_a_mailbox_and_flag_ack_elsewhere_are_unsupported() -> None:
    net = net_with(0)
    alice = net.peers[0]
    ack(alice, 1)
    assert alice.got[0].flags == Flag.ACK
    assert alice.error() == (1, "unsupported")
    alice.send(Envelope(Kind.REQUEST, 2, "bob", flags=Flag.ACK))
    assert alice.error() == (2, "unsupported")


def test_acks_are_not_subject_to_the_rate() -> None:
    """Those of a client without a mailbox are, as all other frames."""
    rate = {"rate": RateConfig(1.0, 1e6)}
    net = MailboxNet(client("alice"), client("carl", **rate), with_mailbox(entry=rate))
    alice, bob, carl = net.connect("alice"), net.connect("bob"), net.connect("carl")
    for number in range(20):
        alice.message("bob", b"x", number)
    open_mailbox(bob)
    for seq in seqs(bob):
        ack(bob, seq)
    assert net.box().messages == 0
    assert not bob.take()
    for seq in range(20):
        ack(carl, seq)
    assert {error_of(each) for each in carl.take()} == {"unsupported", "rate_limited"}


def test_ack_with_a_name_is_unsupported() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    bob.send(Envelope(Kind.ACK, 1, "alice"))
    assert bob.error() == (1, "unsupported")


def test_back_returns_after_100_ms_to_another_member() -> None:
    net = net_with(1, entry=POOL)
    one, two = net.connect("bob"), net.connect("bob")
    open_mailbox(one)
    assert attempts(one) == [(1, 1)]
    open_mailbox(two)
    ack(one, 1, "back", receipt=True)
    assert receipts(one) == [1]
    assert net.box().delayed == 1
    net.advance(0.09)
    assert not two.take()
    net.advance(0.02)
    assert attempts(two) == [(1, 1)]
    assert net.box().delayed == 0


def test_back_with_delay_survives_a_restart() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    ack(bob, 1, "back", delay=60)
    net = MailboxNet(client("alice"), with_mailbox(), store=net.store.crashed())
    bob = net.connect("bob")
    assert open_mailbox(bob)["delayed"] == 1
    net.advance(59)
    assert not bob.take()
    net.advance(2)
    assert attempts(bob) == [(1, 1)]


def test_failed_waits_longer_before_each_attempt() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    waits = []
    for attempt in range(1, 10):
        assert attempts(bob) == [(1, attempt)]
        ack(bob, 1, "failed", reason="no")
        waited = 0.0
        while not bob.got:
            net.advance(0.5)
            waited += 0.5
        waits.append(waited)
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_failed_waits_for_its_delay_if_that_is_longer() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    bob.take()
    ack(bob, 1, "failed", delay=5)
    net.advance(4.9)
    assert not bob.take()
    net.advance(0.2)
    assert attempts(bob) == [(1, 2)]


def test_message_becomes_a_dead_letter_after_its_attempts() -> None:
    net = net_with(2, attempts=2)
    bob = net.connect("bob")
    open_mailbox(bob, window=1)
    ack(bob, 1, "failed", reason="broken")
    ack(bob, 1, "failed", reason="still broken")
    assert net.box().dead == 1
    row = net.store.disk["bob"].rows[1]
    assert (row.state, row.attempts, row.consumer) == ("dead", 2, "bob")
    assert row.reason == "2 attempts failed: still broken"
    assert row.error == "still broken"
    assert attempts(bob) == [(1, 1), (1, 2), (2, 1)]


def test_dead_becomes_a_dead_letter_at_once_and_is_logged() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    ack(bob, 1, "dead", reason="hopeless")
    row = net.store.disk["bob"].rows[1]
    assert (row.state, row.reason) == ("dead", "hopeless")
    (event,) = [e for e in net.broker.replies.log_events.take() if e.event == "mailbox.dead"]
    assert (event.other, event.reason) == ("bob", "bob: hopeless")


def test_messages_beyond_the_share_of_dead_letters_stay_delayed_for_60_s() -> None:
    net = net_with(4, messages=10, dead=0.2)
    bob = net.connect("bob")
    open_mailbox(bob, window=10)
    bob.take()
    for seq in (1, 2, 3, 4):
        ack(bob, seq, "dead")
    box = net.box()
    assert (box.dead, box.delayed) == (2, 2)
    events = [event.event for event in net.broker.replies.log_events.take()]
    assert events.count("mailbox.dead_full") == 1
    net.advance(59)
    assert not bob.take()
    net.advance(2)
    assert attempts(bob) == [(3, 1), (4, 1)]


def test_message_with_a_failed_attempt_is_delivered_alone() -> None:
    net = net_with(6, entry=POOL)
    one, two = net.connect("bob"), net.connect("bob")
    open_mailbox(one, window=3)
    assert seqs(one) == [1, 2, 3]
    open_mailbox(two, window=2)
    assert seqs(two) == [4, 5]
    ack(one, 1, "failed")
    # Both hold two; the first of them gets no more until it holds nothing.
    assert not one.take()
    assert not two.take()
    ack(one, 2)
    ack(one, 3)
    assert attempts(one) == [(1, 2)]
    ack(two, 4)
    assert seqs(two) == [6]
    net.peers[0].message("bob", b"7")
    assert not one.take()
    ack(one, 1)
    assert seqs(one) + seqs(two) == [7]


def test_poison_message_between_good_ones_harms_no_other() -> None:
    net = net_with(40, attempts=3, window=8)
    done: list[int] = []
    for _ in range(6):
        bob = net.connect("bob")
        open_mailbox(bob)
        for _ in range(100):
            for delivery in bob.take():
                if delivery.payload == b"20":
                    bob.leave()
                    break
                ack(bob, delivery.seq)
                done.append(delivery.seq)
            if bob.gone:
                break
            net.advance(1)
        if not bob.gone:
            break
    assert sorted(done) == [seq for seq in range(1, 41) if seq != 20]
    rows = net.store.disk["bob"].rows
    assert list(rows) == [20]
    assert rows[20].state == "dead"


def test_delayed_message_lets_later_ones_pass() -> None:
    net = net_with(0)
    alice, bob = net.peers[0], net.connect("bob")
    open_mailbox(bob)
    alice.message("bob", b"later", extension={"delay": 10})
    alice.message("bob", b"now", extension={"delay": 0})
    assert seqs(bob) == [2]
    assert net.box().delayed == 1
    net.advance(9.9)
    assert not bob.take()
    net.advance(0.2)
    assert seqs(bob) == [1]


def test_expired_message_is_not_delivered_and_its_sender_hears_of_it() -> None:
    net = net_with(0)
    alice = net.peers[0]
    alice.message("bob", b"old", 5, receipt=True, extension={"ttl": 10})
    alice.message("bob", b"young", 6)
    alice.take()
    net.advance(11)
    bob = net.connect("bob")
    open_mailbox(bob)
    assert seqs(bob) == [2]
    (report,) = alice.take()
    fields = json.loads(report.payload)
    assert (report.id, fields["code"], fields["name"], fields["seq"]) == (5, "expired", "bob", 1)
    assert list(net.store.disk["bob"].rows) == [2]


def test_ttl_of_the_mailbox_is_an_upper_bound() -> None:
    net = net_with(0, ttl=5.0)
    alice = net.peers[0]
    alice.message("bob", b"a", extension={"ttl": 100})
    alice.message("bob", b"b")
    alice.message("bob", b"c", extension={"ttl": 1})
    rows = net.store.disk["bob"].rows
    assert [rows[seq].stored.expires_at for seq in (1, 2, 3)] == [1005, 1005, 1001]


def test_held_message_does_not_expire_and_is_judged_when_it_returns() -> None:
    net = net_with(0)
    alice, bob = net.peers[0], net.connect("bob")
    open_mailbox(bob)
    for number in (1, 2, 3):
        alice.message("bob", b"a", number, extension={"ttl": 10})
    bob.take()
    net.advance(20)
    assert list(net.box().held) == [1, 2, 3]
    ack(bob, 1, receipt=True)
    assert receipts(bob) == [1]
    ack(bob, 2, "back")
    assert alice.error() == (2, "expired")
    ack(bob, 3, "failed")
    assert alice.error() == (3, "expired")
    assert net.box().messages == 0


def test_expired_message_of_a_sender_that_connected_again_is_not_reported() -> None:
    net = net_with(0)
    alice = net.peers[0]
    alice.message("bob", b"old", 5, extension={"ttl": 10})
    alice.leave()
    net.advance(11)
    alice, bob = net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    assert not alice.take()
    assert net.box().messages == 0


def test_ack_timeout_returns_the_message_and_leaves_the_connection() -> None:
    net = net_with(1, entry=POOL, ack_timeout=5.0)
    one, two = net.connect("bob"), net.connect("bob")
    open_mailbox(one)
    assert seqs(one) == [1]
    open_mailbox(two)
    net.advance(4)
    assert not two.take()
    net.advance(1.5)
    assert attempts(two) == [(1, 1)]
    ack(one, 1)
    assert one.error() == (1, "expired")
    assert [e.event for e in net.broker.replies.log_events.take()].count("mailbox.ack_timeout") == 1


def test_members_of_a_pool_get_messages_in_turns() -> None:
    net = net_with(0, entry=POOL)
    members = [net.connect("bob") for _ in range(3)]
    for member in members:
        open_mailbox(member)
    for _ in range(6):
        net.peers[0].message("bob")
    assert [seqs(member) for member in members] == [[1, 4], [2, 5], [3, 6]]


def test_members_of_a_pool_share_a_backlog_in_runs() -> None:
    """Each gets about the same number, and no more than its window."""
    net = net_with(0, entry=POOL, window=100)
    small = net.connect("bob")
    members = [small, net.connect("bob"), net.connect("bob")]
    open_mailbox(small, window=10)
    for member in members[1:]:
        open_mailbox(member)
    net.is_prompt = False
    for _ in range(100):
        net.peers[0].message("bob")
    net.answer()
    got = [seqs(member) for member in members]
    assert sorted(seq for each in got for seq in each) == list(range(1, 101))
    assert all(each == sorted(each) for each in got)
    assert len(got[0]) == 10
    assert abs(len(got[1]) - len(got[2])) < 10
    assert sum(after == before + 1 for before, after in pairwise(got[1])) > 30


def test_returned_message_in_a_backlog_goes_to_another_member() -> None:
    net = net_with(0, entry=POOL)
    one, two = net.connect("bob"), net.connect("bob")
    open_mailbox(one)
    open_mailbox(two)
    for _ in range(2):
        net.peers[0].message("bob")
    assert (seqs(one), seqs(two)) == ([1], [2])
    ack(one, 1, "back")
    for _ in range(40):
        net.peers[0].message("bob", extension={"delay": 1})
    net.advance(1)
    returned, others = seqs(two), seqs(one)
    assert returned[0] == 1
    assert sorted(returned + others) == [1, *range(3, 43)]


def test_member_that_does_not_read_holds_up_no_other() -> None:
    net = net_with(0, entry={**POOL, "queue": 300})
    one, two = net.connect("bob"), net.connect("bob")
    one.block()
    open_mailbox(two)
    one.op("open_mailbox", 5)
    for _ in range(8):
        net.peers[0].message("bob", b"x" * 100)
    got = []
    while delivered := seqs(two):
        got += delivered
        ack(two, delivered[-1], upto=True)
    one.read()
    assert sorted([*got, *seqs(one)]) == list(range(1, 9))
    assert len(got) > 4


def test_plain_acks_of_one_read_are_collected_and_counted() -> None:
    """The broker sees the first; all of them make one removal, also after other frames."""
    net = MailboxNet(client("alice"), with_mailbox(window=10))
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(30):
        alice.message("bob", b"x")
    open_mailbox(bob)
    assert seqs(bob) == list(range(1, 11))
    first = len(net.store.batches)
    bob.send_bytes(b"".join(frame(encode(Envelope(Kind.ACK, seq, ""))) for seq in range(1, 8)))
    removed = [record for batch in net.store.batches[first:] for record in batch.records]
    assert [record.seqs for record in removed] == [((1, 7),)]
    assert seqs(bob) == list(range(11, 18))
    counts = net.box().counts()
    assert (counts["held"], counts["ready"], net.box().messages) == (10, 13, 23)
    assert net.broker.mailboxes.acknowledging.acknowledged == 7


def test_plain_acks_of_what_is_not_held_are_refused_among_others() -> None:
    net = MailboxNet(client("alice"), with_mailbox(window=10))
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(5):
        alice.message("bob", b"x")
    open_mailbox(bob)
    bob.take()
    acks = [Envelope(Kind.ACK, seq, "") for seq in (1, 2, 2, 99, 3)]
    bob.send_bytes(b"".join(frame(encode(each)) for each in acks))
    refused = bob.take()
    assert [(envelope.id, error_of(envelope)) for envelope in refused] == [
        (2, "expired"),
        (99, "expired"),
    ]
    assert net.box().messages == 2


def acknowledging_three_of_five(op: str) -> tuple[MailboxNet, Peer]:
    """Return a net and its consumer, which has sent three ACKs and an operation at once."""
    net = MailboxNet(client("alice"), with_mailbox(window=10))
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(5):
        alice.message("bob", b"x")
    open_mailbox(bob)
    bob.take()
    acks = [Envelope(Kind.ACK, seq, "") for seq in (1, 2, 3)]
    payload = json.dumps({"op": op}).encode()
    request = Envelope(Kind.REQUEST, 8, "$broker", payload, codec=CodecId.JSON)
    bob.send_bytes(b"".join(frame(encode(each)) for each in (*acks, request)))
    return net, bob


def test_question_behind_plain_acks_finds_them_carried_out() -> None:
    _, bob = acknowledging_three_of_five("mailboxes")
    (reply,) = bob.take()
    (listed,) = json.loads(reply.payload)["mailboxes"]
    assert (listed["held"], listed["ready"]) == (2, 0)


def test_connection_that_ends_behind_plain_acks_has_acknowledged() -> None:
    net, _ = acknowledging_three_of_five("close_mailbox")
    assert net.box().messages == net.box().ready_count == 2


def test_mailbox_of_a_client_whose_queue_is_edited_is_delivered() -> None:
    entry = {"when_full": WhenFull.DROP_OLDEST}
    net = MailboxNet(client("alice"), with_mailbox(entry=entry))
    alice, bob = net.connect("alice"), net.connect("bob")
    for _ in range(5):
        alice.message("bob", b"x")
    open_mailbox(bob)
    assert seqs(bob) == [1, 2, 3, 4, 5]


def test_plain_acks_of_later_turns_stay_in_the_routing_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slow path sees the first one only."""
    net = net_with(6)
    bob = net.connect("bob")
    open_mailbox(bob, window=2)
    seen = []
    acknowledge = net.broker.mailboxes.acknowledge

    def noted(source: Any, envelope: Envelope, payload: memoryview, now: float) -> Any:
        seen.append(envelope.id)
        return acknowledge(source, envelope, payload, now)

    monkeypatch.setattr(net.broker.mailboxes, "acknowledge", noted)
    got = []
    while delivered := seqs(bob):
        got += delivered
        for seq in delivered:
            ack(bob, seq)
    assert got == [1, 2, 3, 4, 5, 6]
    assert seen == [1]
    assert (net.box().messages, net.box().held) == (0, {})


def test_plain_ack_after_the_store_has_failed_is_refused() -> None:
    """Also of a connection whose ACKs stayed in the routing loop."""
    net = net_with(3)
    bob = net.connect("bob")
    open_mailbox(bob)
    ack(bob, 1)
    ack(bob, 2)
    bob.take()
    net.broker.mailboxes.fail("I/O error")
    ack(bob, 3)
    assert [error_of(each) for each in bob.take()] == ["store_failed"]


def test_plain_ack_during_a_pause_waits_for_its_end() -> None:
    """Also of a connection whose ACKs stayed in the routing loop."""
    net = net_with(3)
    bob = net.connect("bob")
    open_mailbox(bob)
    ack(bob, 1)
    ack(bob, 2)
    net.broker.mailboxes.pause()
    net.settle()
    ack(bob, 3)
    assert net.broker.mailboxes.is_quiet
    assert list(net.box().held) == [3]
    net.broker.mailboxes.resume()
    net.settle()
    assert (net.box().messages, net.box().held) == (0, {})


def test_acks_of_a_whole_window_are_routed_in_one_turn() -> None:
    net = net_with(1000)
    bob = net.connect("bob")
    bob.op("open_mailbox", 1001, window=1000, window_bytes=1 << 20)
    assert len(seqs(bob)) == 1000
    ack(bob, 1)
    turn = net.broker.turn
    turn.budget = 64
    bob.send_bytes(b"".join(frame(encode(Envelope(Kind.ACK, seq, ""))) for seq in range(2, 1001)))
    assert turn.budget > 0
    assert net.box().messages == 0


def test_backlog_is_read_back_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 5)
    monkeypatch.setattr(mailbox_module, "_FEW", 2)
    monkeypatch.setattr("brokerd.core.mailboxes.feeding._RUN", 3)
    net = net_with(30)
    box = net.box()
    assert (len(box.ready), box.unloaded) == (5, 25)
    bob = net.connect("bob")
    open_mailbox(bob, window=4)
    got = []
    while delivered := seqs(bob):
        assert len(box.ready) <= 6
        got += delivered
        if len(got) == 20:
            net.peers[0].message("bob", b"31")
        for seq in delivered:
            ack(bob, seq)
    assert got == list(range(1, 32))
    assert (box.messages, box.unloaded, len(box.ready)) == (0, 0, 0)


def test_delayed_backlog_is_read_back_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 4)
    monkeypatch.setattr("brokerd.core.mailboxes.feeding._RUN", 3)
    net = net_with(0)
    for number in range(1, 21):
        delay = 1 + number * 7 % 20
        net.peers[0].message("bob", b"", extension={"delay": delay})
    bob = net.connect("bob")
    open_mailbox(bob, window=100)
    got: list[tuple[int, int]] = []
    for second in range(1, 25):
        net.advance(1)
        got += [(second, seq) for seq in seqs(bob)]
    assert sorted(seq for _, seq in got) == list(range(1, 21))
    assert all(second == 1 + seq * 7 % 20 for second, seq in got)
    assert net.box().delayed == 0


def test_delayed_messages_arrive_that_found_the_memory_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net = net_with(4)
    for _ in range(5):
        net.peers[0].message("bob", b"", extension={"delay": 5})
    bob = net.connect("bob")
    open_mailbox(bob, window=100)
    assert seqs(bob) == [1, 2, 3, 4]
    net.advance(5.1)
    assert sorted(seqs(bob)) == [5, 6, 7, 8, 9]


def test_delayed_message_that_fails_before_a_backlog_is_delivered_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Failed, it is ready on disk: the run that contains it must not return it, too."""
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    monkeypatch.setattr(mailbox_module, "_FEW", 2)
    monkeypatch.setattr("brokerd.core.mailboxes.feeding._RUN", 3)
    net = net_with(12)
    net.peers[0].message("bob", b"late", extension={"delay": 1})
    net.peers[0].message("bob", b"last")
    net.advance(2)
    bob = net.connect("bob")
    open_mailbox(bob, window=4)
    got = []
    while delivered := attempts(bob):
        got += delivered
        for seq, attempt in delivered:
            ack(bob, seq, "failed" if (seq, attempt) == (13, 1) else "")
    assert got[:4] == [(1, 1), (2, 1), (13, 1), (3, 1)]
    assert sorted(got) == [*((seq, 1) for seq in range(1, 14)), (13, 2), (14, 1)]
    box = net.box()
    assert (box.messages, box.unloaded, box.size, box.ahead) == (0, 0, 0, set())


def test_restart_delivers_everything_that_was_not_acknowledged() -> None:
    net = net_with(5)
    bob = net.connect("bob")
    open_mailbox(bob, window=3)
    ack(bob, 2)
    net = MailboxNet(client("alice"), with_mailbox(), store=net.store.crashed())
    net.connect("alice").message("bob", b"new")
    bob = net.connect("bob")
    assert open_mailbox(bob)["ready"] == 5
    assert attempts(bob) == [(1, 1), (3, 1), (4, 1), (5, 1), (6, 1)]


def test_restart_never_reuses_a_seq() -> None:
    net = net_with(1)
    bob = net.connect("bob")
    open_mailbox(bob)
    ack(bob, 1)
    store: MemoryStore = net.store.crashed()
    net = MailboxNet(client("alice"), with_mailbox(), store=store)
    net.connect("alice").message("bob", b"new")
    bob = net.connect("bob")
    open_mailbox(bob)
    assert seqs(bob) == [2]


def test_mailbox_taken_away_and_given_back_keeps_its_messages() -> None:
    net = net_with(2)
    bob = net.connect("bob")
    open_mailbox(bob, window=1)
    assert seqs(bob) == [1]
    configs = {"alice": client("alice"), "bob": client("bob")}
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    net.settle()
    assert net.box().client is None
    net.peers[0].message("bob", b"live")
    assert [envelope.payload for envelope in bob.take()] == [b"live"]
    configs["bob"] = with_mailbox()
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    open_mailbox(bob)
    assert attempts(bob) == [(1, 1), (2, 1)]
    del configs["bob"]
    for session in net.broker.reconfigure(configs, net.broker.status.limits, net.now):
        net.broker.replies.close(session, "removed")
    net.settle()
    assert bob.gone
    assert net.box().client is None
    assert net.box().messages == 2


def test_smaller_mailbox_deletes_nothing() -> None:
    net = net_with(3)
    configs = {"alice": client("alice"), "bob": with_mailbox(messages=1)}
    net.broker.reconfigure(configs, net.broker.status.limits, net.now)
    net.peers[0].message("bob", b"x", 9)
    assert net.peers[0].error() == (9, "full")
    assert net.box().messages == 3


def test_drain_delivers_nothing_new_and_takes_acks() -> None:
    net = net_with(3)
    bob = net.connect("bob")
    open_mailbox(bob, window=1)
    assert seqs(bob) == [1]
    net.broker.drain()
    ack(bob, 1, receipt=True)
    assert receipts(bob) == [1]
    assert not net.box().held


def test_delivery_to_a_connection_that_ends_before_it_was_written_stays_in_the_mailbox() -> None:
    net = net_with(3, entry=POOL)
    one, two = net.connect("bob"), net.connect("bob")
    one.block()
    one.op("open_mailbox", 5)
    one.leave()
    assert not two.take()
    assert not net.peers[0].take()
    open_mailbox(two)
    assert attempts(two) == [(1, 2)]


def test_connection_that_was_told_to_go_gets_nothing_more() -> None:
    """It finishes what it holds; what it returns goes to another member."""
    net = MailboxNet(client("alice"), with_mailbox(entry={"connections": 2}))
    alice, first = net.connect("alice"), net.connect("bob")
    first.op("goaway", 5)
    first.take()
    for number in (1, 2):
        alice.message("bob", b"%d" % number, number)
    open_mailbox(first)
    assert seqs(first) == [1, 2]
    net.broker.goaway.part(first.session)
    ack(first, 2, "back")
    alice.message("bob", b"3", 3)
    net.advance(1)
    assert seqs(first) == []
    second = net.connect("bob")
    open_mailbox(second)
    assert seqs(second) == [2, 3]
    ack(first, 1)
    assert net.box().messages == 2
