"""What moves the bytes of a blocking client: its lock, its connection and its I/O thread.

A part of the blocking face: it moves bytes, sleeps until the dialog's next deadline and wakes who waits.

The I/O thread reads, connects again, and writes what a sender could not finish; senders write from their own thread,
so that a send costs one system call. One lock guards the dialog. The I/O thread and the handlers' threads hold the
client weakly: one that is dropped unclosed ends, with a ResourceWarning.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from brokerd_client import forks
from brokerd_client.blocking_boxes import Box, Call
from brokerd_client.blocking_feeds import Message
from brokerd_client.chance import chance, first_id, nonce
from brokerd_client.channel import Channel
from brokerd_client.desk import Desk, Job, log
from brokerd_client.dialog import Batch, Dialog
from brokerd_client.errors import BrokerdError, Closed, Disconnected, TimedOut, TlsError, WrongProcess
from brokerd_client.inbox import OVERHEAD, STRETCH, Gauge
from brokerd_client.life import State
from brokerd_client.settings import Settings, broken, no_connection

__all__ = ["Link"]

#: Seconds until a listener whose queue of new connections is full is tried again.
_CROWDED_S: Final = 0.01


class Link:
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
        self._channel = _channel(settings)
        self._lock = threading.Lock()
        #: The link has become ready, or will not any more, or everything is written.
        self._changed = threading.Condition(self._lock)
        #: Whether a send can be written at once: the link is ready and nothing is waiting to be written.
        self._clear = False
        #: Whether the connection is gone for the dialog, and only the I/O thread has not closed it yet.
        self._dropping = False
        self._dial_at = 0.0
        self._forked = False
        #: Whether nobody but the I/O thread has the client any more.
        self._dropped = False
        self._gauge = Gauge(settings.inbox)
        #: Kept weakly: a subscription that is dropped is not kept alive by being counted.
        self._boxes: weakref.WeakSet[Box[Any]] = weakref.WeakSet()
        self._inbox: Box[Message] = self._box()
        self._ordered: Box[Job] = self._box()
        self._requests: Box[Job] = self._box()
        self._desk: Desk[Message] = Desk(self._inbox, self._ordered, self._requests, answering)
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(
            target=_move_bytes,
            args=(weakref.ref(self), self._channel, (self._inbox, self._ordered, self._requests)),
            name="brokerd client",
            daemon=True,
        )
        self._thread.start()
        forks.register(self)

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
        self._desk.warn_of_more(time.monotonic())
        # Until this returns the I/O thread's weak reference still works, and using it brings the client back to life.
        self._dropped = True
        self._channel.ring()

    def forked(self) -> None:
        """This is a copy, in a child of the process that made the client. See brokerd_client.forks."""
        self._forked = True
        self._channel.disown()

    def _check(self) -> None:
        """Raise WrongProcess in a fork. Needs no lock: in a fork it may be held for ever."""
        if self._forked:
            raise WrongProcess("this client belongs to the process that made it: connect again in the child")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._check()
        with self._lock:
            yield

    @contextlib.contextmanager
    def _sending(self, timeout: float | None, *, answer: bool = False) -> Iterator[None]:
        """Hold the lock, once a send, or an answer, can be written at once."""
        self._check()
        with self._lock:
            if not self._clear:
                self._wait_until_clear(timeout, answer=answer)
            yield

    def _wait_until_clear(self, timeout: float | None, *, answer: bool = False) -> None:
        """Wait for the connection, and until what others have sent is written. answer: it takes answers, at least.

        Raises TimedOut: others' bytes are still waiting. Raises Disconnected: there is no connection.
        """
        limit = self._settings.timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._clear and not (answer and self._dialog.may_answer and not self._channel.backlog):
            if self._dialog.state is State.READY or (answer and self._dialog.may_answer):
                # The broker takes nothing now: only the caller's own timeout counts.
                remaining = None if timeout is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimedOut(f"the broker took nothing more for {limit:g} s; this was not sent")
            else:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self.closed:
                    self._dialog.require_ready()
            self._changed.wait(remaining)

    def _write(self, *, awaited: bool = False) -> None:
        """Write what the dialog has put out. awaited: whether this thread waits for what becomes of it."""
        data = self._dialog.data_to_send()
        if not data:
            return
        try:
            self._dialog.wrote(self._channel.write(data))
        except OSError:
            # The I/O thread finds that out too, reads what came before, and then tells everybody: nothing that has come
            # is lost because somebody wrote before it was read.
            self._channel.keep(data)
        if self._channel.backlog:
            self._clear = False
            self._channel.ring()
        elif awaited and self._gauge.full:
            # The outcome may be behind what is not being read.
            self._channel.ring()

    def _outcome(self, call: Call, id: int, deadline: float | None) -> Any:
        """Wait, without the lock, and return or raise what became of a call."""
        try:
            done = call.wait(deadline)
        except BaseException:
            self._abandon([id])
            raise
        if not done:
            self._abandon([id])
            if not call.done:
                raise TimedOut(f"no answer to {id} in time")
        if isinstance(call.value, BaseException):
            raise call.value
        return call.value

    def _abandon(self, ids: list[int]) -> None:
        """Nobody waits for these any more; without the lock."""
        if ids:
            with self._lock:
                for id in ids:
                    self._dialog.abandon(id)
                self._write()

    def _box(self) -> Box[Any]:
        """Return a new box of this client; without the lock."""
        box: Box[Any] = Box(self._lock, self._gauge, self._channel)
        with self._lock:
            self._boxes.add(box)
        return box

    def _hire(self, box: Box[Job], count: int) -> None:
        """Have so many threads do the jobs in the box, if none does yet."""
        name = "brokerd requests" if box is self._requests else "brokerd messages"
        if box.ended is not None or any(thread.name == name for thread in self._threads):
            return
        for _ in range(count):
            thread = threading.Thread(target=_work, args=(box,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _absorb(self, batch: Batch[Message], now: float) -> None:
        """Pass on what the dialog says has happened."""
        for call, value in batch.outcomes:
            call.settle(value)
        if self._dialog.state is not State.CLOSING:
            if batch.messages:
                self._desk.sort(batch.messages, batch.size + OVERHEAD * len(batch.messages))
            if batch.events:
                self._desk.spread(batch.events)
        for sink, why in batch.ended:
            sink.box.end(why)
        if batch.undelivered or batch.unreadable or batch.warnings or batch.broken:
            was_due = self._desk.warning_due
            for error in batch.undelivered:
                self._desk.tell_undelivered(error, now)
            self._desk.report(batch, now)
            if was_due is None and self._desk.warning_due is not None:
                self._channel.ring()
        if batch.broken is not None:
            # The peer may be owed the word that it was rejected.
            with contextlib.suppress(OSError):
                if self._channel.open and not self._channel.connecting:
                    self._dialog.wrote(self._channel.write(self._dialog.data_to_send()))
            self._end_link(batch.broken, now)

    def _end_link(self, reason: BrokerdError, now: float) -> None:
        """Tell the dialog that the connection is gone, and everybody what that means; the I/O thread closes it."""
        batch = self._dialog.lost(reason, now, chance())
        self._dial_at = self._dialog.retry_at
        self._dropping = True
        # Before the boxes end, so that on_undelivered hears of a last loss too.
        self._absorb(batch, now)
        self._note_state()
        self._channel.ring()

    def _note_state(self) -> None:
        """Tell who waits for the link what has become of it."""
        state = self._dialog.state
        self._clear = state is State.READY and not self._channel.backlog
        if state is State.GONE:
            why = Disconnected(f"the connection to the broker is gone: {self._dialog.reason}")
            for box in list(self._boxes):
                box.end(why)
        elif state in (State.CLOSING, State.CLOSED):
            for box in list(self._boxes):
                box.end(Closed("the client is closed"))
        self._changed.notify_all()

    # The I/O thread; without the lock

    def prepare(self) -> tuple[float | None, bool] | None:
        """Do what is due; return (seconds to wait, whether to read), or None when there is nothing more to do."""
        if self._dropped:
            return None
        now = time.monotonic()
        with self._lock:
            if self._dropping:
                self._channel.drop()
                self._dropping = False
            self._absorb(self._dialog.tick(now), now)
            if self._dialog.state is State.DRAINING:
                # A call that has timed out may have been the last that kept the connection.
                self._write()
            if self._dropping:
                self._channel.drop()
                self._dropping = False
            state = self._dialog.state
            over = state in (State.CLOSED, State.GONE)
            due = self._desk.warning_due
            if due is not None and (over or now >= due):
                self._desk.warn_of_more(now)
            if over:
                return None
            dialing = state in (State.IDLE, State.WAITING) and now >= self._dial_at
            if dialing:
                self._dialog.dialing(now)
        if dialing or (state is State.CONNECTING and not self._channel.open and now >= self._dial_at):
            self._dial(now)
        with self._lock:
            deadline = self._dialog.next_deadline()
            if self._dialog.state is State.CONNECTING and not self._channel.open:
                deadline = self._dial_at if deadline is None else min(deadline, self._dial_at)
            due = self._desk.warning_due
            if due is not None:
                deadline = due if deadline is None else min(deadline, due)
            limit = self._gauge.limit
            full = self._gauge.weigh((box.inbox for box in self._boxes), limit=limit)
            reading = not full or (len(self._dialog.awaiting) > 0 and self._gauge.held <= STRETCH * limit)
            closing = self._dialog.state is State.CLOSING
        return (None if deadline is None else max(0.0, deadline - time.monotonic())), reading or closing

    def _dial(self, now: float) -> None:
        try:
            done = self._channel.dial()
        except BlockingIOError:
            self._dial_at = now + _CROWDED_S
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
            bindings = self._channel.bindings
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
                self._end_link(reason, now)

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
        channel = self._channel
        if channel.connecting:
            if readable or writable:
                try:
                    done = channel.connected()
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
                data = channel.read()
            while data:
                if not self._take_in(data) or gone is None:
                    return
                # Nothing more comes than is here.
                data = channel.read()
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
            if self._dropping:
                return False
            before = self._dialog.state
            batch = self._dialog.receive(data, self, now)
            self._absorb(batch, now)
            if batch.broken is None:
                self._write()
            if self._dialog.state is not before and self._dialog.may_answer:
                self._note_state()
            return not self._dropping

    def _flush(self) -> None:
        with self._lock:
            if self._channel.unwritten() and not self._dropping:
                self._dialog.wrote(self._channel.flush())
                # What is left besides the backlog, of TLS, may go with a read too: nobody is to wait for that.
                if not self._channel.backlog:
                    self._note_state()


def _channel(settings: Settings) -> Channel:
    if settings.tls is None:
        return Channel(settings.address)
    from brokerd_client.tls_channel import TlsChannel

    return TlsChannel(settings.address, settings.tls)


def _work(box: Box[Job]) -> None:
    """Do the jobs of a box until it ends. Holds the client only while a job is being done."""
    while True:
        try:
            function, item = box.take(None)
        except BrokerdError:
            return
        try:
            function(item)
        # An exit would end this thread, which others' messages need, and not the program.
        except (Exception, SystemExit):  # noqa: BLE001 - the handler's own, whatever it is
            log().exception("a handler failed")
        del function, item


def _move_bytes(ref: weakref.ref[Link], channel: Channel, boxes: Iterable[Box[Any]]) -> None:
    """Run a client's I/O thread. Holds the client only between two waits.

    boxes: ended when the thread ends, for a client that was dropped unclosed can't do it.
    """
    try:
        while (client := ref()) is not None:
            try:
                plan = client.prepare()
            finally:
                del client
            if plan is None:
                return
            readable, writable = channel.wait(plan[0], reading=plan[1])
            if (client := ref()) is None:
                return
            try:
                client.act(readable=readable, writable=writable)
            finally:
                del client
    finally:
        channel.close()
        for box in boxes:
            with box.filled:
                box.end(Closed("the client is closed"))
