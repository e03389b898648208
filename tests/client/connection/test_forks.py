"""The registry of objects that change in a forked child process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: A process with a child and a grandchild, which forks while its parent is sending.
FORKS = """
import os
from brokerd_client._common import forks
from brokerd_client.connection import Pipe

class Once:
    def _after_fork(self):
        calls.append("once")

class Always:
    def _after_fork(self):
        forks.register(self)
        calls.append("always")

calls = []
once, always = Once(), Always()
forks.register(once)
forks.register(always)
os.register_at_fork(before=calls.clear)
one, other = Pipe()

child = os.fork()
if not child:
    print("child:", *sorted(calls), flush=True)
    with one._send_lock:
        grandchild = os.fork()
        if not grandchild:
            print("grandchild:", *sorted(calls), flush=True)
            one.send("from the grandchild")
            os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(other.recv(), *calls)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forks_registered_object_is_called_once_and_again_if_it_registers_again() -> None:
    """A connection registers again: a grandchild has none of the child's locks."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKS],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "child: always once",
        "grandchild: always",
        "from the grandchild",
    ]
