"""Objects that must be reset in a fork: their locks and handshakes belong to the
parent.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

__all__ = ["reset_after_fork"]


class _Resettable(Protocol):
    def _reset_after_fork(self) -> None: ...


_resettable: Final[weakref.WeakSet[_Resettable]] = weakref.WeakSet()


def reset_after_fork(obj: _Resettable) -> None:
    """Call ``obj._reset_after_fork()`` in every fork of this process, while obj is
    alive.
    """
    _resettable.add(obj)


def _reset_all() -> None:
    for obj in list(_resettable):
        obj._reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
