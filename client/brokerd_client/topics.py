"""Whether a topic fits a subscription's pattern: docs/protocol.md, "Topics". No I/O.

The broker asks it of its rules, and a client of its own subscriptions, each of which gets the events it
asked for. Patterns and topics have been checked by wire.envelope before they come here.
"""

from __future__ import annotations

__all__ = ["has_wildcard", "matches"]


def has_wildcard(pattern: str) -> bool:
    """Return whether the pattern can fit more topics than the one it spells."""
    return "*" in pattern.split(".") or pattern == ">" or pattern.endswith(".>")


def matches(pattern: str, topic: str) -> bool:
    """Return whether ``topic`` fits: ``*`` stands for one token, a final ``>`` for one or more.

    A pattern that begins with either does not match the broker's own topics, which begin with ``$``.
    """
    wanted, given = pattern.split("."), topic.split(".")
    if topic.startswith("$") and wanted[0] in ("*", ">"):
        return False
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("*", token) for want, token in zip(wanted, given, strict=True))
