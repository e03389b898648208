"""The memory of large frames that have been sent, kept for a moment for the next ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from brokerd.core.large_frame import SpareFrames

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.large_frame import LargeFrame, MappedFrame

__all__ = ["FrameMemory"]

#: Seconds without a new large frame after which no memory is kept, to twice as many.
_KEPT_S: Final = 1.0


class FrameMemory:
    """Keeps memory of large frames; has a timer only while it keeps any."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._frames = SpareFrames()
        self._timer: asyncio.TimerHandle | None = None

    def moved(self, large_frame: LargeFrame | MappedFrame) -> LargeFrame | MappedFrame:
        """Return the frame in mapped memory, if it is long enough for that; else itself."""
        moved = large_frame.moved(self._frames)
        if self._timer is None and self._frames:
            self._timer = self._loop.call_later(_KEPT_S, self._drop)
        return moved

    def close(self) -> None:
        """Keep no memory."""
        self._frames = SpareFrames()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._frames.drop_unused()
        self._timer = self._loop.call_later(_KEPT_S, self._drop) if self._frames else None
