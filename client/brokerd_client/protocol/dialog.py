"""The conversation of one client with the broker, sans-I/O: bytes in, what they mean out, and bytes to send.

Rules: docs/protocol.md. A dialog opens no socket, reads no clock and draws no lots: ``now``, nonces, the first id
and the chance of a wait are arguments. The faces (blocking, aio) move the bytes, sleep until :meth:`next_deadline`
and wake who waits; every rule is here or in the dialog's parts (reception, outgoing, incoming, awaiting, routes,
presence), and told to them in a :class:`Effects`.

Every send has one outcome. One that asked to hear of it is in ``pending_calls`` until it has; the others are heard of
when they fail. When the connection goes, a send whose frame may have left this process is in doubt, one whose frame
has not was not sent; neither is ever repeated here.

A face calls :meth:`dialing`, :meth:`opened`, then :meth:`receive` with what arrives, and after *every* call writes
:meth:`data_to_send` and says how much of it went with :meth:`wrote`; :meth:`lost` when the connection is gone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from brokerd_client import presence
from brokerd_client.errors import (
    AuthenticationError,
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    ProtocolError,
    TimedOut,
)
from brokerd_client.message import Message, Owner
from brokerd_client.protocol import backoff
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.encoder import Outgoing
from brokerd_client.protocol.inbound import Reception
from brokerd_client.protocol.inbox import STRETCH, largest_message
from brokerd_client.protocol.pending import Pending, Purpose
from brokerd_client.protocol.state import NEXT, Event, State
from brokerd_client.protocol.subscription_table import SubscriptionEntry
from brokerd_client.wire import handshake
from brokerd_client.wire.channel_binding import Bindings
from brokerd_client.wire.envelope import (
    BROKER,
    Flag,
    Kind,
    check_name,
    check_pattern,
    is_address,
    is_name,
    split_address,
)
from brokerd_client.wire.foreign_protocols import SILENT
from brokerd_client.wire.framing import FrameReader, frame

__all__ = ["LINGER_S", "Dialog", "Effects"]

M = TypeVar("M", bound=Message)

#: Seconds that outcomes are still taken in after close().
LINGER_S: Final = 0.5
#: Bytes that may wait to leave while the dialog answers, by itself, requests that can't be read.
_ANSWERING: Final = 2**18
#: The ids of what is put out later are so much above the others, which are below 2**62 when a client begins.
_LATE_IDS: Final = 2**63
#: Doublings of the first wait before connecting for the first time is tried again.
_CROWDED: Final = 3

_MESSAGE_KIND: Final = int(Kind.MESSAGE)
#: Looking into an enum takes as long as a few other lines of a send.
_READY: Final = State.READY
#: States in which an answer can be sent.
_LINKED: Final = (State.READY, State.DRAINING)


class Dialog(Reception[M]):
    """One client's conversation, over as many connections as it takes.

    key: never shown. name: "" where only the key says who we are. first_id: a random number below 2**62, so that
        nobody else's ids are ours. message: the class of what is received. reconnect: whether a loss is followed
        by another try. timeout_s: seconds for connecting, handshake and introduction. inbox: bytes of messages that
        the client keeps; with it grows the longest message that is accepted.
    """

    def __init__(
        self,
        key: bytes,
        name: str,
        first_id: int,
        message: type[M],
        *,
        reconnect: bool = True,
        timeout_s: float = 10.0,
        inbox: int = 0,
    ) -> None:
        self._largest = largest_message(inbox)
        super().__init__(message, self._largest)
        self.state = State.IDLE
        self.name = name
        #: ``name``, or ``name/instance`` where the name is a pool's; "" before the first introduction.
        self.address = ""
        #: The broker's answer to ``whoami``.
        self.introduction: dict[str, Any] = {}
        #: When the next try is due, in WAITING.
        self.retry_at = 0.0
        #: Why there is no connection, where there is none.
        self.reason: BrokerdError | None = None
        #: Connections that were lost.
        self.losses = 0
        self._key = key
        self._first_id = self._next_id = first_id
        #: Ids for what is put out later with ``send_as`` or ``publish_as``. Taking one is a single step.
        self.late_ids = itertools.count(_LATE_IDS + first_id)
        self._reconnect = reconnect
        self._timeout_s = timeout_s
        self._link_deadline: float | None = None
        self._attempt = 0
        self._ready_since = 0.0
        self._introduced = False
        #: Until when connecting for the first time may be tried again; None before the first try.
        self._first_deadline: float | None = None
        self._handshake: handshake.Handshake | None = None
        #: Whether the listener has sent its challenge.
        self._challenged = False
        #: Whether the broker tells before it closes this connection; and whether ``finished`` has been sent on it.
        self._goaway = self._finishing = False
        self._reader = FrameReader()
        self._outgoing = Outgoing()
        #: Return what is to be written, and forget it. Every send asks: this saves it a call.
        self.data_to_send: Callable[[], bytes] = self._outgoing.data
        #: Called with how many more bytes the face has handed to the operating system.
        self.wrote: Callable[[int], None] = self._outgoing.wrote
        #: The same in two steps, between which an interrupted call of the face loses nothing.
        self.peek: Callable[[], bytes] = self._outgoing.peek
        self.took: Callable[[int], None] = self._outgoing.took

    # The link

    def dialing(self, now: float) -> None:
        """The face begins to connect."""
        self._step(Event.DIAL)
        if self._first_deadline is None:
            self._first_deadline = now + self._timeout_s
        self._link_deadline = now + self._timeout_s if self._introduced else self._first_deadline

    def opened(self, nonce: bytes, bindings: Bindings | None = None) -> None:
        """There is a connection; nonce: fresh random bytes for the handshake. bindings: of TLS, for the key."""
        self._step(Event.OPEN)
        self._goaway = self._finishing = False
        self._reader = FrameReader()
        self._incoming.reset()
        self._outgoing.reset()
        self._handshake = handshake.as_dialer(
            self._key, nonce, name=self.name.encode(), allow_md5=False, bindings=bindings
        )
        first = next(self._handshake)
        assert first is handshake.RECEIVE, "the listener speaks first"

    def receive(self, data: bytes, owner: Owner, now: float) -> Effects[M]:
        """Take in bytes of the connection. owner: the client that the messages will belong to.

        Whatever goes wrong with them ends the connection, and with it every call that waits: ``effects.broken``.
        """
        effects: Effects[M] = Effects()
        try:
            if self._handshake is not None:
                data = self._authenticate(data)
            if data:
                self._read(data, owner, effects, now)
        except (AuthenticationError, ProtocolError) as error:
            effects.broken = error
        except Exception as error:  # noqa: BLE001 - a mistake of ours, too, must not leave a call without its outcome
            what = f"{error}" if isinstance(error, BrokerdError) else f"{type(error).__name__}: {error}"
            effects.broken = ProtocolError(f"what the broker sent can't be understood: {what}")
            effects.broken.__cause__ = error
        self._finish()
        for refusal in effects.undelivered:
            self._outgoing.refused(getattr(refusal, "id", 0))
        return effects

    def in_order(self, waiting: int) -> bool:
        """Return whether every byte put out is the operating system's, or among the ``waiting`` bytes of the face."""
        return self._outgoing.in_order(waiting)

    def recover(self, given: int, waiting: int) -> None:
        """Count again what was put out, after a call of the face that was interrupted: see Outgoing.recover."""
        self._outgoing.recover(given, waiting)

    @property
    def unwritten(self) -> int:
        """Bytes put out that :meth:`wrote` has not been told of; after an interrupted call some of these have left."""
        return max(0, self._outgoing.queued - self._outgoing.written)

    @property
    def untaken(self) -> int:
        """Bytes that wait for :meth:`data_to_send`."""
        return self._outgoing.untaken

    def lost(
        self, reason: BrokerdError, now: float, jitter: float, *, doubtful: int = 0, at_once: bool = False
    ) -> Effects[M]:
        """The connection is gone, or could not be made: every send has its outcome now.

        chance: a random number in [0, 1). doubtful: bytes beyond those told to :meth:`wrote` that may have left.
        at_once: the face has ended it for a reason of its own, so that the next try need not wait.
        """
        effects: Effects[M] = Effects()
        lived = now - self._ready_since if self.state in _LINKED else 0.0
        again = self._reconnect if self._introduced else self._was_cut_off(reason)
        attempt = 0 if lived >= backoff.CAP_S else self._attempt
        if not self._introduced:
            # The broker has no room, so that many others try too: the waits begin longer.
            attempt += _CROWDED
        wait = backoff.delay(attempt, jitter)
        if not self._introduced and self._first_deadline is not None:
            again = again and now + wait < self._first_deadline
        self._step(Event.LOSE if again else Event.GIVE_UP)
        self.reason = reason
        if self._introduced or not again:
            self.losses += 1
        self._handshake = None
        self._outgoing.drop()
        self._link_deadline = None
        if self.state is State.WAITING:
            # A link that breaks at once must not be tried at once again, for ever.
            self._attempt = 0 if lived >= backoff.CAP_S else self._attempt
            self.retry_at = now
            if not at_once:
                self.retry_at += wait
                self._attempt += 1
        may_have_left = self._outgoing.written + doubtful
        for pending in self.pending_calls.clear():
            self._forget_subscription(pending)
            if pending.waiter is not None:
                left = pending.end <= may_have_left
                effects.outcomes.append(
                    (pending.waiter, self._loss(pending.id, pending.to or pending.about, left=left))
                )
        for end, message_id, to in self._outgoing.take_unwritten():
            effects.undelivered.append(self._loss(message_id, to, left=end <= may_have_left))
        self.undelivered += len(effects.undelivered)
        for watch in self._watches:
            watch.disconnected()
        return effects

    def _was_cut_off(self, reason: BrokerdError) -> bool:
        """Return whether the peer ended the connection before it had let us in, without a word.

        A broker does that when it has more unfinished handshakes than it has room for. Nothing was sent by then that
        could be sent twice.
        """
        under_way = self.state in (State.AUTHENTICATING, State.INTRODUCING)
        # What has a cause behind it is the broker's refusal.
        return reason.cut_off or (under_way and type(reason) is Disconnected and reason.__cause__ is None)

    @property
    def beginning(self) -> bool:
        """Whether it is not decided yet what becomes of connecting for the first time."""
        return not self._introduced and self.state not in (State.GONE, State.CLOSING, State.CLOSED)

    def close(self, now: float) -> Effects[M]:
        """The caller closes: who waits hears Closed; what the broker still says is taken in for LINGER_S."""
        effects: Effects[M] = Effects()
        self._step(Event.CLOSE)
        if self.state is State.CLOSING:
            self._link_deadline = now + LINGER_S
        else:
            self._link_deadline = None
        for pending in self.pending_calls.clear():
            if pending.waiter is not None:
                effects.outcomes.append((pending.waiter, Closed("the client was closed while this call was waiting")))
        return effects

    @property
    def counters(self) -> dict[str, int]:
        """What has gone wrong so far, by name."""
        return {
            "late": self.late,
            "undelivered": self.undelivered,
            "unreadable": self.unreadable,
            "unrouted": self.unrouted,
            "losses": self.losses,
        }

    def next_deadline(self) -> float | None:
        """Return when :meth:`tick` is to be called at the latest, or, in WAITING, the next try is due."""
        if self.state is State.WAITING:
            return self.retry_at
        earliest = self.pending_calls.deadline()
        if self._link_deadline is None:
            return earliest
        return self._link_deadline if earliest is None else min(earliest, self._link_deadline)

    def tick(self, now: float) -> Effects[M]:
        """Time has passed: give up what is overdue."""
        effects: Effects[M] = Effects()
        if self._link_deadline is not None and self._link_deadline <= now:
            self._link_deadline = None
            silent = self.state is State.AUTHENTICATING and not self._challenged
            why = SILENT if silent else self.state.value
            effects.broken = TimedOut(f"the broker did not answer within {self._timeout_s:g} s ({why})")
        for pending in self.pending_calls.overdue(now):
            # What has a deadline has a waiter.
            self._withdraw(pending)
            to = pending.to or pending.about
            effects.outcomes.append((pending.waiter, TimedOut(f"no answer from {to} to {pending.id} in time")))
        self._finish()
        return effects

    # What a caller sends. Each needs a READY link, and raises Disconnected or Closed where there is none

    def send(self, to: str, codec: int, body: bytes, extension: Mapping[str, Any] | None = None) -> int:
        """Put out a MESSAGE nobody waits for; return its id."""
        if self.state is not _READY:
            self.require_ready()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._outgoing.put(_MESSAGE_KIND, 0, message_id, to, codec, body, extension)
        self._outgoing.without_receipt(message_id, to)
        return message_id

    def send_many(self, to: Sequence[str], codecs: Sequence[int], bodies: Sequence[bytes]) -> list[int]:
        """Put out a MESSAGE each, which nobody waits for; return their ids."""
        self.require_ready()
        first = self._next_id
        ids = range(first, first + len(to))
        self._outgoing.put_messages(ids, to, codecs, bodies)
        self._next_id = ids.stop
        return list(ids)

    def send_as(self, message_id: int, to: str, codec: int, body: bytes, extension: Mapping[str, Any] | None) -> None:
        """Put out a MESSAGE whose id the face has given already."""
        self.require_ready()
        self._outgoing.put(_MESSAGE_KIND, 0, message_id, to, codec, body, extension)
        self._outgoing.without_receipt(message_id, to)

    def publish_as(
        self, message_id: int, topic: str, codec: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> None:
        """Put out an EVENT whose id the face has given already."""
        self.require_ready()
        self._outgoing.put_event(0, message_id, topic, codec, body, extension)
        self._outgoing.without_receipt(message_id, topic)

    def publish(self, topic: str, codec: int, body: bytes, extension: Mapping[str, Any] | None = None) -> int:
        """Put out an EVENT nobody waits for; return its id."""
        message_id = self._take_id()
        self._outgoing.put_event(0, message_id, topic, codec, body, extension)
        self._outgoing.without_receipt(message_id, topic)
        return message_id

    def send_for_receipt(
        self,
        to: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
        waiter: object,
        deadline: float | None,
    ) -> int:
        """Put out a MESSAGE; the waiter gets a Receipt or an error."""
        message_id = self._take_id()
        self._outgoing.put(Kind.MESSAGE, Flag.RECEIPT, message_id, to, codec, body, extension)
        self.pending_calls.add(Pending(message_id, Purpose.RECEIPT, to, self._outgoing.queued, waiter, deadline))
        return message_id

    def publish_for_receipt(
        self,
        topic: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
        waiter: object,
        deadline: float | None,
    ) -> int:
        """Put out an EVENT; the waiter gets a Receipt or an error."""
        message_id = self._take_id()
        self._outgoing.put_event(Flag.RECEIPT, message_id, topic, codec, body, extension)
        self.pending_calls.add(
            Pending(message_id, Purpose.RECEIPT, "", self._outgoing.queued, waiter, deadline, about=topic)
        )
        return message_id

    def request(
        self,
        to: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
        waiter: object,
        deadline: float | None,
    ) -> int:
        """Put out a REQUEST; the waiter gets the REPLY or an error."""
        message_id = self._take_id()
        self._outgoing.put(Kind.REQUEST, 0, message_id, to, codec, body, extension)
        self.pending_calls.add(Pending(message_id, Purpose.REQUEST, to, self._outgoing.queued, waiter, deadline))
        return message_id

    def reply(
        self, to: str, message_id: int, codec: int, body: bytes, extension: Mapping[str, Any] | None = None
    ) -> None:
        """Put out the REPLY to a request; id: the request's."""
        self._require_link()
        self._outgoing.put(Kind.REPLY, 0, message_id, to, codec, body, extension)
        self._outgoing.without_receipt(message_id, to)

    def fail(self, to: str, message_id: int, code: str, text: str) -> None:
        """Put out an ERROR as the answer to a request; id: the request's."""
        self._require_link()
        self._refuse(to, message_id, code, text)

    def control(self, op: str, arguments: Mapping[str, Any], waiter: object, deadline: float | None) -> int:
        """Ask the broker for an operation; the waiter gets its answer, a dict, or an error."""
        self.require_ready()
        about = next((value for value in arguments.values() if isinstance(value, str)), "")
        return self._operate(op, arguments, Purpose.CONTROL, waiter, deadline, about).id

    def subscribe(
        self, pattern: str, group: str | None, sink: object, waiter: object, deadline: float | None
    ) -> tuple[int, SubscriptionEntry]:
        """Give the sink the events that fit, and ask the broker for them; the waiter gets a dict or an error."""
        check_pattern(pattern)
        word = check_name(group) if group is not None else ""
        self.require_ready()
        entry = self.subscriptions.add(pattern, word, sink)
        pending = self._operate("subscribe", entry.arguments, Purpose.SUBSCRIBE, waiter, deadline, pattern)
        pending.entry, pending.sink = entry, sink
        return pending.id, entry

    def unsubscribe(self, entry: SubscriptionEntry, sink: object, waiter: object, deadline: float | None) -> int | None:
        """Give the sink nothing more; None where there is no answer of the broker to wait for."""
        if not self.subscriptions.discard(entry, sink) or self.state is not State.READY:
            return None
        return self._operate("unsubscribe", entry.arguments, Purpose.CONTROL, waiter, deadline, entry.pattern).id

    def watch(self, sink: object, waiter: object, deadline: float | None) -> tuple[int, presence.Watch]:
        """Tell the sink who is online, and every change; the waiter gets a dict or an error."""
        self.require_ready()
        watch = presence.Watch(sink)
        self._watches[watch] = [self.subscriptions.add(pattern, "", watch) for pattern in presence.PATTERNS]
        for entry in self._watches[watch]:
            self._resubscribe(entry)
        pending = self._operate("clients", {}, Purpose.WATCH, waiter, deadline)
        pending.sink = watch
        return pending.id, watch

    def unwatch(self, watch: presence.Watch) -> None:
        """Tell the watch's sink nothing more."""
        for entry in self._watches.pop(watch, ()):
            self._leave(entry, watch)

    def abandon(self, message_id: int) -> None:
        """Nobody waits for this outcome any more: what comes of it is counted, and dropped."""
        pending = self.pending_calls.pop(message_id)
        if pending is not None:
            self._withdraw(pending)
            self._finish()

    def forsake(self, waiter: object) -> None:
        """Expect no outcome for the waiter any more: its caller was interrupted."""
        for pending in self.pending_calls.of(waiter):
            self.abandon(pending.id)

    def forget(self, sink: object) -> None:
        """Give the sink of a subscription or watch nothing more, however far the call that makes it has come."""
        for watch in [each for each in self._watches if each.sink is sink]:
            self.unwatch(watch)
        for entry in [each for each in self.subscriptions if sink in each.sinks]:
            self._leave(entry, sink)

    # Sending, below

    def hung_up(self) -> Disconnected:
        """Return the error for a connection that the broker has closed; it says how far we were, if not through."""
        at = "" if self.state is State.READY else f" ({self.state.value})"
        return Disconnected(f"the broker closed the connection{at}")

    def require_ready(self) -> None:
        """Raise Closed or Disconnected unless messages flow."""
        if self.state is State.READY:
            return
        if self.state in (State.CLOSING, State.CLOSED):
            raise Closed("the client is closed")
        raise Disconnected(f"there is no connection to the broker: {self.reason or self.state.value}")

    @property
    def may_answer(self) -> bool:
        """Whether an answer can be sent."""
        return self.state in _LINKED

    def _require_link(self) -> None:
        """Raise Closed or Disconnected unless answers can be sent."""
        if self.state not in _LINKED:
            self.require_ready()

    def _take_id(self) -> int:
        if self.state is not State.READY:
            self.require_ready()
        message_id = self._next_id
        self._next_id = message_id + 1
        return message_id

    def _operate(
        self,
        op: str,
        arguments: Mapping[str, Any],
        purpose: Purpose,
        waiter: object = None,
        deadline: float | None = None,
        about: str = "",
    ) -> Pending:
        """Put out a REQUEST to the broker itself, in whatever state."""
        body = json.dumps({"op": op, **arguments}, separators=(",", ":")).encode()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._outgoing.put(Kind.REQUEST, 0, message_id, BROKER, 2, body, None)
        pending = Pending(message_id, purpose, BROKER, self._outgoing.queued, waiter, deadline, about)
        self.pending_calls.add(pending)
        return pending

    def _resubscribe(self, entry: SubscriptionEntry) -> None:
        self._operate("subscribe", entry.arguments, Purpose.RESUBSCRIBE, about=entry.pattern).entry = entry

    def _leave(self, entry: SubscriptionEntry, sink: object) -> None:
        if self.subscriptions.discard(entry, sink) and self.state is State.READY:
            self._operate("unsubscribe", entry.arguments, Purpose.FORGET)

    def _withdraw(self, pending: Pending) -> None:
        """Undo what a caller who has given up was about to get."""
        if pending.purpose is Purpose.SUBSCRIBE:
            assert pending.entry is not None
            self._leave(pending.entry, pending.sink)
        elif pending.purpose is Purpose.WATCH:
            self.unwatch(pending.sink)

    def _loss(self, message_id: int, to: str, *, left: bool) -> Disconnected:
        why = f"the connection to the broker is gone ({self.reason})"
        if left:
            return InDoubt(f"{why}, and what became of {message_id} to {to} is not known", id=message_id)
        return Disconnected(f"{why}, and {message_id} to {to} was not sent", id=message_id)

    def _step(self, step: Event) -> None:
        follows = NEXT[self.state].get(step)
        assert follows is not None, f"{step.name} can't happen in {self.state.name}"
        self.state = follows

    # Receiving, below

    def _authenticate(self, data: bytes) -> bytes:
        """Go on with the handshake; return the bytes behind it."""
        assert self._handshake is not None
        self._reader.feed(data)
        try:
            while (body := handshake.next_message(self._reader)) is not None:
                self._challenged = True
                step = self._handshake.send(body)
                while isinstance(step, handshake.Send):
                    self._outgoing.put_frame(frame(step.body))
                    step = self._handshake.send(None)
        except StopIteration as end:
            if end.value is None:
                # An exception, of a signal handler for instance, has ended it before.
                raise AuthenticationError("the handshake was cut off at this end") from None
            self._handshake = None
            self._step(Event.AUTHENTICATE)
            self._introduce()
            return self._reader.take_rest()
        except AuthenticationError as error:
            raise AuthenticationError(f"{error} (as {self.name or 'whoever the key names'})") from error
        return b""

    def _introduce(self) -> None:
        """Ask who we are, and for everything we had subscribed to."""
        self._operate("whoami", {}, Purpose.WHOAMI)
        self._operate("goaway", {}, Purpose.GOAWAY)
        for entry in self.subscriptions:
            self._resubscribe(entry)
        for watch in self._watches:
            self._operate("clients", {}, Purpose.RESYNC).sink = watch

    def _has_answered(self, message_id: int) -> bool:
        if self._first_id <= message_id < self._next_id or message_id >= _LATE_IDS + self._first_id:
            return False
        self._outgoing.refused(message_id)
        return True

    def _refuse_unreadable(self, to: str, message_id: int, code: str, text: str) -> None:
        # A broker that sends them and reads nothing can't fill memory with the answers.
        if self._outgoing.queued - self._outgoing.written < _ANSWERING:
            self._refuse(to, message_id, code, text)

    def _refuse(self, to: str, message_id: int, code: str, text: str) -> None:
        if self.state in (State.INTRODUCING, State.READY, State.DRAINING):
            body = json.dumps({"code": code, "message": text, "name": self.name}).encode()
            self._outgoing.put(Kind.ERROR, 0, message_id, to, 2, body, None)
            self._outgoing.without_receipt(message_id, to)

    def _on_goaway(self) -> None:
        self._goaway = True

    def _on_draining(self) -> bool:
        """Send only answers from now on; return whether this connection had asked to be told."""
        if self._goaway and self.state is State.READY:
            self._step(Event.DRAIN)
        return self._goaway

    def _finish(self) -> None:
        """Ask whether all that was sent is written or reported, once no call waits for its outcome."""
        if self.state is State.DRAINING and not self._finishing and not self.pending_calls:
            self._finishing = True
            self._operate("finished", {}, Purpose.FINISHED)

    def _on_introduction(self, answer: dict[str, Any], effects: Effects[M], now: float) -> None:
        name, address, limits = answer.get("name"), answer.get("address"), answer.get("limits", {})
        if not isinstance(name, str) or not is_name(name):
            raise ProtocolError("the broker's introduction has no valid name for this client")
        if self.name and name != self.name:
            raise ProtocolError(f"the broker calls this client {name}, and it is {self.name}")
        if not isinstance(address, str) or not is_address(address) or split_address(address)[0] != name:
            raise ProtocolError(f"the broker's introduction has no valid address for {name}")
        most = limits.get("max_message", 0) if isinstance(limits, dict) else None
        if type(most) is not int or most < 0:
            raise ProtocolError("the broker's introduction has limits that are not valid")
        self.name, self.address = name, address
        self.introduction = answer
        self._step(Event.INTRODUCE)
        if not self._introduced:
            # Tries to connect for the first time say nothing of later ones.
            self._introduced, self._attempt = True, 0
        self._link_deadline = None
        self._ready_since = now
        self.reason = None
        if most > self._largest:
            effects.warnings.append(
                f"the broker passes on messages of up to {most} bytes, and this client accepts {self._largest}: "
                f"give it an inbox of at least {-(-most // STRETCH)} bytes"
            )
