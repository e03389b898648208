"""Tells clients that they have been copied into another process by a fork.

The copy's file descriptors are closed at once, so that the parent's end is seen by the broker when the parent ends.
No lock is taken: whoever held it does not exist in the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["register"]


class Forkable(Protocol):
    """Something that must not be used in a fork."""

    def forked(self) -> None:
        """This is the child now."""
        ...


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def register(client: Forkable) -> None:
    """Call ``client.forked()`` in every child forked from now on, as long as the client lives."""
    _registered.add(client)


def _in_child() -> None:
    for client in list(_registered):
        client.forked()
    _registered.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
