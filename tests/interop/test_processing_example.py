"""The example of processing.connection's documentation, as two processes: at an address of
TCP, and by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from brokerd.testing import running
from brokerd_client.connection import wait

#: What the client prints.
RECEIVED = [
    "[2.25, None, 'junk', <class 'float'>]",
    "b'hello'",
    "8",
    "array('i', [42, 1729, 0, 0, 0])",
]
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

    assert client.stdout.splitlines() == RECEIVED
    assert output.startswith("connection accepted from ('127.0.0.1', ")
    assert server.returncode == 0


def test_processing_example_by_name_differs_in_its_address_alone(tmp_path: Path) -> None:
    """Both programs run through a broker when the line with the address is another one."""
    for name, line in (
        ("server.py", 'address = ("localhost", 0)'),
        ("client.py", 'address = ("localhost", int(sys.argv[1]))'),
    ):
        text = (EXAMPLE / name).read_text(encoding="utf-8")
        assert text.count(line) == 1
        (tmp_path / name).write_text(text.replace(line, 'address = "broker://server"'))
    with running({"server": {}, "client": {"send_to": ["server"]}}) as broker:
        server = subprocess.Popen(
            [sys.executable, tmp_path / "server.py"],
            env={**os.environ, **broker.environ("server")},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            assert wait([server.stdout], TIMEOUT_S), "the server does not listen"
            client = subprocess.run(
                [sys.executable, tmp_path / "client.py"],
                env={**os.environ, **broker.environ("client")},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=True,
            )
            output, _ = server.communicate(timeout=TIMEOUT_S)
        finally:
            server.kill()
            server.wait()

    assert client.stdout.splitlines() == RECEIVED
    assert output.splitlines()[-1] == "connection accepted from client"
    assert server.returncode == 0
