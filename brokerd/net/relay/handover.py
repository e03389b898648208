"""The handover of channels: captured for another process, and restored there.

Both connections of a channel have to be without TLS. The bytes that wait for an end go
with it, and so do OPENs that wait for their answer. Facts and pieces are those of
:mod:`brokerd.net.handover`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from brokerd.core.channels import Channel, Opening
from brokerd.net.handshake.tls import NO_TLS
from brokerd.net.relay.end import End
from brokerd.net.relay.relay import Direction, Relay

if TYPE_CHECKING:
    from brokerd.core.snapshot import Facts, Pieces, Snapshot
    from brokerd.net.handshake.keyring import Credential
    from brokerd.net.server import Server

__all__ = ["RestoredChannels", "capture_channels"]


def capture_channels(server: Server, snapshot: Snapshot) -> tuple[Facts, list[socket.socket]]:
    """Return the facts of all channels, and their sockets in the same order.

    Their bytes are appended to the pieces of the snapshot.
    """
    core = server.broker.channels
    relays: list[Relay] = [channel.relay for channel in core.open]
    openings = [each for each in core.openings() if each.connection.can_hand_over]
    facts: Facts = {
        "opened": core.opened,
        "relayed": core.relayed,
        "open": [_relay(relay, snapshot) for relay in relays],
        "openings": [_opening(opening, server.loop.time(), snapshot) for opening in openings],
    }
    ends: list[End] = [end for relay in relays for end in (relay.caller, relay.recipient)]
    ends += [opening.connection for opening in openings]
    return facts, [end.sock for end in ends]


def _relay(relay: Relay, snapshot: Snapshot) -> Facts:
    listener = relay.channel.listener
    return {
        "since": relay.channel.since,
        "listener": None if listener is None else listener.number,
        "ends": [_end(end, snapshot) for end in (relay.caller, relay.recipient)],
        "directions": [_direction(direction, snapshot) for direction in relay.directions],
        "closing": relay.is_closing,
    }


def _end(end: End, snapshot: Snapshot) -> Facts:
    early = end.reader.peek(end.reader.buffered)
    snapshot.pieces.append(early)
    return {
        "socket": [int(end.sock.family), int(end.sock.type), end.sock.proto],
        "client": end.name,
        "key": end.credential.key.key_id,
        "peer": end.peer,
        "early": len(early),
    }


def _direction(direction: Direction, snapshot: Snapshot) -> list[int]:
    snapshot.pieces.append(direction.rest)
    return [len(direction.rest), direction.moved, direction.ended, direction.over]


def _opening(opening: Opening, now: float, snapshot: Snapshot) -> Facts:
    return {
        "recipient": opening.recipient.name,
        "listener": opening.listener.number,
        "id": opening.id,
        "token": opening.token,
        "left_s": opening.deadline - now,
        "end": _end(opening.connection, snapshot),
    }


class RestoredChannels:
    """The channels of another process, restored in a new server.

    No socket is used until ``begin``. There, channels end that this configuration does
    not admit.

    open_socket: returns the next socket, of the kind in an end's facts.
    credential_of: returns the credential of an end.

    Raises KeyError, ValueError, TypeError or OSError for facts that were never captured.
    """

    def __init__(
        self,
        server: Server,
        facts: Facts,
        pieces: Pieces,
        open_socket: Callable[[Facts], socket.socket],
        credential_of: Callable[[Facts], Credential | None],
    ) -> None:
        self._server = server
        self._pieces = pieces
        self._open_socket = open_socket
        self._credential_of = credential_of
        self._clients = server.broker.exchange.clients
        self._sessions = {session.number: session for session in server.broker.exchange.sessions()}
        #: The sockets of ends that are not admitted any more.
        self._unwanted: list[socket.socket] = []
        #: The relays, each with whether it is closing.
        self._relays = [
            (relay, bool(each["closing"]))
            for each in facts["open"]
            if (relay := self._relay(each)) is not None
        ]
        for each in facts["openings"]:
            self._add_opening(each)
        server.broker.channels.opened += facts["opened"]
        server.broker.channels.relayed += facts["relayed"]

    def _end(self, facts: Facts) -> End | None:
        sock, credential = self._open_socket(facts), self._credential_of(facts)
        early = self._pieces.take(facts["early"])
        if credential is None or facts["client"] not in self._clients:
            self._unwanted.append(sock)
            return None
        end = End(sock, credential, facts["peer"], NO_TLS)
        end.reader.feed(early)
        return end

    def _relay(self, facts: Facts) -> Relay | None:
        caller, recipient = map(self._end, facts["ends"])
        rows = [(bytes(self._pieces.take(row[0])), *row[1:]) for row in facts["directions"]]
        if caller is None or recipient is None:
            self._unwanted += [end.sock for end in (caller, recipient) if end is not None]
            return None
        relay = self._server.relays.between(caller, recipient)
        for direction, row in zip(relay.directions, rows, strict=True):
            direction.restore(*row)
        relay.channel = Channel(
            self._clients[caller.name],
            self._clients[recipient.name],
            self._sessions.get(facts["listener"]),
            facts["since"],
            relay,
        )
        self._server.broker.channels.add(relay.channel)
        return relay

    def _add_opening(self, facts: Facts) -> None:
        end, listener = self._end(facts["end"]), self._sessions.get(facts["listener"])
        recipient = self._clients.get(facts["recipient"])
        if end is None or listener is None or recipient is None:
            self._unwanted += [] if end is None else [end.sock]
            return
        deadline = self._server.loop.time() + facts["left_s"]
        self._server.broker.channels.add_opening(
            Opening(
                self._clients[end.name],
                recipient,
                listener,
                facts["id"],
                facts["token"],
                deadline,
                end,
            )
        )

    def begin(self) -> None:
        """Continue relaying; from here on only this process uses the sockets."""
        for sock in self._unwanted:
            sock.close()
        for relay, is_closing in self._relays:
            relay.go_on(is_closing=is_closing)
        server = self._server
        for opening in server.broker.channels.openings():
            server.relays.watch(opening)
        server.broker.channels.check_rules()
        server.relays.check_keys()
