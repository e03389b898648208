"""Handling of received frames: outcomes, events, the end of a subscription. No I/O.

Rules: docs/protocol.md, "Order and outcome" and "Topics". An answer belongs to a call
only if its id fits, and the sender or recipient that it names: see
brokerd_client.protocol.pending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar
from weakref import WeakValueDictionary

from brokerd_client import presence
from brokerd_client.errors import (
    BrokerdError,
    Denied,
    Disconnected,
    DisconnectedByOperator,
    Expired,
    FrameTooBig,
    KeyRemoved,
    NameTaken,
    ProtocolError,
    Replaced,
    RequestFailed,
    ShuttingDown,
    refusal,
)
from brokerd_client.message import Message, Owner, Receipt
from brokerd_client.protocol.decoder import FrameDecoder, Unreadable
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.pending import Pending, PendingTable, Purpose
from brokerd_client.protocol.subscription_table import SubscriptionEntry, SubscriptionTable
from brokerd_client.wire.envelope import BROKER, Envelope, is_address
from brokerd_client.wire.layout import EVENT_KIND, Flag, Kind

__all__ = ["Inbound"]

M = TypeVar("M", bound=Message)

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
        on_draining: Called with the effects when the broker announces the end of this
            connection.
        withdraw: Called with a call whose answer is not valid. Removes its subscription
            or watch, here and at the broker.
        refuse: Called with sender, id, code and text for a request that can't be read.
            Answers it with an ERROR, if that can be sent.
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
        on_draining: Callable[[Effects[M]], object],
        withdraw: Callable[[Pending], object],
        refuse: Callable[[str, int, str, str], object],
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
        self._on_draining = on_draining
        self._withdraw = withdraw
        self._refuse = refuse
        self._has_answered = has_answered
        #: Whether the broker will announce the end of this connection.
        self._goaway = False
        #: Requests that were received and may still be answered, by sender and id.
        self._open: WeakValueDictionary[tuple[str, int], M] = WeakValueDictionary()
        #: Ids of this client's own requests whose outcome no caller awaits any more.
        self._given_up: dict[int, None] = {}
        self._decoder = FrameDecoder(message, largest)
        self.accept(largest)

    def accept(self, largest: int) -> None:
        """Accept messages of up to ``largest`` bytes from now on."""
        self._decoder.accept(largest)
        self._max_list_cost = _LIST_FACTOR * largest

    def reset(self) -> None:
        """Forget the incomplete frame and the promised goaway, for a new connection."""
        self._decoder.reset()
        self._goaway = False

    def read(self, data: bytes, owner: Owner, effects: Effects[M], now: float) -> None:
        """Handle every complete frame in the received bytes.

        Args:
            owner: The client of the messages.
            effects: Where the effects are added.
            now: The time, in seconds.

        Raises RemoteError if the connection has to end.
        """

        def handle_frame(frame: M | Envelope | Unreadable) -> None:
            if isinstance(frame, Unreadable):
                self._on_unreadable(frame, effects)
            elif not isinstance(frame, Envelope):
                if frame._kind == EVENT_KIND:
                    self._on_event(frame, effects)
                else:
                    self._on_reply(frame, effects, now)
            elif frame.kind is Kind.ERROR:
                self._on_error(frame, effects)
            else:
                self._on_receipt(frame.id, effects)

        effects.size += self._decoder.read(data, owner, effects.messages, handle_frame)
        for request in self._decoder.requests:
            if request.extension is not None:
                request.set_deadline(now)
            self._open[request.sender, request.id] = request

    def give_up(self, message_id: int) -> None:
        """Remember that no caller awaits the outcome of a request any more."""
        if len(self._given_up) >= _MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[message_id] = None

    def close_request(self, sender: str, message_id: int) -> None:
        """Forget a request that is answered."""
        self._open.pop((sender, message_id), None)

    def lost(self) -> None:
        """Forget all open requests of a lost connection.

        Their handlers go on: a short outage must not stop what they have begun.
        """
        self._open.clear()
        self._given_up.clear()

    def _on_cancel(self, envelope: Envelope, effects: Effects[M]) -> None:
        request = self._open.pop((envelope.name, envelope.id), None)
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

    def _on_receipt(self, message_id: int, effects: Effects[M]) -> None:
        pending = self._pending_calls.get(message_id)
        if pending is None or pending.purpose is not Purpose.RECEIPT:
            self.late += 1
            return
        self._pending_calls.pop(message_id)
        effects.outcomes.append((pending.waiter, Receipt(message_id, pending.to or pending.about)))

    def _on_reply(self, message: M, effects: Effects[M], now: float) -> None:
        pending = self._pending_calls.get(message.id)
        if (
            pending is None
            or pending.purpose is Purpose.RECEIPT
            or not pending.answered_by(message.sender)
        ):
            self.late += 1
            return
        if pending.purpose is Purpose.REQUEST:
            self._pending_calls.pop(message.id)
            effects.outcomes.append((pending.waiter, message))
            return
        try:
            answer = self._answer(pending, message, effects, now)
        except ProtocolError as error:
            self._fail(pending, error, effects)
            return
        self._pending_calls.pop(message.id)
        if pending.waiter is not None:
            effects.outcomes.append((pending.waiter, answer))

    def _answer(
        self, pending: Pending, message: M, effects: Effects[M], now: float
    ) -> dict[str, Any]:
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
            self._on_introduction(answer, effects, now)
        elif pending.purpose is Purpose.GOAWAY:
            self._goaway = True
        elif pending.purpose is Purpose.FINISHED:
            effects.broken = Disconnected(
                "the broker closes the connection: it stops, or another process replaces it"
            )
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
        if envelope.flags & Flag.ACK:
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
        error = refusal(
            code, text or f"no reason was given ({code})", name=name, message_id=envelope.id
        )
        if pending is None and envelope.id == 0 and code in _ENDINGS and name in ("", BROKER):
            effects.broken = Disconnected(f"the broker closes the connection ({code}): {error}")
            effects.broken.__cause__ = error
            return
        if pending is None and envelope.id in self._given_up:
            del self._given_up[envelope.id]
            self.late += 1
            return
        if pending is None or not pending.concerned_by(name):
            if code == Denied.code and self._has_answered(envelope.id):
                # The requester already has its outcome, or is disconnected: no message
                # was lost.
                self.late += 1
                return
            effects.undelivered.append(error)
            return
        self._pending_calls.pop(envelope.id)
        self._on_refusal(pending, error, effects)

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
        """Remove the call's subscription or watch here; the broker has none to remove."""
        if pending.purpose is Purpose.SUBSCRIBE:
            assert pending.entry is not None
            self._subscriptions.discard(pending.entry, pending.sink)
        elif pending.purpose is Purpose.WATCH:
            self._drop_watch(pending.sink)

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
