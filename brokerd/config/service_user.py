"""Warnings of a check by root: files that the user of the service can't read.

Root can read every file, so without them only the start of the service would show the
mistake. Access control lists are not considered.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from brokerd.config.model import Config
from brokerd.config.text_files import DEFAULT_CONFIG

__all__ = ["SERVICE_USER", "is_for_service", "unreadable_warnings"]

#: The user that systemd/brokerd.service names.
SERVICE_USER: Final = "brokerd"


@dataclass(frozen=True, slots=True)
class _User:
    number: int
    groups: frozenset[int]

    def obstacle(self, path: str) -> str:
        """Return the file, or the directory on the way to it, that is closed to the
        user; "" without one.
        """
        file = Path(os.path.realpath(path))
        for each in (*reversed(file.parents), file):
            try:
                status = each.stat()
            except OSError:
                return ""
            if not self._allows(status, stat.S_IROTH if each == file else stat.S_IXOTH):
                return str(each)
        return ""

    def _allows(self, status: os.stat_result, bit: int) -> bool:
        """Return whether a file's mode gives the user what it gives others by this bit."""
        if status.st_uid == self.number:
            return bool(status.st_mode & bit << 6)
        if status.st_gid in self.groups:
            return bool(status.st_mode & bit << 3)
        return bool(status.st_mode & bit)


def is_for_service(config: Config) -> bool:
    """Return whether root checks the configuration of the service, which is not root."""
    user = _service_user()
    return user is not None and (config.path == DEFAULT_CONFIG or not user.obstacle(config.path))


def unreadable_warnings(config: Config) -> Iterator[str]:
    """Yield a warning for each closed file or directory, if root runs the check."""
    user = _service_user()
    if user is None or not is_for_service(config):
        return
    closed: dict[str, list[tuple[str, str]]] = {}
    for path, place in config.private.items():
        obstacle = user.obstacle(path)
        if obstacle:
            closed.setdefault(obstacle, []).append((path, place))
    for obstacle, files in closed.items():
        path, place = files[0]
        more = f", as {len(files) - 1} more files" if len(files) > 1 else ""
        yield (
            f"{place}: the service's user {SERVICE_USER!r} can't read {path}{more} (chown"
            f" {SERVICE_USER} {shlex.quote(obstacle)}, or chmod u+rX where it owns that)"
        )


def _service_user() -> _User | None:
    """Return the service's user, if this process is root's and the system has that user."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    import pwd

    try:
        entry = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None
    return _User(entry.pw_uid, frozenset(os.getgrouplist(SERVICE_USER, entry.pw_gid)))
