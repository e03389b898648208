"""The files of a TLS listener: every error is reported with its place, at a check, at
the start and at a reload.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from support.client_faces import PATIENCE
from support.keys import key_of
from support.raw_client import login
from support.running_daemon import configuration, running_daemon
from support.tls.authority import Authority, Issued
from support.tls.raw_client import TlsRaw, tls_login

import brokerd_client
from brokerd.cli.main import main
from brokerd.config.cert_subjects import normal, parse, show
from brokerd.config.lint import lint_warnings
from brokerd.config.load import ConfigError, load, load_text
from brokerd.config.memory_bound import memory_bound
from brokerd.ctl.command import brokerctl
from brokerd.testing import running
from brokerd_client.errors import TlsError

LISTEN = (
    "listen:\n- address: 127.0.0.1:0\n  tls:\n    certificate: {0.certificate}\n    key: {0.key}\n"
)


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_text(text, "b.yaml", environ or {})
    return [str(problem) for problem in refused.value.problems]


@pytest.fixture
def issued(authority: Authority, tmp_path: Path) -> Issued:
    """The files of a listener, for tests that damage them."""
    server = authority.issue("to be damaged")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(server.certificate.read_bytes())
    key.touch(mode=0o600)
    key.write_bytes(server.key.read_bytes())
    return Issued(certificate, key)


def test_tls_files_valid_make_listener_with_tls_1_3(issued: Issued) -> None:
    """A certificate and its key are enough."""
    (listen,) = load_text(LISTEN.format(issued)).listen
    assert listen.tls is not None
    assert listen.tls.context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert "-----" not in repr(listen)


@pytest.mark.parametrize(
    ("written", "version"), [('"1.2"', "TLSv1_2"), ("1.2", "TLSv1_2"), ("1.3", "TLSv1_3")]
)
def test_tls_minimum_may_be_text_or_number(issued: Issued, written: str, version: str) -> None:
    """YAML reads a version without quotes as a number, and the configuration accepts
    both.
    """
    (listen,) = load_text(LISTEN.format(issued) + f"    minimum: {written}\n").listen
    assert listen.tls is not None
    assert listen.tls.context.minimum_version.name == version


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no files in memory")
def test_tls_files_are_opened_once(
    authority: Authority, issued: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content that was checked is the content used. A file replaced between the two
    changes nothing.
    """
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.file.read_bytes())
    text = LISTEN.format(issued) + f"    client_ca: {ca}\n"
    (before,) = load_text(text).listen
    opened: list[str] = []
    os_open = os.open

    def open_once(path: Any, *given: Any, **more: Any) -> int:
        handle = os_open(path, *given, **more)
        if Path(path).parent == tmp_path:
            opened.append(Path(path).name)
            Path(path).unlink()
        return handle

    monkeypatch.setattr(os, "open", open_once)
    (listen,) = load_text(text).listen

    assert sorted(opened) == ["ca.pem", "cert.pem", "key.pem"]
    assert listen.tls is not None
    assert before.tls is not None
    assert listen.tls.content == before.tls.content
    assert (
        listen.tls.context.get_ca_certs(binary_form=True)
        == before.tls.context.get_ca_certs(binary_form=True)
        != []
    )


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid"), reason="there are no modes here"
)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_tls_key_readable_by_other_users_is_refused(issued: Issued, mode: int) -> None:
    """The error names the chmod to run."""
    issued.key.chmod(mode)
    (problem,) = problems(LISTEN.format(issued))
    assert problem.startswith(
        "b.yaml:5:10: listen[0].tls.key: users other than its owner can read or write"
    )
    assert f"(chmod 600 {issued.key})" in problem


def test_tls_key_in_credentials_directory_may_be_group_readable(issued: Issued) -> None:
    """In systemd's credentials directory the modes are up to systemd."""
    issued.key.chmod(0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(issued.key.parent)}
    assert load_text(LISTEN.format(issued), "b.yaml", environ).listen[0].tls is not None


def _another_key(issued: Issued, authority: Authority) -> None:
    issued.key.write_bytes(authority.issue("another").key.read_bytes())


def _encrypted(issued: Issued, authority: Authority) -> None:
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    form = serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"password")
    issued.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, locked))


DAMAGES: list[tuple[Callable[[Issued, Authority], object], str, str]] = [
    (_another_key, "5:10: listen[0].tls.key", "is not the key of"),
    (_encrypted, "5:10: listen[0].tls.key", "is encrypted"),
    (
        lambda issued, _: issued.key.write_text("no key"),
        "5:10: listen[0].tls.key",
        "no usable private key",
    ),
    (lambda issued, _: issued.key.unlink(), "5:10: listen[0].tls.key", "there is no file"),
    (
        lambda issued, _: issued.certificate.unlink(),
        "4:18: listen[0].tls.certificate",
        "there is no file",
    ),
    (
        lambda issued, _: issued.certificate.write_text("x"),
        "4:18: listen[0].tls.certificate",
        "holds no certificate",
    ),
    (
        lambda issued, _: issued.certificate.write_text(
            issued.certificate.read_text().replace("MII", "MIJ", 1)
        ),
        "4:18: listen[0].tls.certificate",
        "damaged certificate",
    ),
]


@pytest.mark.parametrize(
    ("damage", "place", "words"), DAMAGES, ids=[words for _, _, words in DAMAGES]
)
def test_tls_file_error_names_its_place(
    issued: Issued, authority: Authority, damage: Callable[..., Any], place: str, words: str
) -> None:
    """An error in a file is reported at the line that names the file, with what would
    be right.
    """
    damage(issued, authority)
    (problem,) = problems(LISTEN.format(issued))
    assert problem.startswith(f"b.yaml:{place}: ")
    assert words in problem
    assert problem.endswith(")")


def test_tls_file_errors_are_reported_together(tmp_path: Path) -> None:
    """Each of three missing files has an error of its own."""
    nothing = Issued(tmp_path / "c", tmp_path / "k")
    found = problems(LISTEN.format(nothing) + "    client_ca: ca\n")
    assert [each.split(": ")[1] for each in found] == [
        "listen[0].tls.certificate",
        "listen[0].tls.key",
        "listen[0].tls.client_ca",
    ]


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("{address: /run/b, tls: {certificate: c, key: k}}", "listen[0].tls: applies to TCP only"),
        ("{address: /run/b, plain: true}", "listen[0].plain: applies to TCP only"),
        ("{address: 'tls://h:1'}", "listen[0].address: tls:// belongs in a client's address"),
    ],
)
def test_tls_option_at_wrong_address_is_refused(entry: str, error: str) -> None:
    """TLS applies to TCP only. The tls:// of a client's address is not valid in the
    configuration.
    """
    (problem,) = problems(f"listen:\n- {entry}\n")
    assert error in problem


def test_tls_contradicting_options_are_refused(issued: Issued) -> None:
    """The file has tls together with `plain: true`, and client certificates without a
    client_ca to issue them.
    """
    text = LISTEN.format(issued) + "    client_certificate: optional\n  plain: true\n"
    assert [each.split(": ")[1] for each in problems(text)] == [
        "listen[0].tls.client_certificate",
        "listen[0].plain",
    ]


def test_tls_certificate_expired_is_refused_and_expiring_is_warned_of(authority: Authority) -> None:
    """A certificate that has expired is an error. One that expires soon is a warning."""
    now = datetime.now(UTC)
    old = authority.issue("old", until=now - timedelta(seconds=5))
    (problem,) = problems(LISTEN.format(old))
    assert "listen[0].tls.certificate: " in problem
    assert "expired at" in problem

    soon = authority.issue("soon", until=now + timedelta(days=3))
    (warning,) = lint_warnings(load_text(LISTEN.format(soon) + "clients: {a: {key: k}}\n"), now)
    assert "expires at" in warning


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("0.0.0.0:0", True),
        ('"[::]:0"', True),
        ("broker.example:6000", True),
        ("10.1.2.3:6000", True),
        ("127.0.0.1:0", False),
        ("127.3.2.1:0", False),
        ('"[::1]:0"', False),
        ("localhost:6000", False),
        ("/run/b", False),
    ],
)
def test_tls_missing_at_reachable_address_is_warned_of(address: str, warned: bool) -> None:
    """The warning for a listener that other machines can reach without TLS names the
    option. With `plain: true` there is no warning.
    """
    clients = "clients: {a: {key: k}}\n"
    found = lint_warnings(
        load_text(f"listen: [{{address: {address}}}]\n{clients}"), datetime.now(UTC)
    )
    assert len(found) == warned
    assert all(
        "tls: {certificate: FILE, key: FILE}" in each and "plain: true" in each for each in found
    )
    if warned:
        assert (
            lint_warnings(
                load_text(f"listen: [{{address: {address}, plain: true}}]\n{clients}"),
                datetime.now(UTC),
            )
            == []
        )


def test_check_command_prints_tls_warning_and_tls_error(issued: Issued, tmp_path: Path) -> None:
    """``brokerd check`` prints a warning and exits with 0. It prints an error and exits
    with 78.
    """
    file = tmp_path / "b.yaml"
    file.touch(mode=0o600)
    file.write_text("listen: ['0.0.0.0:0']\nclients: {a: {key: k}}\n")
    result = CliRunner().invoke(main, ["check", str(file)])
    assert (result.exit_code, "plain TCP" in result.stderr) == (0, True)

    file.write_text(LISTEN.format(issued) + "clients: {a: {key: k}}\n")
    issued.key.chmod(0o644)
    result = CliRunner().invoke(main, ["check", str(file)])
    assert (result.exit_code, "chmod 600" in result.stderr) == (78, True)


def test_tls_missing_at_start_is_logged_once_per_listener(server: Issued) -> None:
    """One event at the start names each such listener. Listeners that are local, have
    TLS or have `plain: true` are not named.
    """
    listen = [
        "0.0.0.0:0",
        "127.0.0.1:0",
        {"address": "0.0.0.0:0", "plain": True},
        {"address": "0.0.0.0:0", "tls": server.entry()},
    ]
    with running_daemon(configuration(listen)) as broker:
        (event,) = broker.log.named("listener.plain")
        assert event.level == "warning"
        assert event.fields["listener"] == str(broker.addresses[0])
        assert "tls: {certificate: FILE, key: FILE}" in event.fields["reason"]


# Reload


def serial_of(raw: TlsRaw) -> int:
    """Return the serial number of the listener's certificate."""
    shown = raw.sock.getpeercert()  # type: ignore[attr-defined]
    return int(shown["serialNumber"], 16)


def test_tls_certificate_renewed_by_reload_loses_no_message(
    issued: Issued, authority: Authority, trusting: ssl.SSLContext, socket_dir: Path
) -> None:
    """New connections get the new certificate. Open connections continue, and no
    message is lost.
    """
    listen = [{"address": "127.0.0.1:0", "tls": issued.entry()}, str(socket_dir / "sock")]
    with (
        running_daemon(configuration(listen)) as broker,
        login(broker.addresses[1], key_of("carol"), b"carol") as carol,
    ):
        old = TlsRaw(broker.address, trusting)
        url = str(broker.address)
        with (
            old,
            brokerd_client.connect(
                url, "alice", key_of("alice"), ssl=trusting, reconnect=False
            ) as alice,
            brokerd_client.connect(url, "bob", key_of("bob"), ssl=trusting, reconnect=False) as bob,
        ):
            stop = threading.Event()
            sent = 0

            def send() -> None:
                nonlocal sent
                while not stop.is_set():
                    alice.send("bob", sent, timeout=PATIENCE)
                    sent += 1
                    if sent % 100 == 0:
                        alice.ping()

            thread = threading.Thread(target=send)
            thread.start()
            try:
                assert bob.recv(PATIENCE).payload == 0
                renewed = authority.issue("renewed")
                issued.certificate.write_bytes(renewed.certificate.read_bytes())
                issued.key.write_bytes(renewed.key.read_bytes())
                config = configuration(listen)
                broker.call(lambda: broker.daemon.apply(config, "the test"))
                with TlsRaw(broker.address, trusting) as new:
                    assert serial_of(new) != serial_of(old)
            finally:
                stop.set()
                thread.join(PATIENCE)
            assert [bob.recv(PATIENCE).payload for _ in range(sent - 1)] == list(range(1, sent))
            (change,) = broker.log.wait("daemon.reloaded")[0].fields["altered"].values()
            assert change[0].startswith("tls: ")
        carol.ping()
        assert [event.fields["name"] for event in broker.log.named("client.disconnected")] in (
            ["alice", "bob"],
            ["bob", "alice"],
        )


def test_tls_certificate_invalid_at_reload_changes_nothing(
    issued: Issued, authority: Authority, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    """A reload with files that do not match is refused, with the reason. The old
    certificate stays in use.
    """
    file = tmp_path / "b.yaml"
    file.touch(mode=0o600)
    file.write_text(LISTEN.format(issued) + 'clients: {alice: {key: "alice\'s key is a canary"}}\n')
    with (
        running_daemon(load(file)) as broker,
        tls_login(broker.address, trusting, "alice") as alice,
    ):
        before = serial_of(alice)
        _another_key(issued, authority)
        broker.call(lambda: broker.daemon.reload_soon("the test"))
        problems = broker.log.wait("daemon.reload_refused")[0].fields["problems"]
        assert "is not the key of" in problems[0]
        alice.ping()
        with TlsRaw(broker.address, trusting) as new:
            assert serial_of(new) == before


def test_tls_added_to_listener_by_reload_applies_to_new_connections(
    issued: Issued, trusting: ssl.SSLContext
) -> None:
    """An address without TLS speaks TLS after the reload. Connections opened before
    stay in plaintext.
    """
    with running_daemon(configuration("127.0.0.1:0")) as broker:
        address = {"address": f"127.0.0.1:{broker.address.port}"}
        with broker.login("alice") as alice:
            plain, tls = configuration(address), configuration({**address, "tls": issued.entry()})
            broker.call(lambda: setattr(broker.daemon, "config", plain))
            for listening in broker.daemon._server.listening:  # type: ignore[union-attr]
                listening.config = plain.listen[0]
            broker.call(lambda: broker.daemon.apply(tls, "the test"))
            assert str(broker.address) == f"tls://127.0.0.1:{broker.address.port}"
            with tls_login(broker.address, trusting, "bob") as bob:
                bob.ping()
            alice.ping()


def test_tls_memory_is_part_of_memory_bound(issued: Issued) -> None:
    """Each connection and each pending handshake counts, if any listener has TLS."""
    clients = {"alice": {"connections": 7}}
    limits = {"handshakes": 5, "channels": 3}
    without = memory_bound(configuration("127.0.0.1:0", clients, limits=limits))
    tls = memory_bound(
        configuration({"address": "127.0.0.1:0", "tls": issued.entry()}, clients, limits=limits)
    )
    assert without.parts()["tls"] == 0
    assert tls.total - without.total == tls.parts()["tls"] == 23 * 256 * 1024


# Subjects


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("CN=alice", [("commonName", "alice")]),
        ("CN = alice, O = Example", [("organizationName", "Example"), ("commonName", "alice")]),
        ("O=Example+CN=alice", [("organizationName", "Example"), ("commonName", "alice")]),
        (r"CN=a\,b\\c\+d", [("commonName", r"a,b\c+d")]),
        ("C=DE,ST=Berlin,L=Berlin,OU=x,emailAddress=a@b", None),
        (
            "UID=al,DC=a,DC=b",
            [("userId", "al"), ("domainComponent", "b"), ("domainComponent", "a")],
        ),
    ],
)
def test_tls_subject_written_as_text_equals_subject_of_certificate(
    text: str, pairs: list[tuple[str, str]] | None
) -> None:
    """A subject in the configuration may list its parts in any order. It is shown in
    the form that can be written.
    """
    subject = parse(text)
    assert parse(show(subject)) == subject
    if pairs is not None:
        assert subject == normal(pairs)


@pytest.mark.parametrize("text", ["", "alice", "CN=", "CN=alice,", "=alice", "CN=a,,O=b", "CN=a\\"])
def test_tls_subject_invalid_is_refused(text: str) -> None:
    """The error shows the right form."""
    with pytest.raises(ValueError, match="CN=alice,O=Example"):
        parse(text)


def test_tls_subject_must_match_completely() -> None:
    """A part of a subject does not match, nor does one with an additional part."""
    whole = parse("CN=alice,O=Example")
    assert whole != parse("CN=alice")
    assert whole != parse("CN=alice,O=Example,OU=x")
    assert parse("CN=alice,CN=alice") != parse("CN=alice")


# brokerctl


def test_brokerctl_over_tls_needs_ca(server: Issued, authority: Authority, tmp_path: Path) -> None:
    """The option --ca or the variable BROKERD_CA is enough. Without either the error
    says so. Options for TLS are refused for a plain address.
    """
    key_file = tmp_path / "alice"
    key_file.write_bytes(key_of("alice"))
    tls = server.entry(client_ca=authority.file)
    shown = authority.issue("alice", "alice.example")
    with running_daemon(configuration({"address": "127.0.0.1:0", "tls": tls})) as broker:
        access = ["--address", str(broker.address), "--name", "alice", "--key-file", str(key_file)]
        cert = ["--cert", str(shown.certificate), "--cert-key", str(shown.key)]
        run = CliRunner().invoke
        assert run(brokerctl, [*access, "--ca", str(authority.file), *cert, "ping"]).exit_code == 0
        variables = {
            "BROKERD_CA": str(authority.file),
            "BROKERD_CERT": str(shown.certificate),
            "BROKERD_CERT_KEY": str(shown.key),
        }
        assert run(brokerctl, [*access, "ping"], env=variables).exit_code == 0
        missing = run(brokerctl, [*access, "ping"])
        assert (missing.exit_code, "brokerctl --ca" in missing.stderr) == (1, True)
        refused = run(brokerctl, [*access, "--ca", str(authority.file), "ping"])
        assert (refused.exit_code, "requires a client certificate" in refused.stderr) == (1, True)
        absent = run(brokerctl, [*access, "--ca", str(tmp_path / "none"), "ping"])
        assert (absent.exit_code, "give certificates in PEM" in absent.stderr) == (2, True)
        half = run(
            brokerctl,
            [*access, "--ca", str(authority.file), "--cert", str(shown.certificate), "ping"],
        )
        assert (half.exit_code, "give both in PEM" in half.stderr) == (2, True)
        plain = run(
            brokerctl, ["--address", "127.0.0.1:1", "--key-file", str(key_file), *cert, "ping"]
        )
        assert (plain.exit_code, "are for TLS" in plain.stderr) == (2, True)


def test_testing_broker_accepts_tls(server: Issued, trusting: ssl.SSLContext) -> None:
    """brokerd.testing accepts tls as a listen entry does, and its clients accept a
    context.
    """
    with running(tls=server.entry()) as broker:
        alice, bob = broker.connect("alice", ssl=trusting), broker.connect("bob", ssl=trusting)
        alice.send("bob", "hello")
        assert bob.recv(PATIENCE).payload == "hello"
        with pytest.raises(TlsError):
            broker.connect("carol")
