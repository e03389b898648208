"""Polls for the store's answers: for a lone one that is near, and rarely in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from brokerd.store.answer_poll import AnswerPoll


class _Loop:
    """An event loop whose turns, and whose time, are the test's."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def turn(self, seconds: float = 0.0) -> bool:
        """Do one turn; return whether the next one will not sleep."""
        self.now += seconds
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        return bool(self.calls)


@pytest.fixture
def loop() -> _Loop:
    return _Loop()


def poll_of(loop: _Loop, *, may_poll: bool = True) -> AnswerPoll:
    """Return the polls of a loop."""
    return AnswerPoll(loop, may_poll=may_poll, clock=lambda: loop.now)  # type: ignore[arg-type]


def is_polled(poll: AnswerPoll, loop: _Loop) -> bool:
    """Return whether a wait is polled for; its answer comes at once."""
    poll.begin()
    polls = loop.turn()
    poll.end()
    loop.turn()
    return polls


def test_answer_poll_lasts_until_the_answer(loop: _Loop) -> None:
    """The loop does not sleep before it, and does after it."""
    poll = poll_of(loop)
    poll.begin()
    assert loop.turn(100e-6)
    assert loop.turn(100e-6)
    poll.end()
    assert not loop.turn(10e-6)
    # A wait that begins before the poll has ended prolongs it.
    poll.begin()
    poll.end()
    poll.begin()
    assert len(loop.calls) == 1
    assert loop.turn(300e-6)


def test_answer_poll_gives_way_in_each_turn(loop: _Loop) -> None:
    """The store process may wait for this very processor, to write the batch."""
    given: list[float] = []
    poll = AnswerPoll(
        loop,  # type: ignore[arg-type]
        may_poll=True,
        clock=lambda: loop.now,
        give_way=lambda: given.append(loop.now),
    )
    poll.begin()
    loop.turn(100e-6)
    loop.turn(100e-6)
    poll.end()
    loop.turn(100e-6)
    assert given == pytest.approx([100.0001, 100.0002])


def test_answer_poll_ends_when_another_program_keeps_the_processor(loop: _Loop) -> None:
    """It gave it away, and got it back too late: nothing is polled for a moment."""

    def give_way() -> None:
        loop.now += 300e-6

    poll = AnswerPoll(
        loop,  # type: ignore[arg-type]
        may_poll=True,
        clock=lambda: loop.now,
        give_way=give_way,
    )
    poll.begin()
    assert not loop.turn()
    poll.end()
    assert not any(is_polled(poll, loop) for _ in range(5))
    loop.now += 0.011
    poll.begin()
    assert loop.calls


def test_answer_poll_without_an_answer_makes_the_next_ones_rare(loop: _Loop) -> None:
    """A slow disk costs little: each poll in vain doubles the waits without one."""
    poll = poll_of(loop)
    left_out = []
    for _ in range(4):
        count = 0
        while not is_polled(poll, loop):
            count += 1
        left_out.append(count)
        poll.begin()
        assert not loop.turn(500e-6)
        poll.end()
    assert left_out == [0, 1, 1, 1]

    loop = _Loop()
    poll = poll_of(loop)
    waits = []
    for _ in range(15):
        poll.begin()
        waits.append(bool(loop.calls))
        loop.turn(500e-6)
        poll.end()
    assert [number for number, polled in enumerate(waits) if polled] == [0, 2, 5, 10]


def test_answer_poll_rests_when_the_processor_was_taken_away(loop: _Loop) -> None:
    """Other programs need it: nothing is polled for a second."""
    poll = poll_of(loop)
    poll.begin()
    loop.turn(0.01)
    poll.end()
    loop.now += 0.5
    assert not any(is_polled(poll, loop) for _ in range(5))
    loop.now += 0.6
    assert is_polled(poll, loop)


def test_answer_poll_where_it_may_not_is_none(loop: _Loop) -> None:
    """With one processor, or a quota, the store needs the time."""
    assert not is_polled(poll_of(loop, may_poll=False), loop)
