"""Storing: which frames a mailbox takes, and what their senders hear."""

from __future__ import annotations

import json

import pytest
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, open_mailbox, receipts, seqs, with_mailbox

from brokerd.config.values import WhenFull
from brokerd.core import sink
from brokerd.core.broker import CoreLimits
from brokerd.core.mailboxes import commits
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.journal import FailureKind
from brokerd_client.wire.envelope import Envelope, Flag, Kind


def error(peer: Peer) -> dict[str, object]:
    """Return the payload of the one ERROR that a peer got."""
    (envelope,) = peer.take()
    assert envelope.kind is Kind.ERROR
    fields = json.loads(envelope.payload)
    assert isinstance(fields, dict)
    return fields


def test_message_to_mailbox_is_receipted_when_it_is_on_disk() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"hello", 5, receipt=True)
    assert not alice.take()
    net.answer()
    assert receipts(alice) == [5]
    assert net.box().ready_count == 1


def test_messages_that_arrive_while_two_batches_are_written_become_one_batch() -> None:
    net = MailboxNet(client("alice"), client("carl"), with_mailbox(), is_prompt=False)
    alice, carl = net.connect("alice"), net.connect("carl")
    for number in range(1, 9):
        (carl if number % 3 else alice).message("bob", b"x", number, receipt=bool(number % 2))
    net.answer()
    assert [len(batch.records[0].messages) for batch in net.store.batches] == [1, 1, 6]
    assert (receipts(alice), receipts(carl)) == ([3], [1, 5, 7])
    assert not alice.session.uncommitted
    assert not carl.session.uncommitted


def test_messages_beyond_one_run_become_several_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "MESSAGES", 3)
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    for number in range(1, 11):
        alice.message("bob", b"x", number, receipt=True)
    net.answer()
    assert [len(record.messages) for record in net.store.batches[-1].records] == [3, 3, 2]
    assert receipts(alice) == list(range(1, 11))


def test_message_with_key_follows_the_collected_ones_before_it() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in (1, 2):
        alice.message("bob", b"x", number)
    for number in (3, 4, 5, 6):
        alice.message("bob", b"x", number, extension={"key": "k"} if number == 4 else None)
    net.answer()
    open_mailbox(bob)
    assert [(envelope.seq, envelope.id) for envelope in bob.take()] == [
        (seq, seq) for seq in range(1, 7)
    ]


def test_many_receipts_reach_a_client_whose_queue_is_edited() -> None:
    editing = client("alice", when_full=WhenFull.DROP_OLDEST)
    net = MailboxNet(editing, with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    for number in range(1, 6):
        alice.message("bob", b"x", number, receipt=True)
    net.answer()
    assert receipts(alice) == [1, 2, 3, 4, 5]


def test_messages_beyond_the_memory_of_a_mailbox_stay_on_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox_module, "_MESSAGES", 2)
    net = MailboxNet(client("alice"), with_mailbox(ttl=5.0), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    for number in range(1, 8):
        alice.message("bob", b"x", number)
    net.answer()
    assert (len(net.box().ready), net.box().unloaded) == (2, 5)
    open_mailbox(bob)
    net.answer()
    assert seqs(bob) == [1, 2, 3, 4, 5, 6, 7]


def test_collected_messages_get_no_receipt_once_their_sender_has_left() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"x", 1, receipt=True)
    alice.leave()
    net.answer()
    assert net.box().ready_count == 1
    assert not alice.session.uncommitted


def test_message_to_mailbox_arrives_when_its_client_opens_it() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    net.connect("alice").message("bob", b"hello", 5, extension={"traceparent": "x"})
    bob = net.connect("bob")
    assert not bob.take()
    reply = open_mailbox(bob)
    assert reply["window"] == 64
    assert reply["window_bytes"] == 1 << 20
    assert {key: reply[key] for key in ("ready", "held", "delayed", "dead")} == {
        "ready": 1,
        "held": 0,
        "delayed": 0,
        "dead": 0,
    }
    (delivery,) = bob.take()
    assert delivery == Envelope(
        Kind.MESSAGE,
        5,
        "alice",
        b"hello",
        flags=Flag.ACK | Flag.EXTENSION,
        extension={"traceparent": "x"},
        seq=1,
        attempt=1,
    )


def test_message_is_stored_while_its_recipient_is_connected_and_has_a_cached_route() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.request("bob", b"live", 1)
    alice.message("bob", b"one")
    alice.message("bob", b"two")
    assert [envelope.payload for envelope in bob.take()] == [b"live"]
    assert net.box().ready_count == 2


def test_message_to_an_address_and_request_remain_live() -> None:
    net = MailboxNet(client("alice"), with_mailbox(entry={"connections": 2}))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message(bob.address, b"live")
    alice.request("bob", b"asked", 3)
    assert [envelope.payload for envelope in bob.take()] == [b"live", b"asked"]
    assert net.box().messages == 0


def test_message_with_key_or_delay_that_is_not_stored_is_unsupported() -> None:
    net = MailboxNet(client("alice"), client("carl"))
    alice = net.connect("alice")
    net.connect("carl")
    for extension in ({"key": "k"}, {"delay": 1}):
        alice.message("carl", b"", 4, extension=extension)
        assert "carl has no mailbox" in json.loads(alice.got[-1].payload)["message"]
        assert alice.error() == (4, "unsupported")
        alice.message("nobody", b"", 5, extension=extension)
        assert alice.error() == (5, "no_such_client")


@pytest.mark.parametrize(
    "extension",
    [
        {"key": ""},
        {"key": "x" * 65},
        {"key": 5},
        {"delay": -1},
        {"delay": 30 * 86400 + 1},
        {"delay": "1"},
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": 3650 * 86400 + 1},
    ],
)
def test_stored_message_with_extension_out_of_range_is_unsupported(
    extension: dict[str, object],
) -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice = net.connect("alice")
    alice.message("bob", b"", 4, extension=extension)
    assert alice.error() == (4, "unsupported")
    assert net.box().messages == 0


@pytest.mark.parametrize("extension", [{"key": ""}, {"delay": -1}, {"ttl": 0}])
def test_stored_event_with_extension_out_of_range_is_unsupported_for_all(
    extension: dict[str, object],
) -> None:
    net = MailboxNet(client("alice"), client("carl"), with_mailbox(subscribe=["a.>"]))
    alice, carl = net.connect("alice"), net.connect("carl")
    carl.ask("subscribe", topic=">")
    alice.publish("a.x", b"", 4, extension=extension)
    assert alice.error() == (4, "unsupported")
    assert not alice.got
    assert net.box().messages == 0
    assert not carl.take()


def test_duplicate_is_stored_once_and_receipted_twice() -> None:
    net = MailboxNet(client("alice"), client("carl"), with_mailbox())
    alice, carl, bob = net.connect("alice"), net.connect("carl"), net.connect("bob")
    open_mailbox(bob)
    for number in (1, 2):
        alice.message("bob", b"a", number, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [1, 2]
    carl.message("bob", b"c", 3, receipt=True, extension={"key": "k"})
    assert receipts(carl) == [3]
    assert [envelope.payload for envelope in bob.take()] == [b"a", b"c"]
    ack(bob, 1)
    alice.message("bob", b"a", 4, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [4]
    assert net.box().keys == 2
    assert not bob.take()


def test_duplicate_of_uncommitted_message_waits_for_its_commit() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"a", 1, receipt=True, extension={"key": "k"})
    alice.message("bob", b"a", 2, receipt=True, extension={"key": "k"})
    assert not alice.take()
    net.answer()
    assert receipts(alice) == [1, 2]
    assert net.box().messages == 1


def test_duplicates_among_collected_messages_leave_the_others_in_order() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    open_mailbox(bob)
    for number, key in enumerate(["a", "b", "a", "c", "a", None, "b", "d"], 1):
        extension = None if key is None else {"key": key}
        alice.message("bob", b"x", number, receipt=True, extension=extension)
    net.answer()
    assert [len(batch.records[0].messages) for batch in net.store.batches] == [1, 1, 6]
    assert receipts(alice) == list(range(1, 9))
    assert [envelope.id for envelope in bob.take() if envelope.kind is Kind.MESSAGE] == [
        1,
        2,
        4,
        6,
        8,
    ]
    box = net.box()
    assert (box.messages, box.keys, box.uncommitted) == (5, 4, 0)
    assert box.size == sum(message.size for message in bob.session.consumer.held.values())


def test_refused_collected_messages_leave_no_key() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    net.store.failure = FailureKind.FULL
    for number in (1, 2, 3):
        alice.message("bob", b"x", number, extension={"key": f"k{number}"})
    net.answer()
    box = net.box()
    assert (box.messages, box.keys, box.size) == (0, 0, 0)
    net.store.failure = None
    alice.message("bob", b"x", 4, receipt=True, extension={"key": "k1"})
    net.answer()
    assert [envelope.id for envelope in alice.take() if envelope.kind is Kind.RECEIPT] == [4]
    assert (box.messages, box.keys) == (1, 1)


@pytest.mark.parametrize(("own", "lasts"), [(5, 5.0), (60, 20.0), (None, 20.0)])
def test_collected_message_expires_by_the_smaller_ttl(own: int | None, lasts: float) -> None:
    net = MailboxNet(client("alice"), with_mailbox(ttl=20.0), is_prompt=False)
    alice = net.connect("alice")
    for number in (1, 2, 3):
        alice.message("bob", b"x", number, extension=None if own is None else {"ttl": own})
    net.answer()
    appended = [record.messages for batch in net.store.batches for record in batch.records]
    stored = [each for messages in appended for each in messages]
    assert [each.expires_at - each.stored_at for each in stored] == [lasts] * 3


def test_key_is_forgotten_after_dedup() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice = net.connect("alice")
    alice.message("bob", b"a", 1, extension={"key": "k"})
    net.advance(3601)
    alice.message("bob", b"b", 2)
    assert net.box().keys == 0
    alice.message("bob", b"a", 3, extension={"key": "k"})
    assert net.box().messages == 3


def test_full_mailbox_refuses_with_reason_and_answers_duplicates() -> None:
    net = MailboxNet(client("alice"), with_mailbox(messages=1))
    alice = net.connect("alice")
    alice.message("bob", b"a", 1, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [1]
    alice.message("bob", b"b", 2)
    refusal = error(alice)
    assert (refusal["code"], refusal["name"]) == ("full", "bob")
    alice.message("bob", b"c", 3, extension={"key": "other"})
    assert error(alice)["code"] == "full"
    alice.message("bob", b"a", 4, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [4]


def test_size_of_mailbox_counts_frames_and_keys() -> None:
    net = MailboxNet(client("alice"), with_mailbox(size=300))
    alice = net.connect("alice")
    alice.message("bob", b"x" * 60, 1, extension={"key": "k"})
    assert net.box().size > 60
    alice.message("bob", b"x" * 60, 2)
    assert "1 keys of 128 bytes" in json.loads(alice.got[-1].payload)["message"]
    assert alice.error() == (2, "full")


def test_payload_beyond_mailbox_max_message_is_too_large() -> None:
    net = MailboxNet(client("alice"), with_mailbox(max_message=10))
    alice = net.connect("alice")
    alice.message("bob", b"x" * 11, 1, extension={"traceparent": "y" * 100})
    assert alice.error() == (1, "too_large")
    alice.message("bob", b"x" * 10, 2, receipt=True, extension={"traceparent": "y" * 100})
    assert receipts(alice) == [2]


def test_sender_to_full_mailbox_with_wait_is_held_until_room() -> None:
    net = MailboxNet(client("alice"), with_mailbox(messages=1, when_full=WhenFull.WAIT))
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a", 1)
    alice.message("bob", b"b", 2, receipt=True)
    assert alice.held
    open_mailbox(bob)
    assert seqs(bob) == [1]
    ack(bob, 1)
    assert not alice.held
    assert receipts(alice) == [2]
    assert seqs(bob) == [2]


def test_sender_to_full_mailbox_with_wait_gets_full_after_wait_timeout() -> None:
    net = MailboxNet(
        client("alice"),
        with_mailbox(messages=1, when_full=WhenFull.WAIT),
        limits=CoreLimits(wait_timeout=5.0),
    )
    alice = net.connect("alice")
    alice.message("bob", b"a", 1)
    alice.message("bob", b"b", 2)
    net.advance(4)
    assert alice.held
    net.advance(2)
    assert alice.error() == (2, "full")


def test_sender_that_holds_deliveries_never_waits_for_a_mailbox() -> None:
    net = MailboxNet(with_mailbox("alice"), with_mailbox(messages=1, when_full=WhenFull.WAIT))
    alice = net.connect("alice")
    open_mailbox(alice)
    alice.message("alice", b"to itself")
    assert seqs(alice) == [1]
    alice.message("bob", b"a", 1)
    alice.message("bob", b"b", 2)
    assert not alice.held
    assert alice.error() == (2, "full")


def test_mailbox_collects_on_while_each_batch_has_a_message_for_it() -> None:
    """Else the broker decides again: a change elsewhere may forbid the next message."""
    net = MailboxNet(client("alice"), with_mailbox(), with_mailbox("dora"))
    alice = net.connect("alice")
    alice.message("bob", b"x", 1)
    alice.message("bob", b"x", 2)
    assert net.box().most_messages
    alice.message("dora", b"x", 3)
    assert (net.box().most_messages, net.box("dora").most_messages) == (0, 1_000_000)
    assert [net.box(name).messages for name in ("bob", "dora")] == [2, 1]


@pytest.mark.parametrize("change", ["behind", "pause", "failure", "reload"])
def test_mailbox_collects_nothing_before_the_broker_decides_again(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    if change == "behind":
        monkeypatch.setattr(commits, "_UNCOMMITTED", 1)
    alice.message("bob", b"x", 1)
    if change == "pause":
        net.broker.mailboxes.pause()
    elif change == "failure":
        net.store.failure = FailureKind.IO
        net.answer()
    elif change == "reload":
        net.broker.mailboxes.configure(net.broker.exchange.clients["bob"])
    assert not net.box().most_messages


def test_sender_waits_while_the_disk_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_UNCOMMITTED", 100)
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"x" * 100, 1, receipt=True)
    alice.message("bob", b"x" * 100, 2, receipt=True)
    assert alice.held
    net.answer()
    assert receipts(alice) == [1, 2]


def test_event_goes_to_mailboxes_and_live_subscribers_once_each() -> None:
    net = MailboxNet(
        client("alice"),
        client("carl"),
        with_mailbox(subscribe=["orders.>"]),
        with_mailbox("dora", subscribe=["orders.*"]),
    )
    alice, carl, bob = net.connect("alice"), net.connect("carl"), net.connect("bob")
    for peer in (carl, bob):
        assert peer.ask("subscribe", topic="orders.>")
    for number in (1, 2):
        alice.publish("orders.new", b"x", number, receipt=True)
    assert receipts(alice) == [1, 2]
    assert len(carl.take()) == 2
    assert not bob.take()
    open_mailbox(bob)
    delivery, _ = bob.take()
    assert (delivery.kind, delivery.topic, delivery.seq, delivery.attempt) == (
        Kind.EVENT,
        "orders.new",
        1,
        1,
    )
    assert (delivery.name, delivery.payload) == ("alice", b"x")
    assert net.box("dora").ready_count == 2


def test_event_for_several_mailboxes_is_receipted_once_when_it_is_in_all() -> None:
    net = MailboxNet(
        client("alice"), *(with_mailbox(name, subscribe=[">"]) for name in ("bob", "dora"))
    )
    alice = net.connect("alice")
    alice.publish("a", b"x", 1, receipt=True)
    assert receipts(alice) == [1]
    assert net.box("bob").messages == net.box("dora").messages == 1


def test_event_that_some_mailboxes_refuse_names_them_and_a_resend_fills_the_gap() -> None:
    net = MailboxNet(
        client("alice"),
        with_mailbox(subscribe=[">"], messages=1),
        with_mailbox("dora", subscribe=["a"]),
    )
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"fills it")
    alice.publish("a", b"x", 1, receipt=True, extension={"key": "k"})
    refusal = error(alice)
    assert (refusal["code"], refusal["names"]) == ("full", ["bob"])
    assert net.box("dora").messages == 1
    open_mailbox(bob)
    (first,) = bob.take()
    ack(bob, first.seq)
    alice.publish("a", b"x", 2, receipt=True, extension={"key": "k"})
    assert receipts(alice) == [2]
    assert net.box("dora").messages == 1
    assert [envelope.payload for envelope in bob.take()] == [b"x"]


def test_io_error_leaves_messages_in_doubt_and_stops_storing_but_not_live_traffic() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"before")
    open_mailbox(bob)
    assert seqs(bob) == [1]
    net.store.failure = FailureKind.IO
    alice.message("bob", b"a", 1)
    assert alice.error() == (1, "in_doubt")
    alice.message("bob", b"b", 2)
    assert alice.error() == (2, "store_failed")
    ack(bob, 1)
    (refusal,) = bob.take()
    assert (refusal.kind, refusal.id, refusal.flags) == (Kind.ERROR, 1, Flag.ACK)
    assert json.loads(refusal.payload)["code"] == "store_failed"
    alice.request("bob", b"live", 3)
    assert [envelope.payload for envelope in bob.take()] == [b"live"]
    assert net.broker.mailboxes.commits.failure == "I/O error"


def test_io_error_tells_each_sender_of_a_delayed_message() -> None:
    """Those in the failed batches are in doubt, and the one in the open batch is refused."""
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    for number in (1, 2, 3):
        alice.message("bob", b"x", number, extension={"key": f"k{number}", "delay": 5})
    net.store.failure = FailureKind.IO
    net.answer()
    answers = {envelope.id: json.loads(envelope.payload)["code"] for envelope in alice.take()}
    assert answers == {1: "in_doubt", 2: "in_doubt", 3: "store_failed"}
    box = net.box()
    assert (box.messages, box.keys, box.size, box.uncommitted) == (0, 0, 0, 0)


def test_io_error_refuses_the_batches_behind_the_failed_one() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    net.store.failure = FailureKind.IO
    alice.message("bob", b"a", 1)
    alice.message("bob", b"b", 2)
    net.answer()
    assert [json.loads(envelope.payload)["code"] for envelope in alice.take()] == [
        "in_doubt",
        "in_doubt",
    ]


def test_full_disk_refuses_messages_and_takes_acks() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"before")
    open_mailbox(bob)
    bob.take()
    net.store.failure = FailureKind.FULL
    alice.message("bob", b"a", 1)
    refusal = error(alice)
    assert (refusal["code"], refusal["name"]) == ("full", "bob")
    ack(bob, 1, receipt=True)
    assert receipts(bob) == [1]
    assert net.box().messages == 0
    net.store.failure = None
    alice.message("bob", b"b", 2, receipt=True)
    assert receipts(alice) == [2]
    assert seqs(bob) == [3]


def test_message_of_a_client_that_has_left_is_delivered() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.message("bob", b"a", 1, receipt=True)
    alice.leave()
    net.answer()
    open_mailbox(bob)
    assert seqs(bob) == [1]


def test_finished_waits_for_messages_that_are_not_on_disk() -> None:
    net = MailboxNet(client("alice"), with_mailbox(), is_prompt=False)
    alice = net.connect("alice")
    alice.message("bob", b"a", 1)
    assert not net.broker.goaway.has_finished(alice.session)
    net.answer()
    assert net.broker.goaway.has_finished(alice.session)


def test_new_messages_during_drain_are_refused() -> None:
    net = MailboxNet(client("alice"), with_mailbox())
    alice = net.connect("alice")
    net.broker.drain()
    alice.message("bob", b"a", 1)
    assert alice.error() == (1, "shutting_down")


def test_message_of_a_sender_that_hears_nothing_more_is_stored() -> None:
    """It has had its half-close, and what it still sends is delivered where possible."""
    net = MailboxNet(client("alice"), with_mailbox())
    alice = net.connect("alice")
    net.broker.goaway.mute(alice.session)
    alice.message("bob", b"last", 5, receipt=True)
    assert (net.box().ready_count, alice.take(), alice.session.routes) == (1, [], {})
