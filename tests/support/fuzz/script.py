"""Bytes read as a sequence of small decisions; where they end, everything is 0."""

from __future__ import annotations

__all__ = ["Script", "item"]


class Script:
    """What a fuzzer made up, taken piece by piece."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        """How many bytes nobody has taken."""
        return len(self._data) - self._position

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or as many as are left."""
        taken = self._data[self._position : self._position + size]
        self._position += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """Return a number of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def item(self, size: int = 1) -> bytes:
        """Return bytes whose length stands before them, in so many bytes."""
        return self.take(self.number(size))


def item(content: bytes, size: int = 1) -> bytes:
    """Return what ``Script.item`` gives back as ``content``."""
    return len(content).to_bytes(size, "big") + content
