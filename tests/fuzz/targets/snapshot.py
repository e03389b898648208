"""The state that one process hands over to the next, changed: it is refused with a
named error, or restored completely.

Restored completely: the new broker gives the same account of itself at once, and it
works. All clients send, answer, wait and leave, and no state is left behind. The
waiting bytes are real frames: the core passes them on unread.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from support.fake_network import FakeNet, Peer, client
from support.fuzz.mutator import mutated as mutated_bytes

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core.broker import Broker, CoreLimits
from brokerd.core.outbox import FrameOutbox
from brokerd.core.precopy import Copies
from brokerd.core.snapshot import BadSnapshot, Pieces, adapt, capture, restore, restore_idle
from brokerd_client.errors import FrameError, MalformedEnvelope
from brokerd_client.wire.envelope import parse
from brokerd_client.wire.framing import FrameReader

CONFIGS = (
    client("alice"),
    client("bob", queue=400),
    client("drops", queue=300, when_full=WhenFull.DROP_OLDEST),
    client("metered", rate=RateConfig(5.0, 5000.0)),
    client("pool", connections=3),
)
LIMITS = CoreLimits(max_message=1000, wait_timeout=30.0)
EDGES = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    1.5,
    1e308,
    True,
    False,
    None,
    "",
    "alice",
    "pool/i1",
    "ü",
    [],
    {},
)
#: Before it stands what describes what is behind it: JSON holds no NUL.
MARK = b"\0"


def target(data: bytes) -> None:
    """Restore the state that the bytes hold."""
    text, _, body = data.partition(MARK)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return
    take_idle(facts)
    net = FakeNet(*CONFIGS, limits=LIMITS)
    net.now = 0.0
    pieces = Pieces(body)
    try:
        if isinstance(facts, dict) and "gone" not in facts:
            adapt(facts, Copies(net.broker))
        restored = restore(net.broker, facts, pieces, net.now)
    except BadSnapshot as error:
        assert str(error)
        return
    if len(pieces):
        # The process with the sockets takes their bytes next, and refuses the rest.
        return
    sessions = [session for session in restored.sessions if session.open]
    for session in sessions:
        peer = Peer(net, session.client.name)
        peer.session, session.connection = session, peer
        peer.reading = session.held_by is None
        net.peers.append(peer)
        outbox = session.outbox
        if outbox.begun:
            # What the other process has written already, the client has.
            first = (
                outbox.queue()[0].frame if isinstance(outbox, FrameOutbox) else outbox.chunks()[0]
            )
            peer.have(bytes(first[: outbox.begun]))
    again = capture(net.broker, sessions, net.now)
    # Names that one of the two does not have are as they are at a start.
    facts["clients"] = {
        name: each
        for name, each in facts["clients"].items()
        if name in again.facts["clients"] or not is_as_at_start(each, facts["started_at"])
    }
    again.facts["clients"] = {
        name: again.facts["clients"][name]
        for name in facts["clients"]
        if name in net.broker.exchange.clients
    }
    for name, each in again.facts["clients"].items():
        if facts["clients"][name]["rate"] != each["rate"]:
            each["rate"] = facts["clients"][name]["rate"]
    assert comparable(again.facts, net.broker) == comparable(facts, net.broker)
    if not (facts["waiting"] or facts["retained"]):
        # A request whose recipient is not configured waits elsewhere, and a frame that no
        # pool needs is not kept.
        assert b"".join(again.pieces) == body
    if are_frames(body):
        use_and_leave(net)


def is_as_at_start(client: Mapping[str, Any], started_at: float) -> bool:
    """Return whether nothing has happened to a client."""
    since = client["changed_at"] == started_at and client["shown"] == [False, started_at]
    return since and not client["turn"]


def take_idle(facts: Any) -> None:
    """Restore each session with its outbox first, as if it had been copied before."""
    sessions, outboxes = (
        (facts.get(what) for what in ("sessions", "outboxes"))
        if isinstance(facts, dict)
        else (0, 0)
    )
    if not isinstance(sessions, list) or not isinstance(outboxes, list):
        return
    broker = Broker(CONFIGS)
    copies = Copies(broker)
    for session, outbox in zip(sessions, outboxes, strict=False):
        with contextlib.suppress(BadSnapshot):
            restore_idle(
                broker, {"session": session, "outbox": outbox, "client": None}, 0.0, copies
            )


def comparable(facts: Mapping[str, Any], broker: Broker) -> dict[str, Any]:
    """Return the facts without those that a restore may change: see ``restore`` and
    ``Broker.reconfigure``.
    """
    facts = copy.deepcopy(dict(facts))
    known = broker.exchange.clients
    clients = {
        name: {key: each[key] for key in ("changed_at", "turn", "rate", "levels")}
        for name, each in facts["clients"].items()
        if name in known
    }
    for name, each in clients.items():
        rate = known[name].config.rate
        if each["rate"] != [rate.messages, rate.bytes]:
            del each["rate"], each["levels"]
    sessions = []
    names = {*known, *(each["name"] for each in facts["sessions"])}
    for each in facts["sessions"]:
        each["hold_s"] = each["hold_s"] and float(each["hold_s"])
        each["since"] = float(each["since"])
        each["configured"] = each["configured"] and each["name"] in known
        for what in ("subscriptions", "reached", "owed", "asked", "expiring"):
            each[what] = sorted(each[what], key=str)
        each["reached"] = sorted({name for name in each["reached"] if name in names})
        if not each["configured"]:
            each["subscriptions"] = []
        sessions.append({key: each[key] for key in sorted(each) if key in SESSION})
    there = len(facts["outboxes"])
    outboxes = []
    for each in facts["outboxes"]:
        held = (
            remembered(each["queue"], there)
            if "queue" in each
            else [each["chunks"], sorted(each["left"])]
        )
        waits = sum(item[0] for item in each["queue"]) if "queue" in each else sum(each["chunks"])
        # An outbox without frames begins empty.
        outboxes.append(
            [
                each["frames"],
                each["size"],
                *([held, each["begun"], each["blocked"]] if waits else []),
            ]
        )
    return {
        "clients": clients,
        "sessions": sessions,
        "outboxes": outboxes,
        "held": sorted(([*pair, left and float(left)] for *pair, left in facts["held"]), key=str),
        "leaving": [
            [position, remembered(queue, there)] for position, queue, _ in facts["leaving"]
        ],
        **{
            name: facts[name]
            for name in ("started_at", "next_number", "dropped", "refused", "totals", "given_back")
        },
    }


def are_frames(body: bytes) -> bool:
    """Return whether the waiting bytes have the form that the core has checked before
    they were queued.
    """
    reader = FrameReader()
    reader.feed(body)
    try:
        while (frame := reader.next_frame(len(body))) is not None:
            parse(frame)
    except (FrameError, MalformedEnvelope):
        return False
    return not reader.buffered


def remembered(queue: list[list[Any]], there: int) -> list[list[Any]]:
    """Return the remembered facts of frames; a sender that has left counts as none."""
    orphan = 4
    return [
        [size, flags | orphan, None]
        if flags & orphan or (sender or 0) >= there
        else [size, flags, sender]
        for size, flags, sender in queue
    ]


SESSION = {
    *(
        "name",
        "instance",
        "address",
        "configured",
        "peer",
        "since",
        "number",
        "left_at",
        "skip",
        "charged",
    ),
    *("hold_s", "closing", "slow", "in", "subscriptions", "reached", "owed", "asked"),
}


def use_and_leave(net: FakeNet) -> None:
    """Let all clients act and leave; no state of them may be left."""
    net.settle()
    for peer in list(net.peers):
        for name in ("alice", "pool", "metered"):
            peer.message(name, b"m", 1, receipt=True)
            peer.request(name, b"r", 2)
        peer.publish("a.b", b"e")
    for peer in list(net.peers):
        for address, message_id, *_ in list(peer.session.incoming_requests):
            peer.reply(address, b"!", message_id)
    net.advance(40)
    for peer in list(net.peers):
        if peer.writing or peer.session.outbox.waiting:
            peer.read()
    net.advance(1e9)
    for peer in list(net.peers):
        peer.leave()
    net.settle()
    assert not net.peers
    assert not net.leftovers()


# Inputs


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the input with one to three of its facts changed, or now and then its
    bytes.
    """
    text, _, body = data.partition(MARK)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return mutated_bytes(data, other, rng)
    if rng.random() < 0.1:
        return json.dumps(facts).encode() + MARK + (body[: rng.randrange(len(body) + 1)] or b"more")
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(facts, rng)
    return json.dumps(facts).encode() + MARK + body


def by_seed(data: bytes, seed: int) -> bytes:
    """Return the input, mutated by this seed."""
    return mutated(data, b"", random.Random(seed))


def change(facts: Any, rng: random.Random) -> None:
    """Change one value somewhere in the tree."""
    places: list[tuple[Any, Any]] = []
    found = [facts]
    while found:
        value = found.pop()
        if not isinstance(value, (dict, list)):
            continue
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            found.append(value[key])
    if not places:
        return
    holder, key = rng.choice(places)
    value = holder[key]
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(rng.choice(holder)))
        case 2:
            holder[key] = copy.deepcopy(rng.choice(places)[0])
        case 3:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 4 if type(value) in (int, float):
            holder[key] = value + rng.choice((-1, 1, 16, -16))
        case _:
            holder[key] = copy.deepcopy(rng.choice(EDGES))


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield the snapshots of brokers in different states."""
    for name, prepare in {
        "empty": lambda _net: None,
        "idle": idle,
        "waiting": waiting,
        "held": held,
        "asked": outgoing_requests,
        "leaving": leaving,
        "pools": pools,
        "stranger": stranger,
    }.items():
        net = FakeNet(*CONFIGS, limits=LIMITS)
        net.now = 0.0
        prepare(net)
        peers = sorted(net.peers, key=lambda peer: peer.session.number)
        taken = capture(net.broker, [peer.session for peer in peers], net.now)
        facts = json.dumps(taken.facts, separators=(",", ":")).encode()
        assert (
            sum(isinstance(peer.session.outbox, FrameOutbox) for peer in peers) or name != "pools"
        )
        yield name, facts + MARK + b"".join(taken.pieces)


def idle(net: FakeNet) -> None:
    alice, bob = net.connect("alice"), net.connect("bob")
    alice.op("subscribe", 1, topic="a.>")
    bob.op("subscribe", 1, topic="a.*", group="g")
    alice.message("bob", b"hello")
    net.connect("metered").message("alice", b"x" * 50)


def waiting(net: FakeNet) -> None:
    idle(net)
    alice, bob, _ = net.peers
    bob.block(30)
    for number in range(4):
        alice.message("bob", b"%d" % number * 40, number, receipt=True)


def held(net: FakeNet) -> None:
    waiting(net)
    alice, _, metered = net.peers
    for peer in (alice, metered):
        peer.message("bob", b"z" * 200, 9)
    assert alice.held


def outgoing_requests(net: FakeNet) -> None:
    alice, bob, drops = net.connect("alice"), net.connect("bob"), net.connect("drops")
    for message_id in range(3):
        alice.request("bob", b"?", message_id)
        bob.request("drops", b"?", message_id)
    drops.request("alice", b"?", 2**64 - 1)


def leaving(net: FakeNet) -> None:
    waiting(net)
    alice, bob, _ = net.peers
    bob.request("alice", b"?", 5)
    alice.request("metered", b"?", 6)
    for peer in (bob, alice):
        net.peers.remove(peer)
        net.broker.detach(peer.session, net.now)
        net.write_touched()


def pools(net: FakeNet) -> None:
    alice, drops = net.connect("alice"), net.connect("drops")
    members = [net.connect("pool") for _ in range(3)]
    for peer in (drops, *members):
        peer.block(10)
    for number in range(4):
        alice.message("pool", b"p" * 20, number)
        alice.message("drops", b"d" * 90, number, receipt=True)
    alice.message(members[1].address, b"pinned", 8, receipt=True)
    members[0].request("drops", b"?", 9)


def stranger(net: FakeNet) -> None:
    waiting(net)
    rest = {config.name: config for config in CONFIGS if config.name != "bob"}
    net.broker.reconfigure(rest, LIMITS, net.now)
    net.settle()
