"""One established connection: bytes from its socket to the routing loop, bytes of its outbox to its socket.

The socket is read and written here and not by an asyncio transport, so that the outbox is the only
place where bytes wait: what the system did not take is known to the byte, and goes back to its
senders when the connection ends.
"""

from __future__ import annotations

import contextlib
import select
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from brokerd.core import routing
from brokerd.core.goaway import add_reason, mute
from brokerd.core.large_frame import SLACK, LargeFrame
from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd.log.logger import in_words
from brokerd.net.connection.unread import UnreadCounter
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd_client._common.pipe_bridge import BridgedSocket
from brokerd_client.errors import BadLength
from brokerd_client.wire.envelope import ErrorCode
from brokerd_client.wire.framing import frame_span

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.broker import Broker
    from brokerd.core.session import Session
    from brokerd.net.handshake.keyring import Credential
    from brokerd.net.server import Server

#: What routes the frames of a buffer: see routing.feed.
_Feed: TypeAlias = "Callable[[Broker, Session, memoryview, int, int, float], tuple[int, RoutingResult]]"

__all__ = ["GRACE", "READ_BUFFER", "Connection", "has_hung_up", "tune"]

#: Size of the one read buffer that all connections share, in bytes.
READ_BUFFER: Final = 256 * 1024
#: A frame longer than this is collected in a buffer of its own, and passed on in it.
_LARGE: Final = READ_BUFFER // 2
#: More than a frame's length, header, name and topic can have.
_ENVELOPE: Final = 1024
#: A read of so many bytes suggests that more are waiting; where it goes to so many recipients, up to so many
#: more rounds are read before any of them is written to.
_PLENTY: Final = 64 * 1024
_MANY: Final = 32
# The plain loop takes so long for one read that a second would only delay the first.
_ROUNDS: Final = 7 if routing.NAME == "compiled" else 0
#: Where events go to more subscribers than that, so many bytes are copied for them in one turn: some milliseconds.
_WIDE: Final = 64
_COPIED: Final = 32 * 1024 * 1024
#: Seconds a connection that is to be closed has to take what is written for it.
GRACE: Final = 5.0
#: Reads in a row for one connection, when it can't wait for its turn.
_READS: Final = 16
#: Sends several pieces with one call; Windows has no such call.
_sendmsg = getattr(socket.socket, "sendmsg", None)
_HUNG_UP: Final = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)


class Connection:
    """One established connection.

    credential: the key it proved to know.
    tail: bytes read and not yet routed, a partial frame or what a held sender has sent.
    parcel: a long frame being collected, or waiting to be routed while its sender is held.
    waits: others have their turn before what is in ``pending_input`` is routed.
    channel: what the handshake said of the way it came.
    passed: another process has its descriptor too, as it may take over.
    ending: why the broker has begun to end it, or "".
    can_hand_over: another process could go on with the socket and with what is kept here.
    """

    can_hand_over: ClassVar[bool] = True

    __slots__ = (
        "closed",
        "credential",
        "ending",
        "fd",
        "grace",
        "large_frame",
        "passed",
        "pending_input",
        "server",
        "session",
        "sock",
        "tls_peer",
        "waits",
        "writing",
    )

    def __init__(self, server: Server, sock: socket.socket, credential: Credential, tls_peer: TlsPeer = NO_TLS) -> None:
        self.server = server
        self.sock = sock
        self.credential = credential
        self.tls_peer = tls_peer
        self.fd = sock.fileno()
        self.session: Session
        self.pending_input = b""
        self.large_frame: LargeFrame | None = None
        self.waits = False
        self.writing = False
        self.grace: asyncio.TimerHandle | None = None
        self.closed = False
        self.ending = ""
        self.passed = False

    def open(self, session: Session, early: bytes) -> None:
        """Begin: early are bytes that came in behind the handshake."""
        self.session = session
        self.pending_input = early
        self.server.loop.add_reader(self.fd, self.on_readable)
        if early:
            self.resume()

    def go_on(self) -> None:
        """Begin where another process's link stopped; session, tail, parcel and waits are as they were there."""
        session = self.session
        if session.outbox.blocked:
            self.writing = True
            self.server.loop.add_writer(self.fd, self.on_writable)
        if session.closing:
            self.close_soon()
        elif self.waits:
            self.server.loop.call_soon(self._take_turn)
        elif session.held_by is None:
            self.server.loop.add_reader(self.fd, self.on_readable)
        if session.outbox.waiting or session.closing:
            self.server.broker.touch(session)

    # Reading

    def on_readable(self) -> None:
        """Read and route what came: once, or while it goes to so many that a write for each would cost more."""
        if self.session.closing:
            # It is to be closed in a later turn; nothing more is read.
            self.server.loop.remove_reader(self.fd)
            return
        self.server.reset_recheck.note(self)
        try:
            rounds = _ROUNDS
            while self._read() >= _PLENTY and rounds and self._spreads_out():
                rounds -= 1
            self.server.settle()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are to go on
            self._broken(error)

    def _spreads_out(self) -> bool:
        """Return whether what was read goes to many, each of whom would get little with one write."""
        touched = self.server.broker.touched
        return len(touched) >= _MANY and self.may_read()

    def may_read(self) -> bool:
        """Return whether it may be read from now: it is not over, not held, and it is not the others' turn."""
        return not (self.closed or self.waits or self.session.closing or self.session.held_by is not None)

    def _read(self) -> int:
        """Read once and route what came; return how many bytes that was. The caller settles."""
        view = self.server.buffer
        large_frame = self.large_frame
        kept = 0
        try:
            if large_frame is not None:
                with large_frame.space(READ_BUFFER) as space:
                    size = self.sock.recv_into(space)
            elif self.pending_input:
                kept = len(self.pending_input)
                view[:kept] = self.pending_input
                size = self.sock.recv_into(view[kept:])
            else:
                size = self.sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
            return 0
        if not size:
            self.lost(self.ending or "closed by the client")
            return 0
        if large_frame is None:
            self.pending_input = b""
            self._route(view, kept + size)
        else:
            large_frame.filled += size
            if large_frame.is_whole:
                self._route_large_frame(large_frame)
        return size

    def resume(self) -> None:
        """Route what was kept while the sender was held, and read on."""
        if self.closed or self.session.closing:
            return
        kept, self.pending_input = self.pending_input, b""
        self.server.loop.add_reader(self.fd, self.on_readable)
        if kept:
            self._route(memoryview(kept), len(kept))
            self.server.settle()
        elif self.large_frame is not None and self.large_frame.is_whole:
            self._route_large_frame(self.large_frame)
            self.server.settle()

    def _route_large_frame(self, large_frame: LargeFrame) -> None:
        """Route a long frame; the loop would copy it, so it goes to the broker at once."""
        self.large_frame = None
        self._route(memoryview(large_frame), large_frame.end, SLACK, handle_slow_path)

    def _route(self, view: memoryview, end: int, start: int = 0, feed: _Feed | None = None) -> None:
        """Route what lies there. feed: who does, the routing loop unless given."""
        server, session = self.server, self.session
        feed = feed or routing.feed
        now = server.loop.time()
        server.broker.turn_budget = server.turn_budget
        stop = self._end_of_turn(view, start, end) if session.widest > _WIDE else end
        position, result = feed(server.broker, session, view, start, stop, now)
        while result is RoutingResult.FLUSH:
            server.write_touched()
            if self.closed or session.closing:
                result = RoutingResult.CLOSE
                break
            position, result = feed(server.broker, session, view, position, stop, now)
        if result is RoutingResult.CONSUMED and stop < end:
            result = RoutingResult.YIELD
        if self.closed:
            pass
        elif result is RoutingResult.CLOSE:
            server.loop.remove_reader(self.fd)
        else:
            self._keep(view, position, end)
            if result is RoutingResult.BLOCKED:
                server.loop.remove_reader(self.fd)
            elif result is RoutingResult.YIELD:
                server.loop.remove_reader(self.fd)
                self.waits = True
                server.loop.call_soon(self._take_turn)

    def _end_of_turn(self, view: memoryview, start: int, end: int) -> int:
        """Return up to where events may be routed in one turn: each is copied for very many subscribers."""
        stop = start + _COPIED // self.session.widest
        if stop >= end:
            return end
        try:
            span = frame_span(view, start, end)
        except BadLength:
            # The routing loop judges it.
            return end
        # One frame at least, or all that is there of it.
        return end if span is None else min(end, max(stop, sum(span)))

    def _take_turn(self) -> None:
        """Route on: the others have had their turn."""
        if not self.waits:
            return
        self.waits = False
        try:
            self.resume()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are to go on
            self._broken(error)

    def _keep(self, view: memoryview, position: int, end: int) -> None:
        """Keep the bytes of a frame that has not arrived whole, or of those not routed yet."""
        if position == end:
            return
        if isinstance(view.obj, LargeFrame):
            self.large_frame = view.obj
            return
        try:
            span = frame_span(view, position, end)
        except BadLength:
            # Kept behind a held frame; the routing loop judges it when it gets there.
            span = None
        if span is not None and self.session.held_by is None:
            wanted = sum(span) - position
            # It is there but for its turn.
            there = wanted <= end - position
            # One that is longer than any message is not collected: it is passed over as soon as its header is there.
            if not there and _LARGE < wanted <= self.server.broker.limits.max_message + _ENVELOPE:
                self.large_frame = LargeFrame(view[position:end], wanted)
                return
        self.pending_input = bytes(view[position:end])

    # Writing

    def write(self) -> None:
        """Offer the outbox to the system; where it does not take all, wait until it takes more."""
        session = self.session
        outbox = session.outbox
        try:
            if outbox.timed:
                self.server.broker.expire(session, self.server.loop.time())
            while pieces := outbox.pieces():
                size = self.sock.send(pieces[0]) if len(pieces) == 1 or not _sendmsg else _sendmsg(self.sock, pieces)
                if outbox.sent(size):
                    break
                if outbox.timed:
                    self.server.broker.expire(session, self.server.loop.time())
            if outbox.timed and outbox.waiting:
                # More has expired than is answered for in one turn.
                raise BlockingIOError
        except (BlockingIOError, InterruptedError):
            self._wait_to_write()
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
        else:
            # As _all_written, without the call: this is done for every message.
            outbox.blocked = False
            if self.writing:
                self.writing = False
                self.server.loop.remove_writer(self.fd)
            if session.closing:
                self.lost(session.closing, written=True)

    def _wait_to_write(self) -> None:
        self.session.outbox.blocked = True
        if not self.writing:
            self.writing = True
            self.server.loop.add_writer(self.fd, self.on_writable)
        if self.session.closing:
            self.close_soon()

    def _all_written(self) -> None:
        self.session.outbox.blocked = False
        if self.writing:
            self.writing = False
            self.server.loop.remove_writer(self.fd)
        if self.session.closing:
            self.lost(self.session.closing, written=True)

    def on_writable(self) -> None:
        """Write on; whoever waited for room in this outbox may send again."""
        try:
            self.write()
            if not self.closed:
                self.server.broker.drained(self.session, self.server.loop.time())
            self.server.settle()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are to go on
            self._broken(error)

    # The end

    def _broken(self, error: Exception) -> None:
        """Give this connection up over a bug of ours, loudly; left alone it would be tried again without end."""
        self.server.counters.bugs += 1
        name, address, trace = self.session.client.name, self.session.address, traceback.format_exception(error)
        about, what = type(error).__name__, in_words(error)
        self.server.log_limiter.note("error", "daemon.bug", about, name=name, address=address, error=what, trace=trace)
        self.lost("a bug in the broker")

    def close_soon(self) -> None:
        """Read nothing more, and give the client a last chance to take what is written for it."""
        self.server.loop.remove_reader(self.fd)
        if self.grace is None and not self.server.broker.draining:
            self.grace = self.server.loop.call_later(GRACE, self.lost, self.session.closing)

    def lost(self, why: str, *, written: bool = False) -> None:
        """End the connection and have the core answer for what was still to be done.

        written: everything was, and is to arrive; else the socket is closed as it is.
        """
        if self.closed:
            return
        self.closed = True
        if self.grace is not None:
            self.grace.cancel()
        self.server.loop.remove_reader(self.fd)
        self.server.loop.remove_writer(self.fd)
        self.pending_input, self.large_frame = b"", None
        if written:
            self.server.close_gracefully(self.sock)
        else:
            if self.passed:
                # To close this descriptor ends nothing while there is another.
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()
        self.server.on_lost(self, why)

    @property
    def progress(self) -> tuple[int, int, int, int]:
        """What changes with every byte that is read."""
        large_frame = self.large_frame
        return (
            self.session.bytes_in,
            len(self.pending_input),
            0 if large_frame is None else large_frame.filled,
            self.session.bytes_to_skip,
        )

    def end(self, code: ErrorCode, why: str) -> None:
        """End the connection at once. Its client is told why, if the system takes that now."""
        self.server.broker.close(self.session, why, code=code)
        self.add_reason()
        self.write()
        self.lost(why)

    def add_reason(self) -> None:
        """Put the reason of the end behind what waits to be written, once."""
        session = self.session
        if session.closing_code is not None:
            add_reason(session, session.closing_code, session.closing)
            session.closing_code = None

    def half_close(self, why: str) -> None:
        """Tell the client why and that nothing more comes, and read on. Its outbox is written.

        Where the system does not take the reason at once, the connection stays as it is: call this again.
        """
        if not self.ending:
            self.ending = why
            add_reason(self.session, ErrorCode.SHUTTING_DOWN, why)
            self.write()
        if self.closed or self.session.outbox.waiting:
            return
        mute(self.server.broker, self.session)
        self._end_writing()

    def _end_writing(self) -> None:
        if not isinstance(self.sock, BridgedSocket):
            # A pipe has no half that could stay open.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def unread_messages(self, most: int) -> int:
        """Read what the client has sent and nothing routes any more; return how many messages that were.

        most: bytes to read.
        """
        if self.closed:
            return 0
        counter, buffer, large_frame = UnreadCounter(self.session.bytes_to_skip), self.server.buffer, self.large_frame
        counter.feed(self.pending_input if large_frame is None else memoryview(large_frame)[SLACK : large_frame.filled])
        self.pending_input, self.large_frame = b"", None
        with contextlib.suppress(OSError):
            while most > 0 and (size := self.sock.recv_into(buffer)):
                counter.feed(buffer[:size])
                most -= size
        return counter.count

    def catch_up(self) -> None:
        """Route what has arrived, without waiting for the event loop to say that something has."""
        for _ in range(_READS):
            # When others have their turn, this is no way to come before them.
            if self.waits or not self.advance():
                break
            self.server.settle()

    def advance(self) -> bool:
        """Route what waits for its turn, or else what has arrived; return whether there was anything."""
        if self.waits:
            self._take_turn()
            return True
        return self.may_read() and self._read() > 0

    def is_gone(self) -> bool | None:
        """Return whether the client has closed, without waiting for the event loop to say so.

        What it sent before that is routed first, unless it was not to be read from any more. None: it has closed, and
        that takes more turns of the event loop.
        """
        self.catch_up()
        if not self.closed and has_hung_up(self.sock):
            while not self.waits and self.advance():
                self.server.settle()
            if self.waits:
                return None
            self.lost("closed by the client")
        return self.closed


def has_hung_up(sock: socket.socket | int) -> bool:
    """Return whether the other end has closed, though bytes may be unread."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0))
    return any(event & _HUNG_UP for _, event in poll.poll(0))


def tune(sock: socket.socket) -> None:
    """Set the options of a connection's socket: not blocking, and on TCP no delay. Raises OSError."""
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
