"""Reads a key's bytes from a file, an environment variable or a systemd credential.

A key file that other users can read is refused, and the error names the chmod to run.
No error, name or representation made here holds a key. The rules are those of
docs/configuration.md, "Keys".
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from brokerd_client._common.paths import is_plainly_a_path

__all__ = [
    "MAX_KEY",
    "OTHERS",
    "KeyRefused",
    "exposed",
    "forbidden",
    "oddity",
    "read_credential",
    "read_env",
    "read_file",
    "read_private",
]

#: Limits a key file, in bytes; a longer file is not a key file.
MAX_KEY: Final = 64 * 1024

#: The mode bits by which other users could read or replace a key file.
OTHERS: Final = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
_ANY_WRITE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
#: Matches usual variable names: words in capitals, each shorter than a key.
_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9]{0,14}(_[A-Z0-9]{1,15}){0,5}")
#: UTF-16 is recognized by its zero bytes only in a key with more letters than this.
_FEW: Final = 3
# O_NONBLOCK: a FIFO in the place of a file must not block the daemon.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


class KeyRefused(ValueError):
    """The key can't be used; the text gives the fault (and its remedy)."""


def read_file(path: str, environ: Mapping[str, str], written: str | None = None) -> bytes:
    """Return the key in a file: its bytes without one trailing newline.

    environ: names the directories that are closed to other users, whatever the modes of
    the files in them; see ``forbidden``.
    written: as for ``read_private``. Raises KeyRefused.
    """
    quoted = shlex.quote(path)
    content = read_private(path, environ, f"make one: umask 077; brokerd key > {quoted}", written)
    key = _cut_newline(content)
    if not key:
        raise KeyRefused(f"{path} is empty (write a key into it: brokerd key > {quoted})")
    return key


def read_private(
    path: str, environ: Mapping[str, str], missing: str, written: str | None = None
) -> bytes:
    """Return the content of a file that only its owner may read.

    environ: as for ``read_file``. missing: the remedy if the file does not exist.
    written: the path as the configuration has it, if that differs. An error repeats the
    path only if it is clearly a path, and not a key.
    Raises KeyRefused.
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        plain = is_plainly_a_path(path if written is None else written)
        raise KeyRefused(
            _unopened(path, error, missing) if plain else _unopened_secret(error)
        ) from None
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
        raise KeyRefused(
            f"{path} is longer than {MAX_KEY // 1024} KiB (give the file that holds the key)"
        )
    return content


def read_env(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in an environment variable. Raises KeyRefused."""
    value = environ.get(name)
    if value is None:
        shown = name if _VARIABLE.fullmatch(name) else "of that name"
        raise KeyRefused(f"the environment has no variable {shown} (set it, or give key_file)")
    if not value:
        raise KeyRefused(f"the environment variable {name} is empty (set it to the key)")
    # Restore the bytes of the environment, whatever its encoding.
    return os.fsencode(value)


def read_credential(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in a credential that systemd hands over. Raises KeyRefused."""
    if "/" in name or name in (".", ".."):
        raise KeyRefused(
            "is no credential's name (give the name in LoadCredential=, without a path)"
        )
    directory = environ.get("CREDENTIALS_DIRECTORY") or environ.get("BROKERD_SEALED_DIRECTORY")
    if not directory:
        raise KeyRefused(
            "there is no CREDENTIALS_DIRECTORY (run under systemd with LoadCredential=NAME:PATH)"
        )
    path = os.path.join(directory, name)  # noqa: PTH118 - read_file takes text
    if "\0" in name or not os.path.lexists(path):
        # The error does not repeat the name: it may be the key.
        raise KeyRefused(
            f"{directory} holds no credential of that name (give the unit LoadCredential=NAME:PATH)"
        )
    return read_file(path, environ)


def exposed(path: str, status: os.stat_result, shared: int = OTHERS) -> str:
    """Return the fault of a file's mode with the chmod to run, or "" without a fault.

    shared: the mode bits that must not be set.
    """
    # Windows has no such bits; the values of os.stat have no meaning there.
    if os.name != "posix" or not stat.S_ISREG(status.st_mode) or not status.st_mode & shared:
        return ""
    mode = stat.S_IMODE(status.st_mode)
    where = ""
    if not mode & _ANY_WRITE or _is_projected(path):
        where = (
            ", and it is not below BROKERD_SEALED_DIRECTORY, for secrets that only this container"
            " sees"
        )
    return (
        f"others than its owner can read or write {path}, mode {mode:04o}{where} (chmod 600"
        f" {shlex.quote(path)})"
    )


def oddity(key: bytes, kind: str) -> str:
    """Return a probable mistake in a key and its remedy, or "" without one.

    kind: the key's origin, as in ``keys``: file, key, env or credential. The text shows
    nothing of the key.
    """
    right = {
        "env": "set the variable to the key alone",
        "key": "write it in one line, in quotes: not key: |",
    }.get(kind, "write the key into it anew: brokerd key > FILE")
    wrong = ""
    if _is_utf_16(key):
        wrong = "is UTF-16"
    elif key.startswith(b"\xef\xbb\xbf"):
        wrong = "begins with a byte order mark"
    elif _is_text(key):
        if not key.strip():
            wrong = "is blank"
        elif key.endswith((b"\n", b"\r")):
            cut = " besides the one that is cut" if kind in ("file", "credential") else ""
            wrong = f"ends with a line break{cut}"
        elif key[-1:].isspace() or key[:1].isspace():
            wrong = f"{'ends' if key[-1:].isspace() else 'begins'} with a blank"
    return f"{wrong}, which belongs to the key then ({right})" if wrong else ""


def _is_text(key: bytes, encoding: str = "utf-8") -> bool:
    """Return whether a key is text, as random bytes may begin or end with any byte."""
    try:
        return all(char.isprintable() or char.isspace() for char in key.decode(encoding))
    except UnicodeDecodeError:
        return False


def _is_utf_16(key: bytes) -> bool:
    """Return whether a key is UTF-16: text after a byte order mark, or every other byte
    0.

    The last newline may have lost one of its two bytes.
    """
    if key.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _is_text(key[: len(key) // 2 * 2], "utf-16")
    even, odd = key[::2], key[1::2]
    for zeros, letters in ((odd, even), (even, odd)):
        if (
            len(letters) > _FEW
            and not any(zeros[:_FEW])
            and not any(zeros[:-1])
            and all(letters[:-1])
        ):
            return True
    return False


def _is_projected(path: str) -> bool:
    """Return whether a path leads through a directory that Kubernetes made for a
    volume.
    """
    parts = Path(os.path.realpath(path)).parts
    return any(part.startswith("..") for part in parts)


def forbidden(path: str, environ: Mapping[str, str]) -> int:
    """Return the mode bits that a file with a key in it must not have.

    A file below CREDENTIALS_DIRECTORY may be readable by its group, as in some versions
    of systemd. The directory itself is closed to other users.

    A file below BROKERD_SEALED_DIRECTORY may be readable by all users, as container
    runtimes make it. Only this container sees the directory. The broker can't check
    that, so the variable is set in the image and nowhere else.
    """
    if _is_below(path, environ.get("BROKERD_SEALED_DIRECTORY")):
        return stat.S_IWGRP | stat.S_IWOTH
    if _is_below(path, environ.get("CREDENTIALS_DIRECTORY")):
        return OTHERS & ~stat.S_IRGRP
    return OTHERS


def _is_below(path: str, directory: str | None) -> bool:
    return bool(directory) and Path(os.path.normpath(path)).is_relative_to(
        os.path.normpath(directory or "")
    )


def _cut_newline(content: bytes) -> bytes:
    if content.endswith(b"\n"):
        return content[:-2] if content.endswith(b"\r\n") else content[:-1]
    return content


def _unopened_secret(error: OSError | ValueError) -> str:
    right = "give the path of the file that holds the key; a key itself is given with key"
    if isinstance(error, ValueError):
        return "is no path (give the file that holds the key)"
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
        return f"there is no file of that name ({right})"
    return f"the file of that name can't be opened: {error.strerror} ({right})"


def _unopened(path: str, error: OSError | ValueError, missing: str) -> str:
    if isinstance(error, ValueError):
        return "is no path (give the file that holds the key)"
    if error.errno == errno.ENOENT:
        return f"there is no file {path} ({missing})"
    if error.errno == errno.EACCES:
        return f"{path} can't be read: {error.strerror} (let this user own it, mode 0600)"
    return f"{path} can't be opened: {error.strerror} (give the file that holds the key)"
