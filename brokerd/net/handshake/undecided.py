"""Undecided connections: their first frame shows what they are for.

A client has proved its key, and has all the connections that it may have. A connection
without a name may be for one of these places, or for a channel. Until its first frame
the connection is not present and receives nothing. It is decided by that frame, or when
it has been silent for some time. A connection that is to become a channel waits here
too, until its first frame is whole. If there are too many connections, the oldest is
decided at once. Source: docs/protocol.md, "Connections beyond `connections`".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from brokerd.config.values import WhenConnected
from brokerd.net.bound_loggers import handshake_logger
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.handshake.refusals import note_refusal
from brokerd.net.handshake.room import Room
from brokerd.net.relay.first_frame import begins_channel, is_whole, kind_of
from brokerd_client.wire.handshake import LIMIT

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.exchange import Client
    from brokerd.net.context import Context
    from brokerd.net.handshake.pending import PendingConnection

__all__ = ["MOST_PER_CLIENT", "SILENCE_S", "UndecidedConnections"]

#: Seconds of silence after which a connection is decided, by ``when_connected``.
SILENCE_S: Final = {WhenConnected.REPLACE: 0.1, WhenConnected.REFUSE: 1.0}
#: Seconds until a decision that needs more turns, or another host, is tried again.
_AGAIN_S: Final = 0.002
#: Most undecided connections per client. Those of all clients are limited by
#: ``limits.handshakes``.
MOST_PER_CLIENT: Final = 64


class UndecidedConnections:
    """The undecided connections of a server, oldest first.

    decide: makes an ordinary connection of an undecided one, or refuses it. Returns
        False if it can do so only in another turn.
    begin_channel: begins a channel with a connection whose first frame has arrived.
    turn_away: refuses a connection, for the reason in a Room.
    """

    def __init__(
        self,
        context: Context,
        *,
        decide: Callable[[PendingConnection], bool],
        begin_channel: Callable[[PendingConnection], None],
        turn_away: Callable[[PendingConnection, Room], None],
    ) -> None:
        self._context = context
        self._decide_now = decide
        self._begin_channel = begin_channel
        self._turn_away = turn_away
        self._loop: asyncio.AbstractEventLoop = context.loop
        self._undecided: dict[PendingConnection, asyncio.Handle] = {}

    def __len__(self) -> int:
        return len(self._undecided)

    def connections(self) -> list[PendingConnection]:
        """Return the undecided connections, oldest first."""
        return list(self._undecided)

    def add(self, pending: PendingConnection, client: Client) -> None:
        """Wait for the first frame of a connection whose handshake is over."""
        self._make_room(client.name)
        if pending.is_channel or begins_channel(pending.reader):
            wait_s = self._context.limits.handshake_timeout
        else:
            wait_s = SILENCE_S[client.config.when_connected]
            log = handshake_logger(self._context.log, pending)
            self._context.log_limiter.note("debug", "client.undecided", client.name, log=log)
        self._wait(pending, wait_s)
        self._loop.add_reader(pending.fd, self._on_readable, pending)
        self._look(pending)

    def close(self) -> None:
        """Refuse all undecided connections, because the broker drains."""
        for pending in list(self._undecided):
            self._forget(pending)
            self._turn_away(pending, Room.DRAINING)

    def _make_room(self, name: str) -> None:
        of_client = [other for other in self._undecided if _name_of(other) == name]
        if len(of_client) >= MOST_PER_CLIENT:
            self._decide(of_client[0])
        elif len(self._undecided) >= self._context.limits.handshakes:
            self._decide(next(iter(self._undecided)))

    def _wait(self, pending: PendingConnection, wait_s: float) -> None:
        self._undecided[pending] = self._loop.call_later(wait_s, self._decide, pending)

    def _on_readable(self, pending: PendingConnection) -> None:
        if pending not in self._undecided:
            return
        try:
            data = pending.stream.recv(2 * LIMIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(pending, error.strerror or type(error).__name__)
            return
        if not data:
            self._lose(pending, "connection closed by the client before its first frame")
            return
        # Another process can continue with all that the peer has sent.
        pending.heard += data
        was_channel = begins_channel(pending.reader)
        pending.reader.feed(data)
        if not was_channel and begins_channel(pending.reader):
            self._undecided[pending].cancel()
            self._wait(pending, self._context.limits.handshake_timeout)
        self._look(pending)

    def _look(self, pending: PendingConnection) -> None:
        """Decide a connection if enough of its first frame has arrived."""
        if begins_channel(pending.reader):
            if is_whole(pending.reader):
                self._forget(pending)
                self._begin_channel(pending)
        elif kind_of(pending.reader) is not None:
            self._decide(pending)
        if pending in self._undecided and pending.tls_stream and pending.tls_stream.buffered:
            # TLS holds decrypted bytes, which the system does not report.
            self._loop.call_soon(self._on_readable, pending)

    def _decide(self, pending: PendingConnection) -> None:
        """Decide a connection whose first frame is not that of a channel, or that has been
        silent for too long.
        """
        self._forget(pending)
        if begins_channel(pending.reader):
            self._turn_away(pending, Room.UNFINISHED)
        elif pending.is_channel:
            is_silent = kind_of(pending.reader) is None
            self._turn_away(pending, Room.UNFINISHED if is_silent else Room.OTHER_FRAME)
        elif not self._decide_now(pending):
            self._undecided[pending] = self._loop.call_later(_AGAIN_S, self._decide, pending)

    def _lose(self, pending: PendingConnection, reason: str) -> None:
        self._forget(pending)
        pending.sock.close()
        note_refusal(self._context, pending, reason, HandshakeOutcome.REFUSED)

    def _forget(self, pending: PendingConnection) -> None:
        self._undecided.pop(pending).cancel()
        self._loop.remove_reader(pending.fd)


def _name_of(pending: PendingConnection) -> str:
    assert pending.credential is not None, "an undecided connection has proved its key"
    return pending.credential.client.name
