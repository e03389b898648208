"""Matching of topics and subscription patterns: docs/protocol.md, "Topics". No I/O.

The broker matches topics with its rules. A client matches events with its own
subscriptions, so that each gets its events. wire.envelope has already checked the
patterns and topics.
"""

from __future__ import annotations

__all__ = ["has_wildcard", "matches"]


def has_wildcard(pattern: str) -> bool:
    """Return whether the pattern can match more than one topic."""
    return "*" in pattern.split(".") or pattern == ">" or pattern.endswith(".>")


def matches(pattern: str, topic: str) -> bool:
    """Return whether the topic matches the pattern.

    In a pattern, ``*`` stands for one token, and a final ``>`` for one or more. A
    pattern that begins with a wildcard does not match the broker's own topics, which
    begin with ``$``.
    """
    pattern_tokens, topic_tokens = pattern.split("."), topic.split(".")
    if topic.startswith("$") and pattern_tokens[0] in ("*", ">"):
        return False
    if pattern_tokens[-1] == ">":
        pattern_tokens.pop()
        if len(topic_tokens) <= len(pattern_tokens):
            return False
        topic_tokens = topic_tokens[: len(pattern_tokens)]
    return len(pattern_tokens) == len(topic_tokens) and all(
        pattern_token in ("*", topic_token)
        for pattern_token, topic_token in zip(pattern_tokens, topic_tokens)
    )
