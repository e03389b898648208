"""Mailboxes against plain accounts: whatever happens in whatever order, nothing that was
receipted is lost, and nothing acknowledged with a receipt returns.

The store in memory answers late, is full, fails, and crashes at any commit. Clients stop
reading, administrators kick, drop, purge and import, and limits change meanwhile.
``BROKERD_MODEL_EXAMPLES=5000`` makes a long run of it, and prints statistics.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, mailbox
from support.memory_store import MemoryStore

from brokerd.config.values import ClientConfig, WhenConnected, WhenFull
from brokerd.core.broker import CoreLimits
from brokerd.core.mailboxes import feeding as feeding_module
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.journal import FailureKind
from brokerd_client.wire.envelope import Kind

EXAMPLES = int(os.environ.get("BROKERD_MODEL_EXAMPLES", "0"))
STATISTICS: Counter[str] = Counter()
PICK = st.integers(0, 99)
LIMITS = CoreLimits(wait_timeout=30.0)
#: What may happen, some of it more often.
ACTIONS = (
    *["send"] * 5,
    *["publish"] * 2,
    *["join", "acknowledge", "answer"] * 3,
    *["fail_everything", "wait", "send_again", "leave", "administer"] * 2,
    *["change_room_on_disk", "crash", "upgrade", "copy", "fail_to_upgrade", "empty", "reload"],
    *["close", "acknowledge_all", "block", "read", "import_some", "show", "disconnect"],
    "fail_disk",
)
#: Small, so that runs are read back all the time.
SMALL = {"_MESSAGES": 4, "_FEW": 2}
BOXES = ("bob", "eve")
#: What a reload changes in the entry of a mailbox.
CHANGES: tuple[dict[str, Any], ...] = (
    {"messages": 5},
    {"messages": 1000},
    {"size": 900},
    {"size": 1 << 30},
    {"ttl": 40.0},
    {"ttl": None},
    {"attempts": 1},
    {"attempts": 3},
    {"dead": 0.0},
    {"dead": 0.5},
    {"when_full": WhenFull.WAIT},
    {"when_full": WhenFull.REFUSE},
    {"ack_timeout": 5.0},
    {"ack_timeout": None},
    {"subscribe": ()},
    {"subscribe": ("t.>",)},
)
REFUSALS = {"full", "in_doubt", "store_failed", "unsupported", "shutting_down"}


class MailboxModel(RuleBasedStateMachine):
    """One sender, two mailboxes, and accounts of every payload in each."""

    def __init__(self) -> None:
        super().__init__()
        self.before = {name: getattr(mailbox_module, name) for name in SMALL}
        self.run_before = feeding_module._RUN
        for name, value in SMALL.items():
            setattr(mailbox_module, name, value)
        feeding_module._RUN = 3
        self.serial = 0
        #: By id: the payloads, and the mailboxes that were to store them. Two ids may
        #: have one payload and one key.
        self.sent: dict[int, tuple[list[str], set[str]]] = {}
        self.outcomes: Counter[int] = Counter()
        #: Ids whose sender is gone.
        self.forgotten: set[int] = set()
        #: By seq in each mailbox, of deliveries: its payload.
        self.payloads: dict[tuple[str, int], str] = {}
        self.targets: dict[str, set[str]] = {}
        # All of these have pairs of a mailbox and a payload.
        self.receipted: set[tuple[str, str]] = set()
        self.delivered: Counter[tuple[str, str]] = Counter()
        self.acknowledged: set[tuple[str, str]] = set()
        self.finished: set[tuple[str, str]] = set()
        self.over: set[tuple[str, str]] = set()
        self.removed: set[tuple[str, str]] = set()
        self.may_expire: set[tuple[str, str]] = set()
        self.delayed: set[str] = set()
        #: Mailbox and seq of each ACK.
        self.asked: set[tuple[str, int]] = set()
        self.full = self.failed = False
        #: Whether the order of first deliveries can be seen from outside.
        self.is_orderly = True
        self.first: dict[Peer, int] = {}
        #: Clients that did not read for some time.
        self.blocked: set[Peer] = set()

    def teardown(self) -> None:
        try:
            if hasattr(self, "net") and sys.exc_info()[0] is None:
                self.empty()
                self.check_outcomes()
        finally:
            for name, value in self.before.items():
                setattr(mailbox_module, name, value)
            feeding_module._RUN = self.run_before

    @initialize(
        ttl=st.sampled_from([None, None, 40.0]),
        messages=st.sampled_from([5, 1000]),
        queue=st.sampled_from([1 << 20, 1 << 20, 300]),
        is_wide=st.booleans(),
        forgets=st.sampled_from([False, False, True]),
    )
    def begin(
        self, ttl: float | None, messages: int, queue: int, is_wide: bool, forgets: bool
    ) -> None:
        """Begin. forgets: whether keys are forgotten, so that a message may be stored again."""
        subscribe = ("t.>",) if is_wide else ()
        entry = {"ttl": ttl, "messages": messages, "attempts": 3, "subscribe": subscribe}
        self.queue = queue
        self.entries: dict[str, dict[str, Any]] = {"bob": entry, "eve": {"subscribe": ("t.>",)}}
        self.orphaned: set[str] = set()
        self.forgets = forgets
        self.start(MemoryStore(dedup=25.0 if forgets else 1e9))

    def configs(self) -> list[ClientConfig]:
        """Return the configuration now."""
        configs = [client("alice", admin=True)]
        for name, entry in self.entries.items():
            box = None if name in self.orphaned else mailbox(**entry)
            entries: dict[str, Any] = {"connections": 3, "queue": self.queue}
            if name == "eve":
                entries = {"when_connected": WhenConnected.REPLACE}
            configs.append(client(name, mailbox=box, **entries))
        return configs

    def start(self, store: MemoryStore) -> None:
        """Begin with what a store has on disk."""
        self.net = MailboxNet(*self.configs(), limits=LIMITS, store=store, is_prompt=False)
        self.net.now += self.serial
        self.net.broker.mailboxes.clock.set(self.net.now, self.net.now)
        self.alice = self.net.connect("alice")
        self.members: list[Peer] = []
        self.first.clear()
        self.join(3)

    # What happens

    @rule(action=st.sampled_from(ACTIONS), a=PICK, b=PICK, c=PICK)
    def act(self, action: str, a: int, b: int, c: int) -> None:
        """Do one thing. One rule for all: Hypothesis would leave out some rules each time."""
        STATISTICS[action] += 1
        if action in ("send", "publish"):
            to = "" if action == "publish" else BOXES[c % 5 == 0]
            self.send(a % 6 + 1, to, (0, 0, 0, 5)[b % 4], ttl=c % 3 == 0, prompt=c % 2 == 0)
        elif action == "join":
            self.join(a % 5 + 1, BOXES[b % 3 == 0])
        elif action == "acknowledge":
            self.acknowledge(a, b, ("", "", "", "back", "failed", "dead")[c % 6])
        elif action == "fail_everything":
            self.fail_everything(a, b % 3 + 1)
        elif action == "answer":
            self.net.answer(a % 5 + 1 if b % 2 else None)
        elif action == "wait":
            self.wait((0.1, 1, 7, 65)[a % 4])
        elif action == "crash":
            self.crash(a % 3)
        elif action in ("send_again", "leave", "close", "acknowledge_all", "read", "disconnect"):
            getattr(self, action)(a)
        elif action in ("administer", "import_some", "show", "reload", "block", "fail_to_upgrade"):
            getattr(self, action)(a, b)
        else:
            getattr(self, action)()

    def send(self, count: int, to: str, delay: int, *, ttl: bool, prompt: bool) -> None:
        for _ in range(count):
            self.serial += 1
            payload = f"m{self.serial}"
            extension: dict[str, Any] = {"key": payload}
            if delay:
                extension["delay"] = delay
                self.delayed.add(payload)
            if ttl:
                extension["ttl"] = 20
            self.targets[payload] = {to} if to else set(BOXES)
            if ttl:
                self.may_expire |= {(box, payload) for box in self.targets[payload]}
            self.put(payload, extension, to)
        if prompt:
            self.net.answer()

    def send_again(self, pick: int) -> None:
        """Send a message again with its key: it is stored once."""
        payload = f"m{pick % self.serial + 1}" if self.serial else ""
        if payload in self.targets:
            targets = self.targets[payload]
            self.put(payload, {"key": payload}, "" if len(targets) > 1 else min(targets))

    def put(self, payload: str, extension: dict[str, Any], to: str) -> None:
        if to in self.orphaned:
            return
        boxes = {to} if to else self.storing()
        message_id = self.note([payload], boxes)
        self.may_expire |= {(box, payload) for box in boxes if self.entries[box].get("ttl")}
        rest: Any = {"receipt": True, "extension": extension}
        if to:
            self.alice.message(to, payload.encode(), message_id, **rest)
        else:
            self.alice.publish("t.x", payload.encode(), message_id, **rest)

    def storing(self) -> set[str]:
        """Return the mailboxes that store events now."""
        return {
            name
            for name, entry in self.entries.items()
            if entry["subscribe"] and name not in self.orphaned
        }

    def note(self, payloads: list[str], boxes: set[str]) -> int:
        """Return the id of a new frame about these payloads."""
        message_id = len(self.sent) + 1
        self.sent[message_id] = payloads, boxes
        return message_id

    def join(self, window: int, name: str = "bob") -> None:
        if name in self.orphaned:
            return
        self.look()
        peer = self.net.try_connect(name)
        if peer is not None:
            self.members = [each for each in self.members if not each.gone]
            self.members.append(peer)
            peer.op("open_mailbox", 0, window=window)

    def member(self, pick: int) -> Peer | None:
        """Return one of the recipients' connections."""
        self.members = [each for each in self.members if not each.gone]
        return self.members[pick % len(self.members)] if self.members else None

    @staticmethod
    def held_by(peer: Peer) -> list[int]:
        """Return the seqs that a connection holds."""
        return list(peer.session.consumer.held) if peer.session.consumer is not None else []

    def leave(self, pick: int) -> None:
        peer = self.member(pick)
        if peer is not None:
            self.look()
            self.is_orderly = self.is_orderly and not peer.writing
            peer.leave()

    def disconnect(self, pick: int) -> None:
        """End a connection as an administrator."""
        peer = self.member(pick)
        if peer is not None:
            self.look()
            self.is_orderly = self.is_orderly and not peer.writing
            self.alice.op("disconnect", 0, address=peer.address)

    def close(self, pick: int) -> None:
        peer = self.member(pick)
        if peer is not None:
            self.is_orderly = self.is_orderly and not peer.writing
            peer.op("close_mailbox", 0)
            if pick % 2:
                peer.op("open_mailbox", 0, window=pick % 5 + 1, window_bytes=pick * 10 + 1)

    def block(self, pick: int, room: int) -> None:
        """Let a client stop reading."""
        peer = self.member(pick)
        if peer is not None:
            peer.block(room)
            self.blocked.add(peer)

    def read(self, pick: int) -> None:
        """Let a client that stopped read again."""
        blocked = [peer for peer in self.members if peer.room is not None and not peer.gone]
        if blocked:
            blocked[pick % len(blocked)].read(None if pick % 3 else pick)

    def acknowledge(self, pick: int, which: int, verb: str) -> None:
        peer = self.member(pick)
        if peer is None or peer.writing:
            return
        self.look()
        held = self.held_by(peer)
        if held:
            seq = held[which % len(held)]
            if not verb:
                self.note_ack(peer, seq)
            # Its RECEIPT says that the message is gone.
            ack(peer, seq, verb, receipt=not verb)

    def note_ack(self, peer: Peer, seq: int) -> None:
        """Note that a connection acknowledges a message."""
        if (peer.name, seq) not in self.payloads:
            # An ACK of another one has just made room.
            self.look()
        self.asked.add((peer.name, seq))
        self.acknowledged.add((peer.name, self.payloads[peer.name, seq]))

    def acknowledge_all(self, pick: int) -> None:
        """Acknowledge all that a connection holds, by one ACK or plain ones."""
        peer = self.member(pick)
        if peer is None or peer.writing:
            return
        self.look()
        held = self.held_by(peer)
        for seq in held:
            self.note_ack(peer, seq)
        if held and pick % 2:
            ack(peer, max(held), receipt=True, upto=True)
        for seq in held if not pick % 2 else ():
            ack(peer, seq)

    def fail_everything(self, pick: int, times: int) -> None:
        """Let a member fail all that it holds, and again what comes back at once."""
        self.net.answer()
        peer = self.member(pick)
        for _ in range(times):
            self.look()
            if peer is None or peer.writing:
                break
            for seq in self.held_by(peer):
                ack(peer, seq, "failed", reason="no")
            self.net.answer()

    def administer(self, pick: int, which: int) -> None:
        """Kick, drop or purge something, perhaps before the last such answer."""
        self.look()
        name = BOXES[pick % 4 == 0]
        rows = self.net.store.disk[name].rows if name in self.net.store.disk else {}
        if name not in self.net.broker.mailboxes.boxes:
            return
        seqs = sorted(rows)
        dead = [seq for seq, row in rows.items() if row.state == "dead"]
        match which % 8:
            case 0 | 1:
                self.alice.op("mailbox_kick", self.note([], set()), name=name, all=True)
            case 2 | 3 if dead:
                seq = dead[which % len(dead)]
                self.alice.op("mailbox_kick", self.note([], set()), name=name, seq=seq)
            case 4 | 5 | 6 if seqs:
                seq = seqs[pick % len(seqs)]
                self.removed.add((name, payload_of(rows[seq].frame)))
                self.alice.op("mailbox_drop", self.note([], set()), name=name, seq=seq)
            case 7:
                # What is sent before the answer may be removed, too.
                self.removed |= {
                    (name, payload) for payload, boxes in self.targets.items() if name in boxes
                }
                state = (None, "ready", "delayed", "dead", "held")[pick % 5]
                more = {} if state is None else {"state": state}
                self.alice.op("mailbox_purge", self.note([], set()), name=name, **more)
                self.net.answer()
        if pick % 3 == 0:
            self.net.answer()

    def import_some(self, count: int, pick: int) -> None:
        """Import messages of every state."""
        entries, payloads = [], []
        if "bob" in self.orphaned:
            return
        message_id = len(self.sent) + 1
        for at in range(count % 3 + 1):
            self.serial += 1
            payload = f"m{self.serial}"
            payloads.append(payload)
            self.targets[payload] = {"bob"}
            entry: dict[str, Any] = {"sender": "alice", "payload": payload, "id": message_id}
            entry |= {"key": payload, "extension": {"key": payload}}
            entry["state"] = ("ready", "delayed", "dead")[(pick + at) % 3]
            entry["attempts"] = pick % 3
            self.delayed.add(payload)
            if entry["state"] == "delayed":
                entry["due_at"] = self.net.now + pick % 7
            if pick % 4 == 0:
                entry["expires_at"] = self.net.now + 15
                self.may_expire.add(("bob", payload))
            entries.append(entry)
        self.note(payloads, {"bob"})
        self.alice.op("mailbox_import", message_id, name="bob", messages=entries)

    def show(self, which: int, pick: int) -> None:
        """Compare what an administrator sees with the disk."""
        state = ("ready", "held", "delayed", "dead", "all")[which % 5]
        self.net.answer()
        self.look()
        box = self.net.broker.mailboxes.boxes.get("bob")
        if box is None or not self.net.broker.mailboxes.is_quiet or self.failed:
            return
        if self.alice.held:
            return
        message_id = self.note([], set())
        self.alice.op("mailbox_show", message_id, name="bob", state=state, limit=100)
        held = set(box.held)
        self.net.answer()
        (answer,) = [envelope for envelope in self.alice.got if envelope.id == message_id]
        rows = self.net.store.disk["bob"].rows if "bob" in self.net.store.disk else {}
        expected = {
            seq
            for seq, row in rows.items()
            if state == "all" or ("held" if seq in held else row.state) == state
        }
        shown = [each["seq"] for each in json.loads(answer.payload)["messages"]]
        assert shown == sorted(expected)[:100], state

    def wait(self, seconds: float) -> None:
        self.look()
        self.net.advance(seconds)

    def change_room_on_disk(self) -> None:
        self.full = not self.full
        if not self.failed:
            self.net.store.failure = FailureKind.FULL if self.full else None

    def fail_disk(self) -> None:
        """Let the disk fail for good, until the next start."""
        self.failed = True
        self.net.store.failure = FailureKind.IO

    def crash(self, written: int) -> None:
        """End the process; some of the last requests were carried out without an answer."""
        self.look()
        store = self.net.store
        store.mailboxes = _Deaf(store.mailboxes)
        store.step(written)
        self.forgotten.update(self.sent)
        self.full = self.failed = False
        self.start(store.crashed())

    def upgrade(self) -> None:
        self.look()
        if self.net.is_copying:
            self.net.take_over()
        else:
            self.net.hand_over()

    def copy(self) -> None:
        """Copy idle sessions for another process, which may replace this one later."""
        self.net.copy()

    def fail_to_upgrade(self, pick: int, count: int) -> None:
        """Begin an upgrade that fails, or is slow; clients go on meanwhile."""
        self.look()
        mailboxes = self.net.broker.mailboxes
        mailboxes.pause()
        self.net.settle()
        self.send(count % 3, BOXES[pick % 2], 0, ttl=False, prompt=False)
        self.acknowledge(pick, count, ("", "back", "failed")[pick % 3])
        if pick % 5 == 0:
            self.leave(count)
        self.net.answer(count % 4)
        if pick % 3:
            mailboxes.resume()
            self.net.settle()
        else:
            self.upgrade()

    def reload(self, pick: int, which: int) -> None:
        """Change the entry of a mailbox, or remove it, or bring it back."""
        if self.net.is_copying:
            return
        self.look()
        for message_id, (payloads, _) in self.sent.items() if self.alice.held else ():
            if not self.outcomes[message_id]:
                # Which mailboxes store it is known when its sender is released.
                self.sent[message_id] = payloads, set()
        name = BOXES[which % 4 == 0]
        if pick % 10 == 0 and name == "bob":
            self.orphaned ^= {name}
        else:
            self.entries[name] = self.entries[name] | CHANGES[pick % len(CHANGES)]
            if self.entries[name].get("ttl") is not None:
                self.may_expire |= {
                    (name, payload) for payload, boxes in self.targets.items() if name in boxes
                }
        configs = {each.name: each for each in self.configs()}
        self.net.broker.reconfigure(configs, LIMITS, self.net.now)
        self.net.settle()

    # What must hold

    def look(self) -> None:
        """Take note of everything that the clients got."""
        for envelope in self.alice.take():
            if envelope.id:
                self.look_at_outcome(envelope)
        for peer in self.members:
            for envelope in peer.take():
                if envelope.kind in (Kind.MESSAGE, Kind.EVENT):
                    self.look_at_delivery(peer, envelope)
                elif envelope.kind is Kind.RECEIPT and (peer.name, envelope.id) in self.asked:
                    self.finished.add((peer.name, self.payloads[peer.name, envelope.id]))

    def look_at_outcome(self, envelope: Any) -> None:
        """Note what the sender hears about one of its ids."""
        payloads, boxes = self.sent[envelope.id]
        if envelope.kind is Kind.ERROR:
            error = json.loads(envelope.payload)
            code = error["code"]
            STATISTICS[f"error {code}"] += 1
            if code == "expired" and "seq" in error:
                name = error["name"]
                gone = {(name, payload) for payload in payloads}
                assert gone & self.may_expire, envelope
                self.over |= gone & self.may_expire
                return
            assert code in REFUSALS or not payloads, envelope
            if code == "full" and envelope.id not in self.forgotten:
                self.receipted |= {
                    (box, payload)
                    for payload in payloads
                    for box in boxes - set(error.get("names", boxes))
                }
        else:
            for box in boxes:
                for payload in payloads:
                    assert self.is_known(box, payload), f"{payload} is not on disk"
                    self.receipted.add((box, payload))
        self.outcomes[envelope.id] += 1
        assert self.outcomes[envelope.id] == 1, envelope

    def look_at_delivery(self, peer: Peer, envelope: Any) -> None:
        """Note one delivery."""
        payload, place = envelope.payload.decode(), (peer.name, envelope.seq)
        entry = peer.name, payload
        STATISTICS["deliveries"] += 1
        # What waited for a client that did not read may belong to another one by now.
        may_return = self.forgets or peer in self.blocked
        assert entry not in self.finished or may_return, f"{payload} was acknowledged"
        is_first = place not in self.payloads
        assert self.payloads.setdefault(place, payload) == payload
        self.delivered[entry] += 1
        row = self.net.store.disk[peer.name].rows.get(envelope.seq)
        assert row is None or envelope.attempt <= row.attempts + 1
        if is_first and self.is_orderly and payload not in self.delayed and envelope.attempt == 1:
            assert envelope.seq > self.first.get(peer, 0), f"{envelope.seq} is out of order"
            self.first[peer] = envelope.seq

    def on_disk(self, name: str) -> dict[str, str]:
        """Return the payloads on disk, with their states."""
        box = self.net.store.disk.get(name)
        rows = [] if box is None else box.rows.values()
        found = [(payload_of(row.frame), row.state) for row in rows]
        assert len(dict(found)) == len(found) or self.forgets, "stored twice"
        return dict(found)

    def is_known(self, box: str, payload: str) -> bool:
        """Return whether a message is on disk, or has been processed or reported."""
        entry = box, payload
        return (
            any(entry in each for each in (self.acknowledged, self.over, self.removed))
            or entry in self.may_expire
            or payload in self.on_disk(box)
        )

    @invariant()
    def nothing_receipted_is_lost(self) -> None:
        self.look()
        there = {name: self.on_disk(name) for name in BOXES}
        gone = self.acknowledged | self.over | self.removed | self.may_expire
        for box, payload in self.receipted - gone:
            assert payload in there[box], payload

    @invariant()
    def counts_agree_with_the_disk(self) -> None:
        mailboxes = self.net.broker.mailboxes
        for name, box in mailboxes.boxes.items():
            holders = Counter(seq for consumer in box.consumers.values() for seq in consumer.held)
            assert max(holders.values(), default=1) == 1
            assert set(holders) <= set(box.held)
            for consumer in box.consumers.values():
                held = consumer.held.values()
                assert len(held) == 1 or not consumer.alone
                assert consumer.held_bytes == sum(
                    message.size for message in (*held, *consumer.acknowledged)
                )
            if not mailboxes.is_quiet or self.failed:
                continue
            disk = self.net.store.disk.get(name)
            rows = {} if disk is None else disk.rows
            states = Counter(row.state for row in rows.values())
            assert box.messages == len(rows)
            assert box.size == sum(row.stored.size for row in rows.values())
            assert box.dead == states["dead"]
            dead = [row.stored.size for row in rows.values() if row.state == "dead"]
            assert box.dead_size == sum(dead)
            assert box.keys == (0 if disk is None else len(disk.keys))
            assert set(box.held) <= set(rows)
            assert not box.uncommitted
            assert not box.parked
            assert min(box.counts().values()) >= 0
            assert box.delayed_on_disk >= 0
            in_memory = [message.seq for message in (*box.ready, *box.suspects)]
            in_memory += [seq for _, seq, _ in (*box.resting, *box._timed)]
            assert len(set(in_memory)) == len(in_memory)
            assert set(in_memory) <= set(rows)
            unloaded = box.unloaded + box.unloaded_delayed
            assert len(in_memory) + unloaded + len(box.held) == len(rows) - box.dead
            assert box._ready_size == sum(each.size for each in (*box.ready, *box.suspects))

    def empty(self) -> None:
        """Process everything: each message that is left is delivered."""
        self.look()
        if self.failed:
            self.net.answer()
            self.crash(0)
        self.net.store.failure, self.full = None, False
        if self.orphaned:
            if self.net.is_copying:
                self.net.take_over()
            self.orphaned.clear()
            configs = {each.name: each for each in self.configs()}
            self.net.broker.reconfigure(configs, LIMITS, self.net.now)
            self.net.settle()
        for peer in self.members:
            if not peer.gone:
                peer.read()
        self.net.answer()
        for name in BOXES:
            self.join(50, name)
        for member in self.members:
            if not member.gone and member.session.consumer is None:
                member.op("open_mailbox", 0, window=50)
        for _ in range(300):
            self.look()
            for name in BOXES:
                # An administrator who was held may have disconnected the others.
                if all(member.gone for member in self.members if member.name == name):
                    self.join(50, name)
            for member in self.members:
                for seq in self.held_by(member):
                    self.note_ack(member, seq)
                    ack(member, seq, receipt=True)
            self.net.answer()
            self.look()
            boxes = self.net.broker.mailboxes.boxes.values()
            if all(box.messages == box.dead for box in boxes) and not self.alice.held:
                break
            self.net.advance(15 if self.alice.held else 1)
        self.net.answer()
        self.look()
        for name in BOXES:
            left = self.on_disk(name)
            assert set(left.values()) <= {"dead"}, left
            for payload in {payload for box, payload in self.receipted if box == name}:
                entry = name, payload
                assert (
                    self.delivered[entry]
                    or payload in left
                    or entry in self.may_expire
                    or entry in self.removed
                ), payload

    def check_outcomes(self) -> None:
        """Check that the sender has heard of everything that it sent."""
        for message_id in self.sent:
            if message_id not in self.forgotten:
                assert self.outcomes[message_id] == 1, self.sent[message_id]


def payload_of(frame: bytes) -> str:
    """Return the payload of a delivery's frame, which has an extension."""
    return frame.rpartition(b"}")[2].decode()


class _Deaf:
    """The core of a process that has ended: it hears no answers."""

    def __init__(self, mailboxes: Any) -> None:
        self.clock = mailboxes.clock

    def __getattr__(self, name: str) -> Any:
        return lambda *answer: None


MailboxModel.TestCase.settings = settings(
    max_examples=EXAMPLES or 10,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not EXAMPLES,
    database=None,
)
TestMailboxModel = MailboxModel.TestCase
if EXAMPLES:
    TestMailboxModel.pytestmark = [pytest.mark.timeout(0)]


@pytest.mark.skipif(not EXAMPLES, reason="only a long run has statistics worth a look")
def test_mailbox_model_run_meets_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    """A long run prints its statistics: a model that never upgrades proves nothing."""
    with capsys.disabled():
        print("", *(f"{count:9,} {what}" for what, count in sorted(STATISTICS.items())), sep="\n")
    assert not {*ACTIONS} - STATISTICS.keys()
