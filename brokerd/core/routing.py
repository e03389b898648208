"""Picks the routing loop: the compiled one where it was built, else its readable twin.

``BROKERD_PURE=1`` in the environment forces the twin. ``NAME`` says which one runs.
"""

from __future__ import annotations

from brokerd.core._routing_py import NAME, feed

__all__ = ["NAME", "feed"]
