"""A relay: moves the bytes of one channel between its two ends, without reading them.

Bytes that an end does not take wait in a buffer. Its other end is not read meanwhile, so
one read is the most that waits. The end of one direction is passed on when its bytes
are written. Source: docs/protocol.md, "Channels".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from brokerd.net.bugs import note_bug
from brokerd.net.connection.connection import GRACE
from brokerd.net.context import READ_BUFFER

if TYPE_CHECKING:
    import asyncio

    from brokerd.core.channels import Channel
    from brokerd.core.exchange import Client
    from brokerd.core.rate import Meter
    from brokerd.net.context import Context
    from brokerd.net.relay.end import End
    from brokerd.net.relay.pipe import Pipe, SharedPipe

__all__ = ["Direction", "Relay"]

#: Seconds between two attempts to end TLS in one direction, while input of the other
#: direction is unread.
_FINISH_AGAIN_S: Final = 0.02
_NOTHING: Final = memoryview(b"")
#: After a read of this many bytes or more, the next bytes go through the pipe.
_BULK: Final = 64 * 1024


class Direction:
    """The bytes from one end of a channel to the other.

    source, target: the two ends.
    rest: bytes that the target has not taken.
    moved: the number of bytes that were read.
    ended: nothing more is read.
    over: the end was passed on, or the target has gone.
    """

    __slots__ = (
        "_is_bulk",
        "_is_reading",
        "_is_writing",
        "_relay",
        "_timer",
        "ended",
        "moved",
        "over",
        "rest",
        "source",
        "target",
    )

    def __init__(self, relay: Relay, source: End, target: End) -> None:
        self._relay = relay
        self.source = source
        self.target = target
        self.rest = _NOTHING
        self.moved = 0
        self.ended = False
        self.over = False
        self._is_bulk = False
        self._is_reading = False
        self._is_writing = False
        self._timer: asyncio.TimerHandle | None = None

    # What Liveness asks about the target

    @property
    def sock(self) -> Any:
        """The socket that is written to."""
        return self.target.sock

    @property
    def bytes_out(self) -> int:
        """The number of bytes written to the target, and waiting for it."""
        return self.moved

    @property
    def is_busy(self) -> bool:
        """Whether bytes wait for the target."""
        return bool(self.rest)

    def lost(self, reason: str) -> None:
        """Close the channel, because the target answers nothing."""
        self._relay.reset(reason)

    # Reading

    def restore(self, rest: bytes, moved: int, ended: bool, over: bool) -> None:
        """Restore what another process has captured."""
        self.rest, self.moved = memoryview(rest), moved
        self.ended, self.over = bool(ended), bool(over)

    def go_on(self) -> None:
        """Continue the direction of another process."""
        self._go_on()

    def begin(self, receipt: bytes) -> None:
        """Write the receipt to the target, and what has arrived already; then relay."""
        early = self.source.reader.take_rest()
        self.moved += len(early)
        self._write(memoryview(receipt + early))
        self._go_on()

    def _go_on(self) -> None:
        """Read from the source if its bytes can be passed on, else wait for the target."""
        if self.over or self._relay.is_closed:
            return
        waits = bool(self.rest) or self.target.unsent
        if waits != self._is_writing:
            self._is_writing = waits
            if waits:
                self._relay.loop.add_writer(self.target.fd, self._on_writable)
            else:
                self._relay.loop.remove_writer(self.target.fd)
        reads = not (self.ended or waits or self._timer is not None)
        if reads != self._is_reading:
            self._is_reading = reads
            if reads:
                self._relay.loop.add_reader(self.source.fd, self._on_readable)
            else:
                self._relay.loop.remove_reader(self.source.fd)
        if self.ended and not self.rest:
            self._pass_on_end()
        elif reads and self.source.buffered:
            self._relay.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._is_reading and self.source.buffered:
            self._on_readable()

    def _on_readable(self) -> None:
        try:
            self.read()
            self._go_on()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._relay.broken(error)

    def read(self) -> None:
        """Read once, and write what was read."""
        relay = self._relay
        meter = relay.meter_of(self.source)
        most = READ_BUFFER if meter is None else min(meter.burst, READ_BUFFER)
        pipe = relay.pipe if self._is_bulk else None
        rest: memoryview | bytes
        try:
            if pipe is not None:
                size, rest = pipe.move(self.source.fd, self.target.fd, most)
            else:
                size = self.source.stream.recv_into(relay.buffer[:most])
                rest = relay.buffer[:size]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            relay.reset(error.strerror or type(error).__name__)
            return
        if not size:
            self.ended = True
            return
        self.moved += size
        self._is_bulk = size >= _BULK
        if rest:
            self._write(memoryview(rest))
        if self.over:
            return
        if meter is not None:
            self._charge(meter, size)
        if self.source.unsent:
            # TLS itself has a reply to write.
            relay.opposite(self)._go_on()

    def _charge(self, meter: Meter, size: int) -> None:
        """Count bytes against the sender's rate; beyond it, read on later."""
        wait_s = self._relay.charge(meter, self.source, size)
        if wait_s and not self.over:
            self._timer = self._relay.loop.call_later(wait_s, self._after_wait)

    def _after_wait(self) -> None:
        self._timer = None
        self._go_on()

    # Writing

    def _write(self, view: memoryview) -> None:
        try:
            written = self.target.write(view)
        except OSError:
            self._lose_target()
            return
        if written < len(view):
            self.rest = memoryview(bytes(view[written:]))

    def _on_writable(self) -> None:
        try:
            # Without a rest, TLS writes what it has taken.
            self.rest = self.rest[self.target.write(self.rest) :]
        except OSError:
            self._lose_target()
        try:
            if not (self.rest or self.ended or self._timer is not None or self.target.unsent):
                # If the target is the slower end, its socket is watched all the time,
                # and the source is read here only.
                self.read()
            self._go_on()
        except Exception as error:  # noqa: BLE001 - a bug here must not stop the other connections
            self._relay.broken(error)

    # The end

    def stop_reading(self) -> None:
        """Read nothing more: pass on the end behind the bytes that wait."""
        self.ended = True
        self._go_on()

    def _pass_on_end(self) -> None:
        if self.over:
            return
        relay = self._relay
        opposite = relay.opposite(self)
        if self.target.buffered and not opposite.over:
            # OpenSSL fails if it finds data while it sends close_notify, and the data
            # are lost.
            if self._timer is None:
                self._timer = relay.loop.call_later(_FINISH_AGAIN_S, self._after_wait)
            return
        self.finish()
        can_go_on = self.source.may_half_close and self.target.may_half_close
        if not can_go_on or self.source.has_gone():
            # Nothing can be passed on to the source any more.
            opposite.finish()
        elif not opposite.over:
            self.target.end_writing()
        relay.close_if_over()

    def _lose_target(self) -> None:
        """End this direction: the target has gone. What it sent before is passed on."""
        if not self.over:
            self.finish()
            self._relay.close_soon()

    def finish(self) -> None:
        """Stop reading the source and writing to the target."""
        self.ended = self.over = True
        self.rest = _NOTHING
        if self._is_reading:
            self._relay.loop.remove_reader(self.source.fd)
        if self._is_writing:
            self._relay.loop.remove_writer(self.target.fd)
        self._is_reading = self._is_writing = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self) -> None:
        """Finish, and forget the relay, so that both are freed at once."""
        self.finish()
        del self._relay


class Relay:
    """The relay of one channel.

    caller, recipient: its ends.
    pipe: the pipe for bulk data.
    channel: the channel in the core, once it is begun.
    on_closed: called once, with the relay and the reason.
    """

    __slots__ = (
        "_context",
        "_grace",
        "_on_closed",
        "_pipe",
        "caller",
        "channel",
        "is_closed",
        "recipient",
        "to_caller",
        "to_recipient",
    )

    def __init__(
        self,
        context: Context,
        caller: End,
        recipient: End,
        pipe: SharedPipe,
        on_closed: Callable[[Relay, str], None],
    ) -> None:
        self._context = context
        is_plain = caller.tls_stream is None and recipient.tls_stream is None
        self._pipe = pipe if is_plain else None
        self._on_closed = on_closed
        self._grace: asyncio.TimerHandle | None = None
        self.caller = caller
        self.recipient = recipient
        self.channel: Channel
        self.is_closed = False
        self.to_recipient = Direction(self, caller, recipient)
        self.to_caller = Direction(self, recipient, caller)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop."""
        return self._context.loop

    @property
    def pipe(self) -> Pipe | None:
        """The pipe for bulk data that all relays share, None for ends over TLS."""
        return None if self._pipe is None else self._pipe.get()

    @property
    def buffer(self) -> memoryview:
        """The read buffer that all connections share."""
        return self._context.buffer

    @property
    def directions(self) -> tuple[Direction, Direction]:
        """Both directions."""
        return self.to_recipient, self.to_caller

    @property
    def relayed(self) -> int:
        """The bytes of both directions."""
        return self.to_recipient.moved + self.to_caller.moved

    @property
    def can_hand_over(self) -> bool:
        """Whether another process could continue."""
        return self.caller.can_hand_over and self.recipient.can_hand_over

    @property
    def is_closing(self) -> bool:
        """Whether one end has gone, so that the channel closes within GRACE seconds."""
        return self._grace is not None

    def opposite(self, direction: Direction) -> Direction:
        """Return the other direction."""
        return self.to_caller if direction is self.to_recipient else self.to_recipient

    def meter_of(self, source: End) -> Meter | None:
        """Return the meter of the client at one end."""
        return self._client_of(source).meter

    def _client_of(self, source: End) -> Client:
        return self.channel.caller if source is self.caller else self.channel.recipient

    def charge(self, meter: Meter, source: End, size: int) -> float:
        """Count bytes of one end against its rate; return the seconds until its bytes may
        pass again.
        """
        changes = self._context.broker.status.changes
        if changes is not None:
            changes.note_client(self._client_of(source))
        return meter.charge(size, self.loop.time())

    def broken(self, error: Exception) -> None:
        """Close the channel and log the bug; kept open, it would fail again without end."""
        log = self._context.log.bind(name=self.caller.name, to=self.recipient.name)
        note_bug(self._context, log, error)
        self.reset("a bug in the broker")

    def describe(self) -> dict[str, Any]:
        """Return what an administrator sees of the relay."""
        return {
            "caller_peer": self.caller.peer,
            "recipient_peer": self.recipient.peer,
            "bytes_to_recipient": self.to_recipient.moved,
            "bytes_to_caller": self.to_caller.moved,
            "waiting_bytes": len(self.to_recipient.rest) + len(self.to_caller.rest),
        }

    def begin(self, to_recipient: bytes, to_caller: bytes) -> None:
        """Write these receipts to both ends, then relay."""
        for end in (self.caller, self.recipient):
            end.make_room()
        self._watch(inherited=False)
        self.to_recipient.begin(to_recipient)
        self.to_caller.begin(to_caller)

    def go_on(self, *, is_closing: bool) -> None:
        """Continue the relay of another process. is_closing: see ``is_closing``."""
        self._watch(inherited=True)
        for direction in self.directions:
            direction.go_on()
        if is_closing:
            self.close_soon()

    def _watch(self, *, inherited: bool) -> None:
        self._context.connections.relays.add(self)
        for direction in self.directions:
            self._context.liveness.add(direction, inherited=inherited)

    def drain(self) -> None:
        """Pass on what has arrived, then end both directions."""
        for direction in self.directions:
            if not (direction.ended or direction.rest or self.is_closed):
                direction.read()
            if not self.is_closed:
                direction.stop_reading()

    def close_soon(self) -> None:
        """Close the channel when both directions are over, at the latest in GRACE
        seconds.
        """
        if self._grace is None and not self.is_closed:
            self._grace = self.loop.call_later(GRACE, self.reset, "the other end has gone")
        self.close_if_over()

    def close_if_over(self) -> None:
        """Close both connections gracefully when both directions are over."""
        if self.is_closed or not (self.to_recipient.over and self.to_caller.over):
            return
        self._forget()
        for end in (self.caller, self.recipient):
            end.end_writing()
            self._context.connections.close_gracefully(end.sock)
        self._on_closed(self, "both directions ended")

    def reset(self, reason: str) -> None:
        """Close both connections at once, and discard the bytes on their way."""
        if self.is_closed:
            return
        self._forget()
        for end in (self.caller, self.recipient):
            end.reset()
        self._on_closed(self, reason)

    def _forget(self) -> None:
        """Stop relaying, and break the reference cycles: see Direction.leave."""
        self.is_closed = True
        self._context.connections.relays.discard(self)
        for direction in self.directions:
            direction.leave()
            self._context.liveness.forget(direction)
        if self._grace is not None:
            self._grace.cancel()
