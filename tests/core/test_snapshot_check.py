"""Facts that no process can have captured are refused before anything is restored, and
the error says where they are wrong.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
from support.fake_network import FakeNet, client

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core.broker import Broker
from brokerd.core.snapshot import BadSnapshot, Pieces, capture, restore
from brokerd.core.snapshot_check import check_counters, check_counts, check_incidents, check_numbers

CONFIGS = (
    client("alice"),
    client("bob"),
    client("pool", connections=2, when_full=WhenFull.DROP_OLDEST),
    client("metered", rate=RateConfig(5.0, None)),
)


@functools.cache
def captured() -> tuple[str, bytes]:
    """Return the snapshot of a broker with state of every kind: alice, bob, two members
    of a pool, and a session that has closed.
    """
    net = FakeNet(*CONFIGS)
    alice, bob, first, second = (net.connect(name) for name in ("alice", "bob", "pool", "pool"))
    alice.op("subscribe", 1, topic="a.>")
    bob.op("subscribe", 1, topic="b", group="g")
    alice.request("bob", b"?", 1)
    first.request("bob", b"?", 2)
    for peer in (bob, first, second):
        peer.block(3)
    alice.message("bob", b"waits")
    alice.message("pool", b"waits")
    alice.message("pool", b"waits too")
    net.advance(1)
    third = net.connect("metered")
    alice.message("metered", b"x")
    third.block(2)
    alice.message("metered", b"waits")
    net.peers.remove(third)
    net.broker.detach(third.session, net.now)
    net.broker.held.hold(first.session, bob.session, net.now + 5)
    net.broker.incidents.add_disconnect("metered", "metered", "closed", 5.0)
    net.broker.taps.start(alice.session, "bob", payload=False)
    net.broker.returning.begin(["pool"], net.now + 5)
    snapshot = capture(net.broker, [peer.session for peer in net.peers], net.now)
    return json.dumps(snapshot.facts), b"".join(snapshot.pieces)


def restored(facts: Any, body: bytes) -> int:
    """Restore a snapshot; return how many bytes the new broker leaves unread."""
    pieces = Pieces(body)
    restore(Broker(CONFIGS), facts, pieces, 0.0)
    return len(pieces)


def test_snapshot_check_captured_facts_are_accepted() -> None:
    """The facts that the other tests change are valid."""
    facts, body = captured()

    assert restored(json.loads(facts), body) == 0


MISSING = object()


def of_host(asked: list[object]) -> dict[str, object]:
    """Return the facts of a cluster in which a request went to a client of another host."""
    remote = {"name": "b", "revoked": [], "asked": [asked], "held": [], "senders": []}
    flags = {"joined": True, "suspended": False}
    numbers = {"version": 3, "boot": 1, "number": 1, "size": 0}
    return {"host": "a", "links": [], "remotes": [remote], "events": [], **flags, **numbers}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ((), [], "facts is .*an object"),
        (("dropped",), MISSING, "facts has no dropped"),
        (("started_at",), "soon", "facts.started_at is 'soon', and has to be a number"),
        (("started_at",), float("inf"), "facts.started_at is inf"),
        (("upgrades",), -1, "whole number"),
        (("upgrades",), True, "whole number"),
        (("next_number",), 1.0, "whole number"),
        (("next_number",), 2**63, "whole number"),
        (("next_number",), 1, "came after all that have come"),
        (("refused",), [], "an object"),
        (("totals", "messages_in"), None, "facts.totals.messages_in"),
        (("incidents", 0, 10), "late", "facts.incidents\\[0\\]\\[10\\] is 'late'"),
        (("incidents", 0, 1), ["client.refused"], "a list of 3"),
        (("incidents", 0, 12), [-1], "64-bit"),
        (("taps", 0, 2), None, "true or false"),
        (("taps", 0, 0), 99, "a session taps that is not open"),
        (("taps", 0, 0), 4, "a session taps that is not open"),
        (("returning",), ["pool"], "a list of 2"),
        (("cluster",), "a", "facts.cluster is 'a', and has to be an object"),
        (("cluster",), {"host": "a"}, "facts.cluster has no version"),
        (("cluster",), of_host([99, 1, "bob", None]), "a session that is not open deals with"),
        (("cluster",), of_host([0, -1, "bob", None]), r"asked\[0\]\[1\] is -1"),
        (("returning", 0), [5], "ASCII text"),
        (("sessions",), {}, "a list"),
        (("sessions",), [], "more outboxes than sessions"),
        (("sessions", 0, "name"), "ü", "ASCII text"),
        (("sessions", 0, "address"), "bob", "not below its name"),
        (("sessions", 0, "peer"), 5, "facts.sessions\\[0\\].peer is 5, and has to be text"),
        (("sessions", 0, "configured"), 1, "true or false"),
        (("sessions", 0, "skip"), 2**64, "64-bit"),
        (("sessions", 0, "in"), [0, 0], "a list of 3"),
        (("sessions", 0, "left_at"), 10**6, "came after"),
        (("sessions", 0, "subscriptions"), [["a..b", None]], "a topic pattern"),
        (("sessions", 0, "subscriptions"), [["a", None]] * 2, "subscription twice"),
        (("sessions", 1, "owed"), [["alice", 1, 99]], "names a session that is not there"),
        (("sessions", 1, "owed"), [["alice", 1, 1]], "another address than the session"),
        (("sessions", 0, "asked"), [[1, "bob", -1]], "whole number"),
        (("sessions", 0, "asked"), [[1, "alice", 1]], "another address"),
        (("sessions", 0, "expiring"), [[7, "bob", 5.0]], "a request that was not asked"),
        (
            ("sessions", 0, "expiring"),
            [[1, "bob", 2.0**34]],
            "a number of seconds that a ttl can have",
        ),
        (("sessions", 0, "reached_by_event"), [99], "names a session that is not there"),
        (("outboxes", 1, "marks"), [[0, 2**30, 5.0, False]], "names a frame that is not there"),
        (("outboxes", 1, "marks"), [[3, 3, 5.0, False]], "not in order"),
        (("outboxes", 1, "marks"), [[0, 9, 5.0, True], [8, 12, None, True]], "not in order"),
        (("outboxes", 1, "marks"), [[0, 9, 2**40, False]], "a number of seconds"),
        (("outboxes", 1, "marks"), MISSING, "has no timed"),
        (("deferred",), [{"question": None, "news": None}], "not one job"),
        (
            ("deferred",),
            [{"question": [99, 1, "clients"], "news": None}],
            "names a session that is not open",
        ),
        (
            ("deferred",),
            [{"question": [0, 1, "reload"], "news": None}],
            "an operation with a long answer",
        ),
        (
            ("deferred",),
            [{"question": None, "news": ["jobs", "{}", None, None, []]}],
            "a topic of the broker's own",
        ),
        (
            ("deferred",),
            [{"question": None, "news": ["$a", "{}", None, None, [99]]}],
            "names a session that is not",
        ),
        (("sessions", 3, "address"), "pool/i3", "one address"),
        (("sessions", 3, "number"), 3, "one number"),
        (("clients", "metered", "levels"), None, "does not fit the rate"),
        (("clients", "metered", "levels"), [1.0, 1.0], "does not fit the rate"),
        (("clients", "metered", "levels"), [9.0, None], "more left than its rate"),
        (("clients", "alice", "levels"), [None, None], "does not fit the rate"),
        (("outboxes", 1, "limit"), MISSING, "has no limit"),
        (("outboxes", 1, "chunks"), MISSING, "has no chunks"),
        (("outboxes", 1, "chunks"), [], "no chunk"),
        (("outboxes", 1, "chunks"), [0, 1], "an empty one"),
        (("outboxes", 1, "begun"), 10**6, "beyond what was begun"),
        (("outboxes", 1, "size"), 1, "more bytes than were ever put"),
        (("outboxes", 1, "left"), [["alice", 10**6]], "beyond what waits"),
        (("outboxes", 2, "frames"), 0, "more frames than were ever put"),
        (("outboxes", 2, "queue"), {}, "a list"),
        (("outboxes", 2, "queue", 0, 0), 15, r"queue\[0\] is .*of a frame"),
        (("outboxes", 2, "queue", 0, 1), 16, "of a frame"),
        (("outboxes", 2, "queue", 0, 2), -1, "of a frame"),
        (("outboxes", 2, "queue", 0, 2), 99, "a sender that is not there"),
        (("leaving",), [], "leaving are not"),
        (("leaving", 0, 0), 0, "leaving are not"),
        (("leaving", 0, 1, 0, 2), 99, "a sender that is not there"),
        (("held", 0, 0), 4, "not open"),
        (("held",), [[2, 1, 5.0], [2, 0, 5.0]], "held twice"),
    ],
)
def test_snapshot_check_invalid_value_is_refused(
    path: tuple[Any, ...], value: object, expected: str
) -> None:
    """One value is changed, or removed; the error says which."""
    text, body = captured()
    facts = json.loads(text)
    holder = facts
    for step in path[:-1]:
        holder = holder[step]
    if not path:
        facts = value
    elif value is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = copy.deepcopy(value)

    with pytest.raises(BadSnapshot, match=expected):
        restored(facts, body)


def test_snapshot_check_unknown_key_is_ignored() -> None:
    """A later version may add keys, in the same format."""
    text, body = captured()
    facts = json.loads(text)
    facts["mood"] = facts["sessions"][0]["mood"] = "good"

    assert restored(facts, body) == 0


def test_snapshot_check_facts_of_older_format_are_accepted() -> None:
    """A former version knows nothing of incidents, taps and clients that are awaited."""
    text, body = captured()
    facts = json.loads(text)
    del facts["incidents"], facts["taps"], facts["returning"]

    assert restored(facts, body) == 0


def test_snapshot_check_missing_bytes_are_refused() -> None:
    """All frames to be delivered are there, or nothing is restored."""
    facts, body = captured()

    with pytest.raises(BadSnapshot, match="bytes are wanted where"):
        restored(json.loads(facts), body[:-1])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"\0\0\0\x0c" + bytes(11), "ends inside a frame"),
        (b"\xff\xff\xff\xfe" + bytes(12), "does not consist of frames"),
        (b"\xff\xff\xff\xff" + bytes(7), "ends inside a frame"),
        (b"\xff\xff\xff\xff\0\0\0\0\x80\0\0\0" + bytes(20), "ends inside a frame"),
        (bytes(18), "ends inside a frame"),
    ],
)
def test_snapshot_check_bytes_that_are_not_frames_are_refused(body: bytes, expected: str) -> None:
    """They would be read as frames when their recipient leaves, if not before."""
    text, pieces = captured()
    facts = json.loads(text)
    outbox = facts["outboxes"][0]
    outbox["chunks"], outbox["size"] = [len(body)], 1000

    with pytest.raises(BadSnapshot, match=expected):
        restored(facts, body + pieces)


def test_snapshot_check_two_frames_as_one_are_refused() -> None:
    """Two frames in the place of one would both go to the recipient of the first."""
    text, body = captured()
    facts = json.loads(text)
    queue = facts["outboxes"][2]["queue"]
    first, second = b"\0\0\0\x0c" + bytes(12), b"\0\0\0\x0c" + bytes(12)
    queue[0][0] = len(first + second)
    facts["outboxes"][2]["size"] = 1000
    before = sum(sum(each["chunks"]) for each in facts["outboxes"][:2])

    with pytest.raises(BadSnapshot, match="as one frame is more"):
        restored(facts, body[:before] + first + second + body[before:])


def test_snapshot_check_counter_not_whole_number_is_refused() -> None:
    """Any other value that another process calls a counter is refused, with its place."""
    check_counts({"accepted": 3, "refused": 0}, "reloads")
    for odd in ([], {"accepted": -1}, {"accepted": 0.5}, {"accepted": None}):
        with pytest.raises(BadSnapshot, match=r"^reloads"):
            check_counts(odd, "reloads")


@pytest.mark.parametrize("rows", [{}, [[1, 2, 3]], [[1, 1, 1, 1, 1, -1]]])
def test_snapshot_check_counters_of_other_shape_are_refused(rows: object) -> None:
    check_counters([[1, 1, 1, 1, 1, 1]])
    with pytest.raises(BadSnapshot, match="counts"):
        check_counters(rows)


@pytest.mark.parametrize("rows", [{}, [[]], [["bob", ["x"], "x"]]])
def test_snapshot_check_incidents_of_other_shape_are_refused(rows: object) -> None:
    check_incidents(json.loads(captured()[0])["incidents"])
    with pytest.raises(BadSnapshot, match="incidents"):
        check_incidents(rows)


@pytest.mark.parametrize("numbers", [{}, [None], [-1]])
def test_snapshot_check_numbers_of_other_shape_are_refused(numbers: object) -> None:
    check_numbers([1, 2])
    with pytest.raises(BadSnapshot, match="gone"):
        check_numbers(numbers)
