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
    "expiring",
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
    "in_flight",
    "revoked",
    "retained",
    "waiting_requests",
}
MADE_ANEW = {
    "addresses_asked",
    "waiting_count",
    "cut",
    "widest",
    "rank",
    "spread",
    "fanouts",
    "generation",
    "connection",
    "routes",
    "topics_version",
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
