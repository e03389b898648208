"""Memory that the daemon's own process keeps for its next use.

Each read fills outboxes, and each write empties them. The C library gives the end of its
heap back as soon as 128 KiB there are free. For the next read, the system must clear the
same pages again. That takes longer than to fill them.
"""

from __future__ import annotations

import contextlib
from typing import Final

__all__ = ["keep_freed"]

#: Free bytes at the end of the heap that are not given back: those of one turn in which a
#: full read goes to a hundred outboxes.
_KEPT: Final = 32 * 1024 * 1024
#: Bytes from which on a block comes from the system, and goes back to it, by itself. A
#: block that is a large frame of a few megabytes is used again, too.
_BY_ITSELF: Final = 8 * 1024 * 1024
#: The names of these limits in glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed() -> bool:
    """Set both limits; return False where the C library has none, as musl.

    For a process that is a daemon and nothing else.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_THRESHOLD, _BY_ITSELF))
    return False
