"""The directory of the database: its lock, its reserve of disk space, its free space.

``mailboxes.state`` is locked by the one process that uses the database. It contains the
number of transactions that were committed. The number is written after each commit,
without waiting for the disk. SQLite takes a damaged or lost write-ahead log for one
that ends earlier. This number tells the difference, unless the system lost its power
too.

``mailboxes.reserve`` takes up disk space. It is removed when the disk is full, so that
acknowledgements still find room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["DATABASE", "Directory", "Refused"]

DATABASE: Final = "mailboxes.db"
_STATE: Final = "mailboxes.state"
_RESERVE: Final = "mailboxes.reserve"
_CHECKPOINT: Final = "mailboxes.checkpoint"
#: Largest reserve, in bytes: twice the write-ahead log, so that it can always be moved to
#: the database, and its space be used again. The reserve is at most a quarter of the free
#: space, and not smaller than the second number.
_RESERVE_BYTES: Final = 32 << 20
_SMALLEST_RESERVE: Final = 512 << 10
#: Seconds to wait for the lock: a store process whose broker was killed ends soon.
_LOCK_S: Final = 10.0
_RETRY_S: Final = 0.05
_FORM: Final = struct.Struct("<8sQI")
_MAGIC: Final = b"brokerdS"


class Refused(Exception):
    """The database can't be used; the text says why, and what to do."""


class Directory:
    """The directory of one database, locked for this process.

    Raises Refused if another process uses the database, or OSError.

    Attributes:
        path: The directory.
        commits: Transactions that were committed when the directory was last used; None
            if it was not used before.
    """

    def __init__(self, path: Path, wait_s: float = _LOCK_S) -> None:
        if fcntl is None:
            raise Refused("mailboxes need a POSIX system: files can't be locked here")
        self.path = path
        is_new = not path.exists()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._state = os.open(path / _STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # A file's name is lost with the power supply unless its directory is written too.
        _sync_names(path)
        if is_new:
            _sync_names(path.parent)
        self._checkpoint = -1
        try:
            _lock(self._state, path, wait_s)
            self.commits = self._noted()
            self._checkpoint = os.open(
                path / _CHECKPOINT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            reserve = path / _RESERVE
            #: Bytes of the reserve; 0 if it was used, or found no room.
            self.reserved = reserve.stat().st_size if reserve.exists() else 0
        except BaseException:
            self.close()
            raise

    def _noted(self) -> int | None:
        """Return the noted number of transactions; None for a new file."""
        noted = os.pread(self._state, _FORM.size + 1, 0)
        if not noted.strip(b"\0"):
            # A new file, also one whose first content was lost with the power supply.
            return None
        file = self.path / _STATE
        if len(noted) != _FORM.size:
            raise Refused(f"{file} is damaged: {_REMOVE_STATE}")
        magic, commits, check = _FORM.unpack(noted)
        if magic != _MAGIC or check != zlib.crc32(noted[:-4]):
            raise Refused(f"{file} is damaged: {_REMOVE_STATE}")
        return int(commits)

    def note(self, commits: int) -> None:
        """Note the number of committed transactions. Raises OSError.

        On a full disk the number before stays, and fewer transactions would be missed.
        """
        noted = _MAGIC + commits.to_bytes(8, "little")
        try:
            os.pwrite(self._state, noted + zlib.crc32(noted).to_bytes(4, "little"), 0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def sync(self) -> None:
        """Write the noted number to disk. Raises OSError."""
        os.fsync(self._state)

    def free(self) -> int:
        """Return how many bytes are free for this user. Raises OSError."""
        free = os.statvfs(self.path)
        return free.f_bavail * free.f_frsize

    def make_reserve(self) -> None:
        """Take up the reserved space, if there is room for it. Raises OSError."""
        if self.reserved:
            return
        size = min(_RESERVE_BYTES, self.free() // 4)
        if size < _SMALLEST_RESERVE:
            return
        file = self.path / _RESERVE
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            file.unlink()
        else:
            self.reserved = size
        finally:
            os.close(descriptor)

    def release_reserve(self) -> bool:
        """Free the reserved space; return False if it was free already."""
        if not self.reserved:
            return False
        (self.path / _RESERVE).unlink(missing_ok=True)
        self.reserved = 0
        return True

    def hold_checkpoint(self) -> bool:
        """Begin a checkpoint; return False while a backup copies the database."""
        try:
            fcntl.flock(self._checkpoint, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release_checkpoint(self) -> None:
        """End a checkpoint."""
        fcntl.flock(self._checkpoint, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the lock up."""
        for descriptor in (self._state, self._checkpoint):
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._state = self._checkpoint = -1


_REMOVE_STATE: Final = (
    "the last messages may be missing from the database. Run `brokerd store check`; to"
    " start with what is there, remove this file"
)


@contextlib.contextmanager
def no_checkpoints(path: Path, wait_s: float = _LOCK_S) -> Iterator[None]:
    """Keep the running store process from checkpoints, so that its files can be copied."""
    descriptor = os.open(path / _CHECKPOINT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refused(f"{path}: a checkpoint has taken {wait_s:g} s") from None
                time.sleep(_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _sync_names(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems write names at once, and have no such call.
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Refused(f"{path} is in use by another process (one broker each)") from None
            time.sleep(_RETRY_S)
        else:
            return
