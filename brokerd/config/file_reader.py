"""Opens and reads one file safely: configuration text, key or certificate.

A file is opened once, without blocking, and its kind, mode and size are checked before
its content is used. All errors about files are made here, in the same words.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["FileKind", "Unreadable", "read_file", "target_of"]

# O_NONBLOCK: opening a FIFO without a writer must not block. O_BINARY: otherwise
# Windows would end the file at a Ctrl-Z.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_KIB: Final = 1024
_MIB: Final = 1024 * 1024


class Unreadable(Exception):
    """A file, or a variable in its place, can't be used; the message gives the fault
    (and its remedy).

    line, column: the place in the file, 0 for the file as a whole.
    """

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class FileKind(NamedTuple):
    """The limit of one kind of file, and the remedies that its errors give.

    Attributes:
        limit: Most bytes of a file.
        remedy: For a path that is not a file of this kind.
        too_large: For a longer file, by default ``remedy``.
        forbidden: For a file that this user may not read.
        hidden: For a path that no error may show.
        allows_fifo: A FIFO is read until its writers have closed it.
    """

    limit: int
    remedy: str
    forbidden: str
    hidden: str = ""
    too_large: str = ""
    allows_fifo: bool = False


def read_file(
    path: str,
    kind: FileKind,
    *,
    missing: str = "",
    is_shown: bool = True,
    fault_of: Callable[[os.stat_result], str] | None = None,
) -> tuple[bytes, os.stat_result]:
    """Return a file's content and status. Raises Unreadable.

    missing: the remedy if the file does not exist, by default that of the kind.
    is_shown: whether the error of a file that can't be opened may show the path.
    fault_of: returns the fault of an opened file's status, or "" to read it.
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise Unreadable(
            _unopened(path, kind, error, missing) if is_shown else _unopened_hidden(kind, error)
        ) from None
    try:
        status = os.fstat(handle)
        is_fifo = stat.S_ISFIFO(status.st_mode)
        if stat.S_ISDIR(status.st_mode):
            raise Unreadable(f"{path} is a directory ({kind.remedy})")
        if is_fifo and kind.allows_fifo:
            os.set_blocking(handle, True)
        elif not stat.S_ISREG(status.st_mode):
            raise Unreadable(f"{path} is not a regular file ({kind.remedy})")
        fault = fault_of(status) if fault_of is not None else ""
        if fault:
            raise Unreadable(fault)
        with open(handle, "rb", closefd=False) as stream:
            content = stream.read(kind.limit + 1)
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error.strerror} (check the disk)") from None
    finally:
        os.close(handle)
    if is_fifo and not content:
        raise Unreadable(f"{path} is a FIFO that no process writes to ({kind.remedy})")
    if len(content) > kind.limit:
        limit = (
            f"{kind.limit // _MIB} MiB" if kind.limit % _MIB == 0 else f"{kind.limit // _KIB} KiB"
        )
        raise Unreadable(f"{path} is larger than {limit} ({kind.too_large or kind.remedy})")
    return content, status


def target_of(path: str) -> str:
    """Return a note on a symbolic link whose target is missing, or "" for any other
    path.
    """
    try:
        return f", where the link {path} leads: {os.readlink(path)}"  # noqa: PTH115 - as written
    except (OSError, ValueError):
        return ""


def _unopened(path: str, kind: FileKind, error: OSError | ValueError, missing: str) -> str:
    if isinstance(error, ValueError):
        return f"is not a valid path ({kind.remedy})"
    if error.errno == errno.ENOENT:
        return f"there is no file {path}{target_of(path)} ({missing or kind.remedy})"
    if error.errno == errno.EACCES:
        return f"{path} can't be read: {error.strerror} ({kind.forbidden})"
    return f"{path} can't be opened: {error.strerror} ({kind.remedy})"


def _unopened_hidden(kind: FileKind, error: OSError | ValueError) -> str:
    """Return the fault without the path, which may be a key in the wrong place."""
    if isinstance(error, ValueError):
        return f"is not a valid path ({kind.remedy})"
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
        return f"there is no file of that name ({kind.hidden or kind.remedy})"
    return f"the file of that name can't be opened: {error.strerror} ({kind.hidden or kind.remedy})"
