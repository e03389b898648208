"""The changes that a reload would make, in words."""

from __future__ import annotations

from dataclasses import replace

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


def test_diff_clients_added_removed_and_changed_are_listed() -> None:
    """Each client is in one list only. An entry that only moved to another line is not
    a change.
    """
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
def test_diff_client_key_changed_is_described_in_units_of_file(
    before: str, after: str, phrase: str
) -> None:
    """Each changed key of a client gives one phrase: the value before and the value
    after.
    """
    found = planned(
        f"clients: {{a: {{key: k, {before}}}}}\n", f"clients: {{a: {{key: k, {after}}}}}\n"
    )

    assert found.changed == {"a": (phrase,)}


def test_diff_long_rule_list_is_shortened() -> None:
    """A list of a hundred rules is shortened to its first few."""
    many = ", ".join(f"c{number}*" for number in range(100))

    (phrase,) = planned(
        "clients: {a: {key: k, send_to: []}}\n", f"clients: {{a: {{key: k, send_to: [{many}]}}}}\n"
    ).changed["a"]

    assert phrase.endswith("c7*, and 92 more]")


def test_diff_client_keys_changed_are_named_by_key_id() -> None:
    """A key that is added, removed or valid at another time is named by its id. No
    phrase holds the key itself.
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


def test_diff_client_keys_reordered_is_a_change() -> None:
    """A new order of keys is reported, although it hardly matters."""
    found = planned(
        "clients: {a: {keys: [{key: k}, {key: l}]}}\n",
        "clients: {a: {keys: [{key: l}, {key: k}]}}\n",
    )

    assert found.changed == {"a": ("keys: in another order",)}


def test_diff_listeners_opened_closed_and_changed_are_listed() -> None:
    """Listeners are compared by address. A listener that stays is listed with its
    changes.
    """
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


def test_diff_limits_and_log_changed_are_described_in_units() -> None:
    """The changed keys of each section are given with their units."""
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
def test_diff_new_address_covered_by_closing_listener_is_overlap(
    new: str, old: str, clash: bool
) -> None:
    """New addresses are opened first. An address that a listener to be closed covers
    can't be opened yet.
    """
    found = planned(f"listen: [{old}]\n", f"listen: [{new}]\n")

    assert bool(list(overlaps(found.opened, found.closed))) == clash


def test_diff_section_not_reloadable_is_named_and_keeps_running_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A section that a reload doesn't apply is named in the plan, and keeps its running
    value.
    """
    monkeypatch.setattr(plan, "_RELOADED", plan._RELOADED - {"log"})
    before, after = (
        config(LISTEN),
        config(LISTEN + "log: {level: debug}\nlimits: {connections: 5}\n"),
    )

    assert compare(before, after).restart == ("log changes only with a restart",)
    assert merge(before, after).log == before.log
    assert merge(before, after).limits == after.limits


def test_diff_plan_as_fields_holds_only_plain_values() -> None:
    """The fields are lists, mappings and text only, for a reply and a log event."""
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
        "store": [],
        "cluster": [],
        "orphaned": [],
        "restart": [],
    }


def test_diff_of_key_files_and_empty_patterns_needs_no_restart() -> None:
    """They describe the files of a configuration, and are no settings."""
    before = config("clients: {a: {key: k}}\n")
    after = replace(before, private={"keys/b": "b.yaml:1"}, unmatched=("b.yaml:2: d/*.yaml",))

    assert compare(before, after).restart == ()
