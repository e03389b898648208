"""A key's bytes, from wherever the configuration says they are.

A key that somebody else can read is refused, and the refusal names the chmod to run. No error, name or
representation made here holds a key. The rules are those of docs/configuration.md, "Keys".
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = [
    "MAX_KEY",
    "KeyRefused",
    "exposed",
    "forbidden",
    "read_credential",
    "read_env",
    "read_file",
    "read_private",
]

#: The longest key file, in bytes; a longer one is some other file.
MAX_KEY: Final = 64 * 1024

#: Others must neither read a key nor replace it.
_OTHERS: Final = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
# O_NONBLOCK: a FIFO in the place of a file must not hold up the daemon.
_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


class KeyRefused(ValueError):
    """The key can't be used; the text is what is wrong (what would be right)."""


def read_file(path: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in a file: its bytes, with one trailing newline cut.

    environ: says which directories are closed to others, whatever the modes of the files in them: ``forbidden``.
    Raises KeyRefused.
    """
    quoted = shlex.quote(path)
    content = read_private(path, environ, f"make one: umask 077; brokerd key > {quoted}")
    key = _cut_newline(content)
    if not key:
        raise KeyRefused(f"{path} is empty (write a key into it: brokerd key > {quoted})")
    return key


def read_private(path: str, environ: Mapping[str, str], missing: str) -> bytes:
    """Return what is in a file that nobody but its owner may read.

    environ: as for ``read_file``. missing: what would be right where there is no file.
    Raises KeyRefused.
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise KeyRefused(_unopened(path, error, missing)) from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise KeyRefused(f"{path} is a directory (give the file that holds the key)")
        if not stat.S_ISREG(status.st_mode):
            raise KeyRefused(f"{path} is no file (give the file that holds the key)")
        exposure = exposed(path, status, forbidden(path, environ))
        if exposure:
            raise KeyRefused(exposure)
        content = os.read(handle, MAX_KEY + 1)
    except OSError as error:
        raise KeyRefused(f"{path} can't be read: {error.strerror} (see to the disk)") from None
    finally:
        os.close(handle)
    if len(content) > MAX_KEY:
        raise KeyRefused(f"{path} is longer than {MAX_KEY // 1024} KiB (give the file that holds the key)")
    return content


def read_env(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in an environment variable. Raises KeyRefused."""
    value = environ.get(name)
    if value is None:
        raise KeyRefused(f"the environment has no variable {name} (set it, or give key_file)")
    if not value:
        raise KeyRefused(f"the environment variable {name} is empty (set it to the key)")
    # Back to the bytes that the environment held, whatever its encoding.
    return os.fsencode(value)


def read_credential(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in a credential that systemd hands over. Raises KeyRefused."""
    if "/" in name or name in (".", ".."):
        raise KeyRefused(f"{name} is no credential's name (give the name in LoadCredential=, without a path)")
    directory = environ.get("CREDENTIALS_DIRECTORY") or environ.get("BROKERD_SEALED_DIRECTORY")
    if not directory:
        raise KeyRefused(f"there is no CREDENTIALS_DIRECTORY (run under systemd with LoadCredential={name}:PATH)")
    return read_file(os.path.join(directory, name), environ)  # noqa: PTH118 - read_file takes text


def exposed(path: str, status: os.stat_result, shared: int = _OTHERS) -> str:
    """Return what is wrong with a file's mode and the chmod to run, or "" where nothing is.

    shared: the mode bits that nobody but the owner may have.
    """
    # Windows has no such bits; what os.stat makes up there means nothing.
    if os.name != "posix" or not stat.S_ISREG(status.st_mode) or not status.st_mode & shared:
        return ""
    mode = stat.S_IMODE(status.st_mode)
    return f"others than its owner can read or write {path}, mode {mode:04o} (chmod 600 {shlex.quote(path)})"


def forbidden(path: str, environ: Mapping[str, str]) -> int:
    """Return the mode bits that a file with a key in it must not have.

    A file below CREDENTIALS_DIRECTORY may be readable by its group, as some versions of systemd make it: the
    directory itself is closed to others. One below BROKERD_SEALED_DIRECTORY may be readable by all, as container
    runtimes make it: nobody but this container sees the directory. Only who starts the broker can know that, so the
    variable is set in the image and nowhere else.
    """
    if _is_below(path, environ.get("BROKERD_SEALED_DIRECTORY")):
        return stat.S_IWGRP | stat.S_IWOTH
    if _is_below(path, environ.get("CREDENTIALS_DIRECTORY")):
        return _OTHERS & ~stat.S_IRGRP
    return _OTHERS


def _is_below(path: str, directory: str | None) -> bool:
    return bool(directory) and Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory or ""))


def _cut_newline(content: bytes) -> bytes:
    if content.endswith(b"\n"):
        return content[:-2] if content.endswith(b"\r\n") else content[:-1]
    return content


def _unopened(path: str, error: OSError | ValueError, missing: str) -> str:
    if isinstance(error, ValueError):
        return "is no path (give the file that holds the key)"
    if error.errno == errno.ENOENT:
        return f"there is no file {path} ({missing})"
    if error.errno == errno.EACCES:
        return f"{path} can't be read: {error.strerror} (let this user own it, mode 0600)"
    return f"{path} can't be opened: {error.strerror} (give the file that holds the key)"
