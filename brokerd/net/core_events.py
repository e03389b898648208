"""What the core noted, as events of the log: their levels and the names of their fields.

A message that is refused is its sender's affair: he has the answer, and at the level ``debug`` the log has it too. That
somebody was *denied* something is the operator's: the rules are wrong, or somebody tries what he may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from brokerd.core.log_events import LogEvent
from brokerd.log.rate_limit import LogRateLimiter
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["LEVELS", "report"]

#: Each event the core notes: its level, and what the other side is called in it.
LEVELS: Final = {
    "message.refused": ("debug", "to"),
    "message.dropped": ("warning", "sender"),
    "client.slow": ("warning", "sender"),
    "client.recovered": ("info", ""),
    "client.held": ("debug", "to"),
    "client.unsubscribed": ("info", "topic"),
    "admin.asked": ("info", "to"),
}
#: What codes are called where they are no error's.
_CODES: Final = {"client.slow": "when_full", "client.unsubscribed": "group", "admin.asked": "op"}
#: Operations that change nothing, and that a screen may ask for every second.
_LOOKING: Final = frozenset({"stats", "connections", "can", "keys"})


def report(log_events: Iterable[LogEvent], log_limiter: LogRateLimiter) -> None:
    """Log what the core noted."""
    for event, session, other, code, reason, times in log_events:
        level, other_side = LEVELS[event]
        if code == ErrorCode.DENIED:
            level = "warning"
        elif event == "admin.asked" and code in _LOOKING:
            level = "debug"
        fields: dict[str, Any] = {"name": session.client.name, "address": session.address, "peer": session.peer}
        if other:
            fields[other_side] = other
        if code:
            fields[_CODES.get(event, "code")] = str(code)
        if reason:
            fields["reason"] = reason
        about = f"{session.address}, {other}: {code}" if other else session.address
        log_limiter.note(level, event, about, times, **fields)
