"""Polls of the store process: for a lone message that is near, and rarely in vain."""

from __future__ import annotations

import pytest

from brokerd.store.request_poll import RequestPoll


class _Socket:
    """A socket whose next request comes after some polls, of a tenth of a millisecond each.

    Attributes:
        now: The time in seconds.
        polls: Polls so far.
        comes_after: Polls until the request is there.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.polls = 0
        self.comes_after = 1
        self.step = 100e-6

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        assert timeout == 0
        self.now += self.step
        self.polls += 1
        self.comes_after -= 1
        return [(1, 1)] if self.comes_after <= 0 else []


def poll_of(sock: _Socket, *, may_poll: bool = True) -> RequestPoll:
    """Return the polls of a socket."""
    return RequestPoll(sock, may_poll=may_poll, clock=lambda: sock.now)


def polls_of(poll: RequestPoll, sock: _Socket, comes_after: int) -> int:
    """Return how often a socket was polled for a request that comes after some polls."""
    sock.polls, sock.comes_after = 0, comes_after
    poll.run()
    return sock.polls


def test_request_poll_lasts_until_the_request() -> None:
    """Each later request is polled for, too."""
    sock = _Socket()
    poll = poll_of(sock)
    assert [polls_of(poll, sock, number) for number in (3, 1, 2)] == [3, 1, 2]


def test_request_poll_gives_way_after_each_look() -> None:
    """The client that is to send the request may wait for this very processor."""
    sock = _Socket()
    polls: list[int] = []
    poll = RequestPoll(
        sock, may_poll=True, clock=lambda: sock.now, give_way=lambda: polls.append(sock.polls)
    )
    assert polls_of(poll, sock, 3) == 3
    assert polls == [1, 2]


def test_request_poll_that_loses_the_processor_ends_and_the_next_ones_rest_longer() -> None:
    """It gave the processor away, and another program kept it."""
    sock = _Socket()
    sock.step = 0.0
    kept_s = 300e-6

    def give_way() -> None:
        sock.now += kept_s

    poll = RequestPoll(sock, may_poll=True, clock=lambda: sock.now, give_way=give_way)
    rests = []
    for _ in range(9):
        assert polls_of(poll, sock, 3) == 1
        lost_at = sock.now
        while not polls_of(poll, sock, 3):
            sock.now += 0.001
        rests.append(sock.now - lost_at)
        sock.now += 2.0
    # The poll that ends each rest doubles the next one, too.
    assert rests == pytest.approx([0.01, 0.04, 0.16, 0.64, 1, 1, 1, 1, 1], abs=0.002)

    kept_s = 0.0
    assert all(polls_of(poll, sock, 1) for _ in range(100))
    kept_s = 300e-6
    assert polls_of(poll, sock, 3) == 1
    sock.now += 0.011
    assert polls_of(poll, sock, 1) == 1


def test_request_poll_in_vain_makes_the_next_ones_rare() -> None:
    """A client that sends a message now and then costs little."""
    sock = _Socket()
    poll = poll_of(sock)
    polled = [polls_of(poll, sock, 1000) > 0 for _ in range(15)]
    assert [number for number, was in enumerate(polled) if was] == [0, 2, 5, 10]


def test_request_poll_rests_when_the_processor_was_taken_away() -> None:
    """Other programs need it: nothing is polled for a second."""
    sock = _Socket()
    poll = poll_of(sock)
    sock.step = 0.01
    assert polls_of(poll, sock, 1000) == 1
    sock.step = 100e-6
    assert not any(polls_of(poll, sock, 1) for _ in range(5))
    sock.now += 1.1
    assert polls_of(poll, sock, 1) == 1


def test_request_poll_where_it_may_not_is_none() -> None:
    """With one processor, or a quota, the broker and its clients need the time."""
    sock = _Socket()
    assert polls_of(poll_of(sock, may_poll=False), sock, 1) == 0
