"""What moves the bytes of a blocking client: its lock, its connection and its I/O thread.

A part of the blocking face: it moves bytes, sleeps until the dialog's next deadline and wakes who waits.

The I/O thread reads, connects again, and writes what a sender could not finish; senders write from their own thread,
so that a send costs one system call. One lock guards the dialog. The I/O thread and the handlers' threads hold the
client weakly: one that is dropped unclosed ends, with a ResourceWarning.

**Interrupted calls.** An exception can be raised between any two instructions of a thread, by a signal handler or by
PyThreadState_SetAsyncExc. A thread that holds the lock therefore clears ``_clear`` before it changes anything, and sets
it again as its last act. Where ``_clear`` is left unset, no sender writes before the I/O thread has looked
(``_look_over``): it writes what was put out and is not written, or, where it is not known how much has left, ends the
connection, so that every send under way gets its outcome. What can't be repaired like that is only done in the I/O
thread, as a chore. A signal handler that has interrupted its own thread within the lock finds ``_clear`` unset, and
leaves a chore, too: to wait would be to wait for itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar, cast

from brokerd_client._common import forks
from brokerd_client._common.dispatcher import Dispatcher, Job, log
from brokerd_client._common.random_numbers import first_id, jitter, nonce
from brokerd_client.blocking.handlers import HandlerThreads
from brokerd_client.blocking.subscriptions import Message
from brokerd_client.blocking.transport import Transport
from brokerd_client.blocking.waiters import Call, Waiters, WaitQueue, gate, wait_at
from brokerd_client.errors import (
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    TimedOut,
    TlsError,
    WouldDeadlock,
    WrongProcess,
)
from brokerd_client.protocol.dialog import Dialog, Effects
from brokerd_client.protocol.inbox import OVERHEAD, STRETCH, InboxMeter
from brokerd_client.protocol.state import State
from brokerd_client.settings import Settings, broken, no_connection

__all__ = ["MOST_THREADS", "BaseClient"]

T = TypeVar("T")

#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01
#: Seconds until an answer of the system's look-up of a host's name is asked for, if it does not ring the bell.
_LOOKUP_S: Final = 1.0
#: Seconds between two looks of an I/O thread that does not read: for room in the inbox, if no taker rings its bell,
#: and for the end of the connection.
_LOOK_S: Final = 0.5
#: Seconds that the I/O thread rests after an exception, doubled with each that follows at once, and at most.
_REST_S: Final = 0.01
_LONGEST_REST_S: Final = 1.0
#: Seconds that an interrupted start waits at most for the end of the I/O thread.
_STOP_S: Final = 5.0
#: Threads of a request handler in all, unless ``threads`` is more.
MOST_THREADS: Final = 64
#: States in which the connection carries frames.
_LINKED: Final = (State.AUTHENTICATING, State.INTRODUCING, State.READY, State.DRAINING, State.CLOSING)
#: States in which everything is read, for the answers that the state waits for.
_READING: Final = (State.AUTHENTICATING, State.INTRODUCING, State.CLOSING)


class BaseClient:
    """One client's conversation, and the thread that carries it on.

    answering: makes of a request handler a job that sends what it returns. Where nothing else is said, its methods are
        called with the lock held.
    """

    def __init__(
        self, settings: Settings, answering: Callable[[Callable[[Message], object]], Callable[[Message], object]]
    ) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self._settings = settings
        self._dialog: Dialog[Message] = Dialog(
            settings.key,
            settings.name,
            first_id(),
            Message,
            reconnect=settings.reconnect,
            timeout_s=settings.timeout_s,
            inbox=settings.inbox,
        )
        self._transport = _transport(settings)
        #: A thread can tell whether it holds this one, and a signal handler in it does not wait for itself.
        self._lock: Any = threading.RLock()
        #: Woken when the link has become ready, or will not any more, or everything is written.
        self._changes = Waiters()
        #: Whether a send can be written at once: the link is ready, nothing is waiting to be written, no call is at it.
        self._clear = False
        #: What the I/O thread is to do before anything else, and which call waits for that.
        self._chores: deque[tuple[Callable[[], Any], Call | None]] = deque()
        #: Calls whose outcome is to come; each is settled even if the I/O thread loses what the broker has said.
        self._calls: set[Call] = set()
        #: Whether the connection is gone for the dialog, and only the I/O thread has not closed it yet.
        self._dropping = False
        self._dial_at = 0.0
        self._forked = False
        #: Whether nobody but the I/O thread has the client any more.
        self._dropped = False
        #: Whether the I/O thread does no more chores.
        self._over = False
        self._meter = InboxMeter(settings.inbox)
        #: Kept weakly: a subscription that is dropped is not kept alive by being counted.
        self._queues: weakref.WeakSet[WaitQueue[Any]] = weakref.WeakSet()
        self._inbox: WaitQueue[Message] = self._new_queue()
        self._ordered: WaitQueue[Job] = self._new_queue()
        self._requests: WaitQueue[Job] = self._new_queue()
        for queue in (self._inbox, self._ordered, self._requests):
            self._queues.add(queue)
        self._dispatcher: Dispatcher[Message] = Dispatcher(self._inbox, self._ordered, self._requests, answering)
        count = settings.threads
        self._for_requests = HandlerThreads(self._requests, "brokerd requests", count, max(count, MOST_THREADS))
        self._for_messages = HandlerThreads(self._ordered, "brokerd messages", 1, 1)
        self._thread = threading.Thread(
            target=_move_bytes,
            args=(weakref.ref(self), self._transport, (self._inbox, self._ordered, self._requests)),
            name="brokerd client",
            daemon=True,
        )
        self._start_thread()
        forks.register(self)

    def _start_thread(self) -> None:
        """Start the I/O thread. Where that raises, leave neither a thread nor a descriptor.

        Raises the exception of a signal handler that interrupts it, and not the RuntimeError that follows from it.
        """
        outer = sys.exc_info()[1]
        try:
            self._thread.start()
            return
        except BaseException as error:
            # Before the thread is asked for: a thread that begins to run after this ends at once.
            self._dropped = True
            self._transport.wake()
            if self._thread.is_alive():
                self._thread.join(_STOP_S)
            if not self._thread.is_alive():
                # Again, where the thread has done so: one that the interruption breaks ends before it gets there.
                self._transport.close()
            interrupting = _interruption(error, outer)
            if interrupting is error:
                raise
        # Not in the handler above, where the RuntimeError would become its context.
        raise interrupting

    @property
    def closed(self) -> bool:
        """Whether close() was called, or the connection is lost and no other will be made."""
        return self._dialog.state in (State.CLOSING, State.CLOSED, State.GONE)

    def __del__(self) -> None:
        # A client whose constructor raised has no thread.
        if getattr(self, "_thread", None) is None or self._forked or not self._thread.is_alive():
            return
        if self._dialog.state is not State.CLOSED:
            # No source=self: who keeps the warning would keep the client.
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2)
        # Without the lock, which the thread that is stopped for this may hold, at a box.
        self._dispatcher.warn_of_more(time.monotonic())
        # Until this returns the I/O thread's weak reference still works, and using it brings the client back to life.
        self._dropped = True
        self._transport.wake()

    def forked(self) -> None:
        """This is a copy, in a child of the process that made the client. See brokerd_client._common.forks."""
        self._forked = True
        self._transport.disown()

    def _check(self) -> None:
        """Raise WrongProcess in a fork. Needs no lock: in a fork it may be held for ever."""
        if self._forked:
            raise WrongProcess("this client belongs to the process that made it: connect again in the child")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client can't be pickled or copied, for its connection can't: connect in the child")

    # Calls; without the lock

    def _interrupting(self) -> bool:
        """Return whether this thread has interrupted a call of this client, which goes on only after this one.

        It has in a signal handler, and in a destructor that the collector of garbage calls.
        """
        if threading.get_ident() == self._thread.ident:
            return True
        if not self._lock._is_owned():
            return False
        if self._holds_up():
            return True
        self._release()
        return False

    def _release(self) -> None:
        """Release the lock, however often this thread has it."""
        with contextlib.suppress(RuntimeError):
            while True:
                self._lock.release()

    def _refuse_to_wait(self) -> None:
        """Raise WouldDeadlock where a wait would never end."""
        if self._interrupting():
            raise WouldDeadlock(
                "this signal handler holds up a call of the same client: send, publish, reply and close work here, "
                "what waits for an answer does not"
            )

    def _mend(self) -> None:
        """After an exception in a call: release what it still holds, and have the I/O thread look at what it left."""
        if self._interrupting():
            # The lock belongs to the call below this one.
            return
        self._transport.mend()
        if not self._clear:
            # What failed before it had changed anything holds up no other sender.
            with self._lock:
                transport = self._transport
                if not transport.unsure and self._dialog.in_order(len(transport.backlog)):
                    self._settle()
            self._transport.wake()

    def _holds_up(self) -> bool:
        """Return whether a call of this client is below this one on the stack, behind a frame that is not the client's.

        If not, and the lock is held by this thread, then an interrupted call has not released it.
        """
        frame: FrameType | None = sys._getframe(1)
        outside = False
        while frame is not None:
            if frame.f_globals.get("__name__") not in _OWN_MODULES or frame.f_locals.get("self") is not self:
                outside = True
            elif outside and frame.f_code.co_name in _LOCKING:
                return True
            frame = frame.f_back
        return False

    def _put(self, timeout: float | None, put: Callable[..., T], *args: Any, answer: bool = False) -> T:
        """Call ``put``, which puts frames out, once these can be written; write them; return what it returned.

        answer: it is an answer, which a connection that the broker closes soon takes, too.

        Raises WouldDeadlock, and what _wait_until_clear and ``put`` raise.
        """
        self._check()
        deadline = None
        while True:
            try:
                with self._lock:
                    if (self._clear and not self._chores) or (answer and self._takes_answers()):
                        self._clear = False
                        result = put(*args)
                        self._clear = self._write(awaited=True) and self._dialog.state is State.READY
                        return result
                deadline = self._wait_until_clear(timeout, deadline, answer=answer)
            except BaseException:
                self._mend()
                raise

    def _takes_answers(self) -> bool:
        """Return whether an answer can be written at once, on a connection that the broker closes soon."""
        waiting = bool(self._transport.backlog or self._chores or self._dropping or self._transport.unsure)
        return self._dialog.state is State.DRAINING and not waiting and self._dialog.in_order(0)

    def _wait_until_clear(self, timeout: float | None, deadline: float | None, *, answer: bool = False) -> float:
        """Wait for the connection, and until what others have sent is written; return the deadline, for the next call.

        answer: it takes answers, at least.

        Raises TimedOut: others' bytes are still waiting. Raises Disconnected: there is no connection.
        """
        self._refuse_to_wait()
        limit = self._settings.timeout_s if timeout is None else timeout
        if deadline is None:
            deadline = time.monotonic() + limit
        mine = gate()
        try:
            while True:
                self._changes.enter(mine)
                with self._lock:
                    if self._chores:
                        self._clear = False
                    clear = self._clear or (answer and self._takes_answers())
                    linked = self._dialog.state is State.READY or (answer and self._dialog.may_answer)
                    if not clear and (not linked or timeout is not None):
                        remaining = deadline - time.monotonic()
                        if not linked and (remaining <= 0 or self.closed):
                            self._dialog.require_ready()
                    else:
                        # The broker takes nothing now: only the caller's own timeout counts.
                        remaining = None
                if clear:
                    return deadline
                if remaining is not None and remaining <= 0:
                    raise TimedOut(f"the broker took nothing more for {limit:g} s; this was not sent")
                # An interrupted call may have left that to do.
                self._transport.wake()
                if not wait_at(mine, remaining) and not self._changes.leave(mine):
                    # It is being opened at this moment: not to be used twice.
                    mine = gate()
        finally:
            self._changes.leave(mine)

    def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Return whether the condition, which a change may make true, comes about in time."""
        deadline = time.monotonic() + timeout
        mine = gate()
        try:
            while True:
                self._changes.enter(mine)
                if condition():
                    return True
                if not wait_at(mine, deadline - time.monotonic()):
                    return condition()
        finally:
            self._changes.leave(mine)

    def _outcome(self, call: Call, message_id: int, deadline: float | None) -> Any:
        """Wait, and return or raise what became of a call."""
        waiting = self._for_requests.begin_wait()
        try:
            if waiting and self._for_requests.short:
                self._leave_chore(self._for_requests.start)
            done = call.wait(deadline)
        finally:
            if waiting:
                self._for_requests.end_wait()
        if not done:
            self._have_done(lambda: self._dialog.abandon(message_id))
            if not call.done:
                self._calls.discard(call)
                raise TimedOut(f"no answer to {message_id} in time")
        self._calls.discard(call)
        if isinstance(call.value, BaseException):
            raise call.value
        return call.value

    def _forsake(self, call: Call) -> None:
        """After an exception in a call that waits for an outcome: expect none any more."""
        self._leave_chore(lambda: self._dialog.forsake(call))
        # Behind the chore that may be about to add it.
        self._leave_chore(lambda: self._calls.discard(call))

    # Chores

    def _leave_chore(self, act: Callable[[], object]) -> None:
        """Have the I/O thread do it, soon."""
        self._chores.append((act, None))
        self._clear = False
        self._transport.wake()
        if self._over:
            self._do_chores()

    def _have_done(self, act: Callable[[], T]) -> T:
        """Have the I/O thread do it; return what it returns. Raises WouldDeadlock, and what it raises."""
        self._refuse_to_wait()
        call = Call()
        try:
            self._calls.add(call)
            self._chores.append((act, call))
            self._transport.wake()
            if self._over:
                self._do_chores()
            call.wait(None)
            self._calls.discard(call)
        except BaseException:
            self._leave_chore(lambda: self._calls.discard(call))
            raise
        if isinstance(call.value, BaseException):
            raise call.value
        return cast("T", call.value)

    def _do_chores(self) -> None:
        """Do what was left to do; in the I/O thread, or after its end. Takes the lock."""
        with self._lock:
            while self._chores:
                act, call = self._chores.popleft()
                try:
                    value = act()
                    self._write()
                except Exception as error:  # noqa: BLE001 - the caller's, where there is a caller
                    if call is not None:
                        call.settle(error)
                    else:
                        log().exception("a client could not do what it was asked for")
                else:
                    if call is not None:
                        call.settle(value)

    def _put_late(self, ids: list[int], to: str, put: Callable[[], None]) -> None:
        """Put out, as a chore, what a signal handler has sent."""
        try:
            put()
        except (Disconnected, Closed) as error:
            for message_id in ids:
                self._dialog.undelivered += 1
                self._dispatcher.tell_undelivered(
                    Disconnected(f"{error}; {message_id} to {to} was not sent", id=message_id), time.monotonic()
                )

    # With the lock

    def _write(self, *, awaited: bool = False) -> bool:
        """Write what the dialog has put out; return whether a sender may go on.

        awaited: a thread may wait for what becomes of it.
        """
        data = self._dialog.peek()
        if data:
            self._dialog.took(self._transport.write(data))
        if self._transport.backlog or self._chores:
            self._clear = False
            self._transport.wake()
            return False
        if awaited and self._meter.full:
            # The outcome may be behind what is not being read.
            self._transport.wake()
        return True

    def _settle(self) -> None:
        """Let senders go on, if there is nothing in their way."""
        if self._transport.backlog or self._chores or self._dropping:
            return
        if self._dialog.state is State.READY:
            self._clear = True
        elif self._dialog.state is not State.DRAINING:
            return
        if self._changes:
            self._changes.wake()

    def _look_over(self, now: float) -> bool:
        """Return whether the connection can be used, after finishing what an interrupted call has begun.

        Where it is not known how much of that has left, the connection is ended.
        """
        if self._dropping or self._dialog.state not in _LINKED or not self._transport.open:
            return not self._dropping
        transport = self._transport
        if transport.unsure:
            self._end_connection(Disconnected("a call was interrupted while it was writing"), now, at_once=True)
            return False
        if not self._dialog.in_order(len(transport.backlog)):
            self._dialog.recover(transport.given, len(transport.backlog))
            self._write()
        return True

    def _new_queue(self) -> WaitQueue[Any]:
        """Return a new box of this client."""
        # Not a method of the client: the boxes are held by threads that must not hold the client.
        return WaitQueue(self._meter, self._transport, self._lock._is_owned)

    def _end_feed(self, queue: WaitQueue[Any], why: BrokerdError) -> None:
        """End the box of a subscription or watch; what is still in it is the subscriber's, and counts no longer."""
        queue.end(why)
        queue.inbox.release()
        self._queues.discard(queue)

    def _apply(self, effects: Effects[Message], now: float) -> None:
        """Pass on what the dialog says has happened."""
        for call, value in effects.outcomes:
            call.settle(value)
        if self._dialog.state is not State.CLOSING:
            if effects.messages:
                self._dispatcher.dispatch_messages(effects.messages, effects.size + OVERHEAD * len(effects.messages))
            if effects.events:
                self._dispatcher.dispatch_events(effects.events)
        for sink, why in effects.ended:
            self._end_feed(sink.queue, why)
        if effects.undelivered or effects.unreadable or effects.warnings or effects.broken:
            was_due = self._dispatcher.warning_due
            for error in effects.undelivered:
                self._dispatcher.tell_undelivered(error, now)
            self._dispatcher.report(effects, now)
            if was_due is None and self._dispatcher.warning_due is not None:
                self._transport.wake()
        if effects.broken is not None:
            # The peer may be owed the word that it was rejected.
            if self._transport.open and not self._transport.connecting:
                self._write()
            self._end_connection(effects.broken, now)

    def _end_connection(self, reason: BrokerdError, now: float, *, at_once: bool = False) -> None:
        """Tell the dialog that the connection is gone, and everybody what that means; the I/O thread closes it.

        at_once: the next one may be tried without a wait.
        """
        self._clear = False
        # After an interrupted write, bytes may have left that nothing here knows of.
        in_order = not self._transport.unsure and self._dialog.in_order(len(self._transport.backlog))
        doubtful = 0 if in_order else self._dialog.unwritten
        effects = self._dialog.lost(reason, now, jitter(), doubtful=doubtful, at_once=at_once)
        self._dial_at = self._dialog.retry_at
        self._dropping = True
        # Before the boxes end, so that on_undelivered hears of a last loss too.
        self._apply(effects, now)
        self._note_state()
        self._transport.wake()

    def _note_state(self) -> None:
        """Tell who waits for the link what has become of it."""
        state = self._dialog.state
        if state is State.GONE:
            why = Disconnected(f"the connection to the broker is gone: {self._dialog.reason}")
            for queue in list(self._queues):
                queue.end(why)
        elif state in (State.CLOSING, State.CLOSED):
            for queue in list(self._queues):
                queue.end(Closed("the client is closed"))
        self._changes.wake()

    # The I/O thread; without the lock

    def prepare(self) -> tuple[float | None, bool] | None:
        """Do what is due; return (seconds to wait, whether to read), or None when there is nothing more to do."""
        if self._dropped:
            return None
        now = time.monotonic()
        with self._lock:
            self._clear = False
            self._look_over(now)
            self._drop()
            self._do_chores()
            self._apply(self._dialog.tick(now), now)
            self._drop()
            state = self._dialog.state
            if state in _LINKED and self._transport.open:
                self._write()
            over = state in (State.CLOSED, State.GONE)
            due = self._dispatcher.warning_due
            if due is not None and (over or now >= due):
                self._dispatcher.warn_of_more(now)
            if over:
                self._over = True
                self._do_chores()
                return None
            dialing = state in (State.IDLE, State.WAITING) and now >= self._dial_at
            if dialing:
                self._dialog.dialing(now)
            self._settle()
        if dialing or (
            state is State.CONNECTING
            and not self._transport.open
            and (now >= self._dial_at or self._transport.looked_up)
        ):
            self._dial(now)
        with self._lock:
            state = self._dialog.state
            deadline = self._dialog.next_deadline()
            if state is State.CONNECTING and not self._transport.open:
                deadline = self._dial_at if deadline is None else min(deadline, self._dial_at)
            due = self._dispatcher.warning_due
            if due is not None:
                deadline = due if deadline is None else min(deadline, due)
            limit = self._meter.limit
            full = self._meter.weigh((queue.inbox for queue in self._queues), limit=limit)
            reading = not full or (len(self._dialog.pending_calls) > 0 and self._meter.held <= STRETCH * limit)
            # A full inbox is no reason to leave the broker's side of a handshake unread, or the answers to a close().
            # A connection that has ended is read to its end: another one has to be made.
            reading = reading or state in _READING or self._transport.ended
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not reading:
                remaining = _LOOK_S if remaining is None else min(remaining, _LOOK_S)
            if self._chores or self._dropping:
                remaining = 0.0
        return remaining, reading

    def _drop(self) -> None:
        """Close the connection, if it is gone for the dialog."""
        if self._dropping:
            self._transport.drop()
            self._dropping = False

    def replace(self, thread: threading.Thread) -> None:
        """Note that another thread is the I/O thread from now on."""
        self._thread = thread

    def survive(self, error: BaseException) -> None:
        """Go on after an exception in this thread: its connection is lost like any other."""
        self._release()
        self._transport.mend()
        log().error("a connection is lost in a way that is not foreseen", exc_info=error)
        with self._lock:
            self._clear = False
            now = time.monotonic()
            if not self._dropping and self._dialog.state not in (State.IDLE, State.WAITING, State.GONE, State.CLOSED):
                reason = Disconnected(f"the connection broke: {error!r}")
                reason.__cause__ = error
                # A bug raises an Exception, and may raise it again on the next connection: that one has to wait.
                self._end_connection(reason, now, at_once=not isinstance(error, Exception))
            self._transport.renew()
            self._dropping = False
            # Those whose chore is still to be done wait for that.
            for call in self._calls - {call for _, call in self._chores}:
                call.settle(InDoubt("the connection broke, and what became of this call is not known"))
            self._note_state()

    def _dial(self, now: float) -> None:
        try:
            done = self._transport.dial()
        except BlockingIOError:
            self._dial_at = now + (_LOOKUP_S if self._transport.looking_up else _CROWDED_S)
            return
        except OSError as error:
            self._lose(no_connection(self._settings.address, error))
            return
        except Exception as error:  # noqa: BLE001 - a bug; but who waits for the connection is to hear of it
            self._lose_by_bug(no_connection(self._settings.address, error), error)
            return
        if done:
            self._open()

    def _open(self) -> None:
        try:
            bindings = self._transport.bindings
        except TlsError as error:
            self._lose(error)
            return
        with self._lock:
            if self._dialog.state is State.CONNECTING:
                self._dialog.opened(nonce(), bindings)

    def _lose(self, reason: BrokerdError) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._dropping and self._dialog.state not in (State.WAITING, State.GONE):
                self._end_connection(reason, now)

    def _lose_by_bug(self, reason: BrokerdError, error: Exception) -> None:
        log().exception("a connection is lost in a way that is not foreseen")
        reason.__cause__ = error
        self._lose(reason)

    def act(self, *, readable: bool, writable: bool) -> None:
        """Do what the socket is ready for."""
        try:
            self._act(readable=readable, writable=writable)
        except Exception as error:  # noqa: BLE001 - a bug; but who waits is to hear of it, and another may work
            self._lose_by_bug(Disconnected(f"the connection broke: {error}"), error)

    def _act(self, *, readable: bool, writable: bool) -> None:
        transport = self._transport
        if transport.connecting:
            if readable or writable:
                try:
                    done = transport.connected()
                except OSError as error:
                    self._lose(no_connection(self._settings.address, error))
                    return
                if done:
                    self._open()
            return
        gone: OSError | None = None
        data: bytes | None = None
        try:
            if writable:
                self._flush()
        except OSError as error:
            gone = error
        try:
            if readable or gone is not None:
                data = transport.read()
            while data:
                if not self._take_in(data) or gone is None:
                    return
                # Nothing more comes than is here.
                data = transport.read()
        except OSError as error:
            gone = gone or error
        if gone is not None:
            self._lose(broken(gone))
        elif data is not None:
            self._lose(self._dialog.hung_up())

    def _take_in(self, data: bytes) -> bool:
        """Have the dialog read it; return whether the connection goes on."""
        now = time.monotonic()
        with self._lock:
            self._clear = False
            if not self._look_over(now):
                return False
            before = self._dialog.state
            effects = self._dialog.receive(data, self, now)
            self._apply(effects, now)
            if effects.broken is None:
                self._write()
            if self._dialog.state is not before and self._dialog.may_answer:
                self._note_state()
            self._settle()
            return not self._dropping

    def _flush(self) -> None:
        with self._lock:
            self._clear = False
            if self._look_over(time.monotonic()) and self._transport.unwritten():
                self._dialog.wrote(self._transport.flush())
                if not self._transport.backlog and self._changes:
                    self._changes.wake()
            # What is left besides the backlog, of TLS, may go with a read too: nobody is to wait for that.
            self._settle()


def _interruption(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the exception that interrupted a call of ``threading``, or ``error`` where nothing did.

    An exception inside ``Condition.wait`` finds a lock released that ``with`` releases again: "release unlocked lock".
    outer: the exception that was being handled before the call, which is not the interruption.
    """
    while isinstance(error, RuntimeError) and error.__context__ not in (None, outer) and _from_threading(error):
        assert error.__context__ is not None
        error = error.__context__
    return error


def _from_threading(error: BaseException) -> bool:
    """Return whether the standard library's ``threading`` raised it, and not a signal handler."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == threading.__name__


def _transport(settings: Settings) -> Transport:
    if settings.tls is None:
        return Transport(settings.address)
    from brokerd_client.blocking.tls_transport import TlsTransport

    return TlsTransport(settings.address, settings.tls)


#: Where the methods are that may hold a client's lock.
_OWN_MODULES: Final = (__name__, "brokerd_client.blocking.client")
_LOCKING: Final = ("send", "_put", "_mend", "_wait_until_clear", "_do_chores", "close")


def _move_bytes(
    ref: weakref.ref[BaseClient],
    transport: Transport,
    queues: Iterable[WaitQueue[Any]],
    error: BaseException | None = None,
) -> None:
    """Run a client's I/O thread, which ends with the client and by nothing else.

    Holds the client only between two waits. boxes: ended when the thread ends, for a client that was dropped unclosed
    can't do it. error: what has ended the thread before this one.
    """
    try:
        _keep_moving(ref, transport, error)
        transport.close()
        for queue in queues:
            queue.end(Closed("the client is closed"))
    except BaseException as caught:  # noqa: BLE001 - it has struck the handling of another one, below
        thread = threading.Thread(
            target=_move_bytes, args=(ref, transport, queues, caught), name="brokerd client", daemon=True
        )
        if (client := ref()) is not None:
            client.replace(thread)
        thread.start()


def _keep_moving(ref: weakref.ref[BaseClient], transport: Transport, error: BaseException | None) -> None:
    rest_s = 0.0
    while True:
        try:
            if error is not None:
                rest_s = min(_LONGEST_REST_S, 2 * rest_s + _REST_S)
                if not _survive(ref, error):
                    return
                error = None
                time.sleep(rest_s)
            while _turn(ref, transport):
                rest_s = 0.0
            return
        except BaseException as caught:  # noqa: BLE001 - without this thread every call of the client would hang
            error = caught


def _turn(ref: weakref.ref[BaseClient], transport: Transport) -> bool:
    """Do what is due, wait, and do what the socket is ready for; return whether the thread goes on."""
    if (client := ref()) is None:
        return False
    try:
        plan = client.prepare()
    finally:
        del client
    if plan is None:
        return False
    readable, writable = transport.wait(plan[0], reading=plan[1])
    if (client := ref()) is None:
        return False
    try:
        client.act(readable=readable, writable=writable)
    finally:
        del client
    return True


def _survive(ref: weakref.ref[BaseClient], error: BaseException) -> bool:
    if (client := ref()) is None:
        return False
    try:
        client.survive(error)
    finally:
        del client
    return True
