"""The section ``cluster``, the homes of mailboxes, and the plan of a reload of both."""

from __future__ import annotations

import importlib.util
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from brokerd.config import cluster
from brokerd.config.diff import compare
from brokerd.config.isolation import Isolation
from brokerd.config.lint import lint_warnings
from brokerd.config.load import build_config, load_isolated, load_text
from brokerd.config.memory_bound import memory_bound
from brokerd.config.model import Config
from brokerd.config.problems import ConfigError
from brokerd.config.values import ClusterConfig

HERE = "{host: a, nats: ['nats://127.0.0.1']}"
PLAIN = "{a: {key: k}}"
NOW = datetime.now(UTC)


def loaded(section: str, clients: str = PLAIN, base: str = "/etc", more: str = "") -> Config:
    text = f"listen: [/run/b.sock]\ncluster: {section}\nclients: {clients}\n{more}"
    return load_text(text, f"{base}/b.yaml", {})


def cluster_of(section: str, base: str = "/etc") -> ClusterConfig:
    config = loaded(section, base=base).cluster
    assert config is not None
    return config


def problems(section: str, clients: str = PLAIN, base: str = "/etc") -> list[str]:
    with pytest.raises(ConfigError) as refused:
        loaded(section, clients, base)
    return [f"{problem.path}: {problem.fault}" for problem in refused.value.problems]


def secret(folder: Path, name: str, content: str, mode: int = 0o600) -> Path:
    file = folder / name
    file.write_text(content)
    file.chmod(mode)
    return file


def test_cluster_defaults_are_complete() -> None:
    config = cluster_of(HERE)
    assert (config.host, config.nats) == ("a", ("nats://127.0.0.1:4222",))
    assert (config.prefix, config.unanswered, config.hosts) == ("brokerd", 8 << 20, 64)
    assert (config.login, config.tls, config.advertise) == ("none", None, ())
    assert loaded(HERE).limits.remote_timeout == 5.0


def test_cluster_is_absent_by_default() -> None:
    config = build_config("./b", {"a": "k"})
    assert config.cluster is None
    assert memory_bound(config).cluster == 0


def test_cluster_of_a_program_is_read_like_a_file() -> None:
    config = build_config("./b", {"a": "k"}, cluster={"host": "b", "nats": ["nats://[::1]:1"]})
    assert config.cluster is not None
    assert config.cluster.nats == ("nats://[::1]:1",)


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("{nats: ['nats://127.0.0.1']}", "cluster.host: is missing"),
        ("{host: a}", "cluster.nats: is missing"),
        ("{host: a, nats: []}", "cluster.nats: is an empty list"),
        ("{host: 1, nats: ['nats://::1']}", "cluster.host: is not text (put it in quotes)"),
        ("{host: abcdefghi, nats: ['nats://[::1]']}", "is not a valid name of a host"),
        ("{host: all, nats: ['nats://[::1]']}", "'all' stands for every host"),
        ("{host: a, nats: [10.0.0.1]}", "is not the URL of a NATS server"),
        ("{host: a, nats: ['nats://']}", "is not the URL of a NATS server"),
        ("{host: a, nats: ['nats://h:0']}", "is not the URL of a NATS server"),
        ("{host: a, nats: ['nats://u:p@h']}", "holds a user or password"),
        ("{host: a, nats: ['nats://[::1]'], prefix: 'a.*'}", "is not a valid prefix"),
        ("{host: a, nats: ['nats://[::1]'], advertise: [b]}", "'b' has no port"),
        ("{host: a, nats: ['nats://[::1]'], advertise: [/b]}", "can't be reached from another"),
        ("{host: a, nats: ['nats://[::1]'], advertise: ['0.0.0.0:1']}", "to connect to"),
        ("{host: a, nats: ['nats://[::1]'], unanswered: 0}", "is not a valid size limit"),
        ("{host: a, nats: ['nats://[::1]'], hosts: 0}", "is too small"),
        ("{host: a, nats: ['nats://[::1]'], unanserd: 1}", "did you mean 'unanswered'"),
        ("[a]", "cluster: is a list, not a mapping"),
    ],
)
def test_cluster_mistake_is_named(section: str, fault: str) -> None:
    assert any(fault in problem for problem in problems(section)), problems(section)


def test_cluster_without_nats_py_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = problems(HERE)
    assert problem == (
        "cluster: needs the package nats-py, which is not installed (pip install 'nats-py[nkeys]')"
    )


def test_cluster_beyond_loopback_needs_credentials_and_tls() -> None:
    without_login, without_tls = problems("{host: a, nats: ['nats://10.0.0.1']}")
    assert "nats://10.0.0.1:4222 is beyond this machine, and no credentials" in without_login
    assert "has no TLS" in without_tls
    assert "plain: true" in without_tls
    (problem,) = problems("{host: a, nats: ['nats://127.0.0.1', 'tls://nats.example']}")
    assert "cluster.nats[1]: tls://nats.example:4222 is beyond this machine" in problem
    (problem,) = problems("{host: a, nats: ['nats://10.0.0.1'], plain: true}")
    assert "credentials" in problem


def test_cluster_plain_with_tls_everywhere_is_a_mistake() -> None:
    (problem,) = problems("{host: a, nats: ['tls://localhost'], plain: true}")
    assert problem.startswith("cluster.plain: means no TLS")


def test_cluster_login_is_read_and_never_shown(tmp_path: Path) -> None:
    secret(tmp_path, "pw", "s3cret\n")
    secret(tmp_path, "creds", "-----BEGIN NATS USER JWT-----\n")
    secret(tmp_path, "seed", "SUAM\n")
    nats = "nats: ['tls://10.0.0.1']"

    def given(more: str) -> ClusterConfig:
        return cluster_of(f"{{host: a, {nats}, {more}}}", str(tmp_path))

    by_user = given("user: brokerd, password_file: pw")
    assert (by_user.user, by_user.password, by_user.login) == ("brokerd", b"s3cret", "user brokerd")
    by_credentials = given("credentials: creds")
    assert by_credentials.credentials == b"-----BEGIN NATS USER JWT-----"
    assert by_credentials.login == "a credentials file"
    by_nkey = given("nkey_file: seed")
    assert (by_nkey.nkey, by_nkey.login) == (b"SUAM", "an nkey")
    shown = repr([by_user, by_credentials, by_nkey])
    assert not any(word in shown for word in ("s3cret", "BEGIN", "SUAM"))


def test_cluster_login_mistakes_are_named(tmp_path: Path) -> None:
    secret(tmp_path, "open", "s3cret\n", 0o644)
    secret(tmp_path, "empty", "\n")
    nats = "host: a, nats: ['nats://127.0.0.1']"
    for more, fault in (
        ("user: u", "cluster.user: has no password (give password_file)"),
        ("password_file: empty", "cluster.password_file: is the password of no user"),
        ("credentials: open", "chmod 600"),
        ("credentials: empty", "is empty"),
        ("nkey_file: none", "there is no file"),
        ("nkey_file: empty, credentials: empty", "cluster.nkey_file: credentials is given too"),
    ):
        found = problems(f"{{{nats}, {more}}}", base=str(tmp_path))
        assert any(fault in problem for problem in found), found
        assert "s3cret" not in str(found)


def test_cluster_tls_makes_every_server_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("a.example")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    secret(tmp_path, "key.pem", issued.private_key_pem.bytes().decode())
    section = (
        "{{host: a, nats: ['nats://10.0.0.1'], tls: {{ca: ca.pem, certificate: cert.pem, {} }} }}"
    )
    config = cluster_of(section.format("key: key.pem"), str(tmp_path))
    assert config.nats == ("tls://10.0.0.1:4222",)
    assert config.tls is not None
    assert config.tls.context.verify_mode is ssl.CERT_REQUIRED
    assert len(config.tls.context.get_ca_certs()) == 1
    for wrong, fault in (
        ("", "cluster.tls.certificate: has no key (give both, or neither)"),
        ("key: ca.pem", "cluster.tls.key: users other than its owner"),
        ("key: none.pem", "cluster.tls.key: there is no file"),
    ):
        found = problems(section.format(wrong), base=str(tmp_path))
        assert any(fault in problem for problem in found), found
    secret(tmp_path, "other.pem", trustme.CA().issue_cert("x").private_key_pem.bytes().decode())
    found = problems(section.format("key: other.pem"), base=str(tmp_path))
    assert "is not the key of" in found[0]


def test_cluster_mailbox_needs_a_home() -> None:
    (problem,) = problems(HERE, "{a: {key: k, mailbox: true}}")
    assert problem == (
        "clients.a.mailbox: needs a host that keeps it, in a cluster (give the client home: HOST)"
    )
    (problem,) = problems(HERE, "{a: {key: k, mailbox: true, home: B!}}")
    assert "clients.a.home: is not a valid name of a host" in problem


def test_cluster_host_needs_a_store_for_its_own_mailboxes_only() -> None:
    elsewhere = loaded(HERE, "{a: {key: k, mailbox: true, home: b}}")
    assert elsewhere.store is None
    assert (elsewhere.clients["a"].mailbox, elsewhere.clients["a"].home) == (None, "b")
    found = problems(HERE, "{a: {key: k, mailbox: true, home: a}}")
    assert "needs a directory to be kept in" in found[0]
    here = loaded(HERE, "{a: {key: k, mailbox: true, home: a}}", more="store: s\n")
    assert here.clients["a"].mailbox is not None
    assert here.clients["a"].home == "a"


def test_invalid_cluster_does_not_ask_for_a_store_too() -> None:
    (problem,) = problems("{host: a, nats: [x]}", "{a: {key: k, mailbox: true, home: a}}")
    assert "cluster.nats[0]" in problem


def test_home_without_cluster_or_mailbox_has_no_effect() -> None:
    alone = build_config(
        "./b", {"a": {"key": "k", "mailbox": True, "home": "b"}}, store="/s"
    ).clients["a"]
    assert (alone.home, alone.mailbox is None) == ("", False)
    assert loaded(HERE, "{a: {key: k, home: b}}").clients["a"].home == ""


def test_isolated_configuration_has_no_cluster(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "cluster": {"host": "a", "nats": ["nats://10.0.0.1"]},
        "clients": {"a": {"key": "k", "mailbox": True, "home": "b"}},
    }
    config = load_isolated(values, Isolation(tmp_path))
    assert config.cluster is None
    assert config.clients["a"].mailbox is not None


def test_digest_is_the_same_where_clients_mean_the_same() -> None:
    def digest(clients: str, host: str = "a") -> str:
        section = f"{{host: {host}, nats: ['nats://127.0.0.1']}}"
        config = loaded(section, clients, more="store: s\n").cluster
        assert config is not None
        return config.digest

    first = digest("{a: {key: k, mailbox: true, home: a}, b: {key: l}}")
    assert first == digest("{b: {key: l}, a: {key: k, home: a, mailbox: true}}", "b")
    assert len(first) == 16
    for other in (
        "{a: {key: k, mailbox: true, home: b}, b: {key: l}}",
        "{a: {key: k, mailbox: {size: 1}, home: a}, b: {key: l}}",
        "{a: {key: m, mailbox: true, home: a}, b: {key: l}}",
        "{a: {key: k, mailbox: true, home: a}, b: {key: l, send_to: []}}",
        "{a: {key: k, mailbox: true, home: a}}",
    ):
        assert digest(other) != first


def test_cluster_lint_names_a_mailbox_without_advertised_address() -> None:
    clients = "{a: {key: k, mailbox: true, home: a}}"
    (warning,) = lint_warnings(loaded(HERE, clients, more="store: s\n"), NOW)
    assert "cluster.advertise" in warning
    told = HERE.replace("}", ", advertise: ['h:1']}")
    assert lint_warnings(loaded(told, clients, more="store: s\n"), NOW) == []


def test_cluster_memory_bound_grows_with_hosts_and_window() -> None:
    def bound(more: str) -> int:
        return memory_bound(loaded(HERE.replace("}", f", {more}}}"))).cluster

    assert bound("hosts: 2") == 2 * bound("hosts: 1")
    assert bound("hosts: 2, unanswered: 16MiB") > bound("hosts: 2")


def test_plan_of_a_cluster_names_its_changes(tmp_path: Path) -> None:
    secret(tmp_path, "one", "1")
    secret(tmp_path, "two", "2")
    base = str(tmp_path)
    running = loaded(HERE, base=base)
    new = loaded("{host: a, nats: ['nats://[::1]'], user: u, password_file: one}", base=base)
    plan = compare(running, new)
    assert plan.cluster == (
        "nats: [nats://127.0.0.1:4222] -> [nats://[::1]:4222]",
        "login: none -> user u",
    )
    assert plan.refused == ()
    other = loaded("{host: a, nats: ['nats://[::1]'], user: u, password_file: two}", base=base)
    assert compare(new, other).cluster == ("login: user u, with another secret",)
    assert plan.as_fields()["cluster"] == list(plan.cluster)


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("{host: b, nats: ['nats://127.0.0.1']}", "cluster.host"),
        ("{host: a, prefix: x, nats: ['nats://127.0.0.1']}", "cluster.prefix"),
    ],
)
def test_plan_of_another_host_or_prefix_is_refused(section: str, name: str) -> None:
    (refused,) = compare(loaded(HERE), loaded(section)).refused
    assert refused == f"{name} changes only with a restart (restart the broker)"


def test_plan_that_adds_or_removes_the_cluster_is_refused() -> None:
    alone = load_text("listen: [/run/b.sock]\nclients: {a: {key: k}}\n", "/etc/b.yaml", {})
    for plan in (compare(alone, loaded(HERE)), compare(loaded(HERE), alone)):
        assert len(plan.refused) == 1
        assert plan.cluster == ()


def test_plan_of_a_changed_home_tells_that_messages_are_orphaned() -> None:
    def at(home: str) -> Config:
        return loaded(HERE, f"{{a: {{key: k, mailbox: true, home: {home}}}}}", more="store: s\n")

    plan = compare(at("a"), at("b"))
    assert plan.orphaned == ("a",)
    assert plan.changed["a"] == (
        "home: a -> b",
        (
            "mailbox: its messages stay in the store of a, orphaned (move them: brokerctl"
            " mailbox export here, and import there)"
        ),
    )
    back = compare(at("b"), at("a"))
    assert (back.orphaned, back.changed["a"]) == ((), ("home: b -> a",))


def test_needed_packages_include_nkeys_for_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(tmp_path, "seed", "SUAM")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        cluster.importlib.util,
        "find_spec",
        lambda name: None if name == "nkeys" else found(name),
    )
    (problem,) = problems("{host: a, nats: ['nats://[::1]'], nkey_file: seed}", base=str(tmp_path))
    assert "needs the package nkeys" in problem
