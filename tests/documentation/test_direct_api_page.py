"""docs/direct-api.md: its programs talk to each other."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.pages import code_blocks
from support.waiting import until

from brokerd_client import AuthenticationError
from brokerd_client.connection import Client

BLOCKS = [block.text for block in code_blocks("docs/direct-api.md") if block.language == "python"]
ADDRESS = "/run/user/1000/demo.sock"
TIMEOUT_S = 30


def test_direct_api_page_listener_and_client_exchange_objects(
    socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two programs of the page print what the other one has sent."""
    listening, dialing, _ = (
        block.replace(ADDRESS, str(socket_dir / "demo.sock")) for block in BLOCKS
    )
    listener = threading.Thread(target=exec, args=[listening, {}], daemon=True)
    listener.start()

    def dials() -> bool:
        # The socket exists a moment before it listens.
        try:
            exec(dialing, {})
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    until(dials)
    listener.join(TIMEOUT_S)
    assert capsys.readouterr().out.splitlines() == ["['any', {'object': 1}]", "thank you"]


def test_direct_api_page_loop_skips_a_peer_with_a_wrong_key() -> None:
    """The loop of the page goes on after a peer that fails."""
    served = threading.Event()
    names: dict[str, Any] = {"key": b"secret"}

    class Enough(Exception):
        pass

    def serve(connection: Any) -> None:
        connection.close()
        served.set()
        raise Enough

    exec("from brokerd_client.connection import Listener", names)
    names["serve"] = serve

    def run() -> None:
        with pytest.raises(Enough):
            exec(BLOCKS[2].replace('("0.0.0.0", 6000)', '("127.0.0.1", 0)'), names)

    loop = threading.Thread(target=run, daemon=True)
    loop.start()
    until(lambda: "listener" in names)
    address = names["listener"].address
    with pytest.raises(AuthenticationError):
        Client(address, authkey=b"wrong")
    with Client(address, authkey=b"secret"):
        assert served.wait(TIMEOUT_S)
    loop.join(TIMEOUT_S)
    names["listener"].close()
