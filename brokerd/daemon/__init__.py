"""The parts put together: a broker inside any asyncio program, and the process around
it.
"""

from __future__ import annotations

from brokerd.daemon.daemon import Daemon, Stopped

__all__ = ["Daemon", "Stopped"]
