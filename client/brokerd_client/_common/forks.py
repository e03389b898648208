"""Registry of objects that must change in a forked child process.

A copied client closes its file descriptors immediately. Otherwise the broker would not
notice when the parent ends. A copied connection or listener of the direct API gets new
locks. No lock is taken here, because the thread that held it does not exist in the
child.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

__all__ = ["Forkable", "register"]


class Forkable(Protocol):
    """A client, connection or listener that a fork copies."""

    def _after_fork(self) -> None:
        """Adapt the copy to the child process. Called in the child, once."""
        ...


_registered: Final[weakref.WeakSet[Forkable]] = weakref.WeakSet()


def register(copied: Forkable) -> None:
    """Call ``copied._after_fork()`` in every child of this process, while it is alive.

    A child does not inherit the registration. To be called in the child's own children
    too, the object registers again in ``_after_fork``.
    """
    _registered.add(copied)


def _in_child() -> None:
    inherited = list(_registered)
    _registered.clear()
    for copied in inherited:
        copied._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
