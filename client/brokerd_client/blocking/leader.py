"""The leader: of a client's waiting threads, the one that reads the socket.

A part of the blocking face. A thread that waits for an answer reads it itself. So an
answer needs one wake-up, and not those of the I/O thread and of its caller. This is the
pattern of leader and followers, with the I/O thread as the leader while no thread waits.
The other waiting threads wait at their gates, and the leader opens these.

A leader may be interrupted between any two instructions: see ``base``. It therefore
leaves to the I/O thread what it could not leave unfinished. The leader decodes what it
has read, and changes nothing but its own place in the input. Input that does more than
answer calls and bring messages is left in ``Transport.unread``. The I/O thread then
handles it, and every input of the next moments.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from brokerd_client.blocking.gate import Gate

if TYPE_CHECKING:
    from brokerd_client.blocking.base import BaseClient

__all__ = ["LONGEST_WAIT_MS", "Leader"]

#: Seconds without a leader after input that was left to the I/O thread.
_REST_S: Final = 0.1
#: Milliseconds that one wait lasts at most: the system's calls accept 24 days at most.
LONGEST_WAIT_MS: Final = 3_600_000.0


class Leader:
    """The place of a client's leader, for one thread at a time.

    Args:
        client: The client. It is not held during a wait, so that a client that is
            dropped unclosed can end.
    """

    def __init__(self, client: weakref.ref[BaseClient]) -> None:
        self.client = client
        #: Reentrant, for signal handlers; and a thread can tell whether it has it.
        self.place: Any = threading.RLock()
        self._rests_until = 0.0

    def rest(self) -> None:
        """Leave reading to the I/O thread for some time."""
        self._rests_until = time.monotonic() + _REST_S

    def interrupting(self) -> bool:
        """Return whether this thread has interrupted a call of the client.

        If an interrupted call has left the client's lock behind, release it.
        """
        client = self.client()
        return client is not None and client._interrupting()

    def begin(self, gate: Gate) -> Any:
        """Take the place for the calling thread; return what to poll, or None.

        A thread that will wait calls this before it sends what is to be answered. The
        answer may come before the thread runs again, and need not wake the I/O thread.
        """
        if self._rests_until and time.monotonic() < self._rests_until:
            return None
        if not self.place.acquire(False):
            return None
        client = self.client()
        poll = None if client is None else client._begin_lead(gate)
        if poll is None:
            self.place.release()
        return poll

    def wait(
        self,
        gate: Gate,
        deadline: float | None,
        queue: Any = None,
        *,
        poll: Any = None,
        ready: bool = False,
    ) -> bool:
        """Wait until the gate is open, as the leader if there is none.

        Args:
            gate: The gate of the calling thread.
            deadline: The end of the wait, on the clock of time.monotonic.
            queue: The wait queue at which the thread waits.
            poll: The result of :meth:`begin`, if that was called before.
            ready: Whether the last use of ``poll`` has found input.

        Returns:
            Whether the gate was opened before the deadline.
        """
        try:
            if poll is None:
                poll = self.begin(gate)
            if poll is not None:
                self._lead(poll, gate, deadline, queue, ready)
                self.leave(gate)
        except BaseException:
            # Once more, because an exception may strike in there. On Python 3.9 it may
            # also leave the client's lock behind, which this releases.
            self.leave(gate)
            self.interrupting()
            raise
        # The usual case of a thread that has read its own answer needs no call.
        return gate.lock.acquire(False) or gate.wait(deadline)

    def _lead(self, poll: Any, gate: Gate, deadline: float | None, queue: Any, ready: bool) -> None:
        """Read until the gate is open, the time is over or the I/O thread has to read."""
        # Locked is the gate that is not open.
        while gate.lock.locked():
            remaining_ms = LONGEST_WAIT_MS
            if deadline is not None:
                remaining_ms = 1000 * (deadline - time.monotonic())
                if remaining_ms <= 0:
                    return
                if remaining_ms > LONGEST_WAIT_MS:
                    remaining_ms = LONGEST_WAIT_MS
            if ready or poll.poll(remaining_ms):
                ready = False
                client = self.client()
                if client is None or not client._read_ahead(gate, queue):
                    return
                del client

    def leave(self, gate: Gate) -> None:
        """Give up the place and the input, if the thread has them; can be repeated."""
        gate.interrupt = None
        if not self.place._is_owned():
            return
        client = self.client()
        if client is not None and client._transport.lent and not client._transport.kept:
            client._end_lead()
        self.place.release()
