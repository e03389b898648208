"""The routing loop in use: the compiled one where it was built, else its Python twin.

``BROKERD_PURE=1`` in the environment forces the twin. ``NAME`` says which one runs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("BROKERD_PURE") == "1":
    from brokerd.core._routing_py import NAME, RouteEntry, WriteBuffer, feed
else:
    try:
        from brokerd.core._routing_c import NAME, RouteEntry, WriteBuffer, feed
    except ImportError:
        from brokerd.core._routing_py import NAME, RouteEntry, WriteBuffer, feed

__all__ = ["NAME", "RouteEntry", "WriteBuffer", "feed"]
