"""The pipe through which the system moves bulk data of channels, without copying them.

Bytes go from a socket into the pipe and from there to another socket, all in one call:
between two calls the pipe is empty, so that one pipe serves all channels. For large
reads this takes half of the processor time, or less. Source: splice(2).
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from brokerd.net.context import READ_BUFFER

__all__ = ["Pipe", "SharedPipe"]

_FLAGS: Final = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)
#: Sets the size of a pipe (fcntl(2)); Python 3.11 may not know the name.
_SET_SIZE: Final = 1031


class Pipe:
    """One pipe that is empty between two calls."""

    def __init__(self, output: int, source: int) -> None:
        self._output = output
        self._input = source

    def move(self, source: int, target: int, most: int) -> tuple[int, bytes]:
        """Move bytes from one socket to another; return how many, and those of them that
        the target did not take.

        Return 0 at the end of the source. Raises OSError of the source; one of the target
        shows at the next write.
        """
        size = os.splice(source, self._input, min(most, READ_BUFFER), flags=_FLAGS)
        left = size
        with contextlib.suppress(OSError):
            while left:
                left -= os.splice(self._output, target, left, flags=_FLAGS)
        return size, os.read(self._output, left) if left else b""

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._output)
        os.close(self._input)


class SharedPipe:
    """The pipe of all channels, opened when it is needed first."""

    def __init__(self) -> None:
        self._pipe: Pipe | None = None
        self._is_tried = False

    def get(self) -> Pipe | None:
        """Return the pipe, or None where the system has no splice, or no room for it."""
        if not self._is_tried:
            self._is_tried = True
            self._pipe = _opened()
        return self._pipe

    def close(self) -> None:
        """Close the pipe, if it is open."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def _opened() -> Pipe | None:
    if not hasattr(os, "splice"):
        return None
    import fcntl

    try:
        ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    pipe = Pipe(*ends)
    try:
        fcntl.fcntl(ends[1], _SET_SIZE, READ_BUFFER)
    except OSError:
        pipe.close()
        return None
    return pipe
