"""The problems of a configuration, each with its place, and the error that carries them
all.

A problem is one line: ``FILE:LINE:COLUMN: PATH: what is wrong (what would be right)``.
Unprintable characters are escaped, and long names are cut. A problem never shows a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "EX_CONFIG",
    "ConfigError",
    "Path",
    "Place",
    "Problem",
    "format_path",
    "name_alone",
    "one_line",
]

#: Exit status for a configuration that can't be used, from sysexits.h.
EX_CONFIG: Final = 78
#: The path from the top of a file to a value: keys of mappings and indexes of lists.
Path: TypeAlias = Sequence[str | int]

#: Shown as the path of a problem that concerns the whole file.
_WHOLE: Final = "(file)"
#: Fields whose value is a secret key, or may be a secret key by mistake.
_KEYS: Final = frozenset(
    {"key", "key_file", "key_env", "key_credential", "file", "env", "credential"}
)
#: Matches the model's own field names, misspelt forms of them, and YAML's merge key.
_NAME: Final = re.compile(r"[A-Za-z_-]{1,40}|[a-z_]{1,12}_md5|<<")
_LONGEST_STEP: Final = 100
#: In the path clients.NAME.key, the depth behind NAME: a client named like a field in
#: _KEYS is not a secret.
_CLIENT_DEPTH: Final = 2


class Place(NamedTuple):
    """A place in a file. line, column: counted from 1; 0 without a text."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Problem(NamedTuple):
    """One fault.

    Attributes:
        path: As in ``clients.bob.keys[0]``.

    fault: the fault and its remedy.
    """

    place: Place
    path: str
    fault: str

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.path or _WHOLE}: {self.fault}")


class ConfigError(Exception):
    """The whole configuration is refused.

    str() lists every problem, one a line, in the order of the files.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def format_path(path: Path) -> str:
    """Return the path as text, such as ``clients.bob.keys[0]``; "" for the whole file.

    The text ends at the field that holds or names a client's key. YAML may read a key
    without quotes as a mapping; then the path would show a part of the key. Below a
    client, a step that can't be a field name is left out. An example is a key that
    follows a colon without a space.
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
    """Return a mapping's field name, cut after the part that can be one.

    The rest may be a key written there by mistake.
    """
    if _NAME.fullmatch(text):
        return text
    name, colon, _ = text.partition(":")
    return f"{name}:..." if colon and _NAME.fullmatch(name) else "..."


def one_line(text: str) -> str:
    """Return the text with all unprintable characters, also line breaks, escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
