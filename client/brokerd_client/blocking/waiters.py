"""Objects that threads wait on: for a call's outcome, for a change, and for messages.

A part of the blocking face. It knows nothing of connections, but wakes the I/O thread
when the inbox has room again.

An exception can be raised in a thread at any moment, by a signal handler for example.
Nothing here needs a lock that such a thread could keep. An interrupted wait loses
neither an item nor another thread's wake-up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, starmap
from typing import Any, Final, Generic, TypeVar

from brokerd_client.blocking.gate import Gate, raised_by_handler
from brokerd_client.blocking.leader import LONGEST_WAIT_MS, Leader
from brokerd_client.blocking.transport import Transport
from brokerd_client.errors import BrokerdError, TimedOut, WouldDeadlock
from brokerd_client.protocol.inbox import Inbox, InboxMeter

__all__ = ["NOTHING", "Call", "Turn", "WaitQueue", "Waiters"]

T = TypeVar("T")

#: A value that is never an item: see WaitQueue.take.
NOTHING: Final = object()


class Call(Gate):
    """One thread's wait for one outcome, and the gate at which the thread waits."""

    # Of the class, because each call would set them again.
    #: The result of Leader.begin, if that was called when the frame was queued.
    poll: Any = None
    done = False
    value: Any = None

    def settle(self, value: Any) -> None:
        """Set the outcome and wake the thread; a second outcome changes nothing."""
        if not self.done:
            self.value = value
            self.done = True
        self.open()


class Turn(Gate):
    """One thread's wait for an item of a wait queue."""

    def __init__(self) -> None:
        # As in Gate, without the call.
        self.lock = threading.Lock()
        self.lock.acquire()
        #: The item, if this thread has read it itself.
        self.items: list[Any] = []


class Waiters:
    """Threads that wait for a change.

    A thread first enters its gate, then checks whether it has to wait. Only then does
    it wait at the gate, so that no change is missed.
    """

    __slots__ = ("_gates",)

    def __init__(self) -> None:
        #: In order of arrival. Only ``_first`` expects an exception of an operation on
        #: it, so that a signal handler's exception can't be mistaken for one.
        self._gates: dict[Gate, None] = {}

    def __bool__(self) -> bool:
        return bool(self._gates)

    def enter(self, gate: Gate) -> None:
        """Add a gate, which the next change opens."""
        self._gates[gate] = None

    def leave(self, gate: Gate) -> bool:
        """Remove the gate; return whether it was still there, so that no wake-up is
        lost.
        """
        return self._gates.pop(gate, 0) is None

    def wake(self, count: int | None = None) -> None:
        """Open ``count`` gates; with None, open all of them."""
        remaining = len(self._gates) if count is None else count
        while remaining > 0 and (first := self._first()) is not None:
            if self.leave(first):
                first.open()
                remaining -= 1

    def _first(self) -> Gate | None:
        """Return the gate that was entered first, or None."""
        while True:
            try:
                return next(iter(self._gates), None)
            except RuntimeError as error:
                # Another thread has entered or left between ``iter`` and ``next``.
                if raised_by_handler(error):
                    raise


class WaitQueue(Generic[T]):
    """An inbox that threads can wait at.

    Args:
        meter: Counts the bytes of all inboxes of the client.
        transport: The client's transport, whose ``wake`` wakes the I/O thread.
        leader: Lets a waiting thread read; None if only the I/O thread does.
        interrupting: Returns whether the calling thread is in a signal handler that has
            interrupted a call of the client. Nothing can then arrive until it returns.
    """

    __slots__ = (
        "__weakref__",
        "_interrupting",
        "_leader",
        "_meter",
        "_transport",
        "added",
        "ended",
        "inbox",
        "waiters",
    )

    def __init__(
        self,
        meter: InboxMeter,
        transport: Transport,
        leader: Leader | None,
        interrupting: Callable[[], bool],
    ) -> None:
        self.inbox: Inbox[T] = Inbox(meter)
        self.waiters = Waiters()
        #: Number of items added so far, without those that take_all returned.
        self.added = 0
        #: The reason why no more items will arrive; None while they may.
        self.ended: BrokerdError | None = None
        self._meter = meter
        self._transport = transport
        self._leader = leader
        self._interrupting = interrupting

    def put(self, items: list[T], size: int) -> None:
        """Add items, and wake one waiting thread per item."""
        self.added += len(items)
        self.inbox.put(items, size)
        self.waiters.wake(len(items))

    def put_unread(self, items: list[T], size: int, reader: Gate) -> None:
        """Add the items in the transport's ``unread``, in place of the I/O thread.

        Args:
            items: The items.
            size: Their bytes.
            reader: The gate of the thread that has read them.
        """
        self.added += len(items)
        self.inbox.count(items, size)
        # One call, so that an exception of a signal handler comes before it or after it.
        # The second iterator clears ``unread``, and yields nothing.
        handled: Iterator[Any] = filter(None, starmap(self._transport.unread.clear, ((),)))
        self.inbox.items.extend(chain(items, handled))
        others = len(items)
        if self.waiters.leave(reader):
            reader.open()
            others -= 1
        if others:
            self.waiters.wake(others)

    def hand_over(self, item: T, reader: Turn) -> None:
        """Give the item in the transport's ``unread`` to the thread that has read it.

        No other item may wait.
        """
        self.added += 1
        # As in put_unread.
        handled: Iterator[Any] = filter(None, starmap(self._transport.unread.clear, ((),)))
        reader.items.extend(chain((item,), handled))

    def take_all(self) -> list[T]:
        """Take and return all items."""
        items = self.inbox.take_all()
        self.added -= len(items)
        return items

    def end(self, reason: BrokerdError) -> None:
        """Store the reason why no more items will arrive, and wake every waiting
        thread.
        """
        if self.ended is None:
            self.ended = reason
        self.waiters.wake()

    def take(self, timeout: float | None) -> T:
        """Return the next item.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            TimedOut: No item arrived in time.
            BrokerdError: The reason why no more items will arrive.
        """
        items = self.inbox.items
        item: T = NOTHING  # type: ignore[assignment]
        try:
            try:
                # A loop, because CPython raises a signal handler's exception after a
                # call of popleft, which would lose the item. It does not raise between
                # a loop's step and the assignment of its variable.
                for item in iter(items.popleft, NOTHING) if items else ():  # noqa: B007
                    break
            except IndexError as error:
                # Another thread has taken the last item.
                if raised_by_handler(error):
                    raise
            if item is NOTHING and timeout is None and self._transport.kept and self._leader:
                item = self._read(self._leader)
            if item is NOTHING:
                item = self._wait(timeout)
            if self._meter.full and len(items) <= self.inbox.mark:
                self.resume_reading()
        except BaseException:
            if item is not NOTHING:
                self.give_back(item)
            raise
        return item

    def _read(self, leader: Leader) -> Any:
        """Return the next item, if the input is kept for this thread and brings it alone.

        Otherwise return NOTHING. A thread that handles one message at a time comes here
        for each. The function is _wait with Leader.wait, inlined for this case.
        """
        turn, gates = Turn(), self.waiters._gates
        try:
            try:
                gates[turn] = None
                client = leader.client()
                poll = None if client is None else client._begin_take(turn)
                # Not held during the wait: see Leader.
                del client
                if poll is None:
                    return NOTHING
                # An item may have come before ``turn.interrupt`` was set: no input would
                # end the wait for it.
                if self.inbox.items or not turn.lock.locked():
                    leader.leave(turn)
                    return NOTHING
                if not self._transport.input_poll.run(poll):
                    poll.poll(LONGEST_WAIT_MS)
                client = leader.client()
                if client is not None and client._take_lone(self, turn):
                    return turn.items[0]
                del client
                leader.wait(turn, None, self, poll=poll, ready=True)
                return NOTHING
            finally:
                # As in _wait.
                if gates.pop(turn, 0) is not None and self.inbox.items:
                    self.waiters.wake(1)
        except BaseException:
            leader.leave(turn)
            leader.interrupting()
            if turn.items:
                self.give_back(turn.items[0])
            raise

    def give_back(self, item: Any) -> None:
        """Put back an item whose taking was interrupted."""
        self.inbox.items.appendleft(item)
        self.waiters.wake(1)

    def _wait(self, timeout: float | None) -> Any:
        if timeout != 0 and self.ended is None and self._interrupting():
            raise WouldDeadlock(
                "no message can arrive while this signal handler interrupts a call of the same"
                " client"
            )
        item: Any = NOTHING
        items = self.inbox.items
        own_gate = Gate()
        try:
            try:
                deadline = None if timeout is None else time.monotonic() + timeout
                while True:
                    self.waiters.enter(own_gate)
                    if not items:
                        if self.ended is not None:
                            raise self.ended.with_traceback(None)
                        if timeout == 0 or not (
                            own_gate.wait(deadline)
                            if self._leader is None
                            else self._leader.wait(own_gate, deadline, self)
                        ):
                            raise TimedOut(f"nothing arrived within {timeout:g} s")
                    try:
                        for item in iter(items.popleft, NOTHING) if items else ():
                            return item
                    except IndexError as error:
                        # Another thread has taken the last item.
                        if raised_by_handler(error):
                            raise
            finally:
                # A wake-up that this thread does not need is passed on to another
                # thread.
                if not self.waiters.leave(own_gate) and items:
                    self.waiters.wake(1)
        except BaseException:
            if item is not NOTHING:
                self.give_back(item)
            raise

    def resume_reading(self) -> None:
        """Wake the I/O thread to check whether the inbox has room; wake it once per
        check.
        """
        meter = self._meter
        if not meter.weighing_due:
            meter.weighing_due = True
            try:
                self._transport.wake()
            except BaseException:
                meter.weighing_due = False
                raise
