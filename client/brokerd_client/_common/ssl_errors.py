"""Errors of files that the ssl module can't use, in words."""

from __future__ import annotations

__all__ = ["ssl_fault"]


def ssl_fault(error: OSError) -> str:
    """Return the reason of an error of the ssl module, or the system's text."""
    return str(getattr(error, "reason", None) or error.strerror or error).lower().replace("_", " ")
