"""One established connection: moves bytes between its socket, the routing loop and its
outbox.

The socket is read and written here, not by an asyncio transport. So bytes wait only in
the outbox. The broker knows to the byte what the system did not take. When the
connection ends, those messages go back to their senders.
"""

from __future__ import annotations

import contextlib
import select
import socket
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from brokerd.core import routing
from brokerd.core.goaway import add_reason
from brokerd.core.large_frame import SLACK, LargeFrame
from brokerd.core.routing_result import RoutingResult
from brokerd.core.slow_path import handle_slow_path
from brokerd.log.logger import in_words
from brokerd.net.bound_loggers import session_logger
from brokerd.net.byte_stream import ByteStream
from brokerd.net.connection.state import NEXT, Event, State
from brokerd.net.connection.unread import UnreadCounter
from brokerd.net.context import READ_BUFFER
from brokerd.net.handshake.tls import NO_TLS, TlsPeer
from brokerd_client._common.pipe_bridge import BridgedSocket
from brokerd_client.errors import BadLength
from brokerd_client.wire.envelope import ErrorCode
from brokerd_client.wire.framing import frame_span

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.broker import Broker
    from brokerd.core.session import Session
    from brokerd.net.context import Context
    from brokerd.net.handshake.keyring import Credential

#: Routes the frames of a buffer: see routing.feed.
_Feed: TypeAlias = (
    "Callable[[Broker, Session, memoryview, int, int, float], tuple[int, RoutingResult]]"
)

__all__ = ["GRACE", "Connection", "has_hung_up", "tune"]

#: Longest frame, in bytes, that goes through the shared read buffer. A longer frame
#: gets a buffer of its own, in which it is passed on.
_LARGE: Final = READ_BUFFER // 2
#: Bytes: more than a frame's length, header, name and topic can have.
_ENVELOPE: Final = 1024
#: A read of at least _PLENTY bytes suggests that more are waiting. If it goes to at
#: least _MANY recipients, up to _ROUNDS more reads follow before the next write.
_PLENTY: Final = 64 * 1024
_MANY: Final = 32
# The Python routing loop needs so long for one read that a second read would only delay
# the first.
_ROUNDS: Final = 7 if routing.NAME == "compiled" else 0
#: If events go to more than _WIDE subscribers, at most _COPIED bytes are copied for
#: them in one turn: some milliseconds.
_WIDE: Final = 64
_COPIED: Final = 32 * 1024 * 1024
#: Seconds that a client has to read its remaining bytes before its connection is
#: closed.
GRACE: Final = 5.0
#: Most reads in a row for one connection, when the read can't wait for its turn.
_READS: Final = 16
#: Sends several pieces with one system call; Windows has no such call.
_sendmsg = getattr(socket.socket, "sendmsg", None)
#: States in which no input may be read, whatever the session's own state.
_UNREADABLE: Final = (State.WAITING, State.CLOSING, State.CLOSED)
_HUNG_UP: Final = (
    getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)
)


class Connection:
    """One established connection.

    sock: the socket.
    stream: the bytes to read and write: of the socket, or of TLS over it.
    credential: the key that the client proved to know.
    pending_input: bytes read and not yet routed: a partial frame, or the input of a
        held sender.
    large_frame: a large frame being collected, or waiting to be routed while its sender
        is held.
    state: whether input is read and routed; see the table in ``state``.
    writing: output waits until the system takes more. The socket is watched for that,
        in every state but CLOSED.
    grace: the timer that closes a connection in the state CLOSING.
    tls_peer: the facts that the TLS handshake proved about the peer.
    passed: a new process has a copy of the descriptor too, because it may take over.
    ending: why the broker has begun to end the connection, or "". Until its client
        closes too, input is read as before.
    can_hand_over: another process could continue with the socket and with the state
        kept here.
    """

    can_hand_over: ClassVar[bool] = True

    __slots__ = (
        "context",
        "credential",
        "ending",
        "fd",
        "grace",
        "large_frame",
        "passed",
        "pending_input",
        "session",
        "sock",
        "state",
        "stream",
        "tls_peer",
        "writing",
    )

    def __init__(
        self,
        context: Context,
        sock: socket.socket,
        credential: Credential,
        tls_peer: TlsPeer = NO_TLS,
        stream: ByteStream | None = None,
    ) -> None:
        self.context = context
        self.sock = sock
        self.stream: ByteStream = sock if stream is None else stream
        self.credential = credential
        self.tls_peer = tls_peer
        self.fd = sock.fileno()
        self.session: Session
        self.pending_input = b""
        self.large_frame: LargeFrame | None = None
        self.state = State.NEW
        self.writing = False
        self.grace: asyncio.TimerHandle | None = None
        self.ending = ""
        self.passed = False

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self.state is State.CLOSED

    @property
    def waits(self) -> bool:
        """Whether other connections have their turn before ``pending_input`` is routed."""
        return self.state is State.WAITING

    def _change(self, event: Event) -> None:
        follows = NEXT[self.state].get(event)
        assert follows is not None, f"{event.name} can't happen in {self.state.name}"
        self.state = follows

    def open(self, session: Session, early: bytes) -> None:
        """Start reading. ``early`` holds bytes that arrived right behind the handshake."""
        self.session = session
        self.pending_input = early
        self._read_on_events()
        if early:
            self.resume()

    def _read_on_events(self) -> None:
        self._change(Event.READ)
        self.context.loop.add_reader(self.fd, self.on_readable)

    def restore(self, pending_input: bytes, large_frame: LargeFrame | None, *, waits: bool) -> None:
        """Restore the input that another process has read and not routed."""
        self.pending_input, self.large_frame = pending_input, large_frame
        if waits:
            self._change(Event.YIELD)

    def go_on(self) -> None:
        """Continue a connection of another process; its session and pending input are
        restored.
        """
        session = self.session
        if session.outbox.blocked:
            self.writing = True
            self.context.loop.add_writer(self.fd, self.on_writable)
        if session.closing:
            self.close_soon()
        elif self.waits:
            self.context.loop.call_soon(self._take_turn)
        elif session.held_by is None:
            self._read_on_events()
        else:
            self._change(Event.HOLD)
        if session.outbox.waiting or session.closing:
            self.context.broker.replies.touch(session)

    # Reading

    def on_readable(self) -> None:
        """Read and route once, or several times while a large read goes to many
        recipients.

        With many recipients, writing to each after every read would cost more than
        reading on.
        """
        if self.session.closing:
            # The connection closes in a later turn; nothing more is read.
            self._stop_reading(Event.CLOSE)
            return
        self.context.reset_recheck.note(self)
        try:
            rounds = _ROUNDS
            while self._read() >= _PLENTY and rounds and self._spreads_out():
                rounds -= 1
            self.context.settlement.settle()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)

    def _spreads_out(self) -> bool:
        """Return whether the last read goes to many recipients, each with little to
        write.
        """
        touched = self.context.broker.touched
        return len(touched) >= _MANY and self.may_read()

    def may_read(self) -> bool:
        """Return whether the connection may be read now.

        It may not if it is closed, held, or waits for its turn.
        """
        session = self.session
        return not (self.state in _UNREADABLE or session.closing or session.held_by is not None)

    def _read(self) -> int:
        """Read once and route the bytes; return their number. The caller settles."""
        view = self.context.buffer
        large_frame = self.large_frame
        kept = 0
        try:
            if large_frame is not None:
                with large_frame.space(READ_BUFFER) as space:
                    size = self.stream.recv_into(space)
            elif self.pending_input:
                kept = len(self.pending_input)
                view[:kept] = self.pending_input
                size = self.stream.recv_into(view[kept:])
            else:
                size = self.stream.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
            return 0
        if not size:
            self.lost(self.ending or "connection closed by the client")
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
        """Route the input that was kept while the sender was held, and continue
        reading.
        """
        if self.closed:
            return
        if self.session.closing:
            self._stop_reading(Event.CLOSE)
            return
        kept, self.pending_input = self.pending_input, b""
        self._read_on_events()
        if kept:
            self._route(memoryview(kept), len(kept))
            self.context.settlement.settle()
        elif self.large_frame is not None and self.large_frame.is_whole:
            self._route_large_frame(self.large_frame)
            self.context.settlement.settle()

    def _route_large_frame(self, large_frame: LargeFrame) -> None:
        """Route a large frame on the slow path at once, because the routing loop would
        copy it.
        """
        self.large_frame = None
        self._route(memoryview(large_frame), large_frame.end, SLACK, handle_slow_path)

    def _route(self, view: memoryview, end: int, start: int = 0, feed: _Feed | None = None) -> None:
        """Route the frames in ``view`` with ``feed``, by default the routing loop."""
        context, session = self.context, self.session
        if context.broker.status.changes is not None:
            context.broker.status.changes.note(session)
        feed = feed or routing.feed
        now = context.loop.time()
        context.broker.turn.budget = context.turn_budget
        stop = self._end_of_turn(view, start, end) if session.widest > _WIDE else end
        position, result = feed(context.broker, session, view, start, stop, now)
        while result is RoutingResult.FLUSH:
            context.settlement.write_touched()
            if self.closed or session.closing:
                result = RoutingResult.CLOSE
                break
            position, result = feed(context.broker, session, view, position, stop, now)
        if result is RoutingResult.CONSUMED and stop < end:
            result = RoutingResult.YIELD
        if self.state is State.CLOSED:
            pass
        elif result is RoutingResult.CLOSE:
            self._stop_reading(Event.CLOSE)
        else:
            self._keep(view, position, end)
            if result is RoutingResult.BLOCKED:
                self._stop_reading(Event.HOLD)
            elif result is RoutingResult.YIELD:
                self._stop_reading(Event.YIELD)
                context.loop.call_soon(self._take_turn)

    def _stop_reading(self, event: Event) -> None:
        self._change(event)
        self.context.loop.remove_reader(self.fd)

    def _end_of_turn(self, view: memoryview, start: int, end: int) -> int:
        """Return the position up to which events may be routed in one turn.

        Each event is copied for very many subscribers.
        """
        stop = start + _COPIED // self.session.widest
        if stop >= end:
            return end
        try:
            span = frame_span(view, start, end)
        except BadLength:
            # The routing loop handles the invalid length.
            return end
        # At least one frame, or as much of it as has arrived.
        return end if span is None else min(end, max(stop, sum(span)))

    def _take_turn(self) -> None:
        """Route the pending input: the other connections have had their turn."""
        if not self.waits:
            return
        try:
            self.resume()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)

    def _keep(self, view: memoryview, position: int, end: int) -> None:
        """Keep the bytes of an incomplete frame, or of frames that are not routed yet."""
        if position == end:
            return
        if isinstance(view.obj, LargeFrame):
            self.large_frame = view.obj
            return
        try:
            span = frame_span(view, position, end)
        except BadLength:
            # It lies behind a held frame; the routing loop handles the invalid length
            # when it gets there.
            span = None
        if span is not None and self.session.held_by is None:
            size = sum(span) - position
            # The frame is complete and only waits for its turn.
            is_whole = size <= end - position
            # A frame longer than any message is not collected: it is skipped as soon as
            # its header has arrived.
            if (
                not is_whole
                and _LARGE < size <= self.context.broker.status.limits.max_message + _ENVELOPE
            ):
                self.large_frame = LargeFrame(view[position:end], size)
                return
        self.pending_input = bytes(view[position:end])

    # Writing

    def write(self) -> None:
        """Write the outbox to the socket; if the system does not take all, wait to
        write.
        """
        session = self.session
        outbox = session.outbox
        try:
            if outbox.timed:
                self.context.broker.expire(session, self.context.loop.time())
            while pieces := outbox.pieces():
                size = (
                    self.stream.send(pieces[0])
                    if len(pieces) == 1 or not _sendmsg
                    else _sendmsg(self.sock, pieces)
                )
                if outbox.sent(size):
                    break
                if outbox.timed:
                    self.context.broker.expire(session, self.context.loop.time())
            if outbox.timed and outbox.waiting:
                # More messages have expired than are reported to their senders in one
                # turn.
                raise BlockingIOError
        except (BlockingIOError, InterruptedError):
            self._wait_to_write()
        except OSError as error:
            self.lost(error.strerror or type(error).__name__)
        else:
            # The same as _all_written, inlined: this runs for every message.
            outbox.blocked = False
            if self.writing:
                self.writing = False
                self.context.loop.remove_writer(self.fd)
            if session.closing:
                self.lost(session.closing, written=True)

    def _wait_to_write(self) -> None:
        self.session.outbox.blocked = True
        if not self.writing:
            self.writing = True
            self.context.loop.add_writer(self.fd, self.on_writable)
        if self.session.closing:
            self.close_soon()

    def _all_written(self) -> None:
        self.session.outbox.blocked = False
        if self.writing:
            self.writing = False
            self.context.loop.remove_writer(self.fd)
        if self.session.closing:
            self.lost(self.session.closing, written=True)

    def on_writable(self) -> None:
        """Continue writing; senders that waited for room in this outbox may send again."""
        try:
            self.write()
            if not self.closed:
                self.context.broker.held.release_if_room(self.session, self.context.loop.time())
            self.context.settlement.settle()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)

    # The end

    def _broken(self, error: Exception) -> None:
        """Close the connection and log the bug; kept open, it would fail again without
        end.
        """
        self.context.counters.bugs += 1
        self.context.log_limiter.note(
            "error",
            "daemon.bug",
            type(error).__name__,
            log=session_logger(self.context.log, self.session),
            error=in_words(error),
            trace=traceback.format_exception(error),
        )
        self.lost("a bug in the broker")

    def close_soon(self) -> None:
        """Stop reading, and give the client GRACE seconds to read what is written for
        it.
        """
        self._stop_reading(Event.CLOSE)
        if self.grace is None and not self.context.broker.status.draining:
            self.grace = self.context.loop.call_later(GRACE, self.lost, self.session.closing)

    def lost(self, reason: str, *, written: bool = False) -> None:
        """Close the connection, and make the core report its undelivered messages.

        written: all output was written and shall arrive; otherwise the socket is closed
        at once.
        """
        if self.closed:
            return
        self._stop_reading(Event.LOSE)
        self.context.loop.remove_writer(self.fd)
        if self.grace is not None:
            self.grace.cancel()
        self.pending_input, self.large_frame = b"", None
        if written:
            self.context.connections.close_gracefully(self.sock)
        else:
            if self.passed:
                # Closing this descriptor does not end the connection while another
                # process has a copy.
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()
        self.context.connections.on_lost(self, reason)

    @property
    def progress(self) -> tuple[int, int, int, int]:
        """Values that change with every byte that is read."""
        large_frame = self.large_frame
        return (
            self.session.bytes_in,
            len(self.pending_input),
            0 if large_frame is None else large_frame.filled,
            self.session.bytes_to_skip,
        )

    def end(self, code: ErrorCode, reason: str) -> None:
        """Close the connection at once; the client gets the reason if the system takes
        it now.
        """
        self.context.broker.replies.close(self.session, reason, code=code)
        self.add_reason()
        self.write()
        self.lost(reason)

    def add_reason(self) -> None:
        """Append the reason of the close to the outbox, once."""
        session = self.session
        if session.closing_code is not None:
            add_reason(session, session.closing_code, session.closing)
            session.closing_code = None

    def half_close(self, reason: str) -> None:
        """Send the reason and close the sending half, but continue reading.

        The outbox is written. If the system does not take the reason at once, the
        connection stays as it is. Call this again then.
        """
        if not self.ending:
            self.ending = reason
            add_reason(self.session, ErrorCode.SHUTTING_DOWN, reason)
            self.write()
        if self.closed or self.session.outbox.waiting:
            return
        self.context.broker.goaway.mute(self.session)
        self._end_writing()

    def _end_writing(self) -> None:
        if not isinstance(self.sock, BridgedSocket):
            # A pipe can't be closed in one direction only.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def unread_messages(self, most: int) -> int:
        """Read input that will not be routed any more; return the number of messages in
        it.

        most: the most bytes to read.
        """
        if self.closed:
            return 0
        counter, buffer, large_frame = (
            UnreadCounter(self.session.bytes_to_skip),
            self.context.buffer,
            self.large_frame,
        )
        counter.feed(
            self.pending_input
            if large_frame is None
            else memoryview(large_frame)[SLACK : large_frame.filled]
        )
        self.pending_input, self.large_frame = b"", None
        with contextlib.suppress(OSError):
            while most > 0 and (size := self.stream.recv_into(buffer)):
                counter.feed(buffer[:size])
                most -= size
        return counter.count

    def catch_up(self) -> None:
        """Route the input that has arrived, without waiting for the event loop to
        report it.
        """
        for _ in range(_READS):
            # While other connections have their turn, this connection does not overtake
            # them.
            if self.waits or not self.advance():
                break
            self.context.settlement.settle()

    def advance(self) -> bool:
        """Route pending input or newly arrived bytes; return whether there were any."""
        if self.waits:
            self._take_turn()
            return True
        return self.may_read() and self._read() > 0

    def is_gone(self) -> bool | None:
        """Return whether the client has closed, without waiting for the event loop to
        report it.

        The client's earlier input is routed first, unless it was not to be read any
        more. None: the client has closed, but routing its input takes more turns of the
        event loop.
        """
        self.catch_up()
        if not self.closed and has_hung_up(self.sock):
            while not self.waits and self.advance():
                self.context.settlement.settle()
            if self.waits:
                return None
            self.lost("connection closed by the client")
        return self.closed


def has_hung_up(sock: socket.socket | int) -> bool:
    """Return whether the other end has closed, even if bytes are unread."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0))
    return any(event & _HUNG_UP for _, event in poll.poll(0))


def tune(sock: socket.socket) -> None:
    """Set a connection's socket to non-blocking, and TCP_NODELAY on TCP.

    Raises OSError.
    """
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
