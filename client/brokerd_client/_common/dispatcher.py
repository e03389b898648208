"""The dispatcher: hands received messages to handlers, subscriptions and ``recv``.

It does no I/O and does not wait. Both faces use it; only their wait queues differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from brokerd_client._common.rpc import call_failure, is_call
from brokerd_client._common.warning_limiter import WarningLimiter
from brokerd_client.channel_offer import ChannelOffer
from brokerd_client.connection_event import ConnectionEvent
from brokerd_client.errors import BrokerdError, RequestFailed
from brokerd_client.message import Message, extension_cost
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.inbox import OVERHEAD, Inbox
from brokerd_client.protocol.mailbox import ack_body
from brokerd_client.wire.layout import REQUEST_KIND

__all__ = ["Dispatcher", "FailureAnswer", "Job", "Sink", "WaitQueue", "failure_body", "log"]

M = TypeVar("M", bound=Message)

#: A callable and its argument.
Job = tuple[Callable[[Any], object], Any]

#: Returns the text and the code of the answer to a request whose handler has raised.
FailureAnswer = Callable[[BaseException], tuple[str, str]]

#: Memory of a waiting error in bytes, together with its job, but without its texts.
_ERROR_COST: Final = 800


class WaitQueue(Protocol):
    """An inbox at which threads or tasks can wait."""

    inbox: Inbox[Any]
    #: Why no more items will come; None while more may come.
    ended: BrokerdError | None

    def put(self, items: list[Any], size: int) -> None:
        """Add items of ``size`` bytes in all, and wake the waiting threads or tasks."""
        ...

    def take_all(self) -> list[Any]:
        """Take and return all items."""
        ...

    def end(self, reason: BrokerdError) -> None:
        """End the queue: no more items will come. Wake the waiting threads or tasks."""
        ...


class Sink(Protocol):
    """A subscription or a watch."""

    @property
    def queue(self) -> WaitQueue:
        """The queue at which callers wait for its events."""
        ...

    @property
    def callback(self) -> Callable[[Any], object] | None:
        """The callback for its events; None if callers wait for them at the queue."""
        ...


class Dispatcher(Generic[M]):
    """The handlers and wait queues of one client.

    Args:
        inbox: Messages for recv.
        ordered: Jobs done one after the other.
        requests: Jobs done concurrently.
        answering: Wraps a request handler so that its result is sent as the reply. Its
            second argument makes the answer to an exception.
        settling: Wraps a message handler so that messages from the mailbox are
            acknowledged when it returns.
    """

    def __init__(
        self,
        inbox: WaitQueue,
        ordered: WaitQueue,
        requests: WaitQueue,
        answering: Callable[[Callable[[M], object], FailureAnswer], Callable[[M], object]],
        settling: Callable[[Callable[[M], object]], Callable[[M], object]],
    ) -> None:
        self.inbox = inbox
        self.ordered = ordered
        self.requests = requests
        self._answering = answering
        self._settling = settling
        self._on_message: Callable[[M], object] | None = None
        self._on_stored: Callable[[M], object] | None = None
        self._on_request: Callable[[M], object] | None = None
        self._on_call: Callable[[M], object] | None = None
        self._on_undelivered: Callable[[BrokerdError], object] | None = None
        self._on_connection: Callable[[ConnectionEvent], object] | None = None
        #: The last change of the connection, which a new handler gets first.
        self._change: ConnectionEvent | None = None
        #: Whether a loss was logged, and no return since.
        self._lost = False
        self._undelivered = WarningLimiter()
        self._unreadable = WarningLimiter("more messages could not be read")

    def handle_messages(self, handler: Callable[[M], object]) -> None:
        """Pass messages to the handler, beginning with those that already wait."""
        self._on_message = handler
        self._on_stored = self._settling(handler)
        self._dispatch_again()

    def handle_requests(self, handler: Callable[[M], object]) -> None:
        """Pass requests to the handler, beginning with those that already wait."""
        self._on_request = self._answering(handler, _handler_failure)
        self._dispatch_again()

    def handle_calls(self, handler: Callable[[M], object]) -> None:
        """Pass calls of methods to the handler, beginning with those that already wait."""
        self._on_call = self._answering(handler, call_failure)
        self._dispatch_again()

    def handle_undelivered(self, handler: Callable[[BrokerdError], object]) -> None:
        """Pass failures of sends without a waiting call to the handler instead of the
        log.
        """
        self._on_undelivered = handler

    def handle_connection(self, handler: Callable[[ConnectionEvent], object]) -> None:
        """Pass changes of the connection to the handler, beginning with the last one."""
        self._on_connection = handler
        if self._change is not None and self.ordered.ended is None:
            self.ordered.put([(handler, self._change)], _weight(self._change))

    def _dispatch_again(self) -> None:
        inbox: Inbox[M] = self.inbox.inbox
        waiting_messages = inbox.take_all()
        stored = [message for message in waiting_messages if message.seq]
        if stored:
            self.dispatch_stored(stored)
            waiting_messages = [message for message in waiting_messages if not message.seq]
        if waiting_messages:
            self.dispatch_messages(waiting_messages, sum(map(_weight, waiting_messages)))

    def dispatch_messages(self, messages: list[M], size: int) -> None:
        """Dispatch messages and requests in their order; ``size`` bytes in all."""
        for queue, items, share in self.by_queue(messages, size):
            queue.put(items, share)

    def by_queue(self, messages: list[M], size: int) -> list[tuple[Any, list[Any], int]]:
        """Return the items for each wait queue, in order, and their share of the bytes."""
        if self._on_request is None and self._on_message is None and self._on_call is None:
            return [(self.inbox, messages, size)]
        if self._on_call is None and len({message._kind for message in messages}) == 1:
            # The usual case: all messages go to the first message's queue.
            queue, item = self.place_of(messages[0])
            if queue is self.inbox:
                return [(queue, messages, size)]
            handler = item[0]
            return [(queue, [(handler, message) for message in messages], size)]
        share = size // len(messages)
        by_queue: dict[WaitQueue, list[Any]] = {}
        for message in messages:
            queue, item = self.place_of(message)
            by_queue.setdefault(queue, []).append(item)
        return [(queue, items, share * len(items)) for queue, items in by_queue.items()]

    def place_of(self, message: M) -> tuple[Any, Any]:
        """Return the wait queue of a message or request, and its item there."""
        if message._kind == REQUEST_KIND:
            queue, handler = self.requests, self._on_request
            if self._on_call is not None and is_call(message):
                handler = self._on_call
        else:
            queue, handler = self.ordered, self._on_message
        return (self.inbox, message) if handler is None else (queue, (handler, message))

    def dispatch_stored(self, messages: list[M]) -> None:
        """Dispatch messages and events from the mailbox, in their order."""
        queue, items, size = self.for_stored(messages)
        queue.put(items, size)

    def for_stored(self, messages: list[M]) -> tuple[Any, list[Any], int]:
        """Return the wait queue of messages from the mailbox, the items for it, and their
        bytes.
        """
        size = sum(map(_weight, messages))
        handle = self._on_stored
        if handle is None:
            return self.inbox, messages, size
        return self.ordered, [(handle, message) for message in messages], size

    def take_stored(self) -> list[M]:
        """Take and return the messages from the mailbox that no handler has begun and no
        caller has taken.
        """
        stored: list[M] = []
        for queue, messages_of in ((self.ordered, _message_of), (self.inbox, _itself)):
            items = queue.take_all()
            others = []
            for item in items:
                message = messages_of(item)
                if isinstance(message, Message) and message.seq:
                    stored.append(cast("M", message))
                else:
                    others.append(item)
            if others:
                queue.put(others, sum(_weight(messages_of(item)) for item in others))
        return stored

    def dispatch_events(self, events: Iterable[tuple[Sink, Any]]) -> None:
        """Dispatch events, all events of a subscription together."""
        by_sink: dict[Sink, list[Any]] = {}
        for sink, item in events:
            by_sink.setdefault(sink, []).append(item)
        for sink, items in by_sink.items():
            size = sum(map(_weight, items))
            callback = sink.callback
            if callback is None:
                sink.queue.put(items, size)
            else:
                self.ordered.put([(callback, item) for item in items], size)

    def tell_undelivered(self, error: BrokerdError, now: float) -> None:
        """Report a failed send without a waiting call.

        Without a handler, the failure is a warning in the log, and many are counted
        together.
        """
        if self._on_undelivered is not None and self.ordered.ended is None:
            self.ordered.put([(self._on_undelivered, error)], _weight(error))
        else:
            self._warn(error, now)

    def tell_changes(self, changes: list[ConnectionEvent]) -> None:
        """Log changes of the connection, and pass them to the handler."""
        for change in changes:
            self._change = change
            self._log_change(change)
            if self._on_connection is not None and self.ordered.ended is None:
                self.ordered.put([(self._on_connection, change)], _weight(change))

    def _log_change(self, change: ConnectionEvent) -> None:
        if change.state in ("lost", "refused"):
            self._lost = True
            log("connection").warning(
                "connection to the broker %s: %s; %s",
                change.state,
                change.reason,
                "the client no longer reconnects" if change.final else "the client reconnects",
            )
        elif self._lost and change.state == "connected":
            self._lost = False
            log("connection").info("connected to the broker again")

    def _warn(self, error: BrokerdError, now: float) -> None:
        recipient = getattr(error, "name", "")
        kind = type(error).__name__
        if self._undelivered.note(f"{kind} {recipient}" if recipient else kind, now):
            log().warning(
                "message %s was not delivered: %s", getattr(error, "message_id", 0), error
            )

    def take_requests(self) -> list[M]:
        """Take and return the requests that no handler has begun and no caller has
        taken.
        """
        requests: list[M] = [item for _, item in self.requests.take_all()]
        waiting: list[M] = self.inbox.take_all()
        others = [message for message in waiting if message._kind != REQUEST_KIND]
        if others:
            self.inbox.put(others, sum(map(_weight, others)))
        return requests + [message for message in waiting if message._kind == REQUEST_KIND]

    def drop_jobs(self) -> None:
        """Drop the waiting jobs of message handlers and callbacks, but not reports of
        failures and of the connection.
        """
        reports = self._take_reports()
        if reports:
            self.ordered.put(reports, sum(_weight(item) for _, item in reports))

    def log_failures(self, now: float) -> None:
        """Log the failures that no handler will get any more."""
        for _, item in self._take_reports():
            if isinstance(item, BrokerdError):
                self._warn(item, now)

    def _take_reports(self) -> list[Job]:
        """Take all ordered jobs; return the reports of failures and of the connection."""
        return [
            job
            for job in self.ordered.inbox.take_all()
            if isinstance(job[1], (BrokerdError, ConnectionEvent))
        ]

    def report(self, effects: Effects[M], now: float) -> None:
        """Log skipped frames, warnings and unexpected errors of the dialog."""
        for error in effects.unreadable:
            if self._unreadable.note(type(error).__name__, now):
                log().warning("message %s was skipped: %s", getattr(error, "message_id", 0), error)
        for sentence in effects.warnings:
            log().warning("%s", sentence)
        cause = None if effects.broken is None else effects.broken.__cause__
        if cause is not None and not isinstance(cause, BrokerdError):
            log().error("connection lost: unexpected error", exc_info=cause)

    @property
    def warning_due(self) -> float | None:
        """When to call ``warn_of_more``; None while no warning waits."""
        due_times = [
            limiter.due
            for limiter in (self._undelivered, self._unreadable)
            if limiter.due is not None
        ]
        return min(due_times, default=None)

    def warn_of_more(self, now: float) -> None:
        """Log the warnings that were only counted until now."""
        for limiter in (self._undelivered, self._unreadable):
            line = limiter.more(now)
            if line:
                log().warning("%s", line)


def failure_body(error: BaseException) -> bytes:
    """Return the payload of the ACK of a message whose handler has raised."""
    return ack_body("failed", None, f"{type(error).__name__}: {error}")


def _message_of(job: Any) -> Any:
    return job[1]


def _itself(item: Any) -> Any:
    return item


def _handler_failure(error: BaseException) -> tuple[str, str]:
    return f"the handler failed: {type(error).__name__}", RequestFailed.code


def _weight(item: object) -> int:
    """Return the memory of a waiting message, error or presence change, in bytes."""
    if isinstance(item, Message):
        return (
            OVERHEAD + len(item) + (0 if item.extension is None else extension_cost(item.extension))
        )
    if isinstance(item, ChannelOffer):
        return OVERHEAD + len(item.payload)
    if isinstance(item, BrokerdError):
        return _ERROR_COST + sys.getsizeof(str(item)) + sys.getsizeof(getattr(item, "name", ""))
    return OVERHEAD


def log(area: str = "") -> Any:
    """Return the library's logger, or that of an area, importing logging at the first
    use.
    """
    import logging

    return logging.getLogger(f"brokerd_client.{area}" if area else "brokerd_client")
