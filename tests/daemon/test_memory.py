"""Memory that the daemon's own process keeps for its next use."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Fills and empties a hundred outboxes, and prints how many pages the system had to give
#: for that the second time.
_OUTBOXES = """
import resource
from brokerd.daemon.memory import keep_freed

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    outboxes = [bytearray(130_000) for _ in range(100)]
    del outboxes
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not keep_freed():
    print(-1)
else:
    fill()
    print(fill())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about the C library of Linux")
def test_memory_emptied_outboxes_keep_their_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUTBOXES], capture_output=True, text=True, check=True
    )
    pages = int(done.stdout)
    if pages < 0:
        pytest.skip("this C library has no mallopt")
    # They have 3,200 pages.
    assert pages < 320
