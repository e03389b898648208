"""`make run`: the example broker, and the commands that it prints for other terminals."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30


@pytest.fixture
def printed(socket_dir: Path) -> Iterator[str]:
    """Run the example from a copy, which leaves the checkout alone; yield what it prints."""
    (socket_dir / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "example_broker.py", socket_dir / ".ci")
    log = socket_dir / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, socket_dir / ".ci" / "example_broker.py"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: "daemon.started" in log.read_text(), "the broker does not start")
        yield log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0


def pasted(block: str) -> subprocess.CompletedProcess[str]:
    """Return what a shell makes of the block, typed as it was printed."""
    return subprocess.run(
        ["bash"], input=block, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_example_broker_commands_work_as_printed(printed: str) -> None:
    """Bob listens; alice, and carol in stock Python, reach him."""
    bob, alice, carol = re.split(r"\n(?:In a third one|Or be carol).*:\n", printed)
    bob = bob.split(":\n", 1)[1]
    carol = carol.partition("\nThis terminal")[0]
    with subprocess.Popen(["bash", "-c", bob.strip()], stdout=subprocess.PIPE, text=True) as listen:
        try:
            assert listen.stdout is not None
            [clients] = [line for line in alice.splitlines() if line.endswith(" clients")]
            exports = "".join(f"{line}\n" for line in alice.splitlines() if "export" in line)
            until(lambda: "bob\tonline" in pasted(exports + clients).stdout)
            done = pasted(alice)
            assert (done.returncode, done.stderr) == (0, "")
            assert "hello, I am bob\nalice\tonline" in done.stdout
            done = pasted(carol)
            assert (done.returncode, done.stderr) == (0, "")
            received = [listen.stdout.readline() for _ in range(3)]
        finally:
            listen.terminate()
    assert received == [
        "alice\thello from alice\n",
        "alice\twho are you?\n",
        "carol\thello from a stock Python\n",
    ]
