"""The process that listens at an address, as far as Linux tells this user.

It is looked up only for an error, whose reader has to end the other process. Another
user's process can't be seen without root.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["holder_of", "holder_of_peer"]

_PROC: Final = Path("/proc")
#: The state LISTEN in /proc/net/tcp.
_LISTENS: Final = "0A"
#: Most processes that are looked at.
_MOST: Final = 10_000


def holder_of(port: int) -> str:
    """Return the process that listens at a TCP port, as in ``nginx, process 812``; or ""."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    if not sockets:
        return ""
    for count, process in enumerate(_PROC.glob("[0-9]*")):
        if count >= _MOST:
            break
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                if str(descriptor.readlink()) in sockets:
                    return _named(process)
    return ""


def holder_of_peer(sock: socket.socket) -> str:
    """Return the process that listens at a connected Unix socket's other end, or ""."""
    if not hasattr(socket, "SO_PEERCRED"):
        return ""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    with contextlib.suppress(OSError):
        return _named(_PROC / str(pid))
    return ""


def _named(process: Path) -> str:
    """Return a process's name and id. Raises OSError."""
    name = (process / "comm").read_text(errors="replace").strip()
    return f"{name}, process {process.name}"


def _inodes(port: int) -> Iterator[str]:
    """Yield the inodes of the sockets that listen at a port."""
    for file in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / file).read_text().splitlines()[1:]:
                fields = line.split()
                local, state, inode = fields[1], fields[3], fields[9]
                if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                    yield inode
