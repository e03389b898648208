"""How a TCP connection tells that its other end is gone without a word: unplugged, cut off, switched off.

Two cases, because the system treats them apart. On an idle connection it asks the other end now and then (keepalive).
Where bytes are under way it only repeats them, for a quarter of an hour and more, and does not ask; there
:class:`Silence` looks at what it says of its repetitions. TCP_USER_TIMEOUT would be shorter, but ends a connection
whose other end lives and does not read for that long, too (tcp(7); net/ipv4/tcp_timer.c, tcp_probe_timer): a slow
reader is not a dead one.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
from typing import Any, Final

__all__ = ["DEFAULT_S", "LOOKS", "TCP", "Silence", "has_ended", "keep_alive"]

#: Seconds without an answer after which a connection is given up, unless told otherwise.
DEFAULT_S: Final = 30.0
#: More seconds than that TCP does not wait in between.
_LONGEST_S: Final = 32767
#: Looks at a connection within that time.
LOOKS: Final = 4
#: As Linux's struct tcp_info begins: the state, two counts of what was repeated without an answer, and after eleven
#: numbers the milliseconds since the last acknowledgement.
_TCP_INFO: Final = struct.Struct("=xxBB4x48xI")
#: The families of TCP's sockets.
TCP: Final = (getattr(socket, "AF_INET", None), getattr(socket, "AF_INET6", None))
#: The name on macOS of what the others call TCP_KEEPIDLE.
_IDLE: Final = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))


def keep_alive(sock: Any, limit_s: float) -> None:
    """Have the system end an idle TCP connection whose other end has not answered for so many seconds.

    limit_s: whole seconds count, one at least; 0 changes nothing. Other sockets are left alone. Raises OSError.
    """
    if sock.family not in TCP or not limit_s:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = max(1, int(limit_s / 2))
    rest = max(1, int(limit_s) - idle)
    every = max(1, rest // 3)
    for option, value in ((_IDLE, idle), (_option("TCP_KEEPINTVL"), every), (_option("TCP_KEEPCNT"), rest // every)):
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, min(value, _LONGEST_S))


def _option(name: str) -> int | None:
    return getattr(socket, name, None)


def has_ended(sock: Any) -> bool:
    """Return whether the peer of a connected socket sends nothing more, without a read.

    Systems without ``poll`` do not tell: there the result is False.
    """
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


class Silence:
    """Whether the other end of one TCP connection still answers what is sent to it; asked again and again.

    Only Linux tells; elsewhere nobody is ever silent.
    """

    __slots__ = ("_since",)

    def __init__(self) -> None:
        self._since: float | None = None

    def lasts(self, sock: Any, now: float) -> float:
        """Return for how many seconds nothing that was repeated has been answered; 0 where nothing is amiss.

        sock: connected. now: on the clock of the last call. One that does not read, but answers, is not silent.
        """
        quiet_s = _quiet_s(sock)
        if quiet_s is None:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        # From the first look on: before it the connection may have been idle, which is no silence.
        return min(quiet_s, now - self._since)


def _quiet_s(sock: Any) -> float | None:
    """Return the seconds since the last answer, None where nothing had to be repeated since then."""
    if sys.platform != "linux" or sock.family not in TCP:
        return None
    try:
        repeats, probes, quiet_ms = _TCP_INFO.unpack(
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        )
    except (OSError, struct.error):
        # It is over, which reading it tells.
        return None
    return quiet_ms / 1000 if repeats or probes else None
