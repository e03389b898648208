"""The dialing side of a connection: connect a socket, and do the handshake, in time."""

from __future__ import annotations

import socket
import time
from typing import Any, Final

from brokerd_client.address import Family
from brokerd_client.connection.handshaking import (
    PeerStream,
    PendingHandshake,
    authentication_error,
)
from brokerd_client.connection.listening_sockets import no_delay
from brokerd_client.connection.readiness import clamp_timeout
from brokerd_client.errors import AuthenticationError, FrameError, TimedOut
from brokerd_client.wire.foreign_protocols import SILENT
from brokerd_client.wire.handshake import Handshake

__all__ = ["CHALLENGE_TIMEOUT_S", "connect_socket", "finish_handshake", "remaining"]

#: First and longest pause before a new attempt at a Unix socket with a full queue, in
#: seconds.
_RETRY_FROM, _RETRY_TO = 0.001, 0.05
#: Seconds that a listener has for its challenge, where the caller gives no timeout.
CHALLENGE_TIMEOUT_S: Final = 20.0


def remaining(deadline: float | None) -> float | None:
    """Return the seconds left, or None for no limit.

    Raises TimedOut if none are left.
    """
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimedOut
    return seconds


def connect_socket(address: Any, family: Family, deadline: float | None) -> socket.socket:
    """Return a socket that is connected to the address.

    Raises OSError, or TimedOut without a text.
    """
    sock = socket.socket(getattr(socket, family))
    try:
        retry = _RETRY_FROM
        while True:
            try:
                sock.settimeout(clamp_timeout(remaining(deadline)))
                sock.connect(address)
                break
            except BlockingIOError:
                # With a timeout, connecting to a Unix socket whose queue is full does
                # not wait for room.
                time.sleep(min(retry, remaining(deadline) or 0))
                retry = min(2 * retry, _RETRY_TO)
            except (TimeoutError, socket.timeout):  # one class since Python 3.10
                remaining(deadline)
                raise
        if family != "AF_UNIX":
            no_delay(sock)
        return sock
    except BaseException:
        sock.close()
        raise


def finish_handshake(
    peer_stream: PeerStream, steps: Handshake, key: bytes, listener: str, deadline: float | None
) -> None:
    """Do the handshake with a listener, which the errors call ``listener``.

    Raises AuthenticationError, TimedOut, EOFError, OSError.
    """
    handshake = PendingHandshake(peer_stream, steps, key, None, 0.0)
    began = time.monotonic()
    challenge_due = began + CHALLENGE_TIMEOUT_S if deadline is None else deadline
    try:
        while not handshake.advance():
            peer_stream.wait(remaining(deadline if handshake.heard else challenge_due))
    except TimedOut:
        seconds = time.monotonic() - began
        if handshake.heard:
            raise TimedOut(
                f"{listener} did not finish the handshake within {seconds:.3g} s"
            ) from None
        raise TimedOut(f"{listener} sent nothing within {seconds:.3g} s: {SILENT}") from None
    except (AuthenticationError, FrameError) as error:
        raise authentication_error(error, listener) from error
    except EOFError:
        raise EOFError(f"{listener} closed the connection during the handshake") from None
