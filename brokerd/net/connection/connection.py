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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

from brokerd.core import routing
from brokerd.core.goaway import add_reason
from brokerd.core.large_frame import SLACK, LargeFrame, MappedFrame
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import NARROW
from brokerd.core.slow_path import handle_slow_path
from brokerd.net.bound_loggers import session_logger
from brokerd.net.bugs import note_bug
from brokerd.net.byte_stream import ByteStream
from brokerd.net.connection.state import HUNG_UP, NEXT, Event, State
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
    from brokerd_client.tls.stream import TlsStream

#: Routes the frames of a buffer: see routing.feed.
_Feed: TypeAlias = (
    "Callable[[Broker, Session, memoryview, int, int, float], tuple[int, RoutingResult]]"
)

__all__ = ["BYTES_PER_TURN", "GRACE", "Connection", "has_hung_up", "tune", "was_reset"]

#: Longest frame, in bytes, that goes through the shared read buffer. A longer frame
#: gets a buffer of its own, in which it is passed on.
_LARGE: Final = READ_BUFFER // 2
#: Most bytes of such a frame that are read at once: less than a millisecond's work.
_LARGE_READ: Final = 1024 * 1024
#: Bytes: more than a frame's length, header, name and topic can have.
_ENVELOPE: Final = 1024
#: Bytes of the first read after the sender's turn was cut short, at least.
_LEAST: Final = 4096
#: Frames for mailboxes in one turn that make a sender wait for its next turn.
_MANY_STORED: Final = 16
#: If events go to many subscribers, at most this many bytes are copied for them in one
#: turn: some milliseconds.
_COPIED: Final = 32 * 1024 * 1024
#: Bytes after which writing goes on in the next turn: a client that reads as fast as
#: the broker writes would keep all other clients waiting.
BYTES_PER_TURN: Final = 2 * 1024 * 1024
#: Seconds that a client has to read its remaining bytes before its connection is
#: closed.
GRACE: Final = 5.0
#: Most reads in a row for one connection, when the read can't wait for its turn.
_READS: Final = 16
#: Sends several pieces with one system call; Windows has no such call.
_sendmsg = getattr(socket.socket, "sendmsg", None)
#: States in which no input may be read, whatever the session's own state.
_UNREADABLE: Final = (State.WAITING, State.CLOSING, State.CLOSED)
# Until Python 3.12, reading a member of an enumeration takes as long as ten attributes.
_NEW: Final = State.NEW
_READING: Final = State.READING
_WAITING: Final = State.WAITING
_CLOSED: Final = State.CLOSED
_READ: Final = Event.READ
_LOSE: Final = Event.LOSE
_CONSUMED: Final = RoutingResult.CONSUMED
_FLUSH: Final = RoutingResult.FLUSH
_CHANNEL: Final = RoutingResult.CHANNEL
_YIELD: Final = RoutingResult.YIELD
_BLOCKED: Final = RoutingResult.BLOCKED
_CLOSE: Final = RoutingResult.CLOSE


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
    most_read: bytes per read; fewer than READ_BUFFER after the sender's turn was cut short.
        What a turn leaves is copied, to wait for the next one.
    is_storing: many of the frames that came last were for mailboxes. Then reading waits
        for its turn too: such a sender is paced by the disk.
    writing: output waits until the system takes more. The socket is watched for that,
        in every state but CLOSED.
    grace: the timer that closes a connection in the state CLOSING.
    tls_peer: the facts that the TLS handshake proved about the peer.
    passed: a new process has a copy of the descriptor too, because it may take over.
    ending: why the broker has begun to end the connection, or "". Until its client
        closes too, input is read as before.
    can_hand_over: another process could continue with the socket and with the state
        kept here.
    tls_stream: the same stream over TLS, None without TLS.
    """

    can_hand_over: ClassVar[bool] = True

    __slots__ = (
        "context",
        "credential",
        "ending",
        "fd",
        "grace",
        "is_storing",
        "large_frame",
        "most_read",
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
        self.pending_input: bytes | memoryview = b""
        self.large_frame: LargeFrame | MappedFrame | None = None
        self.state = _NEW
        self.most_read = READ_BUFFER
        self.is_storing = False
        self.writing = False
        self.grace: asyncio.TimerHandle | None = None
        self.ending = ""
        self.passed = False

    @property
    def tls_stream(self) -> TlsStream | None:
        return None

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self.state is _CLOSED

    @property
    def waits(self) -> bool:
        """Whether other connections have their turn before ``pending_input`` is routed."""
        return self.state is _WAITING

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
        self._change(_READ)
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
            self.context.turns.add(self)
        elif session.held_by is None:
            self._read_on_events()
        else:
            self._change(Event.HOLD)
        if session.outbox.waiting or session.closing:
            self.context.broker.replies.touch(session)

    # Reading

    def on_readable(self) -> None:
        """Read and route once."""
        if self.session.closing:
            # The connection closes in a later turn; nothing more is read.
            self._stop_reading(Event.CLOSE)
            return
        if self.is_storing:
            self._stop_reading(Event.YIELD)
            self.context.turns.add(self)
            return
        self._read_at_once()

    def _read_at_once(self) -> int:
        """Read and route once; return the number of bytes."""
        self.context.reset_recheck.note(self)
        self.context.busy_poll.begin_read()
        size = 0
        try:
            size = self._read()
            self.context.settlement.settle_read(size)
            self.context.busy_poll.end_read()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)
        return size

    def postpone(self) -> None:
        """Read no input until ``read_postponed`` is called: its client has closed."""
        self._stop_reading(Event.YIELD)

    def read_postponed(self) -> None:
        """Read what has arrived, up to the end of the connection."""
        if not self.waits:
            return
        self._change(_READ)
        size = self._read_at_once()
        if self.state is not _READING:
            return
        if self.is_storing and size:
            # It has its next turn without waiting for the socket.
            self._change(Event.YIELD)
            self.context.turns.add(self)
        else:
            # The event loop reports further input, also what one read does not take.
            self.context.loop.add_reader(self.fd, self.on_readable)

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
                with large_frame.space(_LARGE_READ) as space:
                    size = self.stream.recv_into(space)
            elif self.pending_input:
                kept = len(self.pending_input)
                view[:kept] = self.pending_input
                size = self.stream.recv_into(view[kept:])
            elif self.most_read < READ_BUFFER:
                size = self.stream.recv_into(view[: self.most_read])
            else:
                size = self.stream.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._end(error.strerror or type(error).__name__)
            return 0
        if not size:
            self._end(self.ending or "connection closed by the client")
            return 0
        if large_frame is None:
            self.pending_input = b""
            self._route(view, kept + size)
        else:
            large_frame.filled += size
            if large_frame.is_whole:
                self._route_large_frame(large_frame)
            else:
                self.large_frame = self.context.frame_memory.moved(large_frame)
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
        self._change(_READ)
        large_frame = self.large_frame
        if kept:
            self._route(memoryview(kept), len(kept))
        elif large_frame is not None and large_frame.is_whole:
            self._route_large_frame(large_frame)
        if self.state is _READING:
            # Not before: to watch the socket for the time of one turn costs ten system
            # calls.
            self.context.loop.add_reader(self.fd, self.on_readable)
        if kept or large_frame is not None:
            self.context.settlement.settle()

    def _route_large_frame(self, large_frame: LargeFrame | MappedFrame) -> None:
        """Route a large frame on the slow path at once, because the routing loop would
        copy it.
        """
        self.large_frame = None
        view = memoryview(large_frame)[: large_frame.end]
        self._route(view, large_frame.end, SLACK, handle_slow_path)

    def _route(self, view: memoryview, end: int, start: int = 0, feed: _Feed | None = None) -> None:
        """Route the frames in ``view`` with ``feed``, by default the routing loop."""
        context, session = self.context, self.session
        if context.broker.status.changes is not None:
            context.broker.status.changes.note(session)
        feed = feed or routing.feed
        now = context.loop.time()
        context.broker.turn.budget = context.turn_budget
        stop = self._end_of_turn(view, start, end) if session.widest > NARROW else end
        taps, stored = context.broker.taps, session.uncommitted
        if taps.active:
            taps.begin(session, view, start, now)
        position, result = feed(context.broker, session, view, start, stop, now)
        while result is _FLUSH:
            context.settlement.write_touched()
            if self.closed or session.closing:
                result = _CLOSE
                break
            position, result = feed(context.broker, session, view, position, stop, now)
        while result is _CHANNEL and session.messages_in:
            # Frames that stayed in the routing loop have come before: it is refused.
            position, result = feed(context.broker, session, view, position, stop, now)
        if context.broker.turn.budget != context.turn_budget:
            # Frames have left the routing loop.
            context.settlement.has_more = True
        if taps.active:
            taps.end(view, position)
            # The copies are sent.
            context.settlement.has_more = True
        self.is_storing = session.uncommitted - stored >= _MANY_STORED
        if result is _YIELD:
            self.most_read = max(_LEAST, position - start)
        elif self.most_read < READ_BUFFER:
            self.most_read = min(2 * self.most_read, READ_BUFFER)
        if result is _CONSUMED and stop < end:
            result = _YIELD
        if self.state is _CLOSED:
            pass
        elif result is _CLOSE:
            self._stop_reading(Event.CLOSE)
        elif result is _CHANNEL:
            self._become_channel(bytes(view[position:end]))
        else:
            self._keep(view, position, end)
            if result is _BLOCKED:
                self._stop_reading(Event.HOLD)
            elif result is _YIELD:
                self._stop_reading(Event.YIELD)
                context.turns.add(self)

    def _become_channel(self, unread: bytes) -> None:
        """End the session, and leave the socket to a channel."""
        self._stop_reading(_LOSE)
        self.context.loop.remove_writer(self.fd)
        self.pending_input, self.large_frame = b"", None
        self.context.connections.on_lost(self, "the connection becomes a channel")
        self.context.connections.on_channel(self, unread)

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

    def take_turn(self) -> None:
        """Route the pending input, or read: the other connections have had their turn."""
        if not self.waits:
            return
        if not (self.pending_input or self.large_frame):
            self.read_postponed()
            return
        try:
            self.resume()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)

    def _keep(self, view: memoryview, position: int, end: int) -> None:
        """Keep the bytes of an incomplete frame, or of frames that are not routed yet."""
        if position == end:
            return
        if isinstance(view.obj, (LargeFrame, MappedFrame)):
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
        kept, whole = view[position:end], view.obj
        # Input that was kept before is copied again once half of it is routed.
        is_most = isinstance(whole, bytes) and 2 * len(kept) > len(whole)
        self.pending_input = kept if is_most else bytes(kept)

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
            written = 0
            while pieces := outbox.pieces():
                size = (
                    self.stream.send(pieces[0])
                    if len(pieces) == 1 and len(pieces[0]) <= BYTES_PER_TURN
                    else self._send(pieces)
                )
                if outbox.sent(size):
                    break
                written += size
                if written >= BYTES_PER_TURN:
                    # The other connections have their turn; the event loop reports the
                    # room that is left.
                    raise BlockingIOError
                if outbox.timed:
                    # An ERROR about an expired frame may go into this very outbox, which
                    # can't grow while a view of it is kept.
                    pieces.clear()
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

    def _send(self, pieces: Sequence[bytearray | bytes | memoryview]) -> int:
        """Write several pieces, or a part of a long one; return the number of bytes."""
        if _sendmsg and len(pieces) > 1 and max(map(len, pieces)) <= BYTES_PER_TURN:
            return int(_sendmsg(self.sock, pieces))
        return self.stream.send(memoryview(pieces[0])[:BYTES_PER_TURN])

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
                self.context.broker.mailboxes.on_writable(self.session)
            self.context.settlement.settle()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._broken(error)

    # The end

    def _end(self, reason: str) -> None:
        """Close the connection, which its client has closed."""
        self.lost(reason)
        self.context.disconnects.note(self.context.connections.established)

    def _broken(self, error: Exception) -> None:
        """Close the connection and log the bug; kept open, it would fail again without
        end.
        """
        note_bug(self.context, session_logger(self.context.log, self.session), error)
        self.lost("a bug in the broker")

    def close_soon(self) -> None:
        """Stop reading, release the client's name, and give the client GRACE seconds to
        read what is written for it.
        """
        self._stop_reading(Event.CLOSE)
        if self.grace is None and not self.context.broker.status.draining:
            self.context.connections.release_name(self)
            self.grace = self.context.loop.call_later(GRACE, self.lost, self.session.closing)

    def lost(self, reason: str, *, written: bool = False) -> None:
        """Close the connection, and make the core report its undelivered messages.

        written: all output was written and shall arrive; otherwise the socket is closed
        at once.
        """
        if self.closed:
            return
        self._stop_reading(_LOSE)
        if self.writing:
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
        self.context.reset_recheck.forget(self)
        self.context.connections.on_lost(self, reason)

    @property
    def bytes_out(self) -> int:
        """The bytes of all frames for the client so far."""
        return self.session.outbox.size

    @property
    def is_busy(self) -> bool:
        """Whether bytes wait for the socket, or its end is awaited."""
        return bool(self.session.outbox.waiting or self.ending)

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
            self.take_turn()
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
    return any(event & HUNG_UP for _, event in poll.poll(0))


def was_reset(fd: int) -> bool:
    """Return whether a connection is broken, or closed in both directions."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    # poll() reports errors even if no event is asked for.
    poll.register(fd, 0)
    return bool(poll.poll(0))


def tune(sock: socket.socket, *, is_tcp: bool) -> None:
    """Set a connection's socket to non-blocking, and TCP_NODELAY on TCP.

    Raises OSError.
    """
    sock.setblocking(False)
    if is_tcp:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
