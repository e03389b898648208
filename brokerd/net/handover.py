"""The handover: a server's sockets and state, captured for another process, restored
there.

`capture` changes nothing, because it is decided later whether the other process takes
over. `RestoredState` is the other side: it builds everything, but uses no socket until
`begin`. Facts are plain values, bytes are in the snapshot's pieces, and sockets go by
their descriptors. Keys are named by their ids and never captured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from brokerd.config.values import Key, ListenConfig, Source
from brokerd.core import snapshot
from brokerd.core.large_frame import SLACK, LargeFrame
from brokerd.core.precopy import Copier, Copies
from brokerd.core.session import Session
from brokerd.core.snapshot import Facts, Pieces, Snapshot
from brokerd.core.snapshot_check import check_counters, check_incidents, check_numbers
from brokerd.net.bound_loggers import listener_logger
from brokerd.net.connection.connection import GRACE, Connection
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.graceful_close import Parting
from brokerd.net.handshake.keyring import Credential
from brokerd.net.handshake.pending import PendingConnection
from brokerd.net.handshake.refusals import note_refusal
from brokerd.net.listen.listener import ListenError, Listening
from brokerd.net.relay.handover import RestoredChannels, capture_channels
from brokerd.net.server import Server
from brokerd_client.address import Address
from brokerd_client.wire.envelope import ErrorCode

__all__ = [
    "Ahead",
    "Passing",
    "RestoredState",
    "capture",
    "describe",
    "let_go_of_bound",
]

_LOOK_AGAIN_S: Final = 0.02
#: Takes the place of a key that is not configured any more; no keyring holds it.
_GONE: Final = Key(b"", source="a key that is no longer configured")
_NOWHERE: Final = Source("", 0)
#: Connections copied in one block, and connections whose liveness is checked from one
#: turn of the event loop on: some milliseconds' work.
_COPIED: Final = 50
_WATCHED: Final = 100
#: Incidents sent in one block.
_INCIDENTS: Final = 500


# Capture


class Passing:
    """Copies idle connections and passes their sockets, while the broker serves them.

    From its creation until ``end`` the broker notes what changes.

    copier: copies the state that the broker holds.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.copier = Copier(server.broker)
        self.copier.watch([connection.session for connection in server.connections])
        #: Connections whose sockets the other process has.
        self.passed: set[Connection] = set()
        self._uses: dict[tuple[str, bytes], float] = {}

    def end(self) -> None:
        """Stop noting changes in the broker."""
        self.copier.end()

    def blocks(self) -> Iterator[tuple[Facts, list[int]]]:
        """Yield blocks of facts and duplicated descriptors; the caller closes the
        descriptors.

        Everything may change between two blocks.
        """
        server = self._server
        if left := self.copier.take_left():
            yield {"gone": left}, []
        sessions = iter(self.copier.changed_sessions())
        while batch := list(islice(sessions, _COPIED)):
            idle: list[Facts] = []
            counts: list[list[int]] = []
            descriptors: list[int] = []
            # If descriptors run out, the remaining connections go with the final
            # capture.
            with contextlib.suppress(OSError):
                for session in batch:
                    if session.open and _is_idle(session.connection):
                        self._copy(session.connection, idle, counts, descriptors)
            if idle:
                yield {"idle": idle}, descriptors
            if counts:
                yield {"counts": counts}, []
        for facts in snapshot.capture_clients(server.broker, server.loop.time(), self.copier):
            yield facts, []
        incidents = self.copier.take_incidents()
        for start in range(0, len(incidents), _INCIDENTS):
            yield {"incidents": incidents[start : start + _INCIDENTS]}, []
        yield {"keys": self.uses()}, []

    def _copy(
        self,
        connection: Connection,
        idle: list[Facts],
        counts: list[list[int]],
        descriptors: list[int],
    ) -> None:
        session = connection.session
        counters = self.copier.counted(session)
        if counters is not None:
            if counters:
                counts.append([session.number, *counters])
            self.copier.note_counted(session)
            return
        server, passed = self._server, connection in self.passed
        # First, because it may fail: nothing is recorded yet.
        descriptor = None if passed else os.dup(connection.sock.fileno())
        facts = snapshot.capture_idle(server.broker, session, server.loop.time(), self.copier)
        if facts is None:
            if descriptor is not None:
                os.close(descriptor)
            return
        idle.append({**facts, "link": _connection(connection, Snapshot(), passed=passed)})
        if descriptor is not None:
            descriptors.append(descriptor)
            self.passed.add(connection)
            connection.passed = True

    def uses(self) -> list[tuple[str, str, float]]:
        """Return the uses of keys since the last call."""
        keyring, before = self._server.keyring, self._uses
        self._uses = keyring.moments()
        return keyring.uses(before)


def _is_idle(connection: Connection) -> bool:
    return connection.can_hand_over and not (
        connection.pending_input
        or connection.large_frame
        or connection.waits
        or connection.writing
        or connection.ending
    )


def capture(
    server: Server, passing: Passing, asker: Session | None = None
) -> tuple[Snapshot, list[int]]:
    """Return the state of a server, and the descriptors of its sockets in the same
    order.

    passing: state that it has copied and passed is left out. So the work is
    proportional to what has changed since.
    asker: the session that asked for it, if any.

    All decisions of the core have to be carried out first: call ``settle`` before.
    Remaining connections that can't be handed over are closed: see ``let_go_of_bound``.
    """
    copier, passed = passing.copier, passing.passed
    for session in copier.changed_sessions():
        if session.open and not session.connection.can_hand_over:
            session.connection.lost("connection came during an upgrade and can't be handed over")
    changed = [session for session in copier.changed_sessions() if session.open]
    for session in changed:
        if not _is_idle(session.connection):
            copier.forget_idle(session)
    captured = snapshot.capture(server.broker, changed, server.loop.time(), copier, asker)
    fresh = [session.connection for session in captured.sessions]
    lingering = server.context.connections.lingering
    # The handshake of an undecided connection is replayed as well: then it is undecided
    # again.
    pending_connections = [
        pending
        for pending in (
            *server.pending_handshakes.pending_connections(),
            *server.undecided.connections(),
        )
        if pending.can_hand_over
    ]
    server.relays.cut_off_bound()
    facts: Facts = {
        "core": captured.facts,
        "listening": [_listening(listening) for listening in server.listening],
        "links": [
            _connection(connection, captured, passed=connection in passed) for connection in fresh
        ],
        "knocks": [
            _pending_connection(pending, server, captured) for pending in pending_connections
        ],
        "farewells": [
            {"socket": _socket(connection.sock), "left_s": connection.time_left_s}
            for connection in lingering
        ],
        "failures": server.pending_handshakes.failures.ages(server.loop.time()),
        "keys": passing.uses(),
        "tally": server.counters.values(),
    }
    # Last, as its bytes are behind all others.
    facts["channels"], channel_sockets = capture_channels(server, captured)
    captured.facts = facts
    not_passed = [connection for connection in fresh if connection not in passed]
    sockets = [
        item.sock
        for group in (server.listening, not_passed, pending_connections, lingering)
        for item in group
    ]
    return captured, [sock.fileno() for sock in (*sockets, *channel_sockets)]


async def let_go_of_bound(server: Server, reason: str) -> None:
    """Close the connections that no other process can continue; return when they are
    closed.

    No such connection is accepted from now on: see ``Server.accept_bound``.
    """
    server.hold_back_bound()
    server.relays.let_go_of_bound()
    parting = Parting(server.context, lambda connection: not connection.can_hand_over, reason)
    deadline = server.loop.time() + GRACE
    while (parting.connections() or server.relays.bound()) and server.loop.time() < deadline:  # noqa: ASYNC110 - a look is more than waiting
        await asyncio.sleep(await parting.look(deadline))
    await parting.end(deadline + GRACE)
    server.relays.cut_off_bound()
    server.settle()
    while parting.connections():  # noqa: ASYNC110 - rare
        # Each client has GRACE seconds to read its remaining bytes.
        await asyncio.sleep(_LOOK_AGAIN_S)


def _socket(sock: socket.socket) -> list[int]:
    return [int(sock.family), int(sock.type), sock.proto]


def describe(address: Address) -> list[Any]:
    """Return an address as plain values, for ``Address(*values)``."""
    return [address.family, address.host, address.port, address.path, address.tls]


def _listening(listening: Listening) -> Facts:
    assert isinstance(listening.sock, socket.socket), (
        "there are no named pipes where processes hand over sockets"
    )
    return {
        "socket": _socket(listening.sock),
        "configured": describe(listening.config.address),
        "address": describe(listening.address),
        "inode": listening.inode,
        "mode": listening.config.mode,
        "group": listening.config.group,
        "first_group": listening.first_group,
    }


def _connection(connection: Connection, captured: Snapshot, *, passed: bool) -> Facts:
    large_frame = connection.large_frame
    captured.pieces.append(connection.pending_input)
    if large_frame is not None:
        captured.pieces.append(memoryview(large_frame)[SLACK : large_frame.filled])
    return {
        "socket": _socket(connection.sock),
        "passed": passed,
        "client": connection.credential.client.name,
        "key": connection.credential.key.key_id,
        "tail": len(connection.pending_input),
        "waits": connection.waits,
        "parcel": None
        if large_frame is None
        else [large_frame.filled - SLACK, large_frame.end - SLACK],
    }


def _pending_connection(pending: PendingConnection, server: Server, captured: Snapshot) -> Facts:
    captured.pieces += [pending.nonce, pending.heard]
    welcomed = pending.credential if pending.spoken > 1 else None
    return {
        "socket": _socket(pending.sock),
        "peer": pending.peer,
        "origin": pending.origin,
        "listener": pending.listener,
        "allow_md5": pending.allow_md5,
        "left_s": pending.deadline - server.loop.time(),
        "nonce": len(pending.nonce),
        "heard": len(pending.heard),
        "spoken": pending.spoken,
        "welcomed": welcomed and [welcomed.client.name, welcomed.key.key_id],
    }


# Restore


class Ahead:
    """Connections that the old process copied and passed while it served them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.copies = Copies(server.broker)
        #: The connections, by the numbers of their sessions; and the sockets of those
        #: whose names are not known here.
        self.connections: dict[int, Connection] = {}
        self._sockets: dict[int, socket.socket] = {}
        #: The reasons for closing some of those connections.
        self.unauthorized_connections: dict[Connection, str] = {}

    def add(self, facts: Facts, body: memoryview, descriptors: Sequence[int]) -> None:
        """Restore one block. Raises BadSnapshot, and the errors that RestoredState
        raises.
        """
        if "idle" in facts:
            remaining = iter(descriptors)
            for session_facts in facts["idle"]:
                self._add_idle(session_facts, remaining)
            if any(True for _ in remaining):
                raise ValueError("a block has descriptors that belong to no connection")
        elif "counts" in facts:
            check_counters(facts["counts"])
            for number, *counters in facts["counts"]:
                self.copies.count(number, counters)
        elif "clients" in facts:
            server = self._server
            snapshot.restore_clients(server.broker, facts, server.loop.time(), self.copies)
        elif "gone" in facts:
            check_numbers(facts["gone"])
            for number in facts["gone"]:
                self.copies.discard(number)
            self.drop_discarded()
        elif "incidents" in facts:
            check_incidents(facts["incidents"])
            self._server.broker.incidents.restore(facts["incidents"])
        elif "keys" in facts:
            self._server.keyring.take_uses(facts["keys"])
        else:
            self.copies.add(facts, body, self._server.loop.time())

    def _add_idle(self, facts: Facts, descriptors: Iterator[int]) -> None:
        server, link_facts = self._server, facts["link"]
        session = snapshot.restore_idle(server.broker, facts, server.loop.time(), self.copies)
        self.drop_discarded()
        number = facts["session"]["number"]
        if not link_facts["passed"]:
            self._sockets[number] = _opened(link_facts, next(descriptors, -1))
        if session is not None:
            connection = self.connections.get(number)
            if connection is None:
                sock = self._sockets.pop(number)
                connection = self.connections[number] = _link_of(server, session, sock, link_facts)
                # The event loop does not run before this process serves.
                connection.go_on()
            connection.session, session.connection = session, connection
            self.unauthorized_connections.update(server.reasons([connection]))

    def take_socket(self, number: int) -> socket.socket:
        """Return the socket that was passed for the session of that number."""
        connection = self.connections.pop(number, None)
        if connection is None:
            return self._sockets.pop(number)
        self.unauthorized_connections.pop(connection, None)
        self._server.loop.remove_reader(connection.fd)
        return connection.sock

    def take_unconfigured(self, session: Session) -> Connection:
        """Return the connection of a session whose name is not configured here."""
        connection = Connection(
            self._server.context,
            self._sockets.pop(session.number),
            Credential(session.client.config, _GONE),
        )
        connection.session, session.connection = session, connection
        return connection

    def drop_discarded(self) -> None:
        """Close the sockets of the sessions that have left."""
        for number in self.copies.take_discarded():
            connection = self.connections.pop(number, None)
            if connection is not None:
                self.unauthorized_connections.pop(connection, None)
                self._server.loop.remove_reader(connection.fd)
                connection.sock.close()
            elif (sock := self._sockets.pop(number, None)) is not None:
                sock.close()


def _opened(facts: Facts, descriptor: int) -> socket.socket:
    family, kind, protocol = facts["socket"]
    sock = socket.socket(family, kind, protocol, fileno=descriptor)
    # The descriptor is non-blocking already, in both processes; this socket object has
    # to know.
    sock.setblocking(False)
    return sock


def _link_of(server: Server, session: Session, sock: socket.socket, facts: Facts) -> Connection:
    credential = server.keyring.find(facts["client"], facts["key"])
    connection = Connection(
        server.context, sock, credential or Credential(session.client.config, _GONE)
    )
    connection.session, session.connection = session, connection
    return connection


class RestoredState:
    """The captured state of another process, restored in a new server with an empty
    broker.

    Args:
        opened: Listening sockets that the other process did not have.
        descriptors: Every descriptor, in order; they belong to this object from now on.
        ahead: The connections that were copied and passed before.

    Attributes:
        sessions: The sessions in the facts, by position.
        fresh: The connections that had not been copied, or have changed since.

    Raises BadSnapshot, KeyError, ValueError, TypeError or OSError for a state that was
    never captured.
    """

    def __init__(
        self,
        server: Server,
        facts: Facts,
        pieces: Pieces,
        descriptors: Sequence[int],
        listen: Iterable[ListenConfig],
        opened: Iterable[Listening],
        ahead: Ahead | None = None,
    ) -> None:
        self._ahead = ahead = ahead or Ahead(server)
        self._server = server
        self._opened = list(opened)
        self._descriptors = iter(descriptors)
        self._now = server.loop.time()
        entries = {entry.address: entry for entry in listen}
        #: Each listening socket with its entry of the new configuration, or None if it
        #: has none.
        self._listening = [
            (listening, entries.get(listening.config.address))
            for listening in map(self._restore_listening, facts["listening"])
        ]
        core = facts["core"]
        self.sessions, unconfigured_sessions = snapshot.restore(
            server.broker, core, pieces, self._now, ahead.copies
        )
        ahead.drop_discarded()
        if len(core["outboxes"]) != len(facts["links"]):
            raise ValueError("there are not as many sockets as connections")
        self.fresh: list[Connection] = []
        for session, session_facts, link_facts in zip(
            self.sessions, core["sessions"], facts["links"], strict=False
        ):
            if (link_facts is None) != (type(session_facts) is int):
                raise ValueError("a connection was copied in part")
            if link_facts is not None:
                self.fresh.append(self._connection(session, link_facts, pieces))
        self.fresh += map(ahead.take_unconfigured, unconfigured_sessions)
        self._pending_connections = [
            (self._pending_connection(pending_facts, pieces), pending_facts["welcomed"])
            for pending_facts in facts["knocks"]
        ]
        self._lingering = [
            (self._socket(lingering_facts), lingering_facts["left_s"])
            for lingering_facts in facts["farewells"]
        ]
        # An older version has no channels.
        self._channels = (
            RestoredChannels(
                server,
                facts["channels"],
                pieces,
                self._socket,
                lambda end: server.keyring.find(end["client"], end["key"]),
            )
            if "channels" in facts
            else None
        )
        if len(pieces):
            raise ValueError(f"{len(pieces)} bytes are left that belong to no connection")
        server.pending_handshakes.failures.remember(facts["failures"], self._now)
        server.keyring.take_uses(facts["keys"])
        # An older version does not send its counters.
        server.counters.go_on_from(facts.get("tally", {}))

    def _socket(self, facts: Facts) -> socket.socket:
        return _opened(facts, next(self._descriptors))

    def _restore_listening(self, facts: Facts) -> Listening:
        place = Address(*facts["configured"])
        former = ListenConfig(
            place, facts["mode"], facts["group"], allow_md5=False, source=_NOWHERE
        )
        inode = None if facts["inode"] is None else (facts["inode"][0], facts["inode"][1])
        return Listening(
            former, self._socket(facts), Address(*facts["address"]), inode, facts["first_group"]
        )

    def _connection(self, session: Session, facts: Facts, pieces: Pieces) -> Connection:
        sock = (
            self._ahead.take_socket(session.number) if facts.get("passed") else self._socket(facts)
        )
        connection = _link_of(self._server, session, sock, facts)
        pending_input, large_frame = bytes(pieces.take(facts["tail"])), None
        if facts["parcel"] is not None:
            filled, size = facts["parcel"]
            large_frame = LargeFrame(pieces.take(filled), size)
        connection.restore(pending_input, large_frame, waits=facts["waits"])
        return connection

    def _pending_connection(self, facts: Facts, pieces: Pieces) -> PendingConnection:
        nonce = bytes(pieces.take(facts["nonce"]))
        deadline = self._now + facts["left_s"]
        pending = PendingConnection(
            self._socket(facts),
            "",
            facts["listener"],
            allow_md5=facts["allow_md5"],
            deadline=deadline,
            nonce=nonce,
        )
        pending.peer, pending.origin = facts["peer"], facts["origin"]
        pending.heard += pieces.take(facts["heard"])
        pending.spoken = facts["spoken"]
        return pending

    def begin(self) -> None:
        """Continue serving; from here on only this process uses the sockets."""
        server = self._server
        unwanted = {
            listening.config.address for listening, entry in self._listening if entry is None
        }
        for listening, entry in self._listening:
            if entry is not None:
                self._alter(listening, entry)
        server.start([listening for listening, _ in self._listening])
        server.start(self._opened)
        server.context.connections.established.update(self._ahead.connections.values(), self.fresh)
        for connection in self.fresh:
            connection.go_on()
        self._unwatched = iter(list(server.connections))
        server.loop.call_soon(self._watch_batch)
        for sock, left_s in self._lingering:
            server.context.connections.linger(sock, left_s)
        for pending, welcomed in self._pending_connections:
            if welcomed is not None:
                pending.credential = server.keyring.find(*welcomed)
            if welcomed is not None and pending.credential is None:
                pending.sock.close()
                note_refusal(
                    server.context,
                    pending,
                    "key removed from the configuration",
                    HandshakeOutcome.REJECTED,
                )
            else:
                server.pending_handshakes.take_over(pending)
        server.stop_listening_at(unwanted)
        if self._channels is not None:
            self._channels.begin()
        unauthorized = {**self._ahead.unauthorized_connections, **dict(server.reasons(self.fresh))}
        for connection, reason in unauthorized.items():
            server.broker.replies.close(connection.session, reason, code=ErrorCode.KEY_REMOVED)
        payload = json.dumps({"version": server.broker.status.version})
        server.broker.events.announce("$broker.upgraded", payload)
        server.settle()

    def _watch_batch(self) -> None:
        """Check the liveness of some connections from now on, and of the rest in later
        turns.
        """
        batch = list(islice(self._unwatched, _WATCHED))
        for connection in batch:
            if not connection.closed:
                self._server.context.liveness.add(connection, inherited=True)
        if batch:
            self._server.loop.call_soon(self._watch_batch)

    def _alter(self, listening: Listening, entry: ListenConfig) -> None:
        """Apply the settings of the new configuration; connections continue even if
        that fails.
        """
        try:
            listening.alter(entry)
        except ListenError as error:
            log = listener_logger(self._server.log, listening.address)
            log.warning("listener.unchanged", reason=str(error))
            listening.config = entry
