"""Garbage collection that does not block the event loop of the daemon's own process.

A full collection walks every container. With 10,000 connections it takes some 70 ms, in
which no message passes. The daemon makes almost no cyclic garbage
(tests/net/test_freed.py), and temporary objects die young. So long-lived objects, the
configuration above all, are excluded from collections. Full collections take place only
while there is little to walk.
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

#: Most connections and subscriptions, together, with which a full collection is run: it
#: then takes some milliseconds.
_FEW: Final = 1000
#: Seconds between two checks whether a full collection is cheap enough.
_EVERY_S: Final = 60.0

_state = {"tended": False}


@contextmanager
def tended() -> Iterator[None]:
    """Prevent automatic full collections until the block ends.

    For a process that is a daemon and nothing else.
    """
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
    """Exclude all objects that exist now from later collections."""
    if _state["tended"]:
        gc.freeze()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Prevent collections in the block, and exclude its objects from later ones.

    For a block that creates very many objects that stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        set_apart()
        if was_enabled:
            gc.enable()


class Sweeper:
    """Runs a full collection now and then, while there is little to walk.

    size: returns the number of connections and subscriptions.
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
        """Stop collecting."""
        self._timer.cancel()
