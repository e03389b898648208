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


def taken(net: FakeNet) -> list[tuple[str, str, str, str, int]]:
    """Return what was noted and not taken yet: event, whose, the other side, code, how
    often.
    """
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
def test_a_refusal_is_noted_with_both_names(to: str, code: str) -> None:
    """Who was refused, what it wanted to reach, and the code it was told."""
    net = FakeNet(
        client("alice", send_to=("bob", "nobody", "[$]*")), client("bob"), client("carol")
    )
    alice = net.connect("alice")

    alice.message(to, b"x")

    assert taken(net) == [("message.refused", "alice", to, code, 1)]


def test_a_flood_is_one_happening() -> None:
    """A thousand refusals of one kind are one entry with their number; taken, they are
    forgotten.
    """
    net = FakeNet(client("alice"), client("bob"))
    alice = net.connect("alice")

    for _ in range(1000):
        alice.message("bob", b"x")

    (only,) = net.broker.replies.log_events.take()
    assert (only.times, only.reason) == (1000, "bob is not connected")
    assert not net.broker.replies.log_events


def test_what_is_kept_is_bounded() -> None:
    """Whoever makes up a new name for each message makes a number grow, not the memory."""
    session: Any = object()
    log_events = LogEvents()

    for number in range(10 * MOST):
        log_events.note("message.refused", session, f"name{number}", "denied", "no")

    found = log_events.take()
    assert len(found) == MOST + 1
    assert sum(each.times for each in found) == 10 * MOST
    assert (found[-1].other, found[-1].times) == ("", 9 * MOST)


def full_queue(when_full: WhenFull) -> tuple[FakeNet, Any, Any]:
    """Return a net in which bob reads nothing and his queue is full."""
    net = FakeNet(
        client("alice"),
        client("bob", queue=1000, when_full=when_full),
        limits=CoreLimits(wait_timeout=5.0),
    )
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for _ in range(2):
        alice.message("bob", BODY)
    assert taken(net) == []
    return net, alice, bob


def test_a_slow_client_is_noted_once_until_it_has_read_everything() -> None:
    """Slow when its queue is full, and who found it so; recovered when nothing waits
    any more.
    """
    net, alice, bob = full_queue(WhenFull.REFUSE)

    for _ in range(3):
        alice.message("bob", BODY)
    assert taken(net) == [
        ("client.slow", "bob", "alice", "refuse", 1),
        ("message.refused", "alice", "bob", "full", 3),
    ]
    bob.read(600)
    assert taken(net) == []
    bob.read()
    assert taken(net) == [("client.recovered", "bob", "", "", 1)]
    bob.block()
    for _ in range(3):
        alice.message("bob", BODY)
    assert taken(net)[0][0] == "client.slow"


def test_a_held_sender_is_noted() -> None:
    """Who is held for whom, and what came of it when the time was over."""
    net, alice, _ = full_queue(WhenFull.WAIT)

    alice.message("bob", BODY, id=7)

    assert taken(net) == [
        ("client.slow", "bob", "alice", "wait", 1),
        ("client.held", "alice", "bob", "", 1),
    ]
    net.advance(6)
    assert taken(net) == [("message.refused", "alice", "bob", "full", 1)]


def test_a_dropped_message_is_noted_with_both_names() -> None:
    """With drop_oldest: whose queue it was in and who sent it."""
    net, alice, _ = full_queue(WhenFull.DROP_OLDEST)

    alice.message("bob", BODY)

    assert taken(net) == [
        ("client.slow", "bob", "alice", "drop_oldest", 1),
        ("message.dropped", "bob", "alice", "drop_oldest", 1),
    ]


def test_what_nobody_can_be_told_of_is_noted() -> None:
    """A message whose recipient and sender are both gone."""
    net = FakeNet(client("alice"), client("bob"))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    alice.message("bob", BODY)

    alice.leave()
    bob.leave()

    assert taken(net) == [("message.dropped", "bob", "alice", "offline", 1)]


def test_an_event_that_found_no_room_is_noted() -> None:
    """Which subscriber did not get whose event."""
    net, alice, bob = full_queue(WhenFull.REFUSE)
    bob.op("subscribe", topic="news")
    taken(net)

    alice.publish("news", BODY)

    assert taken(net)[-1] == ("message.dropped", "bob", "alice", "full", 1)


def test_an_error_that_reaches_nobody_is_noted() -> None:
    """A client's own ERROR that the broker does not serve is dropped, with a note."""
    net = FakeNet(client("alice"), client("bob"))
    alice = net.connect("alice")

    alice.send_bytes(_error_to("$broker"))

    assert taken(net) == [("message.dropped", "alice", "$broker", "unsupported", 1)]


def _error_to(name: str) -> bytes:
    from brokerd_client.wire.envelope import Envelope, encode
    from brokerd_client.wire.framing import frame

    return frame(encode(Envelope(Kind.ERROR, 1, name, b"{}", codec=2)))


def test_a_subscription_ended_by_new_rules_is_noted() -> None:
    """Whose it was, the topic and the group."""
    net = FakeNet(client("alice"))
    alice = net.connect("alice")
    for topic, group in (("a.b", None), ("c", "g"), ("ok", None)):
        alice.op("subscribe", topic=topic, **({} if group is None else {"group": group}))

    net.broker.reconfigure(
        {"alice": client("alice", subscribe=("ok",))}, net.broker.status.limits, 0.0
    )
    net.settle()

    assert sorted(taken(net)) == [
        ("client.unsubscribed", "alice", "a.b", "", 1),
        ("client.unsubscribed", "alice", "c", "g", 1),
    ]


def test_what_an_administrator_asks_is_noted() -> None:
    """Who asked for what, about whom; somebody who is none is denied."""
    net = FakeNet(client("root", admin=True), client("alice"))
    root, alice = net.connect("root"), net.connect("alice")

    root.op("disconnect", address="alice")
    root.op("disconnect", address=["alice"])
    root.op("stats")
    assert taken(net) == [
        ("admin.asked", "root", "alice", "disconnect", 1),
        ("admin.asked", "root", "", "disconnect", 1),
        ("message.refused", "root", "$broker", "unsupported", 1),
        ("admin.asked", "root", "", "stats", 1),
    ]
    assert alice.gone
    net.connect("alice").op("drain")
    assert taken(net) == [("message.refused", "alice", "$broker", "denied", 1)]
