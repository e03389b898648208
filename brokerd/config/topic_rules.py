"""Rules of topics: whether one pattern covers another."""

from __future__ import annotations

__all__ = ["covers"]


def covers(rule_pattern: str, pattern: str) -> bool:
    """Return whether everything that ``pattern`` can match is matched by
    ``rule_pattern`` too.
    """
    rule, tokens = rule_pattern.split("."), pattern.split(".")
    if rule[0] in ("*", ">") and tokens[0].startswith("$"):
        return False
    for position, expected in enumerate(rule):
        if expected == ">":
            return position < len(tokens)
        if position >= len(tokens) or tokens[position] == ">":
            return False
        if expected not in ("*", tokens[position]):
            return False
    return len(rule) == len(tokens)
