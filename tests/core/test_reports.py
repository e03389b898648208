"""Reports of messages whose recipient has disconnected: reported to their senders,
passed on to another pool member, or lost.
"""

from __future__ import annotations

import pytest
from support.fake_network import FakeNet, client, error_of

from brokerd.config.values import WhenFull
from brokerd_client.wire import envelope

BODY = bytes(400)


def test_reports_count_reported_and_lost_messages() -> None:
    """A message is reported to its sender. A message whose sender has disconnected is
    lost, and so is an event.
    """
    net = FakeNet(client("alice"), client("bob"), client("carol"))
    alice, bob, carol = (net.connect(name) for name in ("alice", "bob", "carol"))
    bob.op("subscribe", topic="t")
    bob.block()
    bob.op("ping")
    alice.message("bob", BODY)
    alice.request("bob", BODY, message_id=2)
    alice.publish("t", BODY)
    carol.message("bob", BODY)
    carol.leave()
    assert bob.session.outbox.unsent == 5
    assert len(net.broker.reports) == 0

    net.broker.detach(bob.session, net.now)

    assert len(net.broker.reports) == 5
    net.settle()
    assert len(net.broker.reports) == 0
    assert net.broker.replies.returned == {"reported": 2, "lost": 2}
    assert [envelope.id for envelope in alice.take()] == [0, 2]


def test_reports_count_message_passed_on_to_pool_member() -> None:
    """In a pool a waiting message goes to another connection."""
    net = FakeNet(client("alice"), client("pool", connections=2))
    alice, first = net.connect("alice"), net.connect("pool")
    first.block()
    alice.message("pool", BODY)
    second = net.connect("pool")

    first.leave()

    assert net.broker.replies.returned == {"passed_on": 1}
    assert second.payloads() == [BODY]


@pytest.mark.parametrize("when_full", [WhenFull.WAIT, WhenFull.DROP_OLDEST])
def test_reports_of_message_passed_on_reach_no_later_connection(when_full: WhenFull) -> None:
    """Its sender had closed before another member got it. The sender's name is back when
    that member leaves.
    """
    net = FakeNet(client("alice"), client("pool", connections=2, when_full=when_full))
    alice, first, second = (net.connect(name) for name in ("alice", "pool", "pool"))
    first.block()
    second.block()
    for number in (1, 2):
        alice.message("pool", BODY, number)
    alice.leave()
    first.leave()
    alice = net.connect("alice")

    second.leave()

    assert alice.take() == []
    assert net.broker.replies.returned == {"passed_on": 1, "lost": 2}


@pytest.mark.parametrize("when_full", [WhenFull.WAIT, WhenFull.DROP_OLDEST])
def test_reports_of_later_connection_reach_it_beside_message_passed_on(
    when_full: WhenFull,
) -> None:
    """The member that gets an earlier connection's message has one of the later
    connection too, which is reported when that member leaves.
    """
    net = FakeNet(client("alice"), client("pool", connections=2, when_full=when_full))
    alice, first, second = (net.connect(name) for name in ("alice", "pool", "pool"))
    first.block()
    second.block()
    alice.message("pool", BODY, 1)
    alice.leave()
    alice = net.connect("alice")
    alice.message("pool", BODY, 2)
    assert (first.session.outbox.unsent, second.session.outbox.unsent) == (1, 1)

    first.leave()
    second.leave()

    assert (2, "offline") in [(answer.id, error_of(answer)) for answer in alice.take()]
    assert net.broker.replies.returned["passed_on"] == 1


@pytest.mark.parametrize("way", ["leave", "drop", "expire"])
def test_reports_do_not_decode_frame_again(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension was read when the frame arrived. Reading thousands of them again in
    one turn would block the event loop.
    """
    when_full = WhenFull.DROP_OLDEST if way == "drop" else WhenFull.WAIT
    net = FakeNet(client("alice"), client("bob", queue=2000, when_full=when_full))
    alice, bob = net.connect("alice"), net.connect("bob")
    bob.block()
    for message_id in range(3):
        alice.message(
            "bob",
            BODY,
            message_id=message_id,
            receipt=True,
            extension={"ttl": 5, "numbers": [1.5] * 20},
        )
    alice.take()
    read = []

    def extension(*arguments: object) -> None:
        read.append(arguments)
        raise AssertionError("an extension is read again")

    monkeypatch.setattr(envelope, "_extension", extension)
    if way == "leave":
        bob.leave()
    elif way == "drop":
        alice.message("bob", bytes(1900), message_id=9)
    else:
        net.advance(6)
        bob.read()

    assert {answer.id for answer in alice.take()} >= {1, 2}
    assert not read
