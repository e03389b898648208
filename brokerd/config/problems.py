"""What is wrong with a configuration: every problem with its place, and the error that carries them all.

A problem is one line, ``FILE:LINE:COLUMN: PATH: what is wrong (what would be right)``, whatever the file holds:
what can't be printed is escaped, and what is long is cut. A key never stands in one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = ["ConfigError", "Path", "Place", "Problem", "format_path", "one_line"]

#: The way from the top of a file to a value: keys of mappings and indexes of lists.
Path: TypeAlias = Sequence[str | int]

#: What a problem of the whole file has for a path.
_WHOLE: Final = "(file)"
_LONGEST_STEP: Final = 100
#: clients.NAME.key: what a client is called is no key.
_CLIENT_DEPTH: Final = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written. line, column: counted from 1; 0 where there is no text."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. path: written as ``clients.bob.keys[0]``. what: with what would be right."""

    place: Place
    path: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.path or _WHOLE}: {self.what}")


class ConfigError(Exception):
    """The configuration is refused whole; str() is every problem, one a line, in the order of the files."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def format_path(path: Path) -> str:
    """Return the path as people write it: ``clients.bob.keys[0]``; "" for the whole file.

    Ends at a client's ``key``: a key that is not in quotes may look to YAML like a mapping with names.
    """
    text = ""
    for depth, step in enumerate(path):
        if depth > _CLIENT_DEPTH and path[depth - 1] == "key":
            break
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            short = step if len(step) <= _LONGEST_STEP else step[:_LONGEST_STEP] + "..."
            text += f".{short}" if text else short
    return text


def one_line(text: str) -> str:
    """Return the text with everything unprintable, line breaks among it, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
