"""Who gets what has arrived: a handler, a subscription, or whoever calls recv. No I/O, no waiting.

Both faces use one; their boxes differ in how one waits at them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from brokerd_client._common.warning_limiter import WarningLimiter
from brokerd_client.errors import BrokerdError
from brokerd_client.message import Message, extension_cost
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.inbox import OVERHEAD, Inbox
from brokerd_client.wire.envelope import Kind

__all__ = ["Dispatcher", "Job", "Sink", "WaitQueue", "log"]

M = TypeVar("M", bound=Message)

#: What to call, and with what.
Job: TypeAlias = tuple[Callable[[Any], object], Any]

_REQUEST = int(Kind.REQUEST)
#: Bytes that an error costs in this process, its texts and the job that it is a part of aside.
_ERROR_COST: Final = 800


class WaitQueue(Protocol):
    """An inbox somebody can wait at."""

    inbox: Inbox[Any]
    #: Why nothing more will come.
    ended: BrokerdError | None

    def put(self, items: list[Any], size: int) -> None:
        """Add items of ``size`` bytes in all, and wake who waits."""
        ...

    def end(self, why: BrokerdError) -> None:
        """Nothing more will come; wake who waits."""
        ...


class Sink(Protocol):
    """A subscription or a watch."""

    @property
    def queue(self) -> WaitQueue:
        """Where its events are waited for."""
        ...

    @property
    def callback(self) -> Callable[[Any], object] | None:
        """Who gets its events, where nobody waits for them."""
        ...


class Dispatcher(Generic[M]):
    """The handlers and boxes of one client.

    inbox: for recv. ordered: jobs done one after the other. requests: jobs done side by side.
    answering: makes of a request handler a job that sends what it returns.
    """

    def __init__(
        self,
        inbox: WaitQueue,
        ordered: WaitQueue,
        requests: WaitQueue,
        answering: Callable[[Callable[[M], object]], Callable[[M], object]],
    ) -> None:
        self.inbox = inbox
        self.ordered = ordered
        self.requests = requests
        self._answering = answering
        self._on_message: Callable[[M], object] | None = None
        self._on_request: Callable[[M], object] | None = None
        self._on_undelivered: Callable[[BrokerdError], object] | None = None
        self._undelivered = WarningLimiter()
        self._unreadable = WarningLimiter("more messages could not be read")

    def handle_messages(self, handler: Callable[[M], object]) -> None:
        """Give messages to the handler, those that wait already first."""
        self._on_message = handler
        self._dispatch_again()

    def handle_requests(self, handler: Callable[[M], object]) -> None:
        """Give requests to the handler, those that wait already first."""
        self._on_request = self._answering(handler)
        self._dispatch_again()

    def handle_undelivered(self, handler: Callable[[BrokerdError], object]) -> None:
        """Give failures nobody waits for to the handler, instead of logging them."""
        self._on_undelivered = handler

    def _dispatch_again(self) -> None:
        waiting: Inbox[M] = self.inbox.inbox
        earlier = waiting.take_all()
        if earlier:
            self.dispatch_messages(earlier, sum(map(_weight, earlier)))

    def dispatch_messages(self, messages: list[M], size: int) -> None:
        """Pass on messages and requests in their order; ``size`` bytes in all."""
        answer, handle = self._on_request, self._on_message
        if answer is None and handle is None:
            self.inbox.put(messages, size)
            return
        share = size // len(messages)
        asked: list[Job] = []
        told: list[Job] = []
        kept: list[M] = []
        for message in messages:
            if message._kind == _REQUEST:
                if answer is not None:
                    asked.append((answer, message))
                    continue
            elif handle is not None:
                told.append((handle, message))
                continue
            kept.append(message)
        for queue, items in ((self.requests, asked), (self.ordered, told), (self.inbox, kept)):
            if items:
                queue.put(items, share * len(items))

    def dispatch_events(self, events: Iterable[tuple[Sink, Any]]) -> None:
        """Pass on events, each subscription's at once."""
        by_sink: dict[Sink, list[Any]] = {}
        for feed, item in events:
            by_sink.setdefault(feed, []).append(item)
        for feed, items in by_sink.items():
            size = sum(map(_weight, items))
            callback = feed.callback
            if callback is None:
                feed.queue.put(items, size)
            else:
                self.ordered.put([(callback, item) for item in items], size)

    def tell_undelivered(self, error: BrokerdError, now: float) -> None:
        """Pass on a failure nobody waits for; without a handler it is a warning in the log, or one of many."""
        if self._on_undelivered is not None and self.ordered.ended is None:
            self.ordered.put([(self._on_undelivered, error)], _weight(error))
        else:
            self._warn(error, now)

    def _warn(self, error: BrokerdError, now: float) -> None:
        to = getattr(error, "name", "")
        kind = type(error).__name__
        if self._undelivered.note(f"{kind} {to}" if to else kind, now):
            log().warning("message %s was not delivered: %s", getattr(error, "id", 0), error)

    def drop_jobs(self) -> None:
        """Drop what the handler of messages and callbacks have not been called with; failures are told all the same."""
        failures = self._take_failures()
        if failures:
            self.ordered.put(failures, sum(_weight(error) for _, error in failures))

    def log_failures(self, now: float) -> None:
        """Warn of the failures that no handler will be told of any more."""
        for _, error in self._take_failures():
            self._warn(error, now)

    def _take_failures(self) -> list[Job]:
        """Take all that is to be done in order, and return the failures among it."""
        return [job for job in self.ordered.inbox.take_all() if isinstance(job[1], BrokerdError)]

    def report(self, effects: Effects[M], now: float) -> None:
        """Log what was wrong with what the broker has sent."""
        for error in effects.unreadable:
            if self._unreadable.note(type(error).__name__, now):
                log().warning("message %s was skipped: %s", getattr(error, "id", 0), error)
        for sentence in effects.warnings:
            log().warning("%s", sentence)
        cause = None if effects.broken is None else effects.broken.__cause__
        if cause is not None and not isinstance(cause, BrokerdError):
            log().error("a connection is lost in a way that is not foreseen", exc_info=cause)

    @property
    def warning_due(self) -> float | None:
        """When ``warn_of_more`` is to be called, None while there is nothing to warn of."""
        due = [each.due for each in (self._undelivered, self._unreadable) if each.due is not None]
        return min(due, default=None)

    def warn_of_more(self, now: float) -> None:
        """Log what was only counted until now."""
        for each in (self._undelivered, self._unreadable):
            more = each.more(now)
            if more:
                log().warning("%s", more)


def _weight(item: object) -> int:
    """Return the bytes that a message, an error or a change of presence costs while it waits."""
    if isinstance(item, Message):
        return OVERHEAD + len(item) + (0 if item.extension is None else extension_cost(item.extension))
    if isinstance(item, BrokerdError):
        return _ERROR_COST + sys.getsizeof(str(item)) + sys.getsizeof(getattr(item, "name", ""))
    return OVERHEAD


def log() -> Any:
    """Return the library's logger, importing logging at the first use."""
    import logging

    return logging.getLogger("brokerd_client")
