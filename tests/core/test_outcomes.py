"""Every message has one outcome: what went wrong once, as small as it can be told."""

from __future__ import annotations

import pytest
from core.fakenet import FakeNet, client, error_of

from brokerd.config.values import WhenFull
from brokerd_client.wire.envelope import Kind


def test_a_frame_after_a_held_one_begins_anew() -> None:
    """A frame that was held and then passed leaves nothing behind that the next frame is judged by."""
    net = FakeNet(client("ann"), client("bob", queue=100))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"the route is known from here on")
    bob.take()
    bob.block()
    for _ in range(3):
        ann.message("bob", b"x" * 40)
    assert ann.held
    net.advance(25)
    bob.read()
    assert not ann.held

    ann.message("bob", b"in time", 7, extension={"ttl": 10})

    assert ann.take() == []
    assert bob.payloads()[-1] == b"in time"
