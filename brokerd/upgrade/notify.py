"""Tells the service manager which process is the daemon now, and waits until it has heard.

sd_notify(3): MAINPID, and then BARRIER with a pipe that the manager closes when it has dealt with what came before.
Without the wait this process could be gone before the manager asks whose message that was, and the message be lost.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

__all__ = ["announce_new_process"]

_TIMEOUT_S: Final = 5.0


def announce_new_process(address: str, pid: int) -> bool:
    """Return whether the manager has taken ``pid`` for the daemon's. address: NOTIFY_SOCKET's value."""
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
