"""``python -m brokerd``: the command brokerd with a chosen interpreter, or without an
installed script.
"""

from __future__ import annotations

from brokerd.entry import brokerd

if __name__ == "__main__":
    brokerd()
