"""Listener: accepts authenticated peers one by one, without being blocked by other
peers.

It has no background thread. A thread in accept() also advances the handshakes of all
pending peers. A peer that sends nothing, half a handshake, or garbage therefore delays
no other peer. Between two calls, peers wait in the system's queue, as they do for the
standard library's listener. No handshake's time runs then.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Union, cast

from brokerd_client._common import forks
from brokerd_client.address import Family, format_peer, infer_family, validate_family
from brokerd_client.connection.call_lock import new_call_lock, refuse_nested_call
from brokerd_client.connection.handshaking import PendingHandshake, authentication_error, nonce
from brokerd_client.connection.keys import Key, choose_key
from brokerd_client.connection.listening_sockets import (
    ServerSocket,
    arbitrary_address,
    default_family,
    open_server,
)
from brokerd_client.connection.readiness import deadline_after
from brokerd_client.connection.stream import Connection
from brokerd_client.errors import AuthenticationError, Closed, FrameError, TimedOut
from brokerd_client.wire.handshake import as_listener

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Listener", "OnError"]

OnError = Union[Literal["raise", "skip"], Callable[[AuthenticationError, Any], object]]

_log: Final = logging.getLogger("brokerd_client.connection")


class Listener:
    """A listening socket, or Windows named pipe, that accepts connections.

    Args:
        address: A (host, port) pair, a path, an abstract name (beginning with NUL), a
            pipe's name, or broker://NAME. None chooses a free address. Only the owner of a
            socket file can read and write it.
        family: AF_INET, AF_INET6, AF_UNIX, AF_PIPE or AF_BROKER; by default inferred from
            the address.
        backlog: Most peers that may wait in the system's queue.
        authenticate: Whether peers must have the key. The fourth parameter may also be
            the key.
        authkey: The key; text is encoded in UTF-8. None with a true ``authenticate``
            means the key of the current process.
        max_message: Largest message that the connections accept, in bytes; None for
            any.
        allow_md5: Whether to accept peers that support only HMAC-MD5 (Python 3.11 and
            older).
        handshake_timeout: Seconds that a peer has for its handshake.
        max_handshakes: Most pending handshakes at once; one more drops the oldest.
        on_error: The handling of peers that failed to authenticate. ``"raise"``:
            accept() raises the error if the peer answered wrongly, as
            processing.connection does. It drops peers that sent nothing, left or sent
            garbage. ``"skip"``: accept() drops all of them. A callable is called with
            every error and the peer's address instead; accept() raises its exceptions.
        allow_pickle_from: At broker://NAME, the names of clients whose pickles are read
            without a key.

    Raises:
        ValueError: An argument is not valid.
        InvalidKey: The key is text that can't be written in UTF-8.
        OSError: The address is in use, for example.
    """

    def __init__(
        self,
        address: Any = None,
        family: str | None = None,
        backlog: int = 128,
        authenticate: bool | Key | None = False,
        authkey: Key | None = None,
        *,
        max_message: int | None = None,
        allow_md5: bool = True,
        handshake_timeout: float = 10.0,
        max_handshakes: int = 256,
        on_error: OnError = "raise",
        allow_pickle_from: Collection[str] = (),
    ) -> None:
        self._key = choose_key(authenticate, authkey)
        if not handshake_timeout > 0 or max_handshakes < 1:
            raise ValueError("handshake_timeout and max_handshakes must be above 0")
        if on_error not in ("raise", "skip") and not callable(on_error):
            raise ValueError(f'on_error should be "raise", "skip" or a callable, not {on_error!r}')
        family = family or (infer_family(address) if address else default_family)
        validate_family(family)
        if allow_pickle_from and family != "AF_BROKER":
            raise ValueError("allow_pickle_from is for addresses broker://NAME only")
        self._max_message = max_message
        self._allow_md5 = allow_md5
        self._handshake_timeout = handshake_timeout
        self._on_error = on_error
        self._closed = False
        self._last_accepted: Any = None
        # The thread that holds this lock changes everything below. Reentrant: on_error
        # and signal handlers may close the listener.
        self._lock = new_call_lock()
        self._pending_handshakes: dict[int, PendingHandshake] = {}
        self._ready: deque[tuple[Connection, object]] = deque()
        self._errors: deque[AuthenticationError] = deque()
        self._accept_ended_at = 0.0
        self._server: ServerSocket
        if family == "AF_BROKER":
            # Imported here, because it imports the client of the broker.
            from brokerd_client.connection.broker import ChannelServer

            self._server = ChannelServer(
                address,
                backlog,
                authenticated=self._key is not None,
                allow_pickle_from=allow_pickle_from,
            )
        else:
            self._server = open_server(
                address or arbitrary_address(family), cast("Family", family), backlog
            )
        self._address = self._server.address
        self._max_handshakes = min(max_handshakes, self._server.most_peers)
        forks.register(self)

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._close_all()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} at"
            f" {format_peer(self._address)}{', closed' if self._closed else ''}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> Any:
        """The address in use, with the port or path that was chosen."""
        return self._address

    @property
    def last_accepted(self) -> Any:
        """The address of the last accepted peer; None if it has no address, as most
        Unix sockets. At broker://NAME, it is the peer's name, as the broker has
        authenticated it.
        """
        return self._last_accepted

    def accept(self, timeout: float | None = None) -> Connection:
        """Return the next connection, authenticated if there is a key.

        Any number of threads may call this at once. After an unlisted exception, the
        next call returns a connection that was complete. A peer whose handshake was cut
        off is disconnected.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            The connection.

        Raises:
            TimedOut: No connection was ready in time.
            Closed: close() was called before or during the call.
            AuthenticationError: A peer failed to authenticate, and ``on_error`` is
                ``"raise"``. The next call returns the next connection.
        """
        lock = self._lock
        if lock._is_owned():
            refuse_nested_call("accept")
        deadline = deadline_after(timeout, time.monotonic())
        accepted: tuple[Connection, object] | None = None
        try:
            if not lock.acquire(
                timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
            ):
                raise TimedOut(f"no connection was accepted within {timeout} s")
            self._wait_for_next(deadline, timeout)
            accepted = self._ready[0]
            self._last_accepted = accepted[1] or None
            self._ready.popleft()
            lock.release()
            return accepted[0]
        except BaseException as error:
            # Before anything else, and without a check: a second signal must come
            # later.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
            if accepted is not None and not (self._ready and self._ready[0] is accepted):
                self._ready.appendleft(accepted)
            if self._closed and isinstance(error, Exception) and not isinstance(error, Closed):
                # A signal handler or on_error called close() during this call.
                raise Closed("listener is closed") from error
            raise

    def close(self) -> None:
        """Close the listener; waiting accept() calls raise Closed.

        Connections that were accepted already stay open.
        """
        self._closed = True
        self._server.wake()
        with self._lock:
            self._close_all()

    def _close_all(self) -> None:
        self._closed = True
        self._server.close()
        self._close_peers()

    def _close_peers(self) -> None:
        for handshake in list(self._pending_handshakes.values()):
            handshake.peer_stream.close()
        self._pending_handshakes.clear()
        for connection, _ in self._ready:
            connection.close()
        self._ready.clear()
        self._errors.clear()

    def _after_fork(self) -> None:
        forks.register(self)
        # Pending peers belong to the parent; closing the copies here does not
        # disconnect them.
        self._lock = new_call_lock()
        if not self._closed:
            self._close_peers()
            self._server.renew_waker()

    def _resume(self) -> None:
        """Extend every handshake's deadline by the time between two accept() calls."""
        away = time.monotonic() - self._accept_ended_at
        for handshake in list(self._pending_handshakes.values()):
            handshake.deadline += away

    def _wait_for_next(self, deadline: float | None, timeout: float | None) -> None:
        """Advance the handshakes until a connection is ready. Raises as accept does."""
        try:
            self._resume()
            while not self._next_is_here():
                self._wait_once(deadline)
                if (
                    deadline is not None
                    and time.monotonic() >= deadline
                    and not self._ready
                    and not self._errors
                ):
                    raise TimedOut(f"no connection was accepted within {timeout} s")
        finally:
            self._accept_ended_at = time.monotonic()

    def _next_is_here(self) -> bool:
        """Return whether a connection is ready. Raises Closed, or a pending error."""
        if self._closed:
            raise Closed("listener is closed")
        if not self._ready and self._errors:
            raise self._errors.popleft()
        return bool(self._ready)

    def _wait_once(self, deadline: float | None) -> None:
        """Wait once; then accept a peer, advance handshakes, and drop overdue
        handshakes.
        """
        handshakes = list(self._pending_handshakes.values())
        deadlines = [handshake.deadline for handshake in handshakes]
        if deadline is not None:
            deadlines.append(deadline)
        timeout = max(min(deadlines) - time.monotonic(), 0) if deadlines else None
        has_peer, readable = self._server.wait(
            [handshake.peer_stream for handshake in handshakes], timeout
        )
        for descriptor in readable:
            # on_error may have closed the listener in the meantime.
            if (handshake := self._pending_handshakes.get(descriptor)) is not None:
                self._advance(descriptor, handshake)
        now = time.monotonic()
        for descriptor, handshake in list(self._pending_handshakes.items()):
            if handshake.deadline <= now:
                late = TimedOut(f"did not finish the handshake within {self._handshake_timeout} s")
                self._drop(descriptor, handshake, late)
        if has_peer and not self._closed:
            self._accept_peer()

    def _accept_peer(self) -> None:
        try:
            accepted = self._server.accept()
        except OSError as error:
            if self._closed:
                return
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._pending_handshakes:
                raise
            self._drop_oldest("dropped: no file descriptors are left")
            return
        if accepted is None:
            return
        peer_stream, peer = accepted
        if self._key is None:
            self._ready.append((peer_stream.into_connection(self._max_message), peer))
            return
        if len(self._pending_handshakes) >= self._max_handshakes:
            self._drop_oldest(
                f"dropped: more than {self._max_handshakes} peers have not finished the handshake"
            )
        steps = as_listener(nonce(), allow_md5=self._allow_md5)
        handshake = PendingHandshake(
            peer_stream, steps, self._key, peer, time.monotonic() + self._handshake_timeout
        )
        descriptor = peer_stream.fileno()
        self._pending_handshakes[descriptor] = handshake
        self._advance(descriptor, handshake)

    def _advance(self, descriptor: int, handshake: PendingHandshake) -> None:
        try:
            if not handshake.advance():
                return
        except (AuthenticationError, FrameError, EOFError, OSError) as error:
            self._drop(descriptor, handshake, error)
            return
        except BaseException:
            self._pending_handshakes.pop(descriptor, None)
            handshake.peer_stream.close()
            raise
        self._pending_handshakes.pop(descriptor, None)
        self._ready.append(
            (handshake.peer_stream.into_connection(self._max_message), handshake.peer)
        )

    def _drop_oldest(self, reason: str) -> None:
        descriptor, oldest = next(iter(self._pending_handshakes.items()))
        self._drop(descriptor, oldest, TimedOut(reason))

    def _drop(self, descriptor: int, handshake: PendingHandshake, reason: Exception) -> None:
        self._pending_handshakes.pop(descriptor, None)
        handshake.peer_stream.close()
        peer = format_peer(handshake.peer)
        error = authentication_error(
            reason, f"a peer at {format_peer(self._address)}" if peer == "unix" else peer
        )
        error.__cause__ = reason
        if callable(self._on_error):
            self._on_error(error, handshake.peer or None)
        elif self._on_error == "raise" and isinstance(reason, AuthenticationError):
            self._errors.append(error)
        else:
            _log.info("not accepted: %s", error)
