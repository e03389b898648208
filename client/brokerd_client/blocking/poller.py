"""Waits of the I/O thread: for its waker, and for one socket.

A part of the blocking face. On Linux another thread can change what the I/O thread
waits for, without waking it: see EpollPoller.change.
"""

from __future__ import annotations

import select
import selectors
import socket
from typing import Final

__all__ = ["READ", "WRITE", "EpollPoller", "SelectorPoller", "poller"]

#: What to wait for; their sum is both.
READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


class SelectorPoller:
    """A poller for every system.

    Args:
        waker: The socket whose input ends each wait.
    """

    def __init__(self, waker: socket.socket) -> None:
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._selector.register(waker, READ)

    def watch(self, sock: socket.socket, mask: int, before: int) -> None:
        """Wait for the socket's ``mask`` from now on, and no longer for ``before``.

        With 0 the socket is not waited for.
        """
        if not before:
            self._selector.register(sock, mask)
        elif mask:
            self._selector.modify(sock, mask)
        else:
            self._selector.unregister(sock)

    def wait(self, timeout: float | None) -> tuple[bool, int]:
        """Wait for at most ``timeout`` seconds; return (woken, what the socket is ready for)."""
        woken, ready = False, 0
        for key, events in self._selector.select(timeout):
            if key.fileobj is self._waker:
                woken = True
            else:
                ready = events
        return woken, ready

    def close(self) -> None:
        """Close the poller."""
        self._selector.close()


class EpollPoller:
    """A poller for Linux.

    Args:
        waker: The socket whose input ends each wait.
    """

    def __init__(self, waker: socket.socket) -> None:
        self._waker_fd = waker.fileno()
        self._epoll = select.epoll()
        self._epoll.register(self._waker_fd, select.EPOLLIN)

    def watch(self, sock: socket.socket, mask: int, before: int) -> None:
        """Wait for the socket's ``mask`` from now on, and no longer for ``before``."""
        if not before:
            self._epoll.register(sock, _EPOLL[mask])
        elif mask:
            self._epoll.modify(sock, _EPOLL[mask])
        else:
            self._epoll.unregister(sock)

    def change(self, sock: socket.socket, mask: int) -> None:
        """Wait for the socket's ``mask``, in a wait that has begun too.

        With 0 only errors and the end of both directions are reported.
        """
        self._epoll.modify(sock, _EPOLL[mask])

    def wait(self, timeout: float | None) -> tuple[bool, int]:
        """Wait for at most ``timeout`` seconds; return (woken, what the socket is ready for)."""
        woken, ready = False, 0
        for fd, events in self._epoll.poll(timeout):
            if fd == self._waker_fd:
                woken = True
            else:
                # As in selectors: an error or the end is reported by a read or a write.
                ready = (READ if events & ~select.EPOLLOUT else 0) | (
                    WRITE if events & ~select.EPOLLIN else 0
                )
        return woken, ready

    def close(self) -> None:
        """Close the poller."""
        self._epoll.close()


if hasattr(select, "epoll"):
    _EPOLL: Final = (
        0,
        select.EPOLLIN,
        select.EPOLLOUT,
        select.EPOLLIN | select.EPOLLOUT,
    )
    poller: type[EpollPoller | SelectorPoller] = EpollPoller
else:  # pragma: no cover - not on Linux
    poller = SelectorPoller
