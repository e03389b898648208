"""Notification of clients that a fork has copied them into another process.

The copy's file descriptors are closed immediately. Otherwise the broker would not
notice when the parent ends. No lock is taken, because the thread that held it does not
exist in the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["register"]


class Forkable(Protocol):
    """An object that must not be used in a fork."""

    def forked(self) -> None:
        """Handle a fork, in the child."""
        ...


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def register(client: Forkable) -> None:
    """Call ``client.forked()`` in every child forked from now on, as long as the client
    lives.
    """
    _registered.add(client)


def _in_child() -> None:
    for client in list(_registered):
        client.forked()
    _registered.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
