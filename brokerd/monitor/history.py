"""The last 15 minutes of the broker, as one sample per second.

The number of samples is bounded. A sample costs one pass over the connections, in
slices between which messages pass.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from brokerd.monitor.collect import Reading, take
from brokerd.monitor.loop_lag import Lag
from brokerd.monitor.sources import Sources

__all__ = ["SECONDS", "History"]

#: Number of samples that are kept, one per second.
SECONDS: Final = 900
_STATM: Final = Path("/proc/self/statm")


class History:
    """Takes a sample each second while the monitor is on.

    Attributes:
        samples: The samples as JSON objects, oldest first.
        ticks: The number of samples taken so far.
        on_sample: Called after each sample.
    """

    def __init__(self, sources: Sources, lag: Lag) -> None:
        self._sources = sources
        self._lag = lag
        self._before: tuple[float, Reading, float, int] | None = None
        self.samples: deque[dict[str, Any]] = deque(maxlen=SECONDS)
        self.ticks = 0
        self.on_sample: Callable[[], None] = lambda: None
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Take no more samples."""
        self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self.sample()
            self.on_sample()
            # A second that was missed is not made up for.
            due = max(due + 1.0, loop.time())
            await asyncio.sleep(due - loop.time())

    async def sample(self) -> None:
        """Take a sample; the rates are those since the previous one."""
        reading = await take(self._sources, None)
        now = asyncio.get_running_loop().time()
        late, looks = self._lag.total, sum(self._lag.counts)
        if self._before is not None:
            then, before, late_before, looks_before = self._before
            elapsed = max(now - then, 0.001)
            refused = Counter(reading.refused)
            refused.subtract(before.refused)
            self.samples.append(
                {
                    "at": round(time.time(), 1),
                    "connections": reading.connections,
                    "online": reading.online,
                    "in": round((reading.counts.messages_in - before.counts.messages_in) / elapsed),
                    "out": round(
                        (reading.counts.messages_out - before.counts.messages_out) / elapsed
                    ),
                    "bytes_in": round((reading.counts.bytes_in - before.counts.bytes_in) / elapsed),
                    "bytes_out": round(
                        (reading.counts.bytes_out - before.counts.bytes_out) / elapsed
                    ),
                    "refused": {str(code): count for code, count in refused.items() if count > 0},
                    "dropped": reading.dropped - before.dropped,
                    "waiting": reading.queued_bytes,
                    "fullest": round(reading.fullest, 3),
                    "slow": reading.slow,
                    "held": reading.held,
                    "lag": round((late - late_before) / max(looks - looks_before, 1), 5),
                    "memory": _resident_bytes(),
                }
            )
            self.ticks += 1
        self._before = now, reading, late, looks


def _resident_bytes() -> int:
    """Return the memory that the process has in use; 0 where that is not known."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
