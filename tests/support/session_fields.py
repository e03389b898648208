"""The attributes of a session, by what an upgrade does with them."""

from __future__ import annotations

#: The attributes of a session: captured, or made again (found again, empty, or the
#: connection's own).
CAPTURED = {
    "address",
    "allowance",
    "arrived",
    "outgoing_requests",
    "bytes_in",
    "charged",
    "client",
    "closing",
    "errors_in",
    "goaway",
    "held_by",
    "hold_deadline",
    "instance",
    "closed_number",
    "messages_in",
    "number",
    "open",
    "outbox",
    "incoming_requests",
    "peer",
    "recipients",
    "reached_by_event",
    "since",
    "bytes_to_skip",
    "slow",
    "sender_header",
    "subscriptions",
    "waiters",
    "cancels",
    "listens",
    "in_flight",
    "revoked",
    "waiting_requests",
}
MADE_ANEW = {
    "answers",
    "host",
    "identity",
    "outgoing_count",
    "waiting_count",
    "uncommitted",
    # Restored with the mailboxes.
    "consumer",
    "cut",
    "widest",
    "rank",
    "spread",
    "generation",
    "connection",
    "route",
    "routes",
}
#: Only connections that are about to end have these, and none of those is captured.
PARTING = {
    "closing_code",
    "finished",
    "finishing",
    "goaway_sent",
    "marked_at",
    "marks",
    "mute",
    "parting",
    "retired",
}
