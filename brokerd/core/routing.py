"""The routing loop in use: the compiled one, or its Python twin.

``NAME`` says which one runs. It holds for all of ``brokerd.core.compiled.MODULES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brokerd.core import WHY_SOURCES

if TYPE_CHECKING or WHY_SOURCES:
    from brokerd.core._routing_py import NAME, feed, sort_frames
else:
    from brokerd.core._routing_c import NAME, feed, sort_frames

__all__ = ["NAME", "feed", "sort_frames"]
