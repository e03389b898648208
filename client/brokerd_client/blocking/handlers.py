"""The threads that run a blocking client's handlers.

A part of the blocking face. The threads hold the client only while a handler runs. No
exception of a handler ends a thread, not even one that is not an Exception: the
messages behind it would never be handled.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from brokerd_client._common.dispatcher import FailureAnswer, Job, failure_body, log
from brokerd_client._common.tracing import Handling
from brokerd_client.blocking.subscriptions import Message
from brokerd_client.blocking.waiters import WaitQueue
from brokerd_client.errors import AlreadyAnswered, BrokerdError, Closed, Disconnected
from brokerd_client.protocol.mailbox import ack_body

__all__ = ["HandlerThreads", "RequestJob", "StoredJob", "in_span", "require_function"]

#: Seconds between raising the limit in flight and checking whether it can be lowered. A
#: shorter time would cost nested requests an operation each.
_REVIEW_S: Final = 1.0


def require_function(handler: object) -> None:
    """Raise TypeError if no thread can call the handler.

    The call of a coroutine function returns at once, and its message would count as
    handled.
    """
    name = getattr(handler, "__name__", type(handler).__name__)
    if not callable(handler):
        raise TypeError(f"a handler is a function, not {name}")
    if inspect.iscoroutinefunction(handler):
        raise TypeError(
            f"{name} is a coroutine function, and this client is blocking: connect an asyncio"
            " client"
        )


class HandlerThreads:
    """Threads that do the jobs of one wait queue. Only the I/O thread starts them.

    Args:
        queue: The wait queue of the jobs.
        name: The name of the threads.
        count: Threads kept free for jobs, beside those in which a handler waits for the
            broker.
        max_threads: Most threads in all.
        on_review: Called without an argument when the limit in flight may be lowered.
    """

    def __init__(
        self,
        queue: WaitQueue[Job],
        name: str,
        count: int,
        max_threads: int,
        on_review: Callable[[], object] = lambda: None,
    ) -> None:
        self._new_queue = queue
        self._name = name
        self.count = count
        self._max_threads = max_threads
        self._on_review = on_review
        #: When the limit in flight was raised or last checked; None while it is not raised.
        self.raised_at: float | None = None
        self._lock = threading.Lock()
        #: The threads that run, by their ids.
        self.running: dict[int, threading.Thread] = {}
        self._waiting: set[int] = set()
        #: Number of jobs that were done.
        self._done = 0

    @property
    def capacity(self) -> int:
        """Jobs that the threads can do at once: of those that run, and of those needed."""
        return max(self.count, len(self.running))

    @property
    def idle(self) -> bool:
        """Whether every job is done, the job that the calling thread does set aside."""
        own = threading.get_ident() in self.running
        return self._new_queue.added - self._done - own <= 0

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that are running."""
        return list(self.running.values())

    @property
    def short(self) -> bool:
        """Whether another thread is needed, and allowed."""
        running = len(self.running)
        return running - len(self._waiting) < self.count and running < self._max_threads

    def start(self) -> None:
        """Start the threads that are needed."""
        while self.short and self._new_queue.ended is None:
            registered = threading.Event()
            threading.Thread(
                target=self._run, args=(registered,), name=self._name, daemon=True
            ).start()
            registered.wait()

    def begin_wait(self) -> bool:
        """Count the calling thread as waiting; return whether it is a handler thread."""
        me = threading.get_ident()
        if me not in self.running:
            return False
        # Not while another thread ends because it counts on this one.
        with self._lock:
            self._waiting.add(me)
        return True

    def end_wait(self) -> None:
        """Count the calling thread as running again."""
        self._waiting.discard(threading.get_ident())

    def _run(self, registered: threading.Event) -> None:
        queue, me = self._new_queue, threading.get_ident()
        try:
            self.running[me] = threading.current_thread()
            registered.set()
            # Of the property _too_many, without the call.
            while not (len(self.running) - len(self._waiting) > self.count and self._retire()):
                try:
                    if self.raised_at is not None:
                        self._review(self.raised_at)
                    # A raised limit is checked even if no job comes. After a check it is
                    # raised again, a moment later, while more threads run than needed.
                    lowered = self.raised_at is None and len(self.running) <= self.count
                    function, item = queue.take(None if lowered else _REVIEW_S)
                    try:
                        function(item)
                    except BaseException as error:  # noqa: BLE001 - see the head of this file
                        _on_failure(function, item, error)
                    finally:
                        with self._lock:
                            self._done += 1
                        # An interrupted wait may have left the thread in the set.
                        self._waiting.discard(me)
                    del function, item
                except BrokerdError:
                    if queue.ended is not None:
                        return
                except BaseException:  # noqa: BLE001 - raised between two jobs: see the head of this file
                    log().exception("a handler's thread was interrupted between two messages")
        finally:
            registered.set()
            self._leave()

    def _review(self, raised_at: float) -> None:
        """Call ``on_review`` if the limit in flight was raised some time ago."""
        if time.monotonic() >= raised_at + _REVIEW_S:
            # One thread is enough; the client sets it again if threads still wait.
            self.raised_at = None
            self._on_review()

    @property
    def _too_many(self) -> bool:
        """Whether there are more threads than needed.

        That is so when a thread that waited for the broker runs again.
        """
        return len(self.running) - len(self._waiting) > self.count

    def _retire(self) -> bool:
        """Remove this thread and return True if there are still more threads than needed."""
        with self._lock:
            if not self._too_many:
                return False
            self._leave()
            return True

    def _leave(self) -> None:
        me = threading.get_ident()
        self.running.pop(me, None)
        self._waiting.discard(me)


def in_span(
    handler: Callable[[Message], object], span: Callable[[Message], Handling]
) -> Callable[[Message], object]:
    """Return a handler that runs in a span of its own for each message."""

    def handle(message: Message) -> object:
        with span(message):
            return handler(message)

    return handle


class RequestJob:
    """A request handler, as a job: its result is the reply."""

    __slots__ = ("_failure", "_handler")

    def __init__(self, handler: Callable[[Message], object], failure: FailureAnswer) -> None:
        self._handler = handler
        self._failure = failure

    def __call__(self, request: Message) -> None:
        client = request._owner
        if request.is_over(time.monotonic()) and client._is_over(request):
            return
        result = self._handler(request)
        try:
            if request._cancelled:
                return
            if not request._answered:
                client._reply(request, result)
            elif result is not None:
                log().warning(
                    "the handler of a request of %s returned a value after it had answered",
                    request.sender,
                )
        except (Disconnected, Closed):
            log().warning(
                "a request of %s could not be answered: the connection is gone", request.sender
            )

    def failed(self, request: Message, error: BaseException) -> None:
        """Log the handler's exception, and tell the requester that its request has
        failed.
        """
        if isinstance(error, Closed) and request._owner.closed:
            log().info("a request of %s was not finished: client closed", request.sender)
            return
        log().error("the handler of a request of %s failed", request.sender, exc_info=error)
        with contextlib.suppress(AlreadyAnswered, Disconnected, Closed):
            request.fail(*self._failure(error))


class StoredJob:
    """A message handler, as a job for messages from the mailbox: it acknowledges them."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Callable[[Message], object]) -> None:
        self._handler = handler

    def __call__(self, message: Message) -> None:
        self._handler(message)
        client = message._owner
        client._settle_at_once(message, ack_body("done"), client._ordered)

    def failed(self, message: Message, error: BaseException) -> None:
        """Log the handler's exception, and return the message to the mailbox."""
        if isinstance(error, Closed) and message._owner.closed:
            log().info("a message of %s was not processed: client closed", message.sender)
            return
        log().error("the handler of message %s of the mailbox failed", message.seq, exc_info=error)
        client = message._owner
        client._settle_at_once(message, failure_body(error), client._ordered)


def _on_failure(function: Any, item: Any, error: BaseException) -> None:
    """Log a handler's exception, and send an error to a peer that waits for its answer."""
    try:
        report = getattr(function, "failed", None)
        if report is None and isinstance(error, Closed):
            log().info("a handler was not finished: client closed")
        elif report is None:
            log().error("a handler failed", exc_info=error)
        else:
            report(item, error)
    except BaseException:  # noqa: BLE001 - see the head of this file
        log().exception("the failure of a handler could not be reported")
