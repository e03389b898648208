"""The example of processing.connection's documentation, as two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from brokerd_client.connection import wait

EXAMPLE = Path(__file__).parent / "processing_example"
TIMEOUT_S = 30


def test_processing_example_server_and_client_exchange_messages() -> None:
    """The example's server and client print what its documentation says they print."""
    server = subprocess.Popen(
        [sys.executable, EXAMPLE / "server.py"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert wait([server.stdout], TIMEOUT_S), "the server printed no address"
        port = server.stdout.readline().strip()
        client = subprocess.run(
            [sys.executable, EXAMPLE / "client.py", port],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        output, _ = server.communicate(timeout=TIMEOUT_S)
    finally:
        server.kill()
        server.wait()

    assert client.stdout.splitlines() == [
        "[2.25, None, 'junk', <class 'float'>]",
        "b'hello'",
        "8",
        "array('i', [42, 1729, 0, 0, 0])",
    ]
    assert output.startswith("connection accepted from ('127.0.0.1', ")
    assert server.returncode == 0
