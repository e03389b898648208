"""Mailboxes against plain accounts: whatever happens in whatever order, nothing that was
receipted is lost, and nothing acknowledged with a receipt returns.

The store in memory answers late, is full, and crashes at any commit.
``BROKERD_MODEL_EXAMPLES=5000`` makes a long run of it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fake_network import Peer, client
from support.mailbox_net import MailboxNet, ack, with_mailbox
from support.memory_store import MemoryStore

from brokerd.core.mailboxes import feeding as feeding_module
from brokerd.core.mailboxes import mailbox as mailbox_module
from brokerd.core.mailboxes.journal import FailureKind
from brokerd_client.wire.envelope import Kind

EXAMPLES = int(os.environ.get("BROKERD_MODEL_EXAMPLES", "0"))
PICK = st.integers(0, 99)
ATTEMPTS = 3
#: What may happen, some of it more often.
ACTIONS = (
    *["send"] * 5,
    *["join", "acknowledge", "answer"] * 3,
    *["fail_everything", "wait", "send_again", "leave"] * 2,
    *["change_room_on_disk", "crash", "upgrade", "empty"],
)
#: Small, so that runs are read back all the time.
LIMITS = {"_MESSAGES": 4, "_FEW": 2}


class MailboxModel(RuleBasedStateMachine):
    """One sender, a pool with a mailbox, and accounts of every payload."""

    def __init__(self) -> None:
        super().__init__()
        self.before = {name: getattr(mailbox_module, name) for name in LIMITS}
        self.run_before = feeding_module._RUN
        for name, value in LIMITS.items():
            setattr(mailbox_module, name, value)
        feeding_module._RUN = 3
        self.serial = 0
        #: By id of the message: its payload. Two ids may have one payload and one key.
        self.sent: dict[int, str] = {}
        self.receipted: set[str] = set()
        self.delivered: Counter[str] = Counter()
        #: Payloads by seq, of deliveries.
        self.payloads: dict[int, str] = {}
        self.asked: set[int] = set()
        self.finished: set[str] = set()
        self.over: set[str] = set()
        self.may_expire: set[str] = set()
        self.full = False

    def teardown(self) -> None:
        if hasattr(self, "net"):
            self.empty()
        for name, value in self.before.items():
            setattr(mailbox_module, name, value)
        feeding_module._RUN = self.run_before

    @initialize(ttl=st.sampled_from([None, None, 40.0]), messages=st.sampled_from([5, 1000]))
    def begin(self, ttl: float | None, messages: int) -> None:
        self.entry: dict[str, Any] = {"ttl": ttl, "messages": messages, "attempts": ATTEMPTS}
        self.start(MemoryStore(dedup=1e9))

    def start(self, store: MemoryStore) -> None:
        """Begin with what a store has on disk."""
        self.net = MailboxNet(
            client("alice"),
            with_mailbox(entry={"connections": 3}, **self.entry),
            store=store,
            is_prompt=False,
        )
        self.net.now += self.serial
        self.net.broker.mailboxes.clock.set(self.net.now, self.net.now)
        self.alice = self.net.connect("alice")
        self.members: list[Peer] = []
        self.join(3)

    # What happens

    @rule(action=st.sampled_from(ACTIONS), a=PICK, b=PICK, c=PICK)
    def act(self, action: str, a: int, b: int, c: int) -> None:
        """Do one thing. One rule for all: Hypothesis would leave out some rules each time."""
        if action == "send":
            self.send(a % 6 + 1, (0, 0, 0, 5)[b % 4], ttl=c % 3 == 0, prompt=c % 2 == 0)
        elif action == "join":
            self.join(a % 5 + 1)
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
        elif action in ("send_again", "leave"):
            getattr(self, action)(a)
        else:
            getattr(self, action)()

    def send(self, count: int, delay: int, *, ttl: bool, prompt: bool) -> None:
        for _ in range(count):
            self.serial += 1
            payload = f"m{self.serial}"
            extension: dict[str, Any] = {"key": payload}
            if delay:
                extension["delay"] = delay
            if ttl:
                extension["ttl"] = 20
            if ttl or self.entry["ttl"] is not None:
                self.may_expire.add(payload)
            self.put(payload, extension)
        if prompt:
            self.net.answer()

    def send_again(self, pick: int) -> None:
        """Send a message again with its key: it is stored once."""
        if self.serial:
            payload = f"m{pick % self.serial + 1}"
            self.put(payload, {"key": payload})

    def put(self, payload: str, extension: dict[str, Any]) -> None:
        message_id = len(self.sent) + 1
        self.sent[message_id] = payload
        self.alice.message("bob", payload.encode(), message_id, receipt=True, extension=extension)

    def join(self, window: int) -> None:
        peer = self.net.try_connect("bob")
        if peer is not None:
            self.members.append(peer)
            peer.op("open_mailbox", 0, window=window)

    def leave(self, pick: int) -> None:
        if self.members:
            self.look()
            self.members.pop(pick % len(self.members)).leave()

    def acknowledge(self, pick: int, which: int, verb: str) -> None:
        if not self.members:
            return
        peer = self.members[pick % len(self.members)]
        self.look()
        held = list(peer.session.consumer.held) if peer.session.consumer is not None else []
        if held:
            seq = held[which % len(held)]
            if not verb:
                self.asked.add(seq)
            ack(peer, seq, verb, receipt=True)

    def fail_everything(self, pick: int, times: int) -> None:
        """Let a member fail all that it holds, and again what comes back at once."""
        self.net.answer()
        for _ in range(times if self.members else 0):
            peer = self.members[pick % len(self.members)]
            self.look()
            for seq in list(peer.session.consumer.held) if peer.session.consumer else ():
                ack(peer, seq, "failed", reason="no")
            self.net.answer()

    def wait(self, seconds: float) -> None:
        self.look()
        self.net.advance(seconds)

    def change_room_on_disk(self) -> None:
        self.full = not self.full
        self.net.store.failure = FailureKind.FULL if self.full else None

    def crash(self, written: int) -> None:
        """End the process; some of the last requests were carried out without an answer."""
        self.look()
        store = self.net.store
        store.mailboxes = _Deaf(store.mailboxes)
        store.step(written)
        self.start(store.crashed())
        self.full = False

    def upgrade(self) -> None:
        self.look()
        self.net.hand_over()

    # What must hold

    def look(self) -> None:
        """Take note of everything that the clients got."""
        for envelope in self.alice.take():
            payload = self.sent[envelope.id]
            if envelope.kind is Kind.RECEIPT:
                self.receipted.add(payload)
                assert self.is_known(payload), f"{payload} was receipted and is not on disk"
            else:
                code = json.loads(envelope.payload)["code"]
                assert code in ("full", "expired"), envelope
                if code == "expired":
                    assert payload in self.may_expire
                    self.over.add(payload)
        for peer in self.members:
            for envelope in peer.take():
                if envelope.kind is Kind.MESSAGE:
                    payload = envelope.payload.decode()
                    assert payload not in self.finished, f"{payload} was acknowledged"
                    assert self.payloads.setdefault(envelope.seq, payload) == payload
                    self.delivered[payload] += 1
                elif envelope.kind is Kind.RECEIPT and envelope.id in self.asked:
                    self.finished.add(self.payloads[envelope.id])

    def on_disk(self) -> dict[str, str]:
        """Return the payloads on disk, with their states."""
        box = self.net.store.disk.get("bob")
        rows = [] if box is None else box.rows.values()
        return {row.frame.rpartition(b"}")[2].decode(): row.state for row in rows}

    def is_known(self, payload: str) -> bool:
        """Return whether a message is on disk, or has been processed or reported."""
        acknowledged = {self.payloads.get(seq) for seq in self.asked}
        return (
            payload in self.on_disk()
            or payload in self.finished
            or payload in acknowledged
            or payload in self.over
            or payload in self.may_expire
        )

    @invariant()
    def nothing_receipted_is_lost(self) -> None:
        self.look()
        for payload in self.receipted:
            assert self.is_known(payload), payload

    @invariant()
    def counts_agree_with_the_disk(self) -> None:
        mailboxes = self.net.broker.mailboxes
        box = self.net.box()
        for consumer in box.consumers.values():
            assert len(consumer.held) <= consumer.window
            assert len(consumer.held) == 1 or not consumer.alone
        if not mailboxes.is_quiet:
            return
        rows = list(self.net.store.disk["bob"].rows.values()) if self.net.store.disk else []
        assert box.messages == len(rows)
        assert box.size == sum(row.stored.size for row in rows)
        assert box.dead == sum(row.state == "dead" for row in rows)
        assert set(box.held) <= {row.seq for row in rows}
        assert box.ready_count >= 0

    def empty(self) -> None:
        """Process everything: each message that is left is delivered."""
        self.look()
        self.net.store.failure, self.full = None, False
        self.net.answer()
        peer = self.net.try_connect("bob")
        if peer is not None:
            self.members.append(peer)
            peer.op("open_mailbox", 0, window=50)
        for _ in range(300):
            self.look()
            for member in self.members:
                for seq in list(member.session.consumer.held) if member.session.consumer else ():
                    self.asked.add(seq)
                    ack(member, seq, receipt=True)
            self.net.answer()
            self.look()
            if self.net.box().messages == self.net.box().dead:
                break
            self.net.advance(1)
        left = self.on_disk()
        assert set(left.values()) <= {"dead"}, left
        for payload in self.receipted:
            assert self.delivered[payload] or payload in left or payload in self.may_expire, payload


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
