"""The table of requests that were received and may still be answered."""

from __future__ import annotations

from brokerd_client.message import Message
from brokerd_client.protocol.open_requests import OpenRequests
from brokerd_client.wire.layout import REQUEST_KIND


class Owner:
    """A client."""

    allow_pickle_from: frozenset[str] = frozenset()


def request(message_id: int, sender: str = "bob") -> Message:
    """Return a request."""
    return Message(REQUEST_KIND, message_id, sender, 0, b"", Owner())


def test_open_requests_take_returns_each_once() -> None:
    table: OpenRequests[Message] = OpenRequests()
    held = [request(1), request(2), request(1, "carol")]
    for each in held:
        table.add(each)

    assert table.take("carol", 1) is held[2]
    assert table.take("carol", 1) is None
    assert table.take("bob", 1) is held[0]
    table.clear()
    assert table.take("bob", 2) is None


def test_open_requests_forget_dropped_requests() -> None:
    """The table holds no request, and does not grow with those that were dropped."""
    table: OpenRequests[Message] = OpenRequests()
    held = request(0)
    table.add(held)
    for message_id in range(1, 10_000):
        table.add(request(message_id))

    assert len(table) < 600
    assert table.take("bob", 9_999) is None
    assert table.take("bob", 0) is held


def test_open_requests_many_held_are_searched_seldom() -> None:
    """A search for dropped requests follows only when the table has doubled."""
    table: OpenRequests[Message] = OpenRequests()
    held = [request(message_id) for message_id in range(2_000)]
    for each in held:
        table.add(each)

    assert len(table) == 2_000
    assert table.take("bob", 1_999) is held[-1]
