"""Paths in a configuration: joined to a directory, and as short as they can be shown."""

from __future__ import annotations

import os

__all__ = ["joined", "shortened"]


def joined(base: str, path: str) -> str:
    """Return a path that is relative to a directory, or to a home directory, shortened."""
    return shortened(os.path.join(base, os.path.expanduser(path)))  # noqa: PTH111, PTH118 - a Path would change how it is shown


def shortened(path: str) -> str:
    """Return a path without ``..``: keys/bob for clients.d/../keys/bob.

    A path through a symbolic link stays as it is if the shorter one leads elsewhere.
    """
    if f"..{os.sep}" not in path or "\0" in path:
        return path
    short = os.path.normpath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else path
