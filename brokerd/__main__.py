"""``python -m brokerd``: the command brokerd, with an interpreter of one's choice or
where no script is installed.
"""

from __future__ import annotations

from brokerd.entry import brokerd

if __name__ == "__main__":
    brokerd()
