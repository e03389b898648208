"""A daemon whose new processes run code of the test before they start.

The program is the usual one. But a process that is to take over first runs the file
``successor.py`` beside the configuration, if there is one, and the first process runs
``first.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.broker_process import BrokerProcess
from support.raw_client import Raw

PROGRAM = """
import os, sys
from pathlib import Path
name = "successor.py" if "BROKERD_UPGRADE_FD" in os.environ else "first.py"
before = Path(sys.argv[1]).with_name(name)
if before.exists():
    exec(before.read_text())
from brokerd.daemon.process import run
sys.exit(run(Path(sys.argv[1])))
"""
#: What a process that is to hand over does, so that a test need not wait for long. The
#: new process needs a second to start, and a busy machine several.
IMPATIENT = """
from brokerd.upgrade import old_process as predecessor
predecessor._HELLO_S = 60.0
predecessor._HANDOVER_S = 3.0
predecessor._MOMENT_S = 2.0
"""


class Upgradable(BrokerProcess):
    """A running daemon that can be upgraded."""

    def __init__(self, directory: Path, *given: Any, first: str = "", **more: Any) -> None:
        (directory / "first.py").write_text(first)
        super().__init__(directory, *given, program=PROGRAM, **more)

    def before_new_process(self, code: str) -> None:
        """Let the next processes run this code before anything else."""
        (self.directory / "successor.py").write_text(code)

    def upgrade(self, ops: Raw) -> dict[str, Any]:
        """Ask for an upgrade, and return the answer."""
        answer = ops.ask("upgrade").json
        assert isinstance(answer, dict)
        return answer


def is_running(pid: int) -> bool:
    """Return whether there is a process with this number that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descriptors(pid: int) -> set[str]:
    """Return the paths of the process's open files."""
    folder = Path(f"/proc/{pid}/fd")
    return {str(each.readlink()) for each in folder.iterdir()}
