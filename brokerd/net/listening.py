"""Listening sockets and pipes: bound as the configuration says, a stale socket file taken over and a live one left.

Nothing is accepted here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from brokerd.config.values import ListenConfig
from brokerd.net.pipes import PipeListener, open_pipe
from brokerd_client.address import Address, parse

__all__ = ["BACKLOG", "ListenError", "Listening", "listen"]

#: Connections the system keeps for us until they are accepted; it caps this at its own limit.
BACKLOG: Final = 4096


class ListenError(Exception):
    """An address can't be listened at; the message says which, why and what would help."""


@dataclass(slots=True)
class Listening:
    """One listening socket, or what looks like one and takes a pipe's connections.

    address: where it really listens, a port chosen by the system filled in. inode: of its socket file,
    so that nobody else's file is removed at the end.
    """

    config: ListenConfig
    sock: socket.socket | PipeListener
    address: Address
    inode: tuple[int, int] | None = None

    def apply(self, config: ListenConfig) -> None:
        """Take over changed settings of the same address."""
        if config is self.config:
            return
        self.config = config
        if self.inode is not None:
            with contextlib.suppress(OSError):
                Path(self.address.path).chmod(config.mode if config.mode is not None else 0o600)
                if config.group is not None:
                    shutil.chown(self.address.path, group=config.group)

    def close(self) -> None:
        """Stop listening and remove the socket file, if it is still ours."""
        self.sock.close()
        if self.inode is not None:
            path = Path(self.address.path)
            with contextlib.suppress(OSError):
                if _inode(path) == self.inode:
                    path.unlink()


def listen(config: ListenConfig) -> list[Listening]:
    """Return the listening sockets of one ``listen`` entry: one, or one for each address a host name has.

    Raises ListenError.
    """
    address = config.address
    try:
        if address.family == "AF_UNIX":
            return [_listen_unix(config)]
        if address.family == "AF_PIPE":
            return [Listening(config, open_pipe(address.path), address)]
        return _listen_tcp(config)
    except OSError as error:
        raise ListenError(f"can't listen at {address}: {error.strerror or error}{_hint(address, error)}") from error


def _hint(address: Address, error: OSError) -> str:
    if address.family == "AF_PIPE":
        there = error.errno == errno.EACCES
        return " (another program listens there, or connections of an earlier listener are left)" if there else ""
    hints = {
        errno.EADDRINUSE: " (another program listens there)",
        errno.EACCES: " (give the daemon's user write access to the directory, or choose a port above 1023)",
        errno.ENOENT: " (make the directory first)",
        errno.EADDRNOTAVAIL: " (no interface of this machine has that address)",
    }
    return hints.get(error.errno or 0, "")


def _listen_tcp(config: ListenConfig) -> list[Listening]:
    host, port = config.address.host, config.address.port
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[Listening] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, sockaddr in dict.fromkeys(found):
            # A name with several addresses and port 0 gets the same port for all of them.
            at = (sockaddr[0], opened[0].address.port, *sockaddr[2:]) if opened and not port else sockaddr
            try:
                opened.append(_listen_at(config, family, at))
            except OSError as error:
                # localhost is often ::1 too where IPv6 is switched off: what is there is served.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not opened:
            raise missing
    except OSError:
        for each in opened:
            each.close()
        raise
    return opened


def _listen_at(config: ListenConfig, family: int, sockaddr: tuple[Any, ...]) -> Listening:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # On Windows SO_REUSEADDR would let anybody take the port over; its opposite is right there.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return Listening(config, sock, parse(sock.getsockname()[:2]))
    except OSError:
        sock.close()
        raise


def _listen_unix(config: ListenConfig) -> Listening:
    address = config.address
    if address.is_file:
        _take_over(Path(address.path))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening = Listening(config, sock, address)
    try:
        if address.is_file:
            _bind_file(listening, sock)
        else:
            sock.bind(address.path)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except LookupError as error:
        listening.close()
        raise ListenError(f"can't listen at {address}: {error}") from error
    except OSError as error:
        listening.close()
        if error.errno is None and "too long" in str(error):
            raise ListenError(
                f"can't listen at {address}: the path is too long for a socket (some 100 bytes)"
            ) from error
        raise
    return listening


def _bind_file(listening: Listening, sock: socket.socket) -> None:
    config, path = listening.config, Path(listening.address.path)
    # Before bind, so that there is no moment in which others could connect: the file is made with this mode.
    os.fchmod(sock.fileno(), config.mode if config.mode is not None else 0o600)
    umask = os.umask(0)
    try:
        sock.bind(str(path))
    finally:
        os.umask(umask)
    listening.inode = _inode(path)
    if config.group is not None:
        shutil.chown(path, group=config.group)


def _take_over(path: Path) -> None:
    """Remove the socket file of a dead daemon. Raises ListenError for a live one, or for any other file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(
            f"can't listen at {path}: a file that is no socket is there (choose another path or remove it)"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except OSError:
            pass
    raise ListenError(f"can't listen at {path}: another program is listening there (stop it, or choose another path)")


def _inode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
