"""Clients that were online before a restart, and are not back yet.

For some time (``limits.return_grace``), a sender of a message to such a client is held,
as by a full queue. Its message is delivered when the client is back. When the time is
over, it is refused as offline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["Returning"]


class Returning:
    """The names that are waited for, and the senders that wait.

    until: when the time is over, on the clock of ``now``.
    """

    __slots__ = ("_names", "_senders", "until")

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._senders: dict[str, dict[Session, None]] = {}
        self.until = 0.0

    def __len__(self) -> int:
        """Return the number of clients that are waited for."""
        return len(self._names)

    def names(self) -> list[str]:
        """Return the names of these clients."""
        return list(self._names)

    def begin(self, names: Iterable[str], until: float) -> None:
        """Wait for these clients until that time."""
        self._names = set(names)
        self.until = until

    def awaits(self, name: str, now: float) -> bool:
        """Return whether the client is waited for."""
        if self._names and now >= self.until:
            self._names.clear()
            self._senders.clear()
        return name in self._names

    def add(self, name: str, sender: Session) -> None:
        """Note a sender that is held until the client is back."""
        self._senders.setdefault(name, {})[sender] = None

    def come_back(self, name: str) -> list[Session]:
        """Wait no longer for a client; return the senders that were held for it."""
        self._names.discard(name)
        return list(self._senders.pop(name, ()))
