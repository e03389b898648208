"""Counts and logs connections that are refused before they have a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brokerd.net.context import Context
    from brokerd.net.counters import HandshakeOutcome
    from brokerd.net.handshake.pending import PendingConnection

__all__ = ["note_refusal"]


def note_refusal(
    context: Context, pending: PendingConnection, reason: str, outcome: HandshakeOutcome
) -> None:
    """Count and log a refused connection."""
    context.counters.handshakes[outcome] += 1
    client = None if pending.credential is None else pending.credential.client.name
    fields: dict[str, Any] = {} if client is None else {"name": client}
    fields |= {"peer": pending.peer, "listener": pending.listener, "reason": reason}
    context.log_limiter.note(
        "warning", "client.refused", f"{client or pending.origin}: {reason}", **fields
    )
