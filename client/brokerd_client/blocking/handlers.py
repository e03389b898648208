"""The threads that run a blocking client's handlers.

A part of the blocking face. The threads hold the client only while a handler runs. No
exception of a handler ends a thread, not even one that is not an Exception: the
messages behind it would never be handled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from brokerd_client._common.dispatcher import Job, log
from brokerd_client.blocking.subscriptions import Message
from brokerd_client.blocking.waiters import WaitQueue
from brokerd_client.errors import AlreadyAnswered, BrokerdError, Closed, Disconnected

__all__ = ["HandlerThreads", "RequestJob"]


class HandlerThreads:
    """Threads that do the jobs of one wait queue. Only the I/O thread starts them.

    Args:
        queue: The wait queue of the jobs.
        name: The name of the threads.
        count: Threads kept free for jobs, beside those in which a handler waits for the
            broker.
        max_threads: Most threads in all.
    """

    def __init__(self, queue: WaitQueue[Job], name: str, count: int, max_threads: int) -> None:
        self._new_queue = queue
        self._name = name
        self._count = count
        self._max_threads = max_threads
        self._lock = threading.Lock()
        self._threads: dict[int, threading.Thread] = {}
        self._waiting: set[int] = set()
        #: Number of jobs that were done.
        self._done = 0

    @property
    def capacity(self) -> int:
        """Jobs that the threads can do at once: of those that run, and of those needed."""
        return max(self._count, len(self._threads))

    @property
    def idle(self) -> bool:
        """Whether every job is done, the job that the calling thread does set aside."""
        own = threading.get_ident() in self._threads
        return self._new_queue.added - self._done - own <= 0

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that are running."""
        return list(self._threads.values())

    @property
    def short(self) -> bool:
        """Whether another thread is needed, and allowed."""
        running = len(self._threads)
        return running - len(self._waiting) < self._count and running < self._max_threads

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
        if me not in self._threads:
            return False
        # Not while another thread ends because it counts on this one.
        with self._lock:
            self._waiting.add(me)
        return True

    def end_wait(self) -> None:
        """Count the calling thread as running again."""
        self._waiting.discard(threading.get_ident())

    def _run(self, registered: threading.Event) -> None:
        queue = self._new_queue
        try:
            self._threads[threading.get_ident()] = threading.current_thread()
            registered.set()
            while not self._retire():
                try:
                    function, item = queue.take(None)
                    try:
                        function(item)
                    except BaseException as error:  # noqa: BLE001 - see the head of this file
                        _on_failure(function, item, error)
                    finally:
                        with self._lock:
                            self._done += 1
                        # An interrupted wait may have left the thread in the set.
                        self._waiting.discard(threading.get_ident())
                    del function, item
                except BrokerdError:
                    if queue.ended is not None:
                        return
                except BaseException:  # noqa: BLE001 - raised between two jobs: see the head of this file
                    log().exception("a handler's thread was interrupted between two messages")
        finally:
            registered.set()
            self._leave()

    def _retire(self) -> bool:
        """Remove this thread and return True if there are more threads than needed.

        That is so when a thread that waited for the broker runs again.
        """
        with self._lock:
            if len(self._threads) - len(self._waiting) <= self._count:
                return False
            self._leave()
            return True

    def _leave(self) -> None:
        me = threading.get_ident()
        self._threads.pop(me, None)
        self._waiting.discard(me)


class RequestJob:
    """A request handler, as a job: its result is the reply."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Callable[[Message], object]) -> None:
        self._handler = handler

    def __call__(self, request: Message) -> None:
        if request._owner._is_over(request):
            return
        result = self._handler(request)
        try:
            if request.cancelled:
                return
            if not request.answered:
                request.reply(result)
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
            request.fail(f"the handler failed: {type(error).__name__}")


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
