"""What the monitor costs where it is off: nothing."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, sys
from brokerd.config.load import build_config
from brokerd.daemon import Daemon
from brokerd.log.logger import quiet_log

async def main():
    config = build_config(["127.0.0.1:0"], {"alice": b"k"}, monitor=%r)
    async with Daemon(config, quiet_log()):
        print(*sorted({"aiohttp", "prometheus_client"} & sys.modules.keys()))

asyncio.run(main())
"""


def loaded(monitor: str | None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % monitor],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_without_a_monitor_nothing_of_it_is_imported() -> None:
    """A daemon without it starts as quickly as if it did not exist; one with it has
    what it needs.
    """
    assert loaded(None) == ""
    assert loaded("127.0.0.1:0") == "aiohttp prometheus_client"
