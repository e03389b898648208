"""The transport of the blocking face: a non-blocking socket, its backlog and a waker.

It knows nothing of frames. One thread (the I/O thread) dials, waits, reads and closes.
Any thread may write or wake, one at a time. :meth:`write` returns the number of bytes
that the operating system has taken.

An exception, for example of a signal handler, may interrupt a write. The bytes are
therefore stored in ``backlog`` before they are passed to the system. ``unsure`` tells
whether the system may have taken bytes that are still in ``backlog``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping

from brokerd_client._common.keepalive import DEFAULT_S, LOOKS, TCP, Silence, has_ended, keep_alive
from brokerd_client._common.lookup import Candidate, Lookup, numeric
from brokerd_client._common.pipe_bridge import dial_pipe
from brokerd_client.address import Address, validate_family
from brokerd_client.errors import TlsError

__all__ = ["Transport", "raised_by_system"]

_READ_SIZE = 64 * 1024
#: Seconds that one wait lasts at most: the system's calls accept a few days at most.
_LONGEST_WAIT_S = 3600.0
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR)


def raised_by_system(error: OSError) -> bool:
    """Return whether the system raised the error, not a signal handler.

    A signal handler may raise a TimeoutError, which is an OSError too.
    """
    return error.errno is not None or isinstance(
        error, (TlsError, BlockingIOError, InterruptedError)
    )


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
        self._selector = selectors.DefaultSelector()
        self._mask = 0
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
        self._selector.register(self._waker_out, selectors.EVENT_READ)

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
        self.unsure = True
        self.backlog = data
        self.bytes_given += size
        try:
            # A loop, because CPython raises a signal handler's exception after a call
            # of send, when the result is not in a variable yet. It does not raise
            # between a loop's step and the assignment of its variable.
            for sent in map(self._send, (data,)):
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

    def wait(self, timeout: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Wait for the socket or the waker; return (readable, writable).

        Args:
            timeout: Seconds to wait at most; None for no limit.
            reading: Whether to wait for input. A wait without it checks whether the
                peer has ended the connection. The rest of its bytes must then be read,
                and the socket counts as readable.
        """
        timeout = self._check_peer(None if timeout is None else min(timeout, _LONGEST_WAIT_S))
        if self._vanished:
            return True, False
        mask = 0
        if self._socket is not None:
            read, write = self._wanted(reading=reading)
            mask = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        self._schedule(mask)
        events = 0
        for key, ready in self._selector.select(timeout):
            if key.fileobj is self._waker_out:
                with contextlib.suppress(BlockingIOError, InterruptedError):
                    while self._waker_out.recv(4096):
                        pass
            else:
                events = ready
        if not reading and self._socket is not None and not self.connecting:
            self.ended = has_ended(self._socket)
            if self.ended:
                events |= selectors.EVENT_READ
        return bool(events & selectors.EVENT_READ), bool(events & selectors.EVENT_WRITE)

    def _check_peer(self, timeout: float | None) -> float | None:
        """Check at intervals whether the peer still answers.

        Returns the timeout in seconds, shortened to the time of the next check.
        """
        if self._socket is None or self.connecting or self._socket.family not in TCP:
            return timeout
        now = time.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + DEFAULT_S / LOOKS
            self._vanished = self._silence.lasts(self._socket, now) >= DEFAULT_S
        remaining = self._next_check_at - now
        return remaining if timeout is None else min(timeout, remaining)

    def _raise_if_vanished(self) -> None:
        if self._vanished:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _wanted(self, *, reading: bool) -> tuple[bool, bool]:
        """Return whether to wait for the socket to be readable, and to be writable."""
        return reading and not self.connecting, self.connecting or self.unwritten()

    def _schedule(self, mask: int) -> None:
        if mask == self._mask:
            return
        assert self._socket is not None
        if not self._mask:
            self._selector.register(self._socket, mask)
        elif mask:
            self._selector.modify(self._socket, mask)
        else:
            self._selector.unregister(self._socket)
        self._mask = mask

    def wake(self) -> None:
        """Wake the I/O thread. Never blocks: a full waker wakes the thread anyway."""
        try:
            self._waker_in.send(b"!")
        except OSError as error:
            if not raised_by_system(error):
                raise

    def drop(self) -> None:
        """Close the connection, if there is one, and discard the backlog."""
        if self._socket is not None:
            self._schedule(0)
            self._socket.close()
            self._socket = None
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
            self._selector.close()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker_out, selectors.EVENT_READ)
        self._mask = 0
        self.drop()

    def close(self) -> None:
        """Close the connection, the selector and the waker; the I/O thread's last act."""
        self.drop()
        self._selector.close()
        self._waker_out.close()
        self._waker_in.close()

    def disown(self) -> None:
        """Close the copies in a forked child; the parent's connection stays open."""
        for sock in (self._socket, self._waker_out, self._waker_in):
            if sock is not None:
                sock.close()
        self._selector.close()
