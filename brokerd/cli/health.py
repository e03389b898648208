"""A health check without a key: the broker must challenge a new connection.

The challenge is the first frame that the event loop itself sends to a connection. An
accepted connection proves nothing: the system accepts it for a frozen broker too. The
check never answers the challenge, so the broker neither accepts nor refuses it.
Source: docs/protocol.md, "Handshake".
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

#: The loopback address to ask for each address that means every interface.
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - nothing is bound here
_NO_BROKER: Final = "the answer is not a broker's (is this its address?)"


class Unhealthy(Exception):
    """The broker did not send a challenge; the text says what happened (and what to
    check).
    """


def entrance_to_ask(entrances: Iterable[Entrance]) -> Entrance:
    """Return the listener to check: a Unix socket, or else a port, preferably without
    TLS.

    Raises Unhealthy if no listener can be checked.
    """
    askable = [
        entrance
        for entrance in entrances
        if entrance.address.family == "AF_UNIX" or entrance.address.port
    ]
    if not askable:
        raise Unhealthy(
            "the configuration has no Unix socket and no fixed port to connect to (give --address)"
        )
    return min(askable, key=lambda entrance: (entrance.address.family != "AF_UNIX", entrance.tls))


def probe(entrance: Entrance, timeout: float) -> float:
    """Wait for the broker's challenge, disconnect, and return the time taken, in
    seconds.

    timeout: limits the whole check, in seconds, except the system's name lookup.
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
        # With a full accept queue, a Unix socket raises BlockingIOError where TCP would
        # wait.
        raise Unhealthy(
            f"no challenge within {timeout:g} s (the broker is stopped, stuck or overloaded)"
        ) from None
    except FrameError:
        raise Unhealthy(_NO_BROKER) from None
    except OSError as error:
        # A broker that requires a client certificate sends a TLS alert: that is an
        # answer too.
        if "_ALERT_" not in (getattr(error, "reason", None) or ""):
            raise Unhealthy(
                f"{error.strerror or error} (is the broker running, and is this its address?)"
            ) from None
    return time.monotonic() - began


def _left(deadline: float) -> float:
    """Return the seconds until the deadline. Raises TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connected(address: Address, deadline: float) -> socket.socket:
    if address.family in ("AF_INET", "AF_INET6"):
        host = _LOOPBACK.get(address.host, address.host)
        addresses = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
        for addresses_left, (family, _, _, _, place) in zip(
            range(len(addresses), 1, -1), addresses, strict=False
        ):
            # Each address gets a part of the time, so that a silent one does not use it
            # all.
            with contextlib.suppress(OSError):
                share_s = _left(deadline) / addresses_left
                return _connected_to(family, place, time.monotonic() + share_s)
        family, _, _, _, place = addresses[-1]
        return _connected_to(family, place, deadline)
    if address.family == "AF_PIPE" or not hasattr(socket, "AF_UNIX"):
        raise Unhealthy("a health check needs a socket (give --address HOST:PORT)")
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
    """Return the socket, wrapped in TLS if the listener uses it.

    The broker's certificate is not checked here.
    """
    if not tls:
        return sock
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock.settimeout(_left(deadline))
    return context.wrap_socket(sock)


def _await_challenge(stream: socket.socket, deadline: float) -> None:
    """Return when the challenge has arrived.

    Raises OSError, FrameError and Unhealthy.
    """
    reader = FrameReader()
    while (body := reader.next_frame(LIMIT)) is None:
        stream.settimeout(_left(deadline))
        data = stream.recv(LIMIT)
        if not data:
            raise Unhealthy(
                "closed without a challenge (the broker is draining, or full: see its log)"
            )
        reader.feed(data)
    if not body.startswith(CHALLENGE):
        raise Unhealthy(_NO_BROKER)
