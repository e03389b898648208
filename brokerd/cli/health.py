"""Whether the broker lives, asked from outside by whoever has no key: it must challenge who comes in.

A challenge is the first thing that the event loop itself says to a connection: the system alone would accept one of a
frozen broker too. Nothing is answered, so nothing is proved or refused. Source: docs/protocol.md, "Handshake".
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from typing import Any, Final

from brokerd.config.listen_addresses import Entrance
from brokerd_client.address import Address
from brokerd_client.errors import FrameError
from brokerd_client.wire.framing import FrameReader
from brokerd_client.wire.handshake import CHALLENGE, LIMIT

__all__ = ["Unhealthy", "entrance_to_ask", "probe"]

#: Listening at every interface includes the machine's own.
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - nothing is bound here
_NO_BROKER: Final = "something else than a broker answers (is this its address?)"


class Unhealthy(Exception):
    """The broker did not answer as a living one does; the text is what it did (what to look at)."""


def entrance_to_ask(entrances: Iterable[Entrance]) -> Entrance:
    """Return the nearest way in: a Unix socket if there is one, else a port, best one without TLS.

    Raises Unhealthy where none can be asked.
    """
    askable = [each for each in entrances if each.address.family == "AF_UNIX" or each.address.port]
    if not askable:
        raise Unhealthy("the configuration names no Unix socket and no fixed port to ask at (give --address)")
    return min(askable, key=lambda each: (each.address.family != "AF_UNIX", each.tls))


def probe(entrance: Entrance, timeout: float) -> float:
    """Wait for the broker's challenge, then leave; return how long it took, in seconds.

    timeout: seconds, for everything together; only the system's looking up of a name is not cut short.
    Raises Unhealthy.
    """
    began = time.monotonic()
    deadline = began + timeout
    try:
        with (
            _connected(entrance.address, deadline) as sock,
            _speaking(sock, deadline, tls=entrance.tls) as stream,
        ):
            _await_challenge(stream, deadline)
    except (TimeoutError, BlockingIOError):
        # A Unix socket raises the second where TCP would wait: the queue in front of accept() is full.
        raise Unhealthy(f"no challenge within {timeout:g} s (it is stopped, stuck or overrun)") from None
    except FrameError:
        raise Unhealthy(_NO_BROKER) from None
    except OSError as error:
        # A broker that wants to see a certificate first says so by an alert of TLS: that is an answer too.
        if "_ALERT_" not in (getattr(error, "reason", None) or ""):
            raise Unhealthy(f"{error.strerror or error} (is the broker running, and is this its address?)") from None
    return time.monotonic() - began


def _left(deadline: float) -> float:
    """Return the seconds that are left. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connected(address: Address, deadline: float) -> socket.socket:
    if address.family in ("AF_INET", "AF_INET6"):
        host = _LOOPBACK.get(address.host, address.host)
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
        for rest, (family, _, _, _, place) in zip(range(len(found), 1, -1), found, strict=False):
            # A part of the time for each, so that one that does not answer is not the only one asked.
            with contextlib.suppress(OSError):
                return _connected_to(family, place, time.monotonic() + _left(deadline) / rest)
        family, _, _, _, place = found[-1]
        return _connected_to(family, place, deadline)
    if address.family == "AF_PIPE" or not hasattr(socket, "AF_UNIX"):
        raise Unhealthy("only sockets can be asked (give --address HOST:PORT)")
    return _connected_to(socket.AF_UNIX, address.path, deadline)


def _connected_to(family: int, place: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.settimeout(_left(deadline))
        sock.connect(place)
    except BaseException:
        sock.close()
        raise
    return sock


def _speaking(sock: socket.socket, deadline: float, *, tls: bool) -> socket.socket:
    """Return the socket, TLS spoken on it where the broker does; whose certificate it shows does not matter here."""
    if not tls:
        return sock
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock.settimeout(_left(deadline))
    return context.wrap_socket(sock)


def _await_challenge(stream: socket.socket, deadline: float) -> None:
    """Return when the challenge is there. Raises OSError, FrameError and Unhealthy."""
    reader = FrameReader()
    while (body := reader.next_frame(LIMIT)) is None:
        stream.settimeout(_left(deadline))
        data = stream.recv(LIMIT)
        if not data:
            raise Unhealthy("closed without a challenge (it is draining, or full: see its log)")
        reader.feed(data)
    if not body.startswith(CHALLENGE):
        raise Unhealthy(_NO_BROKER)
