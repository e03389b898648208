"""Keeps the garbage collector from holding up the event loop of the daemon's own process.

A full collection walks every container that there is: with 10,000 connections some 70 ms, in which no message passes.
Almost nothing of the daemon is ever garbage in circles (tests/net/test_freed.py), and what is dies young. So what
lasts, the configuration above all, is set apart, and full collections take place only while there is little to walk.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

__all__ = ["Sweeper", "set_apart", "tended", "undisturbed"]

#: Connections and subscriptions up to which a full collection takes some milliseconds.
_FEW: Final = 1000
#: Seconds between two looks whether there are so few.
_EVERY_S: Final = 60.0

_state = {"tended": False}


@contextmanager
def tended() -> Iterator[None]:
    """Let no full collection begin by itself until the block ends. For a process that is a daemon and nothing else."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], sys.maxsize & 0x7FFF_FFFF)
    _state["tended"] = True
    set_apart()
    try:
        yield
    finally:
        _state["tended"] = False
        gc.set_threshold(*before)
        gc.unfreeze()


def set_apart() -> None:
    """Let no collection walk over what there is now."""
    if _state["tended"]:
        gc.freeze()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no collection begin in the block, which makes very many objects that stay, nor walk over them later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        set_apart()
        if was_enabled:
            gc.enable()


class Sweeper:
    """Collects all garbage now and then, while there is little to be walked.

    size: returns how many connections and subscriptions there are.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, size: Callable[[], int]) -> None:
        self._loop = loop
        self._size = size
        self._timer = loop.call_later(_EVERY_S, self._look)

    def _look(self) -> None:
        if self._size() <= _FEW:
            gc.collect()
        self._timer = self._loop.call_later(_EVERY_S, self._look)

    def close(self) -> None:
        """Collect no more."""
        self._timer.cancel()
