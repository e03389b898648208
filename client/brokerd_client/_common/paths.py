"""The check whether an error may show a text as the path of a missing file.

The text could be a key that was given in the wrong place.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["is_plainly_a_path"]

_SEPARATOR: Final = re.compile(r"[/\\]")
#: A key in hexadecimal digits. Below it, the characters from which on a text with
#: lower-case letters, upper-case letters and digits looks like a key.
_HEXADECIMAL: Final = re.compile(r"[0-9A-Fa-f]{16,}")
_RANDOM: Final = 20


def is_plainly_a_path(text: str) -> bool:
    """Return whether a text has the form of a path and does not look like a key."""
    if (
        not text.isprintable()
        or " " in text
        or not (_SEPARATOR.search(text) or text.endswith((".key", ".pem", ".crt")))
    ):
        return False
    if any(map(_looks_random, _SEPARATOR.split(text))):
        return False
    return (
        text.startswith(("/", "./", "../", "~"))
        or "." in text
        or not _looks_random(_SEPARATOR.sub("", text))
    )


def _looks_random(text: str) -> bool:
    if _HEXADECIMAL.fullmatch(text) or "=" in text or "+" in text:
        return True
    kinds = (str.islower, str.isupper, str.isdigit)
    return len(text) >= _RANDOM and all(any(map(kind, text)) for kind in kinds)
