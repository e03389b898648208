"""Notification of the service manager that another process is the daemon now.

sd_notify(3): MAINPID is sent first, then BARRIER with a pipe. The manager closes the
pipe when it has processed all messages before it. Without this wait, the old process
could be gone before the manager looks up the sender of the message. The message would
be lost.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

__all__ = ["announce_new_process"]

#: Longest wait for the manager, per send and for the barrier, in seconds.
_TIMEOUT_S: Final = 5.0


def announce_new_process(address: str, pid: int) -> bool:
    """Announce ``pid`` as the daemon's; return whether the manager has processed it.

    address: the value of NOTIFY_SOCKET.
    """
    reading, writing = os.pipe()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_TIMEOUT_S)
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(b"MAINPID=%d" % pid)
            socket.send_fds(sock, [b"BARRIER=1"], [writing])
        os.close(writing)
        writing = -1
        poll = select.poll()
        poll.register(reading, 0)
        return bool(poll.poll(_TIMEOUT_S * 1000))
    except OSError:
        return False
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
