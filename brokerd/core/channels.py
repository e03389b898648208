"""Channels: which clients may open them, and which OPEN a JOIN answers.

A caller asks for a channel by an OPEN on a connection of its own. A connection of the
recipient that listens receives it, with a token in the place of its id. The recipient
answers with a JOIN on a connection of its own, or with an ERROR on an ordinary
one. The network layer joins the two connections and relays their bytes. The rules are in
docs/protocol.md, "Channels".

Connections are opaque objects here. The network layer finds its work in ``refusals`` and
``closing``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from brokerd.core.cluster.remote_sessions import host_of
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
    is_address,
    split_address,
)
from brokerd_client.wire.first_frames import MAX_ANSWER, MAX_PAYLOAD
from brokerd_client.wire.framing import frame as make_frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from brokerd.core.cluster.remote_traffic import RemoteTraffic
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status

__all__ = [
    "Channel",
    "ChannelRefused",
    "Channels",
    "Opening",
    "RefusedOpening",
    "receipt_frame",
    "refusal_frame",
]

#: Most OPENs of all callers, and of one caller, that a recipient has not answered.
_PENDING: Final = 64
_PENDING_OF_ONE: Final = 8


class ChannelRefused(Exception):
    """A channel is refused.

    Attributes:
        code: The code of the ERROR.
        name: The name that the ERROR is about, or "".
        host, addresses: Where the recipient is, for the code ``elsewhere``.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        name: str = "",
        *,
        host: str = "",
        addresses: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.host = host
        self.addresses = addresses


class Opening:
    """An OPEN that its recipient has not answered.

    Attributes:
        caller, recipient: The two clients.
        listener: The connection of the recipient that was asked.
        id: The id that the caller chose.
        token: The id that the recipient answers with.
        deadline: Until when it can be answered, on the clock of ``now``.
        connection: The connection of the caller, for the network layer.
    """

    __slots__ = ("caller", "connection", "deadline", "id", "listener", "recipient", "token")

    def __init__(
        self,
        caller: Client,
        recipient: Client,
        listener: Session,
        message_id: int,
        token: int,
        deadline: float,
        connection: Any,
    ) -> None:
        self.caller = caller
        self.recipient = recipient
        self.listener = listener
        self.id = message_id
        self.token = token
        self.deadline = deadline
        self.connection = connection


class RefusedOpening(NamedTuple):
    """An OPEN whose caller is to be told that it is refused.

    Attributes:
        opening: The OPEN.
        frame: The last frame that its caller gets.
        code: The code of the ERROR, or ``refused`` by the recipient.
        reason: The reason for people.
    """

    opening: Opening
    frame: bytes
    code: str
    reason: str


class Channel:
    """An open channel.

    Attributes:
        caller, recipient: The clients at its ends.
        listener: The connection of the recipient that was asked; None if it has closed.
        since: When it was opened, in seconds since the epoch.
        relay: What relays its bytes, for the network layer.
    """

    __slots__ = ("caller", "listener", "recipient", "relay", "since")

    def __init__(
        self,
        caller: Client,
        recipient: Client,
        listener: Session | None,
        since: float,
        relay: Any,
    ) -> None:
        self.caller = caller
        self.recipient = recipient
        self.listener = listener
        self.since = since
        self.relay = relay

    @property
    def clients(self) -> tuple[Client, Client]:
        """The clients at its ends."""
        return self.caller, self.recipient


class Channels:
    """All channels, and all OPENs that wait for an answer.

    Attributes:
        open: The open channels, oldest first.
        opened: The number of channels that were opened since the broker started.
        relayed: The bytes that ended channels have relayed since then.
        refusals: OPENs that were refused; the connections of their callers are closed.
        closing: Channels that the broker closes, each with the reason.
    """

    def __init__(self, exchange: Exchange, status: Status, replies: Replies) -> None:
        self._exchange = exchange
        self._status = status
        self._replies = replies
        self.open: dict[Channel, None] = {}
        self.opened = 0
        self.relayed = 0
        self.refusals: list[RefusedOpening] = []
        self.closing: list[tuple[Channel, str]] = []
        #: The traffic with other hosts; None without a cluster.
        self.traffic: RemoteTraffic | None = None
        #: By token, the oldest first.
        self._openings: dict[int, Opening] = {}
        #: Open channels at either end, and pending OPENs of the caller.
        self._held: Counter[Client] = Counter()
        #: Open channels, and pending OPENs, that came through a connection.
        self._load: Counter[Session] = Counter()

    # Opening

    def openings(self) -> list[Opening]:
        """Return the OPENs that wait for an answer, oldest first."""
        return list(self._openings.values())

    def ask(
        self,
        caller: Client,
        envelope: Envelope,
        payload: bytes,
        connection: Any,
        token: int,
        now: float,
    ) -> Opening:
        """Pass an OPEN on to its recipient.

        connection: the caller's.
        token: 64 random bits.

        Raises ChannelRefused.
        """
        recipient, listener = self._recipient_of(caller, envelope, payload)
        meter = caller.meter
        if self._status.changes is not None:
            self._status.changes.note_client(caller)
        if meter is not None and not meter.allows(len(payload), now):
            raise ChannelRefused(
                ErrorCode.FULL, "the client sends more than its configured rate", envelope.name
            )
        deadline = now + self._status.limits.open_timeout
        opening = Opening(caller, recipient, listener, envelope.id, token, deadline, connection)
        self.add_opening(opening)
        passed_on = Envelope(Kind.OPEN, token, caller.name, payload, codec=envelope.codec)
        self._replies.pass_on(listener, make_frame(encode(passed_on)))
        return opening

    def add_opening(self, opening: Opening) -> None:
        """Add an OPEN that has been passed on."""
        self._openings[opening.token] = opening
        self._held[opening.caller] += 1
        self._count_load(opening.listener, 1)

    def _recipient_of(
        self, caller: Client, envelope: Envelope, payload: bytes
    ) -> tuple[Client, Session]:
        """Return the recipient of an OPEN, and its connection that is asked."""
        name, instance = split_address(envelope.name)
        if not is_address(envelope.name):
            raise ChannelRefused(
                ErrorCode.MALFORMED, f"{envelope.name!r} is not a valid client address"
            )
        if envelope.flags:
            raise ChannelRefused(ErrorCode.UNSUPPORTED, "an OPEN has no flags", envelope.name)
        if len(payload) > MAX_PAYLOAD:
            message = f"the payload of an OPEN has at most {MAX_PAYLOAD} bytes, not {len(payload)}"
            raise ChannelRefused(ErrorCode.TOO_LARGE, message, envelope.name)
        if self._status.draining:
            raise ChannelRefused(
                ErrorCode.SHUTTING_DOWN, "the broker is shutting down", envelope.name
            )
        if name.startswith("$"):
            raise ChannelRefused(ErrorCode.NO_SUCH_CLIENT, f"unknown recipient {name}", name)
        if caller.policy.sending(name) is None:
            raise ChannelRefused(ErrorCode.DENIED, f"{caller.name} may not send to {name}", name)
        recipient = self._exchange.resolve(name)
        if recipient is None:
            raise ChannelRefused(ErrorCode.NO_SUCH_CLIENT, f"unknown client {name}", name)
        if recipient.policy.opening(caller.name) is None:
            message = f"{name} accepts no channels from {caller.name} (clients.{name}.open_from)"
            raise ChannelRefused(ErrorCode.DENIED, message, name)
        listener = self._listener_of(recipient, envelope.name if instance else "")
        if listener is None:
            self._refuse_if_elsewhere(recipient, envelope.name, instance)
            online = recipient.sessions.get(envelope.name) if instance else recipient.online
            message = "does not listen for channels" if online else "is not connected"
            raise ChannelRefused(ErrorCode.OFFLINE, f"{envelope.name} {message}", envelope.name)
        self._check_limits(caller, recipient)
        return recipient, listener

    def _refuse_if_elsewhere(self, recipient: Client, address: str, instance: str) -> None:
        """Raise ChannelRefused if the recipient is at another host; the error names the host."""
        if self.traffic is None or not recipient.hosts:
            return
        host = host_of(instance) if instance else next(iter(recipient.hosts))
        if host in recipient.hosts:
            raise ChannelRefused(
                ErrorCode.ELSEWHERE,
                f"{address} is connected at host {host}: connect there",
                address,
                host=host,
                addresses=self.traffic.addresses_of(host),
            )

    def _listener_of(self, recipient: Client, address: str) -> Session | None:
        """Return the least loaded connection that listens, or the one of that address."""
        sessions: Iterable[Session] = recipient.sessions.values()
        if address:
            exact = recipient.sessions.get(address)
            sessions = () if exact is None else (exact,)
        listening = (
            session
            for session in sessions
            if session.listens and not (session.parting or session.closing)
        )
        return min(
            listening,
            key=lambda session: (self._load[session], session.outbox.waiting, session.number),
            default=None,
        )

    def _check_limits(self, caller: Client, recipient: Client) -> None:
        """Raise ChannelRefused if one more OPEN would exceed a limit."""
        pending = [other for other in self._openings.values() if other.recipient is recipient]
        of_caller = sum(other.caller is caller for other in pending)
        limit = self._status.limits.channels
        if len(self.open) + len(self._openings) >= limit:
            message = f"no more than {limit} channels at once (limits.channels)"
        elif len(pending) >= _PENDING:
            message = f"{recipient.name} has not answered {_PENDING} OPENs"
        elif of_caller >= _PENDING_OF_ONE:
            message = f"{recipient.name} has not answered {_PENDING_OF_ONE} OPENs of {caller.name}"
        else:
            self._check_room(caller)
            self._check_room(recipient)
            return
        raise ChannelRefused(ErrorCode.FULL, message, recipient.name)

    def _check_room(self, client: Client) -> None:
        limit = client.config.channels
        if self._held[client] >= limit:
            message = f"{client.name} may have {limit} channels (clients.{client.name}.channels)"
            raise ChannelRefused(ErrorCode.FULL, message, client.name)

    # The answers to an OPEN

    def take(self, recipient: Client, envelope: Envelope, payload: bytes) -> Opening:
        """Return the OPEN that a JOIN of this client answers; it can't be answered again.

        Raises ChannelRefused. If the recipient may have no more channels, the caller is
        refused too.
        """
        if envelope.name or payload or envelope.flags:
            raise ChannelRefused(
                ErrorCode.MALFORMED, "a JOIN has a token, and no name, payload or flags"
            )
        if self._status.draining:
            raise ChannelRefused(ErrorCode.SHUTTING_DOWN, "the broker is shutting down")
        opening = self._answered(recipient, envelope.id)
        if opening is None:
            raise ChannelRefused(
                ErrorCode.EXPIRED,
                "the token is not valid: its time is over, its caller has gone, or it was used",
            )
        self.forget(opening)
        try:
            self._check_room(recipient)
        except ChannelRefused as refusal:
            self._tell(opening, refusal.code, str(refusal))
            raise
        return opening

    def begin(self, opening: Opening, relay: Any, now_wall: float) -> Channel:
        """Return the new channel of an OPEN that was taken."""
        channel = Channel(opening.caller, opening.recipient, opening.listener, now_wall, relay)
        self.opened += 1
        self.add(channel)
        return channel

    def add(self, channel: Channel) -> None:
        """Add an open channel."""
        self.open[channel] = None
        self._held.update(channel.clients)
        self._count_load(channel.listener, 1)

    def refuse(self, recipient: Session, envelope: Envelope, payload: bytes) -> None:
        """Pass on a recipient's ERROR to the caller of the OPEN that it answers."""
        opening = self._answered(recipient.client, envelope.id)
        if opening is None:
            self._replies.refuse(
                recipient, envelope.id, ErrorCode.EXPIRED, "no OPEN with this token waits"
            )
        elif len(payload) > MAX_ANSWER - _MOST_HEAD:
            message = f"the refusal of an OPEN has at most {MAX_ANSWER - _MOST_HEAD} bytes"
            self._replies.refuse(recipient, envelope.id, ErrorCode.TOO_LARGE, message)
        else:
            self.forget(opening)
            answer = Envelope(
                Kind.ERROR, opening.id, recipient.client.name, payload, codec=envelope.codec
            )
            frame, reason = make_frame(encode(answer)), f"{recipient.address} refused it"
            self.refusals.append(RefusedOpening(opening, frame, "refused", reason))

    def _answered(self, recipient: Client, token: int) -> Opening | None:
        """Return the OPEN with this token, if it was sent to this client."""
        opening = self._openings.get(token)
        return opening if opening is not None and opening.recipient is recipient else None

    def _tell(self, opening: Opening, code: ErrorCode, message: str) -> None:
        """Refuse an OPEN that does not wait any more."""
        frame = refusal_frame(opening.id, code, message, opening.recipient.name)
        self._replies.refused[code] += 1
        self.refusals.append(RefusedOpening(opening, frame, code, message))

    def withdraw(self, opening: Opening, code: ErrorCode, message: str) -> None:
        """Refuse an OPEN that waits for its answer."""
        self.forget(opening)
        self._tell(opening, code, message)

    def forget(self, opening: Opening) -> None:
        """Remove an OPEN: it was answered, or its caller has gone."""
        if self._openings.pop(opening.token, None) is not None:
            _count(self._held, opening.caller, -1)
            self._count_load(opening.listener, -1)

    # Ends

    def end(self, channel: Channel, relayed: int) -> None:
        """Remove a channel that has ended. relayed: its bytes, in both directions."""
        if channel in self.open:
            del self.open[channel]
            channel.relay = None
            self.relayed += relayed
            for client in channel.clients:
                _count(self._held, client, -1)
            self._count_load(channel.listener, -1)

    def leave(self, listener: Session) -> None:
        """Refuse the OPENs that a closed connection has not answered."""
        if not self._load[listener]:
            return
        for opening in self.openings():
            if opening.listener is listener:
                message = f"{listener.address} disconnected before it accepted the channel"
                self.withdraw(opening, ErrorCode.OFFLINE, message)
        for channel in self.open:
            if channel.listener is listener:
                self._count_load(listener, -1)
                channel.listener = None

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`expire` is due, on the clock of ``now``; None without OPENs."""
        # Asked after every read. Only after a reload that shortens the time may a later
        # OPEN be due before the oldest one.
        oldest = next(iter(self._openings.values()), None)
        return None if oldest is None else oldest.deadline

    def expire(self, now: float) -> None:
        """Refuse the OPENs that were not answered in time."""
        for opening in self.openings():
            if opening.deadline <= now:
                message = f"{opening.recipient.name} did not accept the channel in time"
                self.withdraw(opening, ErrorCode.EXPIRED, message)

    def drain(self) -> None:
        """Refuse the OPENs that wait: the broker stops."""
        for opening in self.openings():
            self.withdraw(opening, ErrorCode.SHUTTING_DOWN, "the broker is shutting down")

    def disconnect(self, client: Client, reason: str) -> int:
        """Close all channels of a client; return their number."""
        return self._close({channel: reason for channel in self.open if client in channel.clients})

    def check_rules(self) -> None:
        """Close the channels, and refuse the OPENs, that the rules do not allow any more."""
        for opening in self.openings():
            why = self._why_forbidden(opening.caller, opening.recipient)
            if why:
                self.withdraw(opening, ErrorCode.DENIED, why)
        whys = ((channel, self._why_forbidden(*channel.clients)) for channel in self.open)
        self._close({channel: why for channel, why in whys if why})

    def _why_forbidden(self, caller: Client, recipient: Client) -> str:
        """Return why these clients may have no channel, or ""."""
        for client in (caller, recipient):
            if self._exchange.resolve(client.name) is not client:
                return "name removed from the configuration"
        if caller.policy.sending(recipient.name) is None:
            return f"{caller.name} may not send to {recipient.name} any more"
        if recipient.policy.opening(caller.name) is None:
            return f"{recipient.name} accepts no channels from {caller.name} any more"
        return ""

    def _close(self, reasons: Mapping[Channel, str]) -> int:
        self.closing += reasons.items()
        return len(reasons)

    # Numbers

    @property
    def pending(self) -> int:
        """The number of OPENs that wait for an answer."""
        return len(self._openings)

    def all_relayed(self) -> int:
        """Return the bytes that all channels have relayed since the broker started."""
        return self.relayed + sum(int(channel.relay.relayed) for channel in self.open)

    def describe(self) -> Iterator[dict[str, Any] | None]:
        """Yield what an administrator sees of each channel; None for one that has ended."""
        for channel in list(self.open):
            yield (
                {
                    "caller": channel.caller.name,
                    "recipient": channel.recipient.name,
                    "since": channel.since,
                    **channel.relay.describe(),
                }
                if channel in self.open
                else None
            )

    def _count_load(self, listener: Session | None, change: int) -> None:
        if listener is not None:
            _count(self._load, listener, change)


#: Most bytes of a refusal beside its payload: length, header and name.
_MOST_HEAD: Final = 128


def _count(counter: Counter[Any], key: object, change: int) -> None:
    """Add to a count; a count of 0 keeps no key."""
    counter[key] += change
    if not counter[key]:
        del counter[key]


def receipt_frame(message_id: int, peer: str) -> bytes:
    """Return the frame that precedes the relayed bytes. peer: the other client's name."""
    return make_frame(encode(Envelope(Kind.RECEIPT, message_id, peer)))


def refusal_frame(
    message_id: int,
    code: ErrorCode,
    message: str,
    name: str = "",
    *,
    host: str = "",
    addresses: tuple[str, ...] = (),
) -> bytes:
    """Return the ERROR that refuses the first frame of a channel's connection."""
    payload = error_payload(code, message, name, host=host, addresses=addresses)
    return make_frame(encode(Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON)))
