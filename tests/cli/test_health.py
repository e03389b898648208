"""brokerd health: a sign of life from the broker where its configuration says it
listens, with no key in hand.
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


def found(text: str, directory: Path) -> list[str]:
    """Return the addresses in a configuration, those with TLS marked."""
    file = directory / "b.yaml"
    file.write_text(text)
    return [f"{each.address}{' tls' * each.tls}" for each in entrances(str(file), {})]


@contextmanager
def answering(*parts: bytes, context: ssl.SSLContext | None = None) -> Iterator[Address]:
    """Give the address of a server that sends these bytes to its first connection and
    closes it.
    """
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
                # The client may leave in the middle of TLS.
                peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("AF_INET", *server.getsockname())
        finally:
            thread.join(30)


def test_a_living_broker_is_healthy_and_logs_nothing(tmp_path: Path) -> None:
    """Exit status 0 with one line; the broker counts nobody as refused and says nothing
    above level debug.
    """
    with served() as broker:
        file = tmp_path / "b.yaml"
        file.write_text(f"listen: ['{broker.address}']\nclients: {{alice: {{key_file: /gone}}}}\n")

        result = health("--config", file, "health")

        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(f"healthy: {broker.address}: answered in ")
        assert broker.log.wait("client.left")[0].level == "debug"
        assert not broker.log.named("client.refused")


def test_who_sends_a_byte_and_leaves_is_refused() -> None:
    """Only a peer that said nothing at all is passed over in the log."""
    with served() as broker:
        with broker.raw() as peer:
            peer.read_body()
            peer.sock.sendall(b"\0")
        assert "closed by the peer" in broker.log.wait("client.refused")[0].fields["reason"]
        assert not broker.log.named("client.left")


def test_who_left_before_the_challenge_was_sent_is_not_refused() -> None:
    """A health check that gave up on a frozen broker leaves no warning when the broker
    goes on.
    """
    with served() as broker:
        peer = broker.raw()

        def freeze() -> None:
            # The loop stands still meanwhile. A reset: the broker's own bytes are lost,
            # and it is told so.
            gone = broker.raw()
            gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()

        peer.close()
        broker.call(freeze)
        broker.log.wait("client.left", 2)
        assert not broker.log.named("client.refused")


@pytest.mark.timing
def test_a_frozen_broker_is_not_healthy(tmp_path: Path) -> None:
    """A listening socket that the system answers for, with nobody behind it, is exit
    status 1 within the timeout.
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


def test_no_broker_is_not_healthy(socket_dir: Path) -> None:
    """Nobody listening, no socket, no configuration: exit status 1 and the reason, in
    one line.
    """
    nobody = health("health", "--address", str(socket_dir / "no.sock"))
    no_file = health("--config", socket_dir / "no.yaml", "health")

    assert (nobody.exit_code, no_file.exit_code) == (1, 1)
    assert (
        nobody.stderr == f"unhealthy: {socket_dir}/no.sock: No such file or directory "
        "(is the broker running, and is this its address?)\n"
    )
    assert (
        no_file.stderr
        == f"unhealthy: there is no file {socket_dir}/no.yaml (make it, or give another)\n"
    )


def test_no_address_at_all_is_a_usage_error() -> None:
    """What is no address is exit status 2."""
    assert health("health", "--address", "[").exit_code == 2


def test_a_full_socket_is_not_healthy(socket_dir: Path) -> None:
    """A Unix socket whose queue is full because nobody accepts is stuck, not absent."""
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
def test_what_is_no_challenge_is_not_healthy(sent: bytes, reason: str) -> None:
    """Neither silence nor another program's greeting passes for a broker."""
    with answering(sent) as address, pytest.raises(Unhealthy, match=reason):
        probe(Entrance(address), 10)


def test_a_challenge_in_pieces_is_one() -> None:
    """The challenge may arrive one byte at a time."""
    with answering(*(CHALLENGE[i : i + 1] for i in range(len(CHALLENGE)))) as address:
        assert probe(Entrance(address), 10) < 10


def test_tls(tmp_path: Path) -> None:
    """Behind TLS the challenge counts whoever signed the certificate, and so does the
    wish for one of ours.
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


def test_a_port_that_speaks_no_tls_is_not_healthy() -> None:
    """Where TLS is configured and something else answers, that is no sign of life."""
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address, pytest.raises(Unhealthy):
        probe(Entrance(address, tls=True), 10)


class Clock:
    """The time of the health check, which passes only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(brokerd.cli.health, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_the_time_is_for_all_addresses_of_a_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slow look-up nor addresses that do not answer, one after the other,
    make it longer.
    """
    clock, given = Clock(monkeypatch), []

    def look_up(*outgoing_requests: object, **more: object) -> list[tuple[object, ...]]:
        clock.now += 1
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", 1))
            for last in (1, 2, 3)
        ]

    def connect(sock: socket.socket, place: object) -> None:
        given.append(sock.gettimeout())
        clock.now += given[-1] or 0
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(Unhealthy, match="no challenge within 10 s"):
        probe(Entrance(parse("somewhere:1")), 10)

    assert given == pytest.approx([3, 3, 3])


def test_the_second_address_of_a_host_may_be_the_broker_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens at the first."""
    with served() as broker, socket.create_server(("127.0.0.1", 0)) as nobody:
        places = [("127.0.0.1", nobody.getsockname()[1]), ("127.0.0.1", broker.address.port)]
        nobody.close()
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *outgoing_requests, **more: found)
        assert probe(Entrance(parse("somewhere:1")), 10) < 10


def test_the_time_goes_on_while_tls_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What connecting took is not there for the handshake of TLS any more."""
    clock, given = Clock(monkeypatch), []

    def wrap(context: ssl.SSLContext, sock: socket.socket) -> None:
        given.append(sock.gettimeout())
        raise TimeoutError

    def connect(sock: socket.socket, place: object) -> None:
        clock.now += 4

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    with pytest.raises(Unhealthy, match="no challenge within 10 s"):
        probe(Entrance(parse("127.0.0.1:1"), tls=True), 10)

    assert given == [6]


def test_the_nearest_entrance_is_asked() -> None:
    """A Unix socket first, then a port without TLS, then one with it; everywhere means
    this machine.
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
def test_a_broker_at_every_interface_is_asked_at_this_one(host: str) -> None:
    """An address to bind to is not one to connect to."""
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
def test_where_a_configuration_listens(tmp_path: Path, text: str, addresses: str) -> None:
    """The addresses are found whatever follows them, mistakes among it."""
    assert " ".join(found(text, tmp_path)) == addresses


def test_a_relative_socket_is_beside_its_file(tmp_path: Path) -> None:
    """As for the daemon, the path starts from the directory of the file."""
    assert found("listen: [b.sock]\n", tmp_path) == [f"{tmp_path}/b.sock"]


def test_included_files_are_asked_where_the_main_one_has_no_listener(tmp_path: Path) -> None:
    """The first included file with a listener counts; what is missing, broken or was
    read before is passed over.
    """
    (tmp_path / "c.d").mkdir()
    (tmp_path / "c.d" / "1.yaml").write_text("clients: {}\ninclude: [../b.yaml, '*.yaml']\n")
    (tmp_path / "c.d" / "2.yaml").write_bytes(b"\xff")
    (tmp_path / "c.d" / "3.yaml").write_text("listen: [b.sock]\n")

    assert found("include: [gone.yaml, 7, 'c.d/*.yaml']\n", tmp_path) == [f"{tmp_path}/c.d/b.sock"]


def test_a_large_configuration_costs_no_more_than_its_beginning(tmp_path: Path) -> None:
    """Nothing behind the addresses is read: a file that no parser could read on is no
    hindrance.
    """
    text = (
        "listen: [/run/b]\nclients:\n"
        + "".join(f"  c{i}: {{key: k{i}}}\n" for i in range(1000))
        + "\t]}["
    )

    assert found(text, tmp_path) == ["/run/b"]


def test_the_configuration_may_stand_in_the_environment() -> None:
    """With BROKERD_CONFIG_YAML the health check finds the broker as the daemon does."""
    with served() as broker:
        result = health("health", BROKERD_CONFIG_YAML=f"listen: ['{broker.address}']\n")

    assert result.exit_code == 0, result.output
