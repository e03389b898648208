"""The error of a broker that can't be a part of its cluster."""

from __future__ import annotations

__all__ = ["MembershipError"]


class MembershipError(Exception):
    """This broker can't be a part of its cluster; the text says why."""
