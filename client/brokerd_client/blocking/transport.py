"""The transport of the blocking face: a non-blocking socket, its backlog and a waker.

It knows nothing of frames. One thread (the I/O thread) dials, waits, reads and closes.
Any thread may write or wake, one at a time. :meth:`write` returns the number of bytes
that the operating system has taken.

A thread that waits for an answer may borrow the input: see :meth:`borrow_input`. It
then reads in place of the I/O thread, which sleeps on. Threads that borrow the input
again and again keep it in between, so that each answer costs three system calls. The
I/O thread then looks at short intervals whether the input is still in use.

An exception, for example of a signal handler, may interrupt a write. The bytes are
therefore stored in ``backlog`` before they are passed to the system. ``unsure`` tells
whether the system may have taken bytes that are still in ``backlog``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from brokerd_client._common.keepalive import DEFAULT_S, LOOKS, TCP, Silence, has_ended, keep_alive
from brokerd_client._common.lookup import Candidate, Lookup, numeric
from brokerd_client._common.pipe_bridge import dial_pipe
from brokerd_client.address import Address, validate_family
from brokerd_client.blocking.input_poll import InputPoll
from brokerd_client.blocking.poller import READ, WRITE, EpollPoller, poller
from brokerd_client.errors import TlsError

__all__ = ["Transport", "raised_by_system"]

_READ_SIZE = 64 * 1024
#: Most bytes that a waiting thread reads at once. Messages that are taken before more are
#: read cost half as much: they are in the processor's cache, and the garbage collector
#: does not look at them.
_READ_AHEAD_SIZE = 24 * 1024
#: Seconds that one wait lasts at most: the system's calls accept a few days at most.
_LONGEST_WAIT_S = 3600.0
#: Seconds between returning and borrowing the input that count as quick, and how many
#: times in a row it is borrowed quickly before it is kept.
_QUICK_S = 0.0002
_QUICK_TIMES = 4
#: Seconds between two checks of the I/O thread whether kept input is still in use. Input
#: that no thread has borrowed in between waits for it.
_KEPT_S = 0.004
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR)


def raised_by_system(error: OSError) -> bool:
    """Return whether the system raised the error, not a signal handler.

    A signal handler may raise a TimeoutError, which is an OSError too.
    """
    return error.errno is not None or isinstance(
        error, (TlsError, BlockingIOError, InterruptedError)
    )


class Unread(deque["bytes | OSError"]):
    """The reads of a waiting thread that wait to be handled: bytes, or a read's error.

    Each change is one step, which an exception of a signal handler can't divide.

    Args:
        items: What was read.
        before: The begin of a frame, before the items.
        after: The same, behind the items. It stays when they are cleared.
    """

    __slots__ = ("after", "before")

    def __init__(
        self, items: Iterable[bytes | OSError] = (), *, before: bytes = b"", after: bytes = b""
    ) -> None:
        super().__init__(items)
        self.before = before
        self.after = after


class Transport:
    """The connection to a broker, one at a time."""

    #: Returns how many bytes the system has taken. Raises OSError if it takes none, at
    #: the moment or permanently.
    _send: Callable[[bytes | memoryview], int]

    def __init__(self, address: Address) -> None:
        validate_family(address.family)
        self.address = address
        #: Bytes that are not written yet: the rest of a write that could not finish.
        self.backlog: bytes | memoryview = b""
        #: Bytes given to write() on this connection.
        self.bytes_given = 0
        #: Whether a write is in progress, or was interrupted while the system took its
        #: bytes.
        self.unsure = False
        self.connecting = False
        self._socket: socket.socket | None = None
        self._candidates: Iterator[Candidate] = iter(())
        self._lookup: Lookup | None = None
        #: What the I/O thread waits for at the socket, without what is lent.
        self._mask = 0
        #: Whether a waiting thread reads, and the I/O thread does not wait for input.
        self.lent = False
        #: Whether it is lent although no thread reads, for the next thread.
        self.kept = False
        #: Whether the I/O thread looks at short intervals if the input is in use.
        self._watched = False
        #: How many times the input was borrowed, and how often quickly in a row.
        self._times_borrowed = 0
        self._times_quick = 0
        self._left_at = 0.0
        self.unread = Unread()
        self._silence = Silence()
        self._next_check_at = 0.0
        #: Whether the peer vanished without closing. Reading raises an error for it,
        #: after the bytes that had arrived.
        self._vanished = False
        #: Whether the peer sends no more bytes, as found by a wait that does not read.
        self.ended = False
        self._waker_out, self._waker_in = socket.socketpair()
        self._waker_out.setblocking(False)
        self._waker_in.setblocking(False)
        self._poller = poller(self._waker_out)
        #: The waker of the thread that has borrowed the input; None where no thread can.
        self._borrower_waker = self._new_borrower_waker()
        #: What that thread waits for: the socket and its waker.
        self._poll: Any = None
        #: What it does before it sleeps, where it has kept the input.
        self.input_poll = InputPoll()

    @property
    def open(self) -> bool:
        """Whether there is a socket, connected or about to be."""
        return self._socket is not None

    def unwritten(self) -> bool:
        """Return whether bytes wait to be written."""
        return bool(self.backlog)

    @property
    def looking_up(self) -> bool:
        """Whether :meth:`dial` has begun to look up the host's name."""
        return self._lookup is not None

    @property
    def looked_up(self) -> bool:
        """Whether the look-up of the host's name that :meth:`dial` has begun is done."""
        return self._lookup is not None and self._lookup.done

    @property
    def bindings(self) -> Mapping[str, bytes]:
        """The channel bindings of the key: none without TLS."""
        return {}

    def aim(self, address: Address) -> None:
        """Set the address that the next call of :meth:`dial` connects to.

        Raises AddressError if this machine does not support the address's family.
        """
        if address != self.address:
            validate_family(address.family)
            self.address = address
            # Its thread ends by itself; its result is about another host.
            self._lookup = None

    def dial(self) -> bool:
        """Begin to connect; return whether the connection is made already.

        Raises:
            BlockingIOError: A host's name is being looked up; the I/O thread is woken
                when that is done. Or the listener's queue is full at the moment.
            OSError: All candidate addresses have failed.
        """
        if self.address.family == "AF_PIPE":
            self._socket = dial_pipe(self.address.path)
            self._socket.setblocking(False)
            self._send = self._socket.send
            return True
        if self.address.family == "AF_UNIX":
            self._candidates = iter([(int(socket.AF_UNIX), self.address.path)])
        else:
            self._candidates = iter(self._look_up())
        return self._try_next(OSError(errno.EADDRNOTAVAIL, "the host has no address"))

    def _look_up(self) -> list[Candidate]:
        host, port = self.address.host, self.address.port
        candidates = numeric(host, port)
        if candidates is not None:
            return candidates
        if self._lookup is None:
            self._lookup = Lookup(host, port, self.wake)
        if self._lookup.done:
            lookup, self._lookup = self._lookup, None
            return lookup.result()
        # A look-up begun by an earlier attempt is used again, so that there is one
        # thread at most.
        return self._lookup.result()

    def connected(self) -> bool:
        """Return whether the connection is made, or False if the next candidate is
        being tried.

        Raises OSError if all candidate addresses have failed.
        """
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            self.connecting = False
            return True
        self.drop()
        return self._try_next(OSError(code, os.strerror(code)))

    def _try_next(self, error: OSError) -> bool:
        for family, sockaddr in self._candidates:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                if family != getattr(socket, "AF_UNIX", None):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    # A peer whose machine is gone never closes the connection.
                    keep_alive(sock, DEFAULT_S)
                code = sock.connect_ex(sockaddr)
                if code == 0 or (code in _UNDER_WAY and family != getattr(socket, "AF_UNIX", None)):
                    self._socket = sock
                    self._send = sock.send
                    self.connecting = code != 0
                    return not self.connecting
            except BaseException:
                sock.close()
                raise
            sock.close()
            error = OSError(code, os.strerror(code))
        raise error

    def write(self, data: bytes) -> int:
        """Write as many bytes as possible now, after the backlog; return how many were
        written.

        The rest is kept in the backlog. A lost connection takes no bytes. The I/O
        thread detects the loss, too, and reads the bytes that came before it.
        """
        if self.backlog:
            joined = b"".join((self.backlog, data))
            size = len(data)
            self.unsure = True
            self.backlog = joined
            self.bytes_given += size
            self.unsure = False
            return 0
        size = len(data)
        # A loop, because CPython raises a signal handler's exception after a call of
        # send, when the result is not in a variable yet. It does not raise between a
        # loop's step and the assignment of its variable, nor before the first step,
        # because nothing is called there.
        sends = map(self._send, (data,))
        try:
            self.unsure = True
            self.backlog = data
            self.bytes_given += size
            for sent in sends:
                if sent == size:
                    self.backlog = b""
                    self.unsure = False
                    return size
                break
        except OSError as error:
            if not raised_by_system(error):
                raise
            sent = 0
        if sent:
            self.backlog = memoryview(data)[sent:]
        self.unsure = False
        return sent

    def flush(self) -> int:
        """Write from the backlog; return how many bytes were written.

        Raises OSError if the connection is lost.
        """
        self.unsure = True
        try:
            sent = self._send(self.backlog)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.unsure = not raised_by_system(error)
            raise
        self.backlog = memoryview(self.backlog)[sent:]
        self.unsure = False
        return sent

    def read(self) -> bytes | None:
        """Return the bytes that have arrived, b"" at the end, or None if there are none
        yet.

        Raises OSError if the connection is lost.
        """
        if self.unread:
            data = self.first_unread()
            after, self.unread = self.unread.after, Unread()
            if isinstance(data, OSError):
                raise data
            return data + after
        begun = self.unread.before + self.unread.after
        received = self._receive()
        if received and begun:
            self.unread = Unread()
            received = begun + received
        return received

    def first_unread(self) -> bytes | OSError:
        """Return the first item of ``unread``, with what is before it."""
        first = self.unread[0]
        if self.unread.before:
            if isinstance(first, bytes) and first:
                first = self.unread.before + first
            self.unread = Unread((first,), after=self.unread.after)
        return first

    def split_unread(self, data: bytes, size: int) -> None:
        """Set aside the last ``size`` bytes of ``data``, which is all of ``unread``: they
        are the begin of a frame.
        """
        self.unread = Unread((data[:-size],), after=data[-size:])

    def _receive(self) -> bytes | None:
        """Return the bytes that have arrived at the socket, as :meth:`read` does."""
        assert self._socket is not None
        try:
            return self._socket.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            self._raise_if_vanished()
            return None

    def shut(self) -> None:
        """Shut down the sending side of the connection."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def schedule(self, *, reading: bool) -> None:
        """Set whether the next wait ends when there is input; with the client's lock."""
        if self.kept and not self._watched:
            self.return_input()
        mask = 0
        if self._socket is not None:
            read, write = self._wanted(reading=reading)
            mask = (READ if read else 0) | (WRITE if write else 0)
        if mask != self._mask:
            # What is lent is not waited for: see borrow_input.
            self.return_input()
            self._watch(mask)

    def wait(self, timeout: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Wait for the socket or the waker; return (readable, writable).

        What is waited for has been set with :meth:`schedule`.

        Args:
            timeout: Seconds to wait at most; None for no limit.
            reading: Whether to wait for input. A wait without it checks whether the
                peer has ended the connection. The rest of its bytes must then be read,
                and the socket counts as readable.
        """
        timeout = self._check_peer(None if timeout is None else min(timeout, _LONGEST_WAIT_S))
        if self._vanished:
            return True, False
        woken, ready = self._wait_until_ready(0 if self.unread else timeout)
        if woken:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                while self._waker_out.recv(4096):
                    pass
        if self.unread:
            ready |= READ
        if not reading and self._socket is not None and not self.connecting:
            self.ended = has_ended(self._socket)
            if self.ended:
                ready |= READ
        return bool(ready & READ), bool(ready & WRITE)

    def _wait_until_ready(self, timeout: float | None) -> tuple[bool, int]:
        """Wait as the poller does; end the wait when kept input is not in use any more."""
        if not self._watched:
            return self._poller.wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            times_borrowed = self._times_borrowed
            limit = _KEPT_S if end is None else min(_KEPT_S, max(0.0, end - time.monotonic()))
            woken, ready = self._poller.wait(limit)
            if woken or ready or limit < _KEPT_S:
                return woken, ready
            if times_borrowed == self._times_borrowed:
                # The next call of schedule() takes the input back.
                self._watched = False
                return False, 0

    def _check_peer(self, timeout: float | None) -> float | None:
        """Check at intervals whether the peer still answers.

        Returns the timeout in seconds, shortened to the time of the next check.
        """
        if self._socket is None or self.connecting or self._socket.family not in TCP:
            return timeout
        now = time.monotonic()
        if now >= self._next_check_at:
            remaining_s = self._silence.remaining_s(self._socket, now, DEFAULT_S)
            self._next_check_at = now + min(DEFAULT_S / LOOKS, remaining_s)
            self._vanished = remaining_s <= 0
        remaining = self._next_check_at - now
        return remaining if timeout is None else min(timeout, remaining)

    def _raise_if_vanished(self) -> None:
        if self._vanished:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _wanted(self, *, reading: bool) -> tuple[bool, bool]:
        """Return whether to wait for the socket to be readable, and to be writable."""
        return reading and not self.connecting, self.connecting or self.unwritten()

    def _watch(self, mask: int) -> None:
        assert self._socket is not None
        self._poller.watch(self._socket, mask, self._mask)
        self._mask = mask

    # Reading in place of the I/O thread

    def _new_borrower_waker(self) -> tuple[socket.socket, socket.socket] | None:
        if not isinstance(self._poller, EpollPoller):
            return None
        pair = socket.socketpair()
        for end in pair:
            end.setblocking(False)
        return pair

    def borrow_input(self) -> Any:
        """Keep the I/O thread from reading; return what to poll instead, or None.

        The caller has the client's lock. Only one thread borrows at a time.
        """
        self._times_borrowed += 1
        if self.kept:
            self.kept = False
            return self._poll
        if self._borrower_waker is None or self.unread or not self._mask & READ:
            return None
        quick = time.monotonic() - self._left_at < _QUICK_S
        self._times_quick = self._times_quick + 1 if quick else 0
        assert self._socket is not None
        assert isinstance(self._poller, EpollPoller)
        if self._poll is None or self.lent:
            # A signal handler may read while its thread's own poll is interrupted.
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            self._poll.register(self._borrower_waker[0], select.POLLIN)
        self.lent = True
        self._poller.change(self._socket, self._mask & ~READ)
        return self._poll

    def leave_input(self) -> None:
        """Return the input to the I/O thread, or keep it for a thread that soon borrows it
        again; with the client's lock.
        """
        if not self._watched:
            self._left_at = time.monotonic()
            if self._times_quick < _QUICK_TIMES:
                self.return_input()
                return
            # In this order: a signal handler's exception in between must not leave input
            # that the I/O thread does not look at.
            self.wake()
            self._watched = True
        self.kept = self.lent

    def return_input(self) -> None:
        """Return the input to the I/O thread; with the client's lock."""
        self.kept = False
        if self.lent:
            if self._mask:
                assert self._socket is not None
                assert isinstance(self._poller, EpollPoller)
                self._poller.change(self._socket, self._mask)
            self.lent = False

    def read_ahead(self) -> None:
        """Read what has arrived into ``unread``, as the thread that has borrowed the
        input, with the client's lock.
        """
        assert self._socket is not None
        if self.unread.after:
            self.unread = Unread(before=self.unread.after)
        try:
            # One call, because a signal handler's exception after recv would lose bytes.
            self.unread.extend(map(self._socket.recv, (_READ_AHEAD_SIZE,)))
        except (BlockingIOError, InterruptedError):
            # The wake-up was meant for the caller, or another thread was faster.
            assert self._borrower_waker is not None
            with contextlib.suppress(BlockingIOError, InterruptedError):
                self._borrower_waker[0].recv(4096)
        except OSError as error:
            if not raised_by_system(error):
                raise
            self.unread.append(error)

    def wake_borrower(self) -> None:
        """Wake the thread that has borrowed the input."""
        if self._borrower_waker is not None:
            _send_wake_up(self._borrower_waker[1])

    def wake(self) -> None:
        """Wake the I/O thread. Never blocks: a full waker wakes the thread anyway."""
        _send_wake_up(self._waker_in)

    def drop(self) -> None:
        """Close the connection, if there is one, and discard the backlog."""
        if self._socket is not None:
            if self._mask:
                self._watch(0)
            self._socket.close()
            self._socket = None
        if self.lent:
            self.lent = False
            self.wake_borrower()
        self.kept = self._watched = False
        self._poll = None
        self.unread = Unread()
        self.connecting = self._vanished = self.ended = False
        self._silence = Silence()
        self.backlog = b""
        self.bytes_given = 0
        self.unsure = False

    def release_locks(self) -> None:
        """Release the locks that an interrupted call of this thread still holds."""

    def renew(self) -> None:
        """Close the connection, whatever its state, after an exception in the I/O
        thread.
        """
        # Each step can be repeated, in case another exception interrupts it. If the
        # socket stayed open, the broker would refuse the next connection.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
        with contextlib.suppress(OSError):
            self._poller.close()
        self._poller = poller(self._waker_out)
        self._mask = 0
        self.drop()

    def close(self) -> None:
        """Close the connection, the poller and the wakers; the I/O thread's last act."""
        self.drop()
        self._poller.close()
        for sock in (self._waker_out, self._waker_in, *(self._borrower_waker or ())):
            sock.close()

    def disown(self) -> None:
        """Close the copies in a forked child; the parent's connection stays open."""
        sockets = (self._waker_out, self._waker_in, *(self._borrower_waker or ()))
        for sock in sockets if self._socket is None else (self._socket, *sockets):
            sock.close()
        self._poller.close()


def _send_wake_up(waker: socket.socket) -> None:
    """Send a byte to a waker. A full waker wakes its thread anyway."""
    try:
        waker.send(b"!")
    except OSError as error:
        if not raised_by_system(error):
            raise
