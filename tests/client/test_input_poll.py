"""Polls of a blocking client's waiting threads: for input that is near, rarely in vain."""

from __future__ import annotations

import pytest
from support.waiting import until

import brokerd_client
from brokerd.testing import running
from brokerd_client.blocking.input_poll import InputPoll


class _Input:
    """Input that comes after some looks, between which some time passes.

    Attributes:
        now: The time in seconds.
        looks: Looks so far.
        comes_after: Looks until the input is there.
        step: Seconds between two looks.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.looks = 0
        self.comes_after = 1
        self.step = 100e-6

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        assert timeout == 0
        self.looks += 1
        self.comes_after -= 1
        return [(1, 1)] if self.comes_after <= 0 else []

    def give_way(self) -> None:
        self.now += self.step


def poll_of(source: _Input, *, may_poll: bool = True) -> InputPoll:
    """Return the polls for an input."""
    return InputPoll(may_poll=may_poll, clock=lambda: source.now, give_way=source.give_way)


def looks_for(poll: InputPoll, source: _Input, comes_after: int) -> int:
    """Return how many looks a wait made; it has found the input if it made all of them."""
    source.looks, source.comes_after = 0, comes_after
    found = poll.run(source)
    assert found == (source.comes_after <= 0)
    return source.looks


def left_out(poll: InputPoll, source: _Input) -> int:
    """Return how many waits had no poll before the next one with a poll."""
    count = 0
    while not looks_for(poll, source, 1):
        count += 1
    return count


def test_input_poll_lasts_until_the_input() -> None:
    source = _Input()
    poll = poll_of(source)
    assert [looks_for(poll, source, number) for number in (3, 1, 2)] == [3, 1, 2]


def test_input_poll_ends_after_a_moment() -> None:
    source = _Input()
    assert looks_for(poll_of(source), source, 100) <= 5


def test_input_poll_in_vain_makes_the_next_ones_rare() -> None:
    """A slow peer costs little: each poll in vain doubles the waits without one."""
    source = _Input()
    poll = poll_of(source)
    waits = []
    for _ in range(9):
        count = 0
        while not looks_for(poll, source, 100):
            count += 1
        waits.append(count)
    assert waits == [0, 1, 2, 4, 8, 16, 32, 64, 64]
    # One that finds input makes them frequent again.
    assert left_out(poll, source) == 64
    looks_for(poll, source, 100)
    assert left_out(poll, source) == 1


def test_input_poll_that_loses_the_processor_ends_and_rests() -> None:
    """A program that keeps the processor needs it more; it may go on, so the rests grow."""
    source = _Input()
    poll = poll_of(source)
    rests = []
    for _ in range(8):
        source.step = 0.003
        assert looks_for(poll, source, 100) == 1
        source.step = 100e-6
        began = source.now
        while not looks_for(poll, source, 1):
            source.now += 0.01
        rests.append(source.now - began)
    assert rests == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0], rel=0.3)
    # Polls that find input make the rests short again.
    for _ in range(1000):
        looks_for(poll, source, 1)
    source.step = 0.003
    looks_for(poll, source, 100)
    source.now += 0.051
    assert looks_for(poll, source, 1)


def test_input_poll_where_it_may_not_is_none() -> None:
    """With one processor, or a quota, the peer needs the time."""
    source = _Input()
    assert not looks_for(poll_of(source, may_poll=False), source, 1)


def test_requests_one_at_a_time_are_polled_for_at_both_ends() -> None:
    """As soon as threads come back for input at once, so that they keep it."""
    with (
        running({"alice": {}, "bob": {}}) as broker,
        broker.connect("alice") as alice,
        broker.connect("bob") as bob,
    ):
        bob.on_request(lambda request: request.payload)
        polls = [_Counted(client) for client in (alice, bob)]

        def polled() -> bool:
            for _ in range(50):
                alice.request("bob", b"x")
            return all(each.runs for each in polls)

        until(polled)


class _Counted:
    """Counts the polls of a client in place of its own, and finds nothing."""

    def __init__(self, client: brokerd_client.Client) -> None:
        self.runs = 0
        client._transport.input_poll = self  # type: ignore[assignment]

    def run(self, poll: object) -> bool:
        assert poll is not None
        self.runs += 1
        return False
