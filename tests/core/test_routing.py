"""The routing loop, both twins: frames whole, in pieces, too long, and malformed."""

from __future__ import annotations

import struct

import pytest
from support.fake_network import FakeNet, Feed, Peer, client

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import _routing_py, routing
from brokerd.core.broker import CoreLimits
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import BROKER, Envelope, Flag, Kind, encode
from brokerd_client.wire.framing import frame
from brokerd_client.wire.layout import HEADER

STEPS = pytest.mark.parametrize("step", [None, 1, 3, 16, 17, 100])


@pytest.fixture(params=[_routing_py.feed, routing.feed], ids=["python", routing.NAME])
def feed(request: pytest.FixtureRequest) -> Feed:
    """Return each routing loop that this interpreter can run."""
    loop: Feed = request.param
    return loop


def pair(feed: Feed, max_message: int = 1000) -> tuple[FakeNet, Peer, Peer]:
    """Return a net with ann and bob."""
    net = FakeNet(
        client("ann"), client("bob"), limits=CoreLimits(max_message=max_message), feed=feed
    )
    return net, net.connect("ann"), net.connect("bob")


def body(
    kind: Kind, message_id: int, name: str = "", payload: bytes = b"", **fields: object
) -> bytes:
    """Return a frame's body."""
    return encode(Envelope(kind, message_id, name, payload, **fields))  # type: ignore[arg-type]


def long_frame(whole: bytes, size: int | None = None) -> bytes:
    """Return a frame with the 64-bit length, or with ``size`` as a wrong length."""
    return struct.pack("!iQ", -1, len(whole) if size is None else size) + whole


@STEPS
def test_routing_frames_in_any_segmentation_arrive(feed: Feed, step: int | None) -> None:
    """A stream with every kind of frame gives the same result in any segmentation, with
    long lengths and empty payloads too.
    """
    _, ann, bob = pair(feed)
    bob.ask("subscribe", topic="t.>")
    data = b"".join(
        (
            frame(body(Kind.MESSAGE, 1, "bob", b"one")),
            frame(body(Kind.MESSAGE, 2, "bob")),
            frame(body(Kind.MESSAGE, 3, "bob", b"x" * 1000)),
            long_frame(body(Kind.MESSAGE, 4, "bob", b"long form")),
            frame(body(Kind.EVENT, 5, payload=b"event", topic="t.a")),
            frame(body(Kind.EVENT, 6, topic="t.a")),
            frame(body(Kind.REQUEST, 7, "bob", b"?", flags=Flag.RECEIPT)),
            frame(body(Kind.MESSAGE, 8, "bob", b"ext", codec=200, extension={"x": 1})),
            frame(body(Kind.MESSAGE, 9, "bob", b"last")),
        )
    )
    ann.send_bytes(data, step)
    got = bob.take()
    assert [each.id for each in got] == list(range(1, 10))
    assert [each.payload[:9] for each in got] == [
        b"one",
        b"",
        b"x" * 9,
        b"long form",
        b"event",
        b"",
        b"?",
        b"ext",
        b"last",
    ]
    assert {each.name for each in got} == {"ann"}
    assert (got[7].codec, got[7].extension) == (200, {"x": 1})
    assert [(each.kind, each.id) for each in ann.take()] == [(Kind.RECEIPT, 7)]
    assert ann.session.messages_in == 9
    assert ann.session.bytes_in == len(data) - 9 * 4 - 8
    assert bob.session.messages_out == 10
    assert not ann.content


def test_routing_changes_only_name_and_receipt_flag(feed: Feed) -> None:
    """Only the name changes and the flag RECEIPT is cleared: even odd spaces in an
    extension stay.
    """
    _, ann, bob = pair(feed)
    extension = b'{ "ttl" : 60 ,  "traceparent":"00-\xc3\xa9" , "ttl" : 5.5 }'
    rest = struct.pack("!H", len(extension)) + extension + bytes(range(256))
    ann.send_bytes(frame(struct.pack("!BBBBQ", 1, 3, 77, 3, 2**64 - 1) + b"bob" + rest))
    assert bytes(bob.stream) == frame(struct.pack("!BBBBQ", 1, 2, 77, 3, 2**64 - 1) + b"ann" + rest)


@STEPS
@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("kind", [Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.EVENT])
def test_routing_oversized_frame_is_skipped(
    feed: Feed, kind: Kind, length: str, step: int | None
) -> None:
    """It is answered with its id and the recipient's name, and the next frame arrives."""
    _, ann, bob = pair(feed)
    name, topic = ("", "t") if kind is Kind.EVENT else ("bob", "")
    large = body(kind, 7, name, b"x" * 1500, topic=topic)
    oversized = frame(large) if length == "short" else long_frame(large)
    ann.send_bytes(oversized + frame(body(Kind.MESSAGE, 8, "bob", b"next")), step)
    (error,) = ann.take()
    assert (error.kind, error.id, error.name) == (Kind.ERROR, 7, "$broker")
    assert b'"too_large"' in error.payload
    assert (b'"name": "%s"' % name.encode()) in error.payload
    assert bob.payloads() == [b"next"]


def test_routing_message_of_max_message_bytes_passes(feed: Feed) -> None:
    """A payload of exactly max_message bytes is not too large; one more byte is."""
    _, ann, bob = pair(feed)
    for size in (1000, 1001, 1000):
        ann.message("bob", b"x" * size, size)
    assert [each.id for each in bob.take()] == [1000, 1000]
    assert ann.error() == (1001, "too_large")


@pytest.mark.parametrize("size", [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@STEPS
def test_routing_frame_with_absurd_length_is_skipped_unstored(
    feed: Feed, size: int, step: int | None
) -> None:
    """However long the announced frame is, its bytes are skipped as they arrive, and
    the connection stays open.
    """
    _, ann, bob = pair(feed)
    ann.send_bytes(long_frame(body(Kind.MESSAGE, 7, "bob", b"x"), size), step)
    assert ann.error() == (7, "too_large")
    ann.send_bytes(b"y" * 100_000)
    assert ann.content == b""
    assert ann.session.bytes_to_skip == size - 16 - 100_000
    assert not ann.gone
    assert bob.take() == []
    bob.message("ann", b"still there")
    assert ann.payloads() == [b"still there"]


def test_routing_oversized_frame_with_invalid_name_omits_it(feed: Feed) -> None:
    """An invalid name does not appear in the ERROR."""
    _, ann, _ = pair(feed)
    ann.send_bytes(frame(struct.pack("!BBBBQ", 1, 0, 0, 4, 7) + b"\xff<>\x00" + b"x" * 2000))
    (error,) = ann.take()
    assert b'"name": ""' in error.payload


def test_routing_oversized_frame_is_answered_once_name_has_arrived(feed: Feed) -> None:
    """An oversized frame is not answered before all of its name has arrived."""
    _, ann, _ = pair(feed)
    whole = frame(body(Kind.MESSAGE, 7, "bob", b"x" * 2000))
    ann.send_bytes(whole[:18])
    assert ann.take() == []
    ann.send_bytes(whole[18:19])
    assert ann.error() == (7, "too_large")


MALFORMED = [
    pytest.param(struct.pack("!i", -2), 0, id="negative length"),
    pytest.param(struct.pack("!i", -(2**31)), 0, id="most negative length"),
    pytest.param(struct.pack("!i", 0), 0, id="empty"),
    pytest.param(struct.pack("!i", 11) + b"x" * 11, 0, id="shorter than a header"),
    pytest.param(struct.pack("!iQ", -1, 3) + b"abc", 0, id="long form shorter than a header"),
    pytest.param(frame(struct.pack("!BBBBQ", 0, 0, 0, 3, 9) + b"bob"), 9, id="kind 0"),
    pytest.param(frame(struct.pack("!BBBBQ", 10, 0, 0, 3, 9) + b"bob"), 9, id="kind 10"),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 8, 0, 3, 9) + b"bob"), 9, id="unknown flag"),
    pytest.param(
        frame(struct.pack("!BBBBQ", 1, 0, 0, 9, 9) + b"bob"), 9, id="name longer than the frame"
    ),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 0, 0, 2, 9) + b"\xff\xff"), 9, id="name not UTF-8"),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 0, 0, 0, 9)), 9, id="empty name"),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 0, 0, 3, 9) + b"a b"), 9, id="invalid client name"),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 0, 0, 4, 9) + b"bob/"), 9, id="empty instance"),
    pytest.param(frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 9) + b"bob"), 9, id="missing extension"),
    pytest.param(
        frame(struct.pack("!BBBBQH", 1, 2, 0, 3, 9, 0x626F) + b"b\x00\x09{}"),
        9,
        id="extension cut short",
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 9) + b"bob\x00\x02[]"),
        9,
        id="extension not an object",
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 1, 2, 0, 3, 9) + b'bob\x00\x0b{"ttl":NaN}'),
        9,
        id="extension not JSON",
    ),
    pytest.param(frame(struct.pack("!BBBBQ", 5, 0, 0, 0, 9)), 9, id="event without a topic"),
    pytest.param(
        frame(struct.pack("!BBBBQ", 5, 0, 0, 0, 9) + b"\x00"), 9, id="event with an empty topic"
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 5, 0, 0, 0, 9) + b"\x09abc"),
        9,
        id="topic longer than the frame",
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 5, 0, 0, 0, 9) + b"\x01*"), 9, id="event on a wildcard"
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 5, 0, 0, 0, 9) + b"\x04a..b"), 9, id="event on an empty token"
    ),
    pytest.param(
        frame(struct.pack("!BBBBQ", 5, 0, 0, 3, 9) + b"bob\x01a"), 9, id="event with a recipient"
    ),
]


@pytest.mark.parametrize("step", [None, 1, 5])
@pytest.mark.parametrize(("data", "message_id"), MALFORMED)
def test_routing_malformed_frame_closes_connection(
    feed: Feed, data: bytes, message_id: int, step: int | None
) -> None:
    """It is answered with its id, or 0 if none was readable. Frames before it are
    delivered, frames behind it are not.
    """
    _, ann, bob = pair(feed)
    good = frame(body(Kind.MESSAGE, 1, "bob", b"before"))
    ann.send_bytes(good + data + frame(body(Kind.MESSAGE, 2, "bob", b"after")), step)
    assert ann.error() == (message_id, "malformed")
    assert ann.gone == "malformed"
    assert bob.payloads() == [b"before"]


def test_routing_malformed_frame_closes_after_answer_is_written(feed: Feed) -> None:
    """A client that reads slowly still gets the ERROR about its malformed frame."""
    _, ann, _ = pair(feed)
    ann.block(10)
    ann.send_bytes(struct.pack("!i", -5) + b"x" * 100)
    assert not ann.gone
    assert not ann.reading
    ann.read()
    assert ann.error() == (0, "malformed")
    assert ann.gone == "malformed"


def test_routing_cached_route_ends_at_disconnect_reload_and_drain(feed: Feed) -> None:
    """A cached route is not used after a recipient has left, after the rules have
    changed, or in a drain.
    """
    net, ann, bob = pair(feed)
    ann.message("bob", b"1", 1)
    ann.message("bob", b"2", 2)
    bob.leave()
    ann.message("bob", b"3", 3)
    assert ann.error() == (3, "offline")
    bob2 = net.connect("bob")
    ann.message("bob", b"4", 4)
    assert bob2.payloads() == [b"4"]
    denied = {"ann": client("ann", send_to=[]), "bob": client("bob")}
    net.broker.reconfigure(denied, net.broker.status.limits, net.now)
    ann.message("bob", b"5", 5)
    assert ann.error() == (5, "denied")
    net.broker.reconfigure({**denied, "ann": client("ann")}, net.broker.status.limits, net.now)
    ann.message("bob", b"6", 6)
    net.broker.drain()
    ann.message("bob", b"7", 7)
    assert ann.error() == (7, "shutting_down")
    assert bob2.payloads() == [b"6"]


def test_routing_cached_fanout_ends_when_subscribers_change(feed: Feed) -> None:
    """A client that subscribes or leaves between two events is taken into account at
    the second.
    """
    _, ann, bob = pair(feed)
    bob.ask("subscribe", topic="t")
    for number in range(3):
        ann.publish("t", b"%d" % number)
    ann.ask("subscribe", topic="t")
    ann.publish("t", b"3")
    ann.publish("t", b"4")
    assert bob.payloads() == [b"0", b"1", b"2", b"3", b"4"]
    bob.leave()
    ann.publish("t", b"5")
    assert ann.payloads() == [b"3", b"4", b"5"]


def test_routing_yields_at_end_of_turn_budget(feed: Feed) -> None:
    """Frames on the slow path are handled until the turn budget is used up; those that
    stay in the loop do not count.
    """
    net, ann, bob = pair(feed)
    ann.message("bob", b"0")
    ping = frame(encode(Envelope(Kind.REQUEST, 1, BROKER, b'{"op": "ping"}', codec=2)))
    message = frame(encode(Envelope(Kind.MESSAGE, 2, "bob", b"x")))
    data = memoryview((ping + message * 5) * 4)
    net.broker.turn.budget = 3

    position, result = feed(net.broker, ann.session, data, 0, len(data), 0.0)

    assert (position, result) == (3 * len(data) // 4, RoutingResult.YIELD)
    net.broker.turn.budget = 3
    assert feed(net.broker, ann.session, data, position, len(data), 0.0) == (
        len(data),
        RoutingResult.CONSUMED,
    )
    net.settle()
    assert len(bob.take()) == 21
    assert [answer.kind for answer in ann.take()] == [Kind.REPLY] * 4


def test_routing_replies_of_one_read_find_their_requesters(feed: Feed) -> None:
    """Names of one length, and a name that begins with another."""
    names = ["ann", "eve", "anna", "ann", "ann", "eve", "anna", "eve"]
    net = FakeNet(*map(client, {*names, "bob"}), feed=feed)
    peers = {name: net.connect(name) for name in dict.fromkeys(names)}
    bob = net.connect("bob")
    for number, name in enumerate(names):
        peers[name].request("bob", message_id=number)
    bob.take()

    bob.send_bytes(b"".join(frame(body(Kind.REPLY, n, name)) for n, name in enumerate(names)))

    answered = {name: [answer.id for answer in peers[name].take()] for name in peers}
    assert answered == {"ann": [0, 3, 4], "eve": [1, 5, 7], "anna": [2, 6]}


@pytest.mark.parametrize("payload", [b"x" * 20, b"too large" * 200])
def test_routing_incomplete_frame_takes_nothing_of_turn_budget(feed: Feed, payload: bytes) -> None:
    """A read that ends within a frame is settled as quickly as one that ends with it."""
    net, ann, bob = pair(feed)
    ann.message("bob", b"0")
    data = frame(encode(Envelope(Kind.MESSAGE, 2, "bob", payload)))
    net.broker.turn.budget = 3

    for cut in range(min(len(data), 4 + HEADER.size + len("bob"))):
        view = memoryview(data[:cut])
        assert feed(net.broker, ann.session, view, 0, cut, 0.0) == (0, RoutingResult.CONSUMED)

    assert net.broker.turn.budget == 3
    assert bob.payloads() == [b"0"]


def test_routing_yields_during_search_of_many_patterns(feed: Feed) -> None:
    """An event that thousands of patterns nearly match is delivered in order, after
    many turns of other clients.
    """
    net = FakeNet(client("ann"), client("bob", subscriptions=20_000), feed=feed)
    ann, bob = net.connect("ann"), net.connect("bob")
    for number in range(4096):
        net.broker.topics.add(
            ".".join("a*"[number >> bit & 1] for bit in range(12)) + ".no", bob.session
        )
    bob.ask("subscribe", topic="a.>")
    topic = ".".join("a" * 12)
    events = [
        frame(encode(Envelope(Kind.EVENT, 0, "", b"%d" % n, topic=f"{topic}.{n}")))
        for n in range(3)
    ]
    data = memoryview(b"".join(events))
    position, turns = 0, 0
    while position < len(data):
        net.broker.turn.budget = 8
        position, result = feed(net.broker, ann.session, data, position, len(data), 0.0)
        turns += result is RoutingResult.YIELD
    net.settle()
    assert turns > 3 * 8192 // (10 * 64)
    assert bob.payloads() == [b"0", b"1", b"2"]


def test_routing_yields_during_search_of_many_groups(feed: Feed) -> None:
    """An event for thousands of groups is delivered once to each chosen member, after
    many turns of other clients.
    """
    net = FakeNet(client("ann"), client("pool", connections=4), feed=feed)
    ann, pool = net.connect("ann"), [net.connect("pool") for _ in range(4)]
    for member in pool:
        for number in range(2000):
            net.broker.topics.add("a.b", member.session, f"g{number}")
            member.session.subscriptions.add(("a.b", f"g{number}"))
    # One of many is found before the last turn, in whatever order the search goes.
    own = {f"own{number}" for number in range(20)}
    for group in own:
        pool[0].ask("subscribe", topic="a.b", group=group)
    data = memoryview(
        b"".join(
            frame(encode(Envelope(Kind.EVENT, 0, "", b"%d" % n, topic="a.b"))) for n in range(3)
        )
    )
    position, turns = 0, 0
    while position < len(data):
        net.broker.turn.budget = 8
        position, result = feed(net.broker, ann.session, data, position, len(data), 0.0)
        turns += result is RoutingResult.YIELD
        search = net.broker.topics._searches.get(ann.session)
        if pool[0].session.open and search is not None and own & search.matches.groups.keys():
            # A member that has left gets no event, though the search has found it.
            pool[0].leave()
    net.settle()
    assert turns > 6000 * 4 // (10 * 64)
    assert not pool[0].session.open
    assert sorted(payload for member in pool[1:] for payload in member.payloads()) == [
        b"0",
        b"1",
        b"2",
    ]


def test_routing_event_is_charged_by_nodes_and_subscribers(feed: Feed) -> None:
    """The nodes of the tree that are visited and the subscribers count for the sender's
    turn budget.
    """
    net = FakeNet(
        client("ann"), client("pool", connections=65, when_full=WhenFull.DROP_OLDEST), feed=feed
    )
    ann, pool = net.connect("ann"), [net.connect("pool") for _ in range(65)]
    for each in pool:
        net.broker.topics.add("t", each.session)
    for number in range(1024):
        net.broker.topics.add(
            ".".join("a*"[number >> bit & 1] for bit in range(10)) + ".no", pool[0].session
        )
    costs = []
    for topic in ("nobody", ".".join("a" * 10) + ".x", "t", "t"):
        data = memoryview(frame(encode(Envelope(Kind.EVENT, 0, "", topic=topic))))
        net.broker.turn.budget = 100
        assert feed(net.broker, ann.session, data, 0, len(data), 0.0) == (
            len(data),
            RoutingResult.CONSUMED,
        )
        costs.append(99 - net.broker.turn.budget)
    # The matches are cached; a pool's members are gone through all the same.
    assert costs[0] == 0
    assert costs[1] == 2047 // 64
    assert costs[2] > costs[3] == 65 // 32


def test_routing_search_of_disconnected_publisher_is_discarded(feed: Feed) -> None:
    """A publisher that leaves during a search leaves nothing of it behind."""
    net, ann, bob = pair(feed)
    bob.ask("subscribe", topic=">")
    data = memoryview(frame(encode(Envelope(Kind.EVENT, 0, "", topic=".".join("a" * 128)))))
    for number in range(127):
        net.broker.topics.add(".".join("a" * (number + 1)) + ".*.b", bob.session)
    net.broker.turn.budget = 1
    assert feed(net.broker, ann.session, data, 0, len(data), 0.0) == (0, RoutingResult.YIELD)
    assert net.broker.topics._searches
    ann.leave()
    assert not net.broker.topics._searches


def test_routing_messages_in_a_row_arrive_like_single_ones(feed: Feed) -> None:
    """Messages to one recipient behind each other, and all that may end such a row: the
    outboxes get the same bytes as if each frame came alone.
    """
    clients = (
        *(client(name) for name in ("ann", "bob", "bo2")),
        client("dee", queue=300, when_full=WhenFull.REFUSE),
    )
    frames = [
        *(frame(body(Kind.MESSAGE, number, "bob", b"x" * 50_000)) for number in range(4)),
        frame(body(Kind.MESSAGE, 4, "bob")),
        frame(body(Kind.MESSAGE, 5, "bo2", b"another recipient")),
        frame(body(Kind.MESSAGE, 6, "bo2", b"", codec=9)),
        frame(body(Kind.MESSAGE, 7, "bo2", b"flags", flags=Flag.RECEIPT)),
        frame(body(Kind.MESSAGE, 8, "bo2", b"too large" * 10_000)),
        frame(body(Kind.EVENT, 9, topic="t")),
        frame(body(Kind.REQUEST, 10, "bo2", b"kind")),
        *(frame(body(Kind.MESSAGE, number, "dee", b"full")) for number in range(11, 31)),
        long_frame(body(Kind.MESSAGE, 31, "bob", b"length")),
        frame(body(Kind.MESSAGE, 32, "bob", b"last")),
    ]
    whole = b"".join(frames)
    results = []
    for parts in (frames, [whole], [whole[:-3], whole[-3:]]):
        net = FakeNet(*clients, limits=CoreLimits(max_message=70_000), feed=feed)
        ann, *others = (net.connect(each.name) for each in clients)
        for each in others:
            ann.message(each.name)
            each.block()
        for part in parts:
            ann.send_bytes(part)
        sessions = [each.session for each in (ann, *others)]
        results.append(
            [(b"".join(each.outbox.pieces()), each.outbox.frames) for each in sessions]
            + [(each.messages_in, each.bytes_in, each.bytes_out) for each in sessions]
        )
        assert sessions[1].outbox.waiting > 200_000
    assert results[0] == results[1] == results[2]


def test_routing_never_exceeds_queue_quota(feed: Feed) -> None:
    """Messages in one buffer do not exceed the quota of a recipient that does not read,
    not by one byte.
    """
    net = FakeNet(client("ann"), client("bob", queue=100, when_full=WhenFull.REFUSE), feed=feed)
    ann, bob = net.connect("ann"), net.connect("bob")
    ann.message("bob")
    bob.block()
    one = frame(body(Kind.MESSAGE, 1, "bob", b"x" * 14))
    ann.send_bytes(one * 10)
    assert bob.session.outbox.waiting == 99
    assert len(ann.take()) == 7


def pool_of(feed: Feed, size: int) -> tuple[Peer, list[Peer]]:
    """Return a client that has sent one message to a pool, and the pool's members."""
    net = FakeNet(client("ann"), client("bob"), client("pool", connections=size), feed=feed)
    ann = net.connect("ann")
    members = [net.connect("pool") for _ in range(size)]
    ann.message("pool")
    assert sum(len(member.take()) for member in members) == 1
    return ann, members


def ids(peer: Peer) -> list[int]:
    return [each.id for each in peer.take()]


@pytest.mark.parametrize("count", [3, 30, 1900])
def test_routing_pool_members_take_turns_in_short_read(feed: Feed, count: int) -> None:
    """Each member gets one message before any gets two, in a read of less than 64 KiB."""
    ann, members = pool_of(feed, 3)
    ann.send_bytes(b"".join(frame(body(Kind.MESSAGE, n, "pool", b"x" * 14)) for n in range(count)))
    got = [ids(member) for member in members]
    assert sorted(got) == [list(range(first, count, 3)) for first in range(3)]


@pytest.mark.parametrize("size", [2, 7, 200])
def test_routing_pool_members_get_runs_in_long_read(feed: Feed, size: int) -> None:
    """Members get equally many messages of a read, some in a row where it has many for
    each of them.
    """
    ann, members = pool_of(feed, size)
    count = 200 * 20 + 13
    ann.send_bytes(b"".join(frame(body(Kind.MESSAGE, n, "pool", b"x" * 14)) for n in range(count)))
    got = sorted(ids(member) for member in members)
    assert sorted(number for each in got for number in each) == list(range(count))
    assert all(each == sorted(each) for each in got)
    numbers = [len(each) for each in got]
    assert max(numbers) - min(numbers) <= _routing_py.LONGEST_RUN
    assert got[0][:16] == list(range(16))
    assert got[1][:16] == list(range(16, 32))


def test_routing_pool_members_get_equally_many_of_runs_cut_short(feed: Feed) -> None:
    """Another message behind each run and one more to the pool does not leave one of two
    members with a run each time, and the other one with a single message.
    """
    ann, members = pool_of(feed, 2)
    ann.message("bob")
    one, other = frame(body(Kind.MESSAGE, 1, "pool", b"x")), frame(body(Kind.MESSAGE, 2, "bob"))
    ann.send_bytes((one * (_routing_py.LONGEST_RUN + 1) + other) * 300)
    numbers = [len(member.take()) for member in members]
    assert sum(numbers) == 300 * (_routing_py.LONGEST_RUN + 1)
    assert abs(numbers[0] - numbers[1]) <= _routing_py.LONGEST_RUN


def test_routing_pool_members_take_turns_for_sender_with_rate(feed: Feed) -> None:
    """Each message of a sender with a rate is measured by itself; there are no runs."""
    net = FakeNet(
        client("ann", rate=RateConfig(100_000.0, None)), client("pool", connections=2), feed=feed
    )
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    ann.message("pool")
    one.take()
    two.take()
    ann.send_bytes(b"".join(frame(body(Kind.MESSAGE, n, "pool", b"x" * 90)) for n in range(1000)))
    assert sorted([ids(one), ids(two)]) == [list(range(0, 1000, 2)), list(range(1, 1000, 2))]


def test_routing_pool_member_without_room_ends_its_run(feed: Feed) -> None:
    """A member whose queue is full in the middle of a run gets no more than fit, and
    nothing is lost.
    """
    net = FakeNet(
        client("ann"), client("pool", connections=2, queue=3000, in_flight=None), feed=feed
    )
    ann, one, two = net.connect("ann"), net.connect("pool"), net.connect("pool")
    ann.message("pool")
    one.take()
    two.take()
    count = 4000
    ann.send_bytes(b"".join(frame(body(Kind.MESSAGE, n, "pool", b"x" * 500)) for n in range(count)))
    got = ids(one), ids(two)
    assert sorted(got[0] + got[1]) == list(range(count))
    assert all(each == sorted(each) for each in got)
