"""Log events of the core: each with its session, the other side and the reason, and
counted when it repeats itself.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_network import FakeNet, client

from brokerd.config.values import WhenFull
from brokerd.core.broker import CoreLimits
from brokerd.core.log_events import MOST, LogEvents
from brokerd_client.wire.envelope import Kind

BODY = bytes(400)


def take(net: FakeNet) -> list[tuple[str, str, str, str, int]]:
    """Take the noted log events: event, address, other side, code, how often."""
    return [
        (each.event, each.session.address, each.other, str(each.code), each.times)
        for each in net.broker.replies.log_events.take()
    ]


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("nobody", "no_such_client"),
        ("bob", "offline"),
        ("carol", "denied"),
        ("$none", "no_such_client"),
    ],
)
def test_log_event_of_refusal_has_both_names(to: str, code: str) -> None:
    """The log event names the refused client, the recipient it wanted, and the code it
    received.
    """
    net = FakeNet(
        client("alice", send_to=("bob", "nobody", "[$]*")), client("bob"), client("carol")
    )
    alice = net.connect("alice")

    alice.message(to, b"x")

    assert take(net) == [("message.refused", "alice", to, code, 1)]


def test_log_events_repeated_are_counted_as_one() -> None:
    """A thousand refusals of one kind are one entry with their number; once taken, they
    are forgotten.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice = net.connect("alice")

    for _ in range(1000):
        alice.message("bob", b"x")

    (only,) = net.broker.replies.log_events.take()
    assert (only.times, only.reason) == (1000, "bob is not connected")
    assert not net.broker.replies.log_events


def test_log_events_with_many_names_are_bounded() -> None:
    """A client that invents a new name for each message increases a number, not the
    memory used.
    """
    session: Any = object()
    log_events = LogEvents()

    for number in range(10 * MOST):
        log_events.note("message.refused", session, f"name{number}", "denied", "no")

    events = log_events.take()
    assert len(events) == MOST + 1
    assert sum(each.times for each in events) == 10 * MOST
    assert (events[-1].other, events[-1].times) == ("", 9 * MOST)


def full_queue(when_full: WhenFull) -> tuple[FakeNet, Any, Any]:
    """Return a net in which bob reads nothing and its queue is full."""
    net = FakeNet(
        client("alice"),
        client("bob", queue=1000, when_full=when_full),
        limits=CoreLimits(wait_timeout=5.0),
    )
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for _ in range(2):
        alice.message("bob", BODY)
    assert take(net) == []
    return net, alice, bob


def test_log_event_of_slow_client_is_noted_once_until_recovered() -> None:
    """The client is slow when its queue is full, and recovered when nothing waits any
    more. The log event names the sender.
    """
    net, alice, bob = full_queue(WhenFull.REFUSE)

    for _ in range(3):
        alice.message("bob", BODY)
    assert take(net) == [
        ("client.slow", "bob", "alice", "refuse", 1),
        ("message.refused", "alice", "bob", "full", 3),
    ]
    bob.read(600)
    assert take(net) == []
    bob.read()
    assert take(net) == [("client.recovered", "bob", "", "", 1)]
    bob.block()
    for _ in range(3):
        alice.message("bob", BODY)
    assert take(net)[0][0] == "client.slow"


def test_log_event_of_held_sender_names_recipient() -> None:
    """The log event names the held sender and its recipient; the refusal at the timeout
    is noted too.
    """
    net, alice, _ = full_queue(WhenFull.WAIT)

    alice.message("bob", BODY, message_id=7)

    assert take(net) == [
        ("client.slow", "bob", "alice", "wait", 1),
        ("client.held", "alice", "bob", "", 1),
    ]
    net.advance(6)
    assert take(net) == [("message.refused", "alice", "bob", "full", 1)]


def test_log_event_of_dropped_message_has_both_names() -> None:
    """With drop_oldest, the log event names the owner of the queue and the sender."""
    net, alice, _ = full_queue(WhenFull.DROP_OLDEST)

    alice.message("bob", BODY)

    assert take(net) == [
        ("client.slow", "bob", "alice", "drop_oldest", 1),
        ("message.dropped", "bob", "alice", "drop_oldest", 1),
    ]


def test_log_event_of_lost_message_is_noted() -> None:
    """The recipient and the sender of the message have both disconnected."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", BODY)

    alice.leave()
    bob.leave()

    assert take(net) == [("message.dropped", "bob", "alice", "offline", 1)]


def test_log_event_of_dropped_event_names_subscriber_and_publisher() -> None:
    """The log event names the subscriber that missed the event, and its publisher."""
    net, alice, bob = full_queue(WhenFull.REFUSE)
    bob.op("subscribe", topic="news")
    take(net)

    alice.publish("news", BODY)

    assert take(net)[-1] == ("message.dropped", "bob", "alice", "full", 1)


def test_log_event_of_undeliverable_error_is_noted() -> None:
    """A client's own ERROR to the broker is dropped, and the drop is noted."""
    net = FakeNet(client("alice"), client("bob"))
    alice = net.connect("alice")

    alice.send_bytes(_error_to("$broker"))

    assert take(net) == [("message.unreported", "alice", "$broker", "unsupported", 1)]


def _error_to(name: str) -> bytes:
    from brokerd_client.wire.envelope import Envelope, encode
    from brokerd_client.wire.framing import frame

    return frame(encode(Envelope(Kind.ERROR, 1, name, b"{}", codec=2)))


def test_log_event_of_subscription_ended_by_reload_is_noted() -> None:
    """The log event names the subscriber, the topic and the group."""
    net = FakeNet(client("alice"))
    alice = net.connect("alice")
    for topic, group in (("a.b", None), ("c", "g"), ("ok", None)):
        alice.op("subscribe", topic=topic, **({} if group is None else {"group": group}))

    net.broker.reconfigure(
        {"alice": client("alice", subscribe=("ok",))}, net.broker.status.limits, 0.0
    )
    net.settle()

    assert sorted(take(net)) == [
        ("client.unsubscribed", "alice", "a.b", "", 1),
        ("client.unsubscribed", "alice", "c", "g", 1),
    ]


def test_log_event_of_admin_operation_is_noted() -> None:
    """The log event names the administrator, the operation and the client it is about.
    A client that is not an administrator is denied.
    """
    net = FakeNet(client("root", admin=True), client("alice"))
    root, alice = net.connect("root"), net.connect("alice")

    root.op("disconnect", address="alice")
    root.op("disconnect", address=["alice"])
    root.op("stats")
    assert take(net) == [
        ("admin.asked", "root", "alice", "disconnect", 1),
        ("admin.asked", "root", "", "disconnect", 1),
        ("message.refused", "root", "$broker", "unsupported", 1),
        ("admin.asked", "root", "", "stats", 1),
    ]
    assert alice.gone
    net.connect("alice").op("drain")
    assert take(net) == [("message.refused", "alice", "$broker", "denied", 1)]
