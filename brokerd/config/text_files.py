"""The texts of a configuration, from files, from file name patterns, or from a
variable.

Files are only opened and read; other modules parse the texts.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Mapping
from typing import Final

__all__ = [
    "DEFAULT_CONFIG",
    "IN_ENVIRON",
    "MAX_FILE",
    "VARIABLE",
    "Unreadable",
    "decoded",
    "matching",
    "text_of",
]

#: The configuration file used by default.
DEFAULT_CONFIG: Final = "/etc/brokerd/brokerd.yaml"
#: The environment variable that may hold a whole configuration, for containers.
VARIABLE: Final = "BROKERD_CONFIG_YAML"
#: Stands for that variable in the place of a file name. Relative paths in it start from
#: the working directory.
IN_ENVIRON: Final = f"${VARIABLE}"
#: Limits a configuration file, in bytes: about a million clients.
MAX_FILE: Final = 256 * 2**20
# O_NONBLOCK: opening a FIFO without a writer must not block. O_BINARY: otherwise
# Windows would end the file at a Ctrl-Z.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class Unreadable(Exception):
    """A file can't be read as text; the message gives the fault (and its remedy).

    line, column: the place in the file, 0 for the file as a whole.
    """

    def __init__(self, what: str, line: int = 0, column: int = 0) -> None:
        super().__init__(what)
        self.line = line
        self.column = column


def text_of(
    file: str, environ: Mapping[str, str] | None = None
) -> tuple[str, os.stat_result | None]:
    """Return a file's text and its status, or None for the status of a text in
    ``environ``.

    environ: where IN_ENVIRON is looked up. Without ``environ``, IN_ENVIRON is an
    ordinary file name. Raises Unreadable.
    """
    if environ is not None and file == IN_ENVIRON:
        text = environ.get(VARIABLE)
        if not text:
            raise Unreadable(
                f"the environment has no {VARIABLE} (set it to the configuration's text)"
            )
        return decoded(os.fsencode(text)), None
    try:
        handle = os.open(file, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise Unreadable(_unopened(file, error)) from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise Unreadable(f"{file} is a directory (give a file)")
        if stat.S_ISFIFO(status.st_mode):
            os.set_blocking(handle, True)
        elif not stat.S_ISREG(status.st_mode):
            raise Unreadable(f"{file} is no file (give a file)")
        with open(handle, "rb", closefd=False) as stream:
            content = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise Unreadable(f"{file} can't be read: {error.strerror} (see to the disk)") from None
    finally:
        os.close(handle)
    if not content and stat.S_ISFIFO(status.st_mode):
        raise Unreadable(f"{file} is a FIFO, and nobody writes anything into it (give a file)")
    if len(content) > MAX_FILE:
        raise Unreadable(f"{file} is larger than {MAX_FILE // 2**20} MiB (split it with include:)")
    return decoded(content), status


def matching(pattern: str, base: str) -> list[str]:
    """Return the sorted files that match a pattern.

    A pattern without wildcards gives one file, which may not exist. A directory that
    can't be listed, or is missing, never counts as empty. It raises Unreadable.
    """
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - a Path would change how the name is shown
    return sorted(_matching(pattern, base))


def _matching(pattern: str, base: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [os.path.join(base, pattern)]  # noqa: PTH118 - the same
    directory_pattern, name_pattern = os.path.split(pattern)
    found: list[str] = []
    for directory in _matching(directory_pattern, base):
        if glob.has_magic(directory_pattern) and not _is_directory(directory):
            continue
        if glob.has_magic(name_pattern):
            names = _listed(directory, pattern)
            if not name_pattern.startswith("."):
                names = [name for name in names if not name.startswith(".")]
            found += [os.path.join(directory, name) for name in fnmatch.filter(names, name_pattern)]  # noqa: PTH118
        elif _is_there(whole := os.path.join(directory, name_pattern)):  # noqa: PTH118 - the same
            found.append(whole)
    return found


def _listed(directory: str, pattern: str) -> list[str]:
    """Return the names in a directory. Raises Unreadable."""
    directory = directory or "."
    try:
        return os.listdir(directory)  # noqa: PTH208 - the names alone
    except FileNotFoundError:
        what = f"there is no directory {directory}{_target_of(directory)}"
        raise Unreadable(f"{what} (make it, or take {pattern} out)") from None
    except NotADirectoryError:
        raise Unreadable(
            f"{directory} is not a directory (give a pattern of files in a directory)"
        ) from None
    except OSError as error:
        raise Unreadable(
            f"the directory {directory} can't be listed: {error.strerror} ({_let_in(error)})"
        ) from None


def _is_directory(path: str) -> bool:
    """Return whether a path that matches a wildcard is a directory.

    Raises Unreadable if that can't be determined.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - the same
    except FileNotFoundError:
        if not _is_there(path):
            return False
        raise Unreadable(
            f"{path} is not there{_target_of(path)} (make that, or remove the link)"
        ) from None
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error.strerror} ({_let_in(error)})") from None


def _is_there(path: str) -> bool:
    """Return whether the path exists, also as a dangling link.

    Raises Unreadable if that can't be determined.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error.strerror} ({_let_in(error)})") from None
    return True


def _target_of(path: str) -> str:
    """Return a note on a symbolic link whose target is missing, or "" for any other
    path.
    """
    try:
        return f", where the link {path} leads: {os.readlink(path)}"  # noqa: PTH115 - the same
    except (OSError, ValueError):
        return ""


def _let_in(error: OSError) -> str:
    closed = error.errno in (errno.EACCES, errno.EPERM)
    return (
        "let this user read and search every directory on the way"
        if closed
        else "see to the file system"
    )


def decoded(content: bytes) -> str:
    """Return the bytes as text.

    Raises Unreadable, with the place, if they are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        begin = content.rfind(b"\n", 0, error.start) + 1
        column = len(content[begin : error.start].decode(errors="replace")) + 1
        raise Unreadable(
            "is not UTF-8 (save it as UTF-8)", content.count(b"\n", 0, error.start) + 1, column
        ) from None


def _unopened(file: str, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "is no path (give a file)"
    if error.errno == errno.ENOENT and file == DEFAULT_CONFIG:
        # The user named no file, so the error lists every way to give one. In a
        # container, the first way is a volume.
        right = (
            "write or mount one there, name another with --config or in BROKERD_CONFIG, or put its"
            f" text into {VARIABLE}; brokerd demo needs none"
        )
        return f"there is no file {file} ({right})"
    if error.errno == errno.ENOENT:
        return f"there is no file {file}{_target_of(file)} (make it, or give another)"
    if error.errno == errno.EACCES:
        return f"{file} can't be read: {error.strerror} (let this user read it)"
    return f"{file} can't be opened: {error.strerror} (give a file)"
