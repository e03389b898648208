"""Client: a connection to a Listener, ours or the standard library's of any Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from typing import Any, cast

from brokerd_client.address import Family, format_peer, infer_family, validate_family
from brokerd_client.connection.dialing import connect_socket, finish_handshake
from brokerd_client.connection.handshaking import PeerStream, SocketPeer, nonce
from brokerd_client.connection.keys import Key, choose_key
from brokerd_client.connection.readiness import deadline_after
from brokerd_client.connection.stream import Connection
from brokerd_client.errors import TimedOut
from brokerd_client.wire.handshake import as_dialer

__all__ = ["Client"]


def Client(  # noqa: N802 - the standard library's name
    address: Any,
    family: str | None = None,
    authenticate: bool | Key | None = False,
    authkey: Key | None = None,
    *,
    timeout: float | None = None,
    max_message: int | None = None,
    allow_md5: bool = True,
    allow_pickle_from: Collection[str] = (),
) -> Connection:
    """Connect to a listener; each side proves to the other that it has the key.

    Args:
        address: The address of the listener.
        family: AF_INET, AF_INET6, AF_UNIX, AF_PIPE or AF_BROKER; by default inferred from
            the address.
        authenticate: As for Listener; the third parameter may also be the key.
        authkey: As for Listener.
        timeout: Seconds for connecting and the handshake together, without the look-up
            of a host's name. None means no limit, but 20 seconds for the challenge of a
            listener that should have a key. math.inf means no limit at all.
        max_message: Largest message that the connection accepts, in bytes.
        allow_md5: Whether to accept a listener that supports only HMAC-MD5 (Python 3.11
            and older).
        allow_pickle_from: At broker://NAME, the names of clients whose pickles are read
            without a key.

    Returns:
        The connection.

    Raises:
        AuthenticationError: One side rejected the other; the error tells which.
        TimedOut: Connecting and the handshake took longer than ``timeout``.
        InvalidKey: The key is text that can't be written in UTF-8.
        EOFError: The listener closed the connection during the handshake.
        Refused: At broker://NAME, the broker or the other client refused.
        OSError: The listener cannot be reached, for example.
    """
    deadline = deadline_after(timeout, time.monotonic())
    key = choose_key(authenticate, authkey)
    family = family or infer_family(address)
    validate_family(family)
    if allow_pickle_from and family != "AF_BROKER":
        raise ValueError("allow_pickle_from is for addresses broker://NAME only")
    try:
        if family == "AF_BROKER":
            # Imported here, because it imports the client of the broker.
            from brokerd_client.connection.broker import dial_name

            peer_stream: PeerStream = dial_name(
                address,
                deadline,
                authenticated=key is not None,
                allow_pickle_from=allow_pickle_from,
            )
        else:
            peer_stream = _connect(address, cast("Family", family), deadline)
    except TimedOut as error:
        text = str(error) or f"no connection to {format_peer(address)} within {timeout} s"
        raise TimedOut(text) from None
    try:
        if key is not None:
            steps = as_dialer(key, nonce(), allow_md5=allow_md5)
            listener = f"the listener at {format_peer(address)}"
            finish_handshake(peer_stream, steps, key, listener, deadline)
        return cast("Connection", peer_stream.into_connection(max_message))
    except BaseException:
        peer_stream.close()
        raise


def _connect(address: Any, family: Family, deadline: float | None) -> PeerStream:
    if sys.platform == "win32" and family == "AF_PIPE":
        from brokerd_client.connection.named_pipes import dial

        return dial(address, deadline)
    return SocketPeer(connect_socket(address, family, deadline))
