"""What is wrong with a configuration: every problem with its place, and the error that carries them all.

A problem is one line, ``FILE:LINE:COLUMN: PATH: what is wrong (what would be right)``, whatever the file holds:
what can't be printed is escaped, and what is long is cut. A key never stands in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = ["ConfigError", "Path", "Place", "Problem", "format_path", "name_alone", "one_line"]

#: The way from the top of a file to a value: keys of mappings and indexes of lists.
Path: TypeAlias = Sequence[str | int]

#: What a problem of the whole file has for a path.
_WHOLE: Final = "(file)"
#: Where a key stands, or may stand by mistake.
_KEYS: Final = frozenset({"key", "key_file", "key_env", "key_credential", "file", "env", "credential"})
#: What the model's own names, and slips of the pen in them, look like.
_NAME: Final = re.compile(r"[A-Za-z_-]{1,40}")
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

    Ends where a client's key is given, or named: a key that is not in quotes may look to YAML like a mapping with
    names. Left out is what stands below a client and can't be a name, such as a key behind a colon without a space.
    """
    text = ""
    for depth, step in enumerate(path):
        if depth > _CLIENT_DEPTH and path[depth - 1] in _KEYS:
            break
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            if depth >= _CLIENT_DEPTH and path[0] == "clients":
                step = name_alone(step)
            short = step if len(step) <= _LONGEST_STEP else step[:_LONGEST_STEP] + "..."
            text += f".{short}" if text else short
    return text


def name_alone(text: str) -> str:
    """Return a name in a mapping, or as much of it as can be one: what follows may be a key that was put there."""
    if _NAME.fullmatch(text):
        return text
    name, colon, _ = text.partition(":")
    return f"{name}:..." if colon and _NAME.fullmatch(name) else "..."


def one_line(text: str) -> str:
    """Return the text with everything unprintable, line breaks among it, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
