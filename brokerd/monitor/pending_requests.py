"""Monitor connections whose request is not answered yet: few, short, and fair to each
origin.

A silent connection costs only a socket, and gives way to a newer one. The origin with
most connections loses its oldest one without a complete request. A peer that connects
often does not keep a health check from being answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

__all__ = ["Pending"]

#: Bytes after which a request counts as complete, so that the answer can say what is
#: wrong with it.
_MOST_HEAD: Final = 8 * 1024
#: The ends of a request's head; the parser decides whether a bare line feed is valid.
_ENDS: Final = (b"\r\n\r\n", b"\n\n")


class _Peer:
    """One connection. complete: whether its request is."""

    __slots__ = ("complete", "head", "origin", "sock", "timer")

    def __init__(self, sock: socket.socket, origin: str) -> None:
        self.sock = sock
        self.origin = origin
        self.head = bytearray()
        self.complete = False
        self.timer: asyncio.TimerHandle | None = None


class Pending:
    """The connections of one monitor that wait for their request, or for their turn.

    Args:
        most: Connections at once without a complete request.
        most_whole: Connections at once with one.
        longest_s: Seconds that a connection may last.
        on_complete: Called when a request is complete.
    """

    def __init__(
        self, most: int, most_whole: int, longest_s: float, on_complete: Callable[[], object]
    ) -> None:
        self._most = most
        self._most_whole = most_whole
        self._longest_s = longest_s
        self._on_complete = on_complete
        self._loop = asyncio.get_running_loop()
        #: Both dictionaries keep the order in which connections or requests came.
        self._unfinished: dict[_Peer, None] = {}
        self._complete: dict[_Peer, None] = {}
        #: Requests of each origin that were taken since no complete request was left.
        self._turns: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._unfinished) + len(self._complete)

    def add(self, sock: socket.socket, origin: str) -> None:
        """Add an accepted, non-blocking connection."""
        peer = _Peer(sock, origin)
        self._unfinished[peer] = None
        peer.timer = self._loop.call_later(self._longest_s, self._drop, peer)
        self._loop.add_reader(sock.fileno(), self._read, peer)
        # A health check's request has usually arrived already: it is read before a
        # silent connection could displace it.
        self._read(peer)
        for peers, most in ((self._unfinished, self._most), (self._complete, self._most_whole)):
            if len(peers) > most:
                self._drop(_least(peers))

    def take(self) -> tuple[socket.socket, bytes] | None:
        """Return the next connection with a complete request, and the request.

        Origins take turns.
        """
        first: dict[str, _Peer] = {}
        for peer in self._complete:
            first.setdefault(peer.origin, peer)
        if not first:
            self._turns.clear()
            return None
        peer = min(first.values(), key=lambda candidate: self._turns[candidate.origin])
        self._turns[peer.origin] += 1
        self._forget(peer)
        return peer.sock, bytes(peer.head)

    def close(self) -> None:
        """Close every connection."""
        for peer in [*self._unfinished, *self._complete]:
            self._drop(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(_MOST_HEAD)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        peer.head += data
        # TLS or another protocol: the answer is due at once.
        foreign = not peer.head[:1].isalpha() and not peer.head[:1].isspace()
        if foreign or len(peer.head) >= _MOST_HEAD or any(end in peer.head for end in _ENDS):
            self._loop.remove_reader(peer.sock.fileno())
            del self._unfinished[peer]
            peer.complete = True
            self._complete[peer] = None
            self._on_complete()

    def _drop(self, peer: _Peer) -> None:
        self._forget(peer)
        with contextlib.suppress(OSError):
            peer.sock.close()

    def _forget(self, peer: _Peer) -> None:
        if peer.complete:
            del self._complete[peer]
        else:
            del self._unfinished[peer]
            self._loop.remove_reader(peer.sock.fileno())
        if peer.timer is not None:
            peer.timer.cancel()


def _least(peers: Collection[_Peer]) -> _Peer:
    """Return the connection to close: the oldest of the origin that has most."""
    counts = Counter(peer.origin for peer in peers)
    most = max(counts.values())
    return next(peer for peer in peers if counts[peer.origin] == most)
