"""brokerd health: a sign of life from the broker at the address in its configuration,
without a key.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.running_daemon import RunningDaemon, configuration, running_daemon

import brokerd.cli.health
from brokerd.cli.health import Unhealthy, entrance_to_ask, probe
from brokerd.cli.main import main
from brokerd.config.listen_addresses import Entrance, entrances
from brokerd_client.address import Address, parse
from brokerd_client.wire.framing import frame

CHALLENGE = frame(b"#CHALLENGE#{sha256}" + b"n" * 32)


def served(listen: str = "127.0.0.1:0") -> AbstractContextManager[RunningDaemon]:
    """Run a broker until the block ends."""
    return running_daemon(configuration(listen))


def health(*arguments: str | Path, **environ: str) -> Result:
    """Run the command in this process."""
    env = {"BROKERD_CONFIG": None, "BROKERD_CONFIG_YAML": None, **environ}
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


def listen_addresses(text: str, directory: Path) -> list[str]:
    """Return the addresses in a configuration, those with TLS marked."""
    file = directory / "b.yaml"
    file.write_text(text)
    return [f"{each.address}{' tls' * each.tls}" for each in entrances(str(file), {})]


@contextmanager
def answering(*parts: bytes, context: ssl.SSLContext | None = None) -> Iterator[Address]:
    """Serve one connection: send it these bytes and close it. Yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def serve() -> None:
            peer, _ = server.accept()
            peer.settimeout(30)
            try:
                with context.wrap_socket(peer, server_side=True) if context else peer as stream:
                    for part in parts:
                        stream.sendall(part)
            except OSError:
                # The client may disconnect during the TLS handshake.
                peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("AF_INET", *server.getsockname())
        finally:
            thread.join(30)


@pytest.mark.parametrize("timeout", ["nan", "inf", "0", "1e9"])
def test_health_timeout_out_of_range_is_usage_error(timeout: str) -> None:
    result = health("health", "--address", "127.0.0.1:1", "--timeout", timeout)
    assert result.exit_code == 2
    assert "Invalid value for '--timeout'" in result.output


def test_health_of_running_broker_is_healthy_without_log(tmp_path: Path) -> None:
    """The exit status is 0, with one line. The broker counts no refusal and logs
    nothing above level debug.
    """
    with served() as broker:
        file = tmp_path / "b.yaml"
        file.write_text(f"listen: ['{broker.address}']\nclients: {{alice: {{key_file: /gone}}}}\n")

        result = health("--config", file, "health")

        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(f"healthy: {broker.address}: answered in ")
        assert broker.log.wait("client.left")[0].level == "debug"
        assert not broker.log.named("client.refused")


def test_handshake_peer_leaving_after_one_byte_is_refused() -> None:
    """Only a peer that has sent nothing at all is not logged as refused."""
    with served() as broker:
        with broker.raw() as peer:
            peer.read_body()
            peer.sock.sendall(b"\0")
        assert "closed by the peer" in broker.log.wait("client.refused")[0].fields["reason"]
        assert not broker.log.named("client.left")


def test_handshake_peer_leaving_before_challenge_is_not_refused() -> None:
    """A health check that gave up on a frozen broker causes no warning when the broker
    continues.
    """
    with served() as broker:
        peer = broker.raw()

        def freeze() -> None:
            # The event loop is blocked meanwhile. The peer resets its connection: the
            # broker's own bytes are lost, and its next write fails.
            reset = broker.raw()
            reset.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.close()

        peer.close()
        broker.call(freeze)
        broker.log.wait("client.left", 2)
        assert not broker.log.named("client.refused")


@pytest.mark.timing
def test_health_of_frozen_broker_is_unhealthy(tmp_path: Path) -> None:
    """A listening socket that only the system answers for gives exit status 1 within
    the timeout.
    """
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        host, port = frozen.getsockname()
        began = time.monotonic()

        result = health("health", "--address", f"{host}:{port}", "--timeout", "0.2")

        assert time.monotonic() - began < 10
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == f"unhealthy: {host}:{port}: no challenge within 0.2 s (the broker is stopped, stuck or"
        " overloaded)\n"
    )


def test_health_without_broker_or_configuration_is_unhealthy(socket_dir: Path) -> None:
    """A missing socket or configuration file gives exit status 1 and the reason, in one
    line.
    """
    no_socket = health("health", "--address", str(socket_dir / "no.sock"))
    no_file = health("--config", socket_dir / "no.yaml", "health")

    assert (no_socket.exit_code, no_file.exit_code) == (1, 1)
    assert (
        no_socket.stderr == f"unhealthy: {socket_dir}/no.sock: No such file or directory "
        "(is the broker running, and is this its address?)\n"
    )
    assert (
        no_file.stderr
        == f"unhealthy: there is no file {socket_dir}/no.yaml (make it, or give another)\n"
    )


def test_health_with_invalid_address_is_usage_error() -> None:
    """An invalid address gives exit status 2."""
    assert health("health", "--address", "[").exit_code == 2


def test_health_of_full_unix_socket_is_unhealthy(socket_dir: Path) -> None:
    """A Unix socket whose queue is full because no process accepts is stuck, not
    absent.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(socket_dir / "b"))
        server.listen(0)
        waiting = []
        try:
            for _ in range(3):
                peer = socket.socket(socket.AF_UNIX)
                waiting.append(peer)
                peer.setblocking(False)
                if peer.connect_ex(str(socket_dir / "b")):
                    break
            with pytest.raises(Unhealthy, match=r"no challenge within 0\.1 s"):
                probe(Entrance(parse(str(socket_dir / "b"))), 0.1)
        finally:
            for peer in waiting:
                peer.close()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "closed without a challenge"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the answer is not a broker's"),
        (b"\xff\xff\xff\xf0", "the answer is not a broker's"),
        (frame(b"#WELCOME#"), "the answer is not a broker's"),
    ],
)
def test_health_with_answer_other_than_challenge_is_unhealthy(sent: bytes, reason: str) -> None:
    """Neither silence nor another program's greeting is accepted as a broker."""
    with answering(sent) as address, pytest.raises(Unhealthy, match=reason):
        probe(Entrance(address), 10)


def test_health_with_challenge_in_pieces_is_healthy() -> None:
    """The challenge may arrive one byte at a time."""
    with answering(*(CHALLENGE[i : i + 1] for i in range(len(CHALLENGE)))) as address:
        assert probe(Entrance(address), 10) < 10


def test_health_with_tls_accepts_any_certificate(tmp_path: Path) -> None:
    """With TLS the challenge counts, whatever the signer of the certificate. It also
    counts if the broker wants a client certificate.
    """
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ]
    cert, key = str(tmp_path / "cert"), str(tmp_path / "key")
    subprocess.run(
        [*make, "-subj", "/CN=b", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
        timeout=60,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    with answering(CHALLENGE, context=context) as address:
        probe(Entrance(address, tls=True), 10)
    with (
        answering(b"", context=context) as address,
        pytest.raises(Unhealthy, match="closed without a challenge"),
    ):
        probe(Entrance(address, tls=True), 10)
    context.load_verify_locations(cert)
    context.verify_mode = ssl.CERT_REQUIRED
    with answering(CHALLENGE, context=context) as address:
        probe(Entrance(address, tls=True), 10)


def test_health_with_tls_at_port_without_tls_is_unhealthy() -> None:
    """If TLS is configured, any other answer is not a sign of life."""
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address, pytest.raises(Unhealthy):
        probe(Entrance(address, tls=True), 10)


class Clock:
    """The clock of the health check, which only a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(brokerd.cli.health, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_health_timeout_covers_lookup_and_all_addresses_of_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a slow look-up nor several addresses that do not answer extend the
    timeout.
    """
    clock, timeouts = Clock(monkeypatch), []

    def look_up(*arguments: object, **options: object) -> list[tuple[object, ...]]:
        clock.now += 1
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 1))
            for last in (1, 2, 3)
        ]

    def connect(sock: socket.socket, place: object) -> None:
        timeouts.append(sock.gettimeout())
        clock.now += timeouts[-1] or 0
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(Unhealthy, match="no challenge within 10 s"):
        probe(Entrance(parse("somewhere:1")), 10)

    assert timeouts == pytest.approx([3, 3, 3])


def test_health_of_host_with_broker_at_second_address_is_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No program listens at the first address."""
    with served() as broker, socket.create_server(("127.0.0.1", 0)) as unused:
        places = [("127.0.0.1", unused.getsockname()[1]), ("127.0.0.1", broker.address.port)]
        unused.close()
        results = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: results)
        assert probe(Entrance(parse("somewhere:1")), 10) < 10


def test_health_timeout_includes_tls_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the connect took is no longer available for the TLS handshake."""
    clock, timeouts = Clock(monkeypatch), []

    def wrap(context: ssl.SSLContext, sock: socket.socket) -> None:
        timeouts.append(sock.gettimeout())
        raise TimeoutError

    def connect(sock: socket.socket, place: object) -> None:
        clock.now += 4

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    with pytest.raises(Unhealthy, match="no challenge within 10 s"):
        probe(Entrance(parse("127.0.0.1:1"), tls=True), 10)

    assert timeouts == [6]


def test_health_prefers_unix_socket_then_plain_port_then_tls() -> None:
    """A Unix socket is first, then a port without TLS, then one with TLS. A wildcard
    address means this host.
    """
    unix, plain, tls = (
        Entrance(parse("/run/b")),
        Entrance(parse("h:1")),
        Entrance(parse("h:2"), tls=True),
    )
    anywhere = Entrance(parse("0.0.0.0:0"))

    assert entrance_to_ask([anywhere, tls, plain, unix]) is unix
    assert entrance_to_ask([tls, plain]) is plain
    assert entrance_to_ask([anywhere, tls]) is tls
    with pytest.raises(Unhealthy, match="no Unix socket and no fixed port"):
        entrance_to_ask([anywhere])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1"])
def test_health_of_wildcard_address_connects_to_loopback(host: str) -> None:
    """An address to bind to may not be one to connect to."""
    with served(f"[{host}]:0" if ":" in host else f"{host}:0") as broker:
        entrance = Entrance(Address(broker.address.family, host=host, port=broker.address.port))
        assert probe(entrance, 10) < 10


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        (
            (
                "listen:\n  - /run/b\n  - [h, 1]\n  - address: h:2\n    tls: {certificate: c, key:"
                " k}\n"
            ),
            "/run/b h:1 h:2 tls",
        ),
        ("listen:\n- /run/b\nclients:\n  a: {key: [\n", "/run/b"),
        ("listen: [/run/b]\nclients: {a: {key: k}}", "/run/b"),
        ("{clients: {a: {key: k}}, listen: [{address: h:1}]}", "h:1"),
        ("clients:\n  listen: {key: k}\nlisten:\n  - h:1\n", "h:1"),
        ("  listen:\n  - h:1\n  - nonsense:here\n  - 7\n  - [h, 2]\n  clients: {}\n", "h:1 h:2"),
        ("# nothing\n", ""),
        ("- listen\n", ""),
        ("? {a: b}\n: c\n", ""),
        ("listen: h:1\n", ""),
        ("log: {level: info}\nx: &a [h:1]\nlisten: *a\n", "h:1"),
        ("\t\n", ""),
        ("listen: [/run/b", ""),
    ],
)
def test_health_finds_listen_addresses_in_configuration(
    tmp_path: Path, text: str, addresses: str
) -> None:
    """The addresses are found whatever follows them, even mistakes."""
    assert " ".join(listen_addresses(text, tmp_path)) == addresses


def test_health_relative_socket_path_starts_from_configuration_file(tmp_path: Path) -> None:
    """As for the daemon, the path starts from the directory of the file."""
    assert listen_addresses("listen: [b.sock]\n", tmp_path) == [f"{tmp_path}/b.sock"]


def test_health_without_listener_in_main_file_reads_included_files(tmp_path: Path) -> None:
    """The first included file with a listener counts. Files that are missing, broken or
    read before are skipped.
    """
    (tmp_path / "c.d").mkdir()
    (tmp_path / "c.d" / "1.yaml").write_text("clients: {}\ninclude: [../b.yaml, '*.yaml']\n")
    (tmp_path / "c.d" / "2.yaml").write_bytes(b"\xff")
    (tmp_path / "c.d" / "3.yaml").write_text("listen: [b.sock]\n")

    assert listen_addresses("include: [gone.yaml, 7, 'c.d/*.yaml']\n", tmp_path) == [
        f"{tmp_path}/c.d/b.sock"
    ]


def test_health_reads_configuration_only_up_to_its_addresses(tmp_path: Path) -> None:
    """Nothing behind the addresses is read: a file that no parser can read to its end
    does no harm.
    """
    text = (
        "listen: [/run/b]\nclients:\n"
        + "".join(f"  c{i}: {{key: k{i}}}\n" for i in range(1000))
        + "\t]}["
    )

    assert listen_addresses(text, tmp_path) == ["/run/b"]


def test_health_with_configuration_in_environment_finds_broker() -> None:
    """With BROKERD_CONFIG_YAML the health check finds the broker as the daemon does."""
    with served() as broker:
        result = health("health", BROKERD_CONFIG_YAML=f"listen: ['{broker.address}']\n")

    assert result.exit_code == 0, result.output
