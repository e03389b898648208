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


@pytest.mark.parametrize("when_full", [WhenFull.WAIT, WhenFull.DROP_OLDEST])
def test_a_name_that_came_back_hears_nothing_of_its_predecessors_messages(when_full: WhenFull) -> None:
    """A connection hears of its own messages only, though an earlier one with its name had the same ids."""
    net = FakeNet(client("ann"), client("bob", when_full=when_full))
    first, bob = net.connect("ann"), net.connect("bob")
    bob.block(5)
    first.message("bob", b"from the first", 1)
    first.request("bob", b"from the first", 2)
    first.leave()
    second = net.connect("ann")
    second.message("bob", b"from the second", 1)
    second.request("bob", b"from the second", 2)

    bob.leave()

    assert [(each.id, error_of(each)) for each in second.take()] == [(1, "offline"), (2, "offline")]
    assert net.broker.dropped == 2


def test_what_a_predecessor_left_is_forgotten_once_it_is_taken() -> None:
    """The bytes of a sender that went are told from its successor's by their place, however many passed since."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    bob.block()
    ann.message("bob", b"x" * 200_000)
    ann.leave()
    second = net.connect("ann")
    second.message("bob", b"y" * 1000, 3)
    bob.read(200_100)
    second.message("bob", b"z" * 1000, 4)
    bob.leave()
    assert [each.id for each in second.take()] == [3, 4]


def test_a_client_that_drops_the_oldest_never_loses_an_answer() -> None:
    """Answers to what a client sent itself are not dropped for newer messages: they are its outcomes."""
    net = FakeNet(client("ann", when_full=WhenFull.DROP_OLDEST, queue=500), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 5)
    ann.block()
    bob.reply("ann", b"!", 5)
    ann.message("bob", b"", 6, receipt=True)
    ann.message("nobody", b"", 7)
    for number in range(50):
        bob.message("ann", b"%2d" % number * 10)
    ann.read()

    got = ann.take()

    assert [(each.kind, each.id) for each in got[:3]] == [(Kind.REPLY, 5), (Kind.RECEIPT, 6), (Kind.ERROR, 7)]
    assert got[-1].payload == b"49" * 10


def test_where_only_answers_wait_there_is_nothing_to_drop() -> None:
    """A message that finds no room although nothing may be dropped is refused, and nothing was dropped for it."""
    net = FakeNet(client("ann", when_full=WhenFull.DROP_OLDEST, queue=150), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.block()
    ann.message("nobody", b"", 1)
    bob.message("ann", b"small", 2)
    bob.message("ann", b"x" * 140, 3, receipt=True)
    assert bob.error() == (3, "full")
    ann.read()
    assert [each.id for each in ann.take()] == [1, 2]


def test_a_reply_that_found_no_room_may_be_given_again() -> None:
    """A request stays unanswered while its REPLY is refused: it may be repeated, and goes with the responder."""
    net = FakeNet(client("ann", when_full=WhenFull.REFUSE, queue=60), client("bob", send_to=[]))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.request("bob", b"?", 9)
    ann.block(1)
    bob.reply("ann", b"x" * 10, 9)
    ann.request("bob", b"?", 10)
    bob.take()
    bob.reply("ann", b"y" * 30, 10)
    assert bob.error() == (10, "full")
    ann.read()
    bob.reply("ann", b"again", 10)
    assert ann.payloads() == [b"x" * 10, b"again"]
    assert bob.take() == []
