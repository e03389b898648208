"""Names, addresses and pools."""

from __future__ import annotations

import random

import pytest
from support.fake_network import FakeNet, client

from brokerd.config.values import WhenConnected, WhenFull
from brokerd.core.outbox import FrameOutbox, StreamOutbox
from brokerd_client.wire.envelope import Kind


def test_exchange_client_without_pool_has_its_name_as_address() -> None:
    """A client that is not a pool is addressed by its name alone."""
    net = FakeNet(client("ann"), client("bob"))
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob", b"hello", 1)
    (got,) = bob.take()
    assert (ann.address, got.name) == ("ann", "ann")
    assert net.broker.exchange.find("ann") is ann.session
    assert net.broker.exchange.find("ann/i1") is None
    assert net.broker.exchange.find("nobody/i1") is None
    assert repr(ann.session) == "<Session ann from test>"


def test_exchange_connection_beyond_limit_is_refused() -> None:
    """With when_connected: refuse the first connection stays; a pool may have as many
    as its entry allows.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    net.connect("ann")
    assert net.try_connect("ann") is None
    net.connect("pool")
    net.connect("pool")
    assert net.try_connect("pool") is None
    assert net.try_connect("nobody") is None


def test_exchange_connection_beyond_limit_replaces_oldest() -> None:
    """With when_connected: replace the oldest connection is closed and the new one is
    accepted.
    """
    net = FakeNet(client("pool", connections=2, when_connected=WhenConnected.REPLACE))
    one, two, three = (net.connect("pool") for _ in range(3))
    assert one.gone == "connection replaced by a new one"
    assert not two.gone
    assert not three.gone


def test_pool_each_connection_has_own_address() -> None:
    """Other clients see the connection that sent, and reach only that one by its
    address.
    """
    net = FakeNet(client("ann"), client("pool", connections=3))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(3)]
    members[1].message("ann", b"hello")
    (got,) = ann.take()
    assert got.name == members[1].address
    assert got.name.startswith("pool/")
    for _ in range(4):
        ann.message(got.name, b"to you")
    assert [len(member.take()) for member in members] == [0, 4, 0]


def test_pool_reply_reaches_connection_that_sent_request() -> None:
    """A REPLY to the address of a pool member goes to that member, even if other
    members are idle.
    """
    net = FakeNet(client("ann", send_to=[]), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    two.request("ann", b"?", 5)
    (request,) = ann.take()
    ann.reply(request.name, b"!", 5)
    assert [(each.kind, each.payload) for each in two.take()] == [(Kind.REPLY, b"!")]
    assert one.take() == []


def test_pool_members_reading_take_turns() -> None:
    """If nothing waits for any member, messages go to the members in turn."""
    net = FakeNet(client("ann"), client("pool", connections=3))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(3)]
    for _ in range(9):
        ann.message("pool")
    assert [len(member.take()) for member in members] == [3, 3, 3]


def test_pool_message_goes_to_member_with_fewest_waiting_bytes() -> None:
    """The fewest waiting bytes decide: one large message for a member outweighs several
    small ones for the other.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block()
    two.block()
    ann.message(one.address, b"x" * 1000)
    for _ in range(10):
        ann.message("pool", b"x" * 10)
    one.read()
    two.read()
    assert [len(one.take()), len(two.take())] == [1, 10]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, StreamOutbox),
        ({"when_full": WhenFull.DROP_OLDEST}, FrameOutbox),
        ({"connections": 2}, StreamOutbox),
    ],
)
def test_outbox_of_drop_oldest_keeps_frames_apart(changes: dict[str, object], kind: type) -> None:
    """Drop_oldest needs single frames; every other client has a stream, which the
    routing loop fills.
    """
    peer = FakeNet(client("ann", **changes)).connect("ann")
    assert type(peer.session.outbox) is kind
    assert peer.session.client.direct is peer.session.outbox


def test_pool_frames_of_disconnected_member_move_to_another() -> None:
    """A message or request to a pool's name is not lost with a member; a partly written
    frame is sent whole.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block(5)
    two.block(0)
    ann.message("pool", b"m1", 1)
    ann.request("pool", b"r2", 2)
    ann.message("pool", b"m3", 3)
    ann.request("pool", b"r4", 4)
    one.leave()
    two.read()
    got = two.take()
    assert sorted(each.id for each in got) == [1, 2, 3, 4]
    for each in got:
        if each.kind is Kind.REQUEST:
            two.reply(each.name, b"!", each.id)
    assert sorted((each.kind, each.id) for each in ann.take()) == [(Kind.REPLY, 2), (Kind.REPLY, 4)]


def test_pool_message_to_disconnected_member_address_is_reported() -> None:
    """A message to an address is for that connection only: its sender is told that the
    member left.
    """
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block()
    ann.message(one.address, b"", 1)
    one.leave()
    assert ann.error() == (1, "offline")
    assert two.take() == []


def test_pool_message_without_room_at_other_member_is_reported() -> None:
    """A message that the other member has no room for is reported, not lost."""
    net = FakeNet(client("ann"), client("pool", connections=2, queue=60))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block()
    two.block()
    ann.message("pool", b"x" * 30, 1)
    ann.message("pool", b"x" * 30, 2)
    (left,) = [1 if one.session.outbox.pieces()[0][15] == 1 else 2]
    one.leave()
    assert ann.error() == (left, "offline")
    two.read()
    assert [each.id for each in two.take()] == [3 - left]


def test_pool_last_member_disconnected_reports_every_frame() -> None:
    """Without another member every waiting message and request is reported, each once."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one = net.connect("ann"), net.connect("pool")
    one.block()
    ann.message("pool", b"", 1)
    ann.request("pool", b"", 2)
    one.leave()
    assert sorted(each.id for each in ann.take()) == [1, 2]
    assert not ann.session.outgoing_requests


def test_pool_moved_request_of_disconnected_sender_is_delivered() -> None:
    """A member takes over the request of a sender that has left, and owes no answer."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    one.block()
    two.block()
    ann.request("pool", b"1", 1)
    ann.request("pool", b"2", 2)
    ann.leave()
    one.leave()
    two.read()
    assert sorted(two.payloads()) == [b"1", b"2"]
    assert not two.session.incoming_requests


def test_outbox_after_reload_changes_kind_only_when_empty() -> None:
    """After a reload an idle connection gets the outbox that its entry requires; a busy
    one keeps its bytes.
    """
    net = FakeNet(client("ann"), client("bob"), client("cid"))
    ann, bob, cid = (net.connect(name) for name in ("ann", "bob", "cid"))
    cid.block()
    ann.message("cid", b"waits")
    ann.message("bob", b"goes")
    changed = {
        name: client(name, when_full=WhenFull.DROP_OLDEST, queue=100) for name in ("bob", "cid")
    }
    net.broker.reconfigure({"ann": client("ann"), **changed}, net.broker.status.limits, net.now)
    assert isinstance(bob.session.outbox, FrameOutbox)
    assert bob.session.messages_out == 1
    assert bob.session.client.direct is bob.session.outbox
    assert isinstance(cid.session.outbox, StreamOutbox)
    assert cid.session.outbox.limit == 100
    for number in range(5):
        ann.message("cid", b"x" * 40, number, receipt=True)
    assert {each.kind for each in ann.take()} == {Kind.RECEIPT, Kind.ERROR}
    cid.read()
    assert cid.payloads()[0] == b"waits"


def test_pool_pick_is_least_loaded_of_all_members() -> None:
    """Whatever the members receive and read, the picked one has the least load, and
    idle ones take turns.
    """
    count = 40
    net = FakeNet(client("ann"), client("pool", connections=count, queue=10_000))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(count)]
    pool = net.broker.exchange.clients["pool"]
    assert len({pool.pick() for _ in range(count)}) == count
    rng = random.Random(4)
    for step in range(1500):
        member = rng.choice(net.peers[1:])
        match rng.randrange(6):
            case 0:
                member.block(rng.choice([0, 0, 10]))
            case 1:
                member.read(rng.choice([None, 20, 300]))
            case 2:
                ann.message(
                    member.address,
                    b"x" * rng.randrange(300),
                    extension={"ttl": rng.choice([1, 50])},
                )
            case 3 if step % 50 == 0:
                member.leave()
                members.append(net.connect("pool"))
            case 4:
                net.advance(0.1)
            case _:
                ann.message("pool", b"x" * rng.randrange(300))
        ann.take()
        if not ann.held:
            picked = pool.pick()
            assert picked is not None
            loads = [(each.outbox.blocked, each.outbox.waiting) for each in pool.sessions.values()]
            assert (picked.outbox.blocked, picked.outbox.waiting) == min(loads)
        assert len(pool._ranks) < 64 + 3 * count


def test_pool_pick_in_large_pool_examines_few_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message to a pool examines a few of its members, whether they read or not."""
    examined = 0

    class CountingOutbox(StreamOutbox):
        @property
        def waiting(self) -> int:
            nonlocal examined
            examined += 1
            return super().waiting

    monkeypatch.setattr("brokerd.core.session.StreamOutbox", CountingOutbox)

    def compared(count: int, *, reading: bool) -> int:
        nonlocal examined
        net = FakeNet(client("ann"), client("pool", connections=count))
        ann = net.connect("ann")
        for _ in range(count):
            member = net.connect("pool")
            if not reading:
                member.block()
                ann.message(member.address, b"x")
        # Loads that have grown without an update are corrected once.
        ann.message("pool", b"x")
        examined = 0
        for _ in range(100):
            ann.message("pool", b"x")
        return examined

    for reading in (False, True):
        assert compared(500, reading=reading) <= 1.2 * compared(20, reading=reading)


def test_pool_pick_after_reload_accepts_outbox_of_former_kind() -> None:
    """A client that becomes a pool while messages wait for it keeps that outbox; the
    idle member is picked.
    """
    net = FakeNet(client("ann"), client("bob"))
    ann, one = net.connect("ann"), net.connect("bob")
    one.block()
    ann.message("bob", b"waits", 1)
    entries = {"ann": client("ann"), "bob": client("bob", connections=2)}
    net.broker.reconfigure(entries, net.broker.status.limits, net.now)
    two = net.connect("bob")
    for message_id in range(2, 6):
        ann.message("bob", b"x", message_id)
    assert [each.id for each in two.take()] == [2, 3, 4, 5]


def test_pool_ranks_are_bounded() -> None:
    """However often members fill, empty and leave, few ranks are kept."""
    net = FakeNet(client("ann"), client("pool", connections=50))
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(50)]
    pool = net.broker.exchange.clients["pool"]
    for _ in range(20):
        for member in members:
            member.block()
        for _ in range(100):
            ann.message("pool", b"x")
        for member in members:
            member.read()
        assert len(pool._ranks) <= 64 + 2 * 50 + 1
    for _ in range(10):
        ann.message("pool", b"x")
    for member in members[:45]:
        member.leave()
        assert len(pool._ranks) <= 64 + 2 * len(pool.sessions) + 1


def test_pool_member_reached_by_address_after_reload_to_drop_oldest() -> None:
    """Senders remember the route of its address, which then leads to the broker."""
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one = net.connect("ann"), net.connect("pool")
    for _ in range(2):
        ann.message(one.address, b"before")
    net.broker.reconfigure(
        {
            "ann": client("ann"),
            "pool": client("pool", connections=2, when_full=WhenFull.DROP_OLDEST),
        },
        net.broker.status.limits,
        net.now,
    )
    for _ in range(2):
        ann.message(one.address, b"after")
    assert one.payloads() == [b"before"] * 2 + [b"after"] * 2


def test_pool_member_reached_by_address_that_leaves_is_offline() -> None:
    net = FakeNet(client("ann"), client("pool", connections=2))
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    for _ in range(2):
        ann.message(one.address, b"x")
    one.leave()
    ann.message(one.address, b"y", 5)
    assert ann.error() == (5, "offline")
    assert two.payloads() == []


def test_outbox_without_owner_may_be_blocked() -> None:
    outbox = StreamOutbox(100)
    outbox.blocked = True
    assert outbox.blocked
