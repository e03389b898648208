"""The cluster as this host sees it: a link to each other host, and their announcements.

The network layer calls :meth:`Cluster.receive` for each message, and publishes what
:meth:`Cluster.take_outgoing` returns after each turn. The broker's remote sessions are
called through :class:`brokerd.core.cluster.seam.Remotes`. Everything else of the broker
calls the methods under "For the broker".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.bundles import BUNDLE, bundled, unbundled
from brokerd.core.cluster.directory import Announcements
from brokerd.core.cluster.hub import Hub, Outgoing
from brokerd.core.cluster.link import STEPS, Link
from brokerd.core.cluster.messages import (
    HEAD_SIZE,
    HEADER_SIZE,
    RUN_OVERHEAD,
    Answer,
    Data,
    Head,
    Inquiry,
    Malformed,
    Outcomes,
    Ping,
    Pong,
    decode_json,
    encode_json,
    head_of,
)
from brokerd.core.cluster.seam import HostFacts, Interest, Name, Remotes

__all__ = ["ALL", "Cluster", "ClusterSettings"]

#: The subject token that stands for every host.
ALL: Final = "all"
#: Seconds between two pings, at most.
_BEAT_S: Final = 1.0
#: Seconds in which a broker with the same host name can object, before this one joins.
_JOIN_S: Final = 0.25
#: Longest target of a run, in bytes.
_LONGEST_TARGET: Final = 512
#: Beats without a tick after which this process is taken to have been stopped.
_MISSED_BEATS: Final = 2.0
#: The kinds of messages that leave nothing to decide, unless the remote sessions say so.
_FRAMES: Final = frozenset((BUNDLE, "data", "outcomes"))
_HOST: Final = re.compile(r"[0-9a-z]{1,8}")


class ClusterSettings(NamedTuple):
    """Facts and limits of this host.

    Attributes:
        host: Its name in the cluster.
        boot_id: Sixteen hexadecimal digits, new with each start; an upgrade keeps it.
        started_at: When it started, in seconds since the epoch.
        version: Of the daemon.
        digest: Of its ``clients:``.
        addresses: Where clients of other hosts can connect to it.
        unanswered: Bytes in flight per remote host.
        remote_timeout: Seconds until a silent host is away.
        hosts: Limits the other hosts; further ones are ignored.
        dedup: Seconds for which its store remembers keys; 0 without a store.
    """

    host: str
    boot_id: str
    started_at: float
    version: str
    digest: str
    addresses: tuple[str, ...]
    unanswered: int
    remote_timeout: float
    hosts: int = 64
    dedup: float = 0.0


class Cluster(Hub):
    """The links to all other hosts.

    Attributes:
        settings: Of this host.
        links: By the name of the other host.
        conflict: Why this host does not join: another broker has its name; or "".
        has_joined: Whether this host takes part.
    """

    __slots__ = (
        "_announcements",
        "_conflict_at",
        "_is_full",
        "_joins_at",
        "_next_beat",
        "conflict",
        "has_joined",
        "links",
        "settings",
    )

    def __init__(self, settings: ClusterSettings, remotes: Remotes) -> None:
        super().__init__(remotes)
        self.links: dict[str, Link] = {}
        self.conflict = ""
        self.has_joined = False
        self._announcements = Announcements()
        self._next_beat: float | None = None
        #: When the join is over; None outside of one.
        self._joins_at: float | None = None
        #: When the other broker with this host's name was heard last.
        self._conflict_at = 0.0
        self._is_full = False
        self.reconfigure(settings)

    def reconfigure(self, settings: ClusterSettings) -> None:
        """Apply changed settings; the host stays, and after joining the boot id, too."""
        self.settings = settings
        self.boot = int(settings.boot_id, 16)
        self.timeout = settings.remote_timeout
        self.beat = min(_BEAT_S, settings.remote_timeout / 5)
        self.unanswered = settings.unanswered
        self._next_beat = None if self._next_beat is None else self.now

    # For the broker

    @property
    def largest_frame(self) -> int:
        """Most bytes of a frame, with its length prefix, that another host can be sent."""
        return self.max_payload - HEAD_SIZE - RUN_OVERHEAD - _LONGEST_TARGET

    @property
    def dedup(self) -> float:
        """Seconds for which each store of the cluster remembers keys; 0 without a store."""
        times = [self.settings.dedup, *(link.facts.dedup for link in self.links.values())]
        return min(filter(None, times), default=0.0)

    def pull(self, host: str, now: float) -> None:
        """Take frames for a host now, as far as its window has room."""
        self.now = now
        link = self.links.get(host)
        if link is not None:
            link.pull()

    def done(self, host: str, batch: int) -> None:
        """Note that no frame of a received batch waits any more; ERRORs were written."""
        link = self.links.get(host)
        if link is not None:
            link.finish(batch)

    def forget(self, host: str, batch: int) -> None:
        """Forget a received batch: it is not known what becomes of some of its frames."""
        link = self.links.get(host)
        if link is not None:
            link.received.forget(batch)

    def announce(self, name: Name) -> None:
        """Tell all hosts the new state of a name at this host."""
        self._announcements.add_name(name)
        self.has_outgoing = True

    def announce_interest(self, interest: Interest) -> None:
        """Tell all hosts of a pattern that is now subscribed here, or no more."""
        self._announcements.add_interest(interest)
        self.has_outgoing = True

    def tell(self, host: str, body: dict[str, Any]) -> None:
        """Send a JSON object to the other host's broker; it may get lost."""
        link = self.links.get(host)
        if link is not None:
            self.send(host, "tell", link.boot, encode_json(body))

    def hosts(self, now: float) -> list[dict[str, Any]]:
        """Return what is known of each other host, for operators."""
        return [self.links[host].show() for host in sorted(self.links)]

    # For the network layer

    @property
    def has_work(self) -> bool:
        """Whether :meth:`run` has something to do."""
        return bool(self.leaving)

    def run(self, now: float) -> None:
        """Report some frames of links that end."""
        self.now = now
        self.leaving = [run for run in self.leaving if not run(STEPS)]

    def _end_at_once(self, reason: str) -> None:
        """End all links, whatever it takes: this host takes no part any more."""
        for link in self.links.values():
            link.lose(reason)
        for run in self.leaving:
            run(None)
        self.leaving.clear()
        self.links.clear()

    def take_outgoing(self, now: float) -> Sequence[Outgoing]:
        """Remove and return the messages to publish, in order."""
        self.now = now
        if self._announcements and self.has_joined and not self.is_holding:
            for body in self._announcements.take():
                self.send(ALL, "changes", 0, encode_json(body))
        while self.touched:
            touched, self.touched = self.touched, {}
            for host in touched:
                link = self.links.get(host)
                if link is not None:
                    link.fill()
        outgoing, self.outgoing = self.outgoing, []
        self.has_outgoing = False
        return outgoing if len(outgoing) < 2 else bundled(outgoing, self.max_payload)

    def connected(self, max_payload: int, now: float, now_wall: float) -> None:
        """Note that NATS is there, for the first time or again."""
        self.now, self.now_wall = now, now_wall
        self.max_payload = max_payload
        self.is_connected, was_holding = True, self.is_holding
        self.is_holding = False
        if not self.has_joined:
            self._begin_to_join()
            return
        if was_holding:
            for link in self.links.values():
                link.repeat_outcomes()
        self._say_hello(ALL, 0)
        for link in list(self.links.values()):
            link.resume()
        self.remotes.resume()

    def disconnected(self, reason: str, now: float, now_wall: float) -> None:
        """Note that NATS is away: what has left may have arrived or not."""
        self.now, self.now_wall = now, now_wall
        self.is_connected = self.is_holding = False
        self.outgoing = []
        for link in self.links.values():
            link.fail_unsent(reason)
        self.remotes.suspend(reason)

    def leave(self, now: float, now_wall: float) -> None:
        """Tell all hosts that this one stops; the last thing to publish."""
        self.now, self.now_wall = now, now_wall
        self._end_at_once("this broker stops")
        self.send(ALL, "bye", 0, ())
        self.has_joined = False
        self._joins_at = self._next_beat = None

    # Another process

    def hold(self, now: float, now_wall: float) -> None:
        """Ask all hosts to send nothing more; send nothing more until ``connected``."""
        self.now, self.now_wall = now, now_wall
        for link in self.links.values():
            if link.is_up:
                link.hold()
        self.outgoing = list(self.take_outgoing(now))
        self.has_outgoing = True
        self.is_holding = True

    @property
    def is_held(self) -> bool:
        """Whether all hosts have agreed to send nothing more."""
        return all(link.is_ready for link in self.links.values() if link.is_up)

    def settle_ends(self, now: float) -> None:
        """Finish what goes on in later turns, before the state is captured."""
        self.now = now
        for run in self.leaving:
            run(None)
        self.leaving.clear()

    def capture(self, blob: Blob) -> dict[str, Any]:
        """Return the facts for a new process; all bytes are added to ``blob``."""
        return {
            "boot": self.boot,
            "joined": self.has_joined,
            "number": self._announcements.number,
            "links": [link.capture(blob) for link in self.links.values()],
        }

    def restore(self, facts: dict[str, Any], blob: Blob, now: float) -> list[Link]:
        """Go on with the links of another process; return them.

        They send nothing until ``connected``.
        """
        self.now = now
        self.is_holding = True
        self.boot = int(facts["boot"])
        self.has_joined = bool(facts["joined"])
        self._next_beat = now + self.beat
        # The other hosts ask for the state: what was not told may be lost.
        self._announcements.number = int(facts["number"]) + 1
        for link_facts in facts["links"]:
            host, boot_id, started_at, version, digest, addresses, dedup = link_facts["facts"]
            known = HostFacts(
                host, boot_id, started_at, version, digest, tuple(addresses), float(dedup)
            )
            link = self.links[host] = Link(self, known)
            link.restore(link_facts, blob)
        return list(self.links.values())

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`tick` is due, on the clock of ``now``; None before the first connection."""
        next_beat = self._next_beat if self._joins_at is None else self._joins_at
        if next_beat is None or self.postponed_until is None:
            return next_beat
        return min(next_beat, self.postponed_until)

    def tick(self, now: float, now_wall: float) -> None:
        """Do what is due: heartbeats, inquiries, hosts that are silent."""
        self.now, self.now_wall = now, now_wall
        if self.postponed_until is not None and self.postponed_until <= now:
            self.postponed_until = None
            for link in self.links.values():
                if link.received.has_news:
                    link.tell_soon()
        if self._joins_at is not None:
            if self._joins_at <= now:
                self.needs_settling = True
                self._join()
            return
        if self._next_beat is None or now < self._next_beat:
            return
        self.needs_settling = True
        late = now - self._next_beat
        self._next_beat = now + self.beat
        if self.conflict:
            if self._conflict_at + self.timeout <= now and self.is_connected:
                self._begin_to_join()
            return
        if late > _MISSED_BEATS * self.beat:
            for link in self.links.values():
                link.excuse(late)
        self._say_hello(ALL, 0)
        for link in list(self.links.values()):
            link.beat()

    # Joining

    def _begin_to_join(self) -> None:
        self.conflict = ""
        self._joins_at = self.now + _JOIN_S
        self.send(ALL, "join", 0, encode_json(self._facts()))

    def _join(self) -> None:
        self._joins_at = None
        self.has_joined = True
        self._next_beat = self.now + self.beat
        self.note("info", "cluster.joined", host=self.settings.host, boot=self.settings.boot_id)
        self._say_hello(ALL, 0)
        self.remotes.resume()
        for link in list(self.links.values()):
            link.resume()

    def _refuse_to_join(self, facts: HostFacts) -> None:
        """Leave the cluster to another broker with this host's name."""
        self._conflict_at = self.now
        if self.conflict:
            return
        self.conflict = (
            f"another broker is host {facts.host} of this cluster, with boot id {facts.boot_id};"
            " give each broker its own cluster.host"
        )
        self.note("error", "cluster.refused_to_join", host=facts.host, reason=self.conflict)
        self.has_joined = False
        self._joins_at = None
        self._next_beat = self.now + self.beat
        self._end_at_once(self.conflict)

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "boot_id": settings.boot_id,
            "started_at": settings.started_at,
            "version": settings.version,
            "digest": settings.digest,
            "addresses": settings.addresses,
            "dedup": settings.dedup,
            "number": self._announcements.number,
        }

    def _say_hello(self, to: str, boot: int) -> None:
        self.send(to, "hello", boot, encode_json(self._facts()))

    # Receiving

    def receive(
        self, origin: str, kind: str, payload: bytes | memoryview, now: float, now_wall: float
    ) -> None:
        """Handle one message.

        Args:
            origin: The host in its subject, which NATS' permissions protect.
            kind: The last token of its subject.
            payload: Its bytes.
            now: A time of the event loop's clock.
            now_wall: The same time in seconds since the epoch.
        """
        self.now, self.now_wall = now, now_wall
        link = self.links.get(origin)
        if link is None and not _HOST.fullmatch(origin):
            return
        try:
            if link is not None and kind in _FRAMES and payload[:HEADER_SIZE] == link.head:
                if self.has_joined:
                    self._receive_frames(link, kind, memoryview(payload)[HEADER_SIZE:])
                return
            self.needs_settling = True
            head, body = head_of(memoryview(payload))
            if origin == self.settings.host:
                self._receive_own(kind, head, body)
            elif kind in ("join", "hello"):
                self._receive_hello(origin, kind, head, body)
            elif (
                link is not None
                and self.has_joined
                and link.boot == head.origin_boot
                and head.target_boot in (0, self.boot)
            ):
                self._receive_from(link, kind, body)
        except ValueError as error:
            # Malformed is one; the remote sessions raise others for frames in a batch.
            self._note_malformed(origin, link, kind, str(error))

    def _note_malformed(self, origin: str, link: Link | None, kind: str, reason: str) -> None:
        self.needs_settling = True
        if link is None or not link.is_malformed:
            self.note("warning", "cluster.malformed", host=origin, kind=kind, reason=reason)
        if link is not None:
            link.is_malformed = True

    def _receive_own(self, kind: str, head: Head, body: memoryview) -> None:
        """Handle a message of another broker with this host's name."""
        if head.origin_boot == self.boot or kind not in ("join", "hello"):
            return
        facts, _ = _facts_of(self.settings.host, decode_json(body))
        if self.has_joined and kind == "join":
            self._say_hello(ALL, 0)
        elif kind == "hello" and (
            not self.has_joined
            or (facts.started_at, facts.boot_id) > (self.settings.started_at, self.settings.boot_id)
        ):
            self._refuse_to_join(facts)

    def _receive_hello(self, origin: str, kind: str, head: Head, body: memoryview) -> None:
        facts, number = _facts_of(origin, decode_json(body))
        if int(facts.boot_id, 16) != head.origin_boot:
            raise Malformed("its boot ids differ")
        if kind == "join":
            # So that the newcomer hears of this host at once.
            if self.has_joined:
                self._say_hello(origin, head.origin_boot)
            return
        if self.conflict:
            return
        link = self.links.get(origin)
        if link is not None and link.boot != head.origin_boot:
            if facts.started_at <= link.facts.started_at and not link.is_silent:
                return
            link.lose("its broker has started again")
            if link.is_leaving:
                # The next hello finds it gone.
                return
            link = None
        if link is None:
            if len(self.links) >= self.settings.hosts and origin not in self.links:
                self._note_too_many(origin)
                return
            link = self.links[origin] = Link(self, facts)
            if self.has_joined:
                self._say_hello(origin, head.origin_boot)
                link.resume()
        link.receive_hello(facts, number)

    def _note_too_many(self, origin: str) -> None:
        if not self._is_full:
            self._is_full = True
            reason = f"there are more than {self.settings.hosts} other hosts (raise cluster.hosts)"
            self.note("warning", "cluster.too_many_hosts", host=origin, reason=reason)

    def _receive_frames(self, link: Link, kind: str, body: memoryview) -> None:
        """Handle frames and outcomes of another host."""
        link.contact_at = self.now
        if kind == "data":
            link.receive_data(Data.decode(body), len(body))
        elif kind == "outcomes":
            link.receive_outcomes(Outcomes.decode(body), len(body))
        else:
            for part_kind, part in unbundled(body):
                self._receive_frames(link, part_kind, part)

    def _receive_from(self, link: Link, kind: str, body: memoryview) -> None:
        link.contact_at = self.now
        handle = _HANDLERS.get(kind)
        if handle is not None:
            handle(self, link, body)

    def _receive_bye(self, link: Link) -> None:
        link.lose("its broker has stopped")
        if not link.is_leaving:
            del self.links[link.host]

    def _send_state(self, link: Link) -> None:
        # What was not told yet is a part of the state.
        for body in self._announcements.take():
            self.send(ALL, "changes", 0, encode_json(body))
        remotes = self.remotes
        for body in self._announcements.state(remotes.own_names(), remotes.own_interests()):
            self.send(link.host, "state", link.boot, encode_json(body))


_HANDLERS: Final[dict[str, Callable[[Cluster, Link, memoryview], None]]] = {
    "inquiry": lambda cluster, link, body: link.receive_inquiry(Inquiry.decode(body)),
    "answer": lambda cluster, link, body: link.receive_answer(Answer.decode(body)),
    "ping": lambda cluster, link, body: link.receive_ping(Ping.decode(body)),
    "pong": lambda cluster, link, body: link.receive_pong(Pong.decode(body)),
    "changes": lambda cluster, link, body: link.receive_changes(decode_json(body)),
    "state": lambda cluster, link, body: link.receive_state(decode_json(body)),
    "ask": lambda cluster, link, body: cluster._send_state(link),
    "hold": lambda cluster, link, body: link.receive_hold(),
    "held": lambda cluster, link, body: link.receive_held(),
    "bye": lambda cluster, link, body: cluster._receive_bye(link),
    "tell": lambda cluster, link, body: cluster.remotes.told(
        link.host, decode_json(body), cluster.now
    ),
}


def _facts_of(host: str, body: dict[str, Any]) -> tuple[HostFacts, int]:
    """Return the facts in a hello, and the number of the last changes. Raises Malformed."""
    try:
        facts = HostFacts(
            host,
            f"{int(body['boot_id'], 16):016x}",
            float(body["started_at"]),
            str(body["version"]),
            str(body["digest"]),
            tuple(map(str, body["addresses"])),
            float(body["dedup"]),
        )
        return facts, int(body["number"])
    except (KeyError, TypeError, ValueError) as error:
        raise Malformed(f"its facts are not valid: {error!r}") from error
