"""Liveness of TCP connections: find peers that are unplugged, cut off or switched off.

The system treats two cases differently. On an idle connection it probes the peer from
time to time (keepalive). While bytes are in flight it only retransmits them, for 15
minutes and more, and does not probe. For this case :class:`Silence` reads the system's
retransmission counts.

TCP_USER_TIMEOUT could replace this check. But it also ends connections whose peer lives
and does not read for that long. Sources: tcp(7); net/ipv4/tcp_timer.c, tcp_probe_timer.
A slow consumer is not a dead peer.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
from typing import Any, Final

__all__ = ["DEFAULT_S", "LOOKS", "TCP", "Silence", "has_ended", "keep_alive"]

#: Seconds without an answer after which a connection is closed, by default.
DEFAULT_S: Final = 30.0
#: Longest interval of a TCP keepalive option, in seconds.
_LONGEST_S: Final = 32767
#: Checks of a connection within that time.
LOOKS: Final = 4
#: The first fields of Linux's struct tcp_info. Those read are the counts of unanswered
#: retransmissions and probes, and the milliseconds since the last acknowledgement.
_TCP_INFO: Final = struct.Struct("=xxBB4x48xI")
#: The families of TCP's sockets.
TCP: Final = (getattr(socket, "AF_INET", None), getattr(socket, "AF_INET6", None))
#: TCP_KEEPIDLE; macOS calls it TCP_KEEPALIVE.
_IDLE: Final = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))


def keep_alive(sock: Any, limit_s: float) -> None:
    """Set TCP keepalive: the system ends an idle connection whose peer stops answering.

    limit_s: seconds without an answer, rounded down, at least one; 0 changes nothing.
    Sockets that are not TCP stay unchanged. Raises OSError.
    """
    if sock.family not in TCP or not limit_s:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle_s = max(1, int(limit_s / 2))
    probing_s = max(1, int(limit_s) - idle_s)
    interval_s = max(1, probing_s // 3)
    for option, value in (
        (_IDLE, idle_s),
        (_option("TCP_KEEPINTVL"), interval_s),
        (_option("TCP_KEEPCNT"), probing_s // interval_s),
    ):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, min(value, _LONGEST_S))


def _option(name: str) -> int | None:
    return getattr(socket, name, None)


def has_ended(sock: Any) -> bool:
    """Return whether the peer of a connected socket has ended its sending, without a
    read.

    On systems without ``poll`` the result is always False.
    """
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


class Silence:
    """The liveness check of one TCP connection with bytes in flight; it is called
    repeatedly.

    Only Linux has the counts; on other systems no peer is ever silent.
    """

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since: float | None = None

    def lasts(self, sock: Any, now: float) -> float:
        """Return the seconds without an answer to retransmissions; 0 if the peer
        answers.

        A peer that does not read, but answers, is not silent.

        Args:
            sock: A connected socket.
            now: The time, on the same clock as in the last call.
        """
        quiet_s = _quiet_s(sock)
        if quiet_s is None:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        # Count from the first check on: before it the connection may have been idle,
        # not silent.
        return min(quiet_s, now - self._since)


def _quiet_s(sock: Any) -> float | None:
    """Return the seconds since the last answer; None if nothing was retransmitted
    since.
    """
    if sys.platform != "linux" or sock.family not in TCP:
        return None
    try:
        repeats, probes, quiet_ms = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
    except (OSError, struct.error):
        # The connection has ended; the next read will report that.
        return None
    return quiet_ms / 1000 if repeats or probes else None
