"""Handling of received frames: outcomes, events, the end of a subscription. No I/O.

Rules: docs/protocol.md, "Order and outcome" and "Topics". An answer belongs to a call
only if its id fits, and the sender or recipient that it names: see
brokerd_client.protocol.pending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Generic, TypeVar

from brokerd_client import presence
from brokerd_client.channel_offer import ChannelOffer
from brokerd_client.errors import (
    BrokerdError,
    Denied,
    Disconnected,
    DisconnectedByOperator,
    Expired,
    FrameTooBig,
    KeyRemoved,
    NameTaken,
    Offline,
    ProtocolError,
    Replaced,
    RequestFailed,
    ShuttingDown,
    refusal,
)
from brokerd_client.message import Message, Owner, Receipt
from brokerd_client.protocol.decoder import FrameDecoder, Unreadable
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.open_requests import OpenRequests
from brokerd_client.protocol.pending import Pending, PendingTable, Purpose
from brokerd_client.protocol.posts import Post
from brokerd_client.protocol.subscription_table import SubscriptionEntry, SubscriptionTable
from brokerd_client.wire.envelope import BROKER, Envelope, is_address
from brokerd_client.wire.first_frames import place_in
from brokerd_client.wire.layout import MAX_ID, Flag, Kind

__all__ = ["Inbound"]

M = TypeVar("M", bound=Message)

#: Bound here, because the lookup of an enum's member takes as long as that of the call.
_RECEIPT: Final = Purpose.RECEIPT
_REQUEST: Final = Purpose.REQUEST
#: The event that announces the end of the connection.
_DRAINING: Final = "$broker.draining"
#: Error codes that, with the id 0, give the reason why the broker closes the
#: connection.
_ENDINGS: Final = frozenset(
    cls.code for cls in (NameTaken, Replaced, KeyRemoved, DisconnectedByOperator, ShuttingDown)
)
#: Limits of the memory of one decoded answer. An ERROR's payload, in bytes. An
#: operation's answer for a caller, or with the list of clients, in multiples of the
#: longest message. Any other operation's answer, in bytes.
_MAX_ERROR_COST: Final = 2**20
_LIST_FACTOR: Final = 8
_MAX_ANSWER_COST: Final = 2**18
#: Most requests remembered whose outcomes no caller awaits any more.
_MAX_GIVEN_UP: Final = 4096
#: Approximate memory of each value in a decoded answer, in bytes.
_VALUE_COST: Final = 64
#: Most characters kept of an ERROR's texts: its code, its name, its message from the
#: broker, and its message from a client.
_MAX_CODE: Final = 64
_MAX_NAME: Final = 255
_MAX_TEXT: Final = 1000
_MAX_CLIENT_TEXT: Final = 2**16
#: Most names of mailboxes kept of an ERROR.
_MAX_NAMES: Final = 1000


class _MoreEffects(Exception):
    """Received bytes have effects that look_ahead does not tell."""


def _is_more(frame: object, effects: object) -> None:
    """Raise _MoreEffects."""
    raise _MoreEffects


class Inbound(Generic[M]):
    """The receiving half of a dialog: it matches frames with calls and subscriptions.

    The dialog owns the tables, and changes them when it sends. The callbacks change the
    state of the connection, or send, which are matters of the dialog.

    Args:
        message: The class of received messages.
        largest: Longest accepted payload, in bytes.
        pending_calls: The calls that wait for an outcome.
        subscriptions: The local subscriptions, by pattern.
        watches: The subscriptions of each watch.
        on_introduction: Called with the broker's answer to whoami, the effects and the
            time. Raises ProtocolError if the answer is not valid.
        on_no_mailbox: Called with the broker's refusal to open the mailbox, the effects
            and the time.
        on_parted: Called with the effects when the broker has handled every frame of this
            connection, which the client ends.
        on_draining: Called with the effects when the broker announces the end of this
            connection.
        withdraw: Called with a call whose answer is not valid. Removes its subscription
            or watch, here and at the broker.
        refuse: Called with sender, id, code and text for a request that can't be read.
            Answers it with an ERROR, if that can be sent.
        keep_post: Called with a post, the broker's refusal and the time. Returns whether
            the post is sent again.
        refuse_channel: Called with token, code and text. Refuses a request for a channel.
        has_answered: Called with an id. Returns whether it is the id of another
            client's request, which this client has answered.
    """

    def __init__(
        self,
        message: type[M],
        largest: int,
        *,
        pending_calls: PendingTable,
        subscriptions: SubscriptionTable,
        watches: dict[presence.Watch, list[SubscriptionEntry]],
        on_introduction: Callable[[dict[str, Any], Effects[M], float], object],
        on_no_mailbox: Callable[[BrokerdError, Effects[M], float], object],
        on_parted: Callable[[Effects[M]], object],
        on_draining: Callable[[Effects[M]], object],
        withdraw: Callable[[Pending], object],
        refuse: Callable[[str, int, str, str], object],
        keep_post: Callable[[Post, BrokerdError, float], bool],
        refuse_channel: Callable[[int, str, str], object],
        has_answered: Callable[[int], bool],
    ) -> None:
        #: Replies and receipts that came after their caller had given up, and this
        #: client's own answers that came too late.
        self.late = 0
        #: Events that no longer match a subscription.
        self.unrouted = 0
        #: Frames skipped because they were unreadable or too long.
        self.unreadable = 0
        self._pending_calls = pending_calls
        self._subscriptions = subscriptions
        self._watches = watches
        self._on_introduction = on_introduction
        self._on_no_mailbox = on_no_mailbox
        self._on_parted = on_parted
        self._on_draining = on_draining
        self._withdraw = withdraw
        self._refuse = refuse
        self._keep_post = keep_post
        self._refuse_channel = refuse_channel
        self._has_answered = has_answered
        #: The sink of the requests for channels; None unless this client listens.
        self.listener: Any = None
        #: Whether the broker will announce the end of this connection.
        self._goaway = False
        #: The time of the bytes that are being read, in seconds.
        self._now = 0.0
        self._open: OpenRequests[M] = OpenRequests()
        #: Forget a request that is answered, by sender and id.
        self.close_request: Callable[[str, int], object] = self._open.discard
        #: Ids of this client's own requests whose outcome no caller awaits any more.
        self._given_up: dict[int, None] = {}
        self._decoder = FrameDecoder(
            message,
            largest,
            on_replies=self._on_replies,
            on_receipts=self._on_receipts,
            on_frame=self._on_frame,
        )
        #: For look_ahead, which may be interrupted at any moment.
        self._ahead = FrameDecoder(
            message,
            largest,
            on_replies=self._note_replies,
            on_receipts=self._note_receipts,
            on_frame=_is_more,
        )
        #: Decode the most common bytes, and change nothing: see FrameDecoder.
        self.lone_message: Callable[[bytes, Owner], M | None] = self._decoder.lone_message
        self.accept(largest)

    def accept(self, largest: int) -> None:
        """Accept messages of up to ``largest`` bytes from now on."""
        self._decoder.accept(largest)
        self._ahead.accept(largest)
        self._max_list_cost = _LIST_FACTOR * largest

    def reset(self, connection: int) -> None:
        """Forget the incomplete frame and the promised goaway, for a new connection.

        connection: Its number, for the deliveries from the mailbox.
        """
        self._decoder.reset()
        self._decoder.connection = self._ahead.connection = connection
        self._goaway = False

    def read(self, data: bytes, owner: Owner, effects: Effects[M], now: float) -> None:
        """Handle every complete frame in the received bytes.

        Args:
            owner: The client of the messages.
            effects: Where the effects are added.
            now: The time, in seconds.

        Raises RemoteError if the connection has to end.
        """
        self._now = now
        effects.size += self._decoder.read(data, owner, effects)
        self._note_requests(self._decoder.requests, now)

    def take_begun(self) -> bytes:
        """Forget and return the begin of a frame: see Dialog.take_begun."""
        return self._decoder.take_begun()

    @property
    def incomplete(self) -> bool:
        """Whether a frame is not complete yet."""
        return self._decoder.incomplete

    def answered_request(self, reply: M) -> Pending | None:
        """Return the request of this client that a REPLY answers, if there is one."""
        pending = self._pending_calls.get(reply.id)
        if (
            pending is None
            or pending.purpose is not _REQUEST
            or not (pending.to == reply.sender or pending.answered_by(reply.sender))
        ):
            return None
        return pending

    def look_ahead(self, data: bytes, owner: Owner) -> Effects[M] | None:
        """Decode received bytes while no frame is incomplete, and change nothing.

        The caller then either delivers the effects and has them recorded with
        :meth:`pass_over`, or has the bytes read.

        Returns:
            The effects: messages, and outcomes with their pending calls as waiters. None
            where a frame causes other effects or is not whole. Only the last frame need
            not be whole, unless it is long: see :attr:`begun_ahead`.

        Raises RemoteError as :meth:`read` does.
        """
        effects: Effects[M] = Effects()
        self._ahead.reset()
        try:
            effects.size = self._ahead.read(data, owner, effects)
        except _MoreEffects:
            return None
        if self._ahead.incomplete and not (self._ahead.begun and effects.size):
            return None
        return effects

    @property
    def begun_ahead(self) -> int:
        """The number of the last bytes of the last look_ahead that begin a frame.

        They are not handled: the caller gives them again, with those that follow.
        """
        return self._ahead.begun

    def pass_over(self, effects: Effects[M], now: float) -> None:
        """Record that the effects of the last :meth:`look_ahead` are delivered."""
        for pending, _ in effects.outcomes:
            del self._pending_calls[pending.id]
        if effects.messages:
            self._note_requests(self._ahead.requests, now)

    def _note_replies(self, messages: Iterable[M], effects: Effects[M]) -> None:
        """Add a run of REPLYs to the effects of look_ahead."""
        for message in messages:
            pending = self._pending_calls.get(message.id)
            if pending is None or not (
                pending.to == message.sender or pending.answered_by(message.sender)
            ):
                raise _MoreEffects
            outcome: object = None
            if pending.purpose is _REQUEST:
                outcome = message
            elif pending.purpose is Purpose.CONTROL:
                outcome = _json_object(message.body, self._max_list_cost)
            if outcome is None:
                raise _MoreEffects
            effects.outcomes.append((pending, outcome))

    def _note_receipts(self, ids: Iterable[int], effects: Effects[M]) -> None:
        """Add a run of RECEIPTs to the effects of look_ahead."""
        for message_id in ids:
            pending = self._pending_calls.get(message_id)
            if pending is None or pending.purpose is not _RECEIPT:
                raise _MoreEffects
            effects.outcomes.append((pending, Receipt(message_id, pending.to or pending.about)))

    def _note_requests(self, requests: list[M], now: float) -> None:
        """Remember received requests, which may be cancelled."""
        add = self._open.add
        for request in requests:
            if request.extension is not None:
                request.set_deadline(now)
            add(request)

    def note_request(self, request: M, now: float) -> None:
        """Remember a received request, which may be cancelled."""
        if request.extension is not None:
            request.set_deadline(now)
        self._open.add(request)

    def give_up(self, message_id: int) -> None:
        """Remember that no caller awaits the outcome of a request any more."""
        if len(self._given_up) >= _MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[message_id] = None

    def lost(self) -> None:
        """Forget all open requests of a lost connection.

        Their handlers go on: a short outage must not stop what they have begun.
        """
        self._open.clear()
        self._given_up.clear()

    def _on_cancel(self, envelope: Envelope, effects: Effects[M]) -> None:
        request = self._open.take(envelope.name, envelope.id)
        if request is not None and not request.answered:
            request.mark_cancelled()
            effects.cancelled.append(request)

    def _on_event(self, message: M, effects: Effects[M]) -> None:
        subscriptions = self._subscriptions.of(message.topic)
        if message.topic == _DRAINING and message.sender == BROKER and self._goaway:
            self._on_draining(effects)
        elif not subscriptions:
            self.unrouted += 1
        for entry in subscriptions:
            for sink in entry.next_recipients():
                if not isinstance(sink, presence.Watch):
                    effects.events.append((sink, message))
                elif message.sender == BROKER and (change := sink.event(message.topic)) is not None:
                    effects.events.append((sink.sink, change))

    def _on_frame(self, frame: M | Envelope | Unreadable, effects: Effects[M]) -> None:
        """Handle a frame that is neither MESSAGE nor REQUEST nor REPLY."""
        if isinstance(frame, Unreadable):
            self._on_unreadable(frame, effects)
        elif not isinstance(frame, Envelope):
            self._on_event(frame, effects)
        elif frame.kind is Kind.ERROR:
            self._on_error(frame, effects)
        elif frame.kind is Kind.OPEN:
            self._on_open(frame, effects)
        elif frame.flags & Flag.ACK:
            # Of an ACK. This client asks for none.
            self.late += 1
        else:
            self._on_receipts((frame.id,), effects)

    def _on_open(self, envelope: Envelope, effects: Effects[M]) -> None:
        """Pass a request for a channel to the listener, or refuse it."""
        if self.listener is None:
            self._refuse_channel(envelope.id, Offline.code, "the client does not listen")
        else:
            offer = ChannelOffer(envelope.name, envelope.payload, envelope.id)
            effects.events.append((self.listener, offer))

    def _on_receipts(self, ids: Iterable[int], effects: Effects[M]) -> None:
        calls = self._pending_calls
        for message_id in ids:
            pending = calls.get(message_id)
            if pending is None or pending.purpose is not _RECEIPT:
                self.late += 1
            else:
                del calls[message_id]
                effects.outcomes.append(
                    (pending.waiter, Receipt(message_id, pending.to or pending.about))
                )

    def _on_replies(self, messages: Iterable[M], effects: Effects[M]) -> None:
        calls = self._pending_calls
        for message in messages:
            pending = calls.get(message.id)
            if (
                pending is None
                or pending.purpose is _RECEIPT
                or not (pending.to == message.sender or pending.answered_by(message.sender))
            ):
                self.late += 1
            elif pending.purpose is _REQUEST:
                del calls[message.id]
                effects.outcomes.append((pending.waiter, message))
            else:
                self._on_operation(pending, message, effects)

    def _on_operation(self, pending: Pending, message: M, effects: Effects[M]) -> None:
        """Handle the answer to an operation of the broker."""
        try:
            answer = self._answer(pending, message, effects)
        except ProtocolError as error:
            self._fail(pending, error, effects)
            return
        self._pending_calls.pop(message.id)
        if pending.waiter is not None:
            effects.outcomes.append((pending.waiter, answer))

    def _answer(self, pending: Pending, message: M, effects: Effects[M]) -> dict[str, Any]:
        """Handle and return the answer of an operation.

        Raises ProtocolError if it is not valid.
        """
        is_list = pending.purpose in (Purpose.WATCH, Purpose.RESYNC)
        any_size = is_list or pending.purpose is Purpose.CONTROL
        answer = _json_object(message.body, self._max_list_cost if any_size else _MAX_ANSWER_COST)
        if answer is None:
            raise ProtocolError(
                f"the broker's answer to {pending.id} is not a JSON object, or is too large"
            )
        if pending.purpose is Purpose.WHOAMI:
            self._on_introduction(answer, effects, self._now)
        elif pending.purpose is Purpose.GOAWAY:
            self._goaway = True
        elif pending.purpose is Purpose.FINISHED:
            why = "it stops, or another process replaces it"
            effects.broken = Disconnected(f"the broker closes the connection: {why}")
            effects.broken.__cause__ = ShuttingDown(why)
        elif pending.purpose is Purpose.PARTED:
            self._on_parted(effects)
        elif is_list:
            changes = pending.sink.snapshot(presence.client_list(answer))
            if pending.sink in self._watches:
                effects.events += [(pending.sink.sink, change) for change in changes]
        return answer

    def _fail(self, pending: Pending, error: ProtocolError, effects: Effects[M]) -> None:
        """End a call whose answer is not valid.

        Raises the error if no caller waits for the answer: the connection then has to
        end.
        """
        if pending.waiter is None and pending.purpose is not Purpose.FORGET:
            raise error
        self._pending_calls.pop(pending.id)
        self._withdraw(pending)
        if pending.waiter is not None:
            effects.outcomes.append((pending.waiter, error))

    def _on_unreadable(self, frame: Unreadable, effects: Effects[M]) -> None:
        """Report a skipped frame to the call that it answers, or else to the log.

        If it is a request, its sender gets an error.
        """
        self.unreadable += 1
        pending = self._pending_calls.get(frame.id)
        if pending is not None and _may_answer(frame, pending):
            error = ProtocolError(f"the answer to {frame.id} can't be read: {frame.error}")
            error.__cause__ = frame.error
            self._fail(pending, error, effects)
            return
        effects.unreadable.append(frame.error)
        if frame.kind == Kind.REQUEST and is_address(frame.name):
            code = "too_large" if isinstance(frame.error, FrameTooBig) else "unreadable"
            self._refuse(frame.name, frame.id, code, f"the request can't be read: {frame.error}")

    def _on_error(self, envelope: Envelope, effects: Effects[M]) -> None:
        if envelope.flags & Flag.ACK and envelope.name != BROKER:
            # It concerns a request that this client has received.
            self._on_cancel(envelope, effects)
            return
        fields = _json_object(envelope.payload, _MAX_ERROR_COST) or {}
        max_length = _MAX_TEXT if envelope.name == BROKER else _MAX_CLIENT_TEXT
        code, text = _text(fields.get("code"), _MAX_CODE), _text(fields.get("message"), max_length)
        name = _text(fields.get("name"), _MAX_NAME)
        pending = self._pending_calls.get(envelope.id)
        if envelope.name != BROKER:
            if (
                pending is None
                or pending.purpose is not Purpose.REQUEST
                or not pending.answered_by(envelope.name)
            ):
                self.late += 1
                return
            self._pending_calls.pop(envelope.id)
            # Only the broker may use its error codes: a client's error is always a
            # RequestFailed.
            failed = RequestFailed(
                text, name=envelope.name, message_id=envelope.id, code=code or None
            )
            effects.outcomes.append((pending.waiter, failed))
            return
        code = code or RequestFailed.code
        text = text or f"no reason was given ({code})"
        if envelope.flags & Flag.ACK:
            self._on_ack_refused(code, text, envelope.id, effects)
            return
        host, addresses = place_in(fields)
        error = refusal(
            code,
            text,
            name=name,
            message_id=envelope.id,
            seq=_number(fields.get("seq")),
            names=_names(fields.get("names")),
            host=host,
            addresses=addresses,
        )
        if pending is None and envelope.id == 0 and code in _ENDINGS and name in ("", BROKER):
            effects.broken = Disconnected(f"the broker closes the connection ({code}): {error}")
            effects.broken.__cause__ = error
            return
        if pending is None and envelope.id in self._given_up:
            del self._given_up[envelope.id]
            self.late += 1
            return
        if pending is None or not pending.concerned_by(name, error.names):
            if code == Denied.code and self._has_answered(envelope.id):
                # The requester already has its outcome, or is disconnected: no message
                # was lost.
                self.late += 1
                return
            effects.undelivered.append(error)
            return
        self._pending_calls.pop(envelope.id)
        self._on_refusal(pending, error, effects)

    def _on_ack_refused(self, code: str, text: str, seq: int, effects: Effects[M]) -> None:
        """Count an ACK that came too late; report any other that the broker refused."""
        if code == Expired.code:
            self.late += 1
        else:
            text = f"message {seq} of the mailbox was not acknowledged: {text}"
            effects.undelivered.append(refusal(code, text, seq=seq))

    def _on_refusal(self, pending: Pending, error: BrokerdError, effects: Effects[M]) -> None:
        """Give a pending call the broker's refusal as its outcome."""
        self.forget_subscription(pending)
        if pending.purpose is Purpose.WHOAMI:
            effects.broken = Disconnected(f"the broker refused the connection: {error}")
            effects.broken.__cause__ = error
        elif pending.purpose is Purpose.RESUBSCRIBE:
            assert pending.entry is not None
            self._end(list(pending.entry.sinks), pending.entry, error, effects)
        elif pending.purpose is Purpose.RESYNC:
            self._end([pending.sink], None, error, effects)
        elif pending.purpose is Purpose.MAILBOX:
            self._on_no_mailbox(error, effects, self._now)
        elif isinstance(pending, Post) and self._keep_post(pending, error, self._now):
            return
        elif pending.purpose is Purpose.RELISTEN:
            if self.listener is pending.sink:
                self.listener = None
                effects.ended.append((pending.sink, error))
        elif pending.waiter is not None:
            if pending.limit_s is not None and isinstance(error, Expired):
                # Its ttl is the caller's timeout, which the broker's clock met first.
                error = pending.timed_out()
            effects.outcomes.append((pending.waiter, error))

    def _end(
        self,
        sinks: Sequence[object],
        entry: SubscriptionEntry | None,
        error: BrokerdError,
        effects: Effects[M],
    ) -> None:
        """Report to the sinks that their subscription or watch has ended."""
        for sink in sinks:
            if not isinstance(sink, presence.Watch):
                assert entry is not None
                self._subscriptions.discard(entry, sink)
                effects.ended.append((sink, error))
            elif sink in self._watches:
                self._drop_watch(sink)
                effects.ended.append((sink.sink, error))

    def forget_subscription(self, pending: Pending) -> None:
        """Remove the call's subscription, watch or listener here; the broker has none to
        remove.
        """
        if pending.purpose is Purpose.SUBSCRIBE:
            assert pending.entry is not None
            self._subscriptions.discard(pending.entry, pending.sink)
        elif pending.purpose is Purpose.WATCH:
            self._drop_watch(pending.sink)
        elif pending.purpose is Purpose.LISTEN and self.listener is pending.sink:
            self.listener = None

    def _drop_watch(self, watch: presence.Watch) -> None:
        for entry in self._watches.pop(watch, ()):
            self._subscriptions.discard(entry, watch)


def _may_answer(frame: Unreadable, pending: Pending) -> bool:
    """Return whether an unreadable frame with the id of the call is the answer to it."""
    if frame.kind == Kind.RECEIPT:
        return pending.purpose is Purpose.RECEIPT
    if frame.kind == Kind.REPLY and pending.purpose is Purpose.RECEIPT:
        return False
    return frame.kind in (Kind.REPLY, Kind.ERROR) and (
        frame.name in ("", BROKER)
        or (pending.purpose is Purpose.REQUEST and pending.answered_by(frame.name))
    )


def _json_object(body: bytes, max_cost: int) -> dict[str, Any] | None:
    """Return the JSON object in the bytes.

    Return None if the bytes are not an object, or if it may cost more than ``max_cost``
    bytes of memory.
    """
    if len(body) + _VALUE_COST * sum(map(body.count, (b",", b":", b"[", b"{"))) > max_cost:
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(value: object, max_length: int) -> str:
    """Return the first ``max_length`` characters of a received text; "" for a value of
    another type.

    Lone surrogates, which have no UTF-8 form, are replaced.
    """
    return value[:max_length].encode(errors="replace").decode() if isinstance(value, str) else ""


def _number(value: object) -> int:
    """Return a received number of 64 bits; 0 for any other value."""
    return value if type(value) is int and 0 <= value <= MAX_ID else 0


def _names(value: object) -> tuple[str, ...]:
    """Return the first _MAX_NAMES texts of a received list; none of another type."""
    names = value[:_MAX_NAMES] if isinstance(value, list) else []
    return tuple(_text(name, _MAX_NAME) for name in names if isinstance(name, str))
