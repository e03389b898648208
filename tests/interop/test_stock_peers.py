"""Our Listener and Client against the standard library's of every Python found: right
key, wrong key, both families.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.interpreters import ALL_VERSIONS, interpreters

from brokerd_client.connection import AuthenticationError, Client, Connection, Listener, wait

TIMEOUT_S = 30
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "stock_peer.py"
ONLY_MD5 = ("2.7", "3.6", "3.7", "3.8", "3.9", "3.10", "3.11")
FAMILIES = ("AF_UNIX", "AF_INET")


class StockPeer:
    """A process of another Python that dials and listens on command."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-E", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, do: str, address: Any, key: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "address": address, "key": key}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert wait([self.process.stdout], TIMEOUT_S), "the stock peer said nothing"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        self.process.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, StockPeer]]:
    """One process for each Python, all started at once."""
    started = {version: StockPeer(python) for version, python in interpreters().items()}
    yield started
    for peer in started.values():
        peer.end()


@pytest.fixture(params=ALL_VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    if version not in interpreters():
        pytest.skip(
            f"no Python {version} here: neither on PATH, nor in pyenv, nor in BROKERD_TEST_PYTHONS"
        )
    return version


@pytest.fixture
def peer(version: str, peers: dict[str, StockPeer]) -> StockPeer:
    return peers[version]


@pytest.fixture
def free_address(socket_dir: Path) -> Callable[[str], Any]:
    return lambda family: str(socket_dir / "s") if family == "AF_UNIX" else ("127.0.0.1", 0)


def hear_all(connection: Connection) -> None:
    """Receive what a stock peer says, and answer."""
    with connection:
        assert connection.recv_bytes() == b""
        assert connection.recv_bytes() == b"x" * 100000
        assert connection.recv() == [2.25, None, 17]
        connection.send_bytes(b"heard you")


def address_of(answer: dict[str, Any]) -> Any:
    address = answer["address"]
    return tuple(address) if isinstance(address, list) else address


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_client_right_key_is_accepted(
    peer: StockPeer, family: str, free_address: Callable[[str], Any]
) -> None:
    """Every Python's own Client gets through our Listener, and messages pass both ways."""
    with Listener(free_address(family), family, authkey="the key") as listener:
        peer.begin("dial", listener.address, "the key")
        hear_all(listener.accept(TIMEOUT_S))
        assert peer.answer() == {"heard": "heard you"}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_client_wrong_key_is_told(
    peer: StockPeer, family: str, free_address: Callable[[str], Any]
) -> None:
    """A stock Client with another key gets AuthenticationError, and so does our
    accept().
    """
    with Listener(free_address(family), family, authkey="the key") as listener:
        peer.begin("dial", listener.address, "another key")
        with pytest.raises(
            AuthenticationError, match="the peer's answer was made with a key that is not accepted"
        ):
            listener.accept(TIMEOUT_S)
        assert peer.answer() == {"error": "AuthenticationError"}


@pytest.mark.parametrize("family", FAMILIES)
def test_client_at_a_stock_listener_is_accepted(
    peer: StockPeer, family: str, free_address: Callable[[str], Any]
) -> None:
    """Our Client gets through every Python's own Listener, and messages pass both ways."""
    peer.begin("listen", free_address(family), "the key")
    hear_all(Client(address_of(peer.answer()), family, authkey="the key", timeout=TIMEOUT_S))
    assert peer.answer() == {"heard": "heard you"}


@pytest.mark.parametrize("family", FAMILIES)
def test_client_at_a_stock_listener_wrong_key_is_told(
    peer: StockPeer, family: str, free_address: Callable[[str], Any]
) -> None:
    """A stock Listener that rejects our key makes our Client say that it did."""
    peer.begin("listen", free_address(family), "the key")
    with pytest.raises(AuthenticationError, match="the peer rejected our answer"):
        Client(address_of(peer.answer()), family, authkey="another key", timeout=TIMEOUT_S)
    assert peer.answer() == {"error": "AuthenticationError"}


def test_listener_without_md5_accepts_newer_stock_clients(
    version: str, peer: StockPeer, free_address: Callable[[str], Any]
) -> None:
    """With allow_md5=False, Python 3.12 and later come in, and older ones are refused
    by name of that option.
    """
    with Listener(free_address("AF_UNIX"), authkey="the key", allow_md5=False) as listener:
        peer.begin("dial", listener.address, "the key")
        if version in ONLY_MD5:
            with pytest.raises(AuthenticationError, match="allow_md5"):
                listener.accept(TIMEOUT_S)
            assert peer.answer() == {"error": "AuthenticationError"}
        else:
            hear_all(listener.accept(TIMEOUT_S))
            assert peer.answer() == {"heard": "heard you"}


def test_client_without_md5_accepts_newer_stock_listeners(
    version: str, peer: StockPeer, free_address: Callable[[str], Any]
) -> None:
    """With allow_md5=False, our Client refuses listeners of Python 3.11 and older, and
    says why.
    """
    peer.begin("listen", free_address("AF_UNIX"), "the key")
    address = address_of(peer.answer())
    if version in ONLY_MD5:
        with pytest.raises(AuthenticationError, match="allow_md5"):
            Client(address, authkey="the key", allow_md5=False, timeout=TIMEOUT_S)
        assert peer.answer()["error"] in ("EOFError", "ConnectionResetError", "error", "IOError")
    else:
        hear_all(Client(address, authkey="the key", allow_md5=False, timeout=TIMEOUT_S))
        assert peer.answer() == {"heard": "heard you"}
