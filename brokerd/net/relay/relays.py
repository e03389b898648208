"""All channels of one server: connections that begin with OPEN or JOIN, and the relays.

The core decides (:mod:`brokerd.core.channels`); this module has the connections. A
caller's connection is not read until the channel is joined.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.channels import ChannelRefused, Opening, receipt_frame, refusal_frame
from brokerd.net.relay.first_frame import LONGEST, id_of
from brokerd.net.relay.last_frame import LastFrame
from brokerd.net.relay.pipe import SharedPipe
from brokerd.net.relay.relay import Relay
from brokerd_client.errors import ExtensionTooDeep, FrameTooBig, MalformedEnvelope
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind, split, split_address

if TYPE_CHECKING:
    from brokerd.core.exchange import Client
    from brokerd.net.context import Context
    from brokerd.net.relay.end import End

__all__ = ["Relays"]


class Relays:
    """The connections of all channels.

    why_unauthorized: returns why the configuration does not admit an end any more, or "".
    """

    def __init__(self, context: Context, why_unauthorized: Callable[[End], str]) -> None:
        self._context = context
        self._why_unauthorized = why_unauthorized
        self._core = context.broker.channels
        self._pipe = SharedPipe()

    # The first frame

    def begin(self, end: End) -> None:
        """Serve the first frame of a connection, which is in ``end.reader``."""
        message_id = id_of(end.reader)
        try:
            client = self._client_of(end)
            body = end.reader.next_frame(LONGEST)
            assert body is not None, "is_whole said that it is there"
            envelope, start = split(body)
            if envelope.kind is Kind.OPEN:
                self._ask(end, client, envelope, body[start:])
            else:
                self._join(end, client, envelope, body[start:])
        except ChannelRefused as refusal:
            self._refuse(end, message_id, refusal)
        except (FrameTooBig, ExtensionTooDeep, MalformedEnvelope) as error:
            code = _CODES[type(error)]
            self._refuse(end, message_id, ChannelRefused(code, f"the first frame: {error}"))
        self._context.settlement.settle()

    def _client_of(self, end: End) -> Client:
        """Return the client of a connection. Raises ChannelRefused if it may not be here."""
        why = self._why_unauthorized(end)
        client = self._context.broker.exchange.resolve(end.name)
        if why or client is None:
            raise ChannelRefused(ErrorCode.KEY_REMOVED, why)
        return client

    def _ask(self, end: End, client: Client, envelope: Envelope, payload: bytes) -> None:
        token = int.from_bytes(os.urandom(8), "big")
        now = self._context.loop.time()
        self.watch(self._core.ask(client, envelope, payload, end, token, now))

    def watch(self, opening: Opening) -> None:
        """Notice when the caller closes before its channel is joined."""
        end: End = opening.connection
        self._context.loop.add_reader(end.fd, self._on_caller, opening)

    def _on_caller(self, opening: Opening) -> None:
        end: End = opening.connection
        try:
            is_connected = bool(end.sock.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            is_connected = False
        # Early bytes wait in the system until the channel is joined.
        self._context.loop.remove_reader(end.fd)
        if not is_connected:
            self._core.forget(opening)
            end.sock.close()
            self._say("debug", "channel.withdrawn", end, to=opening.recipient.name)

    def _join(self, end: End, client: Client, envelope: Envelope, payload: bytes) -> None:
        opening = self._core.take(client, envelope, payload)
        caller: End = opening.connection
        self._context.loop.remove_reader(caller.fd)
        relay = self.between(caller, end)
        relay.channel = self._core.begin(opening, relay, self._context.wall())
        self._say("info", "channel.opened", caller, to=end.name, to_peer=end.peer)
        relay.begin(
            receipt_frame(opening.token, opening.caller.name),
            receipt_frame(opening.id, opening.recipient.name),
        )

    def between(self, caller: End, recipient: End) -> Relay:
        """Return a relay between two ends, which is not begun."""
        return Relay(self._context, caller, recipient, self._pipe, self._on_closed)

    # The end

    def settle(self) -> None:
        """Carry out the core's decisions: refuse OPENs, and close channels."""
        core = self._core
        while core.refusals:
            opening, frame, code, reason = core.refusals.pop(0)
            end: End = opening.connection
            self._context.loop.remove_reader(end.fd)
            LastFrame(self._context, end, frame).write()
            self._note_refusal(end, opening.recipient.name, code, reason, opening.id)
        while core.closing:
            channel, reason = core.closing.pop(0)
            relay: Relay | None = channel.relay
            if relay is not None:
                relay.reset(reason)

    def check_keys(self) -> None:
        """Close the channels, and refuse the OPENs, whose clients a reload does not admit."""
        for opening in self._core.openings():
            why = self._why_unauthorized(opening.connection)
            if why:
                self._core.withdraw(opening, ErrorCode.KEY_REMOVED, why)
        relays: list[Relay] = [channel.relay for channel in self._core.open]
        for relay in relays:
            why = self._why_unauthorized(relay.caller) or self._why_unauthorized(relay.recipient)
            if why:
                relay.reset(why)
        self._context.settlement.settle()

    def drain(self) -> None:
        """Refuse the OPENs that wait; pass on what has arrived, and end all channels."""
        self._core.drain()
        self._context.settlement.settle()
        for channel in list(self._core.open):
            relay: Relay = channel.relay
            relay.drain()

    def bound(self) -> list[Relay]:
        """Return the relays that no other process could continue."""
        relays: list[Relay] = [channel.relay for channel in self._core.open]
        return [relay for relay in relays if not relay.can_hand_over]

    def let_go_of_bound(self) -> None:
        """End the channels with TLS, and refuse such OPENs: another process takes over."""
        for opening in self._core.openings():
            if not opening.connection.can_hand_over:
                reason = "the broker is replaced, and an encrypted connection can't be handed over"
                self._core.withdraw(opening, ErrorCode.SHUTTING_DOWN, reason)
        self._context.settlement.settle()
        for relay in self.bound():
            relay.drain()

    def cut_off_bound(self) -> None:
        """Close the channels with TLS at once."""
        for relay in self.bound():
            relay.reset("the broker is replaced, and an encrypted connection can't be handed over")

    def cut_off(self) -> int:
        """Close all channels at once; return how many had bytes on their way."""
        relays: list[Relay] = [channel.relay for channel in self._core.open]
        busy = sum(any(direction.is_busy for direction in relay.directions) for relay in relays)
        for relay in relays:
            relay.reset("the broker stopped")
        self._pipe.close()
        return busy

    def _on_closed(self, relay: Relay, reason: str) -> None:
        self._core.end(relay.channel, relay.relayed)
        self._say(
            "info",
            "channel.closed",
            relay.caller,
            to=relay.recipient.name,
            reason=reason,
            bytes_to_recipient=relay.to_recipient.moved,
            bytes_to_caller=relay.to_caller.moved,
        )
        self._context.connections.note_if_empty()

    def _refuse(self, end: End, message_id: int, refusal: ChannelRefused) -> None:
        """Refuse the first frame of a connection, and close it."""
        self._context.broker.replies.refused[refusal.code] += 1
        frame = refusal_frame(
            message_id,
            refusal.code,
            str(refusal),
            refusal.name,
            host=refusal.host,
            addresses=refusal.addresses,
        )
        LastFrame(self._context, end, frame).write()
        self._note_refusal(end, refusal.name, refusal.code, str(refusal), message_id)

    def _note_refusal(self, end: End, to: str, code: str, reason: str, message_id: int) -> None:
        context = self._context
        context.broker.incidents.add_refused_channel(
            end.name, split_address(to)[0], code, reason, message_id, context.wall()
        )
        level = "warning" if code == ErrorCode.DENIED else "debug"
        self._say(level, "channel.refused", end, to=to, code=str(code), reason=reason)

    def _say(self, level: str, event: str, end: End, **fields: Any) -> None:
        """Log an event of the channel with this end."""
        log = self._context.log.bind(name=end.name, peer=end.peer)
        shown = {field: value for field, value in fields.items() if value != ""}
        about = f"{end.name}, {fields['to']}: {fields.get('code', '')}"
        self._context.log_limiter.note(level, event, about, log=log, **shown)


_CODES: Final = {
    FrameTooBig: ErrorCode.TOO_LARGE,
    ExtensionTooDeep: ErrorCode.UNSUPPORTED,
    MalformedEnvelope: ErrorCode.MALFORMED,
}
