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

from brokerd.config.file_reader import FileKind, Unreadable, read_file, target_of

__all__ = [
    "DEFAULT_CONFIG",
    "IN_ENVIRON",
    "MAX_FILE",
    "VARIABLE",
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
#: The remedies for a missing file. The user named no file where the default is missing,
#: so that remedy lists every way to give one. In a container, the first is a volume.
_MISSING: Final = "make it, or give another"
_MISSING_DEFAULT: Final = (
    "write or mount one there, name another with --config or in BROKERD_CONFIG, or put its"
    f" text into {VARIABLE}; brokerd demo needs none"
)
_KIND: Final = FileKind(
    MAX_FILE,
    remedy="give a file",
    forbidden="let this user read it",
    too_large="split it with include:",
    allows_fifo=True,
)


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
    content, status = read_file(
        file, _KIND, missing=_MISSING_DEFAULT if file == DEFAULT_CONFIG else _MISSING
    )
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
    paths: list[str] = []
    for directory in _matching(directory_pattern, base):
        if glob.has_magic(directory_pattern) and not _is_directory(directory):
            continue
        if glob.has_magic(name_pattern):
            names = _listed(directory, pattern)
            if not name_pattern.startswith("."):
                names = [name for name in names if not name.startswith(".")]
            paths += [os.path.join(directory, name) for name in fnmatch.filter(names, name_pattern)]  # noqa: PTH118
        elif _is_there(path := os.path.join(directory, name_pattern)):  # noqa: PTH118 - the same
            paths.append(path)
    return paths


def _listed(directory: str, pattern: str) -> list[str]:
    """Return the names in a directory. Raises Unreadable."""
    directory = directory or "."
    try:
        return os.listdir(directory)  # noqa: PTH208 - the names alone
    except FileNotFoundError:
        fault = f"there is no directory {directory}{target_of(directory)}"
        raise Unreadable(f"{fault} (make it, or take {pattern} out)") from None
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
            f"{path} does not exist{target_of(path)} (make that, or remove the link)"
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


def _let_in(error: OSError) -> str:
    closed = error.errno in (errno.EACCES, errno.EPERM)
    return (
        "let this user read and search every directory on the way"
        if closed
        else "check the file system"
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
