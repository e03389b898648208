"""The threads that run a blocking client's handlers.

A part of the blocking face. The threads hold the client only while a handler runs. No exception of a handler ends a
thread, not even one that is not an Exception: the messages behind it would never be handled.
"""

from __future__ import annotations

import threading
from typing import Any

from brokerd_client._common.dispatcher import Job, log
from brokerd_client.blocking.waiters import WaitQueue
from brokerd_client.errors import BrokerdError

__all__ = ["HandlerThreads"]


class HandlerThreads:
    """Threads that do the jobs of one box.

    count: threads that are kept free for jobs, beside those in which a handler waits for the broker. most: threads in
        all. Only the I/O thread starts them.
    """

    def __init__(self, queue: WaitQueue[Job], name: str, count: int, most: int) -> None:
        self._new_queue = queue
        self._name = name
        self._count = count
        self._most = most
        self._lock = threading.Lock()
        self._threads: dict[int, threading.Thread] = {}
        self._waiting: set[int] = set()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that run now."""
        return list(self._threads.values())

    @property
    def short(self) -> bool:
        """Whether another thread is needed, and allowed."""
        running = len(self._threads)
        return running - len(self._waiting) < self._count and running < self._most

    def start(self) -> None:
        """Start the threads that are needed."""
        while self.short and self._new_queue.ended is None:
            registered = threading.Event()
            threading.Thread(target=self._run, args=(registered,), name=self._name, daemon=True).start()
            registered.wait()

    def begin_wait(self) -> bool:
        """Note that the calling thread waits for the broker; return whether it is one of these."""
        me = threading.get_ident()
        if me not in self._threads:
            return False
        # Not while a thread ends, which would count on this one.
        with self._lock:
            self._waiting.add(me)
        return True

    def end_wait(self) -> None:
        """Note that the calling thread waits no longer."""
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
                        # An interrupted wait may have left it.
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
        """Return whether this thread ends: a thread that waited has come back, and its substitute is not needed."""
        with self._lock:
            if len(self._threads) - len(self._waiting) <= self._count:
                return False
            self._leave()
            return True

    def _leave(self) -> None:
        me = threading.get_ident()
        self._threads.pop(me, None)
        self._waiting.discard(me)


def _on_failure(function: Any, item: Any, error: BaseException) -> None:
    """Log what a handler raised, and have the peer that waits for its answer told."""
    try:
        tell = getattr(function, "failed", None)
        if tell is None:
            log().error("a handler failed", exc_info=error)
        else:
            tell(item, error)
    except BaseException:  # noqa: BLE001 - see the head of this file
        log().exception("the failure of a handler could not be told")
