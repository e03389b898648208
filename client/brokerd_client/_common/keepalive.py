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

import contextlib
import math
import select
import socket
import struct
import sys
from typing import Any, Final

__all__ = ["DEFAULT_S", "LOOKS", "TCP", "Silence", "has_ended", "keep_alive", "leave_to_system"]

#: Seconds without an answer after which a connection is closed, by default.
DEFAULT_S: Final = 30.0
#: Longest interval of a TCP keepalive option, in seconds.
_LONGEST_S: Final = 32767
#: Probes of an idle connection before it ends; fewer where they would be less than a
#: second apart.
_PROBES: Final = 6
#: Checks of a connection within that time.
LOOKS: Final = 4
#: Unanswered retransmissions and probes that tell a lost peer from a lost packet.
_ENOUGH: Final = 2
#: The first fields of Linux's struct tcp_info. Those read are the counts of unanswered
#: retransmissions and probes, of packets in flight, and the milliseconds since the last
#: acknowledgement.
_TCP_INFO: Final = struct.Struct("=xxBB4x16xI28xI")
#: The families of TCP's sockets.
TCP: Final = (getattr(socket, "AF_INET", None), getattr(socket, "AF_INET6", None))
#: TCP_RTO_MAX_MS, since Linux 6.15: the longest pause between two retransmissions, or
#: two probes of a peer that does not read. Its least and greatest values, in
#: milliseconds. The greatest is the system's default.
_RTO_MAX_MS: Final = 44
_LEAST_RTO_MAX_MS: Final = 1_000
_MOST_RTO_MAX_MS: Final = 120_000
#: TCP_KEEPIDLE; macOS calls it TCP_KEEPALIVE.
_IDLE: Final = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))


def keep_alive(sock: Any, limit_s: float) -> None:
    """Set TCP keepalive: the system ends an idle connection whose peer stops answering.

    Where the system can, it also asks a peer that does not read twice within the limit.
    Otherwise its pauses grow to two minutes.

    limit_s: the most seconds without an answer, rounded down, at least two; 0 changes
    nothing. Sockets that are not TCP stay unchanged. Raises OSError.
    """
    if sock.family not in TCP or not limit_s:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    whole_s = int(limit_s)
    # Linux's timers are late by up to an eighth; those of one second by much less.
    total_s = max(whole_s * 8 // 9, min(whole_s, 3))
    idle_s = max(1, total_s // 2)
    probing_s = max(1, total_s - idle_s)
    interval_s = max(1, probing_s // _PROBES)
    for option, value in (
        (_IDLE, idle_s),
        (_option("TCP_KEEPINTVL"), interval_s),
        (_option("TCP_KEEPCNT"), probing_s // interval_s),
    ):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, min(value, _LONGEST_S))
    # Two pauses fit in the limit, though they may be late. Without an answer for twice
    # this time, Linux may end a connection to a peer that does not read.
    _set_longest_pause(sock, max(_LEAST_RTO_MAX_MS, int(limit_s * 1000 * 4 / 9)))


def leave_to_system(sock: socket.socket) -> None:
    """Undo what :func:`keep_alive` has set on a TCP socket. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    _set_longest_pause(sock, _MOST_RTO_MAX_MS)


def _set_longest_pause(sock: Any, pause_ms: int) -> None:
    if sys.platform == "linux":
        # An earlier Linux does not know the option.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _RTO_MAX_MS, min(pause_ms, _MOST_RTO_MAX_MS))


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

    def remaining_s(self, sock: Any, now: float, limit_s: float) -> float:
        """Return the seconds that the peer still has to answer; infinity if it answers.

        A peer that does not read, but answers, is not silent.

        Args:
            sock: A connected socket.
            now: The time, on the same clock as in the last call.
            limit_s: The most seconds without an answer.
        """
        repeats, in_flight, quiet_s = _state(sock)
        if not (repeats or in_flight):
            self._since = None
            return math.inf
        if self._since is None:
            self._since = now
        if repeats < _ENOUGH:
            return math.inf
        # Before the first check the connection may have been idle, not silent.
        return max(limit_s - quiet_s, limit_s / LOOKS - (now - self._since))


def _state(sock: Any) -> tuple[int, int, float]:
    """Return the number of unanswered retransmissions and probes, the packets in
    flight, and the seconds since the last answer.
    """
    if sys.platform != "linux" or sock.family not in TCP:
        return 0, 0, 0.0
    try:
        repeats, probes, in_flight, quiet_ms = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
    except (OSError, struct.error):
        # The connection has ended; the next read will report that.
        return 0, 0, 0.0
    return repeats + probes, in_flight, quiet_ms / 1000
