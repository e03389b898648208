"""Share among the links of a host: the way out, the limits, and the present time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from brokerd.core.cluster.messages import Bytes, pack
from brokerd.core.cluster.seam import Remotes

__all__ = ["HostEvent", "Hub", "Outgoing"]


class Outgoing(NamedTuple):
    """A message to publish.

    Attributes:
        to: A host's name, or ``all``.
        kind: The last token of the subject.
    """

    to: str
    kind: str
    payload: bytes


class HostEvent(NamedTuple):
    """An event for the log.

    Attributes:
        level: ``info``, ``warning`` or ``error``.
        event: Its name, such as ``cluster.host_lost``.
        fields: Its fields, without keys of any kind.
    """

    level: str
    event: str
    fields: dict[str, Any]


class Hub:
    """The part of the cluster that its links use.

    Attributes:
        remotes: The broker's remote sessions.
        is_connected: Whether NATS is there.
        is_holding: Whether nothing is sent, because another process takes over.
        max_payload: Most bytes of one NATS message.
        beat: Seconds between two pings.
        timeout: Seconds until a silent host is away.
        unanswered: Bytes in flight per remote host.
        now, now_wall: The time of the present turn, on both clocks.
        boot: The boot id of this host as a number.
        events: Events to write to the log; the network layer takes them.
        outgoing: Messages to publish, in order.
        has_outgoing: Whether there may be something to publish, or an earlier deadline.
        touched: Hosts for which there is something to send.
        leaving: The ends of links that go on in later turns.
        postponed_until: When news that wait for a message to go with leave alone; None
            if there are none.
        needs_settling: Whether more has happened than frames that stayed in the routing
            loop; the network layer resets it.
    """

    __slots__ = (
        "beat",
        "boot",
        "events",
        "has_outgoing",
        "is_connected",
        "is_holding",
        "leaving",
        "max_payload",
        "needs_settling",
        "now",
        "now_wall",
        "outgoing",
        "postponed_until",
        "remotes",
        "timeout",
        "touched",
        "unanswered",
    )

    def __init__(self, remotes: Remotes) -> None:
        self.remotes = remotes
        self.is_connected = self.is_holding = False
        self.max_payload = 1024 * 1024
        self.beat = self.timeout = 0.0
        self.unanswered = self.boot = 0
        self.now = self.now_wall = 0.0
        self.events: list[HostEvent] = []
        self.outgoing: list[Outgoing] = []
        self.has_outgoing = False
        self.touched: dict[str, None] = {}
        self.leaving: list[Callable[[int | None], bool]] = []
        self.postponed_until: float | None = None
        self.needs_settling = False

    def send(self, to: str, kind: str, boot: int, pieces: Iterable[Bytes | bytearray]) -> bytes:
        """Queue a message for a broker, if NATS is there; return its bytes."""
        message = pack(self.boot, boot, pieces)
        self.repeat(to, kind, message)
        return message

    def repeat(self, to: str, kind: str, message: bytes) -> None:
        """Queue the bytes of a message, if NATS is there."""
        if self.is_connected and not self.is_holding:
            self.outgoing.append(Outgoing(to, kind, message))
            self.has_outgoing = True

    def touch(self, host: str) -> None:
        """Note that there are frames or outcomes for a host; they leave with this turn."""
        self.touched[host] = None
        self.has_outgoing = True

    def postpone(self, until: float) -> None:
        """Note news that leave alone at that time, if no message takes them before."""
        if self.postponed_until is None or until < self.postponed_until:
            self.postponed_until = until
            self.has_outgoing = True

    def continue_later(self, run: Callable[[int | None], bool]) -> None:
        """Call the function with a number of steps in later turns, until it returns True."""
        self.leaving.append(run)

    def note(self, level: str, event: str, **fields: Any) -> None:
        """Note an event for the log."""
        self.events.append(HostEvent(level, event, fields))
