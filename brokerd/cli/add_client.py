"""Adds a client: its key file and its entry below ``clients.d``, both or none.

The command writes two new files and their directories, and never overwrites a file.
Then it reads the whole configuration again. If that is invalid or lacks the client,
everything is removed again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from brokerd.config.key_files import new_key
from brokerd.config.load import load

__all__ = ["Added", "NotAdded", "add_client"]

_OPEN_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
#: The errors that systems report for a file system without links.
_NO_LINKS: Final = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class NotAdded(Exception):
    """The client can't be added; the text gives the fault (and its remedy).

    Nothing was changed.
    """


@dataclass(frozen=True, slots=True)
class Added:
    """The new files."""

    entry: Path
    key: Path


def add_client(name: str, main: Path, *, admin: bool = False) -> Added:
    """Create a client of this name, with a new key, and return its files.

    Args:
        name: A valid client name.
        main: The configuration's main file.
        admin: Whether the client is an administrator.

    Raises NotAdded, or ConfigError if the configuration has mistakes, before or after.
    In both cases nothing was changed.
    """
    home = main.absolute().parent
    entry, key = home / "clients.d" / f"{name}.yaml", home / "keys" / name
    quoted = name if yaml.safe_load(name) == name else f'"{name}"'
    text = (
        f"clients:\n  {quoted}:\n    key_file:"
        f" {yaml.safe_dump(f'../keys/{name}').splitlines()[0]}\n"
    ) + ("    admin: true\n" if admin else "")
    with ExitStack() as undo:
        try:
            if main.is_file():
                # A configuration that includes the files of a directory can't be read
                # without that directory.
                _make_directory(entry.parent, 0o755, home, undo)
            _check_new(name, main, entry, key)
            _make_directory(key.parent, 0o700, home, undo)
            # The key is written first: an entry without its key would be a mistake in
            # the configuration.
            _write_new(key, new_key() + "\n", 0o600, undo)
            _write_new(entry, text, 0o644 & main.stat().st_mode, undo)
        except FileExistsError as error:
            raise NotAdded(
                f"the file {error.filename} exists already (move it away, or choose another name)"
            ) from error
        except OSError as error:
            raise NotAdded(
                f"{error.filename or home} can't be written: {error.strerror} (check the file"
                " system)"
            ) from error
        if name not in load(main).clients:
            raise NotAdded(
                f"{main} does not include {entry}"
                ' (add this line to it: include: ["clients.d/*.yaml"])'
            )
        undo.pop_all()
    return Added(entry, key)


def _check_new(name: str, main: Path, entry: Path, key: Path) -> None:
    """Raise NotAdded if the client or its files exist already."""
    config = load(main)
    if name in config.clients:
        raise NotAdded(
            f"client {name!r} is configured already, at {config.clients[name].source} (choose"
            " another name)"
        )
    for file in (key, entry):
        if file.is_symlink() or file.exists():
            raise NotAdded(f"the file {file} exists already (move it away, or choose another name)")


def _make_directory(path: Path, mode: int, home: Path, undo: ExitStack) -> None:
    if path.is_dir():
        return
    path.mkdir(mode)
    undo.callback(_quietly, path.rmdir)
    _give_away(path, home)
    _sync_directory(home)


def _write_new(path: Path, text: str, mode: int, undo: ExitStack) -> None:
    """Write a new file completely or not at all. Raises FileExistsError, OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _file_to_remove(temporary):
        handle = os.open(temporary, _OPEN_FLAGS, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            _give_away(temporary, path.parent)
            if hasattr(os, "fchmod"):
                os.fchmod(handle, mode)
            os.fsync(handle)
        _put_in_place(temporary, path)
        undo.callback(_quietly, path.unlink)
    _sync_directory(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete file its final name. Raises FileExistsError.

    A rename alone would replace a file that was created in the meantime.
    """
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise FileExistsError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Claim the name first: for a moment the file exists, and is empty.
        os.close(os.open(path, _OPEN_FLAGS, 0o600))
        temporary.replace(path)


@contextmanager
def _file_to_remove(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        _quietly(path.unlink)


def _give_away(path: Path, like: Path) -> None:
    """Change the owner of root's new file to that of its directory.

    The broker has to read the file, and need not run as root.
    """
    if os.name == "posix" and os.geteuid() == 0:
        status = like.stat()
        os.chown(path, status.st_uid, status.st_gid)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _quietly(act: object) -> None:
    assert callable(act)
    with contextlib.suppress(OSError):
        act()
