"""The server: accepts connections, runs their handshakes, and carries out the core's
decisions.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice
from typing import Any, Final

from brokerd.config import cert_subjects as subjects
from brokerd.config.model import Limits
from brokerd.config.values import ListenConfig
from brokerd.core.broker import AdminCommand, Broker
from brokerd.core.goaway import reason_frame
from brokerd.core.session import Session
from brokerd.log.api import Log
from brokerd.log.rate_limit import LogRateLimiter
from brokerd.net.connection.connection import GRACE, READ_BUFFER, Connection
from brokerd.net.connection.lingering_close import LingeringClose
from brokerd.net.connection.liveness import Liveness
from brokerd.net.connection.reset_recheck import ResetRecheck
from brokerd.net.connection.tls import TlsConnection
from brokerd.net.core_events import report
from brokerd.net.counters import Counters, HandshakeOutcome
from brokerd.net.drain import Drained, Draining
from brokerd.net.graceful_close import Finishing
from brokerd.net.handshake.handshakes import TAKEN, PendingHandshakes, fresh_instance
from brokerd.net.handshake.keyring import Credential, Keyring
from brokerd.net.handshake.peer_uid import peer_uid
from brokerd.net.handshake.pending import PendingConnection
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd.net.listen.acceptor import Acceptor
from brokerd.net.listen.listener import ListenError, Listening
from brokerd_client.address import Address
from brokerd_client.tls.stream import TlsStream
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Server"]

#: Size of the buffer for input that is discarded, in bytes.
_WASTE: Final = 64 * 1024
#: Sessions closed, and connections checked against a new keyring, in one turn of the
#: event loop: some milliseconds' work.
_CLOSES: Final = 64
_JUDGED: Final = 256
#: Messages of ended sessions reported to their senders in one turn of the event loop: a
#: millisecond's work.
_DEFERRED_PER_TURN: Final = 64
#: Frames of one sender handled on the slow path in one turn of the event loop.
_TURN_BUDGET: Final = 128
_DRAINING: Final = "the broker is draining"
#: Error codes for a client that has proved its key and is refused. For any other reason
#: the connection is closed without an answer.
_CODES: Final = {TAKEN: ErrorCode.NAME_TAKEN, _DRAINING: ErrorCode.SHUTTING_DOWN}


class Server:
    """Every socket of the daemon.

    buffer: the one read buffer; a read is routed before the next one begins.
    wall: returns the time of day in seconds since the epoch.
    """

    def __init__(
        self,
        broker: Broker,
        keyring: Keyring,
        limits: Limits,
        log: Log,
        *,
        wall: Callable[[], float],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.broker = broker
        self.keyring = keyring
        self.limits = limits
        self.log = log
        self.wall = wall
        self.buffer = memoryview(bytearray(READ_BUFFER))
        #: The buffer for discarded input. It is a separate one, because a connection
        #: may end while frames of another lie in ``buffer``.
        self._waste = memoryview(bytearray(_WASTE))
        self.connections: set[Connection] = set()
        self.listening: list[Listening] = []
        self.on_admin_command: Callable[[AdminCommand], None] = lambda order: None
        self.on_left: Callable[[Session], None] = lambda session: None
        self.counters = Counters()
        self._pending_handshakes = PendingHandshakes(self)
        self._acceptor = Acceptor(self)
        self.log_limiter = LogRateLimiter(self.loop, log)
        self.reset_recheck = ResetRecheck(self.loop)
        self.liveness = Liveness(self)
        self._tick: asyncio.TimerHandle | None = None
        #: The time of that timer, in seconds of the event loop. uvloop's handle does
        #: not know it once the time has passed.
        self._tick_at = 0.0
        #: Number of sessions closed in this turn of the event loop, and the sessions to
        #: be closed in later turns.
        self._closes = 0
        self._closing_on = False
        self._put_off: deque[Session] = deque()
        self._settling = False
        self._running_deferred = False
        #: Set when the last connection has ended.
        self.empty: asyncio.Event = asyncio.Event()
        self._lingering: set[LingeringClose] = set()
        self._linger_s = GRACE
        self._draining: Draining | None = None
        self._finishing = Finishing(self)
        #: Listening sockets that accept nothing until another process takes over, or
        #: this one continues.
        self._held_back: list[Listening] = []
        #: See Broker.turn_budget: some milliseconds' work.
        self.turn_budget = _TURN_BUDGET

    @property
    def is_lingering(self) -> bool:
        """Whether the last bytes of a closed connection are still on their way."""
        return bool(self._lingering)

    @property
    def handshakes(self) -> int:
        """Number of connections whose handshake is not over."""
        return len(self._pending_handshakes)

    @property
    def seen_off(self) -> int:
        """Number of closed connections whose last bytes are still on their way."""
        return len(self._lingering)

    # Accepting

    def start(self, listening: Iterable[Listening]) -> None:
        """Accept connections from these listening sockets too."""
        for each in listening:
            self.listening.append(each)
            self._acceptor.add(each)

    def reconfigure(self, keyring: Keyring, limits: Limits) -> None:
        """Replace the keys and limits."""
        keyring.adopt_uses(self.keyring)
        self.keyring = keyring
        before, self.limits = self.limits, limits
        if limits.keepalive != before.keepalive:
            self.liveness.reconfigure()

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
        for each in [each for each in self.listening if each.config.address in addresses]:
            self._stop_listening(each)

    def listen_instead(self, former: Listening, listening: Listening) -> None:
        """Replace a listening socket by another of the same address.

        Connections made at the former one stay.
        """
        position = next(number for number, each in enumerate(self.listening) if each is former)
        self.start([listening])
        self._stop_listening(former)
        self.listening.insert(position, self.listening.pop())

    def _stop_listening(self, listening: Listening) -> None:
        # Clients that the system has connected already are accepted.
        self._acceptor.accept_some(listening)
        self._acceptor.remove(listening)
        self.listening = [each for each in self.listening if each is not listening]
        listening.close()

    def credentials(self) -> list[Credential]:
        """Return the credential that each connection proved."""
        return [connection.credential for connection in self.connections]

    def unauthorized_connections(self, keyring: Keyring | None = None) -> list[tuple[Session, str]]:
        """Return the sessions that a keyring would not accept now, each with the
        reason.

        By default, the current keyring is used. An expired key accepts no new
        connections, but its existing connections stay.
        """
        found: list[tuple[Session, str]] = []
        for some in self.misfits_in_turns(keyring):
            found += some
        return found

    def reasons(
        self, connections: Iterable[Connection], keyring: Keyring | None = None
    ) -> list[tuple[Connection, str]]:
        """Return the connections that a keyring would not accept now, each with the
        reason.

        By default, the current keyring is used.
        """
        there = (
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
            for connection in there
        )
        return [(connection, why) for connection, why in judged if why]

    def misfits_in_turns(
        self, keyring: Keyring | None = None
    ) -> Iterator[list[tuple[Session, str]]]:
        """Yield the unauthorized connections in batches, so that the caller can pause
        between them.

        Only connections that exist at the beginning are checked.
        """
        connections = iter(list(self.connections))
        while some := list(islice(connections, _JUDGED)):
            yield [(connection.session, why) for connection, why in self.reasons(some, keyring)]

    def why_unauthorized(
        self,
        credential: Credential,
        uid: int | None,
        keyring: Keyring | None = None,
        tls_peer: TlsPeer = NO_TLS,
    ) -> str:
        """Return why a keyring does not authorize the client of this credential, or ""."""
        ring = self.keyring if keyring is None else keyring
        known = ring.named(credential.client.name)
        if not known:
            return "its name was removed from the configuration"
        if not ring.holds(credential):
            return "the key it uses was removed from the configuration"
        users = known[0].client.peer_uid
        if users is not None and uid not in users:
            return "its user is not in peer_uid any more"
        return tls_peer.refusal(known[0].client)

    def stop_accepting(self) -> None:
        """Close every listening socket, and refuse all pending connections."""
        for each in self.listening:
            self._acceptor.remove(each)
            each.close()
        self.listening.clear()
        self._pending_handshakes.close()

    def hold_back_bound(self) -> None:
        """Stop accepting at TLS listeners: no other process could continue their
        connections.

        New connections stay in the system's queue.
        """
        for each in self.listening:
            if each.config.tls is not None and each not in self._held_back:
                self._acceptor.remove(each)
                self._held_back.append(each)

    def accept_bound(self) -> None:
        """Accept connections at the TLS listeners again."""
        held_back, self._held_back = self._held_back, []
        for each in held_back:
            if each in self.listening:
                self._acceptor.add(each)

    # Called by the pending handshakes

    def room_for(self, name: str) -> str | None:
        """Make room for one more connection of ``name``; return why there is none, or
        "".

        None: the connection that holds the place has ended, but its earlier input has
        to be routed first. The caller asks again in another turn.
        """
        if len(self.connections) >= self.limits.connections:
            return "more connections than limits.connections"
        there, leaving = self.broker.place_for(name)
        if not there:
            # A client that reconnects immediately may be faster than the event of its
            # disconnection.
            client = self.broker.exchange.resolve(name)
            for session in [] if client is None else list(client.sessions.values()):
                # Routing the input of one session may end another, because a write to
                # it fails.
                if session.open and session.connection.is_gone() is None:
                    return None
            there, leaving = self.broker.place_for(name)
        if not there:
            return _DRAINING if self.broker.draining else TAKEN
        if leaving is not None:
            leaving.connection.end(ErrorCode.REPLACED, "replaced by a new connection")
        return ""

    def admit(self, pending: PendingConnection) -> None:
        """Begin the session of a connection that has proved its identity."""
        assert pending.credential is not None
        name = pending.credential.client.name
        # While this handshake was finishing, another connection may have taken the
        # place, or a reload may have removed the key.
        why_unauthorized = self.why_unauthorized(
            pending.credential, pending.uid, tls_peer=pending.tls_peer
        )
        reason = why_unauthorized or self.room_for(name)
        if reason != "":
            reason = reason or TAKEN
            self._turn_away(
                pending, ErrorCode.KEY_REMOVED if why_unauthorized else _CODES.get(reason), reason
            )
            self.on_refused(pending, reason, HandshakeOutcome.REFUSED)
            return
        self.keyring.let_in(pending.credential, self.wall())
        connection = _connection(self, pending, pending.credential)
        session = self.broker.attach(
            name, fresh_instance(), peer=pending.peer, now_wall=self.wall(), connection=connection
        )
        self.connections.add(connection)
        self.liveness.reset_recheck(connection)
        self.counters.handshakes[HandshakeOutcome.ACCEPTED] += 1
        self.log_limiter.note(
            "info",
            "client.connected",
            name,
            name=name,
            address=session.address,
            peer=pending.peer,
            listener=pending.listener,
            key=pending.credential.key.key_id,
            **_tls_fields(pending.tls_peer),
        )
        connection.open(session, pending.reader.take_rest())
        self.settle()

    def _turn_away(self, pending: PendingConnection, code: ErrorCode | None, why: str) -> None:
        """Close a connection whose client has proved its key; send ``code`` first, if
        any.
        """
        if code is None:
            pending.sock.close()
            return
        sock = pending.sock
        try:
            sock.send(reason_frame(code, why))
            if isinstance(sock, TlsStream):
                sock.finish()
        except OSError:
            sock.close()
        else:
            self.close_gracefully(sock.raw if isinstance(sock, TlsStream) else sock)

    def on_refused(
        self, pending: PendingConnection, reason: str, outcome: HandshakeOutcome
    ) -> None:
        """Count and log a refused connection."""
        self.counters.handshakes[outcome] += 1
        client = None if pending.credential is None else pending.credential.client.name
        fields: dict[str, Any] = {} if client is None else {"name": client}
        fields |= {"peer": pending.peer, "listener": pending.listener, "reason": reason}
        self.log_limiter.note(
            "warning", "client.refused", f"{client or pending.origin}: {reason}", **fields
        )

    # Carrying out the core's decisions

    def on_lost(self, connection: Connection, why: str) -> None:
        """Detach the session of a connection that has just been closed, and log its
        end.
        """
        session = connection.session
        if self._draining is not None:
            self._draining.on_leaving(session)
        self.connections.discard(connection)
        self.liveness.forget(connection)
        self.broker.detach(session, self.wall())
        self.on_left(session)
        self.log_limiter.note(
            "info",
            "client.disconnected",
            session.client.name,
            name=session.client.name,
            address=session.address,
            peer=session.peer,
            reason=why,
        )
        self._note_if_empty()
        self.settle()

    def close_gracefully(self, sock: socket.socket) -> None:
        """Close a socket when all bytes written to it have arrived."""
        self.linger(sock, self._linger_s)

    def linger(self, sock: socket.socket, time_s: float) -> None:
        """Close a socket when all bytes written to it have arrived, or after ``time_s``
        seconds.
        """
        linger = LingeringClose(sock, self._waste, time_s, self.loop, self._on_lingered)
        self._lingering.add(linger)
        linger.begin()

    @property
    def pending_handshakes(self) -> PendingHandshakes:
        """The unfinished handshakes."""
        return self._pending_handshakes

    def lingering(self) -> list[LingeringClose]:
        """Return the sockets in their lingering close."""
        return list(self._lingering)

    def _on_lingered(self, linger: LingeringClose) -> None:
        self._lingering.discard(linger)
        self._note_if_empty()

    def _note_if_empty(self) -> None:
        if not self.connections and not self._lingering:
            self.empty.set()

    def write_touched(self) -> None:
        """Write every outbox that has new bytes, and close sessions that are to be
        closed.
        """
        touched = self.broker.touched
        while touched:
            session = touched.pop()
            session.outbox.touched = False
            connection: Connection = session.connection
            if not session.open:
                continue
            if session.closing:
                if not self._may_close(session):
                    continue
                connection.add_reason()
            if session.cut:
                connection.lost(session.closing)
            elif not (session.outbox.blocked and connection.writing):
                connection.write()
            elif session.closing:
                connection.close_soon()

    def _may_close(self, session: Session) -> bool:
        """Return whether a session may be closed in this turn of the event loop.

        Otherwise it is postponed to a later turn. A reload or an operator may end ten
        thousand sessions at once.
        """
        if self._draining is not None:
            return True
        if not self._closing_on:
            self._closing_on = True
            self.loop.call_soon(self._close_on)
        if self._closes < _CLOSES:
            self._closes += 1
            return True
        self._put_off.append(session)
        return False

    def _close_on(self) -> None:
        """Close some of the postponed sessions."""
        self._closing_on = False
        self._closes = 0
        for _ in range(min(_CLOSES, len(self._put_off))):
            session = self._put_off.popleft()
            if session.open:
                self.broker.touch(session)
        if self._put_off:
            self._closing_on = True
            self.loop.call_soon(self._close_on)
        self.settle()

    def settle(self) -> None:
        """Carry out the core's decisions: write, close, resume, run commands, set the
        timer.
        """
        if self._settling:
            return
        self._settling = True
        broker = self.broker
        try:
            while broker.touched or broker.released:
                self.write_touched()
                released, broker.released = broker.released, []
                for session in released:
                    if session.open:
                        session.connection.resume()
        finally:
            self._settling = False
        if broker.log_events:
            report(broker.log_events.take(), self.log_limiter)
        while broker.admin_commands:
            self.on_admin_command(broker.admin_commands.pop(0))
        if broker.has_deferred_work and not self._running_deferred:
            self._running_deferred = True
            self.loop.call_soon(self._run_deferred)
        if broker.has_deadlines or self._tick is not None:
            self._set_timer()
        if broker.finishing:
            self._finishing.look_soon()

    def _run_deferred(self) -> None:
        """Do some of the deferred work of ended sessions, and the rest in the next
        turns.
        """
        self._running_deferred = False
        self.broker.run_deferred(_DEFERRED_PER_TURN)
        self.settle()

    def _set_timer(self) -> None:
        deadline = self.broker.next_deadline
        if self._tick is not None and (deadline is None or deadline < self._tick_at):
            self._tick.cancel()
            self._tick = None
        if self._tick is None and deadline is not None and deadline != float("inf"):
            self._tick_at = deadline
            self._tick = self.loop.call_at(deadline, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self.broker.tick(self.loop.time())
        self.settle()

    # The end

    async def drain(self, timeout_s: float) -> Drained:
        """Drain: close every connection after its outbox is written; return the result.

        timeout_s: seconds until connections that do not read are cut off.
        """
        self._linger_s = timeout_s
        self._draining = Draining(self, timeout_s)
        return await self._draining.run()

    def cut_off(self) -> int:
        """Close everything at once; return how many connections had bytes on their way."""
        self.stop_accepting()
        connections, lingering = list(self.connections), list(self._lingering)
        for connection in connections:
            connection.lost("the broker stopped")
        for linger in lingering:
            linger.close()
        self.log_limiter.close()
        self.reset_recheck.close()
        self.liveness.close()
        self._finishing.close()
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        return len(connections) + len(lingering)


def _connection(server: Server, pending: PendingConnection, credential: Credential) -> Connection:
    if pending.stream is not None:
        return TlsConnection(server, pending.stream, credential, pending.tls_peer)
    assert isinstance(pending.sock, socket.socket)
    return Connection(server, pending.sock, credential)


def _uid(connection: Connection) -> int | None:
    return None if connection.tls_peer.version else peer_uid(connection.sock)


def _tls_fields(tls_peer: TlsPeer) -> dict[str, Any]:
    """Return the log fields of a connection over TLS."""
    if not tls_peer.version:
        return {}
    shown = {"subject": subjects.show(tls_peer.subject)} if tls_peer.fingerprint else {}
    return {"tls": tls_peer.version, "bound_to": tls_peer.bound or "nothing", **shown}
