"""One client's conversation with the broker, sans-I/O: bytes in, effects and bytes out.

Rules: docs/protocol.md. A dialog opens no socket, reads no clock and draws no random
numbers. ``now``, nonces, the first id and the jitter of a wait are arguments. The faces
(blocking, aio) move the bytes, sleep until :meth:`next_deadline` and wake the waiting
callers. Every rule is here or in the dialog's parts: inbound, decoder, encoder,
pending, subscription_table, presence. The faces learn the effects from an
:class:`Effects`.

Every send has one outcome. A send that asked for its outcome stays in ``pending_calls``
until the outcome comes. Other sends are reported only when they fail. When the
connection is lost, a send whose frame may have left this process is in doubt. A send
whose frame has not left was not sent. Neither is ever repeated here.

A face calls :meth:`dialing`, :meth:`opened`, then :meth:`receive` with each piece of
input. After *every* call it writes :meth:`data_to_send` and reports the number of
written bytes with :meth:`wrote`. When the connection is gone it calls :meth:`lost`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

from brokerd_client import presence
from brokerd_client.address import Address
from brokerd_client.connection_event import ConnectionEvent
from brokerd_client.errors import (
    AuthenticationError,
    BrokerdError,
    Closed,
    Disconnected,
    Elsewhere,
    InDoubt,
    KeyRejected,
    ProtocolError,
    ShuttingDown,
    TimedOut,
    Unsupported,
    WrongUse,
)
from brokerd_client.message import Delivery, Message, Owner
from brokerd_client.protocol import backoff
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.encoder import FrameEncoder
from brokerd_client.protocol.inbound import Inbound
from brokerd_client.protocol.inbox import STRETCH, largest_message
from brokerd_client.protocol.mailbox import Mailbox, ack_body
from brokerd_client.protocol.pending import Pending, PendingTable, Purpose
from brokerd_client.protocol.posts import Post, Posts
from brokerd_client.protocol.state import NEXT, Event, State
from brokerd_client.protocol.subscription_table import SubscriptionEntry, SubscriptionTable
from brokerd_client.wire import handshake
from brokerd_client.wire.channel_binding import Bindings
from brokerd_client.wire.envelope import (
    BROKER,
    Envelope,
    check_name,
    check_pattern,
    encode,
    is_address,
    is_name,
    is_ttl,
    split_address,
)
from brokerd_client.wire.foreign_protocols import SILENT
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.layout import (
    ERROR_KIND,
    JSON_CODEC,
    MESSAGE_KIND,
    RECEIPT_FLAG,
    REPLY_KIND,
    REQUEST_KIND,
    Kind,
)

__all__ = ["LINGER_S", "Dialog", "Effects"]

M = TypeVar("M", bound=Message)

#: Seconds after close() during which outcomes are still received.
LINGER_S: Final = 0.5
#: Limit of unwritten bytes. Above it, the dialog no longer answers unreadable requests
#: with errors.
_MAX_UNWRITTEN: Final = 2**18
#: Added to the first id to get the first late id (see ``late_ids``). The ids of other
#: frames begin below 2**62, so that the two ranges do not meet.
_LATE_IDS: Final = 2**63
#: Extra doublings of the wait between attempts, as long as the first connection has not
#: succeeded.
_FIRST_DOUBLINGS: Final = 3

#: Longest wait between two attempts for a broker that is not up yet, in seconds.
_LONGEST_FIRST_WAIT_S: Final = 1.0

#: Rounds of attempts in a row that find the key rejected, after which the client gives
#: up unless the program has said how long it may try.
_MOST_REJECTIONS: Final = 6

#: Kept in a name because looking up an enum member costs as much as a few other lines
#: of a send.
_READY: Final = State.READY
_RECEIPT: Final = Purpose.RECEIPT
_REQUEST: Final = Purpose.REQUEST
#: States in which an answer can be sent.
_CONNECTED: Final = (State.READY, State.DRAINING)


class Dialog(Generic[M]):
    """One client's conversation with the broker, over all its successive connections.

    Args:
        key: The client's key; it is never shown.
        name: The client's name, or "" if the broker finds the client by its key.
        first_id: A random number below 2**62, so that ids of other clients differ.
        message: The class of received messages.
        without_key: Whether ``key`` is the client's name because no key was given.
        reconnect: Whether another attempt follows a lost connection.
        timeout_s: Seconds for connecting, handshake and introduction together.
        wait_s: Seconds in which the first connection is attempted again, as long as no
            broker is there. With 0 it is attempted once.
        addresses: Number of the broker's addresses.
        give_up_s: Seconds without a connection after which no other attempt follows.
            With None only a rejected key ends the attempts, after a few of them.
        inbox: Limit of the inbox, in bytes. With the broker's ``max_message``, it
            bounds the longest accepted message: see ``inbox.largest_message``.
        window: Most messages of the mailbox that a connection holds; None for the
            broker's own limit.
        window_bytes: The same in bytes.
        usable: Called with addresses of another host. Returns those that the client may
            connect to.
    """

    def __init__(
        self,
        key: bytes,
        name: str,
        first_id: int,
        message: type[M],
        *,
        without_key: bool = False,
        reconnect: bool = True,
        timeout_s: float = 10.0,
        wait_s: float = 0.0,
        addresses: int = 1,
        give_up_s: float | None = None,
        inbox: int = 0,
        window: int | None = None,
        window_bytes: int | None = None,
        usable: Callable[[Sequence[str]], tuple[Address, ...]] = lambda addresses: (),
    ) -> None:
        self.state = State.IDLE
        self.name = name
        #: ``name``, or ``name/instance`` where the name is a pool's; "" before the
        #: first introduction.
        self.address = ""
        #: The broker's answer to ``whoami``.
        self.introduction: dict[str, Any] = {}
        #: When the next attempt to connect is due, in the state WAITING.
        self.retry_at = 0.0
        #: Why the connection was lost or could not be made; None while it is open.
        self.reason: BrokerdError | None = None
        #: Most requests that the broker delivers before they are answered; None before
        #: it was set.
        self._in_flight: int | None = None
        #: Whether no further requests are wanted.
        self._stopped = False
        #: Requests dropped because their requesters did not wait any more.
        self.dropped = 0
        #: Features of the broker of the present connection.
        self._features: frozenset[str] = frozenset()
        #: Connections that were lost after they had been made.
        self.losses = 0
        #: Attempts to connect that failed.
        self.failed_attempts = 0
        #: Failed sends without a waiting call.
        self.undelivered = 0
        self.pending_calls = PendingTable()
        self.posts = Posts()
        self.mailbox = Mailbox(window, window_bytes)
        #: Seconds for which the broker remembers the keys of stored messages; None
        #: without mailboxes.
        self._dedup_s: float | None = None
        self._has_mailbox = False
        self.subscriptions = SubscriptionTable()
        self._watches: dict[presence.Watch, list[SubscriptionEntry]] = {}
        self._key = key
        self._without_key = without_key
        self._first_id = self._next_id = first_id
        #: Ids for frames that are queued later with ``send_as`` or ``publish_as``.
        #: Taking an id is a single step.
        self.late_ids = itertools.count(_LATE_IDS + first_id)
        self._reconnect = reconnect
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._addresses = self._own_addresses = addresses
        self._usable = usable
        #: Addresses of the host of the mailbox, which are tried before all others.
        self.detour: tuple[Address, ...] = ()
        self._give_up_s = give_up_s
        #: When the last connection was lost.
        self._lost_at = 0.0
        #: Rounds of attempts since then in which the key was rejected.
        self._rejections = 0
        #: The text of the last refusal that was reported since then.
        self._reported = ""
        #: Which address the present or next attempt uses, from 0.
        self.turn = 0
        #: The address with which the present round of attempts began: the one that worked
        #: last. Every address is tried once in a round.
        self._round_start = 0
        #: The most telling error of the present round: a refusal rather than no broker.
        self._refused: BrokerdError | None = None
        #: The errors of the present round, one for each address that was tried.
        self._round_errors: list[BrokerdError] = []
        #: Seconds that the present attempt may take.
        self.limit_s = timeout_s
        self._connection_deadline: float | None = None
        self._attempt = 0
        self._ready_since = 0.0
        self._introduced = False
        #: Until when the first connection may be attempted again; None before the first
        #: attempt.
        self._first_deadline: float | None = None
        #: Until when it is attempted again because no broker is up.
        self._wait_end = 0.0
        self._handshake: handshake.Handshake | None = None
        #: Whether the listener has sent its challenge.
        self._challenged = False
        #: Whether ``finished`` was sent on this connection.
        self._finishing = False
        self._reader = FrameReader()
        self._inbox = inbox
        inbound = self._inbound = Inbound(
            message,
            largest_message(inbox),
            pending_calls=self.pending_calls,
            subscriptions=self.subscriptions,
            watches=self._watches,
            on_introduction=self._on_introduction,
            on_no_mailbox=self._on_no_mailbox,
            on_parted=self._on_parted,
            on_draining=self._on_draining,
            withdraw=self._withdraw,
            refuse=self._refuse_unreadable,
            keep_post=self.posts.on_refusal,
            refuse_channel=self._refuse_unheard,
            has_answered=self._has_answered,
        )
        self._encoder = FrameEncoder()
        #: Return the bytes to be written, and forget them. The alias saves each send
        #: one call.
        self.data_to_send: Callable[[], bytes] = self._encoder.data
        #: Report how many more bytes the face has handed to the operating system.
        self.wrote: Callable[[int], None] = self._encoder.wrote
        #: The same in two steps: a call of the face that is interrupted between them
        #: loses nothing.
        self.peek: Callable[[], bytes] = self._encoder.peek
        self.took: Callable[[int], None] = self._encoder.took
        #: In the state READY, decode the most common bytes: see FrameDecoder.
        self.lone_message: Callable[[bytes, Owner], M | None] = inbound.lone_message
        self.answered_request: Callable[[M], Pending | None] = inbound.answered_request
        self.note_request: Callable[[M, float], None] = inbound.note_request

    # The connection

    def dialing(self, now: float) -> None:
        """Record that the face begins to connect."""
        self._step(Event.DIAL)
        if self._first_deadline is None:
            self._first_deadline = now + max(self._timeout_s, self._wait_s)
            self._wait_end = now + self._wait_s
        self.limit_s = self._timeout_s
        if not self._introduced:
            # An address that does not answer must leave time for those after it.
            self.limit_s = min(self._timeout_s, self._first_deadline - now) / self._untried
        self._connection_deadline = now + self.limit_s

    def opened(self, nonce: bytes, bindings: Bindings | None = None) -> None:
        """Begin the handshake on a new connection.

        Args:
            nonce: Fresh random bytes for it.
            bindings: The TLS channel bindings of the key.
        """
        self._step(Event.OPEN)
        self._finishing = False
        self._reader = FrameReader()
        self._features = frozenset()
        self._inbound.reset(self.mailbox.connect())
        # Messages may come before the broker's answer to whoami.
        self._inbound.accept(largest_message(self._inbox))
        self._encoder.reset()
        self._handshake = handshake.as_dialer(
            self._key, nonce, name=self.name.encode(), allow_md5=False, bindings=bindings
        )
        first_step = next(self._handshake)
        assert first_step is handshake.RECEIVE, "the listener speaks first"

    def receive(self, data: bytes, owner: Owner, now: float) -> Effects[M]:
        """Handle bytes that the connection received.

        Args:
            owner: The client of the messages.

        Any error in them is returned as ``effects.broken``. It ends the connection, and
        with it every waiting call.
        """
        effects: Effects[M] = Effects()
        try:
            if self._handshake is not None:
                data = self._authenticate(data)
            if data:
                self._inbound.read(data, owner, effects, now)
        except (AuthenticationError, ProtocolError) as error:
            effects.broken = error
        except Exception as error:  # noqa: BLE001 - a bug must not leave a call without its outcome
            text = (
                f"{error}"
                if isinstance(error, BrokerdError)
                else f"{type(error).__name__}: {error}"
            )
            effects.broken = ProtocolError(f"the bytes from the broker can't be understood: {text}")
            effects.broken.__cause__ = error
        self.mailbox.unsettled += len(effects.stored)
        self._finish()
        self.undelivered += len(effects.undelivered)
        for refusal in effects.undelivered:
            self._encoder.refused(getattr(refusal, "message_id", 0))
        return effects

    def take_begun(self) -> bytes:
        """Forget and return the begin of a frame, unless it is long.

        The caller gives it again, with the bytes that follow.
        """
        return self._inbound.take_begun() if self.state is _READY else b""

    @property
    def looks_ahead(self) -> bool:
        """Whether :meth:`look_ahead` may be called."""
        return self.state is _READY and not self._inbound.incomplete

    def look_ahead(self, data: bytes, owner: Owner) -> Effects[M] | None:
        """Decode received bytes for :meth:`pass_over`: see Inbound.look_ahead."""
        return self._inbound.look_ahead(data, owner)

    @property
    def begun_ahead(self) -> int:
        """The number of the last bytes of the last :meth:`look_ahead` that begin a frame."""
        return self._inbound.begun_ahead

    def pass_over(self, effects: Effects[M], now: float) -> None:
        """Record that the effects of the last :meth:`look_ahead` are delivered."""
        self.mailbox.unsettled += len(effects.stored)
        self._inbound.pass_over(effects, now)

    def in_order(self, waiting_bytes: int) -> bool:
        """Return whether the counts of queued and written bytes agree.

        Each queued byte must be written, or be one of the ``waiting_bytes`` of the
        face.
        """
        return self._encoder.in_order(waiting_bytes)

    def recover(self, face_bytes: int, waiting_bytes: int) -> None:
        """Recount the queued bytes after an interrupted call of the face: see
        FrameEncoder.recover.
        """
        self._encoder.recover(face_bytes, waiting_bytes)

    @property
    def unwritten(self) -> int:
        """Queued bytes that were not reported to :meth:`wrote`.

        After an interrupted call, some of them have left.
        """
        return max(0, self._encoder.queued - self._encoder.written)

    @property
    def encoder(self) -> FrameEncoder:
        """The encoder, for its counts of bytes."""
        return self._encoder

    @property
    def untaken(self) -> int:
        """Bytes that wait for :meth:`data_to_send`."""
        return self._encoder.untaken

    def lost(
        self,
        reason: BrokerdError,
        now: float,
        jitter: float,
        *,
        doubtful: int = 0,
        at_once: bool = False,
    ) -> Effects[M]:
        """Give every send its outcome, after a connection was lost or could not be
        made.

        Args:
            reason: Why the connection was lost or could not be made.
            now: The time, in seconds.
            jitter: A random number in [0, 1) for the wait.
            doubtful: Bytes that may have left although :meth:`wrote` was not told of
                them.
            at_once: Whether the next attempt follows without a wait. The face sets it
                if it ended the connection for a reason of its own.
        """
        effects: Effects[M] = Effects()
        lifetime_s = now - self._ready_since if self.state in _CONNECTED else 0.0
        cut_off = not self._introduced and self._was_cut_off(reason)
        was_connected = self.state in _CONNECTED
        at_once = at_once or self.mailbox.home is not None
        was_open = self.state not in (State.CLOSING, State.CLOSED)
        if was_connected:
            self._lost_at = now
        retries = self._reconnect if self._introduced else cut_off or self._waits(reason)
        attempt = 0 if lifetime_s >= backoff.CAP_S else self._attempt
        if cut_off:
            # The broker is full, so many other clients retry too: begin with longer
            # waits.
            attempt += _FIRST_DOUBLINGS
        wait = backoff.delay(attempt, jitter)
        another = self._take_turn(reason)
        if another:
            wait, at_once, retries = 0.0, True, retries or not self._introduced
        else:
            reason, self._refused = self._refused or self._summary(reason), None
            self._round_errors = []
            if not self._introduced and self._wait_s:
                wait = min(wait, _LONGEST_FIRST_WAIT_S)
        if not self._introduced and self._first_deadline is not None:
            end = self._first_deadline if another or cut_off else self._wait_end
            retries = retries and now + wait < end
        elif not another and self._gives_up(reason, now):
            retries = False
        self._step(Event.LOSE if retries else Event.GIVE_UP)
        self.reason = reason
        if self._introduced and was_open:
            self._report(reason, effects, lost=was_connected, final=not retries)
        if was_connected:
            self.losses += 1
        elif was_open:
            self.failed_attempts += 1
        self._handshake = None
        self._encoder.drop()
        self._connection_deadline = None
        if self.state is State.WAITING:
            # A connection that always breaks immediately must not be retried
            # immediately each time.
            self._attempt = 0 if lifetime_s >= backoff.CAP_S else self._attempt
            self.retry_at = now
            if not at_once:
                self.retry_at += wait
                self._attempt += 1
        self._inbound.lost()
        max_written = self._encoder.written + doubtful
        for pending in self.pending_calls.take_all():
            self._inbound.forget_subscription(pending)
            in_doubt = pending.end <= max_written
            if isinstance(pending, Post):
                if in_doubt:
                    pending.note_doubt()
                self.posts.add(pending)
            elif pending.waiter is not None:
                effects.outcomes.append(
                    (
                        pending.waiter,
                        self._loss(pending.id, pending.to or pending.about, in_doubt=in_doubt),
                    )
                )
        self.posts.retry_at = None
        self._end_doubtful_posts(effects, now)
        if self.state is not State.WAITING:
            for post in self.posts.take_all():
                in_doubt = post.doubtful_since is not None
                error = self._loss(post.id, post.to, in_doubt=in_doubt)
                effects.outcomes.append((post.waiter, error))
        for end, message_id, to in self._encoder.take_unwritten():
            effects.undelivered.append(self._loss(message_id, to, in_doubt=end <= max_written))
        self.undelivered += len(effects.undelivered)
        for watch in self._watches:
            watch.disconnected()
        return effects

    def _gives_up(self, reason: BrokerdError, now: float) -> bool:
        """Return whether no attempt follows a loss or a failed round of attempts."""
        if self._give_up_s is not None:
            return now >= self._lost_at + self._give_up_s
        self._rejections += isinstance(reason, KeyRejected)
        return self._rejections >= _MOST_REJECTIONS

    def _report(
        self, reason: BrokerdError, effects: Effects[M], *, lost: bool, final: bool
    ) -> None:
        """Add the change of the connection to the effects; no refusal is repeated."""
        refused = not lost and _is_refusal(reason)
        if refused and (final or str(reason) != self._reported):
            self._reported = str(reason)
            effects.changes.append(ConnectionEvent("refused", reason, final))
        elif lost or final:
            effects.changes.append(ConnectionEvent("lost", reason, final))

    @property
    def _untried(self) -> int:
        """The number of addresses that the present round has not tried yet."""
        return self._addresses - (self.turn - self._round_start) % self._addresses

    def _take_turn(self, reason: BrokerdError) -> bool:
        """Choose the next address after a loss; return whether this round has one more.

        After a connection that had been made, a new round begins with its address.
        """
        if self.state in _CONNECTED:
            return False
        if _is_refusal(reason):
            self._refused = self._refused or reason
        self._round_errors.append(reason)
        more = self._untried > 1
        self.turn = (self.turn + 1) % self._addresses
        return more

    def _summary(self, reason: BrokerdError) -> BrokerdError:
        """Return the error of a round: the last one, or one that has those of all addresses."""
        errors = self._round_errors
        if len(errors) < 2 or type(reason) not in (Disconnected, TimedOut):
            return reason
        texts = [str(error) for error in errors]
        _, mark, rest = texts[-1].rpartition(" (")
        # The same hint is given once.
        hint = mark + rest if mark and all(text.endswith(mark + rest) for text in texts) else ""
        tried = "; ".join(text[: len(text) - len(hint)] for text in texts)
        whole = type(reason)(f"none of the {self._addresses} addresses can be used: {tried}{hint}")
        whole.cut_off, whole.__cause__ = reason.cut_off, reason.__cause__
        return whole

    def _waits(self, reason: BrokerdError) -> bool:
        """Return whether the first connection is attempted again because no broker is up."""
        return (
            self._wait_s > 0
            and isinstance(reason, (Disconnected, TimedOut))
            and isinstance(reason.__cause__, (ShuttingDown, type(None)))
        )

    def _was_cut_off(self, reason: BrokerdError) -> bool:
        """Return whether the peer closed the connection without a reason before it was
        ready.

        A broker does that when it has too many pending handshakes. A retry is safe: no
        message was sent by then, so none can be sent twice.
        """
        under_way = self.state in (State.AUTHENTICATING, State.INTRODUCING)
        # A Disconnected with a cause is a refusal by the broker.
        return reason.cut_off or (
            under_way and type(reason) is Disconnected and reason.__cause__ is None
        )

    @property
    def beginning(self) -> bool:
        """Whether the first connection has neither succeeded nor finally failed."""
        return not self._introduced and self.state not in (State.GONE, State.CLOSING, State.CLOSED)

    def close(self, now: float) -> Effects[M]:
        """Close the dialog: end waiting calls with Closed.

        Frames from the broker are still received for LINGER_S seconds.
        """
        effects: Effects[M] = Effects()
        if self.mailbox.is_open and self.state in _CONNECTED:
            # What this client holds returns without a failed attempt.
            self._operate("close_mailbox", {}, Purpose.FORGET)
        self._step(Event.CLOSE)
        if self.state is State.CLOSING:
            self._connection_deadline = now + LINGER_S
        else:
            self._connection_deadline = None
        for pending in (*self.pending_calls.take_all(), *self.posts.take_all()):
            if pending.waiter is not None:
                effects.outcomes.append(
                    (pending.waiter, Closed("the client was closed while this call was waiting"))
                )
        return effects

    @property
    def counters(self) -> dict[str, int]:
        """The numbers of failures so far, by name."""
        return {
            "late": self._inbound.late,
            "dropped": self.dropped,
            "undelivered": self.undelivered,
            "unreadable": self._inbound.unreadable,
            "unrouted": self._inbound.unrouted,
            "losses": self.losses,
            "failed_attempts": self.failed_attempts,
        }

    def next_deadline(self) -> float | None:
        """Return the latest time for the next call of :meth:`tick`.

        In the state WAITING, it is the time of the next attempt to connect.
        """
        if self.state is State.WAITING:
            return self.retry_at
        deadlines = (
            self.pending_calls.deadline(),
            self._connection_deadline,
            self._posts_due,
            self.mailbox_due,
        )
        return min((each for each in deadlines if each is not None), default=None)

    @property
    def _posts_due(self) -> float | None:
        """When the posts that the broker could not store are sent again."""
        return self.posts.retry_at if self.state is State.READY else None

    @property
    def mailbox_due(self) -> float | None:
        """When a mailbox at another host is asked for again; None if it is not."""
        return self.mailbox.retry_at if self.state is State.READY else None

    def tick(self, now: float) -> Effects[M]:
        """End the calls and the connecting that are overdue at ``now``."""
        effects: Effects[M] = Effects()
        if self._connection_deadline is not None and self._connection_deadline <= now:
            self._connection_deadline = None
            silent = self.state is State.AUTHENTICATING and not self._challenged
            reason = SILENT if silent else self.state.value
            limit_s = LINGER_S if self.state is State.CLOSING else self.limit_s
            effects.broken = TimedOut(
                f"the broker did not answer within {limit_s:.6g} s ({reason})"
            )
        for pending in self.pending_calls.overdue(now):
            # A pending call with a deadline always has a waiter.
            self._withdraw(pending)
            effects.outcomes.append((pending.waiter, pending.timed_out()))
        due = self._posts_due
        if due is not None and due <= now:
            self._send_posts(effects, now)
        due = self.mailbox_due
        if due is not None and due <= now:
            self.mailbox.retry_at = None
            self._tell_mailbox()
        self._finish()
        return effects

    # Methods for callers' sends. Outside the state READY they raise Disconnected or
    # Closed

    def send(
        self, to: str, codec: int, body: bytes, extension: Mapping[str, Any] | None = None
    ) -> int:
        """Queue a MESSAGE without a receipt; return its id."""
        if self.state is not _READY:
            self.require_ready()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._encoder.put(MESSAGE_KIND, 0, message_id, to, codec, body, extension)
        self._encoder.without_receipt(message_id, to)
        return message_id

    def send_many(
        self,
        to: Sequence[str],
        codecs: Sequence[int],
        bodies: Sequence[bytes],
        extension: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Queue several MESSAGE frames without receipts; return their ids.

        Each of them gets the extension.
        """
        self.require_ready()
        first_id = self._next_id
        ids = range(first_id, first_id + len(to))
        self._encoder.put_messages(0, ids, to, codecs, bodies, extension)
        self._next_id = ids.stop
        return list(ids)

    def send_as(
        self, message_id: int, to: str, codec: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> None:
        """Queue a MESSAGE whose id the face has already assigned."""
        self.require_ready()
        self._encoder.put(MESSAGE_KIND, 0, message_id, to, codec, body, extension)
        self._encoder.without_receipt(message_id, to)

    def publish_as(
        self,
        message_id: int,
        topic: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> None:
        """Queue an EVENT whose id the face has already assigned."""
        self.require_ready()
        self._encoder.put_event(0, message_id, topic, codec, body, extension)
        self._encoder.without_receipt(message_id, topic)

    def publish(
        self, topic: str, codec: int, body: bytes, extension: Mapping[str, Any] | None = None
    ) -> int:
        """Queue an EVENT without a receipt; return its id."""
        message_id = self._take_id()
        self._encoder.put_event(0, message_id, topic, codec, body, extension)
        self._encoder.without_receipt(message_id, topic)
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
        """Queue a MESSAGE; the waiter gets a Receipt or an error. Return its id."""
        if self.state is not _READY:
            self.require_ready()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._encoder.put(MESSAGE_KIND, RECEIPT_FLAG, message_id, to, codec, body, extension)
        self.pending_calls.add(
            Pending(message_id, _RECEIPT, to, self._encoder.queued, waiter, deadline)
        )
        return message_id

    def post(
        self,
        to: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any],
        waiter: object,
        now: float,
    ) -> int:
        """Send a MESSAGE, now or once there is a connection, until it is stored or refused.

        The waiter gets a Receipt or an error. Return the message's id. The face ends the
        call at its deadline. Raises Closed or Disconnected if no other connection follows.

        extension: It has the message's ``key``.
        """
        if self.state in (State.CLOSING, State.CLOSED, State.GONE):
            self.require_ready()
        self._encoder.check(to, extension)
        message_id = self._next_id
        self._next_id = message_id + 1
        post = Post(message_id, to, codec, body, extension, waiter)
        if self.state is not _READY or self.posts:
            self.posts.add(post)
        elif self._dedup_s is None:
            raise _no_mailboxes(post)
        else:
            self._send_post(post, now)
        return message_id

    def _send_post(self, post: Post, now: float) -> None:
        self._encoder.put(
            MESSAGE_KIND, RECEIPT_FLAG, post.id, post.to, post.codec, post.body, post.extension
        )
        post.end = self._encoder.queued
        post.sent_at = now
        self.pending_calls.add(post)

    def _send_posts(self, effects: Effects[M], now: float) -> None:
        """Send all waiting posts, except those that could be stored twice by now."""
        self._end_doubtful_posts(effects, now)
        for post in self.posts.take_all():
            if self._dedup_s is not None:
                self._send_post(post, now)
            elif post.doubtful_since is None:
                effects.outcomes.append((post.waiter, _no_mailboxes(post)))
            else:
                effects.outcomes.append((post.waiter, _too_late(post)))

    def _end_doubtful_posts(self, effects: Effects[M], now: float) -> None:
        """End the posts whose keys the broker may not know any more."""
        if self._dedup_s is not None:
            for post in self.posts.take_doubtful(now - self._dedup_s):
                effects.outcomes.append((post.waiter, _too_late(post)))

    def send_many_for_receipts(
        self,
        to: Sequence[str],
        codecs: Sequence[int],
        bodies: Sequence[bytes],
        extension: Mapping[str, Any] | None,
        waiters: Iterable[object],
        deadline: float | None,
    ) -> Sequence[int]:
        """Queue several MESSAGE frames; each waiter gets a Receipt or an error.

        Return their ids. Each frame gets the extension.
        """
        self.require_ready()
        ids = range(self._next_id, self._next_id + len(to))
        queued = self._encoder.put_messages(RECEIPT_FLAG, ids, to, codecs, bodies, extension)
        self._next_id = ids.stop
        for (end, message_id, recipient), waiter in zip(queued, waiters):
            self.pending_calls.add(Pending(message_id, _RECEIPT, recipient, end, waiter, deadline))
        return ids

    def publish_for_receipt(
        self,
        topic: str,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
        waiter: object,
        deadline: float | None,
    ) -> int:
        """Queue an EVENT; the waiter gets a Receipt or an error. Return its id."""
        message_id = self._take_id()
        self._encoder.put_event(RECEIPT_FLAG, message_id, topic, codec, body, extension)
        self.pending_calls.add(
            Pending(
                message_id,
                Purpose.RECEIPT,
                "",
                self._encoder.queued,
                waiter,
                deadline,
                about=topic,
            )
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
        limit_s: float | None = None,
    ) -> int:
        """Queue a REQUEST; the waiter gets the REPLY or an error. Return its id.

        limit_s: the caller's timeout in seconds, if it is the request's ttl.
        """
        if self.state is not _READY:
            self.require_ready()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._encoder.put(REQUEST_KIND, 0, message_id, to, codec, body, extension)
        pending = Pending(message_id, _REQUEST, to, self._encoder.queued, waiter, deadline)
        pending.limit_s = limit_s
        # As in PendingTable.add, without the call.
        self.pending_calls[message_id] = pending
        return message_id

    def reply(
        self,
        to: str,
        message_id: int,
        codec: int,
        body: bytes,
        extension: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue the REPLY to the request with this id."""
        if self.state is not _READY:
            self._require_connection()
        self._inbound.close_request(to, message_id)
        self._encoder.put(REPLY_KIND, 0, message_id, to, codec, body, extension)
        self._encoder.without_receipt(message_id, to)

    def fail(self, to: str, message_id: int, code: str, text: str) -> None:
        """Queue an ERROR as the answer to the request with this id."""
        self._require_connection()
        self._inbound.close_request(to, message_id)
        self._refuse(to, message_id, code, text)

    def give_back(self, to: str, message_id: int) -> None:
        """Return a request that no handler has begun, for another member of the pool."""
        self.fail(to, message_id, "back", "the client stops, and has not begun this request")

    def open_mailbox(self) -> None:
        """Receive from the mailbox, on this connection and on all later ones."""
        self.mailbox.wanted = True
        self._tell_mailbox()

    def _tell_mailbox(self) -> None:
        mailbox = self.mailbox
        if mailbox.wanted and not mailbox.is_open and self.state is _READY and self._has_mailbox:
            mailbox.is_open = True
            self._operate("open_mailbox", mailbox.arguments, Purpose.MAILBOX)

    def _on_no_mailbox(self, error: BrokerdError, effects: Effects[M], now: float) -> None:
        """Receive only live messages: most clients have no mailbox."""
        self.mailbox.is_open = False
        if isinstance(error, Elsewhere):
            self._go_home(error, effects, now)
        elif self.mailbox.arguments or not isinstance(error, Unsupported):
            effects.warnings.append(f"the mailbox can't be opened: {error}")

    def _go_home(self, error: Elsewhere, effects: Effects[M], now: float) -> None:
        """Leave for the host of the mailbox, once no call waits for its outcome.

        If that host can't be reached, the client stays here and asks again later.
        """
        if not self.mailbox.begin_move(now):
            return
        if self._reconnect and self._usable(error.addresses):
            self.mailbox.home = error
            self._on_draining(effects)
        else:
            told = ", ".join(error.addresses) or "no address"
            why = "can't connect" if self._reconnect else "does not, with reconnect=False"
            effects.warnings.append(
                f"the mailbox is at host {error.host}, where this client {why} ({told}): {error}"
            )

    def _on_parted(self, effects: Effects[M]) -> None:
        """Leave this connection for one to the host of the mailbox."""
        home = self.mailbox.home
        assert home is not None, "the client leaves only for that"
        self.detour = self._usable(home.addresses)
        self._addresses = len(self.detour) + self._own_addresses
        self.turn = self._round_start = 0
        effects.broken = Disconnected(f"the client connects to its mailbox at host {home.host}")
        effects.broken.__cause__ = home

    def narrow_mailbox(self) -> None:
        """Receive at most one more message of the mailbox, before a drain."""
        if self.mailbox.is_open and self.state is _READY:
            self._operate("open_mailbox", {"window": 1}, Purpose.FORGET)

    def settle(self, delivery: Delivery, body: bytes) -> None:
        """Queue the ACK of a delivery; drop it if its connection has ended.

        The broker then delivers the message again.
        """
        delivery.settled = True
        if delivery.connection == self.mailbox.connection and self.state in _CONNECTED:
            self._encoder.put_ack(delivery.seq, body)
            self.mailbox.unsettled -= 1
            self._finish()
        else:
            self._inbound.late += 1

    def return_delivery(self, message: Message) -> None:
        """Return a message of the mailbox that no handler has begun."""
        self.settle(message.unsettled_delivery(), ack_body("back"))

    def limit_in_flight(self, limit: int) -> None:
        """Set how many requests the broker delivers before they are answered."""
        if limit != self._in_flight and not (self._stopped and limit):
            self._in_flight = limit
            self._tell_in_flight()

    def raise_in_flight(self, limit: int) -> None:
        """Raise the number of requests that the broker delivers to ``limit``."""
        if self._in_flight is not None and limit > self._in_flight:
            self.limit_in_flight(limit)

    def stop_requests(self) -> None:
        """Stop further requests, on later connections too."""
        self._stopped = True
        self.limit_in_flight(0)

    def is_over(self, request: Message, now: float) -> bool:
        """Return whether no requester waits for a request that no handler has begun."""
        over = request.is_over(now)
        if over:
            request.mark_answered()
            self.dropped += 1
        return over

    def needs_no_answer(self, request: Message) -> bool:
        """Return whether an answer to a request is discarded, because it was cancelled."""
        if request.cancelled:
            request.mark_answered()
            self._inbound.late += 1
        return request.cancelled

    @property
    def returns_requests(self) -> bool:
        """Whether the broker takes requests back."""
        return "in_flight" in self._features

    def _tell_in_flight(self) -> None:
        if self._in_flight is not None and "in_flight" in self._features and self.may_answer:
            self._operate("in_flight", {"n": self._in_flight}, Purpose.FORGET)

    def control(
        self, op: str, arguments: Mapping[str, Any], waiter: object, deadline: float | None
    ) -> int:
        """Request an operation from the broker; the waiter gets a dict or an error."""
        self.require_ready()
        about = next((value for value in arguments.values() if isinstance(value, str)), "")
        return self._operate(op, arguments, Purpose.CONTROL, waiter, deadline, about).id

    def subscribe(
        self, pattern: str, group: str | None, sink: object, waiter: object, deadline: float | None
    ) -> tuple[int, SubscriptionEntry]:
        """Subscribe the sink to a pattern, here and at the broker.

        The waiter gets a dict or an error.
        """
        check_pattern(pattern)
        group_name = check_name(group, "group") if group is not None else ""
        self.require_ready()
        entry = self.subscriptions.add(pattern, group_name, sink)
        pending = self._operate(
            "subscribe", entry.arguments, Purpose.SUBSCRIBE, waiter, deadline, pattern
        )
        pending.entry, pending.sink = entry, sink
        return pending.id, entry

    def unsubscribe(
        self, entry: SubscriptionEntry, sink: object, waiter: object, deadline: float | None
    ) -> int | None:
        """Stop passing events to the sink; return the id of the request to the broker.

        Return None if no request is needed: then no answer comes.
        """
        if not self.subscriptions.discard(entry, sink) or self.state is not State.READY:
            return None
        return self._operate(
            "unsubscribe", entry.arguments, Purpose.CONTROL, waiter, deadline, entry.pattern
        ).id

    def watch(
        self, sink: object, waiter: object, deadline: float | None
    ) -> tuple[int, presence.Watch]:
        """Report the online clients to the sink, and every later change.

        The waiter gets a dict or an error.
        """
        self.require_ready()
        watch = presence.Watch(sink)
        self._watches[watch] = [
            self.subscriptions.add(pattern, "", watch) for pattern in presence.PATTERNS
        ]
        for entry in self._watches[watch]:
            self._resubscribe(entry)
        pending = self._operate("clients", {}, Purpose.WATCH, waiter, deadline)
        pending.sink = watch
        return pending.id, watch

    def unwatch(self, watch: presence.Watch) -> None:
        """Stop reporting presence to the watch's sink."""
        for entry in self._watches.pop(watch, ()):
            self._leave(entry, watch)

    def listen(self, sink: object, waiter: object, deadline: float | None) -> int:
        """Pass other clients' requests for channels to the sink.

        The waiter gets a dict or an error.
        """
        if self._inbound.listener is not None:
            raise WrongUse(
                "this client listens already: call accept() of its listener, from several"
                " threads or tasks if need be"
            )
        self.require_ready()
        self._inbound.listener = sink
        pending = self._operate("listen", {}, Purpose.LISTEN, waiter, deadline)
        pending.sink = sink
        return pending.id

    def unlisten(self, sink: object, waiter: object, deadline: float | None) -> int | None:
        """Stop listening; return the id of the request to the broker, None if none is
        needed.
        """
        if self._inbound.listener is not sink:
            return None
        self._inbound.listener = None
        if self.state is not State.READY:
            return None
        return self._operate("unlisten", {}, Purpose.CONTROL, waiter, deadline).id

    def refuse_channel(self, token: int, code: str, text: str) -> None:
        """Queue the refusal of a request for a channel."""
        self._require_connection()
        body = json.dumps({"code": code, "message": text, "name": self.name}).encode()
        refusal = Envelope(Kind.ERROR, token, "", body, JSON_CODEC)
        # If the caller has gone meanwhile, the broker says so, and no caller here asks.
        self._inbound.give_up(token)
        self._encoder.put_frame(frame(encode(refusal)))

    def abandon(self, message_id: int) -> Pending | None:
        """Stop waiting for this outcome; if it comes later, it is counted and dropped.

        Returns the call, or None if it has its outcome already.
        """
        post = self.posts.pop(message_id)
        pending = self.pending_calls.pop(message_id, None)
        if pending is not None:
            self._withdraw(pending)
            self._finish()
        return pending or post

    def abandon_all(self, waiter: object) -> None:
        """Abandon all calls of a waiter whose caller was interrupted."""
        for pending in (*self.pending_calls.of(waiter), *self.posts.of(waiter)):
            self.abandon(pending.id)

    def forget(self, sink: object) -> None:
        """Remove the sink from all subscriptions and watches.

        This works at any stage of the call that subscribes it.
        """
        for watch in [watch for watch in self._watches if watch.sink is sink]:
            self.unwatch(watch)
        for entry in [entry for entry in self.subscriptions if sink in entry.sinks]:
            self._leave(entry, sink)
        if self._inbound.listener is sink:
            self._stop_listening()

    # Helpers for sending

    def closed_by_broker(self) -> Disconnected:
        """Return the error for a connection closed by the broker; it names any state
        but READY.
        """
        suffix = "" if self.state is State.READY else f" ({self.state.value})"
        return Disconnected(f"the broker closed the connection{suffix}")

    def gone(self) -> Disconnected:
        """Return the error for calls that wait when no other connection follows."""
        error = Disconnected(f"the connection to the broker is gone: {self.reason}")
        error.__cause__ = self._cause
        return error

    @property
    def _cause(self) -> BaseException | None:
        """The reason of the loss: what the broker has said of it, if it has."""
        said = None if self.reason is None else self.reason.__cause__
        return said if isinstance(said, BrokerdError) else self.reason

    def require_ready(self) -> None:
        """Raise Closed or Disconnected unless the state is READY."""
        if self.state is State.READY:
            return
        if self.state in (State.CLOSING, State.CLOSED):
            raise Closed("the client is closed")
        raise Disconnected(
            f"not connected to the broker: {self.reason or self.state.value}"
        ) from self._cause

    @property
    def may_answer(self) -> bool:
        """Whether the state allows to send an answer."""
        return self.state in _CONNECTED

    def _require_connection(self) -> None:
        """Raise Closed or Disconnected unless the state allows to send answers."""
        if self.state not in _CONNECTED:
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
        """Queue a REQUEST to the broker itself, in any state."""
        body = json.dumps({"op": op, **arguments}, separators=(",", ":")).encode()
        message_id = self._next_id
        self._next_id = message_id + 1
        self._encoder.put(REQUEST_KIND, 0, message_id, BROKER, JSON_CODEC, body, None)
        pending = Pending(
            message_id, purpose, BROKER, self._encoder.queued, waiter, deadline, about
        )
        self.pending_calls.add(pending)
        return pending

    def _resubscribe(self, entry: SubscriptionEntry) -> None:
        self._operate(
            "subscribe", entry.arguments, Purpose.RESUBSCRIBE, about=entry.pattern
        ).entry = entry

    def _leave(self, entry: SubscriptionEntry, sink: object) -> None:
        if self.subscriptions.discard(entry, sink) and self.state is State.READY:
            self._operate("unsubscribe", entry.arguments, Purpose.FORGET)

    def _withdraw(self, pending: Pending) -> None:
        """Remove the subscription or watch of a call that was given up."""
        if pending.purpose is Purpose.SUBSCRIBE:
            assert pending.entry is not None
            self._leave(pending.entry, pending.sink)
        elif pending.purpose is Purpose.WATCH:
            self.unwatch(pending.sink)
        elif pending.purpose is Purpose.LISTEN:
            if self._inbound.listener is pending.sink:
                self._stop_listening()
        elif pending.purpose is Purpose.REQUEST:
            self._cancel(pending)

    def _stop_listening(self) -> None:
        self._inbound.listener = None
        if self.state is State.READY:
            self._operate("unlisten", {}, Purpose.FORGET)

    def _cancel(self, pending: Pending) -> None:
        """Tell the broker that no caller awaits the answer to a request any more."""
        self._inbound.give_up(pending.id)
        if self.state in _CONNECTED and "cancels" in self._features:
            body = b'{"code":"cancelled","message":"the requester does not wait","name":""}'
            self._encoder.put(ERROR_KIND, 0, pending.id, BROKER, JSON_CODEC, body, None)

    def _loss(self, message_id: int, to: str, *, in_doubt: bool) -> Disconnected:
        reason = f"the connection to the broker is lost ({self.reason})"
        error: Disconnected
        if in_doubt:
            text = f"{reason}, and the outcome of {message_id} to {to} is not known"
            error = InDoubt(text, message_id=message_id)
        else:
            text = f"{reason}, and {message_id} to {to} was not sent"
            error = Disconnected(text, message_id=message_id)
        error.__cause__ = self._cause
        return error

    def _step(self, event: Event) -> None:
        next_state = NEXT[self.state].get(event)
        assert next_state is not None, f"{event.name} can't happen in {self.state.name}"
        self.state = next_state

    # Helpers for receiving

    def _authenticate(self, data: bytes) -> bytes:
        """Continue the handshake; return the bytes that follow it."""
        assert self._handshake is not None
        self._reader.feed(data)
        try:
            while (body := handshake.next_message(self._reader)) is not None:
                self._challenged = True
                step = self._handshake.send(body)
                while isinstance(step, handshake.Send):
                    self._encoder.put_frame(frame(step.body))
                    step = self._handshake.send(None)
        except StopIteration as end:
            if end.value is None:
                # An exception, for instance of a signal handler, ended the handshake
                # earlier.
                raise AuthenticationError("the handshake was cut off at this end") from None
            self._handshake = None
            self._step(Event.AUTHENTICATE)
            self._introduce()
            return self._reader.take_rest()
        except KeyRejected as error:
            raise KeyRejected(self._why_rejected()) from error
        except AuthenticationError as error:
            raise AuthenticationError(
                f"{error} (as {self.name or 'the client that the key names'})"
            ) from error
        return b""

    def _why_rejected(self) -> str:
        """Return the text for a rejected key; a broker tells nothing but that."""
        if self._without_key:
            return (
                f"the peer rejected our answer: no key was given for {self.name}; give key,"
                " key_file or BROKERD_KEY_FILE (a broker accepts a client without a key only as a"
                " user in its peer_uid)"
            )
        if self.name:
            return (
                f"the peer rejected our answer: it does not accept the key used here for the name"
                f" {self.name} (the name is not known there, or it has another key, or the broker"
                " has reached limits.connections; its log says which)"
            )
        return "the peer rejected our answer: no client is known there by the key used here"

    def _introduce(self) -> None:
        """Request this client's introduction, and subscribe again to all earlier
        subscriptions.
        """
        self._operate("whoami", {}, Purpose.WHOAMI)
        self._operate("goaway", {}, Purpose.GOAWAY)
        for entry in self.subscriptions:
            self._resubscribe(entry)
        for watch in self._watches:
            self._operate("clients", {}, Purpose.RESYNC).sink = watch
        if self._inbound.listener is not None:
            self._operate("listen", {}, Purpose.RELISTEN).sink = self._inbound.listener

    def _has_answered(self, message_id: int) -> bool:
        """Return whether the id is not one of this client's own ids.

        Only an answer of this client can have such an id.
        """
        if self._first_id <= message_id < self._next_id or message_id >= _LATE_IDS + self._first_id:
            return False
        self._encoder.refused(message_id)
        return True

    def _refuse_unreadable(self, to: str, message_id: int, code: str, text: str) -> None:
        """Answer a request that could not be read with an ERROR, if that can be sent."""
        # The limit keeps a broker that sends such requests, but does not read, from
        # filling memory.
        if self._encoder.queued - self._encoder.written < _MAX_UNWRITTEN:
            self._refuse(to, message_id, code, text)

    def _refuse_unheard(self, token: int, code: str, text: str) -> None:
        """Refuse a request for a channel that no listener gets, if that can be sent."""
        if self.may_answer:
            self.refuse_channel(token, code, text)

    def _refuse(self, to: str, message_id: int, code: str, text: str) -> None:
        if self.state in (State.INTRODUCING, State.READY, State.DRAINING):
            body = json.dumps({"code": code, "message": text, "name": self.name}).encode()
            self._encoder.put(ERROR_KIND, 0, message_id, to, JSON_CODEC, body, None)
            self._encoder.without_receipt(message_id, to)

    def _on_draining(self, effects: Effects[M]) -> None:
        """Send only answers from now on."""
        if self.state is State.READY:
            self._step(Event.DRAIN)
            effects.changes.append(ConnectionEvent("draining"))

    def _finish(self) -> None:
        """Send ``finished`` in the state DRAINING, once no call waits for its outcome.

        The program has acknowledged the messages of its mailbox by then, too. The broker
        answers when every earlier send is written or reported.
        """
        if self.state is not State.DRAINING or self._finishing:
            return
        if not (self.pending_calls or self.mailbox.unsettled):
            self._finishing = True
            if self.mailbox.home is None:
                self._operate("finished", {}, Purpose.FINISHED)
            else:
                self._operate("ping", {}, Purpose.PARTED)

    def _on_introduction(self, answer: dict[str, Any], effects: Effects[M], now: float) -> None:
        """Handle the broker's answer to whoami.

        Raises ProtocolError if it is not valid.
        """
        name, address, limits = answer.get("name"), answer.get("address"), answer.get("limits", {})
        if not isinstance(name, str) or not is_name(name):
            raise ProtocolError("the broker's introduction has no valid name for this client")
        if self.name and name != self.name:
            raise ProtocolError(
                f"the broker calls this client {name}, but it connects as {self.name}"
            )
        if (
            not isinstance(address, str)
            or not is_address(address)
            or split_address(address)[0] != name
        ):
            raise ProtocolError(f"the broker's introduction has no valid address for {name}")
        max_message = limits.get("max_message", 0) if isinstance(limits, dict) else None
        if type(max_message) is not int or max_message < 0:
            raise ProtocolError("the broker's introduction has limits that are not valid")
        self.name, self.address = name, address
        self.introduction = answer
        features = answer.get("features")
        if isinstance(features, list):
            self._features = frozenset(item for item in features if isinstance(item, str))
        self._round_start, self._refused = self.turn, None
        self._round_errors = []
        self._rejections, self._reported = 0, ""
        effects.changes.append(ConnectionEvent("connected"))
        self._step(Event.INTRODUCE)
        if "cancels" in self._features:
            self._operate("cancels", {}, Purpose.FORGET)
        self._tell_in_flight()
        if not self._introduced:
            # Failed attempts before the first success must not lengthen later waits.
            self._introduced, self._attempt = True, 0
        dedup = limits.get("dedup")
        self._dedup_s = dedup if is_ttl(dedup) else None
        # A broker that lists the feature tells the window of a client that has one, or the
        # host of its mailbox.
        told = "mailboxes" in self._features
        self._has_mailbox = (
            not limits.keys().isdisjoint(("window", "home")) if told else self._dedup_s is not None
        )
        self._tell_mailbox()
        self.posts.connected()
        self._send_posts(effects, now)
        self._connection_deadline = None
        self._ready_since = now
        self.reason = None
        largest = largest_message(self._inbox, max_message)
        self._inbound.accept(largest)
        if max_message > largest:
            effects.warnings.append(
                f"the broker passes on messages of up to {max_message} bytes, and this client"
                f" accepts {largest}: give it an inbox of at least"
                f" {-(-max_message // STRETCH)} bytes"
            )


def _no_mailboxes(post: Post) -> Unsupported:
    return Unsupported(
        "this broker has no mailboxes (store is not set in its configuration): use send() or"
        " send_confirmed()",
        name=post.to,
        message_id=post.id,
    )


def _too_late(post: Post) -> InDoubt:
    return InDoubt(
        f"it is not known whether {post.id} to {post.to} is stored, and the broker may not know its"
        " key any more: sent again, it could be stored twice",
        message_id=post.id,
    )


def _is_refusal(reason: BrokerdError) -> bool:
    """Return whether the peer was there and did not serve this client."""
    return not reason.cut_off and (
        not isinstance(reason, (Disconnected, TimedOut))
        or isinstance(reason.__cause__, BrokerdError)
    )
