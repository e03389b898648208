"""The store process: ``python -P brokerd/store/__main__.py DIRECTORY DESCRIPTOR POLL``.

It is run as a file, so that it finds its packages however the broker was started.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from brokerd.store.process import main

    main(*sys.argv[1:])
