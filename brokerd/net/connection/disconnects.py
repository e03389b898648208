"""Handles the ends of very many connections in turns of the event loop.

A network or a machine with thousands of clients may fail. The event loop then reports
all their ends in one turn, and each takes some 80 microseconds. So after some ends in one
turn, the other connections are polled with one call. Those whose client has closed are
no longer watched, and are read in later turns. To stop watching thousands of them takes
long, too. So those with other input are read in between: all of them from time to time,
and often the few that were read lately.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from brokerd.net.connection.state import HUNG_UP, State

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.connection.connection import Connection
    from brokerd.net.connection.reset_recheck import ResetRecheck

__all__ = ["Disconnects"]

Item = TypeVar("Item")

#: The events of input, and of its end; Windows has no poll.
_INPUT_AND_END: Final = getattr(select, "POLLIN", 0) | getattr(select, "POLLRDHUP", 0)

#: Ends in one turn of the event loop after which other ends are looked for.
_MANY: Final = 16
#: Postponed ends handled in one turn: a millisecond's work.
_ENDS: Final = 16
#: Most connections polled at once: some milliseconds' work.
_POLLED: Final = 10_000
#: Most connections that are no longer watched after one turn, and those before the others
#: are polled again: some milliseconds' work.
_UNWATCHED: Final = 3000
_UNWATCHED_AT_ONCE: Final = 1000
#: Connections handled before those that were read lately are polled: at most two
#: milliseconds' work. And how many of these are polled.
_SLICE: Final = 250
_LATELY: Final = 250


class Disconnects:
    """The connections whose end is handled in a later turn.

    reset_recheck: knows the connections that were read lately.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, reset_recheck: ResetRecheck) -> None:
        self._loop = loop
        self._reset_recheck = reset_recheck
        self._postponed: deque[Connection] = deque()
        self._count = 0
        self._scheduled = False
        self._is_handling = False

    def note(self, others: Iterable[Connection]) -> None:
        """Count the end of a connection in this turn; postpone other ends if it is one of
        many.

        others: the connections that are open.
        """
        if self._is_handling:
            return
        self._count += 1
        if self._count % _MANY == 0 and hasattr(select, "poll"):
            self._is_handling = True
            self._postpone(others)
            self._is_handling = False
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_turn)

    def _postpone(self, others: Iterable[Connection]) -> None:
        """Watch no connection any more whose client has closed; read those with other
        input meanwhile.
        """
        poll, polled = select.poll(), {}
        # A list, as to read one may end it.
        for connection in self._in_slices(list(islice(others, _POLLED))):
            if connection.state is State.READING:
                polled[connection.fd] = connection
                poll.register(connection.fd, _INPUT_AND_END)
        ended = self._read_others(poll, polled)
        for number, connection in enumerate(self._in_slices(ended[:_UNWATCHED]), 1):
            # To read another one may have ended it.
            if connection.may_read():
                connection.postpone()
                self._postponed.append(connection)
            if number % _UNWATCHED_AT_ONCE == 0:
                self._read_others(poll, polled)

    def _read_others(self, poll: select.poll, polled: dict[int, Connection]) -> list[Connection]:
        """Read the polled connections that have input; return those whose client has
        closed, which are not polled again.
        """
        ended = []
        for fd, events in self._in_slices(poll.poll(0)):
            if events & HUNG_UP:
                poll.unregister(fd)
                ended.append(polled[fd])
            elif events & select.POLLIN and polled[fd].may_read():
                polled[fd].on_readable()
        return ended

    def _in_slices(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; after each slice, read the connections that were read lately."""
        for number, item in enumerate(items, 1):
            yield item
            if number % _SLICE == 0:
                self._read_lively()

    def _read_lively(self) -> None:
        """Read the connections with input among those that were read lately."""
        poll, polled = select.poll(), {}
        for connection in list(islice(self._reset_recheck.read_lately(), _LATELY)):
            if connection.state is State.READING:
                polled[connection.fd] = connection
                poll.register(connection.fd, _INPUT_AND_END)
        for fd, events in poll.poll(0):
            if events & select.POLLIN and not events & HUNG_UP and polled[fd].may_read():
                polled[fd].on_readable()

    def _next_turn(self) -> None:
        """Handle some of the postponed ends."""
        self._count = 0
        self._is_handling = True
        for _ in range(min(_ENDS, len(self._postponed))):
            self._postponed.popleft().read_postponed()
        self._is_handling = False
        self._scheduled = bool(self._postponed)
        if self._scheduled:
            self._loop.call_soon(self._next_turn)

    def close(self) -> None:
        """Postpone nothing any more."""
        self._postponed.clear()
