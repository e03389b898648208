"""Features of later Pythons, for the older Pythons that the library supports. No I/O.

Python 3.9 is the oldest. ``aio.compat`` has the features of asyncio.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["StrEnum", "slotted", "strict_zip"]

C = TypeVar("C")

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """An enum whose members are strings; Python 3.11 has one."""

        def __str__(self) -> str:
            return str.__str__(self)

        def __format__(self, format_spec: str) -> str:
            return str.__format__(self, format_spec)


if sys.version_info >= (3, 10):

    def strict_zip(*iterables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Return ``zip(*iterables, strict=True)``."""
        return zip(*iterables, strict=True)

else:

    def strict_zip(*iterables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
        """Return ``zip(*iterables)``. Raises ValueError if the lengths differ."""
        rows = list(map(tuple, iterables))
        if len(set(map(len, rows))) > 1:
            raise ValueError("zip() has arguments of different lengths")
        return zip(*rows)


def slotted(cls: type[C]) -> type[C]:
    """Return a dataclass with its fields in slots.

    It replaces ``dataclass(slots=True)``, which Python 3.10 has.
    """
    names = tuple(each.name for each in fields(cls))  # type: ignore[arg-type]
    namespace = {
        name: value
        for name, value in vars(cls).items()
        if name not in (*names, "__dict__", "__weakref__")
    }
    # Pickles and copies would set the attributes, which a frozen dataclass refuses.
    namespace.update(__slots__=names, __getstate__=_get_state, __setstate__=_set_state)
    made: type[C] = type(cls.__name__, cls.__bases__, namespace)
    made.__qualname__ = cls.__qualname__
    return made


def _get_state(instance: Any) -> list[Any]:
    return [getattr(instance, each.name) for each in fields(instance)]


def _set_state(instance: Any, state: list[Any]) -> None:
    for each, value in zip(fields(instance), state):
        object.__setattr__(instance, each.name, value)
