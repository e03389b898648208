"""The memory of large frames, kept while large frames follow each other."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from typing import cast

import pytest
from support.raw_client import MESSAGE, packed
from support.running_daemon import configuration, running_daemon

from brokerd.core.large_frame import LargeFrame, MappedFrame
from brokerd.net.connection.frame_memory import FrameMemory

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages"
)

SIZE = 8 << 20


class Loop:
    """An event loop whose timers the test runs."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []
        self.memory = FrameMemory(cast("asyncio.AbstractEventLoop", self))

    def call_later(self, delay: float, callback: Callable[[], None]) -> Loop:
        self.timers.append(callback)
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def pass_time(self) -> None:
        """Run the timers that are set."""
        due, self.timers = self.timers, []
        for callback in due:
            callback()


def begun(size: int = SIZE) -> LargeFrame:
    """Return a frame of which 2 MiB have arrived."""
    return LargeFrame(bytes(2 << 20), size)


def test_frame_memory_has_a_timer_only_while_it_keeps_memory() -> None:
    """The timer of an idle broker is not set, and runs out soon after the last frame."""
    loop = Loop()
    assert isinstance(loop.memory.moved(begun(3 << 20)), LargeFrame)
    assert not loop.timers
    frame = loop.memory.moved(begun())
    assert isinstance(frame, MappedFrame)
    assert loop.memory.moved(frame) is frame
    for expected in (1, 0):
        assert len(loop.timers) == 1
        loop.pass_time()
        assert len(loop.timers) == expected


def test_frame_memory_closed_keeps_nothing() -> None:
    """A server that ends leaves no timer."""
    loop = Loop()
    loop.memory.moved(begun())
    loop.memory.close()
    assert not loop.timers
    assert not loop.memory._frames
    loop.memory.close()


def test_frame_memory_serves_messages_that_follow_each_other() -> None:
    """Each recipient gets its own message, whichever message had the memory before."""
    clients = {name: {"queue": "64MiB"} for name in ("alice", "bob", "carol")}
    limits = {"max_message": "16MiB"}
    with (
        running_daemon(configuration("127.0.0.1:0", clients, limits=limits)) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("carol") as carol,
    ):
        for number in range(12):
            body = bytes([number]) * (SIZE - 1000 * number)
            alice.write(packed(MESSAGE, ("bob", "carol")[number % 2], body, message_id=number))
            got = (bob, carol)[number % 2].recv()
            assert got.id == number
            assert got.body == body
