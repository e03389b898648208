"""Channels: connections to named clients, through a broker.

The blocking client and the direct API open them here. A channel begins as a connection
to the broker, with a handshake and one frame (wire/first_frames.py). The bytes behind the
broker's answer are those of the other client.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from brokerd_client._common.keepalive import DEFAULT_S, keep_alive
from brokerd_client._common.lookup import numeric
from brokerd_client.address import Address
from brokerd_client.connection.dialing import connect_socket, finish_handshake, remaining
from brokerd_client.connection.handshaking import SocketPeer, nonce
from brokerd_client.connection.stream import Connection, adopt_socket
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Disconnected,
    Elsewhere,
    FrameError,
    ProtocolError,
    TimedOut,
    TlsError,
)
from brokerd_client.settings import Settings, broken, channel_routes, no_connection
from brokerd_client.wire.channel_binding import Bindings
from brokerd_client.wire.first_frames import (
    MAX_ANSWER,
    OPEN_ID,
    channel_name,
    join_frame,
    open_frame,
    peer_of,
)
from brokerd_client.wire.handshake import as_dialer

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["ChannelPeer", "accept_channel", "open_channel"]

#: The family of each address that a host's name has.
_FAMILIES: Final = {int(socket.AF_INET): "AF_INET", int(socket.AF_INET6): "AF_INET6"}


class ChannelPeer(SocketPeer):
    """The socket of a channel that no Connection has taken over yet.

    Attributes:
        name: The address of the client at the other end.
        unpickles: Whether the Connection may unpickle what it receives.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.name = ""
        self.unpickles = False

    def into_connection(self, max_message: int | None) -> Connection:
        self._socket.settimeout(None)
        return adopt_socket(
            self._socket, max_message=max_message, peer=self.name, unpickles=self.unpickles
        )


def open_channel(
    settings: Settings,
    address: Address,
    name: str,
    to: str,
    payload: bytes,
    deadline: float | None,
) -> ChannelPeer:
    """Open a channel to the client ``to`` and wait until it has accepted.

    Args:
        settings: The key, TLS and the trusted senders of pickles.
        address: Where the broker listens.
        name: The name of this client, or "".
        to: The address of the other client.
        payload: Bytes that the other client sees before it accepts.
        deadline: On the clock of time.monotonic, in seconds; None for no limit.

    Raises:
        Refused: The broker or the other client refused.
        AuthenticationError: The broker or this client was not authenticated.
        TimedOut: The deadline has passed.
        Disconnected: The broker can't be reached, or has closed the connection.
        ProtocolError: The broker broke the rules of the protocol.
        PayloadError: The payload is too long.
    """
    frame = open_frame(to, OPEN_ID, payload)
    late = f"{to} did not accept in time: no channel was made"
    try:
        return _begin(settings, address, name, frame, OPEN_ID, deadline, late)
    except Elsewhere as error:
        elsewhere = error
    reason: BrokerdError = elsewhere
    for route, trusting in channel_routes(elsewhere, settings):
        try:
            return _begin(trusting, route, name, frame, OPEN_ID, deadline, late)
        except (Disconnected, TlsError, Elsewhere) as error:
            reason = error
    raise elsewhere from (None if reason is elsewhere else reason)


def accept_channel(
    settings: Settings, address: Address, name: str, token: int, deadline: float | None
) -> ChannelPeer:
    """Accept the channel that a client has asked for; the token is that of its OPEN.

    Raises as open_channel does.
    """
    return _begin(settings, address, name, join_frame(token), token, deadline)


def _begin(
    settings: Settings,
    address: Address,
    name: str,
    frame: bytes,
    message_id: int,
    deadline: float | None,
    unanswered: str = "",
) -> ChannelPeer:
    """Make the channel. unanswered: the error where only the other client is late."""
    broker = f"the broker at {address}"
    late = f"{broker} did not answer in time: no channel was made"
    try:
        sock, bindings = _connect(address, settings.tls, deadline)
    except TimedOut:
        raise TimedOut(f"no connection to {broker} in time") from None
    except OSError as error:
        raise no_connection(address, error) from error
    peer = ChannelPeer(sock)
    try:
        steps = as_dialer(
            settings.key, nonce(), name=channel_name(name), allow_md5=False, bindings=bindings
        )
        finish_handshake(peer, steps, settings.key, broker, deadline)
        peer.send_frame(frame)
        late = unanswered or late
        peer.name = peer_of(_answer(peer, deadline), message_id)
        peer.unpickles = peer.name.partition("/")[0] in settings.allow_pickle_from
        return peer
    except BaseException as error:
        peer.close()
        if isinstance(error, EOFError):
            raise Disconnected(f"{broker} closed the connection") from error
        if isinstance(error, TimedOut) and not error.args:
            raise TimedOut(late) from None
        if isinstance(error, OSError) and not isinstance(error, BrokerdError):
            raise broken(error) from error
        raise


def _answer(peer: ChannelPeer, deadline: float | None) -> bytes:
    """Return the broker's answer to the first frame."""
    try:
        while (answer := peer.next_frame(MAX_ANSWER)) is None:
            peer.wait(remaining(deadline))
    except FrameError as error:
        raise ProtocolError(f"the broker's answer can't be read: {error}") from error
    return answer


def _connect(
    address: Address, context: SSLContext | None, deadline: float | None
) -> tuple[socket.socket, Bindings]:
    """Return a socket for the bytes of a connection to the broker, and its bindings."""
    sock = _connect_plainly(address, deadline)
    if context is None:
        return sock, {}
    # Imported here, because it takes long to load.
    from brokerd_client.connection.tls_bridge import bridge_tls

    return bridge_tls(sock, context, address.host, deadline)


def _connect_plainly(address: Address, deadline: float | None) -> socket.socket:
    if address.family == "AF_UNIX":
        return connect_socket(address.path, "AF_UNIX", deadline)
    if address.family not in ("AF_INET", "AF_INET6"):
        raise AddressError(f"no channel goes over {address}: the broker has to listen on TCP too")
    candidates = numeric(address.host, address.port)
    if candidates is None:
        candidates = [
            (int(family), sockaddr)
            for family, _, _, _, sockaddr in socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM
            )
        ]
    failure = OSError(f"{address.host} has no address")
    for family, sockaddr in candidates:
        try:
            sock = connect_socket(sockaddr, _FAMILIES[family], deadline)  # type: ignore[arg-type]
        except TimedOut:
            raise
        except OSError as error:
            failure = error
            continue
        keep_alive(sock, DEFAULT_S)
        return sock
    raise failure
