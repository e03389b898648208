"""Announcements: changes are numbered, and a gap is repaired by the whole state."""

from __future__ import annotations

import json
from typing import Any

import pytest

from brokerd.core.cluster.directory import Announcements, Changes, HostDirectory
from brokerd.core.cluster.messages import Malformed
from brokerd.core.cluster.seam import Interest, Name

BOB = Name("bob", 1, 5.0)
ORDERS = Interest("orders.>", "")


def over_the_wire(bodies: Any) -> list[dict[str, Any]]:
    """Return the bodies as another host reads them."""
    return [json.loads(json.dumps(body)) for body in bodies]


def test_change_follows_state() -> None:
    announcements, directory = Announcements(), HostDirectory()
    (state,) = over_the_wire(announcements.state([BOB], [ORDERS]))
    assert directory.misses(0)
    assert directory.change({**state, "number": 1}) is None
    assert directory.take_part(state) == Changes([BOB], [ORDERS])
    announcements.add_name(BOB._replace(connections=2))
    announcements.add_name(BOB._replace(connections=0, since=9.0))
    announcements.add_interest(ORDERS._replace(on=False))
    assert announcements
    (changes,) = over_the_wire(announcements.take())
    assert not announcements
    assert directory.misses(1)
    assert directory.change(changes) == Changes(
        [Name("bob", 0, 9.0)], [Interest("orders.>", "", on=False)]
    )
    assert not directory.misses(1)
    assert directory.names == {}
    assert directory.interests == {}


def test_change_behind_gap_is_refused_until_state_comes() -> None:
    announcements, directory = Announcements(), HostDirectory()
    (state,) = over_the_wire(announcements.state([BOB], [ORDERS]))
    directory.take_part(state)
    for name in ("carol", "dave"):
        announcements.add_name(Name(name, 1, 6.0))
        (changes,) = over_the_wire(announcements.take())
    assert directory.change(changes) is None
    alice = Name("alice", 1, 7.0, free=False, mailbox=True)
    group = Interest("orders.>", "g")
    (state,) = over_the_wire(announcements.state([alice], [group]))
    assert directory.take_part(state) == Changes(
        [Name("bob", 0, 5.0), alice], [ORDERS._replace(on=False), group]
    )
    assert directory.names == {"alice": alice}
    assert list(directory.interests.values()) == [group]
    assert not directory.misses(2)


def test_large_state_is_taken_when_its_last_part_is_there() -> None:
    announcements, directory = Announcements(), HostDirectory()
    names = [Name(f"c{number}", 1, 1.0) for number in range(2500)]
    parts = over_the_wire(announcements.state(names, [ORDERS]))
    assert len(parts) == 3
    assert directory.take_part(parts[2]) is None
    assert directory.take_part(parts[0]) is None
    assert directory.take_part({**parts[0], "number": 7}) is None
    assert directory.take_part(parts[0]) is None
    assert directory.take_part(parts[1]) is None
    assert directory.take_part(parts[2]) == Changes(names, [ORDERS])


def test_many_changes_are_told_in_several_messages() -> None:
    announcements, directory = Announcements(), HostDirectory()
    directory.take_part(over_the_wire(announcements.state([], []))[0])
    for number in range(1500):
        announcements.add_name(Name(f"c{number}", 1, 1.0))
    for body in over_the_wire(announcements.take()):
        assert directory.change(body) is not None
    assert len(directory.names) == 1500


@pytest.mark.parametrize(
    "body",
    [
        {"number": 1},
        {"number": 1, "names": [["bob"]], "interests": []},
        {"number": 1, "names": [["bob", "x", 1, True, True]], "interests": []},
        {"number": 1, "names": [], "interests": [5]},
        {"number": "1", "names": [], "interests": []},
    ],
)
def test_changes_that_can_not_be_read_are_malformed(body: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        HostDirectory().change(body)


def test_state_without_part_is_malformed() -> None:
    body = {"number": 1, "names": [], "interests": [], "part": 1, "parts": 1}
    with pytest.raises(Malformed, match="without its part"):
        HostDirectory().take_part(body)
