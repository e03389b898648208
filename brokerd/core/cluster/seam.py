"""The seam between the links to other hosts and the broker's remote sessions.

The origin is the host that a frame comes from, the owner the host of its recipient.

- At the origin, frames wait in the outboxes of remote sessions. The link takes them
  with :meth:`Remotes.take_frames` and sends them as a batch. It keeps the batch until the
  owner is done with it, or calls :meth:`Remotes.fail` for each frame without an outcome.
- At the owner, :meth:`Remotes.deliver` gets the batch. ``Cluster.done`` is called once no
  frame of the batch waits any more, and the outcome of each frame is known. The broker's
  own answers to these frames are their outcomes. The link takes them with
  :meth:`Remotes.take_outcomes`, and the origin's :meth:`Remotes.conclude` gets them.

Frames have the form in which a client receives them: length, header, the sender's
address, topic, extension, payload. So the bytes of an outbox are sent as they are.

A link loses no frame in silence, and never sends one twice. Frames of one link are
delivered in order, with gaps where a batch was lost; each frame of a gap is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from brokerd_client.wire.envelope import ErrorCode

__all__ = ["HostFacts", "Interest", "Name", "Remotes", "Run"]


class Run(NamedTuple):
    """Whole frames for one target, in order.

    Attributes:
        target: A client's name or address; for events, what the remote sessions of both
            hosts agree on. At most 65,535 bytes of UTF-8.
        frames: At most ``outbox.CHUNK`` bytes, unless a single frame is longer.
        ttl_ms: Milliseconds left of the ttl, which all of them have; 0 without a ttl.
    """

    target: str
    frames: bytes | bytearray | memoryview
    ttl_ms: int = 0


class Name(NamedTuple):
    """A client's name with connections at a host, or a mailbox whose home it is.

    Attributes:
        connections: Its connections there; 0 if it is offline.
        since: When the oldest of them was made, or when it went offline, in seconds since
            the epoch.
        free: Whether a connection has room for one more request.
        mailbox: Whether that host keeps its mailbox.
    """

    name: str
    connections: int
    since: float
    free: bool = True
    mailbox: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether the host has nothing to do with the name any more."""
        return not (self.connections or self.mailbox)


class Interest(NamedTuple):
    """A pattern that is subscribed at a host.

    Attributes:
        group: The group that subscribed, or "".
        on: Whether there is such a subscription; False ends the interest.
    """

    pattern: str
    group: str
    on: bool = True


class HostFacts(NamedTuple):
    """Facts of another host.

    Attributes:
        boot_id: Sixteen hexadecimal digits, new with each start; an upgrade keeps it.
        started_at: When that broker started, in seconds since the epoch.
        version: Of that daemon.
        digest: Of its ``clients:``.
        addresses: Where clients of other hosts can connect to it.
        dedup: Seconds for which its store remembers keys; 0 without a store.
    """

    host: str
    boot_id: str
    started_at: float
    version: str
    digest: str
    addresses: tuple[str, ...]
    dedup: float = 0.0


class Remotes(Protocol):
    """The broker's remote sessions, as the links call them.

    ``host`` is always the other host, as the subject of its messages names it.
    """

    # At the origin

    def take_frames(self, host: str, room: int) -> Sequence[Run]:
        """Remove and return frames for a host, in the order of each outbox.

        room: Bytes that the window has room for. The last run may exceed it, so that a
            frame of any size can leave.
        """

    def conclude(self, host: str, runs: Sequence[Run], now: float) -> None:
        """Pass outcomes to their senders: RECEIPTs and ERRORs of the owner's ``$broker``.

        The target is the address of the sender that the outcome is for.
        """

    def fail(
        self,
        host: str,
        target: str,
        frame: memoryview,
        code: ErrorCode,
        reason: str,
        now: float,
    ) -> None:
        """Report that a frame was not accepted, or that this is not known (``in_doubt``).

        It is called once for each frame without an outcome. An EVENT without the flag
        RECEIPT needs no report. A REQUEST whose record is gone has had its outcome.
        """

    # At the owner

    def deliver(self, host: str, batch: int, runs: Sequence[Run], now: float) -> None:
        """Take the frames of a batch. ``Cluster.done`` follows, perhaps at once."""

    def take_outcomes(self, host: str) -> Sequence[Run]:
        """Remove and return the broker's own answers to the frames of a host."""

    # Hosts and what they announce

    def host_up(self, facts: HostFacts, now_wall: float) -> None:
        """Begin with a host; its names and interests follow."""

    def host_down(self, host: str, reason: str, now_wall: float) -> None:
        """End everything of a host: its remote sessions, names and interests.

        Frames that were not taken yet are ``offline``. ``fail`` has been called before
        for frames that had left.
        """

    def suspend(self, reason: str) -> None:
        """Refuse frames for other hosts as ``offline`` until ``resume``: NATS is away.

        That holds for the frames in the outboxes too. Presence stays as it is.
        """

    def resume(self) -> None:
        """Accept frames for other hosts again."""

    def names_changed(self, host: str, names: Sequence[Name], now_wall: float) -> None:
        """Take over new states of names at a host."""

    def interests_changed(self, host: str, interests: Sequence[Interest]) -> None:
        """Take over new states of interests of a host."""

    def told(self, host: str, body: dict[str, Any], now: float) -> None:
        """Take what the other host's broker sent with ``Cluster.tell``."""

    # What this host announces, as a whole

    def own_names(self) -> Iterable[Name]:
        """Return the names with connections or mailboxes here."""

    def own_interests(self) -> Iterable[Interest]:
        """Return the patterns that clients here have subscribed."""
