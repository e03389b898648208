"""The reflection attack: a listener without the key, and two clients with the key that
connect at once.

The attacker passes the first client's challenge to the second as its own, and sends the
answer back. The standard library's clients accept it. The library's clients do not.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import pytest
from support.client_faces import Asyncio, Blocking, Face
from support.tls.authority import Authority
from support.tls.relay import read_frame

from brokerd_client import connection
from brokerd_client.connection import answer_challenge, deliver_challenge
from brokerd_client.errors import AuthenticationError

TIMEOUT_S = 20.0
KEY = b"the key that two clients share"


class Attacker:
    """A listener that has no key.

    Args:
        offer: The bytes behind its own nonce.
    """

    def __init__(self, context: ssl.SSLContext | None, offer: bytes) -> None:
        self._context = context
        self._offer = offer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT_S)
        host, port = self._listener.getsockname()
        self._address: tuple[str, int] = (host, port)
        self._thread = threading.Thread(target=self._attack, name="attacker")
        #: Whether the first client took it for a listener with the key.
        self.succeeded = False
        self.met_first = threading.Event()

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.join(TIMEOUT_S)
        self._listener.close()
        assert not self._thread.is_alive()

    def _accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        sock.settimeout(TIMEOUT_S)
        return self._context.wrap_socket(sock, server_side=True) if self._context else sock

    def _attack(self) -> None:
        with self._accept() as first:
            self.met_first.set()
            with contextlib.suppress(OSError, EOFError):
                self._reflect(first)

    def _reflect(self, first: socket.socket) -> None:
        with self._accept() as second:
            # A client that retries finds no listener.
            self._listener.close()
            send_frame(first, b"#CHALLENGE#{sha256}" + bytes(40) + self._offer)
            read_frame(first)
            send_frame(first, b"#WELCOME#")
            challenge = read_frame(first)
            send_frame(second, challenge)
            answer = read_frame(second)
            # Strip the name and the mark, which only a client's answer may carry.
            send_frame(first, answer[: 8 + 32] if answer.startswith(b"{sha256}") else answer)
            self.succeeded = read_frame(first) == b"#WELCOME#"
            # This pickle comes from the attacker, and the client unpickles it in
            # recv().
            send_frame(first, b"\x80\x04\x8c\x05owned\x94.")


def send_frame(sock: socket.socket, body: bytes) -> None:
    sock.sendall(len(body).to_bytes(4, "big") + body)


@pytest.fixture
def two() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def both(pool: ThreadPoolExecutor, connect: Callable[[], Any]) -> list[BaseException | None]:
    """Connect twice at once, and return the exceptions."""
    calls: list[Future[Any]] = [pool.submit(connect) for _ in range(2)]
    return [call.exception(TIMEOUT_S) for call in calls]


@pytest.fixture(params=[Blocking, Asyncio])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_reflection_attack_on_library_clients_fails(
    tls: bool, face: Face, authority: Authority, trusting: ssl.SSLContext, two: ThreadPoolExecutor
) -> None:
    """Both clients reject the attacker. The second one refuses a client's challenge,
    and the first one gets no answer from the listener.

    Over TLS the attacker has a certificate that both trust, so that both bind their
    keys to the same channel.
    """
    context, options, offer = None, {}, b""
    if tls:
        issued = authority.issue("attacker")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.certificate, issued.key)
        options, offer = {"ssl": trusting}, b"\0tls-server-end-point 2"
    with Attacker(context, offer) as attacker:
        host, port = attacker.address
        address = f"tls://{host}:{port}" if tls else f"{host}:{port}"
        errors = both(two, lambda: face.connect(address, "alice", KEY, reconnect=False, **options))
    assert not attacker.succeeded
    assert all(errors)
    assert any(isinstance(error, AuthenticationError) for error in errors)


def test_reflection_attack_on_connection_client_fails(two: ThreadPoolExecutor) -> None:
    """The Client of the direct API never reads the attacker's pickle."""
    with Attacker(None, b"") as attacker:
        errors = both(
            two,
            lambda: connection.Client(
                attacker.address, authkey=KEY, timeout=TIMEOUT_S, allow_md5=False
            ).recv(),
        )
    assert not attacker.succeeded
    assert all(isinstance(error, (AuthenticationError, EOFError, OSError)) for error in errors)
    assert any("client's challenge" in str(error) for error in errors)


def test_reflection_attack_on_answer_challenge_fails(
    two: ThreadPoolExecutor,
) -> None:
    """Programs that call answer_challenge and deliver_challenge themselves are
    protected as well.
    """

    def connect() -> Any:
        with connection.Client(attacker.address, timeout=TIMEOUT_S) as client:
            answer_challenge(client, KEY)
            deliver_challenge(client, KEY)
            return client.recv()

    with Attacker(None, b"") as attacker:
        errors = both(two, connect)
    assert not attacker.succeeded
    assert any("client's challenge" in str(error) for error in errors)


def test_reflection_attack_on_stock_client_succeeds(two: ThreadPoolExecutor) -> None:
    """This proves that the attack of these tests works: the standard library's client
    unpickles the attacker's bytes.
    """
    got: list[Any] = []

    def connect() -> None:
        with multiprocessing.connection.Client(attacker.address, authkey=KEY) as client:
            got.append(client.recv())

    with Attacker(None, b"") as attacker:
        both(two, connect)
    assert attacker.succeeded
    assert got == ["owned"]


def test_reflection_attack_on_key_shared_with_stock_client_succeeds(
    two: ThreadPoolExecutor,
) -> None:
    """This risk remains (docs/security.md): a stock client answers the marked challenge
    of a library client.
    """
    with Attacker(None, b"") as attacker:
        ours = two.submit(
            lambda: connection.Client(attacker.address, authkey=KEY, timeout=TIMEOUT_S).recv()
        )

        def stock() -> None:
            with multiprocessing.connection.Client(attacker.address, authkey=KEY):
                pass

        # The client that connects first is deceived.
        assert attacker.met_first.wait(TIMEOUT_S)
        two.submit(stock)
        assert ours.result(TIMEOUT_S) == "owned"
    assert attacker.succeeded
