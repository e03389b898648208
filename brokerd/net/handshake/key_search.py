"""The search in use for the key of an answer: the compiled one, else its Python twin.

``BROKERD_PURE=1`` in the environment forces the twin, as for the routing loop.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("BROKERD_PURE") == "1":
    from brokerd.net.handshake._key_search_py import NAME, SLICE, find, prepare
else:
    try:
        from brokerd.net.handshake._key_search_c import NAME, SLICE, find, prepare
    except ImportError:
        from brokerd.net.handshake._key_search_py import NAME, SLICE, find, prepare

__all__ = ["NAME", "SLICE", "find", "prepare"]
