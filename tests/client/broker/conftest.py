"""Makes the helpers beside the tests importable, and gives each test a broker of its
own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_broker import FakeServer

#: These look inside a broker, which a broker of another Python does not allow.
collect_ignore = (
    ["test_passed_frames.py", "test_pipe_address.py"]
    if "BROKERD_BROKER_PYTHON" in os.environ
    else []
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    """A fake broker on a Unix socket, which knows alice, bob and carol, each by the key
    of that name.
    """
    server = FakeServer(
        str(tmp_path / "b.sock"), {name: name.encode() for name in ("alice", "bob", "carol")}
    )
    server.start()
    yield server
    server.stop()
