"""Warnings about users who can replace a configuration's files, by owner or directory.

Nothing is refused here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["warnings_of"]


def warnings_of(files: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a warning for each untrusted owner, and each directory open to all users.

    files: the path of each file, and the place that names it. Source of the rules:
    docs/configuration.md, "Keys".
    """
    # Windows has neither these owners nor these modes.
    if os.name != "posix":
        return
    foreign: dict[tuple[str, int], list[tuple[str, str]]] = {}
    open_to_all: dict[str, tuple[str, str]] = {}
    for path, place in files:
        directory = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120 - as written
        try:
            file_owner, home = os.stat(path).st_uid, os.stat(directory)  # noqa: PTH116 - the same
        except (OSError, ValueError):
            continue
        for owner, owned in ((file_owner, path), (home.st_uid, directory)):
            if not _is_trusted(owner, home):
                foreign.setdefault((directory, owner), []).append((owned, place))
        reachable = _open_to_all(directory)
        if reachable:
            open_to_all.setdefault(reachable, (path, place))
    for (_, owner), entries in foreign.items():
        owned, place = entries[0]
        more = len({folder for folder, _ in entries}) - 1
        others = f", as {more} more there do," if more else ""
        yield (
            f"{place}: {owned} belongs{others} to user {_name_of(owner)}, who can replace it "
            "(give it to root, or to the broker's user)"
        )
    for directory, (path, place) in open_to_all.items():
        yield (
            f"{place}: every user can write to the directory {directory}, which holds {path} "
            "(move it to a directory of the broker's own)"
        )


def _is_trusted(owner: int, home: os.stat_result) -> bool:
    """Return whether a file's owner is root or this user.

    Root may check the files for the user that the broker runs as. So for root, the
    owner of the file's directory is trusted too.
    """
    user = os.geteuid()
    return owner in (0, user) or (user == 0 and owner == home.st_uid)


def _open_to_all(directory: str) -> str:
    """Return the directory on the path to the file that every user can write to, or "".

    The sticky bit protects only the directories above. In the file's own directory,
    another user may create the file first.
    """
    for folder in (Path(directory), *Path(directory).parents):
        try:
            mode = folder.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH and (str(folder) == directory or not mode & stat.S_ISVTX):
            return str(folder)
    return ""


def _name_of(user: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(user).pw_name!r}"
    except KeyError:
        return str(user)
