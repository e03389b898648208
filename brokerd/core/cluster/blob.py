"""Bytes that go to a new process, behind the facts that say what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from brokerd.core.cluster.seam import Run

__all__ = ["Blob"]

Bytes: TypeAlias = bytes | bytearray | memoryview


class Blob:
    """Bytes that are put at its end, and taken from its beginning."""

    def __init__(self, content: Bytes = b"") -> None:
        self._pieces: list[Bytes] = []
        self._rest = memoryview(content)

    def put(self, piece: Bytes) -> int:
        """Append a piece; return its size."""
        self._pieces.append(piece)
        return len(piece)

    def put_runs(self, runs: Sequence[Run]) -> list[list[Any]]:
        """Append the frames of runs; return the rest of them."""
        return [[run.target, run.ttl_ms, self.put(run.frames)] for run in runs]

    def take(self, size: int) -> bytes:
        """Return the next piece. Raises ValueError if there are fewer bytes."""
        if not 0 <= size <= len(self._rest):
            raise ValueError(f"{size} bytes are wanted where {len(self._rest)} are left")
        piece, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return piece

    def take_runs(self, rows: Sequence[Sequence[Any]]) -> list[Run]:
        """Return runs whose frames come next."""
        return [Run(str(target), self.take(size), int(ttl_ms)) for target, ttl_ms, size in rows]

    def joined(self) -> bytes:
        """Return what was put."""
        return b"".join(self._pieces)
