"""Reads a key's bytes from a file, an environment variable or a systemd credential.

A key file that other users can read is refused, and the error names the chmod to run.
No error, name or representation made here holds a key. The rules are those of
docs/configuration.md, "Keys".
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from brokerd.config.file_reader import FileKind, Unreadable, read_file
from brokerd_client._common.paths import is_plainly_a_path

__all__ = [
    "MAX_KEY",
    "OTHERS",
    "exposed",
    "forbidden",
    "new_key",
    "oddity",
    "read_credential",
    "read_env",
    "read_key_file",
    "read_private",
]

#: Limits a key file, in bytes; a longer file is not a key file.
MAX_KEY: Final = 64 * 1024

#: Size of a new key, in bytes: that of the digest that it is used with.
_KEY_SIZE: Final = 32
#: The mode bits by which other users could read or replace a key file.
OTHERS: Final = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
_ANY_WRITE: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
#: Matches usual variable names: words in capitals, each shorter than a key.
_VARIABLE: Final = re.compile(r"[A-Z][A-Z0-9]{0,14}(_[A-Z0-9]{1,15}){0,5}")
#: UTF-16 is recognized by its zero bytes only in a key with more letters than this.
_FEW: Final = 3
#: The byte order marks with which editors begin a file.
_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_KIND: Final = FileKind(
    MAX_KEY,
    remedy="give the file that holds the key",
    forbidden="let this user own it, mode 0600",
    hidden="give the path of the file that holds the key; a key itself is given with key",
)


def new_key() -> str:
    """Return a new random key, as text for a file."""
    import secrets

    return secrets.token_urlsafe(_KEY_SIZE)


def read_key_file(path: str, environ: Mapping[str, str], written: str | None = None) -> bytes:
    """Return the key in a file: its bytes without one trailing newline.

    environ: names the directories that are closed to other users, whatever the modes of
    the files in them; see ``forbidden``.
    written: as for ``read_private``. Raises Unreadable.
    """
    quoted = shlex.quote(path)
    content = read_private(path, environ, f"make one: umask 077; brokerd key > {quoted}", written)
    key = _cut_newline(content)
    if not key:
        raise Unreadable(f"{path} is empty (write a key into it: brokerd key > {quoted})")
    return key


def read_private(
    path: str, environ: Mapping[str, str], missing: str, written: str | None = None
) -> bytes:
    """Return the content of a file that only its owner may read.

    Args:
        environ: As for ``read_key_file``.
        missing: The remedy if the file does not exist.
        written: The path as the configuration has it, if that differs. An error repeats
            the path only if it is clearly a path, and not a key.

    Raises Unreadable.
    """
    content, _ = read_file(
        path,
        _KIND,
        missing=missing,
        is_shown=is_plainly_a_path(path if written is None else written),
        fault_of=lambda status: exposed(path, status, forbidden(path, environ)),
    )
    return content


def read_env(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in an environment variable. Raises Unreadable."""
    value = environ.get(name)
    if value is None:
        shown = name if _VARIABLE.fullmatch(name) else "of that name"
        raise Unreadable(f"the environment has no variable {shown} (set it, or give key_file)")
    if not value:
        raise Unreadable(f"the environment variable {name} is empty (set it to the key)")
    # Restore the bytes of the environment, whatever its encoding.
    return os.fsencode(value)


def read_credential(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key in a credential that systemd hands over. Raises Unreadable."""
    if "/" in name or name in (".", ".."):
        raise Unreadable(
            "is not a valid credential name (give the name in LoadCredential=, without a path)"
        )
    directory = environ.get("CREDENTIALS_DIRECTORY") or environ.get("BROKERD_SEALED_DIRECTORY")
    if not directory:
        raise Unreadable(
            "CREDENTIALS_DIRECTORY is not set (run under systemd with LoadCredential=NAME:PATH)"
        )
    path = os.path.join(directory, name)  # noqa: PTH118 - read_key_file takes text
    if "\0" in name or not os.path.lexists(path):
        # The error does not repeat the name: it may be the key.
        raise Unreadable(
            f"{directory} holds no credential of that name (give the unit LoadCredential=NAME:PATH)"
        )
    return read_key_file(path, environ)


def exposed(path: str, status: os.stat_result, shared: int = OTHERS) -> str:
    """Return the fault of a file's mode with the chmod to run, or "" without a fault.

    shared: the mode bits that must not be set.
    """
    # Windows has no such bits; the values of os.stat have no meaning there.
    if os.name != "posix" or not stat.S_ISREG(status.st_mode) or not status.st_mode & shared:
        return ""
    mode = stat.S_IMODE(status.st_mode)
    note = ""
    if not mode & _ANY_WRITE or _is_projected(path):
        note = (
            ", and it is not below BROKERD_SEALED_DIRECTORY, which is for secrets that only this"
            " container sees"
        )
    return (
        f"users other than its owner can read or write {path}, mode {mode:04o}{note} (chmod 600"
        f" {shlex.quote(path)})"
    )


def oddity(key: bytes, kind: str) -> str:
    """Return a probable mistake in a key and its remedy, or "" without one.

    kind: the key's origin, as in ``keys``: file, key, env or credential. The text shows
    nothing of the key.
    """
    if key and not (
        key[:1].isspace() or key[-1:].isspace() or b"\0" in key or key.startswith(_MARKS)
    ):
        # That is so for each of the mistakes below, and they take long to look for.
        return ""
    remedy = {
        "env": "set the variable to the key alone",
        "key": "write it in one line, in quotes: not key: |",
    }.get(kind, "write the key again: brokerd key > FILE")
    wrong = ""
    if _is_utf_16(key):
        wrong = "is UTF-16"
    elif key.startswith(codecs.BOM_UTF8):
        wrong = "begins with a byte order mark"
    elif _is_text(key):
        if not key.strip():
            wrong = "is only white space"
        elif key.endswith((b"\n", b"\r")):
            cut = " besides the one that is cut" if kind in ("file", "credential") else ""
            wrong = f"ends with a line break{cut}"
        elif key[-1:].isspace() or key[:1].isspace():
            wrong = f"{'ends' if key[-1:].isspace() else 'begins'} with white space"
    return f"{wrong}, and is used as it is ({remedy})" if wrong else ""


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
    if key.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
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
