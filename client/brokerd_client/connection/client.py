"""Client: a connection to a Listener, ours or the standard library's of any Python."""

from __future__ import annotations

import socket
import sys
import time
from typing import Any, cast

from brokerd_client.address import Family, format_peer, infer_family, validate_family
from brokerd_client.connection.handshaking import (
    PeerStream,
    PendingHandshake,
    SocketPeer,
    authentication_error,
    nonce,
)
from brokerd_client.connection.keys import Key, choose_key
from brokerd_client.connection.listening_sockets import no_delay
from brokerd_client.connection.readiness import clamp_timeout, deadline_after
from brokerd_client.connection.stream import Connection
from brokerd_client.errors import AuthenticationError, FrameError, TimedOut
from brokerd_client.wire.foreign_protocols import SILENT
from brokerd_client.wire.handshake import as_dialer

__all__ = ["Client"]

#: First and longest pause before a new attempt at a Unix socket with a full queue, in
#: seconds.
_RETRY_FROM, _RETRY_TO = 0.001, 0.05
#: Seconds that a listener has for its challenge, where the caller gives no timeout.
CHALLENGE_TIMEOUT_S = 20.0


def Client(  # noqa: N802 - the standard library's name
    address: Any,
    family: str | None = None,
    authenticate: bool | Key | None = False,
    authkey: Key | None = None,
    *,
    timeout: float | None = None,
    max_message: int | None = None,
    allow_md5: bool = True,
) -> Connection:
    """Connect to a listener; each side proves to the other that it has the key.

    Args:
        address: The address of the listener.
        family: AF_INET, AF_INET6, AF_UNIX or AF_PIPE; by default inferred from the
            address.
        authenticate: As for Listener; the third parameter may also be the key.
        authkey: As for Listener.
        timeout: Seconds for connecting and the handshake together, without the look-up
            of a host's name. None means no limit, but 20 seconds for the challenge of a
            listener that should have a key. math.inf means no limit at all.
        max_message: Largest message that the connection accepts, in bytes.
        allow_md5: Whether to accept a listener that supports only HMAC-MD5 (Python 3.11
            and older).

    Returns:
        The connection.

    Raises:
        AuthenticationError: One side rejected the other; the error tells which.
        TimedOut: Connecting and the handshake took longer than ``timeout``.
        InvalidKey: The key is text that can't be written in UTF-8.
        EOFError: The listener closed the connection during the handshake.
        OSError: The listener cannot be reached, for example.
    """
    deadline = deadline_after(timeout, time.monotonic())
    key = choose_key(authenticate, authkey)
    family = family or infer_family(address)
    validate_family(family)
    try:
        peer_stream = _connect(address, cast("Family", family), deadline)
    except TimedOut:
        raise TimedOut(f"no connection to {format_peer(address)} within {timeout} s") from None
    try:
        if key is not None:
            _authenticate(peer_stream, address, key, deadline, allow_md5=allow_md5)
        return cast("Connection", peer_stream.into_connection(max_message))
    except BaseException:
        peer_stream.close()
        raise


def _connect(address: Any, family: Family, deadline: float | None) -> PeerStream:
    if sys.platform == "win32" and family == "AF_PIPE":
        from brokerd_client.connection.named_pipes import dial

        return dial(address, deadline)
    sock = socket.socket(getattr(socket, family))
    try:
        retry = _RETRY_FROM
        while True:
            try:
                sock.settimeout(clamp_timeout(_remaining(deadline)))
                sock.connect(address)
                break
            except BlockingIOError:
                # With a timeout, connecting to a Unix socket whose queue is full does
                # not wait for room.
                time.sleep(min(retry, _remaining(deadline) or 0))
                retry = min(2 * retry, _RETRY_TO)
            except (TimeoutError, socket.timeout):  # one class since Python 3.10
                _remaining(deadline)
                raise
        if family != "AF_UNIX":
            no_delay(sock)
        return SocketPeer(sock)
    except BaseException:
        sock.close()
        raise


def _authenticate(
    peer_stream: PeerStream, address: Any, key: bytes, deadline: float | None, *, allow_md5: bool
) -> None:
    steps = as_dialer(key, nonce(), allow_md5=allow_md5)
    handshake = PendingHandshake(peer_stream, steps, key, address, 0.0)
    listener = f"the listener at {format_peer(address)}"
    began = time.monotonic()
    challenge_due = began + CHALLENGE_TIMEOUT_S if deadline is None else deadline
    try:
        while not handshake.advance():
            peer_stream.wait(_remaining(deadline if handshake.heard else challenge_due))
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


def _remaining(deadline: float | None) -> float | None:
    """Return the seconds left, or None for no limit.

    Raises TimedOut if none are left.
    """
    if deadline is None:
        return None
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimedOut
    return remaining
