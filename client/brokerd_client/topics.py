"""Whether a topic fits a subscription's pattern: the client's side of docs/protocol.md, "Topics".

The broker decides which events a connection gets; here one event is handed to the subscriptions of this
process that asked for it. Patterns and topics have been checked by wire.envelope before they come here.
"""

from __future__ import annotations

__all__ = ["has_wildcard", "matches"]


def has_wildcard(pattern: str) -> bool:
    """Return whether the pattern can fit more topics than the one it spells."""
    return "*" in pattern.split(".") or pattern == ">" or pattern.endswith(".>")


def matches(pattern: str, topic: str) -> bool:
    """Return whether ``topic`` fits: ``*`` stands for one token, a final ``>`` for one or more."""
    wanted, given = pattern.split("."), topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("*", token) for want, token in zip(wanted, given, strict=True))
