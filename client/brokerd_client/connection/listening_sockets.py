"""A listening socket, its file, and the waker that ends a wait from another thread.

A server socket accepts peers one at a time and reports which peers have sent bytes. It
knows nothing of keys, and waits only in wait().
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Collection
from multiprocessing import util
from pathlib import Path
from typing import Any, Final, Protocol

from brokerd_client._common.socket_options import own_port
from brokerd_client.address import BROKER_SCHEME, Family
from brokerd_client.connection.handshaking import PeerStream, SocketPeer
from brokerd_client.connection.readiness import readable
from brokerd_client.errors import AddressError

__all__ = [
    "ServerSocket",
    "SocketServer",
    "arbitrary_address",
    "default_family",
    "families",
    "no_delay",
    "open_server",
]

#: The families that every machine of this system has. AF_INET6 works too, if the
#: machine has IPv6.
families: Final[list[Family]] = (
    ["AF_INET", "AF_PIPE"] if sys.platform == "win32" else ["AF_INET", "AF_UNIX"]
)
default_family: Final[Family] = families[-1]

_OWNER_ONLY: Final = 0o600


def arbitrary_address(family: str) -> Any:
    """Return a free address, for a listener without an address.

    Args:
        family: AF_INET, AF_INET6, AF_UNIX, AF_PIPE or AF_BROKER. The address of AF_BROKER
            is the name of this program at its broker.

    Raises:
        ValueError: The family is not known, or the program has no name.
    """
    if family == "AF_INET":
        return ("localhost", 0)
    if family == "AF_INET6":
        return ("::1", 0)
    if family == "AF_UNIX":
        # The directory is this process's own, has mode 0700 and is removed when the
        # process ends, so a guessed name does no harm.
        return tempfile.mktemp(prefix="listener-", dir=util.get_temp_dir())  # noqa: S306
    if family == "AF_PIPE":
        return tempfile.mktemp(prefix=rf"\\.\pipe\pyc-{os.getpid()}-", dir="")  # noqa: S306
    if family == "AF_BROKER":
        name = os.environ.get("BROKERD_NAME")
        if not name:
            raise AddressError(
                "this program has no name at a broker: give the address broker://NAME, or set"
                " BROKERD_NAME"
            )
        return BROKER_SCHEME + name
    raise ValueError(f"unrecognized family {family}")


class ServerSocket(Protocol):
    """A socket or named pipe that accepts peers."""

    #: The address that peers connect to.
    address: Any

    @property
    def most_peers(self) -> int:
        """The largest number of peer streams that wait() can watch."""

    def wait(
        self, peer_streams: Collection[PeerStream], timeout: float | None
    ) -> tuple[bool, set[int]]:
        """Wait for a new peer, for input, for wake(), or for ``timeout`` seconds.

        Returns (whether a peer may have connected, the filenos of the streams with
        input).
        """

    def accept(self) -> tuple[PeerStream, object] | None:
        """Return the next peer's stream and address; None if the peer has left.

        Raises OSError.
        """

    def wake(self) -> None:
        """End a wait. Any thread may call this."""

    def close(self) -> None:
        """Close, and remove the socket file that this process has created."""

    def renew_waker(self) -> None:
        """Replace the waker, which a fork shares with its parent process."""


class SocketServer:
    """A listening socket, and its file if it is a Unix socket with a file."""

    most_peers: Final = sys.maxsize

    def __init__(self, address: Any, family: Family, backlog: int) -> None:
        self._unlink: util.Finalize | None = None
        self._waker: tuple[socket.socket, ...] = ()
        self._socket = socket.socket(getattr(socket, family))
        try:
            self._socket.setblocking(False)
            if family == "AF_UNIX":
                self._bind_file(address)
            else:
                own_port(self._socket)
                self._socket.bind(address)
            self._socket.listen(backlog)
            self.address = self._socket.getsockname()
            self._tcp = family != "AF_UNIX"
            self.renew_waker()
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        self.close()

    def _bind_file(self, address: str | bytes) -> None:
        """Bind a Unix socket that only its owner can connect to, whatever the umask.

        The file gets the socket's own mode, less the umask, so it is never more open.
        On systems without that feature, no process can connect before listen() either.
        """
        if os.fsencode(address)[:1] == b"\0":
            self._socket.bind(address)
            return
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.fchmod(self._socket.fileno(), _OWNER_ONLY)
        self._socket.bind(address)
        path = Path(os.fsdecode(address)).absolute()
        status = path.lstat()
        self._unlink = util.Finalize(
            self, _unlink_if_same, args=(path, status.st_dev, status.st_ino), exitpriority=0
        )
        if stat.S_IMODE(status.st_mode) != _OWNER_ONLY:
            path.chmod(_OWNER_ONLY)

    def wait(
        self, peer_streams: Collection[PeerStream], timeout: float | None
    ) -> tuple[bool, set[int]]:
        server, waker = self._socket.fileno(), self._waker[0].fileno()
        if server < 0:
            return False, set()
        descriptors = [server, waker, *(peer_stream.fileno() for peer_stream in peer_streams)]
        ready = set(readable(descriptors, timeout))
        if waker in ready:
            with contextlib.suppress(OSError):
                self._waker[0].recv(4096)
        has_peer = server in ready
        return has_peer, ready - {server, waker}

    def accept(self) -> tuple[PeerStream, object] | None:
        try:
            sock, peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            # Another thread or process was faster, or the peer has closed the
            # connection.
            return None
        if self._tcp:
            no_delay(sock)
        return SocketPeer(sock), peer

    def wake(self) -> None:
        # A full waker wakes as well; a closed waker has no waiting thread.
        with contextlib.suppress(OSError):
            self._waker[1].send(b"\0")

    def close(self) -> None:
        unlink, self._unlink = self._unlink, None
        if unlink is not None:
            # First, while the open socket still keeps its inode number from being
            # reused. It does nothing in a process that did not create the file.
            unlink()
        self._socket.close()
        for waker_end in self._waker:
            waker_end.close()

    def renew_waker(self) -> None:
        for waker_end in self._waker:
            waker_end.close()
        self._waker = socket.socketpair()
        for waker_end in self._waker:
            waker_end.setblocking(False)


def no_delay(sock: socket.socket) -> None:
    """Send small messages without delay. A lost peer is detected at the next read."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def open_server(address: Any, family: Family, backlog: int) -> ServerSocket:
    """Return a server socket at the address.

    Raises OSError, for example if it is in use.
    """
    if sys.platform == "win32" and family == "AF_PIPE":
        from brokerd_client.connection.named_pipes import PipeServer

        return PipeServer(address)
    return SocketServer(address, family, backlog)


def _unlink_if_same(path: Path, device: int, inode: int) -> None:
    """Remove the socket file, unless another file has taken its place."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if (status.st_dev, status.st_ino) == (device, inode):
            path.unlink()
