"""Messages to clients that were online before a restart, and are not back yet."""

from __future__ import annotations

import pytest
from support.fake_network import FakeNet, client

from brokerd_client.wire.envelope import Kind


def restarted(*names: str, grace: float = 30.0, **changes: object) -> FakeNet:
    """Return a net that has restarted; bob was online before."""
    net = FakeNet(client("alice"), client("carol"), client("bob", **changes), client("dave"))
    net.broker.returning.begin(names or ("bob",), net.now + grace)
    return net


@pytest.mark.parametrize("connections", [1, 2])
def test_returning_client_gets_messages_sent_meanwhile_in_order(connections: int) -> None:
    """Senders are held, and released when the client is back; a request waits too."""
    net = restarted(connections=connections)
    alice, carol = net.connect("alice"), net.connect("carol")
    alice.message("bob", b"1")
    alice.message("bob", b"2")
    carol.request("bob", b"?", 5)
    assert alice.held
    assert carol.held
    assert alice.take() == carol.take() == []

    bob = net.connect("bob")

    assert not alice.held
    got = bob.take()
    assert [each.payload for each in got if each.name == "alice"] == [b"1", b"2"]
    assert [(each.kind, each.id) for each in got if each.name == "carol"] == [(Kind.REQUEST, 5)]
    assert len(net.broker.returning) == 0


def test_returning_client_that_stays_away_is_offline_when_time_is_over() -> None:
    """The held message is refused then, and the next one at once."""
    net = restarted(grace=10.0)
    alice = net.connect("alice")
    alice.message("bob", b"x", 3)
    net.advance(9)
    assert alice.take() == []

    net.advance(2)

    assert alice.error() == (3, "offline")
    alice.message("bob", b"x", 4)
    assert alice.error() == (4, "offline")
    assert len(net.broker.returning) == 0


def test_returning_does_not_hold_messages_to_other_clients() -> None:
    """A client that was offline before is offline; so is one connection of a pool."""
    net = restarted(connections=2)
    alice = net.connect("alice")
    alice.message("dave", b"x", 1)
    assert alice.error() == (1, "offline")
    alice.message("bob/1", b"x", 2)
    assert alice.error() == (2, "offline")


def test_returning_client_that_leaves_again_is_offline() -> None:
    """It is waited for once."""
    net = restarted()
    net.connect("bob").leave()
    alice = net.connect("alice")
    alice.message("bob", b"x", 1)
    assert alice.error() == (1, "offline")


def test_returning_message_with_ttl_expires_in_time() -> None:
    """The sender is not held for longer than its message is wanted."""
    net = restarted()
    alice = net.connect("alice")
    alice.message("bob", b"x", 1, extension={"ttl": 2})
    net.advance(3)
    assert alice.error() == (1, "expired")


def test_returning_sender_that_leaves_is_forgotten() -> None:
    """The client that comes back gets nothing, and nothing fails."""
    net = restarted()
    alice = net.connect("alice")
    alice.message("bob", b"x")
    alice.leave()
    assert net.connect("bob").take() == []
    assert not net.broker.held.deadlines


def test_returning_sender_held_at_drain_is_refused() -> None:
    """A drain waits for no client."""
    net = restarted()
    alice = net.connect("alice")
    alice.message("bob", b"x", 1)
    net.broker.drain()
    net.settle()
    assert alice.error() == (1, "shutting_down")


def test_returning_goes_on_after_an_upgrade_with_the_time_that_is_left() -> None:
    """A held sender stays held; its message arrives, or is refused when the time is over."""
    net = restarted("bob", "dave")
    alice, carol = net.connect("alice"), net.connect("carol")
    alice.message("bob", b"x", 1)
    carol.message("dave", b"y", 2)
    net.advance(10)

    net.hand_over()

    assert net.connect("bob").payloads() == [b"x"]
    net.advance(19)
    assert carol.take() == []
    net.advance(2)
    assert carol.error() == (2, "offline")
    assert alice.take() == []


def test_returning_hold_is_noted() -> None:
    """The log tells what the sender waits for."""
    net = restarted("bob", "dave")
    net.connect("alice").message("bob", b"x")
    (event,) = net.broker.replies.log_events.take()
    assert (event.event, event.session.address, event.other) == ("client.held", "alice", "bob")
    assert sorted(net.broker.returning.names()) == ["bob", "dave"]
