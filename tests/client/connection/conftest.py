"""Fixtures of the direct API: threads that are joined, and peers that break
the rules byte by byte.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from support.threads import Aside

Dial = Callable[[Any], socket.socket]


@pytest.fixture
def aside() -> Iterator[Aside]:
    """Run a function in another thread: ``aside(function, *args)`` gives its future.
    All are waited for.
    """
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


@pytest.fixture
def dial() -> Iterator[Dial]:
    """Connect a bare socket to a listener's address, for peers that say what no Client
    says. All are closed.
    """
    with ExitStack() as stack:

        def connect(address: Any) -> socket.socket:
            sock = stack.enter_context(
                socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
            )
            sock.settimeout(30)
            sock.connect(address)
            return sock

        yield connect
