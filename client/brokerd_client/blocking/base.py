"""The lock, the connection and the I/O thread of a blocking client.

A part of the blocking face. It moves bytes, sleeps until the dialog's next deadline and
wakes waiting threads.

The I/O thread reads, reconnects, and writes the bytes that a sender could not write.
Senders write from their own thread, so that a send costs one system call. A thread that
waits for an answer or a message reads in place of the I/O thread: see ``leader``. One
lock guards the dialog. The I/O thread and the handler threads hold only a weak
reference to the client. A client that is dropped unclosed therefore ends, with a
ResourceWarning.

**Interrupted calls.** A signal handler or PyThreadState_SetAsyncExc can raise an
exception between any two instructions of a thread. A thread that holds the lock
therefore clears ``_clear`` before it changes anything. It sets ``_clear`` again as its
last act. While ``_clear`` is unset, no sender writes until the I/O thread has checked
the connection (``_recover_writes``). The I/O thread then writes the queued frames that were
not written. If the number of bytes written is not known, it ends the connection
instead. Every send in flight then gets its outcome. Changes that can't be repaired like
this are made only in the I/O thread, as chores. A signal handler may interrupt its own
thread while that thread holds the lock. It finds ``_clear`` unset and leaves a chore,
too; waiting would be a deadlock with itself.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from brokerd_client import message
from brokerd_client._common import forks
from brokerd_client._common.client_properties import ClientProperties
from brokerd_client._common.dispatcher import Dispatcher, Job, log
from brokerd_client._common.random_numbers import first_id, jitter, nonce
from brokerd_client._common.rpc import Service
from brokerd_client.blocking.gate import Gate, raised_by_handler
from brokerd_client.blocking.handlers import (
    HandlerThreads,
    RequestJob,
    StoredJob,
    require_function,
)
from brokerd_client.blocking.leader import Leader
from brokerd_client.blocking.subscriptions import BaseSubscription, Message
from brokerd_client.blocking.transport import Transport
from brokerd_client.blocking.waiters import (
    NOTHING,
    Call,
    Turn,
    Waiters,
    WaitQueue,
)
from brokerd_client.codec import encode
from brokerd_client.errors import (
    AddressError,
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    TimedOut,
    TlsError,
    WouldDeadlock,
    WrongProcess,
)
from brokerd_client.message import VALUE_COST, Delivery, Receipt
from brokerd_client.protocol.bulk import Bulk
from brokerd_client.protocol.dialog import LINGER_S, Dialog, Effects
from brokerd_client.protocol.inbox import OVERHEAD, STRETCH, InboxMeter
from brokerd_client.protocol.mailbox import ack_body
from brokerd_client.protocol.pending import Deadline, within
from brokerd_client.protocol.state import State
from brokerd_client.settings import (
    ENDLESS_S,
    Settings,
    broken,
    check_timeout,
    no_connection,
    same_kind,
)
from brokerd_client.wire.envelope import check_address, check_topic
from brokerd_client.wire.layout import REPLY_KIND, REQUEST_KIND

if TYPE_CHECKING:
    from brokerd_client.connection.stream import Connection

__all__ = ["MOST_THREADS", "BaseClient"]

H = TypeVar("H")
T = TypeVar("T")

#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01
#: Seconds until the I/O thread checks a look-up of a host's name that has not woken it.
_LOOKUP_S: Final = 1.0
#: Seconds between two checks by an I/O thread that does not read. It checks whether the
#: inbox has room, if no reader of the inbox woke it, and whether the connection has
#: ended.
_END_CHECK_S: Final = 0.5
#: Seconds that the I/O thread sleeps after an exception: the first time, doubled with
#: each exception that follows at once, and the maximum.
_REST_S: Final = 0.01
_LONGEST_REST_S: Final = 1.0
#: Seconds by which the dialog may be late with its own deadlines.
_LATENESS_S: Final = 1.0
#: Seconds between two checks of drain() whether the handlers have finished.
_DRAIN_CHECK_S: Final = 0.01
#: Seconds that close() waits for a handler that is still running.
_HANDLER_GRACE_S: Final = 1.0
#: Seconds that close() waits for the I/O thread.
_THREAD_GRACE_S: Final = 5.0
#: Seconds that an interrupted start waits for the end of the I/O thread, at most.
_STOP_S: Final = 5.0
#: Threads for a client's request handler, unless ``handlers`` says otherwise. Threads in
#: which a handler waits for the broker come on top.
_DEFAULT_HANDLERS: Final = 4
#: Seconds of the longest timeout for which a request takes the short way.
_LONGEST_POLL_S: Final = 3600.0
#: Most threads of a client's request handler, unless ``handlers`` is larger.
MOST_THREADS: Final = 64
#: Kept in a name, because looking up an enum member takes long.
_READY: Final = State.READY
#: States in which the connection carries frames.
_LINKED: Final = (
    State.AUTHENTICATING,
    State.INTRODUCING,
    State.READY,
    State.DRAINING,
    State.CLOSING,
)
#: States in which the socket is read even if the inbox is full, for the answers they
#: need.
_READING: Final = (State.AUTHENTICATING, State.INTRODUCING, State.CLOSING)


class BaseClient(ClientProperties):
    """One client's dialog with the broker, and its I/O thread.

    Unless a comment says otherwise, the methods are called with the lock held.

    Args:
        settings: The settings of the client.
    """

    def __init__(self, settings: Settings) -> None:
        self.allow_pickle_from = settings.allow_pickle_from
        self.json_codec = settings.json_codec
        self._service = Service(allow_async=False)
        self._settings = settings
        self._addresses = settings.addresses
        self._dialog: Dialog[Message] = Dialog(
            settings.key,
            settings.name,
            first_id(),
            Message,
            without_key=settings.without_key,
            reconnect=settings.reconnect,
            timeout_s=settings.timeout_s,
            wait_s=settings.wait_s,
            addresses=len(settings.addresses),
            give_up_s=settings.give_up_s,
            inbox=settings.inbox,
            window=settings.window,
            window_bytes=settings.window_bytes,
            usable=lambda addresses: same_kind(addresses, settings),
        )
        self._transport = _transport(settings)
        #: Reentrant: a thread can tell whether it holds the lock, and a signal handler
        #: in that thread does not deadlock.
        self._lock: Any = threading.RLock()
        #: Woken when the connection is ready or is lost for good, or all bytes are
        #: written.
        self._changes = Waiters()
        #: Whether a send can be written at once: the connection is ready, no bytes wait
        #: to be written, and no other call is writing.
        self._clear = False
        #: Functions that the I/O thread calls before anything else, each with its
        #: waiting call.
        self._chores: deque[tuple[Callable[[], Any], Call | None]] = deque()
        #: Calls without an outcome yet. Each is settled even if the I/O thread loses
        #: the broker's answer.
        self._calls: set[Call] = set()
        #: Whether the dialog has lost the connection and the I/O thread has not closed
        #: it yet.
        self._dropping = False
        self._dial_at = 0.0
        self._forked = False
        #: Whether the I/O thread alone still refers to the client.
        self._dropped = False
        #: Whether the I/O thread no longer does chores.
        self._over = False
        self._meter = InboxMeter(settings.inbox)
        self._leader = Leader(weakref.ref(self))
        #: While a leader adds items to a wait queue: the queue, and the number of its
        #: items before. A leader that was interrupted leaves it.
        self._half_read: tuple[WaitQueue[Any], int] | None = None
        #: Weak references: a dropped subscription is not kept alive by being counted.
        self._queues: weakref.WeakSet[WaitQueue[Any]] = weakref.WeakSet()
        self._inbox: WaitQueue[Message] = self._new_queue(self._leader)
        self._ordered: WaitQueue[Job] = self._new_queue(self._leader)
        self._requests: WaitQueue[Job] = self._new_queue(self._leader)
        for queue in (self._inbox, self._ordered, self._requests):
            self._queues.add(queue)
        self._dispatcher: Dispatcher[Message] = Dispatcher(
            self._inbox, self._ordered, self._requests, RequestJob, StoredJob
        )
        #: Whether the program has begun to receive messages.
        self._receives = False
        #: ACKs that the I/O thread writes, and whether it was woken for them.
        self._acks: deque[tuple[Delivery, bytes]] = deque()
        self._acks_due = False
        count = settings.handlers or _DEFAULT_HANDLERS
        self._for_requests = HandlerThreads(
            self._requests,
            "brokerd requests",
            count,
            max(count, MOST_THREADS),
            partial(_review_in_flight, weakref.ref(self)),
        )
        self._for_messages = HandlerThreads(self._ordered, "brokerd messages", 1, 1)
        #: The id of the I/O thread, once it has begun.
        self._thread_id: int | None = None
        self._thread = threading.Thread(
            target=_move_bytes,
            args=(weakref.ref(self), self._transport, (self._inbox, self._ordered, self._requests)),
            name="brokerd client",
            daemon=True,
        )
        self._start_thread()
        forks.register(self)
        _open_clients.add(self)

    def _start_thread(self) -> None:
        """Start the I/O thread. If that fails, leave neither a thread nor a descriptor.

        If a signal handler interrupts the start, its exception is raised. The
        RuntimeError that follows from the interruption is not.
        """
        outer = sys.exc_info()[1]
        try:
            self._thread.start()
            return
        except BaseException as error:
            # Set before the thread's state is checked: a thread that begins to run
            # after this ends at once.
            self._dropped = True
            self._transport.wake()
            if self._thread.is_alive():
                self._thread.join(_STOP_S)
            if not self._thread.is_alive():
                # The thread may have closed it already, but a thread that was
                # interrupted may have ended before that.
                self._transport.close()
            interrupting = _interruption(error, outer)
            if interrupting is error:
                raise
        # Not in the handler above, where the RuntimeError would become its context.
        raise interrupting

    def __del__(self) -> None:
        # A client whose constructor raised has no thread.
        if getattr(self, "_thread", None) is None or self._forked or not self._thread.is_alive():
            return
        if self._dialog.state is not State.CLOSED:
            # No source=self: a stored warning would keep the client alive.
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2)
        # Without the lock: the thread in which this destructor runs may hold it
        # already.
        self._dispatcher.warn_of_more(time.monotonic())
        # Until this returns, the I/O thread's weak reference still works. Its use
        # brings the client back to life.
        self._dropped = True
        self._transport.wake()

    def _after_fork(self) -> None:
        """Disable this copy in a forked child; see brokerd_client._common.forks."""
        self._forked = True
        self._transport.disown()

    def _check(self) -> None:
        """Raise WrongProcess in a fork.

        Needs no lock: in a fork it may never be released.
        """
        if self._forked:
            raise WrongProcess(
                "this client belongs to the process that made it: connect again in the child"
            )

    # Calls; without the lock

    def _interrupting(self) -> bool:
        """Return whether this thread has interrupted a call of this client.

        That is so in a signal handler, and in a destructor called by the garbage
        collector. The interrupted call continues only after the present call has
        returned.
        """
        if threading.get_ident() == self._thread_id:
            return True
        if not self._lock._is_owned():
            return False
        if self._interrupts_own_call():
            return True
        self._release()
        return False

    def _release(self) -> None:
        """Release the lock completely, even if this thread holds it several times."""
        with contextlib.suppress(RuntimeError):
            while True:
                self._lock.release()

    def _refuse_to_wait(self) -> None:
        """Raise WouldDeadlock if a wait would never end."""
        if self._interrupting():
            raise WouldDeadlock(
                "this signal handler interrupts a call of the same client: send, send_many,"
                " publish, reply and close work here; calls that wait for an answer do not"
            )

    def _repair(self) -> None:
        """Release an interrupted call's locks, and wake the I/O thread to repair its
        state.
        """
        if self._interrupting():
            # The lock belongs to the call below this one.
            return
        self._transport.release_locks()
        if not self._clear:
            # A call that failed before it changed anything must not block other
            # senders.
            with self._lock:
                transport = self._transport
                if not transport.unsure and self._dialog.in_order(len(transport.backlog)):
                    self._allow_sends()
            self._transport.wake()

    def _interrupts_own_call(self) -> bool:
        """Return whether another call of this client is further down this thread's
        stack.

        At least one stack frame outside the client lies between the two calls. Without
        such a call, a lock held by this thread was left behind by an interrupted call.
        """
        frame: FrameType | None = sys._getframe(1)
        outside = False
        while frame is not None:
            if (
                frame.f_globals.get("__name__") not in _OWN_MODULES
                or frame.f_locals.get("self") is not self
            ):
                outside = True
            elif outside and frame.f_code.co_name in _LOCKING:
                return True
            frame = frame.f_back
        return False

    def _put(
        self,
        timeout: float | None,
        put: Callable[..., T],
        *args: Any,
        answer: bool = False,
        call: Call | None = None,
    ) -> T:
        """Queue frames with ``put`` once they can be written; write them; return its
        result.

        Args:
            timeout: Seconds to wait; None for the timeout of connect().
            put: The function that queues the frames.
            *args: Its arguments.
            answer: Whether the frame is an answer. A connection that the broker closes
                soon still accepts answers.
            call: The call whose thread will wait for the outcome, as the leader if there
                is none.

        Raises:
            WouldDeadlock: A signal handler calls this while it interrupts the client.
            BrokerdError: As _wait_until_clear and ``put`` do.
        """
        if self._forked:
            self._check()
        deadline = None
        while True:
            try:
                with self._lock:
                    if (self._clear and not self._chores) or (answer and self._takes_answers()):
                        self._clear = False
                        if call is not None:
                            self._calls.add(call)
                            if not self._transport.kept:
                                # Kept input can be taken after the frame is written.
                                call.poll = self._leader.begin(call)
                        result = put(*args)
                        self._clear = self._write(awaited=True) and self._dialog.state is _READY
                        return result
                limit = check_timeout(timeout)
                deadline = self._wait_until_clear(limit, deadline, answer=answer)
            except BaseException:
                self._repair()
                raise

    def _takes_answers(self) -> bool:
        """Return whether an answer can be written at once on a draining connection."""
        waiting = bool(
            self._transport.backlog or self._chores or self._dropping or self._transport.unsure
        )
        return self._dialog.state is State.DRAINING and not waiting and self._dialog.in_order(0)

    def _wait_until_clear(
        self, timeout: float | None, deadline: float | None, *, answer: bool = False
    ) -> float:
        """Wait until the client is connected and all earlier bytes are written.

        Args:
            timeout: Seconds to wait; None for the timeout of connect().
            deadline: The result of an earlier call, or None.
            answer: Whether it is enough that the connection accepts answers.

        Returns:
            The deadline, for the next call.

        Raises:
            TimedOut: Earlier bytes of other threads are still not written.
            Disconnected: The client is not connected.
        """
        self._refuse_to_wait()
        limit = self._settings.timeout_s if timeout is None else timeout
        if deadline is None:
            deadline = time.monotonic() + limit
        own_gate = Gate()
        try:
            while True:
                self._changes.enter(own_gate)
                with self._lock:
                    if self._chores:
                        self._clear = False
                    clear = self._clear or (answer and self._takes_answers())
                    linked = self._dialog.state is State.READY or (
                        answer and self._dialog.may_answer
                    )
                    if not clear and (not linked or timeout is not None):
                        remaining = deadline - time.monotonic()
                        if not linked and (remaining <= 0 or self.closed):
                            self._dialog.require_ready()
                    else:
                        # The broker is not reading now: only the caller's own timeout
                        # counts.
                        remaining = None
                if clear:
                    return deadline
                if remaining is not None and remaining <= 0:
                    raise TimedOut(
                        f"send timed out after {limit:g} s: the broker is not reading;"
                        " message not sent"
                    )
                # An interrupted call may not have woken the I/O thread.
                self._transport.wake()
                if not own_gate.wait(
                    None if remaining is None else deadline
                ) and not self._changes.leave(own_gate):
                    # Another thread is opening the gate at this moment: it can't be
                    # reused.
                    own_gate = Gate()
        finally:
            self._changes.leave(own_gate)

    def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until the condition holds; return whether it does in time (seconds)."""
        deadline = time.monotonic() + timeout
        own_gate = Gate()
        try:
            while True:
                self._changes.enter(own_gate)
                if condition():
                    return True
                if not own_gate.wait(deadline):
                    return condition()
        finally:
            self._changes.leave(own_gate)

    def _outcome(
        self, call: Call, message_id: int, deadline: float | None, *, ready: bool = False
    ) -> Any:
        """Wait for the outcome of a call; return it, or raise it if it is an error.

        ready: Whether the leader, which is this thread, has input to handle.
        """
        waiting = self._for_requests.begin_wait()
        try:
            if waiting and self._for_requests.short:
                self._queue_chore(self._start_more_threads)
            arrived = self._leader.wait(call, deadline, poll=call.poll, ready=ready)
        finally:
            if waiting:
                self._for_requests.end_wait()
        if not arrived:
            abandoned = self._run_in_io_thread(lambda: self._dialog.abandon(message_id))
            if not call.done:
                self._calls.discard(call)
                sender = f" from {abandoned.to or abandoned.about}" if abandoned else ""
                raise TimedOut(f"no answer{sender} to {message_id} {within(deadline)}")
        self._calls.discard(call)
        if isinstance(call.value, BaseException):
            raise call.value
        return call.value

    def _start_more_threads(self) -> None:
        """Start handler threads in place of those that wait; with the lock, in the I/O
        thread.

        The limit in flight grows with them at once. It shrinks later: see
        HandlerThreads.
        """
        self._for_requests.raised_at = time.monotonic()
        self._for_requests.start()
        self._dialog.raise_in_flight(self._for_requests.capacity)

    def _lower_in_flight(self) -> None:
        """Lower the limit in flight to what the threads can do; with the lock, in the I/O
        thread.
        """
        threads = self._for_requests
        if threads.capacity > threads.count:
            threads.raised_at = time.monotonic()
        self._dialog.limit_in_flight(threads.capacity)

    def _abandon(self, call: Call) -> None:
        """Drop a call that was interrupted while it waited for its outcome."""
        self._queue_chore(lambda: self._dialog.abandon_all(call))
        # Behind the chore that may be about to add it.
        self._queue_chore(lambda: self._calls.discard(call))

    # Chores

    def _queue_chore(self, chore: Callable[[], object]) -> None:
        """Queue a function for the I/O thread, and do not wait for it."""
        self._chores.append((chore, None))
        self._clear = False
        self._transport.wake()
        if self._over:
            self._do_chores()

    def _run_in_io_thread(self, chore: Callable[[], T]) -> T:
        """Call a function in the I/O thread; return its result or raise its exception.

        Raises WouldDeadlock if a signal handler calls this while it interrupts the
        client.
        """
        self._refuse_to_wait()
        call = Call()
        try:
            self._calls.add(call)
            self._chores.append((chore, call))
            self._transport.wake()
            if self._over:
                self._do_chores()
            call.wait(None)
            self._calls.discard(call)
        except BaseException:
            self._queue_chore(lambda: self._calls.discard(call))
            raise
        if isinstance(call.value, BaseException):
            raise call.value
        return cast("T", call.value)

    def _do_chores(self) -> None:
        """Do the queued chores; in the I/O thread, or after its end. Takes the lock."""
        with self._lock:
            while self._chores:
                chore, call = self._chores.popleft()
                try:
                    value = chore()
                    self._write()
                except Exception as error:  # noqa: BLE001 - the caller's, where there is a caller
                    if call is not None:
                        call.settle(error)
                    else:
                        log().exception("unexpected error in a queued job of a client")
                else:
                    if call is not None:
                        call.settle(value)

    def _put_as_chore(self, message_id: int, to: str, put: Callable[[], None]) -> None:
        """Queue a frame of a signal handler with ``put``; report a failure as of a send."""
        try:
            put()
        except (Disconnected, Closed) as error:
            self._dialog.undelivered += 1
            self._dispatcher.tell_undelivered(
                Disconnected(f"{error}; {message_id} to {to} was not sent", message_id=message_id),
                time.monotonic(),
            )

    # Sending; without the lock

    def _send_at_once(
        self, to: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int | None:
        """Send a message if that needs no wait; return its id, or None.

        In a signal handler that interrupts the client, queue it for the I/O thread.
        """
        if self._forked:
            self._check()
        # The same as _put and _write, inlined to save the calls.
        try:
            with self._lock:
                if self._clear and not self._chores:
                    self._clear = False
                    dialog, transport = self._dialog, self._transport
                    message_id = dialog.send(to, number, body, extension)
                    dialog.took(transport.write(dialog.peek()))
                    if transport.backlog or self._chores:
                        transport.wake()
                    else:
                        self._clear = True
                    return message_id
            if self._interrupting():
                check_address(to)
                return self._put_late(self._dialog.send_as, to, number, body, extension)
        except BaseException:
            self._repair()
            raise
        return None

    def _publish_at_once(
        self, topic: str, number: int, body: bytes, extension: Mapping[str, Any] | None
    ) -> int | None:
        """Queue an event for the I/O thread in a signal handler that interrupts the client.

        Returns its id. In other calls, return None.
        """
        if not self._interrupting():
            return None
        check_topic(topic)
        self._check()
        return self._put_late(self._dialog.publish_as, topic, number, body, extension)

    def _put_late(self, put: Callable[..., None], to: str, *args: Any) -> int:
        """Queue a frame as a chore, with ``put(message_id, to, *args)``; return its id.

        A signal handler can't wait for the lock.
        """
        message_id = next(self._dialog.late_ids)
        late_put = partial(put, message_id, to, *args)
        self._queue_chore(lambda: self._put_as_chore(message_id, to, late_put))
        return message_id

    def _put_many(
        self, timeout: float | None, bulk: Bulk, extension: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Queue messages once they can be written; return their ids."""
        check_timeout(timeout)
        if self._interrupting():
            put = self._dialog.send_as
            return [self._put_late(put, *frame, extension) for frame in zip(*bulk)]
        return self._put(timeout, self._dialog.send_many, *bulk, extension)

    def _ask(self, timeout: float | None, put: Callable[..., int], *args: Any) -> Any:
        """Queue a frame with ``put(*args, call, deadline)`` and return its outcome."""
        deadline = _deadline(timeout)
        if self._forked:
            self._check()
        if self._lock._is_owned() or threading.get_ident() == self._thread_id:
            self._refuse_to_wait()
        call = Call()
        try:
            message_id = self._put(timeout, put, *args, call, deadline, call=call)
            return self._outcome(call, message_id, deadline)
        except BaseException:
            self._leader.leave(call)
            if call in self._calls:
                self._abandon(call)
            raise

    def _request(
        self,
        timeout: float | None,
        limit_s: float | None,
        to: str,
        number: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> Any:
        """Send a request and return its reply.

        limit_s: The timeout in seconds, if it is the request's ttl.
        """
        if self._transport.kept and limit_s is not None and limit_s <= _LONGEST_POLL_S:
            reply = self._request_as_leader(limit_s, to, number, body, extension)
            if reply is not None:
                return reply
        put = partial(self._dialog.request, limit_s=limit_s)
        return self._ask(timeout, put, to, number, body, extension)

    def _request_as_leader(
        self,
        limit_s: float,
        to: str,
        number: int,
        body: bytes,
        extension: Mapping[str, Any] | None,
    ) -> Any:
        """Send a request and return its reply, if the input is kept for this thread.

        Return None, and send nothing, if the client has anything else to do. This is the
        same as _ask, _put, _outcome and Leader.wait, inlined for the usual case: their
        calls would take half of the time of a request.
        """
        thread_id = threading.get_ident()
        if (
            self._forked
            or thread_id == self._thread_id
            or thread_id in self._for_requests.running
            or self._lock._is_owned()
        ):
            return None
        dialog, transport, place = self._dialog, self._transport, self._leader.place
        call = Call()
        try:
            deadline = time.monotonic() + limit_s
            with self._lock:
                if (
                    not self._clear
                    or not transport.kept
                    or self._chores
                    or self._meter.held > self._meter.limit
                    or not place.acquire(False)
                ):
                    return None
                self._clear = False
                self._calls.add(call)
                call.interrupt = transport.wake_borrower
                poll = transport.borrow_input()
                message_id = dialog.request(to, number, body, extension, call, deadline, limit_s)
                dialog.took(transport.write(dialog.peek()))
                if transport.backlog or self._chores:
                    transport.wake()
                else:
                    self._clear = True
            ready = transport.input_poll.run(poll) or bool(poll.poll(1000 * limit_s))
            if ready:
                with self._lock:
                    reply = self._read_lone()
                    if reply is not None and reply._kind == REPLY_KIND:
                        pending = dialog.answered_request(reply)
                        if pending is not None and pending.waiter is call:
                            del dialog.pending_calls[message_id]
                            transport.unread.clear()
                            transport.leave_input()
                            place.release()
                            self._calls.discard(call)
                            return reply
            call.poll = poll
            return self._outcome(call, message_id, _with_timeout(deadline, limit_s), ready=ready)
        except BaseException:
            self._repair()
            self._leader.leave(call)
            if call in self._calls:
                self._abandon(call)
            raise

    def _post(
        self,
        timeout: float | None,
        to: str,
        number: int,
        body: bytes,
        extension: Mapping[str, Any],
    ) -> Any:
        """Send a message until it is stored or refused; return its receipt."""
        deadline = _deadline(timeout)
        self._check()
        self._refuse_to_wait()
        call = Call()

        def put() -> int:
            self._calls.add(call)
            return self._dialog.post(to, number, body, extension, call, time.monotonic())

        try:
            message_id = None
            with self._lock:
                if self._clear and not self._chores:
                    self._clear = False
                    call.poll = self._leader.begin(call)
                    message_id = put()
                    self._clear = self._write(awaited=True) and self._dialog.state is State.READY
            if message_id is None:
                message_id = self._run_in_io_thread(put)
            return self._outcome(call, message_id, deadline)
        except BaseException:
            self._repair()
            self._leader.leave(call)
            if not call.done:
                # Behind the chore that may still have to queue the message.
                self._abandon(call)
            raise

    def _ask_many(
        self, timeout: float | None, bulk: Bulk, extension: Mapping[str, Any] | None = None
    ) -> list[Receipt | BrokerdError]:
        """Queue messages that ask for receipts; return the outcome of each."""
        to, codecs, bodies = bulk
        deadline = _deadline(timeout)
        self._refuse_to_wait()
        calls = [Call() for _ in to]

        def put_all() -> list[int]:
            self._calls.update(calls)
            put = self._dialog.send_for_receipt
            return [
                put(recipient, number, body, extension, call, deadline)
                for recipient, number, body, call in zip(to, codecs, bodies, calls)
            ]

        outcomes: list[Receipt | BrokerdError] = []
        try:
            for call, message_id in zip(calls, self._put(timeout, put_all)):
                try:
                    outcomes.append(self._outcome(call, message_id, deadline))
                except BrokerdError as error:
                    outcomes.append(error)
        except BaseException:
            for call in calls:
                self._abandon(call)
            raise
        return outcomes

    def _answer(self, request: message.Message, put: Callable[..., None], *args: Any) -> None:
        """Queue the answer to a request with ``put``, once it can be written."""
        self._check()

        if self._drop_answer(request):
            return
        if self._interrupting():
            put_answer = partial(self._put_answer, request, put, *args)
            self._queue_chore(lambda: self._put_as_chore(request.id, request.sender, put_answer))
        else:
            self._put(None, self._put_answer, request, put, *args, answer=True)

    def _reply(self, request: Message, payload: object) -> None:
        """Answer a request in the thread of its handler."""
        number, body = encode(payload, None, self.json_codec)
        # The same as _put, _put_answer and _write, inlined to save the calls.
        try:
            with self._lock:
                if self._clear and not self._chores:
                    self._clear = False
                    dialog, transport = self._dialog, self._transport
                    if request._answered:
                        request.require_unanswered()
                    dialog.reply(request.sender, request.id, number, body)
                    request._answered = True
                    dialog.took(transport.write(dialog.peek()))
                    if transport.backlog or self._chores:
                        transport.wake()
                    else:
                        self._clear = True
                    return
        except BaseException:
            self._repair()
            raise
        frame = (request.sender, request.id, number, body)
        self._put(None, self._put_answer, request, self._dialog.reply, *frame, answer=True)

    def _put_answer(self, request: message.Message, put: Callable[..., None], *args: Any) -> None:
        """Queue the answer to a request with ``put``; with the lock."""
        request.require_unanswered()
        put(*args)
        request.mark_answered()

    def _handle(self, handle: Callable[[H], None], handler: H) -> H:
        """Set a handler of the dispatcher with ``handle``; return the handler."""
        require_function(handler)
        for_requests = handle in (
            self._dispatcher.handle_requests,
            self._dispatcher.handle_calls,
        )
        threads = self._for_requests if for_requests else self._for_messages

        def set_handler() -> None:
            handle(handler)
            threads.start()
            if for_requests:
                self._dialog.limit_in_flight(threads.capacity)
            elif handle == self._dispatcher.handle_messages:
                self._dialog.open_mailbox()

        self._check()
        self._run_in_io_thread(set_handler)
        return handler

    # Receiving; without the lock

    def _begin_receiving(self) -> None:
        """Open the mailbox, if the client has one, when the program first receives."""
        self._receives = True
        self._queue_chore(self._dialog.open_mailbox)

    def _settle(self, message: Message, body: bytes) -> None:
        """Acknowledge a message from the mailbox."""
        self._check()
        delivery = message.unsettled_delivery()
        try:
            with self._lock:
                if not self._dialog.may_answer:
                    # Its connection is lost.
                    self._dialog.settle(delivery, body)
                    return
            if self._interrupting():
                self._queue_chore(lambda: self._dialog.settle(delivery, body))
            else:
                self._put(None, self._put_ack, delivery, body, answer=True)
        except (Disconnected, Closed):
            # The broker delivers it again.
            return
        except BaseException:
            self._repair()
            raise

    def _settle_at_once(self, message: Message, body: bytes, queue: WaitQueue[Any]) -> None:
        """Acknowledge a message from the mailbox, unless the program has done so.

        While more messages wait in the queue, the I/O thread writes the ACKs: one system
        call for many of them.
        """
        if message.settled:
            return
        if not queue.inbox.items:
            self._settle(message, body)
            return
        delivery = message.unsettled_delivery()
        delivery.settled = True
        self._acks.append((delivery, body))
        if not self._acks_due:
            try:
                self._acks_due = True
                self._transport.wake()
            except BaseException:
                self._acks_due = False
                raise

    def _put_ack(self, delivery: Delivery, body: bytes) -> None:
        """Queue the frame of an ACK behind those that wait; with the lock."""
        self._queue_acks()
        self._dialog.settle(delivery, body)

    def _queue_acks(self) -> None:
        """Queue the frames of the ACKs that wait; with the lock."""
        self._acks_due = False
        while self._acks:
            self._dialog.settle(*self._acks.popleft())

    def __iter__(self) -> Iterator[Message]:
        """Yield messages, and requests if no request handler is set, until the client
        is closed.

        A message from the mailbox is acknowledged when the loop asks for the next one.
        """
        self._check()
        if not self._receives:
            self._begin_receiving()
        queue, meter, mailbox = self._inbox, self._meter, self._dialog.mailbox
        inbox = queue.inbox
        items = inbox.items
        with contextlib.suppress(Closed):
            while True:
                # The common case, without a call: the next message is here already.
                # WaitQueue.take says why this is a loop over popleft.
                try:
                    for item in iter(items.popleft, NOTHING):
                        # Only after the item is taken: see InboxMeter.weigh.
                        if meter.full and len(items) <= inbox.mark:
                            try:
                                queue.resume_reading()
                            except BaseException:
                                queue.give_back(item)
                                raise
                        yield item
                        if mailbox.is_open and item.seq:
                            self._settle_at_once(item, ack_body("done"), queue)
                except IndexError as error:
                    if raised_by_handler(error):
                        raise
                # Not in the except clause: what ends the waiting would name the
                # IndexError as its context.
                item = queue.take(None)
                yield item
                if mailbox.is_open and item.seq:
                    self._settle_at_once(item, ack_body("done"), queue)

    def _open(self, subscription: BaseSubscription[Any], timeout: float | None) -> None:
        """Begin a subscription or a watch, and wait for the broker's confirmation.

        The caller ends it after any exception, also one that strikes behind this call.
        """
        if subscription.callback is not None:
            require_function(subscription.callback)
        call = Call()

        def begin(deadline: float | None) -> int:
            self._calls.add(call)
            if subscription.callback is not None:
                self._for_messages.start()
            message_id = subscription._begin(call, deadline)
            self._queues.add(subscription.queue)
            return message_id

        try:
            self._check()
            self._refuse_to_wait()
            deadline = _deadline(timeout)
            message_id = self._put_in_io_thread(timeout, lambda: begin(deadline))
            self._outcome(call, message_id, deadline)
        except BaseException:
            self._abandon(call)
            raise

    def _take_back(self, subscription: BaseSubscription[Any]) -> None:
        """End a subscription or a watch whose creation an exception has cut short."""
        self._queue_chore(lambda: self._drop(subscription, "the subscription was not made"))

    def _put_in_io_thread(self, timeout: float | None, put: Callable[[], int]) -> int:
        """Call ``put``, which queues frames, in the I/O thread, once these can be
        written.
        """
        limit = check_timeout(timeout)
        deadline = None
        while True:
            try:
                deadline = self._wait_until_clear(limit, deadline)
                return self._run_in_io_thread(put)
            except Disconnected:
                # The connection was lost between the two calls: the client may
                # reconnect in time.
                if self.closed or deadline is None or time.monotonic() >= deadline:
                    raise
            except BaseException:
                self._repair()
                raise

    def _unsubscribe(self, subscription: BaseSubscription[Any]) -> None:
        """End a subscription or a watch, and wait for the broker's confirmation."""
        self._check()
        reason = subscription._end_reason
        if self._interrupting():
            self._queue_chore(lambda: self._drop(subscription, reason))
            return
        call = Call()
        deadline = _deadline(self._settings.timeout_s)

        def end() -> int | None:
            self._calls.add(call)
            message_id = subscription._end(call, deadline)
            self._end_queue(subscription.queue, Closed(reason))
            return message_id

        try:
            message_id = self._run_in_io_thread(end)
            if message_id is not None:
                # With any answer, and without an answer, no more events come.
                with contextlib.suppress(Disconnected, Closed, TimedOut):
                    self._outcome(call, message_id, deadline)
            self._calls.discard(call)
        except BaseException:
            self._abandon(call)
            raise

    def _drop(self, subscription: BaseSubscription[Any], reason: str) -> None:
        """End a subscription or watch and tell the broker; with the lock, in the I/O
        thread.
        """
        self._dialog.forget(subscription)
        self._end_queue(subscription.queue, Closed(reason))

    def _is_over(self, request: Message) -> bool:
        """Return whether no requester waits for a request that no handler has begun."""
        return self._dialog.is_over(request, time.monotonic())

    def _drop_answer(self, request: message.Message) -> bool:
        """Return whether an answer is discarded, because its request was cancelled."""
        request.require_unanswered()
        return self._dialog.needs_no_answer(request)

    # Channels; without the lock

    def _open_channel(self, to: str, payload: bytes, timeout: float | None) -> Connection:
        """Open a channel to a client, on a connection of its own."""
        # Imported here, because the direct API takes long to load.
        from brokerd_client.connection.channels import open_channel

        check_address(to)
        self._check()
        deadline = _deadline(timeout)
        self._wait_until_clear(check_timeout(timeout), None)
        return open_channel(
            self._settings, self._broker_address, self.name, to, payload, deadline
        ).into_connection(None)

    def _join_channel(self, token: int, timeout: float | None) -> Connection:
        """Accept a channel, on a connection of its own."""
        from brokerd_client.connection.channels import accept_channel

        self._check()
        return accept_channel(
            self._settings, self._broker_address, self.name, token, _deadline(timeout)
        ).into_connection(None)

    # Closing; without the lock

    def _drain(self, timeout: float | None) -> bool:
        """Finish the work in progress, then close; return whether all was finished."""
        deadline = _deadline(timeout)
        self._check()
        self._refuse_to_wait()
        finished = False
        try:
            self._run_in_io_thread(self._dialog.stop_requests)
            self._run_in_io_thread(self._dialog.narrow_mailbox)
            if self._dialog.state is State.READY:
                with contextlib.suppress(BrokerdError):
                    # Behind the answer to this, no further request comes.
                    self._ask(timeout, self._dialog.control, "ping", {})
            while not self.closed:
                self._run_in_io_thread(self._give_back_waiting)
                finished = self._for_requests.idle and self._for_messages.idle
                if finished or (deadline is not None and time.monotonic() >= deadline):
                    break
                time.sleep(_DRAIN_CHECK_S)
        finally:
            self._close()
        return finished

    def _give_back_stored(self) -> None:
        """Return the messages of the mailbox that no handler has begun; with the lock, in
        the I/O thread.
        """
        for stored in self._dispatcher.take_stored() if self._dialog.mailbox.is_open else ():
            self._dialog.return_delivery(stored)

    def _give_back_waiting(self) -> None:
        """Return the requests and the messages of the mailbox that no handler has begun;
        with the lock, in the I/O thread.
        """
        self._give_back_stored()
        if self._dialog.may_answer and self._dialog.returns_requests:
            for request in self._dispatcher.take_requests():
                if not self._dialog.needs_no_answer(request):
                    self._dialog.give_back(request.sender, request.id)
                    request.mark_answered()

    def wait_until_ready(self) -> None:
        """Wait for the first introduction.

        Raises:
            TimedOut: The connection was not made in time.
            BrokerdError: The reason why the connection was not made.
        """
        limit = max(self._settings.timeout_s, self._settings.wait_s)
        # The dialog's own deadline expires first.
        if not self._until(lambda: not self._dialog.beginning, limit + _LATENESS_S):
            raise TimedOut(f"no connection to {self._broker_address} within {limit:g} s")
        if self._dialog.state is State.GONE and self._dialog.reason is not None:
            raise self._dialog.reason

    def _close(self) -> None:
        """Close the connection and end every thread of the client."""
        if self._forked:
            return
        if self._interrupting():
            self._queue_chore(self._begin_end)
            return
        # Messages that a signal handler has queued as chores are flushed, too.
        self._until(
            lambda: not self._dialog.may_answer or not (self._transport.backlog or self._chores),
            LINGER_S,
        )
        while True:
            # Repeated if an exception in the I/O thread has cut it short.
            with contextlib.suppress(InDoubt):
                self._run_in_io_thread(self._begin_end)
                break
        _open_clients.discard(self)
        current_thread = threading.current_thread()
        self._thread.join(_THREAD_GRACE_S)
        with self._lock:
            # A warning that the thread has logged already is not logged twice.
            self._dispatcher.warn_of_more(time.monotonic())
        deadline = time.monotonic() + _HANDLER_GRACE_S
        for thread in (*self._for_requests.threads, *self._for_messages.threads):
            if thread is not current_thread:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _begin_end(self) -> None:
        """Begin to close the client; with the lock, in the I/O thread or after its end."""
        was_open = self._dialog.state not in (State.CLOSING, State.CLOSED)
        self._clear = False
        self._queue_acks()
        self._apply(self._dialog.close(time.monotonic()), time.monotonic())
        if self._transport.open and not self._transport.connecting:
            self._write()
        if self._dialog.state is State.CLOSING and was_open:
            self._transport.shut()
        for queue in list(self._queues):
            if queue is not self._ordered:
                queue.inbox.clear()
        self._dispatcher.drop_jobs()
        self._note_state()
        # The broker's last frames are read even if a signal handler of the leader closes.
        self._transport.return_input()

    # The leader, a waiting thread; without the lock

    def _begin_lead(self, gate: Gate) -> Any:
        """Borrow the input for the thread at the gate; return what to poll, or None."""
        with self._lock:
            if self._dialog.state is not _READY or self._dropping or self._meter.full:
                return None
            gate.interrupt = self._transport.wake_borrower
            return self._transport.borrow_input()

    def _end_lead(self) -> None:
        """Return the input to the I/O thread, with what was not handled."""
        with self._lock:
            self._transport.return_input()
            if self._transport.unread:
                self._transport.wake()

    def _read_lone(self) -> Message | None:
        """Read as the leader, with the lock.

        Return the message, request or reply that is all that there is to handle, or None.
        The bytes are left in ``unread``.
        """
        transport = self._transport
        if not transport.lent or transport.unread or self._half_read is not None:
            return None
        transport.read_ahead()
        unread = transport.unread
        if not unread or unread.before or self._dialog.state is not _READY:
            return None
        data = unread[0]
        return self._dialog.lone_message(data, self) if isinstance(data, bytes) else None

    def _begin_take(self, turn: Turn) -> Any:
        """Take the leader's place and the kept input for a thread at a wait queue.

        Return what to poll; None if that is not possible.
        """
        if self._lock._is_owned() or threading.get_ident() == self._thread_id:
            return None
        with self._lock:
            transport = self._transport
            if (
                not transport.kept
                or self._dialog.state is not _READY
                or self._dropping
                or self._meter.held > self._meter.limit
                or not self._leader.place.acquire(False)
            ):
                return None
            turn.interrupt = transport.wake_borrower
            return transport.borrow_input()

    def _take_lone(self, queue: WaitQueue[Any], turn: Turn) -> bool:
        """Read as the leader; return whether the thread has got its item, and no more came.

        The thread has then left the leader's place.
        """
        with self._lock:
            message = self._read_lone()
            if message is None or message._kind == REPLY_KIND:
                return False
            place, item = self._dispatcher.place_of(message)
            if place is not queue or queue.inbox.items or not turn.lock.locked():
                return False
            if message._kind == REQUEST_KIND:
                self._dialog.note_request(message, time.monotonic())
            turn.interrupt = None
            self._half_read = (queue, queue.added)
            queue.hand_over(item, turn)
            self._half_read = None
            self._transport.leave_input()
            self._leader.place.release()
            return True

    def _read_ahead(self, gate: Gate, queue: WaitQueue[Any] | None) -> bool:
        """Read once as the leader; return whether to go on.

        Args:
            gate: The gate of the leader.
            queue: The wait queue at which it waits, if any.
        """
        with self._lock:
            transport = self._transport
            if not transport.lent:
                return False
            if self._half_read is not None:
                self._recover_reads()
            if not transport.unread:
                transport.read_ahead()
                if not transport.unread:
                    return True
            # What this thread opens itself need not wake it.
            gate.interrupt = None
            answered = self._handle_unread(gate)
            if answered is None:
                self._leader.rest()
            if answered is None or self._meter.held > self._meter.limit:
                # The I/O thread handles the input, or decides whether there is room.
                transport.return_input()
                transport.wake()
                return False
            if not gate.lock.locked():
                # It is open.
                transport.leave_input()
                return False
            if answered and queue is not None:
                # A thread that waits for messages leaves the place to those that wait
                # for answers: they come again.
                transport.return_input()
                return False
            gate.interrupt = transport.wake_borrower
            return True

    def _handle_unread(self, gate: Gate) -> int | None:
        """Handle what the leader has read, unless that is up to the I/O thread.

        An exception of a signal handler may strike at any instruction. Whatever follows,
        ``unread`` then is handled once.

        Returns:
            The number of calls that got their outcomes; None if nothing was handled.
        """
        transport = self._transport
        dialog = self._dialog
        data = transport.first_unread() if transport.unread.before else transport.unread[0]
        if not isinstance(data, bytes) or not data or dialog.state is not _READY:
            return None
        message = dialog.lone_message(data, self)
        if message is not None:
            if message._kind != REPLY_KIND:
                self._put_lone(message, len(data), gate)
                return 0
            pending = dialog.answered_request(message)
            if pending is not None:
                pending.waiter.settle(message)
                dialog.pending_calls.pop(pending.id)
                transport.unread.clear()
                return 1
        if not dialog.looks_ahead:
            return None
        try:
            effects = dialog.look_ahead(data, self)
        except BrokerdError:
            # The I/O thread gets the same error, and ends the connection.
            return None
        if effects is None:
            return None
        messages = effects.messages
        shares: list[tuple[Any, list[Any], int]] = []
        if messages:
            size = effects.size + OVERHEAD * len(messages)
            shares = self._dispatcher.by_queue(messages, size)
        if effects.stored:
            shares.append(self._dispatcher.for_stored(effects.stored))
        if len(shares) > 1:
            return None
        begun = dialog.begun_ahead
        if begun:
            transport.split_unread(data, begun)
        for pending, outcome in effects.outcomes:
            pending.waiter.settle(outcome)
        dialog.pass_over(effects, time.monotonic())
        if shares:
            self._put_unread(*shares[0], gate)
        else:
            transport.unread.clear()
        return len(effects.outcomes)

    def _put_lone(self, message: Message, size: int, gate: Gate) -> None:
        """Deliver the message or request that the leader has read, of ``size`` bytes."""
        queue, item = self._dispatcher.place_of(message)
        if message._kind == REQUEST_KIND:
            self._dialog.note_request(message, time.monotonic())
            size += 0 if message.extension is None else 2 * VALUE_COST
        self._put_unread(queue, [item], size + OVERHEAD, gate)

    def _put_unread(self, queue: WaitQueue[Any], items: list[Any], size: int, gate: Gate) -> None:
        """Put what the leader has read into a wait queue."""
        self._half_read = (queue, queue.added)
        queue.put_unread(items, size, gate)
        self._half_read = None

    # With the lock

    def _write(self, *, awaited: bool = False) -> bool:
        """Write the dialog's queued frames; return whether the next sender may write.

        Args:
            awaited: Whether a thread may wait for the outcome of these frames.
        """
        data = self._dialog.peek()
        if data:
            self._dialog.took(self._transport.write(data))
        if self._transport.backlog or self._chores:
            self._clear = False
            self._transport.wake()
            return False
        if awaited and self._meter.full:
            # The outcome may lie behind input that is not being read.
            self._transport.wake()
        return True

    def _allow_sends(self) -> None:
        """Allow senders to write and wake them, if nothing else must be written first."""
        if self._transport.backlog or self._chores or self._dropping:
            return
        if self._dialog.state is State.READY:
            self._clear = True
        elif self._dialog.state is not State.DRAINING:
            return
        if self._changes:
            self._changes.wake()

    def _recover_writes(self, now: float) -> bool:
        """Finish the writes of an interrupted call; return whether the connection can
        be used.

        If the number of bytes written is not known, the connection is ended.
        """
        if self._dropping or self._dialog.state not in _LINKED or not self._transport.open:
            return not self._dropping
        transport = self._transport
        if transport.unsure:
            self._end_connection(
                Disconnected("a call was interrupted while it was writing"), now, at_once=True
            )
            return False
        if not self._dialog.in_order(len(transport.backlog)):
            self._dialog.recover(transport.bytes_given, len(transport.backlog))
            self._write()
        return True

    def _recover_reads(self) -> None:
        """Repair what an interrupted leader has left unfinished."""
        if self._half_read is None:
            return
        queue, count_before = self._half_read
        if self._transport.unread:
            queue.added = count_before
        else:
            queue.waiters.wake()
        self._half_read = None

    def _new_queue(self, leader: Leader | None = None) -> WaitQueue[Any]:
        """Return a new wait queue of this client.

        leader: The client's leader, if a thread that waits at the queue may read.
        """
        # It gets no method of the client: wait queues are held by threads that must not
        # hold the client.
        interrupting = self._lock._is_owned if leader is None else leader.interrupting
        return WaitQueue(self._meter, self._transport, leader, interrupting)

    def _end_queue(self, queue: WaitQueue[Any], reason: BrokerdError) -> None:
        """End the wait queue of a subscription or watch.

        Its remaining items can still be taken, but no longer count against the inbox.
        """
        queue.end(reason)
        queue.inbox.release()
        self._queues.discard(queue)

    def _apply(self, effects: Effects[Message], now: float) -> None:
        """Deliver the dialog's effects: outcomes, messages, events, ended
        subscriptions, errors.
        """
        for call, value in effects.outcomes:
            call.settle(value)
        if self._dialog.state is not State.CLOSING:
            if effects.messages:
                self._dispatcher.dispatch_messages(
                    effects.messages, effects.size + OVERHEAD * len(effects.messages)
                )
            if effects.events:
                self._dispatcher.dispatch_events(effects.events)
            if effects.stored:
                self._dispatcher.dispatch_stored(effects.stored)
        for subscription, reason in effects.ended:
            self._end_queue(subscription.queue, reason)
        if effects.changes:
            self._dispatcher.tell_changes(effects.changes)
            if self._dialog.state is State.DRAINING:
                self._give_back_stored()
        if effects.undelivered or effects.unreadable or effects.warnings or effects.broken:
            earlier_deadline = self._dispatcher.warning_due
            for error in effects.undelivered:
                self._dispatcher.tell_undelivered(error, now)
            self._dispatcher.report(effects, now)
            if earlier_deadline is None and self._dispatcher.warning_due is not None:
                self._transport.wake()
        if effects.broken is not None:
            # The peer may have to be told that it was rejected.
            if self._transport.open and not self._transport.connecting:
                self._write()
            self._end_connection(effects.broken, now)

    def _end_connection(self, reason: BrokerdError, now: float, *, at_once: bool = False) -> None:
        """Report a lost connection to the dialog and to waiting calls.

        The I/O thread closes the connection.

        Args:
            reason: Why the connection is lost.
            now: The present time, in seconds.
            at_once: Whether the client may reconnect without a delay.
        """
        self._clear = False
        # After an interrupted write, bytes may have been sent that were not counted.
        in_order = not self._transport.unsure and self._dialog.in_order(
            len(self._transport.backlog)
        )
        doubtful = 0 if in_order else self._dialog.unwritten
        effects = self._dialog.lost(reason, now, jitter(), doubtful=doubtful, at_once=at_once)
        if self._dialog.mailbox.is_open:
            # They come again on the next connection.
            self._dispatcher.take_stored()
        self._dial_at = self._dialog.retry_at
        self._dropping = True
        # Before the wait queues end, so that on_undelivered is called for a last loss
        # too.
        self._apply(effects, now)
        self._note_state()
        self._transport.wake()

    def _note_state(self) -> None:
        """Wake the threads that wait for the connection, and end the wait queues if it
        is gone.
        """
        state = self._dialog.state
        if state is State.GONE:
            reason = self._dialog.gone()
            for queue in list(self._queues):
                queue.end(reason)
        elif state in (State.CLOSING, State.CLOSED):
            for queue in list(self._queues):
                queue.end(Closed("the client is closed"))
        self._changes.wake()

    # The I/O thread; without the lock

    def _prepare(self) -> tuple[float | None, bool] | None:
        """Do the work that is due; return (seconds to wait, whether to read).

        Returns None when the I/O thread has nothing more to do.
        """
        if self._dropped:
            return None
        now = time.monotonic()
        with self._lock:
            self._clear = False
            self._recover_writes(now)
            self._recover_reads()
            self._close_lost()
            if self._acks:
                self._queue_acks()
            self._do_chores()
            self._apply(self._dialog.tick(now), now)
            self._close_lost()
            state = self._dialog.state
            if state in _LINKED and self._transport.open:
                self._write()
            is_over = state in (State.CLOSED, State.GONE)
            warning_at = self._dispatcher.warning_due
            if warning_at is not None and (is_over or now >= warning_at):
                self._dispatcher.warn_of_more(now)
            if is_over:
                self._over = True
                self._do_chores()
                return None
            dialing = state in (State.IDLE, State.WAITING) and now >= self._dial_at
            if dialing:
                self._dialog.dialing(now)
            self._allow_sends()
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
            warning_at = self._dispatcher.warning_due
            if warning_at is not None:
                deadline = warning_at if deadline is None else min(deadline, warning_at)
            limit = self._meter.limit
            full = self._meter.weigh((queue.inbox for queue in self._queues), limit=limit)
            reading = not full or (
                len(self._dialog.pending_calls) > 0 and self._meter.held <= STRETCH * limit
            )
            # Even with a full inbox, the broker's part of a handshake and the answers
            # to a close() are read. A connection that has ended is read to its end, so
            # that the client can reconnect.
            reading = reading or state in _READING or self._transport.ended
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not reading:
                remaining = _END_CHECK_S if remaining is None else min(remaining, _END_CHECK_S)
            if self._chores or self._dropping:
                remaining = 0.0
            self._transport.schedule(reading=reading)
        return remaining, reading

    def _close_lost(self) -> None:
        """Close the connection if the dialog has lost it."""
        if self._dropping:
            self._transport.drop()
            self._dropping = False

    def _replace_thread(self, thread: threading.Thread) -> None:
        """Store the thread that is the I/O thread from now on."""
        self._thread = thread

    def _survive(self, error: BaseException) -> None:
        """Recover from an exception in the I/O thread; the connection is treated as
        lost.
        """
        self._release()
        self._transport.release_locks()
        log().error("connection lost: unexpected error", exc_info=error)
        with self._lock:
            self._clear = False
            now = time.monotonic()
            if not self._dropping and self._dialog.state not in (
                State.IDLE,
                State.WAITING,
                State.GONE,
                State.CLOSED,
            ):
                reason = Disconnected(f"the connection broke: {error!r}")
                reason.__cause__ = error
                # A bug raises an Exception, and may do so again on the next connection:
                # the client reconnects only after a delay.
                self._end_connection(reason, now, at_once=not isinstance(error, Exception))
            self._transport.renew()
            self._half_read = None
            self._dropping = False
            # Calls whose chore is still queued go on waiting.
            for call in self._calls - {call for _, call in list(self._chores)}:
                call.settle(InDoubt("the connection broke; the outcome of this call is not known"))
            self._note_state()

    def _dial(self, now: float) -> None:
        try:
            self._transport.aim(self._broker_address)
            is_connected = self._transport.dial()
        except BlockingIOError:
            self._dial_at = now + (_LOOKUP_S if self._transport.looking_up else _CROWDED_S)
            return
        except AddressError as error:
            self._lose(error)
            return
        except OSError as error:
            self._lose(no_connection(self._broker_address, error))
            return
        except Exception as error:  # noqa: BLE001 - a bug; waiting calls must get the error
            self._lose_by_bug(no_connection(self._broker_address, error), error)
            return
        if is_connected:
            self._on_open()

    def _on_open(self) -> None:
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
        log().exception("connection lost: unexpected error")
        reason.__cause__ = error
        self._lose(reason)

    def _on_ready(self, *, readable: bool, writable: bool) -> None:
        """Read and write as far as the socket is ready."""
        try:
            self._act(readable=readable, writable=writable)
        except Exception as error:  # noqa: BLE001 - a bug; waiting calls get it
            self._lose_by_bug(Disconnected(f"the connection broke: {error}"), error)

    def _act(self, *, readable: bool, writable: bool) -> None:
        transport = self._transport
        if transport.connecting:
            if readable or writable:
                try:
                    is_connected = transport.connected()
                except OSError as error:
                    self._lose(no_connection(self._broker_address, error))
                    return
                if is_connected:
                    self._on_open()
            return
        loss: OSError | None = None
        data: bytes | None = None
        try:
            if writable:
                self._flush()
        except OSError as error:
            loss = error
        try:
            while readable or loss is not None:
                # With the lock, because a leader may read, too.
                with self._lock:
                    self._recover_reads()
                    data = transport.read()
                    if not data:
                        break
                    goes_on = self._receive(data)
                if not goes_on or loss is None:
                    return
                # The connection is broken: only bytes that arrived already are left to
                # read.
        except OSError as error:
            loss = loss or error
        if loss is not None:
            self._lose(broken(loss))
        elif data is not None:
            self._lose(self._dialog.closed_by_broker())

    def _receive(self, data: bytes) -> bool:
        """Pass received bytes to the dialog; return whether the connection stays open."""
        now = time.monotonic()
        with self._lock:
            self._clear = False
            if not self._recover_writes(now):
                return False
            before = self._dialog.state
            effects = self._dialog.receive(data, self, now)
            # For the leader, which can't change the dialog.
            self._transport.unread.after = self._dialog.take_begun()
            self._apply(effects, now)
            if effects.broken is None:
                self._write()
            if self._dialog.state is not before and self._dialog.may_answer:
                self._note_state()
            self._allow_sends()
            return not self._dropping

    def _flush(self) -> None:
        with self._lock:
            self._clear = False
            if self._recover_writes(time.monotonic()) and self._transport.unwritten():
                self._dialog.wrote(self._transport.flush())
                if not self._transport.backlog and self._changes:
                    self._changes.wake()
            # TLS bytes besides the backlog may also be sent during a read: senders must
            # not wait for them.
            self._allow_sends()


def _interruption(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the exception that interrupted a call of ``threading``, or ``error``
    itself.

    When an exception strikes inside ``Condition.wait``, the lock is released already.
    The ``with`` statement then releases it again and raises "release unlocked lock".

    Args:
        error: The exception that the call raised.
        outer: The exception that was being handled before the call. It is not the
            interruption.
    """
    while (
        isinstance(error, RuntimeError)
        and error.__context__ not in (None, outer)
        and _from_threading(error)
    ):
        assert error.__context__ is not None
        error = error.__context__
    return error


def _from_threading(error: BaseException) -> bool:
    """Return whether the library's ``threading`` raised the error, not a signal
    handler.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__") == threading.__name__


def _transport(settings: Settings) -> Transport:
    if settings.tls is None:
        return Transport(settings.addresses[0])
    from brokerd_client.blocking.tls_transport import TlsTransport

    return TlsTransport(settings.addresses[0], settings.tls)


#: Modules and names of the methods that may hold a client's lock.
_OWN_MODULES: Final = (__name__, "brokerd_client.blocking.client")
_LOCKING: Final = (
    "_send_at_once",
    "_put",
    "_request_as_leader",
    "_begin_take",
    "_take_lone",
    "_post",
    "_settle",
    "_repair",
    "_wait_until_clear",
    "_do_chores",
    "_close",
    "_begin_lead",
    "_read_ahead",
    "_end_lead",
)

_open_clients: weakref.WeakSet[BaseClient] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for client in list(_open_clients):
        client._close()


def _review_in_flight(ref: weakref.ref[BaseClient]) -> None:
    """Lower the client's limit in flight, if there are fewer handler threads now."""
    if (client := ref()) is not None:
        client._queue_chore(client._lower_in_flight)


def _deadline(timeout: float | None) -> float | None:
    """Return the deadline for a timeout in seconds.

    Raises ValueError if it is not valid.
    """
    if type(timeout) is not float or not 0 <= timeout < ENDLESS_S:
        timeout = check_timeout(timeout)
        if timeout is None:
            return None
    return _with_timeout(time.monotonic() + timeout, timeout)


def _with_timeout(end: float, timeout_s: float) -> Deadline:
    """Return the deadline at ``end`` of a call with that timeout."""
    deadline = Deadline(end)
    deadline.timeout_s = timeout_s
    return deadline


def _move_bytes(
    ref: weakref.ref[BaseClient],
    transport: Transport,
    queues: Iterable[WaitQueue[Any]],
    error: BaseException | None = None,
) -> None:
    """Run a client's I/O thread, which ends only when the client ends.

    It holds the client only between two waits.

    Args:
        ref: The client.
        transport: The client's transport, which the thread closes.
        queues: Wait queues that the thread ends; a client that was dropped unclosed
            can't.
        error: The exception that ended the previous I/O thread, if any.
    """
    try:
        _keep_moving(ref, transport, error)
        transport.close()
        for queue in queues:
            queue.end(Closed("the client is closed"))
    except BaseException as caught:  # noqa: BLE001 - raised while handling another
        thread = threading.Thread(
            target=_move_bytes,
            args=(ref, transport, queues, caught),
            name="brokerd client",
            daemon=True,
        )
        if (client := ref()) is not None:
            client._replace_thread(thread)
        thread.start()


def _keep_moving(
    ref: weakref.ref[BaseClient], transport: Transport, error: BaseException | None
) -> None:
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
    """Do the work that is due, wait, read and write; return whether the thread
    continues.
    """
    if (client := ref()) is None:
        return False
    client._thread_id = threading.get_ident()
    try:
        plan = client._prepare()
    finally:
        del client
    if plan is None:
        return False
    readable, writable = transport.wait(plan[0], reading=plan[1])
    if (client := ref()) is None:
        return False
    try:
        client._on_ready(readable=readable, writable=writable)
    finally:
        del client
    return True


def _survive(ref: weakref.ref[BaseClient], error: BaseException) -> bool:
    if (client := ref()) is None:
        return False
    try:
        client._survive(error)
    finally:
        del client
    return True
