"""Bytes read as a sequence of small decisions; behind their end, everything is 0."""

from __future__ import annotations

__all__ = ["Script", "item"]


class Script:
    """A fuzzer's input, read piece by piece."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        """The number of bytes that have not been read."""
        return len(self._data) - self._position

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or as many as are left."""
        taken = self._data[self._position : self._position + size]
        self._position += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """Return a number of ``size`` bytes."""
        return int.from_bytes(self.take(size), "big")

    def item(self, size: int = 1) -> bytes:
        """Return bytes behind their length, which is a number of ``size`` bytes."""
        return self.take(self.number(size))


def item(content: bytes, size: int = 1) -> bytes:
    """Return the bytes that ``Script.item`` reads as ``content``."""
    return len(content).to_bytes(size, "big") + content
