"""Requests of one client: which members have room in flight, and which requests wait.

``in_flight`` limits the requests that one connection has received and not answered. A
request that finds no connection with room waits here, within the client's queue.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from brokerd.core.session import Session
    from brokerd.core.undelivered import Queued

__all__ = ["Flight", "WaitingRequest"]

#: Most members per choice that are passed over because they do not read.
_PASSED_OVER: Final = 16
#: Most waiting requests per choice that are passed over because this member returned
#: them.
_RETURNED: Final = 16


class WaitingRequest:
    """A request that waits for a connection with room in flight.

    Attributes:
        requester: The session that sent it.
        id: Its id.
        to: The recipient as the requester wrote it.
        queued: Its frame.
        returned_by: The member that returned it, or None.
        flight, row: Where it waits.
    """

    __slots__ = ("flight", "id", "queued", "requester", "returned_by", "row", "to")

    def __init__(
        self,
        requester: Session,
        message_id: int,
        to: str,
        queued: Queued,
        returned_by: Session | None = None,
    ) -> None:
        self.requester = requester
        self.id = message_id
        self.to = to
        self.queued = queued
        self.returned_by = returned_by
        self.flight: Flight | None = None
        self.row: OrderedDict[WaitingRequest, None] = OrderedDict()


class Flight:
    """The requests of one client.

    Attributes:
        size: Bytes that wait.
        holds_senders: Whether a sender may be held until the queue has room.
        stalled: Whether senders were held for the longest time allowed; cleared when
            half of the queue is free.
        on_free_or_busy: Called with the client when its members here cease to be all
            busy, and when all are busy again; None without a cluster.
        retained: Bytes of delivered requests that are kept, so that another member can
            get one that is returned.
        returnable: Requests of clients at other hosts that may go back there, as another
            host has announced a member with room. So none goes to and fro.
    """

    __slots__ = (
        "_counts",
        "_members",
        "_pinned",
        "_remote",
        "_returned",
        "_shared",
        "holds_senders",
        "on_free_or_busy",
        "retained",
        "returnable",
        "size",
        "stalled",
    )

    def __init__(self) -> None:
        #: The members with room, by the number of their requests in flight; the one
        #: chosen longest ago first. And that number of each of them.
        self._members: dict[int, OrderedDict[Session, None]] = {}
        #: The same of the sessions that stand for members at other hosts.
        self._remote: dict[int, OrderedDict[Session, None]] = {}
        self._counts: dict[Session, int] = {}
        #: Requests that wait for any member: those that members have returned or left
        #: come first.
        self._returned: OrderedDict[WaitingRequest, None] = OrderedDict()
        self._shared: OrderedDict[WaitingRequest, None] = OrderedDict()
        self._pinned: dict[Session, OrderedDict[WaitingRequest, None]] = {}
        self.size = 0
        self.stalled = self.holds_senders = False
        self.retained = self.returnable = 0
        self.on_free_or_busy: Callable[[Any], None] | None = None

    def __bool__(self) -> bool:
        """Return whether a request waits."""
        return bool(self._shared or self._returned or self._pinned)

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        rows = (self._shared, self._returned, *self._pinned.values())
        return sum(map(len, rows))

    # Members

    def update(self, member: Session) -> None:
        """Note how many requests a member has in flight, and whether it has room."""
        count = len(member.incoming_requests)
        limit = member.in_flight_limit
        before = self._counts.get(member)
        has_room = member.open and not member.retired and (limit is None or count < limit)
        rows = self._remote if member.host else self._members
        was_free = bool(self._members)
        if before is not None:
            if has_room and before == count:
                return
            row = rows[before]
            if has_room and len(row) == 1 and count not in rows:
                # The row with this member alone becomes that of its new count.
                del rows[before]
                rows[count] = row
                self._counts[member] = count
                return
            del self._counts[member]
            del row[member]
            if not row:
                del rows[before]
        if has_room:
            self._counts[member] = count
            if count not in rows:
                rows[count] = OrderedDict()
            rows[count][member] = None
        if self.on_free_or_busy is not None and was_free != bool(self._members):
            self.on_free_or_busy(member.client)

    def remove(self, member: Session) -> None:
        """Remove a member; requests that wait for it alone stay."""
        before = self._counts.pop(member, None)
        rows = self._remote if member.host else self._members
        if before is not None:
            del rows[before][member]
            if not rows[before]:
                del rows[before]

    def take_pinned(self, member: Session) -> OrderedDict[WaitingRequest, None] | None:
        """Remove and return the requests that wait for one member alone, if any."""
        return self._pinned.pop(member, None)

    def has_room(self, member: Session) -> bool:
        """Return whether a member may get one more request."""
        return member in self._counts

    def pick(self, without: Session | None = None) -> Session | None:
        """Choose the member with the fewest requests in flight, or None if none has room.

        A member at another host comes after those here; one that does not read comes last.
        """
        member = self.best(without)
        if member is not None:
            self.choose(member)
        return member

    def best(self, without: Session | None = None) -> Session | None:
        """Return the member that ``pick`` would choose."""
        passed_over: Session | None = None
        for count in self._members if len(self._members) == 1 else sorted(self._members):
            for member in islice(self._members[count], _PASSED_OVER):
                if member is without:
                    continue
                if not (member.outbox.blocked and member.outbox.waiting):
                    return member
                passed_over = passed_over or member
        for count in sorted(self._remote):
            for member in islice(self._remote[count], _PASSED_OVER):
                if member is without:
                    continue
                if not (member.outbox.blocked and member.outbox.waiting):
                    return member
                passed_over = passed_over or member
        return passed_over

    def choose(self, member: Session) -> None:
        """Note that a member was chosen: of those with as many requests, it comes last."""
        row = (self._remote if member.host else self._members)[self._counts[member]]
        if len(row) > 1:
            row.move_to_end(member)

    @property
    def has_free_member(self) -> bool:
        """Whether a member at this host has room for one more request."""
        return bool(self._members)

    # Waiting requests

    def add(
        self, request: WaitingRequest, member: Session | None = None, *, first: bool = False
    ) -> None:
        """Add a request that waits for any member, or for this one.

        first: whether it goes before the others that wait for any member.
        """
        if member is not None:
            row = self._pinned.setdefault(member, OrderedDict())
        else:
            row = self._returned if first else self._shared
        request.flight, request.row = self, row
        row[request] = None
        self.size += len(request.queued.frame)

    def discard(self, request: WaitingRequest) -> None:
        """Remove a request."""
        del request.row[request]
        self.size -= len(request.queued.frame)
        if not request.row:
            for member, row in list(self._pinned.items()):
                if row is request.row:
                    del self._pinned[member]

    def first_for(self, member: Session) -> WaitingRequest | None:
        """Return the request that this member gets next, or None."""
        pinned = self._pinned.get(member)
        if pinned:
            return next(iter(pinned))
        for request in islice(chain(self._returned, self._shared), _RETURNED):
            if request.returned_by is not member and not (member.host and request.requester.host):
                return request
        return None

    def first_of_hosts(self) -> WaitingRequest | None:
        """Return the first request of a client at another host that waits for any member."""
        first = islice(chain(self._returned, self._shared), _RETURNED)
        return next((request for request in first if request.requester.host), None)

    def oldest(self) -> WaitingRequest | None:
        """Return the request that has waited longest, or None."""
        row: OrderedDict[WaitingRequest, None] | None
        row = self._returned or self._shared or next(iter(self._pinned.values()), None)
        return next(iter(row)) if row else None

    @property
    def waits_for_any(self) -> bool:
        """Whether a request waits for any member."""
        return bool(self._shared or self._returned)

    def waits_for(self, member: Session) -> bool:
        """Return whether a request waits for this member alone."""
        return member in self._pinned

    def pinned_members(self) -> list[Session]:
        """Return the members with room for which alone requests wait."""
        return [member for member in self._pinned if member in self._counts]

    def take_shared(self) -> list[OrderedDict[WaitingRequest, None]]:
        """Remove and return all requests that wait for any member, in rows."""
        rows = [row for row in (self._returned, self._shared) if row]
        self._returned, self._shared = OrderedDict(), OrderedDict()
        return rows

    def take_of_hosts(self) -> OrderedDict[WaitingRequest, None]:
        """Remove and return the requests of clients at other hosts that wait for any member."""
        row: OrderedDict[WaitingRequest, None] = OrderedDict()
        waiting = chain(self._returned, self._shared)
        for request in [each for each in waiting if each.requester.host]:
            del request.row[request]
            request.row = row
            row[request] = None
        return row

    def waiting(self) -> Iterator[tuple[WaitingRequest, Session | None]]:
        """Yield all waiting requests, each with the member that it waits for, or None."""
        for request in chain(self._returned, self._shared):
            yield request, None
        for member, row in self._pinned.items():
            for request in row:
                yield request, member
