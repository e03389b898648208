"""Pending handshakes: each has a deadline, their number is limited, and none delays
another.

A connection is pending until it has proved its identity. The search for the key behind
an answer without a name can take a thousand tries. So searches run in slices, one per
turn of the event loop. The search with the fewest tries runs first. So a client that
used its key lately is accepted at once, even during a flood of unknown peers.

The frames for the peers are sent at the end of each turn. To send wakes a program, and to
wake it takes longer than the send itself. A program with many connections then works on
all frames of a turn, and sleeps once. Source: docs/protocol.md, "Handshake".
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from brokerd.config.values import TlsConfig
from brokerd.net.bound_loggers import handshake_logger
from brokerd.net.connection.connection import has_hung_up, was_reset
from brokerd.net.counters import HandshakeOutcome
from brokerd.net.handshake.admission import Admission, Rank
from brokerd.net.handshake.keyring import Identity, KeySearch, key_on
from brokerd.net.handshake.penalties import Failures
from brokerd.net.handshake.pending import PendingConnection
from brokerd.net.handshake.refusals import note_refusal
from brokerd.net.handshake.room import Room
from brokerd.net.handshake.tls import (
    SPEAKS_TLS,
    TlsHandshakes,
    TlsPeer,
    challenge_nonce,
    is_client_hello,
)
from brokerd_client.errors import AuthenticationError, FrameError, TlsError
from brokerd_client.wire.first_frames import without_channel
from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.handshake import FAILURE, LIMIT, Proof, Receive, Send, as_listener

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.context import Context

__all__ = ["PendingHandshakes", "fresh_instance"]

#: Most characters of an instance.
_INSTANCE: Final = 16
_NOT_HERE: Final = (
    "key is bound to a TLS channel, but this connection has none: a proxy in between terminates TLS"
)

# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_JUDGED: Final = Rank.JUDGED
_PROVED: Final = Rank.PROVED
_ENDING: Final = Room.ENDING
_FULL: Final = Room.FULL

_GIVES_WAY: Final = (
    "limits.handshakes reached; of all origins this one had the most pending handshakes, and this"
    " handshake was the least advanced of them"
)


class PendingHandshakes:
    """All pending handshakes of a server, oldest first.

    room_for: returns whether there is room for one more connection of a client.
    on_authenticated: called with a connection that has proved its identity; it replaces
        or removes the reader of the connection.
    on_room: called when a place has become free.
    """

    def __init__(
        self,
        context: Context,
        *,
        room_for: Callable[[str], Room],
        on_authenticated: Callable[[PendingConnection], None],
    ) -> None:
        self._context = context
        self._room_for = room_for
        self._on_authenticated = on_authenticated
        self._loop: asyncio.AbstractEventLoop = context.loop
        self._pending_connections: OrderedDict[PendingConnection, None] = OrderedDict()
        self._searches: list[tuple[int, int, PendingConnection, KeySearch]] = []
        self._order = itertools.count()
        self._searching = False
        #: The peers with frames to send at the end of this turn.
        self._to_send: list[PendingConnection] = []
        self._timer: asyncio.TimerHandle | None = None
        #: The recent failures of each origin.
        self.failures = Failures()
        self._tls = TlsHandshakes(context.loop, self._on_tls_peer, self._on_tls_failed)
        self._admission = Admission()
        self.on_room: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._pending_connections)

    def begin(
        self,
        sock: socket.socket,
        peer: object,
        listener: str,
        *,
        allow_md5: bool,
        tls: TlsConfig | None = None,
    ) -> None:
        """Begin the handshake of an accepted connection; another gives way if the room
        is full.
        """
        limits = self._context.limits
        if len(self._pending_connections) >= limits.handshakes:
            self._make_room()
        deadline = self._loop.time() + limits.handshake_timeout
        pending = PendingConnection(
            sock, peer, listener, allow_md5=allow_md5, deadline=deadline, tls=tls
        )
        self._add(pending)
        if tls is not None:
            self._tls.begin(pending)
        else:
            self._loop.add_reader(pending.fd, self._on_readable, pending)
            self._go_on(pending, None)

    def seconds_to_room(self) -> float:
        """Return the seconds until one more connection may be accepted; 0 means now."""
        if len(self._pending_connections) < self._context.limits.handshakes:
            return 0.0
        return self._admission.least(self._loop.time())[1]

    def _make_room(self) -> None:
        least, _ = self._admission.least(self._loop.time())
        assert least is not None, "limits.handshakes is at least 1"
        self._refuse(least, _GIVES_WAY, HandshakeOutcome.REFUSED)

    def _add(self, pending: PendingConnection) -> None:
        self._pending_connections[pending] = None
        self._admission.add(pending, self._loop.time())
        self._schedule_expiry()

    def _advance(self, pending: PendingConnection, rank: Rank) -> None:
        if not pending.done:
            self._admission.advance(pending, rank, self._loop.time())

    def _on_tls_peer(self, pending: PendingConnection, tls_peer: TlsPeer) -> None:
        """Begin the key handshake, because the TLS handshake is complete."""
        pending.tls_peer = tls_peer
        self._advance(pending, Rank.SILENT)
        pending.steps = as_listener(challenge_nonce(tls_peer), allow_md5=True, named=True)
        self._loop.add_reader(pending.fd, self._on_readable, pending)
        self._go_on(pending, None)
        self._read_on(pending)

    def _on_tls_failed(self, pending: PendingConnection, reason: str) -> None:
        assert pending.tls_stream is not None
        if pending.tls_stream.engine.heard:
            self._refuse(pending, reason, HandshakeOutcome.REJECTED)
        else:
            self._lose(pending, ConnectionResetError(0, reason))

    def _read_on(self, pending: PendingConnection) -> None:
        """Schedule a read if TLS holds decrypted bytes, which the system does not
        report.
        """
        if pending.tls_stream is not None and pending.tls_stream.buffered and not pending.done:
            self._loop.call_soon(self._on_readable, pending)

    # Handshakes of another process

    def pending_connections(self) -> list[PendingConnection]:
        """Return the pending connections, oldest first; all their frames are sent."""
        self._send_all()
        return list(self._pending_connections)

    def take_over(self, pending: PendingConnection) -> None:
        """Continue a handshake that another process began.

        It is replayed from the start, but no frame is sent twice.
        """
        pending.muted = pending.spoken
        self._add(pending)
        self._loop.add_reader(pending.fd, self._on_readable, pending)
        pending.silent = not pending.heard
        pending.reader.feed(pending.heard)
        self._go_on(pending, None)

    def close(self) -> None:
        """Refuse all pending connections."""
        for pending in list(self._pending_connections):
            self._refuse(pending, "the broker is stopping", HandshakeOutcome.REFUSED)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # The conversation

    def _on_readable(self, pending: PendingConnection) -> None:
        if (
            pending.done
            or pending.slowed
            or (pending.proof is not None and pending.reader.buffered > 2 * LIMIT)
        ):
            return
        try:
            # At most as many bytes as a handshake can need at once; later bytes belong
            # to the session.
            data = pending.stream.recv(2 * LIMIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(pending, error)
            return
        if not data:
            self._lose(
                pending,
                ConnectionResetError(0, "connection closed by the peer before it proved a key"),
            )
            return
        if is_client_hello(data) and pending.tls_stream is None and not pending.reader.buffered:
            self._refuse(pending, SPEAKS_TLS, HandshakeOutcome.MALFORMED, tell=True)
            return
        pending.silent = False
        pending.heard += data
        pending.reader.feed(data)
        spoken = pending.spoken
        if pending.tls_stream is not None:
            self._read_on(pending)
        if pending.proof is None:
            self._pull(pending)
        elif pending.reader.buffered > 2 * LIMIT:
            # The peer sends on while its answer is checked; the rest can wait in the
            # system's buffer.
            self._loop.remove_reader(pending.fd)
        if pending.spoken == spoken and not pending.done and has_hung_up(pending.fd):
            # The event loop may not report the end behind these bytes: see
            # reset_recheck.py. To send something would have failed.
            self._loop.call_soon(self._on_readable, pending)

    def _pull(self, pending: PendingConnection) -> None:
        try:
            body = pending.reader.next_frame(LIMIT)
        except FrameError as error:
            self._refuse(
                pending, f"not a handshake: {error}", HandshakeOutcome.MALFORMED, tell=True
            )
            return
        if body is not None:
            self._go_on(pending, body)

    def _go_on(self, pending: PendingConnection, result: bytes | None) -> None:
        """Resume the handshake with the input it asked for, and carry out its next
        step.
        """
        try:
            while True:
                step = pending.steps.send(result)
                result = None
                if isinstance(step, Send):
                    if pending.muted:
                        pending.muted -= 1
                        continue
                    if step.body != FAILURE:
                        self._send_later(pending, step.body)
                    elif self._delay(pending):
                        return
                    else:
                        self._send(pending, FAILURE)
                elif isinstance(step, Receive):
                    body = pending.reader.next_frame(LIMIT)
                    if body is None:
                        return
                    result = body
                else:
                    name, pending.is_channel = without_channel(step.name)
                    # A valid name is ASCII: the escapes show every byte that only looks
                    # like it.
                    pending.claimed = name.decode("ascii", "backslashreplace")
                    if not pending.muted:
                        pending.proof = step if name == step.name else replace(step, name=name)
                        self._advance(pending, _JUDGED)
                        self._search(pending, pending.proof)
                        return
                    # The other process has welcomed the peer already, with this key.
                    assert pending.credential is not None
                    result = pending.credential.key.value
                    self._advance(pending, _PROVED)
        except StopIteration:
            self._admit(pending)
        except AuthenticationError as error:
            self._refuse(pending, pending.refusal or str(error), pending.outcome, failed=True)
        except FrameError as error:
            self._refuse(
                pending, f"not a handshake: {error}", HandshakeOutcome.MALFORMED, tell=True
            )
        except OSError as error:
            self._lose(pending, error)

    def _send_later(self, pending: PendingConnection, body: bytes) -> None:
        """Send a frame at the end of this turn of the event loop."""
        if not pending.unsent:
            if not self._to_send:
                self._loop.call_soon(self._send_all)
            self._to_send.append(pending)
        pending.unsent += LENGTH.pack(len(body)) + body
        pending.spoken += 1

    def _send_all(self) -> None:
        """Send the frames of this turn."""
        to_send, self._to_send = self._to_send, []
        for pending in to_send:
            try:
                self._send_unsent(pending)
            except OSError as error:
                self._lose(pending, error)

    def _send(self, pending: PendingConnection, body: bytes) -> None:
        """Send a frame at once, behind those of this turn. Raises OSError."""
        pending.unsent += LENGTH.pack(len(body)) + body
        pending.spoken += 1
        self._send_unsent(pending)

    def _send_unsent(self, pending: PendingConnection) -> None:
        """Send a peer's frames of this turn, if any. Raises OSError."""
        data, pending.unsent = pending.unsent, b""
        if data and pending.stream.send(data) != len(data):
            raise OSError("peer does not read the bytes of the handshake")

    # Finding the key

    def _search(self, pending: PendingConnection, proof: Proof) -> None:
        if proof.binding:
            if proof.binding not in pending.tls_peer.bindings:
                pending.refusal = _NOT_HERE
                pending.proof = None
                self._go_on(pending, None)
                return
            pending.tls_peer = replace(pending.tls_peer, bound=proof.binding)
        pending.keyring = self._context.keyring
        search = KeySearch(
            pending.keyring,
            proof,
            allow_md5=pending.allow_md5,
            uid=pending.uid,
            now=datetime.now(UTC),
            tls_peer=pending.tls_peer,
        )
        if not self._try(pending, search):
            heapq.heappush(self._searches, (search.tried, next(self._order), pending, search))
            if not self._searching:
                self._searching = True
                self._loop.call_soon(self._search_on)

    def _search_on(self) -> None:
        """Run one slice of the search that has had the fewest tries."""
        self._searching = False
        while self._searches:
            _, _, pending, search = heapq.heappop(self._searches)
            if not pending.done:
                if not self._try(pending, search):
                    heapq.heappush(
                        self._searches, (search.tried, next(self._order), pending, search)
                    )
                break
        if self._searches:
            self._searching = True
            self._loop.call_soon(self._search_on)

    def _try(self, pending: PendingConnection, search: KeySearch) -> bool:
        """Run one slice; return whether the search is over and its result is used."""
        identity = search.step()
        if identity is None:
            return False
        self._identified(pending, identity)
        return True

    def _identified(self, pending: PendingConnection, identity: Identity) -> None:
        """Pass the key to the handshake, if it was found and there is room for its
        client.
        """
        if pending.done:
            return
        pending.refusal = identity.refusal
        if identity.credential is not None:
            pending.credential = identity.credential
        key, accepted = None, identity.accepted
        if accepted is not None:
            room = self._room_for(accepted.client.name)
            if room is _ENDING:
                self._loop.call_soon(self._identified, pending, identity)
                return
            # A client whose name is connected, or that comes during a drain, is told so
            # after the handshake: its key is right. Channels have a limit of their own.
            if room is _FULL and not pending.is_channel:
                pending.refusal = room.value
                pending.outcome = HandshakeOutcome.REFUSED
            else:
                key = key_on(pending.tls_peer, accepted.key.value)
                self._advance(pending, _PROVED)
        if pending.reader.buffered > 2 * LIMIT:
            # Reading has stopped meanwhile.
            self._loop.add_reader(pending.fd, self._on_readable, pending)
        pending.proof = None
        self._go_on(pending, key)
        if pending.tls_stream is not None:
            self._read_on(pending)

    # The end of a handshake

    def _admit(self, pending: PendingConnection) -> None:
        assert pending.credential is not None, (
            "a handshake ends well only with a key that was found"
        )
        if pending.unsent:
            # A peer may send its part without waiting for the broker's.
            try:
                self._send_unsent(pending)
            except OSError as error:
                self._lose(pending, error)
                return
        self.failures.forgive(pending.origin)
        self._admission.got_in(pending.origin, self._loop.time())
        self._forget(pending, got_in=True)
        self._on_authenticated(pending)

    def _refuse(
        self,
        pending: PendingConnection,
        reason: str,
        outcome: HandshakeOutcome,
        *,
        failed: bool = False,
        tell: bool = False,
    ) -> None:
        """Refuse a peer and close its connection.

        failed: the peer gave a wrong answer, and was told.
        tell: send the peer a failure now.

        A peer that gave no wrong answer is told nothing that looks like a wrong key.
        Examples are too many pending handshakes, or a broker that stops.
        """
        if pending.done:
            return
        if failed:
            self.failures.count(pending.origin, self._loop.time())
        if tell:
            with contextlib.suppress(OSError):
                self._send(pending, FAILURE)
        self._forget(pending)
        pending.sock.close()
        note_refusal(self._context, pending, reason, outcome)

    def _lose(self, pending: PendingConnection, error: OSError) -> None:
        """Forget a peer that has disconnected; it counts as refused only if it had
        begun to answer.

        Health checks and load balancers' probes connect and leave without a byte. A log
        line for each would bury the important ones.
        """
        if (
            pending.silent
            and not pending.done
            and isinstance(error, ConnectionError)
            and not isinstance(error, TlsError)
        ):
            self._forget(pending)
            pending.sock.close()
            self._context.counters.handshakes[HandshakeOutcome.LEFT] += 1
            log = handshake_logger(self._context.log, pending)
            self._context.log_limiter.note("debug", "client.left", pending.origin, log=log)
        else:
            self._refuse(
                pending, error.strerror or str(error) or type(error).__name__, HandshakeOutcome.LOST
            )

    def _forget(self, pending: PendingConnection, *, got_in: bool = False) -> None:
        pending.done = True
        if pending.unsent:
            with contextlib.suppress(OSError):
                self._send_unsent(pending)
        if not got_in and len(self._pending_connections) >= self._context.limits.handshakes:
            # The peer kept a place from a new connection, whether it had to give way or
            # left by itself.
            self._admission.gave_way(pending.origin, self._loop.time())
        if self._pending_connections.pop(pending, pending) is None:
            self._admission.remove(pending)
        self.on_room()
        if pending.tls is not None:
            self._tls.leave(pending)
        elif not got_in or was_reset(pending.fd):
            # Else the reader is replaced, which takes fewer system calls. But uvloop no
            # longer watches a socket that was reset, until a removed reader is added again.
            self._loop.remove_reader(pending.fd)
        pending.steps.close()

    def _delay(self, pending: PendingConnection) -> bool:
        """Return whether the failure is sent later, because its origin has failed
        often.
        """
        now = self._loop.time()
        delay = self.failures.delay(pending.origin, now)
        if not delay:
            return False
        pending.slowed = True
        self._advance(pending, Rank.FAILED)
        self._loop.remove_reader(pending.fd)
        delay = min(delay, max(pending.deadline - now, 0))
        self._loop.call_later(delay, self._fail_now, pending)
        return True

    def _fail_now(self, pending: PendingConnection) -> None:
        if not pending.done:
            with contextlib.suppress(OSError):
                self._send(pending, FAILURE)
            self._go_on(pending, None)

    # Deadlines

    def _schedule_expiry(self) -> None:
        """Set one timer, for the oldest handshake: all have the same time, so it
        expires first.
        """
        if self._timer is None and self._pending_connections:
            self._timer = self._loop.call_at(
                next(iter(self._pending_connections)).deadline, self._expire
            )

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while (
            self._pending_connections
            and (oldest := next(iter(self._pending_connections))).deadline <= now
        ):
            reason = self._tls.overdue(oldest)
            self._refuse(
                oldest,
                reason or "handshake not finished within limits.handshake_timeout",
                HandshakeOutcome.TIMEOUT,
                tell=not reason,
            )
        self._schedule_expiry()


def fresh_instance(suffix: str = "") -> str:
    """Return an instance for a new connection: ``[0-9a-z]{1,16}``, new in practice.

    suffix: how it ends; in a cluster, this names the host.
    """
    return os.urandom(6).hex()[: _INSTANCE - len(suffix)] + suffix
