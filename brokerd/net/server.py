"""The server: accepts connections, runs their handshakes, and carries out the core's
decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from brokerd.config import cert_subjects as subjects
from brokerd.config.model import Limits
from brokerd.config.values import ListenConfig
from brokerd.core.broker import AdminCommand, Broker
from brokerd.core.cluster.admission import Verdict
from brokerd.core.goaway import reason_frame
from brokerd.core.session import Session
from brokerd.log.rate_limit import LogRateLimiter
from brokerd.net.connection.busy_poll import BusyPoll
from brokerd.net.connection.connection import Connection
from brokerd.net.connection.connections import Connections
from brokerd.net.connection.disconnects import Disconnects
from brokerd.net.connection.frame_memory import FrameMemory
from brokerd.net.connection.liveness import Liveness
from brokerd.net.connection.reset_recheck import ResetRecheck
from brokerd.net.connection.tls import TlsConnection
from brokerd.net.connection.turns import Turns
from brokerd.net.context import Context
from brokerd.net.counters import Counters, HandshakeOutcome
from brokerd.net.drain import Drained, Draining
from brokerd.net.handshake.handshakes import PendingHandshakes, fresh_instance
from brokerd.net.handshake.keyring import Credential, Keyring
from brokerd.net.handshake.peer_uid import peer_uid
from brokerd.net.handshake.pending import PendingConnection
from brokerd.net.handshake.refusals import note_refusal
from brokerd.net.handshake.room import Room
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd.net.handshake.undecided import UndecidedConnections
from brokerd.net.listen.acceptor import Acceptor
from brokerd.net.listen.listener import ListenError, Listening
from brokerd.net.relay.end import End
from brokerd.net.relay.first_frame import begins_channel
from brokerd.net.relay.relays import Relays
from brokerd.net.settlement import Settlement
from brokerd_client.address import Address
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Server"]

#: Connections checked against a new keyring in one turn of the event loop: some
#: milliseconds' work.
_JUDGED: Final = 256
# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_FREE: Final = Room.FREE
_REPLACES: Final = Room.REPLACES
_TAKEN: Final = Room.TAKEN
_ENDING: Final = Room.ENDING
_ASKING: Final = Room.ASKING
_ACCEPTED: Final = HandshakeOutcome.ACCEPTED
#: The answers of other hosts.
_ROOMS: Final = {
    Verdict.FREE: Room.FREE,
    Verdict.TAKEN: Room.ELSEWHERE,
    Verdict.ASKING: Room.ASKING,
}


class Server:
    """Every socket of the daemon: composes the parts that share one Context.

    on_admin_command: executes a command that an administrator sent.
    on_left: called when a session has ended.
    """

    def __init__(
        self,
        broker: Broker,
        keyring: Keyring,
        limits: Limits,
        log: FilteringBoundLogger,
        *,
        wall: Callable[[], float],
    ) -> None:
        self.loop = loop = asyncio.get_running_loop()
        self.broker = broker
        self.log = log
        self.listening: list[Listening] = []
        self.on_admin_command: Callable[[AdminCommand], None] = lambda command: None
        self.on_left: Callable[[Session], None] = lambda session: None
        self.counters = Counters()
        log_limiter = LogRateLimiter(loop, log)
        settlement = Settlement(
            loop,
            broker,
            log_limiter,
            lambda command: self.on_admin_command(command),
            wall=wall,
        )
        liveness = Liveness(loop, limits.keepalive)
        connections = Connections(
            loop,
            broker,
            log_limiter,
            liveness,
            settlement,
            wall=wall,
            on_left=lambda session: self.on_left(session),
        )
        reset_recheck = ResetRecheck(loop)
        self.context = Context(
            loop=loop,
            broker=broker,
            keyring=keyring,
            limits=limits,
            log=log,
            log_limiter=log_limiter,
            counters=self.counters,
            wall=wall,
            connections=connections,
            settlement=settlement,
            liveness=liveness,
            reset_recheck=reset_recheck,
            busy_poll=BusyPoll(loop),
            frame_memory=FrameMemory(loop),
            disconnects=Disconnects(loop, reset_recheck),
            turns=Turns(loop),
        )
        self.pending_handshakes = PendingHandshakes(
            self.context, room_for=self.room_for, on_authenticated=self.admit
        )
        self.relays = Relays(self.context, self._why_end_unauthorized)
        settlement.on_channels = self.relays.settle
        connections.on_channel = self._on_channel
        self.undecided = UndecidedConnections(
            self.context,
            decide=self._decide,
            begin_channel=self._begin_channel,
            turn_away=self._turn_away,
        )
        self._acceptor = Acceptor(self.context, self.pending_handshakes)
        #: Listening sockets that accept nothing until another process takes over, or
        #: this one continues.
        self._held_back: list[Listening] = []

    @property
    def connections(self) -> set[Connection]:
        """The connections that have a session."""
        return self.context.connections.established

    @property
    def keyring(self) -> Keyring:
        """The keys of all clients; a reload replaces them."""
        return self.context.keyring

    @property
    def limits(self) -> Limits:
        """The limits of the configuration; a reload replaces them."""
        return self.context.limits

    @property
    def handshakes(self) -> int:
        """Number of connections whose handshake is not over."""
        return len(self.pending_handshakes)

    # Accepting

    def start(self, listening: Iterable[Listening]) -> None:
        """Accept connections from these listening sockets too."""
        for new in listening:
            self.listening.append(new)
            self._acceptor.add(new)

    def reconfigure(self, keyring: Keyring, limits: Limits) -> None:
        """Replace the keys and limits."""
        keyring.adopt_uses(self.keyring)
        self.context.keyring = keyring
        self.context.limits = limits
        self.context.liveness.reconfigure(limits.keepalive)
        self.relays.check_keys()

    def alter(self, altered: Iterable[ListenConfig]) -> None:
        """Change the settings of addresses that are listened at already.

        Raises ListenError; then nothing has changed.
        """
        settings = {entry.address: entry for entry in altered}
        undo: list[Callable[[], None]] = []
        for listening in self.listening:
            entry = settings.get(listening.config.address)
            if entry is not None:
                try:
                    undo.append(listening.alter(entry))
                except ListenError:
                    for take_back in reversed(undo):
                        take_back()
                    raise

    def stop_listening_at(self, addresses: Container[Address]) -> None:
        """Close the listening sockets of these configured addresses; their connections
        stay.
        """
        for closing in [
            closing for closing in self.listening if closing.config.address in addresses
        ]:
            self._stop_listening(closing)

    def listen_instead(self, former: Listening, listening: Listening) -> None:
        """Replace a listening socket by another of the same address.

        Connections made at the former one stay.
        """
        position = next(number for number, other in enumerate(self.listening) if other is former)
        self.start([listening])
        self._stop_listening(former)
        self.listening.insert(position, self.listening.pop())

    def _stop_listening(self, listening: Listening) -> None:
        # Clients that the system has connected already are accepted.
        self._acceptor.accept_some(listening)
        self._acceptor.remove(listening)
        self.listening = [other for other in self.listening if other is not listening]
        listening.close()

    def credentials(self, name: str) -> list[Credential]:
        """Return the credential that each connection of a client proved."""
        client = self.broker.exchange.resolve(name)
        sessions = () if client is None else client.sessions.values()
        return [session.connection.credential for session in sessions]

    def reasons(
        self, connections: Iterable[Connection], keyring: Keyring | None = None
    ) -> list[tuple[Connection, str]]:
        """Return the connections that a keyring would not accept now, each with the
        reason.

        By default, the current keyring is used.
        """
        open_connections = (
            connection
            for connection in connections
            if not connection.closed and not connection.session.closing
        )
        judged = (
            (
                connection,
                self.why_unauthorized(
                    connection.credential, _uid(connection), keyring, connection.tls_peer
                ),
            )
            for connection in open_connections
        )
        return [(connection, reason) for connection, reason in judged if reason]

    def unauthorized_in_batches(
        self, keyring: Keyring | None = None
    ) -> Iterator[list[tuple[Session, str]]]:
        """Yield the unauthorized connections in batches, so that the caller can pause
        between them.

        Only connections that exist at the beginning are checked. An expired key accepts
        no new connections, but its existing connections stay.
        """
        connections = iter(list(self.connections))
        while batch := list(islice(connections, _JUDGED)):
            yield [
                (connection.session, reason) for connection, reason in self.reasons(batch, keyring)
            ]

    def why_unauthorized(
        self,
        credential: Credential,
        uid: int | None,
        keyring: Keyring | None = None,
        tls_peer: TlsPeer = NO_TLS,
    ) -> str:
        """Return why a keyring does not authorize the client of this credential, or ""."""
        ring = self.keyring if keyring is None else keyring
        credentials = ring.named(credential.client.name)
        if not credentials:
            return "name removed from the configuration"
        if not ring.holds(credential):
            return "key removed from the configuration"
        users = credentials[0].client.peer_uid
        if users is not None and uid not in users:
            return "user removed from peer_uid"
        return tls_peer.refusal(credentials[0].client)

    def stop_accepting(self) -> None:
        """Close every listening socket, and refuse all pending connections."""
        for listening in self.listening:
            self._acceptor.remove(listening)
            listening.close()
        self.listening.clear()
        self.pending_handshakes.close()
        self.undecided.close()

    def hold_back_bound(self) -> None:
        """Stop accepting at TLS listeners: no other process could continue their
        connections.

        New connections stay in the system's queue.
        """
        for listening in self.listening:
            if listening.config.tls is not None and listening not in self._held_back:
                self._acceptor.remove(listening)
                self._held_back.append(listening)

    def accept_bound(self) -> None:
        """Accept connections at the TLS listeners again."""
        held_back, self._held_back = self._held_back, []
        for listening in held_back:
            if listening in self.listening:
                self._acceptor.add(listening)

    # Called by the pending handshakes and undecided connections

    def room_for(self, name: str) -> Room:
        """Return whether there is room for one more connection of ``name``.

        ENDING: the caller asks again in another turn.
        """
        context = self.context
        count = len(context.connections.established) + len(self.undecided)
        if count >= context.limits.connections:
            return Room.FULL
        has_room, leaving = self.broker.place_for(name)
        if not has_room:
            # A client that reconnects immediately may be faster than the event of its
            # disconnection.
            client = self.broker.exchange.resolve(name)
            for session in [] if client is None else list(client.sessions.values()):
                # Routing the input of one session may end another, because a write to
                # it fails.
                if session.open and session.connection.is_gone() is None:
                    return Room.ENDING
            has_room, leaving = self.broker.place_for(name)
        if not has_room:
            return Room.DRAINING if self.broker.status.draining else Room.TAKEN
        return _FREE if leaving is None else _REPLACES

    def _room_in_cluster(self, name: str) -> Room:
        """Return whether there is room for one more connection of ``name``, here and at
        other hosts.

        ASKING: the caller asks again in another turn.
        """
        room, traffic = self.room_for(name), self.broker.traffic
        if room is not _FREE or traffic is None:
            return room
        verdict = traffic.admission.judge(name, self.context.loop.time())
        if verdict is Verdict.ASKING:
            # The question leaves with the next settlement.
            self.context.loop.call_soon(self.settle)
        return _ROOMS[verdict]

    def admit(self, pending: PendingConnection) -> None:
        """Begin the session of a connection whose handshake is over, or wait for its
        first frame.

        A connection that gave no name waits if its client has all its connections. A
        connection that is to become a channel always waits.
        """
        if self._turns_away_unauthorized(pending):
            return
        assert pending.credential is not None
        name = pending.credential.client.name
        room = self.room_for(name)
        is_channel = pending.is_channel or begins_channel(pending.reader)
        if self.broker.traffic is not None and pending.claimed and not is_channel:
            # A channel needs no place, so no other host is asked for one.
            room = self._room_in_cluster(name)
        is_beyond = room in (_REPLACES, _TAKEN, _ENDING) or self._is_elsewhere(name)
        if (is_beyond and not pending.claimed) or room is _ASKING or is_channel:
            client = self.broker.exchange.resolve(name)
            assert client is not None, "its key is in the keyring"
            self.undecided.add(pending, client)
        else:
            # The handshake is over, so a client that gave its name can't wait for another
            # turn.
            self._conclude(pending, _TAKEN if room is _ENDING else room)

    def _is_elsewhere(self, name: str) -> bool:
        """Return whether another host may have to give up its connection of ``name``."""
        traffic = self.broker.traffic
        return traffic is not None and traffic.admission.needs_answer(name)

    def _decide(self, pending: PendingConnection) -> bool:
        """Apply ``when_connected`` to an undecided connection; return False if that
        takes another turn.
        """
        if not self._turns_away_unauthorized(pending):
            assert pending.credential is not None
            room = self._room_in_cluster(pending.credential.client.name)
            if room in (Room.ENDING, Room.ASKING):
                return False
            self._conclude(pending, room)
        return True

    def _begin_channel(self, pending: PendingConnection) -> None:
        """Begin a channel with a connection whose first frame is OPEN or JOIN."""
        assert pending.credential is not None
        self.keyring.let_in(pending.credential, self.context.wall())
        self.counters.handshakes[HandshakeOutcome.ACCEPTED] += 1
        self.relays.begin(End.of_pending(pending))

    def _on_channel(self, connection: Connection, unread: bytes) -> None:
        """Begin a channel with a connection that was an ordinary one until its first frame."""
        self.relays.begin(End.of_connection(connection, unread))

    def _why_end_unauthorized(self, end: End) -> str:
        return self.why_unauthorized(end.credential, end.uid, tls_peer=end.tls_peer)

    def _turns_away_unauthorized(self, pending: PendingConnection) -> bool:
        """Refuse a connection whose key a reload has removed since it was proved; return
        whether that was so.
        """
        if pending.keyring is self.context.keyring:
            # The search has found the same.
            return False
        assert pending.credential is not None
        reason = self.why_unauthorized(pending.credential, pending.uid, tls_peer=pending.tls_peer)
        if reason:
            self._turn_away(pending, Room.FORBIDDEN, reason)
        return bool(reason)

    def _conclude(self, pending: PendingConnection, room: Room) -> None:
        """Begin the session of a connection that has room, and refuse another one."""
        if room is not _FREE and room is not _REPLACES:
            self._turn_away(pending, room)
            return
        assert pending.credential is not None
        name = pending.credential.client.name
        if room is _REPLACES:
            _, leaving = self.broker.place_for(name)
            assert leaving is not None
            leaving.connection.end(ErrorCode.REPLACED, "connection replaced by a new one")
        now_wall = self.context.wall()
        self.context.keyring.let_in(pending.credential, now_wall)
        connection = _connection(self.context, pending, pending.credential)
        session = self.broker.attach(
            name,
            fresh_instance(self.broker.instance_suffix),
            peer=pending.peer,
            now_wall=now_wall,
            connection=connection,
        )
        self.context.connections.add(connection)
        self.counters.handshakes[_ACCEPTED] += 1
        self.context.log_limiter.note(
            "info",
            "client.connected",
            name,
            # Not bound to a logger, which would take as long as the line.
            name=name,
            address=session.address,
            peer=session.peer,
            listener=pending.listener,
            key=pending.credential.key.key_id,
            **_tls_fields(pending.tls_peer),
        )
        connection.open(session, pending.reader.take_rest())
        self.context.settlement.settle()

    def _turn_away(self, pending: PendingConnection, room: Room, reason: str = "") -> None:
        """Refuse a connection whose client has proved its key; send the code, if any."""
        code, reason = room.code, reason or room.value
        self.context.loop.remove_reader(pending.fd)
        try:
            if code is not None:
                pending.stream.send(reason_frame(code, reason))
                if pending.tls_stream is not None:
                    pending.tls_stream.finish()
        except OSError:
            code = None
        if code is None:
            pending.sock.close()
        else:
            self.context.connections.close_gracefully(pending.sock)
        note_refusal(self.context, pending, reason, HandshakeOutcome.REFUSED)

    def settle(self) -> None:
        """Carry out the core's decisions."""
        self.context.settlement.settle()

    # The end

    async def drain(self, timeout_s: float) -> Drained:
        """Drain: close every connection after its outbox is written; return the result.

        timeout_s: seconds until connections that do not read are cut off.
        """
        draining = Draining(
            self.context,
            timeout_s,
            stop_accepting=self.stop_accepting,
            drain_channels=self.relays.drain,
            cut_off=self.cut_off,
        )
        return await draining.run()

    def cut_off(self) -> int:
        """Close everything at once; return how many connections had bytes on their way."""
        self.stop_accepting()
        context = self.context
        established, lingering = list(self.connections), context.connections.lingering
        for connection in established:
            connection.lost("the broker stopped")
        busy_channels = self.relays.cut_off()
        for linger in lingering:
            linger.close()
        context.log_limiter.close()
        context.reset_recheck.close()
        context.frame_memory.close()
        context.disconnects.close()
        context.liveness.close()
        context.settlement.close()
        return len(established) + len(lingering) + busy_channels


def _connection(context: Context, pending: PendingConnection, credential: Credential) -> Connection:
    if pending.tls_stream is not None:
        return TlsConnection(context, pending.tls_stream, credential, pending.tls_peer)
    return Connection(context, pending.sock, credential)


def _uid(connection: Connection) -> int | None:
    return None if connection.tls_peer.version else peer_uid(connection.sock)


def _tls_fields(tls_peer: TlsPeer) -> dict[str, Any]:
    """Return the log fields of a connection over TLS."""
    if not tls_peer.version:
        return {}
    shown = {"subject": subjects.show(tls_peer.subject)} if tls_peer.fingerprint else {}
    return {"tls": tls_peer.version, "bound_to": tls_peer.bound or "nothing", **shown}
