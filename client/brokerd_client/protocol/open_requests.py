"""The requests that a client has received and may still answer. No I/O.

They are found again when their requesters cancel them. A request that the program has
dropped without an answer is forgotten.
"""

from __future__ import annotations

import weakref
from typing import Final, Generic, TypeVar

from brokerd_client.message import Message

__all__ = ["OpenRequests"]

M = TypeVar("M", bound=Message)

#: Fewest entries between two searches for dropped requests.
_MIN_ENTRIES: Final = 256


class OpenRequests(Generic[M]):
    """A table of weak references to requests, by sender and id.

    A WeakValueDictionary would do the same. Its callback for each request takes four
    times as long.
    """

    __slots__ = ("_max_entries", "_table")

    def __init__(self) -> None:
        self._table: dict[tuple[str, int], weakref.ref[M]] = {}
        #: Number of entries above which dropped requests are removed.
        self._max_entries = _MIN_ENTRIES

    def __len__(self) -> int:
        return len(self._table)

    def add(self, request: M) -> None:
        """Add a request; it replaces an older one of the same sender with the same id."""
        self._table[request.sender, request.id] = weakref.ref(request)
        if len(self._table) > self._max_entries:
            self._table = {key: entry for key, entry in self._table.items() if entry() is not None}
            self._max_entries = max(_MIN_ENTRIES, 2 * len(self._table))

    def take(self, sender: str, message_id: int) -> M | None:
        """Remove and return the request; return None if it is not here."""
        entry = self._table.pop((sender, message_id), None)
        return None if entry is None else entry()

    def discard(self, sender: str, message_id: int) -> None:
        """Remove the request, if it is here."""
        self._table.pop((sender, message_id), None)

    def clear(self) -> None:
        """Forget all requests."""
        self._table.clear()
