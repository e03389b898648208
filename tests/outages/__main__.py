"""``make faults``: run every test of a fault, and write their accounts into
docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from support import reliability_page
from support.outages.traffic import Account

TESTS = Path(__file__).resolve().parent.parent
FILES = (
    "outages/test_killed_and_stopped.py",
    "outages/test_resets.py",
    "outages/test_replaced.py",
    "outages/test_exhausted.py",
    "outages/test_cluster_processes.py",
    "system/test_bad_network.py",
    "system/test_cluster_partitions.py",
    "system/test_full_disk.py",
)


def table(accounts: Iterable[Account]) -> str:
    """Return the accounts in Markdown."""
    lines = [
        (
            "| fault | sent | delivered | refused | in doubt | gone with it | twice | out of order"
            " | unaccounted | seen |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.fault} | {each.sent:,} | {each.delivered:,} | {each.refused:,} |"
        f" {each.in_doubt:,} | {each.died:,} | {each.twice:d} | {each.out_of_order:d} |"
        f" {each.unaccounted:d} | {each.seen} |"
        for each in accounts
    ]
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "",
            *(str(TESTS / file) for file in FILES),
        ]
        status = subprocess.run(
            command, env={**os.environ, "BROKERD_FAULTS": str(rows)}, check=False
        ).returncode
        # A fault that was tested twice, with some positions and with all, has the row of its
        # last run.
        found = {
            row["fault"]: Account(**row) for row in map(json.loads, rows.read_text().splitlines())
        }
    if status == 0:
        reliability_page.put("faults", table(found.values()))
    return status


if __name__ == "__main__":
    sys.exit(main())
