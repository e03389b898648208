"""Polls of the event loop where reads follow each other closely."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

from support.running_daemon import configuration, running_daemon

from brokerd.net.connection.busy_poll import BusyPoll

#: Seconds between two reads.
CLOSE, NEAR, FAR = 20e-6, 100e-6, 0.01


class Loop:
    """An event loop whose turns the test makes, and its clock."""

    def __init__(self, *, may_poll: bool = True) -> None:
        self.now = 100.0
        self.scheduled: list[Callable[[], None]] = []
        self.poll = BusyPoll(
            cast("asyncio.AbstractEventLoop", self), clock=lambda: self.now, may_poll=may_poll
        )

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.scheduled.append(callback)

    @property
    def polls(self) -> bool:
        """Whether the loop's next turn does not wait."""
        return bool(self.scheduled)

    def read(self, count: int, pause: float) -> None:
        """Read ``count`` times, each after a pause."""
        for _ in range(count):
            self.pass_time(pause)
            self.poll.begin_read()
            self.poll.end_read()

    def pass_time(self, seconds: float) -> None:
        """Make a turn of the loop after some time."""
        self.now += seconds
        callbacks, self.scheduled = self.scheduled, []
        for callback in callbacks:
            callback()


def test_busy_poll_follows_close_reads_and_ends_without_one() -> None:
    loop = Loop()
    loop.read(8, CLOSE)
    assert not loop.polls
    loop.read(1, CLOSE)
    assert loop.polls
    loop.read(50, CLOSE)
    assert len(loop.scheduled) == 1
    loop.pass_time(50e-6)
    assert loop.polls
    loop.pass_time(50e-6)
    assert not loop.polls


def test_busy_poll_after_distant_reads_does_not_begin() -> None:
    loop = Loop()
    for _ in range(20):
        loop.read(1, FAR)
        loop.read(7, CLOSE)
        assert not loop.polls


def test_busy_poll_after_near_reads_is_tried_ever_more_rarely() -> None:
    """A sleep may be all that parts them. If it was, the poll goes on."""
    loop = Loop()
    for needed in (64, 128):
        loop.read(1, FAR)
        loop.read(needed - 1, NEAR)
        assert not loop.polls
        loop.read(1, NEAR)
        assert loop.polls
        loop.pass_time(200e-6)
        assert not loop.polls
    loop.read(257, NEAR)
    loop.read(100, CLOSE)
    assert loop.polls


def test_busy_poll_in_vain_needs_more_close_reads_until_one_succeeds() -> None:
    loop = Loop()
    for needed in (8, 16, 32):
        loop.read(1, FAR)
        loop.read(needed - 1, CLOSE)
        assert not loop.polls
        loop.read(1, CLOSE)
        assert loop.polls
        loop.pass_time(200e-6)
        assert not loop.polls
    loop.read(1, FAR)
    loop.read(64, CLOSE)
    loop.read(1, CLOSE)
    loop.pass_time(200e-6)
    loop.read(1, FAR)
    loop.read(8, CLOSE)
    assert not loop.polls
    loop.read(8, CLOSE)
    assert loop.polls


def test_busy_poll_after_many_finds_begins_again_soon() -> None:
    """One message that came late does not end the polls of a steady conversation."""
    loop = Loop()
    loop.read(9, CLOSE)
    loop.read(64, CLOSE)
    loop.pass_time(200e-6)
    assert not loop.polls
    loop.read(1, FAR)
    loop.read(7, NEAR)
    assert not loop.polls
    loop.read(1, NEAR)
    assert loop.polls
    # After a poll in vain, the next one needs more reads.
    loop.pass_time(200e-6)
    loop.read(1, FAR)
    loop.read(15, NEAR)
    assert not loop.polls
    loop.read(1, NEAR)
    assert loop.polls


def test_busy_poll_that_lost_the_processor_rests_a_hundred_times_as_long() -> None:
    loop = Loop()
    loop.read(9, CLOSE)
    assert loop.polls
    loop.pass_time(0.00506)
    assert not loop.polls
    loop.pass_time(0.4)
    loop.read(1000, CLOSE)
    assert not loop.polls
    loop.pass_time(0.1)
    loop.read(1000, CLOSE)
    assert loop.polls


def test_busy_poll_that_lost_the_processor_for_long_rests_a_second() -> None:
    loop = Loop()
    loop.read(9, CLOSE)
    loop.pass_time(60.0)
    assert not loop.polls
    loop.pass_time(0.9)
    loop.read(1000, CLOSE)
    assert not loop.polls
    loop.pass_time(0.1)
    loop.read(1000, CLOSE)
    assert loop.polls


def test_busy_poll_without_spare_processor_never_begins() -> None:
    loop = Loop(may_poll=False)
    loop.read(1000, CLOSE)
    assert not loop.polls


def test_busy_poll_of_broker_begins_with_close_reads_and_ends(socket_dir: Path) -> None:
    with (
        running_daemon(configuration(str(socket_dir / "sock"), "alice")) as broker,
        broker.login("alice") as alice,
    ):
        poll = broker.daemon._server.context.busy_poll  # type: ignore[union-attr]
        # A clock that stands still makes each read a close one.
        poll._clock, poll._rests_until = (lambda: 1.0), 0.0
        for _ in range(20):
            alice.ping()
        assert broker.call(lambda: poll._polls)
        poll._clock = lambda: 2.0
        while broker.call(lambda: poll._polls):
            pass
        # An idle broker does not wake up.
        assert not broker.call(lambda: poll._polls)
