"""Listening sockets and pipes, bound as the configuration says.

A stale socket file is replaced; the file of a live listener is left alone. Nothing is
accepted here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from brokerd.config.values import ListenConfig, Source
from brokerd.net.listen.named_pipes import PipeListener, open_pipe
from brokerd.net.listen.port_holder import holder_of, holder_of_peer
from brokerd_client._common.socket_options import own_port
from brokerd_client.address import Address, parse

__all__ = [
    "BACKLOG",
    "ListenError",
    "Listening",
    "Resolved",
    "inherited",
    "listen",
    "look_up",
    "precheck",
]

#: The addresses that host names resolve to, as ``socket.getaddrinfo`` returns them.
Resolved: TypeAlias = Mapping[Address, list[Any]]

#: Connections that the system keeps until they are accepted; it caps this at its own
#: limit.
BACKLOG: Final = 4096
_HINTS: Final = {
    errno.EADDRINUSE: " (another program listens there)",
    errno.EPERM: (
        " (it can get a group that the daemon's user belongs to, where the daemon's sandbox allows"
        " that)"
    ),
    errno.EACCES: (
        " (give the daemon's user write access to the directory, or choose a port above 1023)"
    ),
    errno.ENOENT: " (make the directory first)",
    errno.EADDRNOTAVAIL: " (no interface of this machine has that address)",
}
#: Seconds to wait for another broker that begins to listen in the same directory, and
#: seconds between two tries.
_LOCK_S: Final = 3.0
_LOCK_AGAIN_S: Final = 0.002
_NO_SOCKET: Final = "a file that is not a socket is there (choose another path or remove it)"


class ListenError(Exception):
    """An address can't be listened at; the message says which, why and what would help."""


@dataclass(slots=True)
class Listening:
    """One listening socket, or a pipe listener that behaves like one.

    address: the real address, with the port that the system has chosen.
    text: that address as text: every connection that is accepted here has it.
    inode: of its socket file, so that another program's file is not removed at the end.
    first_group: the group with which the file was created.
    """

    config: ListenConfig
    sock: socket.socket | PipeListener
    address: Address
    inode: tuple[int, int] | None = None
    first_group: int = -1
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self.text = str(self.address)

    def is_lost(self) -> bool:
        """Return whether its socket file is missing or replaced: no client can connect
        any more.
        """
        if self.inode is None:
            return False
        try:
            return _inode(Path(self.address.path)) != self.inode
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def alter(self, config: ListenConfig) -> Callable[[], None]:
        """Apply changed settings of the same address; return a function that undoes the
        change.

        Raises ListenError; then nothing has changed.
        """
        before = self.config
        status = self._change_file(before, config)

        def undo() -> None:
            self._configure(before)
            if status is not None:
                with contextlib.suppress(OSError):
                    _restore(Path(self.address.path), status)

        self._configure(config)
        return undo

    def _configure(self, config: ListenConfig) -> None:
        self.config, self.address = config, _named(config, self.address)
        self.text = str(self.address)

    def _change_file(self, before: ListenConfig, after: ListenConfig) -> os.stat_result | None:
        """Change mode and group of the socket's file; return its old status.

        Return None if nothing has to change.
        """
        if self.inode is None or (before.mode, before.group) == (after.mode, after.group):
            return None
        path = Path(self.address.path)
        try:
            status = path.lstat()
            if (status.st_dev, status.st_ino) != self.inode:
                raise ListenError(
                    f"can't change {path}: the socket is no longer this broker's (restart the"
                    " broker)"
                )
            try:
                _give_to(path, status, after, self.first_group)
            except (OSError, LookupError):
                _restore(path, status)
                raise
        except (OSError, LookupError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else error.args[0]
            raise ListenError(f"can't change {path}: {reason}") from error
        return status

    def close(self) -> None:
        """Remove the socket file, if it is still this listener's, and stop listening.

        The order matters: while the socket listens, no other broker replaces the file.
        So the inode stays its own.
        """
        if self.inode is not None:
            path = Path(self.address.path)
            with contextlib.suppress(OSError):
                if _inode(path) == self.inode:
                    path.unlink()
        self.sock.close()


def look_up(entries: Iterable[ListenConfig]) -> dict[Address, list[Any]]:
    """Resolve the host names of these entries for ``listen``; this may take long.

    Raises ListenError.
    """
    resolved = {}
    for entry in entries:
        if entry.address.family in ("AF_INET", "AF_INET6"):
            try:
                resolved[entry.address] = _look_up(entry.address)
            except OSError as error:
                raise ListenError(
                    f"can't listen at {entry.address}: {error.strerror or error}"
                ) from error
    return resolved


def inherited(configured: Address, sock: socket.socket, address: Address) -> Listening:
    """Return a socket, and its file, at which another process listens.

    configured: the address in that process's configuration.
    """
    config = ListenConfig(configured, mode=None, group=None, allow_md5=False, source=Source("", 0))
    sock.setblocking(False)
    inode = None
    if address.is_file:
        with contextlib.suppress(OSError):
            inode = _inode(Path(address.path))
    return Listening(config, sock, address, inode)


def precheck(config: ListenConfig) -> str:
    """Return an obstacle to listening there that shows without trying, or ""."""
    address = config.address
    if not address.is_file:
        return ""
    path = Path(address.path)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return f"can't listen at {path}: {_NO_SOCKET}"
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"can't listen at {path}: {error.strerror}"
    if not path.parent.is_dir():
        return f"can't listen at {path}: {os.strerror(errno.ENOENT)}{_HINTS[errno.ENOENT]}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"can't listen at {path}: {os.strerror(errno.EACCES)}{_HINTS[errno.EACCES]}"
    return ""


def listen(config: ListenConfig, resolved: Resolved | None = None) -> list[Listening]:
    """Return the listening sockets of one ``listen`` entry.

    That is one socket, or one for each address of a host name.

    Args:
        resolved: The result of ``look_up``.

    Raises ListenError.
    """
    address = config.address
    try:
        if address.family == "AF_UNIX":
            return [_listen_unix(config)]
        if address.family == "AF_PIPE":
            return [Listening(config, open_pipe(address.path), address)]
        return _listen_tcp(config, (resolved or {}).get(address) or _look_up(address))
    except OSError as error:
        raise ListenError(
            f"can't listen at {address}: {error.strerror or error}{_hint(address, error)}"
        ) from error


def _hint(address: Address, error: OSError) -> str:
    if address.family == "AF_PIPE":
        is_in_use = error.errno == errno.EACCES
        return (
            " (another program listens there, or connections of an earlier listener are left)"
            if is_in_use
            else ""
        )
    if error.errno == errno.EADDRINUSE and address.port:
        holder = holder_of(address.port)
        if holder:
            return f" (another program listens there: {holder})"
    return _HINTS.get(error.errno or 0, "")


def _look_up(address: Address) -> list[Any]:
    # For text, Python would import its tables of international names.
    host = address.host.encode() if address.host.isascii() else address.host
    return list(
        socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
    )


def _listen_tcp(config: ListenConfig, resolved: list[Any]) -> list[Listening]:
    port = config.address.port
    opened: list[Listening] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, sockaddr in dict.fromkeys(resolved):
            # A name with several addresses and port 0 gets the same port for all of
            # them.
            at = (
                (sockaddr[0], opened[0].address.port, *sockaddr[2:])
                if opened and not port
                else sockaddr
            )
            try:
                opened.append(_listen_at(config, family, at))
            except OSError as error:
                # localhost often includes ::1 even if IPv6 is switched off: the
                # existing addresses are served.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not opened:
            raise missing
    except OSError:
        for listening in opened:
            listening.close()
        raise
    return opened


def _listen_at(config: ListenConfig, family: int, sockaddr: tuple[Any, ...]) -> Listening:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        own_port(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return Listening(config, sock, _named(config, parse(sock.getsockname()[:2])))
    except OSError:
        sock.close()
        raise


def _named(config: ListenConfig, address: Address) -> Address:
    """Return the address as clients have to write it."""
    return replace(address, tls=config.tls is not None)


def _listen_unix(config: ListenConfig) -> Listening:
    address = config.address
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening = Listening(config, sock, address)
    try:
        if address.is_file:
            with _alone_in(Path(address.path).parent):
                _take_over(Path(address.path))
                _bind_file(listening, sock)
                sock.listen(BACKLOG)
        else:
            sock.bind(address.path)
            sock.listen(BACKLOG)
        sock.setblocking(False)
    except ListenError:
        listening.close()
        raise
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


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other brokers from listening in this directory meanwhile.

    Two brokers that find the same stale file would otherwise both replace it. The lock
    is that of the directory itself (flock), so no file is left. It ends with the
    process. A cleanup program may hold the lock for long, and some file systems have no
    locks. Then the broker goes on without the lock.
    """
    import fcntl

    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        # A fault of the directory shows when the socket is bound.
        yield
        return
    try:
        deadline = time.monotonic() + _LOCK_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_AGAIN_S)
            except OSError:
                break
            else:
                break
        yield
    finally:
        os.close(handle)


def _bind_file(listening: Listening, sock: socket.socket) -> None:
    config, path = listening.config, Path(listening.address.path)
    # Before bind, so that the file is created with this mode: no other user can connect
    # in between.
    os.fchmod(sock.fileno(), config.mode if config.mode is not None else 0o600)
    umask = os.umask(0)
    try:
        sock.bind(str(path))
    finally:
        os.umask(umask)
    status = path.lstat()
    listening.inode, listening.first_group = (status.st_dev, status.st_ino), status.st_gid
    if config.group is not None:
        _give_to_group(path, config.group)


def _take_over(path: Path) -> None:
    """Remove the socket file of a dead daemon.

    Raises ListenError for the file of a live daemon, and for any other file.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"can't listen at {path}: {_NO_SOCKET}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        holder = ""
        try:
            probe.connect(str(path))
            holder = holder_of_peer(probe)
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except OSError:
            pass
    shown = f": {holder}" if holder else ""
    raise ListenError(
        f"can't listen at {path}: another program is listening there{shown} (stop it, or choose"
        " another path)"
    )


def _give_to(path: Path, status: os.stat_result, config: ListenConfig, first_group: int) -> None:
    """Set mode and group of a socket's file.

    On the way no user has more rights than by the old or the new settings.
    """
    mode = config.mode if config.mode is not None else 0o600
    path.chmod(mode & status.st_mode)
    _give_to_group(path, first_group if config.group is None else config.group)
    path.chmod(mode)


def _give_to_group(path: Path, group: str | int) -> None:
    """Change the group of a file, unless it is right already: a sandbox may forbid even
    trying.
    """
    if isinstance(group, str):
        import grp

        try:
            group = grp.getgrnam(group).gr_gid
        except KeyError:
            raise LookupError(f"group does not exist: {group!r}") from None
    if path.lstat().st_gid != group:
        os.chown(path, -1, group)


def _restore(path: Path, status: os.stat_result) -> None:
    path.chmod(stat.S_IMODE(status.st_mode) & 0o600)
    _give_to_group(path, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))


def _inode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
