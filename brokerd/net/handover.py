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
from brokerd.net.bound_loggers import listener_logger
from brokerd.net.connection.connection import GRACE, Connection
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.graceful_close import Parting
from brokerd.net.handshake.keyring import Credential
from brokerd.net.handshake.pending import PendingConnection
from brokerd.net.handshake.refusals import note_refusal
from brokerd.net.listen.listener import ListenError, Listening
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
    "position_of",
]

_LOOK_AGAIN_S: Final = 0.02
#: Takes the place of a key that is not configured any more; no keyring holds it.
_GONE: Final = Key(b"", source="a key that is no longer configured")
_NOWHERE: Final = Source("", 0)
#: Connections copied in one block, and connections started in one turn of the event
#: loop: some milliseconds' work.
_COPIED: Final = 50
_BEGUN: Final = 100


# Capture


class Passing:
    """Copies idle connections and passes their sockets, while the broker serves them.

    copier: copies the state that the broker holds.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.copier = Copier(server.broker)
        #: Connections whose sockets the other process has, with the numbers of their
        #: sessions.
        self.passed: dict[Connection, int] = {}
        self._uses: dict[tuple[str, bytes], float] = {}

    def blocks(self) -> Iterator[tuple[Facts, list[int]]]:
        """Yield blocks of facts and duplicated descriptors; the caller closes the
        descriptors.

        Everything may change between two blocks.
        """
        if gone := [number for connection, number in self.passed.items() if connection.closed]:
            self.passed = {
                connection: number
                for connection, number in self.passed.items()
                if not connection.closed
            }
            yield {"gone": gone}, []
        connections = iter(_ordered(self._server))
        while some := list(islice(connections, _COPIED)):
            idle: list[Facts] = []
            descriptors: list[int] = []
            # If descriptors run out, the remaining connections go with the final
            # capture.
            with contextlib.suppress(OSError):
                for connection in some:
                    self._copy(connection, idle, descriptors)
            if idle:
                yield {"idle": idle}, descriptors
        yield {"keys": self.uses()}, []

    def _copy(self, connection: Connection, idle: list[Facts], descriptors: list[int]) -> None:
        if connection.closed or not _is_idle(connection):
            return
        server, passed = self._server, connection in self.passed
        # First, because it may fail: nothing is recorded yet.
        descriptor = None if passed else os.dup(connection.sock.fileno())
        facts = snapshot.capture_idle(
            server.broker, connection.session, server.loop.time(), self.copier
        )
        if facts is None:
            if descriptor is not None:
                os.close(descriptor)
            return
        idle.append({**facts, "link": _connection(connection, Snapshot(), passed=passed)})
        if descriptor is not None:
            descriptors.append(descriptor)
            self.passed[connection] = connection.session.number
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


def capture(server: Server, passing: Passing | None = None) -> tuple[Snapshot, list[int]]:
    """Return the state of a server, and the descriptors of its sockets in the same
    order.

    passing: state that it has copied and passed is left out.

    All decisions of the core have to be carried out first: call ``settle`` before.
    Remaining connections that can't be handed over are closed: see ``let_go_of_bound``.
    """
    for connection in [
        connection for connection in server.connections if not connection.can_hand_over
    ]:
        connection.lost("it came while the broker was being replaced, and can't be handed over")
    connections = _ordered(server)
    passing = passing or Passing(server)
    for connection in connections:
        if not _is_idle(connection):
            passing.copier.forget_idle(connection.session)
    taken = snapshot.capture(
        server.broker,
        [connection.session for connection in connections],
        server.loop.time(),
        passing.copier,
    )
    copied, passed = taken.copied, passing.passed
    lingering = server.context.connections.lingering
    pending_connections = [
        pending
        for pending in server.pending_handshakes.pending_connections()
        if pending.can_hand_over
    ]
    taken.facts = {
        "core": taken.facts,
        "listening": [_listening(each) for each in server.listening],
        "links": [
            None
            if connection.session in copied
            else _connection(connection, taken, passed=connection in passed)
            for connection in connections
        ],
        "knocks": [_pending_connection(pending, server, taken) for pending in pending_connections],
        "farewells": [
            {"socket": _socket(each.sock), "left_s": each.time_left_s} for each in lingering
        ],
        "failures": server.pending_handshakes.failures.ages(server.loop.time()),
        "keys": passing.uses(),
        "tally": server.counters.values(),
    }
    fresh = [connection for connection in connections if connection not in passed]
    sockets = [
        each.sock
        for group in (server.listening, fresh, pending_connections, lingering)
        for each in group
    ]
    return taken, [sock.fileno() for sock in sockets]


def position_of(server: Server, session: Session) -> int:
    """Return the position of this session's connection among the captured ones."""
    return [connection.session for connection in _ordered(server)].index(session)


async def let_go_of_bound(server: Server, why: str) -> None:
    """Close the connections that no other process can continue; return when they are
    closed.

    No such connection is accepted from now on: see ``Server.accept_bound``.
    """
    server.hold_back_bound()
    parting = Parting(server.context, lambda connection: not connection.can_hand_over, why)
    deadline = server.loop.time() + GRACE
    while parting.connections() and server.loop.time() < deadline:  # noqa: ASYNC110 - a look is more than waiting
        await asyncio.sleep(await parting.look(deadline))
    await parting.end(deadline + GRACE)
    server.settle()
    while parting.connections():  # noqa: ASYNC110 - rare
        # Each client has GRACE seconds to read its remaining bytes.
        await asyncio.sleep(_LOOK_AGAIN_S)


def _ordered(server: Server) -> list[Connection]:
    """Return the connections in the order they came, in which a pool's connections are
    kept.
    """
    return sorted(server.connections, key=lambda connection: connection.session.number)


def _socket(sock: socket.socket) -> list[int]:
    return [int(sock.family), int(sock.type), sock.proto]


def describe(address: Address) -> list[Any]:
    """Return an address as plain values, for ``Address(*values)``."""
    return [address.family, address.host, address.port, address.path, address.tls]


def _listening(each: Listening) -> Facts:
    assert isinstance(each.sock, socket.socket), (
        "there are no named pipes where processes hand over sockets"
    )
    return {
        "socket": _socket(each.sock),
        "configured": describe(each.config.address),
        "address": describe(each.address),
        "inode": each.inode,
        "mode": each.config.mode,
        "group": each.config.group,
        "first_group": each.first_group,
    }


def _connection(connection: Connection, taken: Snapshot, *, passed: bool) -> Facts:
    large_frame = connection.large_frame
    taken.pieces.append(connection.pending_input)
    if large_frame is not None:
        taken.pieces.append(memoryview(large_frame)[SLACK : large_frame.filled])
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


def _pending_connection(pending: PendingConnection, server: Server, taken: Snapshot) -> Facts:
    taken.pieces += [pending.nonce, pending.heard]
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
        self._sockets: dict[int, socket.socket] = {}
        self._connections: dict[int, Connection] = {}
        #: The reasons for closing some of those connections.
        self.unauthorized_connections: dict[Connection, str] = {}

    def add(self, facts: Facts, body: memoryview, descriptors: Sequence[int]) -> None:
        """Restore one block. Raises BadSnapshot, and the errors that RestoredState
        raises.
        """
        if "idle" in facts:
            rest = iter(descriptors)
            for each in facts["idle"]:
                self._add_idle(each, rest)
            if any(True for _ in rest):
                raise ValueError("a block has descriptors that belong to no connection")
        elif "gone" in facts:
            for number in facts["gone"]:
                self._connections.pop(number, None)
                if (sock := self._sockets.pop(number, None)) is not None:
                    sock.close()
        elif "keys" in facts:
            self._server.keyring.take_uses(facts["keys"])
        else:
            self.copies.add(facts, body, self._server.loop.time())

    def _add_idle(self, facts: Facts, descriptors: Iterator[int]) -> None:
        server, told = self._server, facts["link"]
        session = snapshot.restore_idle(server.broker, facts, server.loop.time(), self.copies)
        number = facts["session"]["number"]
        if not told["passed"]:
            self._sockets[number] = _opened(told, next(descriptors, -1))
        if session is not None:
            connection = self._connections[number] = _link_of(
                server, session, self._sockets[number], told
            )
            self.unauthorized_connections.update(server.reasons([connection]))

    def take_link(self, session: Session) -> Connection:
        """Return the connection of a session that was copied and has not changed."""
        number = session.number
        sock, connection = self._sockets.pop(number), self._connections.pop(number, None)
        if connection is None or connection.session is not session:
            # This process's configuration does not know the name of its client.
            connection = Connection(
                self._server.context, sock, Credential(session.client.config, _GONE)
            )
            connection.session, session.connection = session, connection
            self.unauthorized_connections.update(self._server.reasons([connection]))
        return connection

    def take_socket(self, number: int) -> socket.socket:
        """Return the socket that was passed for the session of that number."""
        self._connections.pop(number, None)
        return self._sockets.pop(number)

    def close_rest(self) -> None:
        """Close the remaining sockets, of connections that have ended meanwhile."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        self._connections.clear()
        self.unauthorized_connections.clear()


def _opened(facts: Facts, descriptor: int) -> socket.socket:
    family, type, proto = facts["socket"]
    sock = socket.socket(family, type, proto, fileno=descriptor)
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

    opened: listening sockets that the other process did not have.
    descriptors: every descriptor, in order; they belong to this object from now on.
    ahead: the connections that were copied and passed before.
    sessions: the open sessions, in the order in which they were captured.

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
        self._rest = iter(descriptors)
        self._now = server.loop.time()
        wanted = {entry.address: entry for entry in listen}
        #: Each listening socket with its entry of the new configuration, or None if it
        #: has none.
        self._listening = [
            (each, wanted.get(each.config.address))
            for each in map(self._waker_out, facts["listening"])
        ]
        self.sessions = snapshot.restore(
            server.broker, facts["core"], pieces, self._now, ahead.copies
        )
        if len(self.sessions) != len(facts["links"]):
            raise ValueError("there are not as many sockets as connections")
        #: Connections that were passed while idle, and all other connections.
        self._idle: list[Connection] = []
        self._fresh: list[Connection] = []
        for session, told, each in zip(
            self.sessions, facts["core"]["sessions"], facts["links"], strict=False
        ):
            if (each is None) != (type(told) is int):
                raise ValueError("a connection was copied in part")
            if each is None:
                self._idle.append(ahead.take_link(session))
            else:
                self._fresh.append(self._connection(session, each, pieces))
        self.connections = [*self._idle, *self._fresh]
        self._pending_connections = [
            (self._pending_connection(each, pieces), each["welcomed"]) for each in facts["knocks"]
        ]
        self._lingering = [(self._socket(each), each["left_s"]) for each in facts["farewells"]]
        if len(pieces):
            raise ValueError(f"{len(pieces)} bytes are left that belong to nobody")
        server.pending_handshakes.failures.remember(facts["failures"], self._now)
        server.keyring.take_uses(facts["keys"])
        # An older version does not send its counters.
        server.counters.go_on_from(facts.get("tally", {}))

    def _socket(self, facts: Facts) -> socket.socket:
        return _opened(facts, next(self._rest))

    def _waker_out(self, facts: Facts) -> Listening:
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
        unwanted = {each.config.address for each, entry in self._listening if entry is None}
        for listening, entry in self._listening:
            if entry is not None:
                self._alter(listening, entry)
        server.start([each for each, _ in self._listening])
        server.start(self._opened)
        server.context.connections.established.update(self.connections)
        for connection in self._fresh:
            self._begin_with(connection)
        self._waiting = iter(self._idle)
        server.loop.call_soon(self._begin_with_some)
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
                    "the key it uses was removed from the configuration",
                    HandshakeOutcome.REJECTED,
                )
            else:
                server.pending_handshakes.take_over(pending)
        server.stop_listening_at(unwanted)
        unauthorized_connections = self._ahead.unauthorized_connections
        for connection in self._idle:
            if connection in unauthorized_connections:
                server.broker.replies.close(
                    connection.session,
                    unauthorized_connections[connection],
                    code=ErrorCode.KEY_REMOVED,
                )
        for connection, why in server.reasons(self._fresh):
            server.broker.replies.close(connection.session, why, code=ErrorCode.KEY_REMOVED)
        self._ahead.close_rest()
        payload = json.dumps({"version": server.broker.status.version})
        server.broker.events.announce("$broker.upgraded", payload)
        server.settle()

    def _begin_with(self, connection: Connection) -> None:
        self._server.context.liveness.add(connection, inherited=True)
        connection.go_on()

    def _begin_with_some(self) -> None:
        """Start some of the idle connections, and the rest in later turns."""
        some = list(islice(self._waiting, _BEGUN))
        for connection in some:
            if not connection.closed:
                self._begin_with(connection)
        if some:
            self._server.loop.call_soon(self._begin_with_some)

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
