"""What a reload would change, in words."""

from __future__ import annotations

import pytest

from brokerd.config import diff as plan
from brokerd.config.diff import Plan, compare, merge, overlaps
from brokerd.config.load import load_text
from brokerd.config.model import Config

LISTEN = "listen: [/run/b.sock]\n"


def config(text: str) -> Config:
    return load_text(text if "listen" in text else LISTEN + text)


def planned(before: str, after: str) -> Plan:
    return compare(config(before), config(after))


def test_clients_come_go_and_change() -> None:
    """Each client is in one list, and moved lines are no change."""
    found = planned(
        "clients: {a: {key: a}, b: {key: b}, c: {key: c}}\n",
        "clients:\n  d: {key: d}\n  c: {key: c, admin: true}\n  a: {key: a}\n",
    )

    assert (found.added, found.removed) == (("d",), ("b",))
    assert found.changed == {"c": ("admin: false -> true",)}


@pytest.mark.parametrize(
    ("before", "after", "phrase"),
    [
        ("queue: 8MiB", "queue: 1000", "queue: 8MiB -> 1000 bytes"),
        ("send_to: [a]", "send_to: []", "send_to: [a] -> []"),
        ("publish: ['x.*']", "publish: ['y.>']", "publish: [x.*] -> [y.>]"),
        ("rate: {messages: 5/s}", "rate: {bytes: 1kB/s}", "rate: 5 messages/s -> 1000 bytes/s"),
        ("rate: {messages: 5/s}", "admin: false", "rate: 5 messages/s -> no limit"),
        ("admin: false", "peer_uid: [0, 5]", "peer_uid: all -> [0, 5]"),
        ("when_full: wait", "when_full: refuse", "when_full: wait -> refuse"),
        ("connections: 2", "connections: 4", "connections: 2 -> 4"),
        ("in_flight: 5", "admin: false", "in_flight: 5 -> none"),
    ],
)
def test_what_changes_is_said_in_the_units_of_the_file(
    before: str, after: str, phrase: str
) -> None:
    """A phrase for each key of the client: what it was, and what it will be."""
    found = planned(
        f"clients: {{a: {{key: k, {before}}}}}\n", f"clients: {{a: {{key: k, {after}}}}}\n"
    )

    assert found.changed == {"a": (phrase,)}


def test_long_lists_are_cut() -> None:
    """A hundred rules are not repeated whole."""
    many = ", ".join(f"c{number}*" for number in range(100))

    (phrase,) = planned(
        "clients: {a: {key: k, send_to: []}}\n", f"clients: {{a: {{key: k, send_to: [{many}]}}}}\n"
    ).changed["a"]

    assert phrase.endswith("c7*, and 92 more]")


def test_keys_are_named_by_their_ids() -> None:
    """A key that comes, goes or gets another time is told by its id; the key is in no
    phrase.
    """
    before = config("clients: {a: {keys: [{key: secret-one}, {key: secret-two}]}}\n")
    after = config(
        "clients: {a: {keys: [{key: secret-two, not_after: 2030-01-01}, {key: secret-three}]}}\n"
    )
    one, two = (key.key_id for key in before.clients["a"].keys)
    three = after.clients["a"].keys[1].key_id

    phrases = compare(before, after).changed["a"]

    assert phrases == (
        f"key {two}: accepted always -> until 2030-01-01T00:00:00Z",
        f"key {three} added (key)",
        f"key {one} removed (key)",
    )
    assert "secret" not in "".join(phrases)


def test_another_order_of_keys_is_a_change() -> None:
    """Nothing is hidden, even if it hardly matters."""
    found = planned(
        "clients: {a: {keys: [{key: k}, {key: l}]}}\n",
        "clients: {a: {keys: [{key: l}, {key: k}]}}\n",
    )

    assert found.changed == {"a": ("keys: in another order",)}


def test_listeners_open_close_and_change() -> None:
    """By address; what changes about one that stays is said."""
    found = planned(
        "listen: [/run/a, {address: /run/b, mode: '0600'}]\n",
        "listen: [{address: /run/b, mode: '0660', group: 5, allow_md5: true}, 127.0.0.1:6000]\n",
    )

    assert [str(entry.address) for entry in found.opened] == ["127.0.0.1:6000"]
    assert [str(entry.address) for entry in found.closed] == ["/run/a"]
    assert [(str(entry.address), changes) for entry, changes in found.altered] == [
        (
            "/run/b",
            ("mode: 0600 -> 0660", "group: the broker's own -> 5", "allow_md5: false -> true"),
        )
    ]


def test_limits_and_log() -> None:
    """Each section's keys, in their units."""
    found = planned(
        "limits: {max_message: 16MiB, drain_timeout: 1.5, expiry_warning: 7d}\n",
        "limits: {max_message: 1GiB, drain_timeout: 2h}\nlog: {level: debug}\n",
    )

    assert found.limits == (
        "max_message: 16MiB -> 1GiB",
        "drain_timeout: 1.5s -> 2h",
        "expiry_warning: 7d -> 14d",
    )
    assert found.log == ("level: info -> debug",)


@pytest.mark.parametrize(
    ("new", "old", "clash"),
    [
        ("0.0.0.0:6000", "127.0.0.1:6000", True),
        ("127.0.0.1:6000", "0.0.0.0:6000", True),
        ("localhost:6000", "127.0.0.1:6000", True),
        ("127.0.0.1:6001", "0.0.0.0:6000", False),
        ("127.0.0.1:6000", "127.0.0.2:6000", False),
        ("'[::]:6000'", "0.0.0.0:6000", False),
        ("127.0.0.1:6000", "/run/b", False),
        ("127.0.0.1:0", "0.0.0.0:0", False),
    ],
)
def test_an_address_inside_one_that_is_to_be_closed_is_seen(
    new: str, old: str, clash: bool
) -> None:
    """New addresses are opened first: one that the old one covers can't be."""
    found = planned(f"listen: [{old}]\n", f"listen: [{new}]\n")

    assert bool(list(overlaps(found.opened, found.closed))) == clash


def test_what_only_a_restart_takes_over_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the configuration that no reload takes over is named, and keeps its
    running value.
    """
    monkeypatch.setattr(plan, "_RELOADED", plan._RELOADED - {"log"})
    before, after = (
        config(LISTEN),
        config(LISTEN + "log: {level: debug}\nlimits: {connections: 5}\n"),
    )

    assert compare(before, after).restart == ("log changes only with a restart",)
    assert merge(before, after).log == before.log
    assert merge(before, after).limits == after.limits


def test_the_plan_as_fields_is_plain() -> None:
    """Lists, mappings and text only, for a reply and a log event."""
    found = planned("clients: {a: {key: a}}\n", "listen: [/run/c]\nclients: {b: {key: b}}\n")

    assert found.as_fields() == {
        "added": ["b"],
        "changed": {},
        "removed": ["a"],
        "opened": ["/run/c"],
        "closed": ["/run/b.sock"],
        "altered": {},
        "limits": [],
        "log": [],
        "monitor": [],
        "restart": [],
    }
