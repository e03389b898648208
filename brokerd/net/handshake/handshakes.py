"""The door: unfinished handshakes, each with a deadline, bounded in number, none in another's way.

A connection waits here until it has proved who it is. Searching for the key behind an answer without a
name can take a thousand tries, so searches run in slices, one a turn of the event loop, the search with the
fewest tries first: whoever used its key lately is let in at once, however many strangers are
knocking. Source: docs/protocol.md, "Handshake".
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
from brokerd.net.connection.connection import has_hung_up
from brokerd.net.counters import Outcome
from brokerd.net.handshake.admission import Admission, Rank
from brokerd.net.handshake.keyring import Identity, Search, key_on
from brokerd.net.handshake.penalties import Failures
from brokerd.net.handshake.pending import Knock
from brokerd.net.handshake.tls import SPEAKS_TLS, Channel, TlsHandshakes, challenge_nonce, is_client_hello
from brokerd_client.errors import AuthenticationError, FrameError, TlsError
from brokerd_client.wire.framing import frame
from brokerd_client.wire.handshake import FAILURE, LIMIT, Proof, Receive, Send, as_listener

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.server import Server

__all__ = ["TAKEN", "Door", "fresh_instance"]

#: Why a client is refused behind its handshake, and not in it: see Server.admit.
TAKEN: Final = "its name is connected already"

_NOT_HERE: Final = "its key is bound to a TLS channel, and there is none here: something in between takes TLS off"

_GIVES_WAY: Final = (
    "more unfinished handshakes than limits.handshakes; its origin had the most, and this was the least advanced"
)


class Door:
    """All unfinished handshakes of a server, oldest first."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop: asyncio.AbstractEventLoop = server.loop
        self._knocks: OrderedDict[Knock, None] = OrderedDict()
        self._searches: list[tuple[int, int, Knock, Search]] = []
        self._order = itertools.count()
        self._searching = False
        self._timer: asyncio.TimerHandle | None = None
        #: Who has failed lately.
        self.failures = Failures()
        self._tls = TlsHandshakes(server.loop, self._on_channel, self._on_no_channel)
        self._admission = Admission()
        #: Called when a place has become free.
        self.on_room: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._knocks)

    def knock(
        self, sock: socket.socket, peer: object, listener: str, *, allow_md5: bool, tls: TlsConfig | None = None
    ) -> None:
        """Begin the handshake with a connection just accepted; where there is no room, another gives way."""
        limits = self._server.limits
        if len(self._knocks) >= limits.handshakes:
            self._make_room()
        deadline = self._loop.time() + limits.handshake_timeout
        knock = Knock(sock, peer, listener, allow_md5=allow_md5, deadline=deadline, tls=tls)
        self._add(knock)
        if tls is not None:
            self._tls.begin(knock)
        else:
            self._loop.add_reader(knock.fd, self._on_readable, knock)
            self._go_on(knock, None)

    def seconds_to_room(self) -> float:
        """Return in how many seconds one more connection may be accepted, 0 for at once."""
        if len(self._knocks) < self._server.limits.handshakes:
            return 0.0
        return self._admission.least(self._loop.time())[1]

    def _make_room(self) -> None:
        least, _ = self._admission.least(self._loop.time())
        assert least is not None, "a room of no places is full of nothing"
        self._refuse(least, _GIVES_WAY, Outcome.REFUSED)

    def _add(self, knock: Knock) -> None:
        self._knocks[knock] = None
        self._admission.add(knock, self._loop.time())
        self._watch()

    def _advance(self, knock: Knock, rank: Rank) -> None:
        if not knock.done:
            self._admission.advance(knock, rank, self._loop.time())

    def _on_channel(self, knock: Knock, channel: Channel) -> None:
        """TLS is ready: begin the handshake that is about keys."""
        knock.channel = channel
        self._advance(knock, Rank.SILENT)
        knock.steps = as_listener(challenge_nonce(channel), allow_md5=True, named=True)
        self._loop.add_reader(knock.fd, self._on_readable, knock)
        self._go_on(knock, None)
        self._read_on(knock)

    def _on_no_channel(self, knock: Knock, reason: str) -> None:
        assert knock.stream is not None
        if knock.stream.engine.heard:
            self._refuse(knock, reason, Outcome.REJECTED)
        else:
            self._lose(knock, ConnectionResetError(0, reason))

    def _read_on(self, knock: Knock) -> None:
        """Look again soon, where TLS has decrypted more than was read: the system knows nothing of it."""
        if knock.stream is not None and knock.stream.buffered and not knock.done:
            self._loop.call_soon(self._on_readable, knock)

    # Another process's handshakes

    def knocks(self) -> list[Knock]:
        """Return the unfinished handshakes, oldest first."""
        return list(self._knocks)

    def take_over(self, knock: Knock) -> None:
        """Go on with a handshake that another process began: from the start, but nothing is said twice."""
        knock.muted = knock.spoken
        self._add(knock)
        self._loop.add_reader(knock.fd, self._on_readable, knock)
        knock.silent = not knock.heard
        knock.reader.feed(knock.heard)
        self._go_on(knock, None)

    def close(self) -> None:
        """Turn everybody away."""
        for knock in list(self._knocks):
            self._refuse(knock, "the broker stops", Outcome.REFUSED)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # The conversation

    def _on_readable(self, knock: Knock) -> None:
        if knock.done or knock.slowed or (knock.proof is not None and knock.reader.buffered > 2 * LIMIT):
            return
        try:
            # Never more than the handshake can need at once; what lies behind it belongs to the session.
            data = knock.sock.recv(2 * LIMIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(knock, error)
            return
        if not data:
            self._lose(knock, ConnectionResetError(0, "closed by the peer before it had proved who it is"))
            return
        if is_client_hello(data) and knock.stream is None and not knock.reader.buffered:
            self._refuse(knock, SPEAKS_TLS, Outcome.MALFORMED, tell=True)
            return
        knock.silent = False
        knock.heard += data
        knock.reader.feed(data)
        if has_hung_up(knock.fd):
            # The event loop may tell nobody of the end that comes behind this: see watch.py.
            self._loop.call_soon(self._on_readable, knock)
        self._read_on(knock)
        if knock.proof is None:
            self._pull(knock)
        elif knock.reader.buffered > 2 * LIMIT:
            # It talks on while its answer is being judged; the rest can wait in the system's buffer.
            self._loop.remove_reader(knock.fd)

    def _pull(self, knock: Knock) -> None:
        try:
            body = knock.reader.next_frame(LIMIT)
        except FrameError as error:
            self._refuse(knock, f"not a handshake: {error}", Outcome.MALFORMED, tell=True)
            return
        if body is not None:
            self._go_on(knock, body)

    def _go_on(self, knock: Knock, result: bytes | None) -> None:
        """Resume the handshake with what it asked for, and do what it wants next."""
        try:
            while True:
                step = knock.steps.send(result)
                result = None
                if isinstance(step, Send):
                    if knock.muted:
                        knock.muted -= 1
                        continue
                    if step.body == FAILURE and self._delay(knock):
                        return
                    self._send(knock, step.body)
                elif isinstance(step, Receive):
                    body = knock.reader.next_frame(LIMIT)
                    if body is None:
                        return
                    result = body
                elif knock.muted:
                    # It has been welcomed already, with this key.
                    assert knock.credential is not None
                    result = knock.credential.key.value
                    self._advance(knock, Rank.PROVED)
                else:
                    knock.proof = step
                    self._advance(knock, Rank.JUDGED)
                    self._search(knock, step)
                    return
        except StopIteration:
            self._admit(knock)
        except AuthenticationError as error:
            self._refuse(knock, knock.refusal or str(error), knock.outcome, failed=True)
        except FrameError as error:
            self._refuse(knock, f"not a handshake: {error}", Outcome.MALFORMED, tell=True)
        except OSError as error:
            self._lose(knock, error)

    def _send(self, knock: Knock, body: bytes) -> None:
        data = frame(body)
        if knock.sock.send(data) != len(data):
            raise OSError("the peer does not take even a handshake's bytes")
        knock.spoken += 1

    # Whose key it is

    def _search(self, knock: Knock, proof: Proof) -> None:
        if proof.binding:
            if proof.binding not in knock.channel.bindings:
                knock.refusal = _NOT_HERE
                knock.proof = None
                self._go_on(knock, None)
                return
            knock.channel = replace(knock.channel, bound=proof.binding)
        search = Search(
            self._server.keyring,
            proof,
            allow_md5=knock.allow_md5,
            uid=knock.uid,
            now=datetime.now(UTC),
            channel=knock.channel,
        )
        if not self._try(knock, search):
            heapq.heappush(self._searches, (search.tried, next(self._order), knock, search))
            if not self._searching:
                self._searching = True
                self._loop.call_soon(self._search_on)

    def _search_on(self) -> None:
        """Give one slice to the search that has had the fewest."""
        self._searching = False
        while self._searches:
            _, _, knock, search = heapq.heappop(self._searches)
            if not knock.done:
                if not self._try(knock, search):
                    heapq.heappush(self._searches, (search.tried, next(self._order), knock, search))
                break
        if self._searches:
            self._searching = True
            self._loop.call_soon(self._search_on)

    def _try(self, knock: Knock, search: Search) -> bool:
        """Run one slice; return whether the search is over, its result given to the handshake."""
        identity = search.step()
        if identity is None:
            return False
        self._identified(knock, identity)
        return True

    def _identified(self, knock: Knock, identity: Identity) -> None:
        """Give the handshake the key that was found, if there is one and room for its client."""
        if knock.done:
            return
        knock.refusal = identity.refusal
        if identity.credential is not None:
            knock.credential = identity.credential
        key = None
        if identity.accepted is not None:
            refusal = self._server.room_for(identity.accepted.client.name)
            if refusal is None:
                self._loop.call_soon(self._identified, knock, identity)
                return
            # A client whose name is connected is told so behind the handshake: its key is right.
            knock.refusal = "" if refusal == TAKEN else refusal
            if knock.refusal:
                knock.outcome = Outcome.REFUSED
            key = None if knock.refusal else key_on(knock.channel, identity.accepted.key.value)
            if key is not None:
                self._advance(knock, Rank.PROVED)
        self._loop.add_reader(knock.fd, self._on_readable, knock)
        knock.proof = None
        self._go_on(knock, key)
        self._read_on(knock)

    # The end of it

    def _admit(self, knock: Knock) -> None:
        assert knock.credential is not None, "a handshake ends well only with a key that was found"
        self.failures.forgive(knock.origin)
        self._admission.got_in(knock.origin, self._loop.time())
        self._forget(knock, got_in=True)
        self._server.admit(knock)

    def _refuse(self, knock: Knock, reason: str, outcome: Outcome, *, failed: bool = False, tell: bool = False) -> None:
        """Turn a peer away. failed: it answered wrong, and was told. tell: it is told now that this is its failure.

        One that is only unlucky (too many at the door, the broker stops) is told nothing that it could take
        for a wrong key.
        """
        if knock.done:
            return
        if failed:
            self.failures.count(knock.origin, self._loop.time())
        if tell:
            with contextlib.suppress(OSError):
                self._send(knock, FAILURE)
        self._forget(knock)
        knock.sock.close()
        self._server.on_refused(knock, reason, outcome)

    def _lose(self, knock: Knock, error: OSError) -> None:
        """Let go of a peer that is gone: it is refused only if it had begun to answer.

        A health check and a balancer's probe say nothing and leave: a line for each would bury the others.
        """
        if knock.silent and not knock.done and isinstance(error, ConnectionError) and not isinstance(error, TlsError):
            self._forget(knock)
            knock.sock.close()
            self._server.tally.handshakes[Outcome.LEFT] += 1
            self._server.floods.note("debug", "client.left", knock.origin, peer=knock.peer, listener=knock.listener)
        else:
            self._refuse(knock, error.strerror or str(error) or type(error).__name__, Outcome.LOST)

    def _forget(self, knock: Knock, *, got_in: bool = False) -> None:
        knock.done = True
        if not got_in and len(self._knocks) >= self._server.limits.handshakes:
            # It kept a place from a newcomer, whether it had to give way or left by itself.
            self._admission.gave_way(knock.origin, self._loop.time())
        if self._knocks.pop(knock, knock) is None:
            self._admission.remove(knock)
        self.on_room()
        if knock.tls is None:
            self._loop.remove_reader(knock.fd)
        else:
            self._tls.leave(knock)
        knock.steps.close()

    def _delay(self, knock: Knock) -> bool:
        """Return whether the failure is told later, because its origin has failed often."""
        now = self._loop.time()
        delay = self.failures.delay(knock.origin, now)
        if not delay:
            return False
        knock.slowed = True
        self._advance(knock, Rank.FAILED)
        self._loop.remove_reader(knock.fd)
        delay = min(delay, max(knock.deadline - now, 0))
        self._loop.call_later(delay, self._fail_now, knock)
        return True

    def _fail_now(self, knock: Knock) -> None:
        if not knock.done:
            with contextlib.suppress(OSError):
                self._send(knock, FAILURE)
            self._go_on(knock, None)

    # Deadlines

    def _watch(self) -> None:
        """Keep one timer, for the oldest: all have the same time, so it is the first to run out."""
        if self._timer is None and self._knocks:
            self._timer = self._loop.call_at(next(iter(self._knocks)).deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._knocks and (oldest := next(iter(self._knocks))).deadline <= now:
            why = self._tls.overdue(oldest)
            self._refuse(oldest, why or "not finished within limits.handshake_timeout", Outcome.TIMEOUT, tell=not why)
        self._watch()


def fresh_instance() -> str:
    """Return a name for a pool's new connection: ``[0-9a-z]{1,16}``, not given before in practice."""
    return os.urandom(6).hex()
