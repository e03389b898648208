"""The messages between the broker and its store process."""

from __future__ import annotations

import struct

import pytest
from support.store_requests import append

from brokerd.core.mailboxes.journal import Batch, Change, Remove, Revive
from brokerd.store.messages import Received, commit_message, message, records_of


def test_messages_batch_arrives_as_sent() -> None:
    """All kinds of records keep their order and their fields."""
    records = (
        Remove("bob", ((1, 5), (7, 7))),
        append("bob", 8, b"one", b"two"),
        Change("bob", 8, "dead", 3, None, "r", "é", "carol/1", 5.5),
        Revive("bob", 8, 10, 4),
        append("carol", 1, b"three"),
    )
    received = Received(b"".join(commit_message(Batch(7, records))))

    (batch,) = received.take()

    assert (batch.word, batch.arguments[0]) == ("commit", 7)
    removed, first, changed, revived, second = records_of(batch)
    assert removed == ("r", "bob", ((1, 5), (7, 7)))
    assert (first[:3], bytes(first[4])) == (("a", "bob", 8), b"onetwo")
    assert (changed[1], revived[1]) == (records[2], records[3])
    assert (second[:3], bytes(second[4])) == (("a", "carol", 1), b"three")


def test_messages_arriving_in_pieces_are_returned_when_whole() -> None:
    """A message is returned with its last byte, and the next one is not touched."""
    sent = b"".join([*message("first", 1, body=[b"abc"]), *message("second")])
    received = Received()
    words = []

    for byte in sent:
        received.add(bytes([byte]))
        words += [(each.word, bytes(each.body)) for each in received.take()]

    assert words == [("first", b"abc"), ("second", b"")]


def test_messages_are_returned_one_by_one() -> None:
    """The messages behind one that was returned wait, and more may arrive meanwhile."""
    received = Received(b"".join(message("first", body=[b"abc"])))
    first = received.next()
    assert first is not None
    assert (first.word, bytes(first.body)) == ("first", b"abc")
    assert received.next() is None

    assert not received

    received.add(b"".join([*message("second"), *message("third")]))

    assert received
    words = [each.word for each in iter(received.next, None)]
    assert words == ["second", "third"]
    assert not received


def test_messages_absurd_size_is_refused() -> None:
    """Bytes that are not messages end the connection, before memory is taken for them."""
    with pytest.raises(ValueError, match="malformed"):
        Received(struct.pack("!IQ", 1 << 30, 0)).take()
