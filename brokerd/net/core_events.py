"""Turns the core's events into log events: their levels and the names of their fields.

A refused message concerns its sender. The sender has the error, and the log has each at
the level ``debug``, and their number once a minute. A *denied* message concerns the
operator. Either the rules are wrong, or a client tries something that it may not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from brokerd.core.log_events import LogEvent
from brokerd.log.minute_counts import MinuteCounts
from brokerd.log.rate_limit import LogRateLimiter
from brokerd.net.bound_loggers import session_logger
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["LEVELS", "report"]

#: For each event of the core: its level, and the field that names the other side.
LEVELS: Final = {
    "message.refused": ("debug", "to"),
    "message.dropped": ("warning", "sender"),
    "message.unreported": ("warning", "to"),
    "client.slow": ("warning", "sender"),
    "client.recovered": ("info", ""),
    "client.held": ("debug", "to"),
    "client.unsubscribed": ("info", "topic"),
    "admin.asked": ("info", "to"),
    "mailbox.dead": ("warning", "mailbox"),
    "mailbox.expired": ("info", "mailbox"),
    "mailbox.dead_full": ("warning", "mailbox"),
    "mailbox.ack_timeout": ("warning", "mailbox"),
    "mailbox.changed": ("info", "mailbox"),
    "mailbox.shown": ("info", "mailbox"),
}
#: Field names of codes in events whose code is not an error code.
_CODES: Final = {
    "client.slow": "when_full",
    "client.unsubscribed": "group",
    "admin.asked": "op",
    "mailbox.changed": "op",
    "mailbox.dead": "sender",
    "mailbox.expired": "sender",
    "mailbox.shown": "op",
}
#: Operations that change nothing, and that a status display may call every second.
_LOOKING: Final = frozenset({"stats", "connections", "channels", "can", "keys"})


def report(
    log_events: Iterable[LogEvent], log_limiter: LogRateLimiter, refusals: MinuteCounts
) -> None:
    """Log the core's events. refusals: counts the messages that are not logged at info."""
    for event, session, other, code, reason, times, _, _ in log_events:
        level, other_side = LEVELS[event]
        if code == ErrorCode.DENIED:
            level = "warning"
        elif event == "message.refused" and session is not None:
            parties = {"sender": session.client.name, "to": other, "code": str(code)}
            refusals.note("message.refusals", parties, times, reason=reason)
        elif event == "admin.asked" and code in _LOOKING:
            level = "debug"
        fields: dict[str, Any] = {}
        if other:
            fields[other_side] = other
        if code:
            fields[_CODES.get(event, "code")] = str(code)
        if reason:
            fields["reason"] = reason
        address = "" if session is None else session.address
        about = f"{address}, {other}: {code}" if other else address
        log = log_limiter.log if session is None else session_logger(log_limiter.log, session)
        log_limiter.note(level, event, about, times, log=log, **fields)
