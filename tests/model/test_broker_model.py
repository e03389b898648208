"""The whole core against plain dictionaries: whatever happens in whatever order, every
message has one outcome.

``BROKERD_MODEL_EXAMPLES=5000`` makes a long run of it, with other examples each time,
and prints statistics.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fake_network import FakeNet, Peer, client, error_of

from brokerd.config.values import ClientConfig, RateConfig, WhenConnected, WhenFull
from brokerd.core import replies as replies_module
from brokerd.core.broker import CoreLimits
from brokerd.core.outbox import FrameOutbox, Outbox
from brokerd.core.session import Session
from brokerd_client.wire.envelope import BROKER, Envelope, Flag, Kind, encode, parse
from brokerd_client.wire.framing import frame

EXAMPLES = int(os.environ.get("BROKERD_MODEL_EXAMPLES", "0"))
STATISTICS: Counter[str] = Counter()

#: Small enough that senders who do not read what became of their messages are met
#: often.
RESERVE = 500
WAIT_TIMEOUT = 30.0
MAX_MESSAGE = 200
#: Length, header, the sender's address and a topic with its length come on top.
LONGEST_FRAME = MAX_MESSAGE + 50
#: Two names, two pools, one that seldom comes; another that nobody configured is sent
#: to as well.
NAMES = {"ann": 1, "bob": 1, "cid": 1, "pool": 3, "pair": 2}
TOPICS = ["a", "a.b", "a.c", "a.b.c", "b", "b.a"]
PATTERNS = ["a", "a.b", "a.*", "a.>", ">", "*", "*.a", "b.>", "$broker.>", "$broker.online.*"]
UNIVERSE = [
    ".".join(tokens)
    for depth in (1, 2, 3)
    for tokens in itertools.product(("a", "b", "c", "zz"), repeat=depth)
] + ["$broker.online.ann", "$broker.offline.pool", "$broker.draining", "$broker.online.zz"]

CONFIGS = st.fixed_dictionaries(
    {
        "queue": st.sampled_from([40, 90, 200, 600, 100_000]),
        "when_full": st.sampled_from(list(WhenFull)),
        "when_connected": st.sampled_from(list(WhenConnected)),
        "send_to": st.sampled_from([["*"]] * 8 + [["p*", "ann"], ["bob"], []]),
        "publish": st.sampled_from([[">"]] * 6 + [["a.*", "b"], []]),
        "subscribe": st.sampled_from(
            [[">", "$broker.>"], [">", "$broker.>"], ["a.>", "$broker.online.*"], []]
        ),
        "rate": st.sampled_from([None] * 12 + [3.0]),
    }
)
PICK = st.integers(0, 99)
SIZES = st.sampled_from([0, 1, 10, 30, 60, 199])
RECIPIENTS = st.sampled_from(
    ["ann", "ann", "bob", "bob", "cid", "pool", "pool", "pair", "nobody", "@"]
)


def fits(pattern: str, topic: str) -> bool:
    """Return whether the topic matches the pattern, by the text of docs/protocol.md as
    a regular expression.
    """
    if topic.startswith("$") and pattern[0] in "*>":
        return False
    tokens = {"*": r"[^.]+", ">": r".+"}
    return (
        re.fullmatch(
            r"\.".join(tokens.get(each, re.escape(each)) for each in pattern.split(".")), topic
        )
        is not None
    )


def allowed_to_subscribe(rules: list[str], pattern: str) -> bool:
    """Return whether one rule matches every topic that the pattern can match."""
    wanted = [topic for topic in UNIVERSE if fits(pattern, topic)]
    return any(all(fits(rule, topic) for topic in wanted) for rule in rules)


@dataclass
class Sent:
    """One frame that a client sent.

    Attributes:
        taken: The recipients whose socket took it.
    """

    serial: int
    envelope: Envelope
    sender: Peer
    moved: bool = False
    may_vanish: bool = False
    taken: list[Peer] = field(default_factory=list)


@dataclass
class Outcomes:
    """The outcomes that a sender got for one of its ids."""

    errors: list[str] = field(default_factory=list)
    receipts: int = 0
    replies: int = 0


def everything_in(outbox: Outbox) -> bytes:
    """Return all bytes of an outbox, also those of frames whose ttl is over."""
    whole = (
        [queued.frame for queued in outbox.queue()]
        if isinstance(outbox, FrameOutbox)
        else outbox.chunks()
    )
    return b"".join(whole)[outbox.begun :]


def waiting_frames(peer: Peer) -> Iterator[Envelope]:
    """Yield every frame of the outbox that the socket has not taken completely."""
    data = bytes(peer.stream) + everything_in(peer.session.outbox)
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4])
        if start + 4 + size > len(data):
            # The rest went back to its sender when the connection ended.
            break
        if start + 4 + size > len(peer.stream):
            yield parse(data[start + 4 : start + 4 + size])
        start += 4 + size


def serial_of(envelope: Envelope) -> int | None:
    """Return the serial number of the frame's Sent, None for the broker's own frames."""
    return None if envelope.name == BROKER else int(envelope.payload.partition(b":")[0])


class BrokerModel(RuleBasedStateMachine):
    """Random clients. A certain outcome is predicted; an uncertain one must be exactly
    one outcome at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reserve, replies_module.OUTCOME_RESERVE = replies_module.OUTCOME_RESERVE, RESERVE  # type: ignore[misc]
        self.serial = itertools.count(1)
        self.sent: dict[int, Sent] = {}
        self.outcomes: dict[tuple[Peer, int], Outcomes] = defaultdict(Outcomes)
        self.of_id: dict[tuple[Peer, int], list[Sent]] = defaultdict(list)
        self.all_peers: list[Peer] = []
        self.sessions: list[Session] = []
        self.left: list[Peer] = []
        self.subscribed: dict[Peer, set[tuple[str, str | None]]] = defaultdict(set)
        self.views: dict[Peer, dict[str, bool]] = {}
        self.last_from: dict[tuple[Peer, Peer], int] = {}
        self.ever_dropping: set[str] = set()
        self.requests_seen: dict[Peer, list[Envelope]] = defaultdict(list)
        self.highest: dict[str, int] = {}
        self.net: FakeNet

    @initialize(data=st.data())
    def configure(self, data: st.DataObject) -> None:
        """Begin with a configuration, and one connected client."""
        self.configs = {name: self.config_of(name, data.draw(CONFIGS)) for name in NAMES}
        limits = CoreLimits(max_message=MAX_MESSAGE, wait_timeout=WAIT_TIMEOUT)
        self.net = FakeNet(*self.configs.values(), limits=limits)
        self.net.on_losing = self.note_leaving
        self.began = self.net.now
        for name in ("ann", "bob", "pool", "pool", "pair"):
            self.connect(name)

    def is_online(self, names: tuple[str, ...]) -> bool:
        """Return whether a client of these names is connected."""
        return any(peer.name in names for peer in self.net.peers)

    def note_leaving(self, peer: Peer) -> None:
        """Note the leaving member, and the frames that another pool member may take
        over: they come behind its own.
        """
        self.left.append(peer)
        for envelope in waiting_frames(peer):
            serial = serial_of(envelope)
            if serial is not None and NAMES[peer.name] > 1:
                self.sent[serial].moved = True
                STATISTICS["left by a member of a pool"] += 1

    def config_of(self, name: str, drawn: dict[str, Any]) -> ClientConfig:
        """Return a client with these options."""
        self.highest[name] = max(self.highest.get(name, 0), drawn["queue"])
        if drawn["when_full"] is WhenFull.DROP_OLDEST:
            self.ever_dropping.add(name)
        return client(
            name, connections=NAMES[name], **{**drawn, "rate": RateConfig(drawn["rate"], None)}
        )

    # Choosing

    def peer(self, pick: int) -> Peer:
        """Return one of the connections."""
        return self.net.peers[pick % len(self.net.peers)]

    def recipient(self, to: str, pick: int) -> str:
        """Return a recipient; @ stands for the exact address of some connection, now or
        before.
        """
        return self.all_peers[pick % len(self.all_peers)].address if to == "@" else to

    def members(self, to: str) -> list[Peer]:
        """Return the connections that may get a frame sent to ``to``."""
        return [peer for peer in self.net.peers if to in (peer.name, peer.address)]

    @staticmethod
    def patterns_of(config: ClientConfig, which: str) -> list[str]:
        """Return the patterns of a rule."""
        return [each.pattern for each in getattr(config, which)]

    # Sending

    def envelope(
        self, kind: Kind, message_id: int | None, to: str, size: int, **rest: Any
    ) -> Envelope:
        """Return a new frame whose payload is its serial number."""
        serial = next(self.serial)
        payload = (b"%d:" % serial).ljust(size, b".")
        return Envelope(kind, serial if message_id is None else message_id, to, payload, **rest)

    def note(self, sender: Peer, envelope: Envelope) -> Sent:
        """Remember that the frame is being sent."""
        serial = serial_of(replace(envelope, name="x"))
        assert serial is not None
        sent = self.sent[serial] = Sent(serial, envelope, sender)
        sent.may_vanish = not envelope.flags & Flag.RECEIPT and envelope.kind is not Kind.REQUEST
        self.of_id[sender, envelope.id].append(sent)
        STATISTICS[envelope.kind.name] += 1
        return sent

    def predicted_refusal(self, sender: Peer, envelope: Envelope) -> str | None:
        """Return the code of the refusal that the rules predict, or None."""
        config = self.configs[sender.name]
        name = envelope.name.partition("/")[0]
        if (
            envelope.kind is not Kind.EVENT
            and len(encode(envelope)) - 12 - len(envelope.name) > MAX_MESSAGE
        ):
            return "too_large"
        if envelope.kind in (Kind.MESSAGE, Kind.REQUEST) and not any(
            fnmatchcase(name, each) for each in self.patterns_of(config, "send_to")
        ):
            return "denied"
        if envelope.extension is not None and envelope.extension["ttl"] <= 0:
            return "expired"
        if envelope.kind is Kind.EVENT:
            return (
                None
                if any(fits(each, envelope.topic) for each in self.patterns_of(config, "publish"))
                else "denied"
            )
        if envelope.kind is Kind.REPLY:
            # One that is asked for is not asked about here.
            return "denied"
        if name not in self.configs:
            return "no_such_client"
        return None if self.members(envelope.name) else "offline"

    def send_one(
        self,
        sender: Peer,
        envelope: Envelope,
        *,
        incoming_requests: bool = False,
        step: int | None = None,
    ) -> None:
        """Send a frame, and compare its outcome with the prediction."""
        sent = self.note(sender, envelope)
        at_once = (
            sender.reading
            and not sender.content
            and self.configs[sender.name].rate.messages is None
        )
        unread = sender.session.outbox.waiting > sender.session.outbox.limit + RESERVE
        session = sender.session
        known = envelope.kind is Kind.EVENT or envelope.name.encode() in session.routes
        # The routing loop passes it on by itself: nothing comes back that could wait
        # for the sender.
        ordinary = known and not envelope.flags and envelope.extension is None
        code = None if incoming_requests else self.predicted_refusal(sender, envelope)
        members = self.members(envelope.name)
        before = {
            peer: (peer.writing, peer.session.outbox.waiting, peer.session.outbox.limit)
            for peer in members
        }
        # A request goes to the member with the fewest requests in flight.
        counts = envelope.kind is Kind.REQUEST and len(members) > 1
        loads = {
            peer: len(peer.session.incoming_requests) if counts else before[peer][1]
            for peer in members
        }
        errors = self.errors_at(sender, envelope.id)
        refused, left = self.net.broker.replies.refused.total(), len(self.left)
        sender.send(envelope, step)
        if not at_once or sender.gone:
            return
        if unread:
            assert sender.held or ordinary, "it does not read its answers and may still cause more"
            return
        new_errors = self.errors_at(sender, envelope.id)[len(errors) :]
        if code is not None:
            assert new_errors == [code]
            STATISTICS["foretold " + code] += 1
            return
        if envelope.kind is Kind.EVENT:
            # A subscriber that is disconnected for it returns what waits for it.
            assert len(self.left) > left or self.net.broker.replies.refused.total() == refused
            assert not sender.held, "no publisher is held for its subscribers"
            return
        places = [peer for peer in members if self.has_frame(peer, sent)]
        least = min(loads.values())
        size = (
            16
            + len(sender.session.sender_header)
            + len(encode(envelope))
            - 12
            - len(envelope.name.encode())
        )
        roomy = [
            peer
            for peer, (writing, waiting, limit) in before.items()
            if loads[peer] == least and (not writing or waiting + size <= limit)
        ]
        if not all(before[peer][0] for peer in members):
            assert places, "all recipients read and it was not delivered"
            assert not new_errors
            STATISTICS["foretold delivered"] += 1
        elif roomy and len(roomy) == sum(load == least for load in loads.values()):
            assert len(places) == 1
            assert places[0] in roomy, "not the least loaded"
            assert not new_errors
            STATISTICS["foretold queued"] += 1
        else:
            STATISTICS["met a full queue"] += 1
            # A request may wait behind those that a member has left.
            waits = envelope.id in session.waiting_requests
            assert places or new_errors or sender.held or waits

    def errors_at(self, peer: Peer, message_id: int) -> list[str]:
        """Return the codes of the broker's errors with this id, arrived or queued for
        the peer.
        """
        waiting = [
            error_of(each) for each in waiting_frames(peer) if self.is_error(each, message_id)
        ]
        return (
            self.outcomes[peer, message_id].errors
            + [error_of(each) for each in peer.got if self.is_error(each, message_id)]
            + waiting
        )

    @staticmethod
    def is_error(envelope: Envelope, message_id: int) -> bool:
        """Return whether that is the broker's ERROR about the id."""
        return envelope.kind is Kind.ERROR and envelope.name == BROKER and envelope.id == message_id

    def has_frame(self, peer: Peer, sent: Sent) -> bool:
        """Return whether the peer or its outbox has the frame."""
        return (
            peer in sent.taken
            or any(serial_of(each) == sent.serial for each in peer.got)
            or any(serial_of(each) == sent.serial for each in waiting_frames(peer))
        )

    @precondition(lambda self: self.net.peers)
    @rule(
        who=PICK,
        to=RECIPIENTS,
        which=PICK,
        size=SIZES,
        kind=st.sampled_from([Kind.MESSAGE, Kind.MESSAGE, Kind.REQUEST]),
        receipt=st.booleans(),
        ttl=st.sampled_from([None, None, None, 5, 0]),
        step=st.sampled_from([None, None, 1, 7]),
    )
    def send(
        self,
        who: int,
        to: str,
        which: int,
        size: int,
        kind: Kind,
        receipt: bool,
        ttl: int | None,
        step: int | None,
    ) -> None:
        """Send a MESSAGE or REQUEST."""
        extension = None if ttl is None else {"ttl": ttl, "x": "ü"}
        flags = Flag.RECEIPT if receipt else 0
        envelope = self.envelope(
            kind, None, self.recipient(to, which), size, flags=flags, extension=extension
        )
        self.send_one(self.peer(who), envelope, step=step)

    @precondition(lambda self: self.net.peers)
    @rule(
        who=PICK,
        plan=st.lists(st.tuples(RECIPIENTS, PICK, SIZES, st.booleans()), min_size=2, max_size=12),
        step=st.sampled_from([None, None, 50]),
    )
    def send_many(self, who: int, plan: list[tuple[str, int, int, bool]], step: int | None) -> None:
        """Send many messages that arrive together."""
        sender = self.peer(who)
        data = b""
        for to, which, size, receipt in plan:
            flags = Flag.RECEIPT if receipt else 0
            envelope = self.envelope(
                Kind.MESSAGE, None, self.recipient(to, which), size, flags=flags
            )
            self.note(sender, envelope)
            data += frame(encode(envelope))
        sender.send_bytes(data, step)

    @precondition(lambda self: self.net.peers)
    @rule(
        who=PICK,
        to=RECIPIENTS,
        which=PICK,
        count=st.integers(2, 15),
        size=SIZES,
        receipt=st.booleans(),
        blind=PICK,
    )
    def flood(
        self, who: int, to: str, which: int, count: int, size: int, receipt: bool, blind: int
    ) -> None:
        """Send many messages to a client that often reads little of them."""
        recipient = self.recipient(to, which)
        for peer in self.members(recipient):
            if blind % 3:
                peer.block(blind)
        for _ in range(count):
            flags = Flag.RECEIPT if receipt else 0
            self.send_one(
                self.peer(who), self.envelope(Kind.MESSAGE, None, recipient, size, flags=flags)
            )
            if not self.net.peers:
                break

    @precondition(lambda self: self.net.peers)
    @rule(who=PICK, to=RECIPIENTS, count=st.integers(2, 6), which=PICK)
    def ask_many(self, who: int, to: str, count: int, which: int) -> None:
        """Send many requests to one client."""
        recipient = self.recipient(to, which)
        for _ in range(count):
            if self.net.peers:
                self.send_one(self.peer(who), self.envelope(Kind.REQUEST, None, recipient, 10))

    @precondition(lambda self: any(self.requests_seen[peer] for peer in self.net.peers))
    @rule(
        who=PICK,
        which=PICK,
        size=SIZES,
        kind=st.sampled_from([Kind.REPLY, Kind.REPLY, Kind.ERROR]),
        twice=st.booleans(),
    )
    def answer(self, who: int, which: int, size: int, kind: Kind, twice: bool) -> None:
        """Answer a REQUEST, whatever send_to allows; sometimes twice."""
        able = [peer for peer in self.net.peers if self.requests_seen[peer]]
        sender = able[who % len(able)]
        request = self.requests_seen[sender].pop(which % len(self.requests_seen[sender]))
        for _ in range(1 + twice):
            incoming_requests = (
                request.name,
                request.id,
            ) in sender.session.incoming_requests and sender.reading
            envelope = self.envelope(kind, request.id, request.name, size)
            if kind is Kind.ERROR or request.name == sender.address:
                self.note(sender, envelope).may_vanish = True
                sender.send(envelope)
            else:
                self.send_one(sender, envelope, incoming_requests=incoming_requests)

    @precondition(lambda self: self.net.peers)
    @rule(who=PICK, topic=st.sampled_from(TOPICS), size=SIZES, receipt=st.booleans())
    def publish(self, who: int, topic: str, size: int, receipt: bool) -> None:
        """Publish an EVENT: every subscriber that reads gets it once, and one member of
        each group.
        """
        sender = self.peer(who)
        envelope = self.envelope(
            Kind.EVENT, None, "", size, topic=topic, flags=Flag.RECEIPT if receipt else 0
        )
        sure = (
            sender.reading
            and not sender.content
            and self.configs[sender.name].rate.messages is None
        )
        sure = sure and not any(peer.writing for peer in self.net.peers)
        denied = self.predicted_refusal(sender, envelope) is not None
        plain: set[Peer] = set()
        groups: dict[str, set[Peer]] = defaultdict(set)
        for peer in self.net.peers:
            for pattern, group in self.subscribed[peer]:
                if fits(pattern, topic):
                    (plain if group is None else groups[group]).add(peer)
        there = list(self.net.peers)
        self.send_one(sender, envelope)
        got = [peer for peer in there if self.has_frame(peer, self.sent[max(self.sent)])]
        possible = plain.union(*groups.values())
        if sender.reading and not sender.content:
            assert set(got) <= possible, "a client got an event that it did not subscribe to"
        if sure and denied:
            assert not got
        elif sure:
            extra = set(got) - plain
            assert plain <= set(got)
            for members in groups.values():
                assert members & set(got), "a group was passed over"
                if not members & plain:
                    assert len(members & extra) >= 1
            assert len(extra) <= len(groups)
            STATISTICS["foretold event"] += 1

    @precondition(lambda self: self.net.peers)
    @rule(
        who=PICK,
        excess=st.integers(1, 50),
        kind=st.sampled_from([Kind.MESSAGE, Kind.REQUEST]),
        step=st.sampled_from([None, 9]),
    )
    def send_too_much(self, who: int, excess: int, kind: Kind, step: int | None) -> None:
        """Send an oversized frame, which is skipped and answered."""
        sender = self.peer(who)
        envelope = self.envelope(kind, None, "ann", MAX_MESSAGE + excess)
        self.note(sender, envelope)
        at_once = sender.reading and not sender.content
        unread = sender.session.outbox.waiting > sender.session.outbox.limit + RESERVE
        sender.send(envelope, step)
        if at_once and not unread and not sender.gone:
            assert self.errors_at(sender, envelope.id) == ["too_large"]

    # Subscribing

    @precondition(lambda self: any(peer.reading and not peer.writing for peer in self.net.peers))
    @rule(
        who=PICK,
        pattern=st.sampled_from(PATTERNS),
        group=st.sampled_from([None, None, "g", "h"]),
        end=st.booleans(),
    )
    def subscribe(self, who: int, pattern: str, group: str | None, end: bool) -> None:
        """Begin or end a subscription."""
        able = [
            peer
            for peer in self.net.peers
            if peer.reading and not peer.writing and not peer.content
        ]
        if not able:
            return
        peer = able[who % len(able)]
        if self.configs[peer.name].rate.messages is not None or peer.room is not None:
            return
        arguments = {"topic": pattern} if group is None else {"topic": pattern, "group": group}
        self.collect()
        peer.op("unsubscribe" if end else "subscribe", **arguments)
        (answer,) = peer.take()
        if end:
            assert answer.kind is Kind.REPLY
            self.subscribed[peer].discard((pattern, group))
            if (pattern, group) == ("$broker.>", None):
                self.views.pop(peer, None)
        elif allowed_to_subscribe(self.patterns_of(self.configs[peer.name], "subscribe"), pattern):
            assert answer.kind is Kind.REPLY
            self.subscribed[peer].add((pattern, group))
            if (pattern, group) == ("$broker.>", None):
                self.views[peer] = self.list_of(peer)
        else:
            assert error_of(answer) == "denied"

    def list_of(self, peer: Peer) -> dict[str, bool]:
        """Return the clients that the peer sees, by asking."""
        listed = peer.ask("clients")["clients"]
        return {each["name"]: each["online"] for each in listed}

    # Coming, going, reading and not reading

    @rule(name=st.sampled_from(list(NAMES)))
    def connect(self, name: str) -> None:
        """Connect once more, if there is room or a connection to be replaced."""
        there = self.members(name)
        full = len(there) == NAMES[name]
        peer = self.net.try_connect(name)
        if full and self.configs[name].when_connected is WhenConnected.REFUSE:
            assert peer is None
            return
        assert peer is not None
        if full:
            assert there[0].gone == "connection replaced by a new one"
        self.all_peers.append(peer)
        self.sessions.append(peer.session)

    @precondition(lambda self: self.net.peers)
    @rule(who=PICK, really=st.integers(0, 2))
    def leave(self, who: int, really: int) -> None:
        """End a connection."""
        if not really:
            self.peer(who).leave()

    @precondition(lambda self: self.net.peers)
    @rule(who=PICK, really=st.integers(0, 7))
    def break_the_rules(self, who: int, really: int) -> None:
        """Send a malformed frame, which ends the connection once the answer is written."""
        peer = self.peer(who)
        if not really and peer.reading and not peer.content:
            peer.send_bytes(b"\xff\xff\xff\xf0")
            assert peer.gone == "malformed" or peer.session.closing == "malformed"

    @precondition(lambda self: self.net.peers)
    @rule(who=PICK, room=st.sampled_from([0, 0, 1, 5, 20, 50, 150]))
    def block(self, who: int, room: int) -> None:
        """Let a client stop reading."""
        self.peer(who).block(room)

    @precondition(lambda self: self.is_online(("pool", "pair")))
    @rule(name=st.sampled_from(["pool", "pair"]), room=st.sampled_from([0, 0, 7]))
    def block_pool(self, name: str, room: int) -> None:
        """Let all connections of a pool stop reading."""
        for peer in self.members(name):
            peer.block(room)

    @precondition(
        lambda self: any(peer.writing and NAMES[peer.name] > 1 for peer in self.net.peers)
    )
    @rule(who=PICK)
    def lose_a_member(self, who: int) -> None:
        """End a connection of a pool while messages wait for it."""
        members = [peer for peer in self.net.peers if peer.writing and NAMES[peer.name] > 1]
        members[who % len(members)].leave()

    @precondition(lambda self: any(peer.writing for peer in self.net.peers))
    @rule(who=PICK, size=st.sampled_from([None, None, 1, 20, 50, 100]))
    def read(self, who: int, size: int | None) -> None:
        """Let a blocked client read a little, or everything."""
        blocked = [peer for peer in self.net.peers if peer.writing]
        blocked[who % len(blocked)].read(size)

    @rule(seconds=st.sampled_from([1, 4, 10, 29, 31]))
    def advance(self, seconds: int) -> None:
        """Move the clock forward."""
        self.net.advance(seconds)

    # A reload is refused while an upgrade is going on.
    @precondition(lambda self: not self.net.is_copying)
    @rule(name=st.sampled_from(list(NAMES)), drawn=CONFIGS)
    def reconfigure(self, name: str, drawn: dict[str, Any]) -> None:
        """Change the entry of one client; its connections stay."""
        rate = self.configs[name].rate
        self.configs[name] = replace(self.config_of(name, drawn), rate=rate)
        limits = CoreLimits(max_message=MAX_MESSAGE, wait_timeout=WAIT_TIMEOUT)
        self.net.broker.reconfigure(self.configs, limits, self.net.now)
        rules = self.patterns_of(self.configs[name], "subscribe")
        for peer in self.members(name):
            self.subscribed[peer] = {
                (pattern, group)
                for pattern, group in self.subscribed[peer]
                if allowed_to_subscribe(rules, pattern)
            }
            # The clients that it may see have changed, without an event.
            self.views.pop(peer, None)
        self.net.settle()

    @rule()
    def copy(self) -> None:
        """Copy idle sessions for another process, which may replace this one later."""
        self.net.copy()
        STATISTICS["copied"] += 1

    @rule()
    def be_replaced(self) -> None:
        """Hand everything over to another process; no client notices."""
        before = {peer.session for peer in self.net.peers}
        if self.net.is_copying:
            STATISTICS["replaced after copies"] += 1
            self.net.take_over()
        else:
            self.net.hand_over()
        # As a new process does: room that a reload has made releases senders.
        self.net.settle()
        self.sessions = [session for session in self.sessions if session not in before]
        self.sessions += [peer.session for peer in self.net.peers]
        STATISTICS["replaced"] += 1

    # What is always true

    def collect(self) -> None:
        """Check everything that arrived since the last time."""
        for peer in self.all_peers:
            for envelope in peer.take():
                if envelope.name == BROKER:
                    self.collect_own(peer, envelope)
                else:
                    self.collect_sent(peer, envelope)

    def collect_own(self, peer: Peer, envelope: Envelope) -> None:
        """Note the broker's receipt, ACK or ERROR for a message."""
        outcomes = self.outcomes[peer, envelope.id]
        if envelope.kind is Kind.ERROR:
            code = error_of(envelope)
            if code != "malformed":
                assert self.of_id[peer, envelope.id], f"{peer} never sent the id {envelope.id}"
            outcomes.errors.append(code)
            STATISTICS["error " + code] += 1
        elif envelope.kind is Kind.RECEIPT:
            assert any(sent.envelope.flags & Flag.RECEIPT for sent in self.of_id[peer, envelope.id])
            outcomes.receipts += 1
        elif envelope.kind is Kind.EVENT and peer in self.views:
            _, what, name = (*envelope.topic.split(".", 2), "")[:3]
            if what in ("online", "offline"):
                assert self.views[peer].get(name) is (what == "offline"), (
                    f"{envelope.topic} is no news"
                )
                self.views[peer][name] = what == "online"
                STATISTICS["presence seen"] += 1

    def collect_sent(self, peer: Peer, envelope: Envelope) -> None:
        """Compare a received frame with the one that was sent."""
        serial = serial_of(envelope)
        assert serial is not None
        sent = self.sent[serial]
        flags = 0 if sent.envelope.extension is None else Flag.EXTENSION
        assert replace(envelope, payload=b"") == replace(
            sent.envelope, name=sent.sender.address, flags=flags, payload=b""
        )
        assert envelope.payload == sent.envelope.payload
        assert peer not in sent.taken, "delivered twice"
        sent.taken.append(peer)
        STATISTICS["delivered"] += 1
        if envelope.kind is not Kind.EVENT:
            assert len(sent.taken) == 1, "delivered to two"
            assert sent.envelope.name in (peer.address, peer.name)
        if envelope.kind is Kind.REQUEST:
            self.requests_seen[peer].append(envelope)
        if envelope.kind in (Kind.REPLY, Kind.ERROR):
            self.outcomes[peer, envelope.id].replies += 1
        if not sent.moved:
            assert serial > self.last_from.get((sent.sender, peer), 0), "overtaken"
            self.last_from[sent.sender, peer] = serial

    @invariant()
    def memory_is_bounded(self) -> None:
        """No queue holds more than its quota, or a message that is longer, and one
        message.
        """
        for peer in self.net.peers:
            session = peer.session
            own = sum(len(encode(each)) + 4 for each in waiting_frames(peer) if each.name != BROKER)
            assert own <= max(self.highest[peer.name], LONGEST_FRAME) + LONGEST_FRAME
            assert session.outbox.waiting == len(everything_in(session.outbox))
            assert sum(map(len, session.outbox.pieces())) <= session.outbox.waiting

    @invariant()
    def everything_has_its_place(self) -> None:
        """The broker's memory of sessions is consistent, and concerns only present
        sessions.
        """
        broker = self.net.broker
        self.collect()
        assert not broker.held.released
        live = {peer.session for peer in self.net.peers}
        assert set(broker.exchange.sessions()) == live
        assert set(broker.held.deadlines) == {
            session for session in live if session.held_by is not None
        }
        timed = 0
        for session in live:
            assert set(session.waiters) == {each for each in live if each.held_by is session}
            outgoing = [each for same_id in session.outgoing_requests.values() for each in same_id]
            assert session.waiters.keys() <= live
            assert session.outgoing_count == len(outgoing)
            for key, request in session.incoming_requests.items():
                assert request.responder is session
                assert request.requester in live
                assert request.key == key
                assert (request.requester.address, request.id) == key[:2]
                assert request in request.requester.outgoing_requests[request.id]
                assert key[:2] in session.incoming_requests
            for request in outgoing:
                assert request.requester is session
                assert request.responder in live
                assert request.responder.incoming_requests[request.key] is request
                assert request.deadline is None or request.deadline > self.net.now - 0.1
                timed += request.deadline is not None
            if session.held_by is not None:
                assert session.held_by.outbox.blocked, "held, and the one it waits for reads"
                assert broker.held.deadlines[session] > self.net.now
        remembered = sum(len(slot) for slot in broker.requests.deadlines._slots.values())
        assert remembered == timed
        assert len(broker.topics) == sum(len(session.subscriptions) for session in live)
        for peer in self.net.peers:
            assert peer.session.subscriptions == self.subscribed[peer]

    @invariant()
    def rates_hold(self) -> None:
        """No client had more messages accepted than its rate allows."""
        for name, config in self.configs.items():
            if config.rate.messages is not None:
                mine = [key for key in self.of_id if key[0].name == name]
                accepted = sum(
                    len([sent for sent in self.of_id[key] if sent.taken]) for key in mine
                )
                assert accepted <= config.rate.messages * (1 + self.net.now - self.began)

    # The end

    def teardown(self) -> None:
        """Let all clients read and time pass: then no sender is held, and every message
        has had its outcome.
        """
        replies_module.OUTCOME_RESERVE = RESERVE  # type: ignore[misc]
        try:
            # After a failure the state is no longer worth a look.
            if hasattr(self, "net") and sys.exc_info()[0] is None:
                self.finish()
        finally:
            replies_module.OUTCOME_RESERVE = self.reserve  # type: ignore[misc]

    def finish(self) -> None:
        """Check the end, in order."""
        STATISTICS["runs"] += 1
        for _ in range(100):
            for peer in list(self.net.peers):
                peer.read()
            self.net.advance(WAIT_TIMEOUT + 1)
            if not any(peer.writing or peer.held for peer in self.net.peers):
                break
        for peer in list(self.net.peers):
            assert peer.reading, "held without end"
            assert not peer.content
            assert not peer.session.outbox.waiting
        self.everything_has_its_place()
        for peer, view in self.views.items():
            if not peer.gone and self.configs[peer.name].rate.messages is None:
                assert self.list_of(peer) == view, "who lists and subscribes knows who is there"
        stayed = set(self.net.peers)
        while self.net.peers:
            self.net.peers[0].leave()
            self.collect()
        for (sender, message_id), sents in self.of_id.items():
            self.check_outcome(sents, self.outcomes[sender, message_id], stayed=sender in stayed)
        assert not self.net.leftovers()
        for session in self.sessions:
            assert not session.incoming_requests
            assert not session.outgoing_requests
            assert not session.waiters
            assert not session.subscriptions
            assert not session.routes
            assert session.held_by is None

    def check_outcome(self, sents: list[Sent], outcomes: Outcomes, *, stayed: bool) -> None:
        """Check that all frames with one id from one sender had one outcome each."""
        kinds = {sent.envelope.kind for sent in sents}
        if len(kinds) > 1 or Kind.ERROR in kinds:
            # A request to itself and its answer share an id; an ERROR that can't be
            # delivered ends there.
            return
        taken = sum(len(sent.taken) for sent in sents)
        errors = len(outcomes.errors)
        replies = outcomes.replies
        assert outcomes.receipts <= len(sents)
        if kinds == {Kind.EVENT}:
            assert errors + outcomes.receipts <= 1
        elif kinds == {Kind.REQUEST}:
            (sent,) = sents
            # Whether the work may have been begun is what the two codes tell apart.
            assert ("offline" if taken else "abandoned") not in outcomes.errors
            assert taken + errors >= 1 or not stayed
            if not taken:
                assert errors + replies <= 1
            elif stayed and self.left.index(sent.taken[0]) < self.left.index(sent.sender):
                assert errors + replies == 1, "a request has one answer"
            else:
                assert errors + replies <= 1
        else:
            assert taken + errors <= len(sents), "delivered, and an error as well"
            if stayed:
                vanished = len(sents) - taken - errors
                possible = [sent for sent in sents if sent.may_vanish and self.may_drop(sent)]
                assert vanished <= len(possible), "no outcome"
                STATISTICS["dropped for newer ones"] += vanished

    def may_drop(self, sent: Sent) -> bool:
        """Return whether the recipient was ever allowed to drop the oldest."""
        return sent.envelope.name.partition("/")[0] in self.ever_dropping


def pytest_settings() -> settings:
    """Return the settings of a short run, always the same, or of the long run."""
    if EXAMPLES:
        return settings(
            max_examples=EXAMPLES,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
    return settings(
        max_examples=120,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


TestBrokerModel = BrokerModel.TestCase
TestBrokerModel.settings = pytest_settings()
if EXAMPLES:
    TestBrokerModel.pytestmark = [pytest.mark.timeout(0)]


@pytest.mark.skipif(not EXAMPLES, reason="only a long run has statistics worth a look")
def test_model_run_meets_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    """A long run prints its statistics: a model that never meets a full queue proves
    nothing about one.
    """
    with capsys.disabled():
        print("", *(f"{count:9,} {what}" for what, count in sorted(STATISTICS.items())), sep="\n")
    assert STATISTICS["met a full queue"]
