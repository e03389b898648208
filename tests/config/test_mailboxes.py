"""Mailboxes and their store in the configuration, and in the plan of a reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from brokerd.config.diff import compare, merge
from brokerd.config.isolation import Isolation
from brokerd.config.load import load_isolated, load_text
from brokerd.config.memory_bound import memory_bound
from brokerd.config.model import Config
from brokerd.config.problems import ConfigError
from brokerd.config.text_files import DEFAULT_CONFIG
from brokerd.config.values import StoreConfig, WhenFull

HEAD = "listen: [/run/b.sock]\n"


def loaded(clients: str, store: str = "store: st\n", **environ: str) -> Config:
    return load_text(f"{HEAD}{store}clients: {clients}\n", "/etc/b.yaml", environ)


def problems(clients: str, store: str = "store: st\n") -> list[str]:
    with pytest.raises(ConfigError) as refused:
        loaded(clients, store)
    return [str(problem) for problem in refused.value.problems]


def test_mailbox_true_has_the_defaults() -> None:
    config = loaded("{a: {key: k, mailbox: true}}")
    mailbox = config.clients["a"].mailbox
    assert mailbox is not None
    assert (mailbox.size, mailbox.messages, mailbox.ttl) == (1 << 30, 1_000_000, None)
    assert (mailbox.window, mailbox.attempts, mailbox.dead) == (64, 10, 0.2)
    assert (mailbox.when_full, mailbox.max_message) == (WhenFull.REFUSE, 1 << 20)
    assert (mailbox.subscribe, mailbox.ack_timeout) == ((), None)
    assert config.store == StoreConfig("/etc/st", 256 << 20, 3600.0)


def test_mailbox_false_and_missing_are_none() -> None:
    config = loaded("{a: {key: k, mailbox: false}, b: {key: l}}", store="")
    assert config.clients["a"].mailbox is None
    assert config.clients["b"].mailbox is None
    assert config.store is None


def test_mailbox_options_are_read() -> None:
    config = loaded(
        "{a: {key: k, mailbox: {size: 2GiB, ttl: 7d, subscribe: ['a.>'], when_full: wait,"
        " dead: 5%, ack_timeout: 90s}}}",
        "store: {path: /s, min_free: 0, dedup: 1d}\n",
    )
    mailbox = config.clients["a"].mailbox
    assert mailbox is not None
    assert (mailbox.size, mailbox.ttl, mailbox.dead) == (2 << 30, 604800.0, 0.05)
    assert [rule.pattern for rule in mailbox.subscribe] == ["a.>"]
    assert (mailbox.when_full, mailbox.ack_timeout) == (WhenFull.WAIT, 90.0)
    assert config.store == StoreConfig("/s", 0, 86400.0)


@pytest.mark.parametrize(
    ("client", "fault"),
    [
        ("{key: k, mailbox: {when_full: drop_oldest}}", "is not a valid treatment"),
        ("{key: k, mailbox: {dead: 120%}}", "is not a valid share"),
        ("{key: k, mailbox: {dead: 0.2}}", "is not a valid share"),
        ("{key: k, mailbox: {window: 10001}}", "mailbox.window"),
        ("{key: k, mailbox: {attempts: 0}}", "mailbox.attempts"),
        ("{key: k, mailbox: {sizes: 1}}", "did you mean 'size'"),
        ("{key: k, mailbox: 5}", "is a number"),
        ("{key: k, mailbox: {subscribe: ['$broker.>']}}", "events of the broker are not stored"),
        (
            "{key: k, subscribe: ['a.>'], mailbox: {subscribe: ['>']}}",
            "> is outside the client's rule subscribe (a.>)",
        ),
        ("{key: k, admin: maybe}", "give true, false or payload"),
    ],
)
def test_mailbox_mistake_is_one_problem(client: str, fault: str) -> None:
    (problem,) = problems(f"{{a: {client}}}")
    assert fault in problem


def test_mailbox_without_a_store_is_a_mistake() -> None:
    (problem,) = problems("{a: {key: k, mailbox: true}}", store="")
    assert "clients.a.mailbox: needs a directory to be kept in" in problem


def test_store_is_by_default_the_state_directory() -> None:
    clients = "{a: {key: k, mailbox: true}}"
    for store in ("", "store: {min_free: 256MiB}\n"):
        config = loaded(clients, store, STATE_DIRECTORY="/var/lib/b:/other")
        assert config.store == StoreConfig("/var/lib/b", 256 << 20, 3600.0)


@pytest.mark.parametrize(
    ("environ", "path"), [({}, "/var/lib/brokerd"), ({"STATE_DIRECTORY": "/state"}, "/state")]
)
def test_store_of_default_file_is_that_of_the_service(environ: dict[str, str], path: str) -> None:
    """So `brokerd check`, run by root, finds what the service has from systemd."""
    text = f"{HEAD}clients: {{a: {{key: k, mailbox: true}}}}\n"
    config = load_text(text, DEFAULT_CONFIG, environ)
    assert config.store is not None
    assert config.store.path == path


def test_admin_payload_is_an_administrator() -> None:
    client = loaded("{a: {key: k, admin: payload}}").clients["a"]
    assert (client.admin, client.admin_payload) == (True, True)


def test_isolated_configuration_has_a_store_of_its_own(tmp_path: Path) -> None:
    values: dict[str, Any] = {"clients": {"a": {"key": "k", "mailbox": True}}}
    config = load_isolated(values, Isolation(tmp_path))
    assert config.store is not None
    assert config.store.path == str(tmp_path / "store")
    for store in ("/var/lib/brokerd", {"path": "/var/lib/brokerd", "dedup": "1d"}):
        config = load_isolated({**values, "store": store}, Isolation(tmp_path))
        assert config.store is not None
        assert config.store.path == str(tmp_path / "store")


def test_plan_tells_what_becomes_of_mailboxes() -> None:
    running = loaded("{a: {key: k, mailbox: true}, b: {key: l, mailbox: true}, c: {key: m}}")
    new = loaded("{a: {key: k}, c: {key: m, mailbox: {size: 2GiB}}}")
    plan = compare(running, new)
    assert plan.orphaned == ("a", "b")
    assert plan.changed["a"] == (
        "mailbox removed: its messages stay on disk until they are purged",
    )
    assert plan.changed["c"] == ("mailbox added",)
    smaller = loaded("{a: {key: k, mailbox: {size: 1MiB, dead: 10%, ttl: 1h}}, c: {key: m}}")
    assert compare(running, smaller).changed["a"] == (
        "mailbox.size: 1GiB -> 1MiB",
        "mailbox.ttl: none -> 1h",
        "mailbox.dead: 20% -> 10%",
        "mailbox: a smaller size deletes no message",
    )


def test_plan_keeps_an_open_store_where_it_is() -> None:
    clients = "{a: {key: k, mailbox: true}}"
    running, moved = loaded(clients), loaded(clients, "store: other\n")
    assert compare(running, moved).restart == ("store changes only with a restart",)
    assert merge(running, moved).store == running.store
    other = loaded(clients, "store: {path: st, dedup: 2h, min_free: 1GiB}\n")
    assert compare(running, other).store == ("min_free: 256MiB -> 1GiB", "dedup: 1h -> 2h")
    without = loaded("{a: {key: k}}", "")
    assert merge(running, without).store == running.store
    assert compare(without, running).store == ("path: none -> /etc/st",)
    assert compare(without, running).restart == ()


def test_memory_bound_counts_mailboxes() -> None:
    without = memory_bound(loaded("{a: {key: k}}", "")).mailboxes
    with_one = memory_bound(loaded("{a: {key: k, mailbox: true}}")).mailboxes
    assert without == 0
    assert with_one > 128 << 20
