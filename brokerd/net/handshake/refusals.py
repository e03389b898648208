"""Counts and logs connections that are refused before they have a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd.net.bound_loggers import handshake_logger

if TYPE_CHECKING:
    from brokerd.net.context import Context
    from brokerd.net.counters import HandshakeOutcome
    from brokerd.net.handshake.pending import PendingConnection

__all__ = ["note_refusal"]


def note_refusal(
    context: Context, pending: PendingConnection, reason: str, outcome: HandshakeOutcome
) -> None:
    """Count and log a refused connection, with the name that it claimed without proof."""
    context.counters.handshakes[outcome] += 1
    credential = pending.credential
    party = pending.origin if credential is None else credential.client.name
    claimed = pending.claimed if credential is None else credential.client.name
    if claimed:
        context.broker.incidents.add_rejection(claimed, reason, context.wall())
    claim: dict[str, Any] = {}
    if credential is None and pending.claimed:
        exists = bool(context.keyring.named(pending.claimed))
        claim = {"claimed": pending.claimed, "exists": exists}
    context.log_limiter.note(
        "warning",
        "client.refused",
        f"{party}: {reason}",
        log=handshake_logger(context.log, pending),
        reason=reason,
        **claim,
    )
