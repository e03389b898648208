"""AF_BROKER: listeners and clients of the direct API that find each other by name.

The address ``broker://NAME`` is a client of a broker. The program's own identity, and
the broker's address, come from the environment: BROKERD_ADDRESS, BROKERD_NAME and
BROKERD_KEY_FILE. ``broker://NAME@ADDRESS`` has the broker's address in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from brokerd_client.address import BROKER_SCHEME
from brokerd_client.connection.channels import ChannelPeer, accept_channel, open_channel
from brokerd_client.connection.handshaking import PeerStream
from brokerd_client.connection.listening_sockets import arbitrary_address
from brokerd_client.connection.readiness import readable
from brokerd_client.errors import (
    AddressError,
    Disconnected,
    NameTaken,
    Refused,
    TimedOut,
)
from brokerd_client.settings import DEFAULT_INBOX, resolve
from brokerd_client.wire.envelope import check_address

if TYPE_CHECKING:
    from brokerd_client.blocking import Client, Listener

__all__ = ["BrokerAddress", "ChannelServer", "dial_name", "parse"]

#: Seconds in which a caller's channel has to be joined; the broker's own limit is shorter
#: unless it is set.
_JOIN_TIMEOUT_S: Final = 30.0

_log: Final = logging.getLogger("brokerd_client.connection")


class BrokerAddress(NamedTuple):
    """A parsed address.

    Attributes:
        name: The name of the client at the address.
        broker: Where the broker listens; None for BROKERD_ADDRESS.
    """

    name: str
    broker: str | None

    def __str__(self) -> str:
        return f"{BROKER_SCHEME}{self.name}" + ("" if self.broker is None else f"@{self.broker}")


def parse(address: object) -> BrokerAddress:
    """Return the parsed address. Raises AddressError, InvalidName."""
    if not isinstance(address, str) or not address.startswith(BROKER_SCHEME):
        raise AddressError(
            f"{address!r} is not the address of a client: give broker://NAME or"
            " broker://NAME@HOST:PORT"
        )
    name, at, broker = address[len(BROKER_SCHEME) :].partition("@")
    return BrokerAddress(check_address(name), broker if at else None)


def dial_name(
    address: object,
    deadline: float | None,
    *,
    authenticated: bool,
    allow_pickle_from: Iterable[str],
) -> ChannelPeer:
    """Open a channel to the client at the address.

    Args:
        address: The address.
        deadline: On the clock of time.monotonic, in seconds; None for no limit.
        authenticated: Whether both ends will prove a key to each other.
        allow_pickle_from: Names of the clients whose pickles may be read.

    Raises as open_channel does.
    """
    to, broker = parse(address)
    settings = resolve(
        broker,
        None,
        None,
        None,
        None,
        reconnect=False,
        allow_pickle_from=allow_pickle_from,
        inbox=DEFAULT_INBOX,
    )
    *others, last = settings.addresses
    for each in others:
        with contextlib.suppress(Disconnected):
            return _trusted(
                open_channel(settings, each, settings.name, to, b"", deadline), authenticated
            )
    return _trusted(open_channel(settings, last, settings.name, to, b"", deadline), authenticated)


def _trusted(peer: ChannelPeer, authenticated: bool) -> ChannelPeer:
    """Return the peer, trusted with pickles if it proves a key before it is used."""
    peer.unpickles = peer.unpickles or authenticated
    return peer


class ChannelServer:
    """The server socket of a Listener at a broker's address: it accepts channels.

    A thread joins the channels, as the system accepts the connections of a listening
    socket. At most ``backlog`` wait for the program.
    """

    most_peers: Final = sys.maxsize

    def __init__(
        self,
        address: object,
        backlog: int,
        *,
        authenticated: bool,
        allow_pickle_from: Iterable[str],
    ) -> None:
        from brokerd_client.blocking import connect

        own = parse(address or arbitrary_address("AF_BROKER"))
        if "/" in own.name:
            raise OSError(
                errno.EADDRNOTAVAIL,
                f"{os.strerror(errno.EADDRNOTAVAIL)}: the broker gives the instance in {own}",
            )
        self.address = str(own)
        try:
            # The listener waits for a broker that is down, as for a caller.
            self._client = connect(
                own.broker,
                own.name,
                give_up_after=math.inf,
                allow_pickle_from=allow_pickle_from,
                tracing=False,
            )
        except Disconnected as error:
            if isinstance(error.__cause__, NameTaken):
                raise OSError(
                    errno.EADDRINUSE,
                    f"{os.strerror(errno.EADDRINUSE)}: {self.address} has all its connections",
                ) from error
            raise
        if not address:
            # Callers of this address reach this listener, also if the name is a pool's.
            self.address = BROKER_SCHEME + self._client.address
        try:
            self._joining = _Joining(self._client, self._client.listen(), backlog, authenticated)
            threading.Thread(target=self._joining.run, name="brokerd listener", daemon=True).start()
        except BaseException:
            self._client.close()
            raise

    def wait(
        self, peer_streams: Collection[PeerStream], timeout: float | None
    ) -> tuple[bool, set[int]]:
        self._client._check()
        joining = self._joining
        if joining.peers or joining.ended is not None:
            timeout = 0
        waker = joining.waker[0].fileno()
        if waker < 0:
            return False, set()
        ready = readable([waker, *(stream.fileno() for stream in peer_streams)], timeout)
        if waker in ready:
            with contextlib.suppress(OSError):
                joining.waker[0].recv(4096)
        return bool(joining.peers or joining.ended is not None), ready - {waker}

    def accept(self) -> tuple[PeerStream, object] | None:
        try:
            peer, name = self._joining.peers.popleft()
        except IndexError:
            # Another thread was faster.
            if self._joining.ended is not None:
                raise Disconnected(f"not listening any more: {self._joining.ended}") from None
            return None
        self._joining.room.release()
        return peer, name

    def wake(self) -> None:
        self._joining.wake()

    def close(self) -> None:
        self._joining.close()
        self._client.close()

    def renew_waker(self) -> None:
        """Close the copies of a forked child, which can't accept."""
        self._joining.close_peers()


class _Joining:
    """The thread of a ChannelServer, and the channels that it has joined.

    Attributes:
        peers: The channels that wait for the program, with the callers' names.
        room: Counts how many more may wait.
        waker: The ends of a pair of sockets; the first can be read when there are peers.
        ended: Why no more channels will come; None while they may.
    """

    def __init__(
        self, client: Client, listener: Listener, backlog: int, authenticated: bool
    ) -> None:
        self._client = client
        self._listener = listener
        self._authenticated = authenticated
        self.peers: deque[tuple[ChannelPeer, str]] = deque()
        self.room = threading.Semaphore(max(backlog, 1))
        self.ended: Exception | None = None
        self._closed = False
        self.waker = socket.socketpair()
        for end in self.waker:
            end.setblocking(False)

    def run(self) -> None:
        """Join channels until the listener or its client is closed."""
        try:
            while True:
                self.room.acquire()
                self.peers.append(self._next())
                self.wake()
        except Exception as error:  # noqa: BLE001 - the program's accept() raises it
            self.ended = error
            self.wake()
        if self._closed:
            self.close_peers()

    def _next(self) -> tuple[ChannelPeer, str]:
        """Return the next channel and its caller. Raises Closed, Refused, Disconnected."""
        client = self._client
        while True:
            offer = self._listener.recv()
            deadline = time.monotonic() + _JOIN_TIMEOUT_S
            try:
                peer = accept_channel(
                    client._settings, client._broker_address, client.name, offer.token, deadline
                )
            except (Refused, Disconnected, TimedOut) as error:
                _log.info("not accepted: %s: %s", offer.sender, error)
                continue
            return _trusted(peer, self._authenticated), offer.sender

    def wake(self) -> None:
        """End a wait of the program. A closed waker has no waiting thread."""
        with contextlib.suppress(OSError):
            self.waker[1].send(b"\0")

    def close(self) -> None:
        """Close the channels that no program will get, and the waker."""
        self._closed = True
        self.room.release()  # the thread then learns that its listener is closed
        self.close_peers()
        for end in self.waker:
            end.close()

    def close_peers(self) -> None:
        """Close the channels that the program has not accepted."""
        with contextlib.suppress(IndexError):
            while True:
                self.peers.popleft()[0].close()
