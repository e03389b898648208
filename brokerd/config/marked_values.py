"""Mappings and lists with the places of their entries in a text.

Lines and columns are counted from 0.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Map", "Seq"]


class Map(dict[str, Any]):
    """A mapping.

    marks: for each key, the line and column of the key, and those of its value.
    """

    __slots__ = ("marks",)

    def __init__(self) -> None:
        self.marks: dict[str, tuple[int, int, int, int]] = {}


class Seq(list[Any]):
    """A list. marks: the line and column of each item."""

    __slots__ = ("marks",)

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = []
