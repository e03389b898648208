"""The services that the parts of one server share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from structlog.typing import FilteringBoundLogger

    from brokerd.config.model import Limits
    from brokerd.core.broker import Broker
    from brokerd.log.rate_limit import LogRateLimiter
    from brokerd.net.connection.busy_poll import BusyPoll
    from brokerd.net.connection.connections import Connections
    from brokerd.net.connection.disconnects import Disconnects
    from brokerd.net.connection.frame_memory import FrameMemory
    from brokerd.net.connection.liveness import Liveness
    from brokerd.net.connection.reset_recheck import ResetRecheck
    from brokerd.net.connection.turns import Turns
    from brokerd.net.counters import Counters
    from brokerd.net.handshake.keyring import Keyring
    from brokerd.net.settlement import Settlement

__all__ = ["READ_BUFFER", "Context"]

#: Size of the one read buffer that all connections share, in bytes.
READ_BUFFER: Final = 256 * 1024
#: Frames of one sender handled on the slow path in one turn of the event loop: a
#: millisecond's work, which a request of another client waits for twice.
_TURN_BUDGET: Final = 64


def _read_buffer() -> memoryview:
    return memoryview(bytearray(READ_BUFFER))


@dataclass(slots=True, eq=False)
class Context:
    """The services of one server. The Server makes them and hands them to its parts.

    keyring, limits: replaced by a reload, so they are read at each use.
    wall: returns the time of day in seconds since the epoch.
    buffer: the one read buffer; a read is routed before the next one begins.
    turn_budget: see Turn.budget.
    """

    loop: asyncio.AbstractEventLoop
    broker: Broker
    keyring: Keyring
    limits: Limits
    log: FilteringBoundLogger
    log_limiter: LogRateLimiter
    counters: Counters
    wall: Callable[[], float]
    connections: Connections
    settlement: Settlement
    liveness: Liveness
    reset_recheck: ResetRecheck
    busy_poll: BusyPoll
    frame_memory: FrameMemory
    disconnects: Disconnects
    turns: Turns
    buffer: memoryview = field(default_factory=_read_buffer)
    turn_budget: int = _TURN_BUDGET
