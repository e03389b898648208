"""A monitor that is off costs nothing at start."""

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


def loaded_dependencies(monitor: str | None) -> str:
    """Start a daemon; return the monitor's dependencies that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % monitor],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_monitor_not_configured_imports_no_dependency() -> None:
    """A daemon without a monitor starts without its dependencies. One with a monitor
    imports them.
    """
    assert loaded_dependencies(None) == ""
    assert loaded_dependencies("127.0.0.1:0") == "aiohttp prometheus_client"
